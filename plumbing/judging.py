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

from plumbing.errors import UserError, reading
from plumbing.files import atomic, check_outputs
from plumbing.stats import markdown, raw_agreement, wilson

QUESTIONS = ("Which video is more visually appealing?",                 # v1, Sec. 4.2
             "Which video better fits the text description?",
             "Which video do you prefer given the prompt?")
LIMIT = 200                                                 # MiB of a page; browsers take more, slowly
PAGE = Path(__file__).parent / "compare.html"
Model = tuple[str, Path]                                    # name, folder of clips
Models = tuple[str, str]                                    # names of A and B


def prompt_of(path: str | Path) -> str:
    """The prompt that a clip's name tells: VBench writes PROMPT-NUMBER.mp4."""
    stem = Path(path).stem
    prompt, _, number = stem.rpartition("-")
    return prompt if prompt and number.isdigit() else stem


# ---- the pages ---------------------------------------------------------------------------------------------


def make_pages(a: Model, b: Model, out: Path, size: int) -> list[str]:
    """Writes OUT, OUT-2, ... with `size` pairs each, or one page with all -> a line for each."""
    in_a, in_b = ({file.name for file in folder.glob("*.mp4")} for _, folder in (a, b))
    names = random.Random("order").sample(sorted(in_a & in_b), len(in_a & in_b))
    if not names:
        raise UserError(f"{a[1]} and {b[1]} have no .mp4 clip of one name; a pair is two files PROMPT-0.mp4 "
                        "of the same prompt and seed")
    lines = [f"without partner: {len(in_a ^ in_b)} clips, e.g. {min(in_a ^ in_b)}"] if in_a != in_b else []

    for number, start in enumerate(range(0, len(names), size or len(names)), 1):
        clips = names[start:start + (size or len(names))]
        path = out if number == 1 else out.with_stem(f"{out.stem}-{number}")
        check_outputs({"--out": path}, {})
        html = page(a, b, clips)
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
        files = [(folder / clip).read_bytes() for _, folder in ((a, b) if left == "A" else (b, a))]
        if any(file[4:8] != b"ftyp" for file in files):                 # where every mp4 begins
            raise UserError(f"{clip}: not an mp4, or a damaged one, in {a[1]} or {b[1]}")
        embedded = ["data:video/mp4;base64," + base64.b64encode(file).decode() for file in files]
        pairs.append(dict(pair=clip, prompt=prompt_of(clip), left=left, clips=embedded))
    content = dict(names=[a[0], b[0]], questions=QUESTIONS, pairs=pairs)
    content["page"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
    inside_html = json.dumps(content).replace("<", "\\u003c")           # a prompt may hold "</script>"
    return PAGE.read_text(encoding="utf-8").replace("{{content}}", inside_html)


# ---- the votes ---------------------------------------------------------------------------------------------


def read_votes(paths: Iterable[str | Path]) -> dict[Models, dict[str, dict[str, list[str]]]]:
    """{(A, B): {pair: {judge: per question "A", "B" or "same"}}} of several files. A page of the same models
    the other way round is turned; of a judge who voted twice on a pair the last file counts."""
    comparisons: dict[Models, dict] = {}
    for path in paths:
        with reading(path, "a file of votes that a page of `compare` saved"):
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            (a, b), judge = content["names"], content["judge"]
            turned = (b, a) in comparisons
            sides = {"A": "B", "B": "A", "same": "same"} if turned else {"A": "A", "B": "B", "same": "same"}
            by_pair = comparisons.setdefault((b, a) if turned else (a, b), {})
            for vote in content["votes"]:
                answers = [sides[answer] for answer in vote["answers"]]
                assert len(answers) == len(QUESTIONS), vote["pair"]
                by_pair.setdefault(vote["pair"], {})[judge] = answers
        if not content["votes"]:
            raise UserError(f"{path}: no votes in it; was it saved before the first pair was done?")
    return comparisons


def table(names: Models, by_pair: dict[str, dict[str, list[str]]]) -> str:
    """Win rates per question in percent, with Wilson's interval, and how often two judges of a pair agree.
    Judges of a pair are averaged: they do not make it several pairs."""
    rows = []
    for index, question in enumerate(QUESTIONS):
        answers = [[row[index] for row in by_judge.values()] for by_judge in by_pair.values()]
        a, same, b = (sum(row.count(answer) / len(row) for row in answers) / len(answers)
                      for answer in ("A", "same", "B"))
        low, high = wilson(b + same / 2, len(answers))
        shared = [row for row in answers if len(row) > 1]
        rows.append([question, *(f"{100 * share:.1f}" for share in (a, same, b)),
                     f"{100 * (b + same / 2):.1f} ({100 * low:.1f} to {100 * high:.1f})",
                     f"{100 * raw_agreement(shared):.1f} % of {len(shared)}" if shared else "-"])

    judges = {judge for by_judge in by_pair.values() for judge in by_judge}
    titles = [f"{len(by_pair)} pairs, judges: {len(judges)}", names[0], "no difference", names[1],
              f"{names[1]}, ties half (95 %)", "two judges agree"]
    return markdown(titles, rows)
