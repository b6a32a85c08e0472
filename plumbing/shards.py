"""Tar shards in WebDataset's layout, read in place by one index of where each clip's members stand.

KEY is what precedes the first dot of a member's base name, the rest is its suffix. The clip of a key is
KEY.mp4 (or KEY.480p.mp4, its only video); its caption is KEY.txt, KEY.caption.txt or the "caption" of
KEY.json, which may have a "reward_caption" too. A suffix that stands again begins another clip of its key.
"""
import json
import os
import tarfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.errors import UserError
from plumbing.files import atomic
from plumbing.video import READABLE


class Shards:
    """Clips in tar files: len(), name(i), and read(i) -> (video's bytes, caption, reward caption or None)."""

    def __init__(self, paths: list[str], cache: str | None = None):
        self.paths, self.index = paths, open_index(paths, cache)

    def __len__(self) -> int:
        return len(self.index)

    def name(self, i: int) -> str:
        """SHARD:MEMBER of the video."""
        shard, video, _, _ = self.index[i].tolist()
        member = f"byte {video}"
        with suppress(OSError, ValueError):
            member, _ = read_member(self.paths[shard], video)
        return f"{self.paths[shard]}:{member}"

    def read(self, i: int) -> tuple[bytes, object, object]:
        """Raises ValueError for a damaged member, or JSON that is no object."""
        shard, *offsets = self.index[i].tolist()
        video, text, more = (read_member(self.paths[shard], at)[1] if at >= 0 else None for at in offsets)
        fields = json.loads(more) if more else {}
        if not isinstance(fields, dict):
            raise ValueError("its .json is not an object")
        return video, fields.get("caption") if text is None else text.decode(), fields.get("reward_caption")


def read_member(path: str, offset: int) -> tuple[str, bytes]:
    """Name and content of the member whose headers begin at a byte. Raises ValueError for a damaged one."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                member = tar.next()
                return member.name, tar.extractfile(member).read()
    except (tarfile.TarError, AttributeError) as error:               # AttributeError: no member, or no file
        raise ValueError(f"its shard is damaged at byte {offset}") from error


def open_index(paths: list[str], cache: str | None) -> np.ndarray:
    """Index of a set of shards, int64 (clips, 4): shard, then the bytes where video, .txt and .json begin.

    It is memory-mapped from one file, beside the first shard or else in `cache`, which is made where there
    is none for shards of these sizes and times."""
    stamp = [(os.path.abspath(path), os.path.getsize(path), os.path.getmtime(path)) for path in paths]
    name = f"clips-{sha256(json.dumps(stamp).encode()).hexdigest()[:16]}.npy"
    places = [Path(folder, name) for folder in (os.path.dirname(paths[0]) or ".", cache) if folder]
    for place in places:
        with suppress(OSError, ValueError, EOFError):                 # missing or damaged
            return np.load(place, mmap_mode="r")

    with ThreadPoolExecutor(8) as pool:                               # it waits for the disk
        tables = list(tqdm(pool.map(scan, paths), "indexing shards", len(paths), leave=False, delay=5))
    empty_shards = [path for path, table in zip(paths, tables) if not len(table)]
    if empty_shards:
        warnings.warn(f"{len(empty_shards)} of {len(paths)} shards hold no clip, e.g. {empty_shards[0]}",
                      stacklevel=2)
    index = np.concatenate([np.insert(table, 0, shard, axis=1) for shard, table in enumerate(tables)])

    for place in places:
        with suppress(UserError), atomic(place) as temporary:         # of a place that cannot be written
            with open(temporary, "wb") as file:                       # to a name np.save would add a suffix
                np.save(file, index)
            break
    return index


def scan(path: str) -> np.ndarray:
    """The clips of one tar, int64 (clips, 3)."""
    offsets, clips = {}, {}                           # {name: offset}, {key: [{suffix: offset}, ...]}
    for member in members(path):
        folder, name = os.path.split(member.name)
        key, _, suffix = name.partition(".")
        offset = offsets.get(member.linkname) if member.islnk() else member.offset
        if key and offset is not None and (member.isreg() or member.islnk()):
            offsets[member.name] = offset
            group = clips.setdefault((folder, key), [{}])
            if suffix.lower() in group[-1]:
                group.append({})
            group[-1][suffix.lower()] = offset
    rows = [row for group in clips.values() for clip in group for row in pair(clip)]
    return np.array(rows, np.int64).reshape(-1, 3)


def members(path: str) -> Iterator[tarfile.TarInfo]:
    """All that a tar holds. Joined tars are read through, damaged blocks passed over."""
    position, size = 0, os.path.getsize(path)
    with open(path, "rb") as file:
        while position < size:
            file.seek(position)
            try:
                with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
                    for member in tar:
                        yield member
                        position = tar.offset
                return
            except (tarfile.TarError, ValueError, OverflowError):     # the headers of one member
                position += tarfile.BLOCKSIZE


def pair(clip: dict[str, int]) -> Iterator[list[int]]:
    """The members of one key, {suffix: offset} -> where its clips' video, .txt and .json are; -1: none."""
    stems = {suffix: suffix[:suffix.rfind(".") + 1] for suffix in clip if f".{suffix}".endswith(READABLE)}
    captioned = [video for video, stem in stems.items() if {stem + "txt", stem + "json"} & clip.keys()]
    for video in captioned or sorted(stems, key=len)[:1]:             # KEY.mp4 before KEY.v2.mp4
        stem = stems[video]
        texts = [name for name in (stem + "txt", "txt", stem + "caption.txt", "caption.txt") if name in clip]
        yield [clip[video], clip[texts[0]] if texts else -1, clip.get(stem + "json", clip.get("json", -1))]
