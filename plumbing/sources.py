"""Where captioned clips come from: folders, manifests and tar shards, one class for files and one for shards.

A source has len(), name(i), and read(i) -> (path or bytes of the video, caption, reward caption or None).
What is wrong with one clip is a ValueError of its read(), with a source a ValueError when it is opened.
"""
import csv
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from plumbing import tars
from plumbing.video import READABLE

SHARDS_MAX = 1_000_000
EXPECTED = "a folder of clips, a .csv or .jsonl manifest, or .tars"


def split_spec(spec: str | Sequence[str | Path]) -> list[str]:
    """'clips,{0,1}.tar' -> names of the sources, split at commas outside of braces; a list as it is."""
    parts = re.split(r",(?![^{]*\})", spec) if isinstance(spec, str) else [str(part) for part in spec]
    return [part.strip() for part in parts if part.strip()]


def open_source(part: str, cache: str | None = None) -> "FileSource | ShardSource":
    """One source by its name; cache: folder for the indices of shards. Raises ValueError."""
    try:
        if part.endswith(".tar"):
            return ShardSource(expand(part), cache)
        if part.endswith((".csv", ".jsonl")):
            return manifest_source(part)
        if os.path.isdir(part):
            return folder_source(part)
        os.stat(part)
    except FileNotFoundError as error:
        raise ValueError(f"no data at {part}: expected {EXPECTED}") from error
    except OSError as error:
        raise ValueError(f"{error.filename or part} cannot be read: {error.strerror}") from error
    raise ValueError(f"{part} is no data: expected {EXPECTED}")


def locate(ends: np.ndarray, index: int) -> tuple[int, int]:
    """Index into a concatenation of parts that end at `ends` -> (part, index in it)."""
    part = int(np.searchsorted(ends, index, side="right"))
    start = ends[part - 1] if part else 0
    return part, int(index - start)


# ---- files, of a folder or a manifest ----------------------------------------------------------------------


class Row(NamedTuple):
    """One clip of a folder or a manifest."""
    path: str
    caption: object = None               # None: in the .txt beside the clip
    reward_caption: object = None
    problem: str = ""                    # why this row cannot be used


class FileSource:
    """Clips in files of their own, their paths relative to the folder `base`."""

    def __init__(self, base: str, rows: list[Row]):
        self.base, self.rows = base, rows

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        return os.path.join(self.base, self.rows[i].path)

    def read(self, i: int) -> tuple[str, object, object]:
        row = self.rows[i]
        if row.problem:
            raise ValueError(row.problem)
        caption = row.caption
        if caption is None:
            beside = Path(self.name(i)).with_suffix(".txt")
            caption = beside.read_text(encoding="utf-8") if beside.exists() else None
        return self.name(i), caption, row.reward_caption


def folder_source(folder: str) -> FileSource:
    """All videos below a folder, each with the .txt of its name as caption. Raises ValueError for none."""
    paths, unread, seen = [], Counter(), set()
    for base, subfolders, names in os.walk(folder, followlinks=True, onerror=raise_error):
        real = os.path.realpath(base)
        if real in seen:                              # a link into a folder that has been read
            subfolders.clear()
            continue
        seen.add(real)

        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith(".") or suffix == ".txt":
                continue
            if suffix in READABLE:
                paths.append(os.path.relpath(os.path.join(base, name), folder))
            else:
                unread[suffix or "without a suffix"] += 1

    if not paths:
        example = "expected *.mp4 with .txt beside them, e.g. 0001.mp4, 0001.txt"
        raise ValueError(f"no clips in {folder}: {example}{hint(folder)}")
    if unread:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in unread.most_common())
        warnings.warn(f"{folder}: files not read: {counts}; clips are {' '.join(READABLE)}", stacklevel=3)
    return FileSource(folder, [Row(path) for path in sorted(paths)])


def raise_error(error: OSError) -> None:
    raise error


def hint(folder: str) -> str:
    """How to name the shards that lie in a folder without clips."""
    shards = sorted(Path(folder).glob("*.tar"))
    if not shards:
        return ""
    return f"; for its shards write '{folder}/{{{shards[0].stem}..{shards[-1].stem}}}.tar'"


def manifest_source(path: str) -> FileSource:
    """The rows of a CSV or JSON-lines file: path (relative to the file), caption, perhaps reward_caption.

    Raises ValueError where the file cannot be split into rows. A row that cannot be used is a bad clip."""
    if path.endswith(".csv"):
        rows, example = csv_rows(path), "path,caption"
    else:
        rows, example = json_rows(path), '{"path": "a/dog.mp4", "caption": "A dog runs."}'
    if not any(row.path and row.caption and not row.problem for row in rows):
        raise ValueError(f"{path}: no row has both a path and a caption; expected {example}")
    return FileSource(os.path.dirname(path), rows)


def csv_rows(path: str) -> list[Row]:
    """Rows of a CSV file whose first line names the columns."""
    rows, limit = [], csv.field_size_limit(2 ** 31 - 1)               # a caption may be long
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = csv.reader(file, strict=True)
            columns = [column.strip() for column in next(lines, [])]
            while True:
                first = lines.line_num + 1
                try:
                    fields = next(lines, None)
                except csv.Error as error:
                    check_quotes(path, first, lines.line_num, [])
                    rows.append(Row("", problem=f"line {first} of {path}: {error}"))
                    continue
                if fields is None:
                    return rows
                if fields:
                    check_quotes(path, first, lines.line_num, fields)
                    rows.append(csv_row(path, first, columns, fields))
    except csv.Error as error:
        raise ValueError(f"{path}, line 1: {error}; expected path,caption") from error
    finally:
        csv.field_size_limit(limit)


def check_quotes(path: str, first: int, last: int, fields: list[str]) -> None:
    """Raises ValueError where what was read from lines `first` to `last` holds whole rows, or is no row."""
    if first == last:
        return
    suffixes = "|".join(suffix[1:] for suffix in READABLE)
    row = rf'\n[^,"\n]+\.({suffixes}),'              # a line that begins as a row does
    if not fields or any(re.search(row, field, re.IGNORECASE) for field in fields):
        raise ValueError(f"{path}, line {first}: a quote that is not closed in its row swallows the rows "
                         "behind it; close it, or double a quote within a caption")


def csv_row(path: str, line: int, columns: list[str], fields: list[str]) -> Row:
    """One row of a manifest; what is wrong with it stands in its `problem`."""
    row, problem = dict(zip(columns, fields)), ""
    clip = row.get("path", "").lstrip("\ufeff")
    if len(fields) > len(columns):
        problem = f'{len(fields)} fields for {len(columns)} columns; quote a caption with commas: "one, two"'
    elif not clip:
        problem = "no path"
    if problem:
        problem = f"line {line} of {path}: {problem}"
    return Row(clip, row.get("caption", ""), row.get("reward_caption"), problem)


def json_rows(path: str) -> list[Row]:
    """Rows of a file with one JSON object a line."""
    rows = []
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
            except (ValueError, RecursionError) as error:
                example = '{"path": "a/dog.mp4", "caption": "A dog runs."}'
                raise ValueError(f"{path}, line {number}: {error}; expected {example}") from error

            clip, caption = row.get("path"), row.get("caption")
            if isinstance(clip, str) and clip:
                rows.append(Row(clip, "" if caption is None else caption, row.get("reward_caption")))
            else:
                rows.append(Row("", problem=f"line {number} of {path}: no path"))
    return rows


# ---- tar shards --------------------------------------------------------------------------------------------


def expand(pattern: str) -> list[str]:
    """'{00..02}{x,y}.tar' -> 00x.tar, 00y.tar, 01x.tar, ... as a shell does."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if not brace:
        return [pattern]

    span = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
    if span:
        first, last = int(span[1]), int(span[2])
        if last < first:
            raise ValueError(f"{pattern}: {brace[0]} runs backwards; write {{{span[2]}..{span[1]}}}")
        if last - first >= SHARDS_MAX:
            raise ValueError(f"{pattern}: {brace[0]} is more than {SHARDS_MAX} shards; write fewer")
        names = [str(i).zfill(len(span[1])) for i in range(first, last + 1)]
    else:
        names = brace[1].split(",")

    before, after = pattern[:brace.start()], pattern[brace.end():]
    return [path for name in names for path in expand(before + name + after)]


class ShardSource:
    """Clips in tar files, read in place by their index (plumbing/tars.py)."""

    def __init__(self, paths: list[str], cache: str | None = None):
        missing = [path for path in paths if not os.path.exists(path)]
        if missing:
            raise ValueError(f"{len(missing)} of {len(paths)} shards are not there, e.g. {missing[0]}")

        def index(path: str) -> np.ndarray:
            return tars.shard_index(path, cache)

        with ThreadPoolExecutor(8) as pool:           # this waits for the disk, not for the processor
            parts = pool.map(index, paths)
            parts = list(tqdm(parts, "indexing shards", len(paths), leave=False, delay=5))
        self.paths, self.rows = paths, np.concatenate(parts)
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return len(self.rows)

    def path(self, i: int) -> str:
        return self.paths[locate(self.ends, i)[0]]

    def name(self, i: int) -> str:
        return tars.clip_name(self.path(i), self.rows[i])

    def read(self, i: int) -> tuple[bytes, object, object]:
        video, text, more = tars.read_clip(self.path(i), self.rows[i])
        fields = json.loads(more) if more else {}
        if not isinstance(fields, dict):
            raise ValueError("its .json is not an object")
        caption = fields.get("caption") if text is None else text.decode()
        return video, caption, fields.get("reward_caption")
