"""Captioned clips: every source becomes one indexed dataset; step n's batch is a function of (seed, n) alone.

open_dataset(spec) takes any of these, or several (a list, or commas between them):

    folder        clips/0001.mp4 with its caption in clips/0001.txt, subfolders too; or a folder of shards
    manifest.csv  path,caption,reward_caption      paths are relative to the manifest; reward_caption is a
                  a/dog.mp4,"A dog runs.",a dog    shorter text for the reward models, and optional
                  .tsv, .json and .jsonl too, with the columns of public sets (plumbing/manifests.py)
    tar shards    /data/webvid/{00000..09999}.tar or /data/webvid/*.tar with members KEY.mp4 and KEY.txt,
                  optionally KEY.json: {"reward_caption": "a dog"} (plumbing/shards.py)

Order   Position p is clip p % N of epoch p // N, and an epoch is a permutation drawn from (seed, epoch).
        Step n on rank r reads `batch` positions from (n * world_size + r) * batch on.
Bad     A clip that cannot be used is logged (step, index, clip, reason); in its place comes one drawn by the
        position alone. A run ends after 20 bad clips in a row, or more than 100 among the last 200.
Short   A clip that is too short is stretched over the frames asked for; its item's fps is the true one. The
        networks are told the preset's rate all the same, as in the released code: 16 (MS, v2: 8).
"""
import json
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from plumbing.errors import UserError, reading
from plumbing.files import atomic, remove_leftovers
from plumbing.manifests import open_sources
from plumbing.video import read_video

TRIES, WINDOW = 20, 200                               # the rule about bad clips


class BadClip(ValueError):
    """This clip cannot be used. get() of a dataset raises it; the loader logs it and draws another clip."""

    def __init__(self, name: str, reason: str):
        """What would break the line or a terminal is replaced: the file may be damaged."""
        self.name, self.reason = ("".join(letter if letter.isprintable() else "\ufffd" for letter in text)
                                  for text in (name, reason))
        super().__init__(f"{self.name}: {self.reason}")


# ---- the dataset -------------------------------------------------------------------------------------------

def open_dataset(spec: str | Sequence[str | Path], frames: int = 16, fps: float = 16, height: int = 320,
                 width: int = 512, cache: str | None = None, columns: str = "",
                 video_root: str = "") -> "ClipDataset":
    """All clips of `spec` (see the head of this file) as one dataset. Raises UserError.

    cache: folder for the index of shards where it cannot be written beside them; of several processes one
    should come first and make it. columns, video_root: see plumbing/manifests.py."""
    dataset = ClipDataset(open_sources(spec, cache, columns, video_root), frames, fps, height, width)
    if not len(dataset):
        raise UserError(f"no clips in {spec}: expected files, or members of shards, KEY.mp4 and KEY.txt")
    return dataset


class ClipDataset:
    """The clips of all sources under one index; the loader takes any dataset with len() and get()."""

    def __init__(self, sources: list, frames: int, fps: float, height: int, width: int):
        self.sources = sources
        self.frames, self.fps, self.height, self.width = frames, fps, height, width
        self.starts = np.cumsum([0, *map(len, sources)])        # of each source's clips, and the end

    def __len__(self) -> int:
        return int(self.starts[-1])

    def get(self, index: int, generator: torch.Generator | None = None) -> dict:
        """dict(clip uint8 (3, T, H, W), fps, caption, reward_caption or None, index).

        The clip starts at the first frame without a generator. Raises BadClip."""
        number = np.searchsorted(self.starts, index, side="right") - 1
        source, i = self.sources[number], index - int(self.starts[number])
        try:
            video, *captions = source.read(i)
            caption, reward_caption = map(clean, captions)
            if not caption:
                raise ValueError("no caption")
            clip, fps = read_video(video, self.frames, self.fps, self.height, self.width, generator)
        except (OSError, ValueError) as error:
            raise BadClip(source.name(i), getattr(error, "strerror", None) or str(error)) from error

        if fps > self.fps:                            # Python shows a warning of one text once
            warnings.warn(f"clips shorter than {self.frames} frames at {self.fps:g} fps are stretched",
                          stacklevel=1)
        return dict(clip=clip, fps=fps, caption=caption, reward_caption=reward_caption or None, index=index)


def clean(text: object) -> str:
    """A caption without the spaces and byte order marks around it. Raises ValueError for what is no text."""
    if not isinstance(text, str | None):
        raise ValueError(f"a caption is no text, or has commas and no quotation marks: {str(text)[:40]}")
    text = (text or "").replace("\ufeff", "").strip()
    text.encode()                                     # raises where its file is not utf-8
    return text


# ---- the loader --------------------------------------------------------------------------------------------

def loader(dataset, batch: int, rank: int = 0, world_size: int = 1, workers: int = 0, seed: int = 0,
           start_step: int = 0, bad_file: str | Path | None = None) -> Iterator[dict]:
    """Batches of the steps from start_step on, without end, decoded by `workers` threads a few batches ahead.

    A batch holds what the dataset's get() returns, stacked, and "bad": how many bad clips this rank has
    met. A JSON row for each of them is appended to bad_file. Raises UserError when they are too many."""
    firsts = ((step * world_size + rank) * batch for step in count(start_step))
    positions = (first + i for first in firsts for i in range(batch))
    work = partial(draw, dataset, seed)
    clips = in_threads(work, positions, workers, 2 * max(batch, workers)) if workers else map(work, positions)

    recent, total = deque(maxlen=WINDOW), 0           # recent: a row for a bad clip, None for a good one
    for step in count(start_step):
        items, bad = zip(*islice(clips, batch))
        bad = sum(bad, [])
        recent.extend(bad + [None] * (batch - items.count(None)))
        total += len(bad)
        if bad_file and bad:
            append_rows(bad_file, [dict(step=step, **row) for row in bad])

        rows = [row for row in recent if row]
        if None in items or len(rows) > WINDOW // 2:
            example = f"{rows[-1]['clip']}: {rows[-1]['reason']}" + f"; see {bad_file}" * bool(bad_file)
            raise UserError(f"too many bad clips: {len(rows)} of the last {len(recent)}, e.g. {example}")
        yield {key: stack([item[key] for item in items]) for key in items[0]} | {"bad": total}


def draw(dataset, seed: int, position: int) -> tuple[dict | None, list[dict]]:
    """The clip at a position, or its first usable substitute, or None; and a row for each bad clip met."""
    N, bad = len(dataset), []
    epoch, k = divmod(position, N)
    index = int(permutation(N, seed, epoch)[k])
    for attempt in range(1, TRIES + 1):
        generator = torch.Generator().manual_seed(seed_of(seed, epoch, index))
        try:
            return dataset.get(index, generator), bad
        except BadClip as error:
            bad.append(dict(index=index, clip=error.name, reason=error.reason))
            index = seed_of(seed, epoch, k, attempt) % N
    return None, bad


@lru_cache(4)                                         # of two loaders, each between two epochs
def permutation(N: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(N)


def seed_of(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def in_threads(work: Callable, items: Iterable, workers: int, ahead: int) -> Iterator:
    """work(item) of endless items, in their order, by threads up to `ahead` items ahead."""
    pool, pending = ThreadPoolExecutor(workers), deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def stack(values: list) -> Tensor | list:
    stackable = isinstance(values[0], (Tensor, int, float))
    return torch.stack([torch.as_tensor(value) for value in values]) if stackable else values


def append_rows(path: str | Path, rows: list[dict]) -> None:
    """JSON lines, by one appending write, so that any number of processes may share the file."""
    with open(path, "ab", buffering=0) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


# ---- the cache that T2V-Turbo-v2 trains from: what the teacher says about each clip ------------------------

# A folder: header.json (what the cache depends on), and a file per clip, 0000012.safetensors, or
# 0000012.rewards.safetensors where the clip carries rewards, with all of its draws of (t, ε):
#   z_t, eps_c = ε(z_t, c, t), eps_u = ε(z_t, ∅, t), gradient = ∂G/∂z_t   (draws, C, T, H, W), float16
#   c   (L, D), float16; t, caption, reward_caption or None, rewards   as JSON
# gradient is left out where motion guidance is off in all draws.


class CacheWriter:
    """Makes a cache of header["clips"] clips, or goes on with one; each process writes clips of its own.

    A clip's file is whole or not there, so any number of processes, killed and started again, makes the same
    cache. Raises UserError where the folder holds a cache of another header."""

    def __init__(self, folder: str | Path, header: dict, rank: int = 0, world_size: int = 1):
        self.folder, self.header = Path(folder), header
        self.clips = range(rank, header["clips"], world_size)
        if (self.folder / "header.json").exists():
            check_header(self.folder, self.header)
        elif any(self.folder.glob("*.safetensors")):
            raise UserError(f"{folder} holds .safetensors files of something else; choose another folder")
        elif rank == 0:
            self.write_header(complete=False)
        if rank == 0:
            remove_leftovers(self.folder)

    def missing(self) -> list[int]:
        """This process's clips that are not on the disk yet."""
        return sorted({*self.clips} - {int(path.name.split(".")[0]) for path in clip_files(self.folder)})

    def write(self, index: int, tensors: dict[str, Tensor], notes: dict) -> None:
        """One clip with all of its draws. Raises BadClip where float16 cannot hold a tensor's values."""
        tensors = {name: x.detach().to("cpu", torch.float16).contiguous() for name, x in tensors.items()}
        for name, x in tensors.items():
            if not x.isfinite().all():
                raise BadClip(f"clip {index}", f"{name} has values that are not finite in float16")
        kind = ".rewards" if notes["rewards"] else ""
        with atomic(self.folder / f"{index:07d}{kind}.safetensors") as temporary:
            save_file(tensors, temporary, {"notes": json.dumps(notes)})

    def write_header(self, complete: bool) -> None:
        """complete: all clips are there, or were found to be unusable; training asks for it."""
        with atomic(self.folder / "header.json") as temporary:
            about = {"complete": complete, "files": len(clip_files(self.folder))}
            temporary.write_text(json.dumps(self.header | about, indent=1))


class Cache:
    """A complete cache as a dataset for the loader: a sample is one draw of one clip.

    v2 trains on two streams (Sec. 4: 3 clips for L_CD and 1 for rewards), the other one with only_rewards.
    Raises UserError where header.json says otherwise than `expected`, or the cache is not complete."""

    def __init__(self, folder: str | Path, expected: dict | None = None, only_rewards: bool = False):
        self.folder = Path(folder)
        self.header = check_header(self.folder, expected or {})
        self.files = clip_files(self.folder, ".rewards" if only_rewards else "")
        if not self.header["complete"]:
            raise UserError(f"the cache in {folder} is not complete: run the same prepare.py once more")
        if (count := len(clip_files(self.folder))) != self.header.get("files", count):
            raise UserError(f"the cache in {folder} had {self.header['files']} clips, and now has {count}; "
                            "the same prepare.py makes them again")
        if not self.files:
            raise UserError(f"no clip of {folder} carries rewards; prepare.py --reward-data says which do")

    def __len__(self) -> int:
        return len(self.files) * self.header["draws"]

    def get(self, index: int, generator: torch.Generator | None = None) -> dict:
        """One draw: its tensors in float16, its timestep t, its clip's captions. Raises BadClip."""
        clip, draw = divmod(index, self.header["draws"])
        path = self.files[clip]
        try:
            with reading(path, "a clip of a cache"), safe_open(path, "pt") as file:
                notes = json.loads(file.metadata()["notes"])
                sample = {name: file.get_slice(name)[draw] for name in file.keys() if name != "c"}
                sample |= notes | {"c": file.get_tensor("c"), "t": notes["t"][draw]}
        except UserError as error:
            raise BadClip(str(path), str(error)) from error
        sample.setdefault("gradient", torch.zeros_like(sample["z_t"]))
        return sample


def clip_files(folder: Path, kind: str = "") -> list[Path]:
    """The files of a cache's clips, or of a kind of them, in their order."""
    files = folder.glob(f"*{kind}.safetensors")
    return sorted(file for file in files if re.fullmatch(r"\d+(\.rewards)?\.safetensors", file.name))


def check_header(folder: Path, expected: dict) -> dict:
    """The header of a cache. Raises UserError where there is none, or one that says otherwise."""
    path = folder / "header.json"
    with reading(path, "the header of a cache, which prepare.py makes"):
        header = json.loads(path.read_text())
        for name, value in json.loads(json.dumps(expected)).items():
            if header.get(name) != value:
                raise UserError(f"the cache in {folder} was made with {name} = {header.get(name)}, not "
                                f"{value}: choose another folder or those options")
    return header
