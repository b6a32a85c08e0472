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
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TextIO

from plumbing.errors import UserError, reading
from plumbing.shards import Shards
from plumbing.video import READABLE

MANIFESTS = (".csv", ".tsv", ".json", ".jsonl")
EXPECTED = f"a folder of clips, a manifest ({' '.join(MANIFESTS)}) or .tar shards"
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
SWALLOWED = re.compile(rf"\n.*({'|'.join(map(re.escape, READABLE))})", re.IGNORECASE)   # a row within a field

# Where public sets have the path and the captions: a column, or a template of columns in braces; the first
# whose columns are there. The last two paths are WebVid's and VidGen's.
KNOWN = {"path": ("path", "video", "video_path", "video_name", "file_name", "filename", "file", "filepath",
                  "file_path", "relpath", "clip", "{page_dir}/{videoid}.mp4", "{vid}.mp4"),
         "caption": ("caption", "text", "prompt", "description", "name"),
         "reward_caption": ("reward_caption",)}


def open_sources(spec: str | Sequence[str | Path], cache: str | None = None, columns: str = "",
                 root: str = "") -> list:
    """All sources that a spec names (see data.py); the shards of one pattern are one. Raises UserError."""
    sources, root = [], os.path.expanduser(root)
    for part in [part for each in ([spec] if isinstance(spec, str) else spec) for part in split(str(each))]:
        paths = expand(part)
        present = [path for path in paths if os.path.exists(path)]
        if not present:
            raise UserError(f"no data at {part}: expected {EXPECTED}")
        if len(present) < len(paths):
            missing = min(set(paths) - set(present))
            warnings.warn(f"{part}: {len(paths) - len(present)} of {len(paths)} are missing, e.g. {missing}",
                          stacklevel=3)

        if all(path.endswith(".tar") and os.path.isfile(path) for path in present):
            sources.append(Shards(present, cache))
        else:
            sources += [open_source(path, cache, columns, root) for path in present]
    return sources


def open_source(path: str, cache: str | None, columns: str, root: str) -> "Files | Shards":
    if os.path.isdir(path):
        clips = open_folder(path)
        tars = sorted(glob.glob(f"{glob.escape(path)}/**/*.tar", recursive=True))
        shards = [tar for tar in tars if os.path.isfile(tar)]
        return Shards(shards, cache) if shards and not len(clips) else clips
    if os.path.isfile(path) and path.endswith(".tar"):
        return Shards([path], cache)
    if os.path.isfile(path) and path.endswith(MANIFESTS):
        return open_manifest(path, columns, root)
    kind = "no data" if os.path.isfile(path) else "a pipe or a device"
    raise UserError(f"{path} is {kind}: expected {EXPECTED}")


def split(spec: str) -> list[str]:
    """'clips,{0,1}.tar' -> its parts, split at the commas outside of braces and of names on the disk."""
    whole = os.path.expanduser(spec)
    folder = os.path.dirname(re.split(r"[{*?[]", whole)[0])           # that a pattern begins in
    if os.path.exists(whole) or "," in folder and os.path.isdir(folder):
        return [whole]
    return [os.path.expanduser(part.strip()) for part in re.split(r",(?![^{]*\})", spec) if part.strip()]


def expand(pattern: str) -> list[str]:
    """'{00..02}{x,y}/*.tar' -> the paths that a shell makes of it, or the pattern where nothing fits it."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if os.path.exists(pattern) or not brace:
        matches = [] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        return matches or [pattern]

    names = []
    for name in brace[1].split(","):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", name)
        first, last = map(int, span.groups()) if span else (0, 0)
        if not 0 <= last - first < 10 ** 6:
            raise UserError(f"{pattern}: {name} in braces is no range of at most a million names")
        names += [str(i).zfill(len(span[1])) for i in range(first, last + 1)] if span else [name]
    return [path for name in names for path in expand(pattern[:brace.start()] + name + pattern[brace.end():])]


class Files:
    """len(), name(i), and read(i) -> (path, caption, reward caption or None).

    A row is [path, caption (None: in the .txt beside the clip), reward caption, why it cannot be used]. It is
    held as bytes: ten million rows are no Python objects."""

    def __init__(self, folder: str, rows: Iterable[list]):
        """folder: what the paths are relative to."""
        self.folder, self.buffer, self.ends = folder, bytearray(), array("q", [0])
        for row in rows:
            self.buffer += json.dumps(row).encode()
            self.ends.append(len(self.buffer))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def row(self, i: int) -> list:
        return json.loads(self.buffer[self.ends[i]:self.ends[i + 1]])

    def name(self, i: int) -> str:
        return os.path.join(self.folder, self.row(i)[0])

    def read(self, i: int) -> tuple[str, object, object]:
        """Raises ValueError for a row that cannot be used, and for what is no file on this machine."""
        _, caption, reward_caption, problem = self.row(i)
        path = self.name(i)
        if problem or not os.path.isfile(path):
            raise ValueError(problem or ("not a regular file" if os.path.exists(path) else "No such file"))
        beside = Path(path).with_suffix(".txt")
        if caption is None and beside.is_file():
            caption = beside.read_text(encoding="utf-8")
        return path, caption, reward_caption


def open_folder(folder: str) -> Files:
    """All videos below a folder, in linked folders too. Raises UserError where a folder cannot be read."""
    paths, seen = [], set()
    with reading(folder, "a folder"):
        for base, subfolders, names in os.walk(folder, followlinks=True, onerror=refuse):
            if os.path.realpath(base) in seen:        # by a link
                subfolders.clear()
                continue
            seen.add(os.path.realpath(base))
            paths += [os.path.relpath(os.path.join(base, name), folder) for name in names if name[0] != "."]

    clips = sorted(path for path in paths if path.lower().endswith(READABLE))
    unread = Counter(os.path.splitext(path)[1].lower() or "without a suffix" for path in paths)
    counts = ", ".join(f"{n} {kind}" for kind, n in unread.most_common() if kind not in (*READABLE, ".txt"))
    if clips and counts:
        warnings.warn(f"{folder}: files not read: {counts}; clips are {' '.join(READABLE)}", stacklevel=2)
    return Files(folder, ([path, None, None, ""] for path in clips))


def refuse(error: OSError) -> None:
    raise error


def open_manifest(path: str, columns: str = "", root: str = "") -> Files:
    """The rows of a manifest. Raises UserError, with the columns that are there.

    columns: "path=COLUMN,caption=COLUMN" for what KNOWN lacks; root: what its paths are relative to.
    """
    named = dict(pair.partition("=")[::2] for pair in re.split(r",(?![^{]*\})", columns) if pair)
    if named.keys() - KNOWN.keys() or not all(named.values()):
        raise UserError(f"--columns {columns}: expected path=COLUMN,caption=COLUMN,reward_caption=COLUMN")
    with reading(path, "a manifest"):
        with open(path, "rb") as file:
            wide = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
        encoding = "utf-16" if wide else "utf-8-sig"
        with open(path, newline="", encoding=encoding, errors="surrogateescape") as file:
            return Files(root or os.path.dirname(path), rows_of(path, file, named))


def rows_of(path: str, file: TextIO, named: dict[str, str]) -> Iterator[list]:
    """The rows of a manifest, for Files. named: {field: column or template} by --columns."""
    records, separator = records_of(path, file, named)
    head = list(islice(records, 100))                 # the first rows may lack a reward caption
    names = list(dict.fromkeys(name for record in head for name in record if name))
    places = choose(names, named)
    if not head:
        raise UserError(f"{path}: no rows; expected path,caption in the first line, then a clip in each")
    if not places:
        separated = f", separated by {SEPARATORS[separator]}" if separator else ""
        columns = ", ".join(map(repr, names)) + separated
        raise UserError(f"{path}: path and caption are not known among its columns ({columns}); name them: "
                        "--columns path=COLUMN,caption=COLUMN")

    for number, record in enumerate(chain(head, records), 1):
        values = defaultdict(str, {str(name).lower(): value for name, value in record.items()} | record)
        clip, caption, reward_caption = (
            place.format_map(values) if "{" in place else values.get(place) for place in places.values())
        if separator and SWALLOWED.search(f"{caption}{reward_caption}"):
            raise UserError(f"{path}, row {number}: a quote that is not closed swallows the rows behind it")

        problem = "" if clip and isinstance(clip, str) else f"row {number} of {path}: no path"
        if None in record:
            problem = f'row {number} of {path}: too many fields; quote a caption with commas: "one, two"'
        yield ["" if problem else clip, "" if caption is None else caption, reward_caption, problem]


def choose(names: list[str], named: dict[str, str]) -> dict[str, str] | None:
    """{field: its column or template} or None, where path, caption or a column of --columns is missing."""
    names, places = {*names, *(name.strip().lower() for name in names)}, {}
    for field, known in KNOWN.items():
        options = (named[field],) if field in named else known
        places[field] = next((option for option in options
                              if names.issuperset(re.findall(r"\{(.*?)\}", option) or [option])), "")
    return places if all(places[field] for field in ("path", "caption", *named)) else None


def records_of(path: str, file: TextIO, named: dict[str, str]) -> tuple[Iterator[dict], str]:
    """A manifest's rows as {column: value}, and a CSV file's separator, which its first line shows."""
    if path.endswith(".json"):
        records = json.load(file)
        if not isinstance(records, list):
            raise ValueError("not a list of objects")
        return iter(records), ""
    if path.endswith(".jsonl"):
        return json_lines(path, file), ""

    line = file.readline()
    headers = {mark: next(csv.reader([line.strip()], delimiter=mark), []) for mark in SEPARATORS}
    separator = max(headers, key=lambda mark: (bool(choose(headers[mark], named)), len(headers[mark])))
    columns = [name.strip() for name in headers[separator]]
    if len(columns) == 2 and columns[0].lower().endswith(READABLE):   # a clip in place of a header
        columns = ["path", "caption"]
        file.seek(0)
    return csv.DictReader(file, columns, delimiter=separator, skipinitialspace=True), separator


def json_lines(path: str, file: TextIO) -> Iterator[dict]:
    for number, line in enumerate(file, 1):
        if line.strip():
            with reading(f"{path}, line {number}", 'like {"path": "a.mp4", "caption": "A dog."}'):
                record = dict(json.loads(line))
            yield record
