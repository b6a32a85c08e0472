"""Lists of prompts, and the files of their clips."""
import csv
import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from plumbing.errors import UserError, reading

COLUMNS = ("prompt_en", "prompt", "caption", "text")        # of tables and objects; the first that is there
SUFFIXES = (".mp4", ".gif", ".png", ".safetensors")        # of clips
FORBIDDEN = r"[/\r\n\t]" if os.name != "nt" else r'[<>:"/\\|?*\x00-\x1f]'      # in files' names
NAME_BYTES = 240                        # of a name; file systems take 255, and -24.mp4 comes behind it


class Prompt(NamedTuple):
    """A row of a list."""
    text: str
    name: str                           # of its files, without -NUMBER.mp4
    count: int = 1                      # clips, unless --num says otherwise


class Job(NamedTuple):
    """One clip to make."""
    prompt: str
    seed: int
    path: Path


def read_prompts(path: str) -> list[Prompt]:
    """Text, a prompt per line; .csv and .tsv with a header; .json and .jsonl of strings or objects."""
    suffix = Path(path).suffix.lower()
    with reading(path, "a list of prompts in utf-8"):
        text = Path(path).read_bytes().decode("utf-8-sig")
        rows = [line for line in text.split("\n") if line.strip()]             # splitlines cuts at U+2028
        if suffix in (".csv", ".tsv"):
            comma = "," if suffix == ".csv" else "\t"
            rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=comma, strict=True))
        elif suffix == ".json":
            rows = json.loads(text)
            assert isinstance(rows, list), "it holds no list"
        elif suffix == ".jsonl":
            rows = list(map(json.loads, rows))

    prompts: dict[tuple, Prompt] = {}                       # a prompt of several dimensions of VBench is one
    for number, row in enumerate(rows, 1):
        prompt = read_row(row, f"{path}, entry {number}")
        before = prompts.setdefault(prompt[:2], prompt)
        prompts[prompt[:2]] = max(prompt, before)
    if not prompts:
        raise UserError(f"{path}: no prompts in it")
    return list(prompts.values())


def read_row(row, place: str) -> Prompt:
    """A string, or an object with one of COLUMNS, perhaps `name`, and `dimension` of VBench's lists, which
    tells how many clips are usual. place: of the row, for UserError."""
    row = {"prompt": row} if isinstance(row, str) else row
    if not isinstance(row, dict) or None in row:            # DictReader's key of surplus fields
        raise UserError(f"{place}: neither a text nor a row of the header's columns; quote texts with commas")

    values = {str(key).strip().lower(): value for key, value in row.items()}
    text = next((values[column] for column in COLUMNS if values.get(column)), None)
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise UserError(f"{place}: no prompt in any of {', '.join(COLUMNS)}; it has {', '.join(values):.80}")

    text, dimensions, count = text.strip(), values.get("dimension"), 1
    name = str(values.get("name") or text)
    if isinstance(dimensions, list) and any(str(name)[:1].isupper() for name in dimensions):
        name, count = name[:180], 20 if "Diversity" in dimensions else 3        # VBench-2.0: Camera_Motion
    elif isinstance(dimensions, list):
        count = 25 if "temporal_flickering" in dimensions else 5
    return Prompt(text, file_name(name), count)


def file_name(text: str) -> str:
    """The text as a file's name; one that is too long is cut, and its hash keeps it apart from others."""
    name = re.sub(FORBIDDEN, " ", text)
    if len(os.fsencode(name)) <= NAME_BYTES:
        return name
    start = os.fsencode(name)[:NAME_BYTES - 9].decode(errors="ignore")
    return f"{start} {hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def plan(prompts: list[Prompt], out: Path, num: int | None, seed: int, step: int = 1) -> list[Job]:
    """All clips to make, in order: clip i of each prompt has seed + i * step. Their files are OUT, or OUT-0,
    OUT-1, ...; in a folder, a name without a video's suffix, VBench's PROMPT-i.mp4.

    Raises UserError where two prompts would share a file.
    """
    other_case = out.with_name(out.name.swapcase())
    ignores_case = other_case != out and out.exists() and other_case.exists()
    jobs, owners = [], {}
    for prompt in prompts:
        owner = owners.setdefault(prompt.name.casefold() if ignores_case else prompt.name, prompt)
        if owner != prompt:
            raise UserError(f"the prompts {owner.text!r:.80} and {prompt.text!r:.80} would both be written "
                            f"to {out / prompt.name}-0.mp4; reword one, or give it a name of its own")

        count = num or prompt.count
        for i in range(count):
            path = out / f"{prompt.name}-{i}.mp4"
            if is_file(out):
                path = out if count == 1 else out.with_stem(f"{out.stem}-{i}")
            jobs.append(Job(prompt.text, seed + i * step, path))
    return jobs


def is_file(out: Path) -> bool:
    """Is it the name of a clip, not of a folder of clips, such as v2.0?"""
    return out.suffix.lower() in SUFFIXES
