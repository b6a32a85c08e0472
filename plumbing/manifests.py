"""Clips in files of their own, of a manifest or a folder; and what opens any source by its name.

A source has len(), name(i), and read(i) -> (path or bytes of the video, caption, reward caption or None).
"""
import csv
import glob
import json
import os
import re
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TextIO

from plumbing.errors import UserError, reading
from plumbing.shards import Shards
from plumbing.video import READABLE

MANIFESTS = (".csv", ".tsv", ".json", ".jsonl")
EXPECTED = f"a folder of clips, a manifest ({' '.join(MANIFESTS)}) or .tar shards"
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
OUTSIDE_BRACES = r",(?![^{]*\})"        # a comma that separates sources or columns

# Where public sets have the path and the captions: a column, or a template of columns in braces; the first
# whose columns are there. A `name` is a caption in WebVid alone, so beside a page_dir (":.0" takes nothing of
# that); the paths with braces are WebVid's and VidGen's.
KNOWN = {"path": ("path", "video", "video_path", "video_name", "file_name", "filename", "file", "filepath",
                  "file_path", "relpath", "clip", "{page_dir}/{videoid}.mp4", "{vid}.mp4"),
         "caption": ("caption", "text", "prompt", "description", "{page_dir:.0}{name}"),
         "reward_caption": ("reward_caption",)}


def open_sources(spec: str | Sequence[str | Path], cache: str | None = None, columns: str = "",
                 root: str = "") -> list:
    """All sources that a spec names (see data.py); the shards of one pattern are one. Raises UserError."""
    sources, patterns = [], []
    for name in [spec] if isinstance(spec, str) else map(str, spec):    # a name may have commas in it
        patterns += [name] if os.path.exists(name) else re.split(OUTSIDE_BRACES, name)
    for pattern in patterns:
        paths, shards = expand(os.path.expanduser(pattern.strip())), []
        missing = [path for path in paths if not os.path.exists(path)]
        if len(missing) == len(paths):
            raise UserError(f"no data at {pattern}: expected {EXPECTED}")
        if missing:
            warnings.warn(f"{pattern}: {len(missing)} of {len(paths)} are missing, e.g. {missing[0]}",
                          stacklevel=3)

        for path in paths:
            if os.path.isdir(path):
                files = files_below(path)
                clips = (os.path.relpath(file, path) for file in files if file.lower().endswith(READABLE))
                sources.append(Files(path, ([clip, None, None] for clip in clips)))
                shards += [file for file in files if file.lower().endswith(".tar") and os.path.isfile(file)]
            elif os.path.isfile(path) and path.lower().endswith(".tar"):
                shards.append(path)
            elif os.path.isfile(path) and path.lower().endswith(MANIFESTS):
                sources.append(open_manifest(path, columns, os.path.expanduser(root)))
            elif os.path.exists(path):
                raise UserError(f"{path} is no data, or a pipe or device: expected {EXPECTED}")
        sources += [Shards(shards, cache)] if shards else []
    return sources


def check_columns(specs: Sequence[str], config) -> None:
    """Raises UserError for --columns and --video-root where no spec is, or may be, one of a manifest."""
    may_be_manifest = re.compile(r"\.(csv|tsv|jsonl?)\b|\*$", re.I)
    if (config.columns or config.video_root) and not any(map(may_be_manifest.search, specs)):
        raise UserError("--columns and --video-root are for manifests, and --data names none")


def expand(pattern: str) -> list[str]:
    """'{00..02}{x,y}/*.tar' -> the paths that a shell makes of it, or the pattern where nothing fits it."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if os.path.exists(pattern):
        return [pattern]
    if not brace:
        names = glob.glob(pattern, recursive=True)
        return sorted(name for name in names if not name.endswith(".npy")) or [pattern]     # Shards' indexes

    names = []
    for name in brace[1].split(","):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", name)
        names += [f"{i:0{len(span[1])}}" for i in range(int(span[1]), int(span[2]) + 1)] if span else [name]
    return [path for name in names for path in expand(pattern[:brace.start()] + name + pattern[brace.end():])]


def files_below(folder: str) -> list[str]:
    """The paths of all files below a folder; in linked folders too. Raises UserError."""
    def refuse(error: OSError) -> None:
        raise error

    with reading(folder, "a folder"):
        files = []
        for base, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
            files += [os.path.join(base, name) for name in names if not name.startswith(".")]
            below = os.path.realpath(base)
            folders[:] = [name for name in folders          # without links to where they stand themselves
                          if not Path(below).is_relative_to(os.path.realpath(os.path.join(base, name)))]
        return sorted(files)


class Files:
    """Clips in files of their own, from rows [path in `folder`, caption (None: in the .txt beside the clip),
    reward caption], which are held as bytes: ten million are no Python objects."""

    def __init__(self, folder: str, rows: Iterable[list]):
        self.folder, self.buffer, self.ends = folder, bytearray(), array("q", [0])
        for row in rows:
            self.buffer += json.dumps(row).encode()
            self.ends.append(len(self.buffer))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def row(self, i: int) -> list:
        path, *captions = json.loads(self.buffer[self.ends[i]:self.ends[i + 1]])
        return [os.path.join(self.folder, os.path.expanduser(path)), *captions]

    def name(self, i: int) -> str:
        return self.row(i)[0]

    def read(self, i: int) -> tuple[str, object, object]:
        path, caption, reward_caption = self.row(i)
        beside = os.path.splitext(path)[0] + ".txt"
        if caption is None and os.path.isfile(beside):
            caption = Path(beside).read_text(encoding="utf-8")
        return path, caption, reward_caption


def open_manifest(path: str, columns: str = "", root: str = "") -> Files:
    """columns: "path=COLUMN,caption=COLUMN" for what KNOWN lacks; root: what its paths are relative to."""
    pairs = [pair.partition("=")[::2] for pair in re.split(OUTSIDE_BRACES, columns) if pair]
    named = dict(pairs)
    if named.keys() - KNOWN.keys() or not all(named.values()) or len(named) < len(pairs):
        raise UserError(f"--columns {columns}: expected path=COLUMN,caption=COLUMN,reward_caption=COLUMN")
    with reading(path, "a manifest"):
        with open(path, "rb") as file:
            encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        with open(path, newline="", encoding=encoding, errors="surrogateescape") as file:
            return Files(root or os.path.dirname(path), rows_of(path, file, named))


def rows_of(path: str, file: TextIO, named: dict[str, str]) -> Iterator[list]:
    """The rows of a manifest, for Files. named: {field: column or template} by --columns."""
    records, separator = records_of(path, file)
    known = KNOWN | {field: [column] for field, column in named.items()}
    try:
        for number, record in enumerate(records):
            row = {str(name).strip().lower(): value for name, value in record.items()} | record
            fields = {field: value_of(row, columns) for field, columns in known.items()}
            if number == 0 and None in map(fields.get, ["path", "caption", *named]):
                columns = ", ".join(map(repr, record)) + separator
                raise UserError(f"{path}: path and caption are not known among its columns ({columns}); "
                                "name them: --columns path=COLUMN,caption=COLUMN")
            if None in record:                        # where csv puts the rest of a caption with commas
                fields["caption"] = [fields["caption"], *record[None]]
            yield [str(fields["path"] or ""), fields["caption"], fields["reward_caption"]]
    except csv.Error as error:
        raise UserError(f"{path}, near line {records.line_num}: {error}; mend that line") from error


def value_of(row: dict, columns: Sequence[str]) -> object:
    """What a row says in the first of these columns, or templates of columns, that it has; None: in none."""
    for column in columns:
        if column in row:
            return row[column] or ""
        if "{" in column and row.keys() >= {*re.findall(r"\{(.*?)(?::.*?)?\}", column)}:
            return column.format_map(row)
    return None


def records_of(path: str, file: TextIO) -> tuple[Iterable[dict], str]:
    """A manifest's rows as {column: value}, and words on what separates its columns."""
    if path.lower().endswith(".json"):
        return json.load(file), ""
    if path.lower().endswith(".jsonl"):
        return (json.loads(line) for line in file if line.strip()), ""

    header = next((line for line in iter(file.readline, "") if line.strip()), "")
    marks = re.findall(f"[{''.join(SEPARATORS)}]", header) or ["\t" if path.lower().endswith(".tsv") else ","]
    mark = "\t" if "\t" in marks else marks[0]
    first = next(csv.reader([header.strip()], delimiter=mark), [])
    has_header = len(first) != 2 or not first[0].lower().endswith(READABLE)
    columns = None if has_header else ["path", "caption"]           # None: the first row names them
    records = csv.DictReader(chain([header], file), columns, restval="", delimiter=mark,
                             skipinitialspace=True, strict=True)
    titles = [title for title in records.fieldnames or () if title.strip()]     # some end in empty ones
    if len({*titles}) < len(titles):
        raise UserError(f"{path}: two of its columns have one name ({', '.join(titles)})")
    return records, f", separated by {SEPARATORS[mark]}"
