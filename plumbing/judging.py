"""Blind comparison by people: two folders of clips -> a page that asks; files of answers -> win rates.

The page is compare.html with the clips put into it. It does not show who made a clip; its source does.
Its answers ("votes") are JSON:
    {"page": id, "names": [A, B], "judge": name, "pairs": how many, "questions": [...],
     "votes": [{"pair": file name, "prompt": ..., "left": "A" or "B", "answers": ["A", "B" or "same", ...]}]}
"""
import base64
import hashlib
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from plumbing.errors import UserError, reading
from plumbing.files import atomic
from plumbing.stats import markdown, raw_agreement, wilson

QUESTIONS = ("Which video is more visually appealing?",                 # v1, Sec. 4.2
             "Which video better fits the text description?",
             "Which video do you prefer given the prompt?")
LIMIT = 200                                                 # MiB of a page; browsers take more, slowly
PAGE = Path(__file__).parent / "compare.html"
Model = tuple[str, Path]                                    # name, folder of clips


def prompt_of(path: str | Path) -> str:
    """The prompt that a clip's name tells: VBench writes PROMPT-NUMBER.mp4."""
    stem = Path(path).stem
    prompt, _, number = stem.rpartition("-")
    return prompt if prompt and number.isdigit() else stem


# ---- the pages ---------------------------------------------------------------------------------------------


def make_pages(a: Model, b: Model, out: Path, size: int) -> list[str]:
    """Writes OUT, OUT-2, ... with `size` pairs each, in a random order, or one page with all; returns a line
    for each."""
    in_a, in_b = ({file.name for file in folder.glob("*.mp4")} for _, folder in (a, b))
    names = random.Random("order").sample(sorted(in_a & in_b), len(in_a & in_b))
    if not names:
        raise UserError(f"{a[1]} and {b[1]} have no .mp4 clip of one name; a pair is two files PROMPT-0.mp4 "
                        "of the same prompt and seed")
    lines = [f"without partner: {len(in_a ^ in_b)} clips, e.g. {min(in_a ^ in_b)}"] if in_a != in_b else []

    for number, start in enumerate(range(0, len(names), size or len(names)), 1):
        clips = names[start:start + (size or len(names))]
        path = out if number == 1 else out.with_stem(f"{out.stem}-{number}")
        html = page(a, b, clips)
        if path.exists() and 'id="content"' not in path.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"--out {path} exists, and is no page of `compare`; choose another name")
        with atomic(path) as temporary:
            temporary.write_text(html, encoding="utf-8")
        lines.insert(number - 1, f"{path}: {len(clips)} pairs, {len(html) / 2 ** 20:.1f} MiB")
    return lines


def page(a: Model, b: Model, clips: list[str]) -> str:
    """HTML that shows the clips of both models, either on the left in one half of the pairs."""
    size = sum((folder / clip).stat().st_size for _, folder in (a, b) for clip in clips) * 4 // 3
    if size > LIMIT * 2 ** 20:
        raise UserError(f"{len(clips)} pairs are {size >> 20} MiB, and a page holds at most {LIMIT}; "
                        f"make several: --pairs {len(clips) * LIMIT * 2 ** 20 // size or 1}")

    draw, pairs = random.Random(f"sides {clips}"), []
    start = draw.randrange(2)
    for clip, left in zip(clips, draw.sample(("AB" * len(clips))[start:start + len(clips)], len(clips))):
        embedded = [data_uri(folder / clip) for _, folder in ((a, b) if left == "A" else (b, a))]
        pairs.append(dict(pair=clip, prompt=prompt_of(clip), left=left, clips=embedded))
    content = dict(names=[a[0], b[0]], questions=QUESTIONS, pairs=pairs)
    content["page"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
    inside_html = json.dumps(content).replace("<", "\\u003c")           # a prompt may hold "</script>"
    return PAGE.read_text(encoding="utf-8").replace("{{content}}", inside_html)


def data_uri(clip: Path) -> str:
    """An mp4 as text that a page can hold."""
    content = clip.read_bytes()
    if content[4:8] != b"ftyp":                             # where every mp4 begins
        raise UserError(f"{clip}: not an mp4, or a damaged one")
    return "data:video/mp4;base64," + base64.b64encode(content).decode()


# ---- the votes ---------------------------------------------------------------------------------------------


class Vote(NamedTuple):
    """What one judge said of one pair: per question "A", "B" or "same"."""
    names: tuple[str, str]          # of the models A and B
    pair: str
    judge: str
    answers: tuple[str, ...]

    def swapped(self) -> "Vote":
        """The same vote with the models in the other order."""
        other = {"A": "B", "B": "A", "same": "same"}
        return self._replace(names=self.names[::-1], answers=tuple(other[answer] for answer in self.answers))


def read_votes(paths: Iterable[str | Path]) -> list[Vote]:
    """The votes of several files. Of a judge who voted twice on a pair the last file counts."""
    votes: dict[tuple, Vote] = {}
    for path in paths:
        with reading(path, "a file of votes that a page of `compare` saved"):
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            (a, b), judge = content["names"], content["judge"]
            for vote in content["votes"]:
                answers = tuple(vote["answers"])
                assert len(answers) == len(QUESTIONS) and {*answers} <= {"A", "B", "same"}, vote["pair"]
                votes[a, b, vote["pair"], judge] = Vote((a, b), vote["pair"], judge, answers)
        if not content["votes"]:
            raise UserError(f"{path}: no votes in it; was it saved before the first pair was done?")
    return list(votes.values())


def tally(votes: list[Vote]) -> dict[tuple[str, str], list[Vote]]:
    """Votes by comparison (A, B); those of a page of the same models the other way round are turned."""
    comparisons: dict[tuple[str, str], list[Vote]] = {}
    for vote in votes:
        vote = vote.swapped() if vote.names[::-1] in comparisons else vote
        comparisons.setdefault(vote.names, []).append(vote)
    return comparisons


def table(names: tuple[str, str], votes: list[Vote]) -> str:
    """Win rates per question in percent, with Wilson's interval, and how often two judges of a pair agree.
    Judges of a pair are averaged: they do not make it several pairs."""
    judges, rows = {vote.judge for vote in votes}, []
    for index, question in enumerate(QUESTIONS):
        by_pair: dict[str, dict[str, str]] = {}                         # pair -> judge -> answer
        for vote in votes:
            by_pair.setdefault(vote.pair, {})[vote.judge] = vote.answers[index]
        answers = [list(by_judge.values()) for by_judge in by_pair.values()]
        a, same, b = (sum(row.count(answer) / len(row) for row in answers) / len(answers)
                      for answer in ("A", "same", "B"))
        low, high = wilson(b + same / 2, len(answers))
        shared = [row for row in answers if len(row) > 1]
        rows.append([question, *(f"{100 * share:.1f}" for share in (a, same, b)),
                     f"{100 * (b + same / 2):.1f} ({100 * low:.1f} to {100 * high:.1f})",
                     f"{100 * raw_agreement(shared):.1f} % of {len(shared)}" if shared else "-"])
    titles = [f"{len(answers)} pairs, judges: {len(judges)}", names[0], "no difference", names[1],
              f"{names[1]}, ties half (95 %)", "two judges agree"]
    return markdown(titles, rows)
