"""Blind comparison by people: two folders of clips -> a page that asks; files of answers -> win rates.

The page is compare.html with the clips put into it. It does not show who made a clip; its source does.
Its answers ("votes") are JSON:
    {"page": id, "names": [A, B], "judge": name, "pairs": how many, "questions": [...],
     "votes": [{"pair": file name, "prompt": ..., "left": "A" or "B", "answers": ["A", "B" or "same", ...]}]}
"""
import base64
import hashlib
import json
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from plumbing import stats
from plumbing.files import atomic

QUESTIONS = ("Which video is more visually appealing?",                 # v1, Sec. 4.2
             "Which video better fits the text description?",
             "Which video do you prefer given the prompt?")
LIMIT = 200                                                 # MiB of a page; browsers take more, slowly
PAGE = Path(__file__).parent / "compare.html"


def named_folder(argument: str) -> tuple[str, Path]:
    """NAME=FOLDER or FOLDER -> name, folder. Without NAME a model is called after its folder."""
    name, separator, folder = argument.partition("=")
    if Path(argument).exists() or not separator:
        name, folder = Path(argument).resolve().name, argument
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder")
    return name, Path(folder)


def prompt_of(path: str | Path) -> str:
    """The prompt that a clip's name tells: VBench writes PROMPT-NUMBER.mp4."""
    stem = Path(path).stem
    prompt, _, number = stem.rpartition("-")
    return prompt if prompt and number.isdigit() else stem


# ---- the page ----------------------------------------------------------------------------------------------


def matching(a: Path, b: Path) -> tuple[list[str], list[str]]:
    """Names of the clips that both folders hold, and of those that only one does."""
    in_a, in_b = ({file.name for file in folder.glob("*.mp4")} for folder in (a, b))
    for folder, clips in ((a, in_a), (b, in_b)):
        if not clips:
            raise ValueError(f"{folder}: no .mp4 clips in this folder")
    if not in_a & in_b:
        raise ValueError(f"{a} and {b} have no clip of one name; a pair is two files PROMPT-0.mp4 "
                         "of the same prompt and seed")
    return sorted(in_a & in_b), sorted(in_a ^ in_b)


def chosen(names: list[str], seed: int, first: int, count: int) -> list[str]:
    """Pairs first, first + 1, ... (count of them; 0: all the rest) of an order that the seed draws."""
    order = random.Random(f"order {seed}").sample(names, len(names))
    if first >= len(order):
        raise ValueError(f"--first {first}: there are {len(order)} pairs")
    return order[first:first + count] if count else order[first:]


def data_uri(clip: Path) -> str:
    """An mp4 as text that a page can hold."""
    content = clip.read_bytes()
    if content[4:8] != b"ftyp":                             # where every mp4 begins
        raise ValueError(f"{clip}: not an mp4, or a damaged one")
    return "data:video/mp4;base64," + base64.b64encode(content).decode()


def page(a: tuple[str, Path], b: tuple[str, Path], clips: list[str], seed: int) -> str:
    """HTML that shows the clips of folders a and b, each (name, folder), on sides drawn from the seed."""
    size = sum((folder / clip).stat().st_size for _, folder in (a, b) for clip in clips) * 4 // 3
    if size > LIMIT * 2 ** 20:
        fitting = len(clips) * LIMIT * 2 ** 20 // size or 1
        raise ValueError(f"{len(clips)} pairs are {size >> 20} MiB, and a page holds at most {LIMIT}; "
                         f"make several: --pairs {fitting} --first 0, then --first {fitting}, ...")

    pairs = []
    for clip in clips:
        left = random.Random(f"side {seed} {clip}").choice("AB")
        sides = (a, b) if left == "A" else (b, a)
        embedded = [data_uri(folder / clip) for _, folder in sides]
        pairs.append(dict(pair=clip, prompt=prompt_of(clip), left=left, clips=embedded))

    content = dict(names=[a[0], b[0]], questions=QUESTIONS, pairs=pairs)
    content["page"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
    inside_html = json.dumps(content).replace("<", "\\u003c")           # a prompt may hold "</script>"
    return PAGE.read_text(encoding="utf-8").replace("{{content}}", inside_html)


def write_page(out: str | Path, html: str) -> None:
    """Writes a page, whole or not at all."""
    with atomic(out) as temporary:
        temporary.write_text(html, encoding="utf-8")


# ---- the votes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vote:
    """What one judge said of one pair: per question "A", "B" or "same"."""
    names: tuple[str, str]          # of the models A and B
    pair: str
    judge: str
    answers: tuple[str, ...]

    def swapped(self) -> "Vote":
        """The same vote with the models in the other order."""
        other = {"A": "B", "B": "A", "same": "same"}
        return Vote(self.names[::-1], self.pair, self.judge, tuple(other[answer] for answer in self.answers))


def read_votes(paths: Iterable[str | Path]) -> list[Vote]:
    """The votes of several files. Of a judge who voted twice on a pair the last file counts."""
    votes: dict[tuple, Vote] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            names, judge = tuple(map(str, content["names"])), str(content["judge"])
            found = [Vote(names, str(v["pair"]), judge, tuple(v["answers"])) for v in content["votes"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a file of votes that a page of `compare` saved") from error
        complete = all(len(vote.answers) == len(QUESTIONS) for vote in found)
        known = {answer for vote in found for answer in vote.answers} <= {"A", "B", "same"}
        if len(names) != 2 or not complete or not known:
            raise ValueError(f"{path}: a vote is {len(QUESTIONS)} answers, each A, B or same")
        if not found:
            raise ValueError(f"{path}: no votes in it; was it saved before the first pair was done?")
        votes |= {(vote.names, vote.pair, vote.judge): vote for vote in found}
    return list(votes.values())


@dataclass(frozen=True)
class Result:
    """The answers to one question about models A and B, in shares. A pair counts once, whoever judged it."""
    question: str
    pairs: int
    a: float                        # share of answers for A, for neither, for B
    same: float
    b: float
    interval: tuple[float, float]   # of b + same / 2
    judges: int
    shared: int = 0                 # pairs that several judges answered, and on these:
    agreement: float = math.nan     # how often two judges say the same
    kappa: float = math.nan         # Cohen's of two judges, Fleiss' of more


def tally(votes: list[Vote]) -> dict[tuple[str, str], list[Result]]:
    """{(A, B): a result per question}. Judges of a pair are averaged: they do not make it several pairs."""
    comparisons: dict[tuple[str, str], list[Vote]] = {}
    for vote in votes:
        if vote.names[::-1] in comparisons:                 # a page of these models the other way round
            vote = vote.swapped()
        comparisons.setdefault(vote.names, []).append(vote)
    return {names: [of_question(index, group) for index in range(len(QUESTIONS))]
            for names, group in comparisons.items()}


def of_question(index: int, votes: list[Vote]) -> Result:
    """The result of one question of one comparison."""
    by_pair: dict[str, dict[str, str]] = {}                             # pair -> judge -> answer
    for vote in votes:
        by_pair.setdefault(vote.pair, {})[vote.judge] = vote.answers[index]

    def share(answer):
        per_pair = [list(said.values()).count(answer) / len(said) for said in by_pair.values()]
        return sum(per_pair) / len(by_pair)

    a, same, b = share("A"), share("same"), share("B")
    interval = stats.wilson(b + same / 2, len(by_pair))
    judges = sorted({vote.judge for vote in votes})
    shared = [tuple(said[judge] for judge in judges if judge in said)
              for said in by_pair.values() if len(said) > 1]
    agreed = {}
    if shared:
        kappa = stats.cohens_kappa if len(judges) == 2 else stats.fleiss_kappa
        agreed = dict(shared=len(shared), agreement=stats.raw_agreement(shared), kappa=kappa(shared))
    return Result(QUESTIONS[index], len(by_pair), a, same, b, interval, len(judges), **agreed)


def as_markdown(results: dict[tuple[str, str], list[Result]]) -> str:
    """Tables of win rates, a comparison after the other, and of agreement where there are several judges."""
    parts = []
    for (a, b), rows in results.items():
        head = f"{rows[0].pairs} pairs, judges: {rows[0].judges}"
        lines = [f"| {head} | {a} | no difference | {b} | {b}, ties half (95 %) |", "|---" * 5 + "|"]
        for row in rows:
            low, high = row.interval
            cells = [row.question] + [f"{100 * share:.1f}" for share in (row.a, row.same, row.b)]
            cells.append(f"{100 * (row.b + row.same / 2):.1f} ({100 * low:.1f} to {100 * high:.1f})")
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))

        if rows[0].shared:
            kind = "Cohen's" if rows[0].judges == 2 else "Fleiss'"
            head = f"agreement of {rows[0].judges} judges on {rows[0].shared} pairs"
            lines = [f"| {head} | raw | {kind} kappa |", "|---" * 3 + "|"]
            lines += [f"| {row.question} | {100 * row.agreement:.1f} % | {row.kappa:.2f} |" for row in rows]
            parts.append("\n".join(lines))
    return "\n\n".join(parts)
