"""Captioned clips: every source becomes one indexed dataset; step n's batch is a function of (seed, n) alone.

open_dataset(spec) takes any of these, or several (a list, or commas between them):

    folder        clips/0001.mp4 with its caption in clips/0001.txt, subfolders too; or a folder of shards
    manifest.csv  path,caption,reward_caption      paths are relative to the manifest; reward_caption is a
                  a/dog.mp4,"A dog runs.",a dog    shorter text for the reward models, and optional
                  .tsv, .json and .jsonl too, with the columns of public sets (plumbing/manifests.py)
    tar shards    /data/webvid/{00000..09999}.tar or /data/webvid/*.tar with members KEY.mp4 and KEY.txt,
                  optionally KEY.json: {"reward_caption": "a dog"} (plumbing/shards.py)

Order   Position p is clip p % N of epoch p // N, and an epoch is a permutation drawn from (seed, epoch).
        Step n on rank r reads `batch` positions from (n * world_size + r) * batch on: no repeats, no gaps,
        and one global batch for every split of it over ranks.
Start   The first frame is drawn from a generator seeded by (seed, epoch, index).
Bad     A clip that cannot be used is logged (step, index, clip, reason). In its place comes clip
        hash(seed, epoch, p % N, attempt) % N, again a function of the position alone. A run ends when at
        least 20 bad clips are more than 5 % of the last 1000 that its rank drew, or when 20 in a row are bad.
Short   A clip that is too short is stretched over the frames asked for, which is said once; its item's fps is
        the true one. The networks are told --fps all the same, as in the released code: always 16 (v2: 8).

T2V-Turbo-v2 trains from a cache of what the teacher says about each clip: CacheWriter and Cache, at the end.
"""
import atexit
import json
import os
import queue
import threading
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from hashlib import sha256
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from plumbing.errors import UserError
from plumbing.files import atomic, remove_leftovers
from plumbing.manifests import open_sources
from plumbing.video import read_video

TRIES, WINDOW, SHARE = 20, 1000, 0.05                 # the rule about bad clips


class BadClip(ValueError):
    """This clip cannot be used. get() of a dataset raises it; the loader logs it and draws another clip."""

    def __init__(self, name: str, reason: str):
        self.name, self.reason = one_line(name), one_line(reason)
        super().__init__(f"{self.name}: {self.reason}")


def one_line(text: str) -> str:
    """Text from a file, which may be damaged, without what would break the line or a terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


# ---- the dataset -------------------------------------------------------------------------------------------


def open_dataset(spec: str | Sequence[str | Path], frames: int = 16, fps: float = 16, height: int = 320,
                 width: int = 512, cache: str | None = None, columns: str = "",
                 video_root: str = "") -> "ClipDataset":
    """All clips of `spec` (see the head of this file) as one dataset. Raises UserError.

    cache: folder for the index of shards where it cannot be written beside them. Of several processes one
    should come first: it makes the index, and the others map it into their memory. columns and video_root are
    for manifests: "path={page_dir}/{videoid}.mp4,caption=name", and the folder that their paths begin in."""
    sources = open_sources(spec, cache, columns, video_root)
    if not sum(map(len, sources)):
        raise UserError(f"no clips in {spec}: expected *.mp4 with .txt beside them, e.g. 0001.mp4, 0001.txt; "
                        "a shard has members KEY.mp4 and KEY.txt")
    return ClipDataset(sources, frames, fps, height, width)


class ClipDataset:
    """The clips of all sources under one index.

    The loader takes anything else that has len() and get(index, generator) as well."""

    def __init__(self, sources: list, frames: int, fps: float, height: int, width: int):
        self.sources = sources
        self.frames, self.fps, self.height, self.width = frames, fps, height, width
        self.ends = np.cumsum([len(source) for source in sources])
        self.stretched = False                        # whether a clip was too short

    def __len__(self) -> int:
        return int(self.ends[-1])

    def get(self, index: int, generator: torch.Generator | None = None) -> dict:
        """dict(clip uint8 (3, T, H, W), fps, caption, reward_caption or None, index).

        The clip starts at the first frame without a generator. Raises BadClip."""
        number, i = locate(self.ends, index)
        source = self.sources[number]
        try:
            video, *captions = source.read(i)
            caption, reward_caption = map(clean, captions)
            if not caption:
                raise ValueError("no caption" if caption is None else "empty caption")
            clip, fps = read_video(video, self.frames, self.fps, self.height, self.width, generator)
        except (OSError, ValueError, RecursionError) as error:
            raise BadClip(source.name(i), getattr(error, "strerror", None) or str(error)) from error

        if fps > self.fps and not self.stretched:     # said once
            self.stretched = True
            warnings.warn(f"{source.name(i)} is shorter than {self.frames} frames at {self.fps:g} fps: it "
                          "is stretched, and so are others; a higher --fps needs less", stacklevel=2)
        return dict(clip=clip, fps=fps, caption=caption, reward_caption=reward_caption or None, index=index)


def locate(ends: np.ndarray, index: int) -> tuple[int, int]:
    """Index into a concatenation of things that end at `ends` -> (which of them, index in it)."""
    number = int(np.searchsorted(ends, index, side="right"))
    return number, int(index - (ends[number - 1] if number else 0))


def clean(text: object) -> str | None:
    """A caption without the spaces and byte order marks around it. Raises ValueError for what is no text."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"a caption is no text: {str(text)[:40]}")
    text.encode()                                     # raises where its file is not utf-8
    return text.replace("\ufeff", "").strip()


# ---- the loader --------------------------------------------------------------------------------------------


def loader(dataset, batch: int, rank: int = 0, world_size: int = 1, workers: int = 0, seed: int = 0,
           start_step: int = 0, bad_file: str | Path | None = None) -> Iterator[dict]:
    """Batches of the steps from start_step on, without end, decoded by `workers` threads a few batches ahead.

    A batch holds what the dataset's get() returns, stacked, and: position; bad, how many bad clips this rank
    has met. A JSON row for each of them is appended to bad_file. Raises UserError when they are too many."""
    if not len(dataset):
        raise UserError("the dataset is empty")
    places = order(len(dataset), batch, rank, world_size, seed, start_step)
    threads = min(workers, os.cpu_count() or 1)
    clips = in_threads(lambda place: draw(dataset, seed, *place), places, threads, 2 * max(batch, threads))
    return batches(clips, batch, start_step, bad_file)


def order(N: int, batch: int, rank: int, world_size: int, seed: int, start_step: int) -> Iterator[tuple]:
    """(position, index of the clip there) of all that a rank reads, step by step."""
    permuted_epoch = None
    for step in count(start_step):
        first = (step * world_size + rank) * batch
        for position in range(first, first + batch):
            epoch, k = divmod(position, N)
            if epoch != permuted_epoch:
                permuted_epoch, permutation = epoch, np.random.default_rng([seed, epoch]).permutation(N)
            yield position, int(permutation[k])


def draw(dataset, seed: int, position: int, index: int) -> tuple[dict | None, list[dict]]:
    """The clip at a position, or its first usable substitute, or None; and a row for each bad clip met."""
    N, bad = len(dataset), []
    epoch, k = divmod(position, N)
    for attempt in range(TRIES):
        if attempt:
            index = seed_of(seed, epoch, k, attempt) % N
        generator = torch.Generator().manual_seed(seed_of(seed, epoch, index))
        try:
            return {**dataset.get(index, generator), "position": position}, bad
        except BadClip as error:
            bad.append(dict(index=index, clip=error.name, reason=error.reason))
    return None, bad


def seed_of(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def in_threads(work: Callable, items: Iterable, workers: int, ahead: int) -> Iterator:
    """work(item) of endless items, in their order, by threads up to `ahead` items ahead; without any, here.

    The threads are daemons, as a pool's are not: a read that never returns does not keep the process from
    ending. When it ends, they have two seconds for what is under way."""
    if not workers:
        yield from map(work, items)
        return
    jobs, pending = queue.SimpleQueue(), deque()

    def run() -> None:
        for future, item in iter(jobs.get, None):
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work(item))
            except BaseException as error:            # raised where the result is asked for
                future.set_exception(error)

    def stop() -> None:
        for future in pending:
            future.cancel()
        for _ in threads:
            jobs.put(None)
        for thread in threads:
            thread.join(2 / workers)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    atexit.register(stop)
    try:
        for item in items:
            pending.append(Future())
            jobs.put((pending[-1], item))
            if len(pending) > ahead:
                yield pending.popleft().result()
    finally:
        atexit.unregister(stop)
        stop()


def batches(clips: Iterator, batch: int, start_step: int, bad_file: str | Path | None) -> Iterator[dict]:
    """Stacks what was drawn, logs bad clips, and raises when they are too many (by the rule in the head)."""
    recent, total = deque(maxlen=WINDOW), 0           # recent: a row for a bad clip, None for a good one
    with closing(clips):
        for step in count(start_step):
            items, bad = zip(*islice(clips, batch))
            bad = sum(bad, [])
            recent.extend(bad + [None] * (batch - items.count(None)))
            total += len(bad)
            if bad_file and bad:
                append_rows(bad_file, [dict(step=step, **row) for row in bad])

            rows = [row for row in recent if row] if bad else []
            if None in items or TRIES <= len(rows) > SHARE * len(recent):
                reasons = Counter(row["reason"] for row in rows).most_common(3)
                counts = ", ".join(f"{number} x {reason}" for reason, number in reasons)
                raise UserError(f"too many bad clips: {len(rows)} of the last {len(recent)} (the limit is "
                                f"{SHARE:.0%}): {counts}; the last one is {rows[-1]['clip']}"
                                + f"; see {bad_file}" * bool(bad_file))
            yield {key: stack([item[key] for item in items]) for key in items[0]} | {"bad": total}


def stack(values: list) -> Tensor | list:
    if torch.is_tensor(values[0]):
        return torch.stack(values)
    return torch.tensor(values) if isinstance(values[0], (int, float)) else values


def append_rows(path: str | Path, rows: list[dict]) -> None:
    """JSON lines, each by one appending write, so that any number of processes may share the file."""
    with open(path, "ab", buffering=0) as file:
        for row in rows:
            file.write((json.dumps(row) + "\n").encode())


# ---- the cache that T2V-Turbo-v2 trains from (v2 Algorithm 1): what the teacher says about each clip, kept -

# A sample is one draw (t, ε) of one clip. Five tensors are stored in float16, everything else as JSON:
#   z_t, eps_c = ε(z_t, c, t), eps_u = ε(z_t, ∅, t), gradient = ∂G/∂z_t, all (C, T, H, W); c (L, D)
#   index, draw     which clip, and which draw of it; t: its timestep
#   caption, reward_caption or None; rewards: whether the clip carries rewards
#   source, source_index: where the clip came from; and whatever else the reader is to have
# A gradient that is zero, because motion guidance is off at t, is not stored. At 512x320 with 16 frames a
# latent has 327,680 bytes and c 157,696: a sample has 1,140,736, with its gradient 1,468,416.
#
# A folder holds header.json (what made the cache), 000000.safetensors and so on (16 clips each, whichever
# process made them) and, when it is whole, index.json.
CACHED = ("z_t", "eps_c", "eps_u", "gradient", "c")
PER_SHARD = 16


class CacheWriter:
    """Makes a cache, or goes on with one: clips 0 to header["clips"] - 1, each with header["draws"] samples.

        writer = CacheWriter(folder, header, rank, world)
        for index in writer.missing():
            for draw in range(draws):
                writer.add(sample)                    # or writer.skip(index, reason)
        writer.finish()                               # in one process, when all are through

    header: what the samples depend on, JSON-able. Raises ValueError where the folder was made with another.
    Shard k belongs to process k % world. What it holds depends on its own clips alone, and not on their
    order, so that any number of processes makes the same files.
    """

    def __init__(self, folder: str | Path, header: dict, rank: int = 0, world: int = 1):
        self.folder, self.rank, self.world = Path(folder), rank, world
        self.clips, self.draws = header["clips"], header["draws"]
        self.samples = {}                             # clip -> {draw: (tensors, row)}, until written
        self.skipped = {}                             # clip -> why it is left out
        self.done = 0

        made = read_json(self.folder / "header.json")
        if made is None:
            write_json(self.folder / "header.json", header)
        else:
            check_header(self.folder, made, header)
        self.stamp = stamp(header)
        remove_leftovers(self.folder)

    def missing(self) -> list[int]:
        """This process's clips that are not on the disk yet, or in a shard that is damaged."""
        mine = range(self.rank, shard_count(self.clips), self.world)
        shards = [shard for shard in mine if not self.is_whole(shard)]
        if shards:
            (self.folder / "index.json").unlink(missing_ok=True)
        return [clip for shard in shards for clip in self.clips_of(shard)]

    def clips_of(self, shard: int) -> range:
        return range(shard * PER_SHARD, min((shard + 1) * PER_SHARD, self.clips))

    def is_whole(self, shard: int) -> bool:
        """Is the shard there, of this stamp, and can every tensor of it be read?"""
        path = shard_path(self.folder, shard)
        try:
            notes = read_notes(path)
            if notes["header"] != self.stamp:
                return False
            with safe_open(path, "pt") as file:
                for place, row in enumerate(notes["samples"]):
                    read_tensors(file, place, row)
        except ValueError:
            return False
        return True

    def add(self, sample: dict) -> None:
        """Keep one sample. Its clip is skipped where a tensor has values that float16 cannot hold."""
        index, draw = sample["index"], sample["draw"]
        if index in self.skipped:                     # because of another draw
            return
        tensors = {name: to_half(sample[name]) for name in CACHED}
        if not tensors["gradient"].any():
            del tensors["gradient"]
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                self.skip(index, f"{name} of draw {draw} has values that are not finite in float16")
                return

        row = {name: value for name, value in sample.items() if name not in CACHED}
        row["crc"] = {name: checksum(tensor) for name, tensor in tensors.items()}
        self.samples.setdefault(index, {})[draw] = (tensors, row)
        self.flush(index // PER_SHARD)

    def skip(self, index: int, reason: str) -> None:
        """Leave out a clip, for a reason that the index will name.

        Raises ValueError when at least 20 clips, and more than 5 % of those that were tried, are left out."""
        self.skipped[index] = reason
        self.samples.pop(index, None)
        bad, tried = len(self.skipped), self.done + len(self.samples) + len(self.skipped)
        if bad >= TRIES and bad > SHARE * tried:
            raise ValueError(f"{self.folder}: too many clips cannot be used: {bad} of {tried} (the limit is "
                             f"{SHARE:.0%}); the last one is clip {index}: {reason}")
        self.flush(index // PER_SHARD)

    def flush(self, shard: int) -> None:
        """Write a shard, if all its clips are there, as one file that is whole or not there."""
        clips = self.clips_of(shard)
        if not all(clip in self.skipped or len(self.samples.get(clip, ())) == self.draws for clip in clips):
            return

        kept = [self.samples.pop(clip) for clip in clips if clip not in self.skipped]
        samples = [draws[draw] for draws in kept for draw in sorted(draws)]
        tensors = {f"{place}.{name}": tensor
                   for place, (sample, _) in enumerate(samples) for name, tensor in sample.items()}
        notes = dict(header=self.stamp, samples=[row for _, row in samples],
                     skipped={clip: self.skipped[clip] for clip in clips if clip in self.skipped})
        text = json.dumps(notes)
        with atomic(shard_path(self.folder, shard)) as temporary:
            save_file(tensors, temporary, metadata={"notes": f"{zlib.crc32(text.encode()):08x}{text}"})
        self.done += len(kept)

    def finish(self) -> None:
        """Write the index, which makes the cache readable. Raises ValueError where a shard is missing."""
        shards, skipped = [], {}
        for shard in range(shard_count(self.clips)):
            path = shard_path(self.folder, shard)
            notes = read_notes(path)
            if notes["header"] != self.stamp:
                raise ValueError(f"{path} is of another cache: make it anew with --prepare {self.folder}")
            skipped |= notes["skipped"]
            rewards = [bool(row["rewards"]) for row in notes["samples"]]
            shards.append(dict(bytes=path.stat().st_size, rewards=rewards))
        write_json(self.folder / "index.json", dict(header=self.stamp, shards=shards, skipped=skipped))


class Cache:
    """A whole cache as a dataset for the loader, each sample read from mapped memory.

    expect: what header.json must say, e.g. {"model": "vc2", "grid": 200}. Raises ValueError where it says
    otherwise, and where the cache is not whole. v2 trains on two streams of one cache (Sec. 4: 3 clips for
    L_CD and 1 for rewards), both in exact order and both resumed by the step:

        zip(loader(cache, 3, rank, world, seed=seed, start_step=step),
            loader(cache.where(rewards=True), 1, rank, world, seed=seed + 1, start_step=step))
    """

    def __init__(self, folder: str | Path, expect: dict | None = None):
        self.folder = Path(folder)
        self.header = read_json(self.folder / "header.json")
        index = read_json(self.folder / "index.json")
        if self.header is None:
            raise ValueError(f"no cache in {folder}: make one with --prepare {folder}")
        check_header(self.folder, self.header, expect or {}, partly=True)
        if index is None or index.get("header") != stamp(self.header):
            raise ValueError(f"the cache in {folder} is not whole: go on with --prepare {folder}")

        self.skipped = {int(clip): reason for clip, reason in index["skipped"].items()}
        for shard, entry in enumerate(index["shards"]):
            path = shard_path(self.folder, shard)
            if not path.exists() or path.stat().st_size != entry["bytes"]:
                raise ValueError(f"{path} is missing or damaged: make it anew with --prepare {folder}")
        self.ends = np.cumsum([len(entry["rewards"]) for entry in index["shards"]])
        self.rewards = np.concatenate([np.array(entry["rewards"], bool) for entry in index["shards"]])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def get(self, index: int, generator: torch.Generator | None = None) -> dict:
        """One sample as it was added, its tensors in float16.

        Raises BadClip for a sample whose bytes are not those that were written."""
        shard, place = locate(self.ends, index)
        path = shard_path(self.folder, shard)
        try:
            row = read_notes(path)["samples"][place]
            with safe_open(path, "pt") as file:
                tensors = read_tensors(file, place, row)
        except ValueError as error:
            raise BadClip(f"{path}, sample {place}", str(error)) from error
        del row["crc"]
        gradient = torch.zeros_like(tensors["z_t"])
        return {**row, "gradient": gradient, **tensors}

    def where(self, rewards: bool) -> "Subset":
        """The samples of the clips that carry rewards, or of those that do not."""
        indices = np.flatnonzero(self.rewards == rewards)
        if not len(indices):
            raise ValueError(f"no clip of {self.folder} {'carries' if rewards else 'is without'} rewards: "
                             "--reward-data says which do, when the cache is made")
        return Subset(self, indices)


class Subset:
    """Some samples of a dataset, as a dataset."""

    def __init__(self, dataset, indices: np.ndarray):
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def get(self, index: int, generator: torch.Generator | None = None) -> dict:
        return self.dataset.get(int(self.indices[index]), generator)


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """A cheap identity of a network for a cache's header: names, shapes, and 64 values of each tensor."""
    digest = sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().flatten()
        places = torch.linspace(0, len(values) - 1, min(64, len(values)), dtype=torch.float64).long()
        some = values[places.to(values.device)].bfloat16().float().cpu()     # the same in either dtype
        digest.update(f"{name} {tuple(tensor.shape)} {some.tolist()}".encode())
    return digest.hexdigest()[:16]


def check_header(folder: Path, made: dict, wanted: dict, partly: bool = False) -> None:
    """Raises ValueError, in one line, where a cache's header differs from what is wanted of it."""
    wanted = json.loads(json.dumps(wanted))           # tuples become lists, as in the file
    names = wanted.keys() if partly else made.keys() | wanted.keys()
    for name in sorted(names):
        if made.get(name) != wanted.get(name):
            raise ValueError(f"the cache in {folder} was made with {name} = {made.get(name)}, not "
                             f"{wanted.get(name)}: choose another folder or those options")


def stamp(header: dict) -> str:
    return sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]


def shard_count(clips: int) -> int:
    return -(-clips // PER_SHARD)


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:06d}.safetensors"


def read_notes(path: Path) -> dict:
    """What a shard holds besides tensors: its cache's stamp, a row per sample, the clips left out."""
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata()["notes"]
        if notes[:8] != f"{zlib.crc32(notes[8:].encode()):08x}":
            raise ValueError("its notes are not what was written")
        return json.loads(notes[8:])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}): make it anew with --prepare") from error


def read_tensors(file: safe_open, place: int, row: dict) -> dict[str, Tensor]:
    """The tensors of one sample. Raises ValueError unless they are those that were written."""
    tensors = {}
    for name, crc in row["crc"].items():
        try:
            tensors[name] = file.get_tensor(f"{place}.{name}")
        except SafetensorError as error:
            raise ValueError(f"damaged: {error}") from error
        if checksum(tensors[name]) != crc:
            raise ValueError(f"damaged: {name} is not what was written")
    return tensors


def to_half(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float16).contiguous()


def checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.numpy())


def read_json(path: Path) -> dict | None:
    """What write_json wrote, or None where there is nothing. Raises ValueError for a damaged file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        crc = value.pop("crc")
        if crc != zlib.crc32(json.dumps(value).encode()):
            raise ValueError("it is not what was written")
        return value
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and go on with --prepare") from error


def write_json(path: Path, value: dict) -> None:
    crc = zlib.crc32(json.dumps(value).encode())
    with atomic(path) as temporary:
        temporary.write_text(json.dumps({**value, "crc": crc}), encoding="utf-8")
