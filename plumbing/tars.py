"""Tar shards read in place: where each clip's members lie, found once and kept as an index beside the shard.

A shard (WebDataset's layout) holds members KEY.mp4, KEY.txt and KEY.json in any order. KEY is what precedes
the last dot where a video and its caption are named so (a.v2.mp4, a.v2.txt), else what precedes the first dot
(a.v2.mp4, a.txt). A key that stands twice is two clips. Several tars joined by `cat` are one shard.
"""
import hashlib
import os
import tarfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from plumbing.files import atomic
from plumbing.video import READABLE

VERSION = 3                             # of the index files
BLOCK = 512                             # a tar's unit: headers and data begin at its multiples
KINDS = {suffix: 0 for suffix in READABLE} | {".txt": 1, ".json": 2}     # video, caption, more
VIDEO, TEXT, MORE = 0, 1, 2

# Columns of an index row. WHERE: the first byte of the member that names the clip. CHECK: a checksum of the
# members' headers. Then offset and size of the video, the .txt and the .json, offset -1 = not there. A row
# without any of them stands for what could not be read from byte WHERE on.
WHERE, CHECK, MEMBERS = 0, 1, 2
COLUMNS = 8


# ---- the index on the disk ---------------------------------------------------------------------------------


def shard_index(path: str, cache: str | None = None) -> np.ndarray:
    """Index of a shard, int64 (clips, 8): kept in SHARD.index or else in the folder `cache`.

    It is made where it is missing, damaged, or of another shard."""
    name = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:16]
    places = [Path(f"{path}.index")] + ([Path(cache, f"{name}.index")] if cache else [])
    for place in places:
        rows = read_index(place, path)
        if rows is not None:
            return rows

    rows = scan(path)
    table = np.concatenate([stamp(path, rows), rows])
    if not any(write_index(place, table) for place in places):
        folder = os.path.dirname(path) or "."
        warnings.warn(f"{folder} is not writable: name a cache folder, or every start indexes its shards",
                      stacklevel=2)
    return rows


def stamp(path: str, rows: np.ndarray) -> np.ndarray:
    """First row of an index file: version, the shard's size and time, checksum of the rows."""
    stat = os.stat(path)
    checksum = zlib.crc32(np.ascontiguousarray(rows))
    return np.array([[VERSION, stat.st_size, stat.st_mtime_ns, checksum] + [0] * (COLUMNS - 4)], np.int64)


def read_index(place: Path, path: str) -> np.ndarray | None:
    """The rows of an index file, or None where it is missing, damaged, or not of this shard as it is now."""
    try:
        table = np.fromfile(place, np.int64)
    except OSError:
        return None
    if not len(table) or len(table) % COLUMNS:
        return None
    table = table.reshape(-1, COLUMNS)
    rows = table[1:]
    current = np.array_equal(table[:1], stamp(path, rows)) and is_index_of(path, rows)
    return rows if current else None


def write_index(place: Path, table: np.ndarray) -> bool:
    try:
        with atomic(place) as temporary:
            table.tofile(temporary)
    except ValueError:                                # not writable
        return False
    return True


def is_index_of(path: str, rows: np.ndarray) -> bool:
    """Whether the first and the last clip lie where the index says. The others are checked when read."""
    try:
        with open(path, "rb") as file:
            for row in rows[[0, -1]] if len(rows) else []:
                read_members(file, row, data=False)
    except ValueError:
        return False
    return True


# ---- one clip ----------------------------------------------------------------------------------------------


def read_clip(path: str, row: np.ndarray) -> tuple[bytes, bytes | None, bytes | None]:
    """The video, the .txt and the .json of one clip. Raises ValueError for no video, or another shard."""
    video, text, more = row[MEMBERS::2].tolist()
    if video < 0 and text < 0 and more < 0:
        raise ValueError(f"damaged tar from byte {row[WHERE]} on")
    if video < 0:
        raise ValueError("no video beside this caption")
    with open(path, "rb") as file:
        return read_members(file, row)


def read_members(file: BinaryIO, row: np.ndarray, data: bool = True) -> tuple[bytes | None, ...]:
    """What the members of a row hold. Raises ValueError unless their headers are those that were indexed."""
    checksum, contents = 0, []
    for offset, size in row[MEMBERS:].reshape(-1, 2).tolist():
        if offset < 0:
            contents.append(None)
            continue
        file.seek(offset - BLOCK)
        block = file.read(BLOCK + size if data else BLOCK)
        checksum = zlib.crc32(block[:BLOCK], checksum)
        contents.append(block[BLOCK:])
    if checksum != row[CHECK]:
        raise ValueError("its shard is another one than was indexed: delete the shard's .index")
    return tuple(contents)


def clip_name(path: str, row: np.ndarray) -> str:
    """SHARD:MEMBER of the video, or of its caption where there is none; SHARD for what could not be read."""
    if (row[MEMBERS::2] < 0).all():
        return path
    try:
        with open(path, "rb") as file:
            file.seek(row[WHERE])
            with tarfile.open(fileobj=file, mode="r:") as tar:      # reads one member, with its long name
                name = tar.next().name
    except (OSError, tarfile.TarError, ValueError, AttributeError):
        return f"{path}: byte {row[WHERE]}"
    return f"{path}:{name}"


# ---- making the index --------------------------------------------------------------------------------------


def scan(path: str) -> np.ndarray:
    """Headers of a tar, or of several behind one another -> the index. What is damaged is one row."""
    members, damaged = [], []
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = 0 if size else None
        if not size:
            damaged.append(0)

        while start is not None:
            found, end = read_archive(file, start, size)
            if not found and end == start:
                damaged.append(start)
                break
            members += found
            start = next_block(file, end)

        rows = [to_row(file, clip) for clip in pair(members)]
    rows += [[where, 0] + [-1, 0] * 3 for where in damaged]
    return np.array(rows, np.int64).reshape(-1, COLUMNS)


def read_archive(file: BinaryIO, start: int, size: int) -> tuple[list[tarfile.TarInfo], int]:
    """Members of the tar that begins at byte `start`, up to its end or its damage -> (members, end)."""
    members, end = [], start
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                cut = member.offset_data + member.size > size
                if cut or tar.offset <= end:          # damage may also lead backwards
                    break
                end = tar.offset                      # where the next header is
                members.append(member)
    except (tarfile.TarError, ValueError, OverflowError):
        pass                                          # the caller sees that the archive ends here
    return members, end


def next_block(file: BinaryIO, start: int) -> int | None:
    """Offset of the next block that is not all zeros: a header, or damage. None: only zeros."""
    file.seek(start)
    while chunk := file.read(2048 * BLOCK):
        rest = chunk.lstrip(b"\0")
        if rest:
            zeros = len(chunk) - len(rest)
            return start + zeros // BLOCK * BLOCK
        start += len(chunk)
    return None


def pair(members: list[tarfile.TarInfo]) -> Iterator[dict[int, tarfile.TarInfo]]:
    """Members in the order of the tar -> clips, {kind: member}, in the order of their first members."""
    # by all that precedes the last dot
    groups = {}
    for member in members:
        folder, name = os.path.split(member.name)
        stem, suffix = os.path.splitext(name)
        kind = KINDS.get(suffix.lower())
        if not member.isreg() or name.startswith(".") or kind is None:
            continue
        clips = groups.setdefault((folder, stem), [{}])
        if kind in clips[-1]:                         # the key stands twice: another clip
            clips.append({})
        clips[-1][kind] = member

    # by what precedes the first dot, where the video or the caption is alone
    used = set()
    for (folder, stem), clips in groups.items():
        short = (folder, stem.partition(".")[0])
        if short == (folder, stem) or short not in groups:
            continue
        for clip in clips:
            if set(clip) == {VIDEO}:
                caption = {kind: member for kind, member in groups[short][-1].items() if kind != VIDEO}
                clip.update(caption)
                used.add(short)
            elif VIDEO not in clip and any(VIDEO in other for other in groups[short]):
                clip.clear()                          # KEY.more.txt: something else about KEY.mp4

    for key, clips in groups.items():
        for clip in clips:
            lent = key in used and VIDEO not in clip
            if (VIDEO in clip or TEXT in clip) and not lent:
                yield clip


def to_row(file: BinaryIO, clip: dict[int, tarfile.TarInfo]) -> list[int]:
    """A clip's row of the index: where its name stands, a checksum of its members' headers, and where video,
    text and JSON are and how large (-1, 0: none)."""
    named = clip[VIDEO] if VIDEO in clip else clip[TEXT]
    checksum, places = 0, []
    for kind in (VIDEO, TEXT, MORE):
        if kind not in clip:
            places += [-1, 0]
            continue
        file.seek(clip[kind].offset_data - BLOCK)
        checksum = zlib.crc32(file.read(BLOCK), checksum)
        places += [clip[kind].offset_data, clip[kind].size]
    return [named.offset, checksum, *places]
