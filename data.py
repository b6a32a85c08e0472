"""Captioned clips: every source becomes one indexed dataset, and the batch of step n is a function of (seed, n) alone.

open_dataset(spec) takes any of these, or several with commas between them (or a list):

    folder        clips/0001.mp4 with its caption in clips/0001.txt; subfolders too
    manifest.csv  path,caption,reward_caption          paths are relative to the manifest; reward_caption is optional:
                  a/dog.mp4,"A dog runs.",a dog        a shorter text for the reward models
    clips.jsonl   {"path": "a/dog.mp4", "caption": "A dog runs.", "reward_caption": "a dog"}
    tar shards    /data/webvid/{00000..09999}.tar      with members KEY.mp4 and KEY.txt, optionally KEY.json:
                  {"reward_caption": "a dog"}          its "caption" is used where there is no KEY.txt

Order   Position p is clip p % N of epoch p // N, and an epoch is a permutation drawn from (seed, epoch). Step n on
        rank r reads `batch` positions from n*batch*world + r*batch on: no repeats, no gaps, and one global batch for
        every split of it over ranks.
Start   The first frame is drawn from a generator seeded by (seed, epoch, index).
Bad     A clip that cannot be used is logged (step, index, clip, reason). Clip hash(seed, epoch, p % N, attempt) % N
        takes its place, again a function of the position alone. A run ends when at least 20 bad clips are more than
        5 % of the last 1000 that its rank drew, or when 20 in a row are bad.
"""
import csv
import hashlib
import json
import os
import re
import tarfile
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from plumbing.files import atomic
from plumbing.video import read_video

VIDEO = (".mp4", ".m4v", ".mov", ".mkv", ".webm")
COLUMN = {suffix: 0 for suffix in VIDEO} | {".txt": 2, ".json": 4}      # kind of shard member -> place in an index row
TRIES, WINDOW, SHARE = 20, 1000, 0.05                                   # the rule about bad clips


class BadClip(ValueError):
    """This clip cannot be used. get() of a dataset raises it; the loader logs it and draws another clip."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


def locate(ends: np.ndarray, index: int) -> tuple[int, int]:
    """Index into a concatenation of parts that end at `ends` -> (part, index in it)."""
    part = int(np.searchsorted(ends, index, side="right"))
    return part, int(index - (ends[part - 1] if part else 0))


# ---- sources: len(), name(i), and read(i) -> (path or bytes of the video, caption, reward caption or None) ----


class Files:
    """Clips in files of their own. Rows: (path, caption, reward caption); caption None = in the .txt beside it."""

    def __init__(self, base: str, rows: list[tuple]):
        self.base, self.rows = base, rows

    def __len__(self):
        return len(self.rows)

    def name(self, i: int) -> str:
        return os.path.join(self.base, self.rows[i][0])

    def read(self, i: int) -> tuple:
        _, caption, reward_caption = self.rows[i]
        if caption is None:
            text = Path(self.name(i)).with_suffix(".txt")
            caption = text.read_text(encoding="utf-8") if text.exists() else None
        return self.name(i), caption, reward_caption


def folder_source(folder: str) -> Files:
    """All video files below a folder, each with the .txt of its name as caption. Raises ValueError when there is none."""
    paths = [os.path.relpath(os.path.join(base, name), folder) for base, _, names in os.walk(folder, followlinks=True)
             for name in names if name.lower().endswith(VIDEO) and not name.startswith(".")]
    if not paths:
        tars = sorted(Path(folder).glob("*.tar"))
        hint = f"; for its shards write '{folder}/{{{tars[0].stem}..{tars[-1].stem}}}.tar'" if tars else ""
        raise ValueError(f"no clips in {folder}: expected *.mp4 with .txt beside them, e.g. 0001.mp4, 0001.txt{hint}")
    return Files(folder, [(path, None, None) for path in sorted(paths)])


def manifest_source(path: str) -> Files:
    """The rows of a CSV or JSON-lines file: path (relative to the file), caption, perhaps reward_caption. Raises ValueError for others."""
    rows, example = [], '{"path": "a/dog.mp4", "caption": "A dog runs."}' if path.endswith(".jsonl") else "path,caption"
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = csv.DictReader(file) if path.endswith(".csv") else map(json.loads, filter(str.strip, file))
        try:
            for row in lines:
                rows.append((str(row.get("path") or ""), row.get("caption") or "", row.get("reward_caption") or None))
        except (ValueError, AttributeError, csv.Error) as error:
            raise ValueError(f"{path}, row {len(rows) + 1}: {error}; expected {example}") from error
    if not any(name and caption for name, caption, _ in rows):
        raise ValueError(f"{path}: no row has both a path and a caption; expected {example}")
    return Files(os.path.dirname(path), rows)


def expand(pattern: str) -> list[str]:
    """'{00..02}{x,y}.tar' -> 00x.tar, 00y.tar, 01x.tar, ... as a shell does."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if not brace:
        return [pattern]
    names, span = brace[1].split(","), re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
    if span:
        names = [str(i).zfill(len(span[1])) for i in range(int(span[1]), int(span[2]) + 1)]
    if not names:
        raise ValueError(f"{pattern}: {brace[0]} runs backwards; write {{{span[2]}..{span[1]}}}")
    return [path for name in names for path in expand(pattern[:brace.start()] + name + pattern[brace.end():])]


class Shards:
    """Clips in tar files, read in place. An index row: (offset, size) of video, .txt and .json; -1 = not there."""

    def __init__(self, paths: list[str], cache: str | None):
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            raise ValueError(f"{len(missing)} of {len(paths)} shards are not there, e.g. {missing[0]}")
        with ThreadPoolExecutor(8) as pool:           # this waits for the disk, not for the processor
            parts = list(pool.map(lambda path: shard_index(path, cache), paths))
        self.paths, self.ends, self.rows = paths, np.cumsum([len(part) for part in parts]), np.concatenate(parts)

    def __len__(self):
        return len(self.rows)

    def name(self, i: int) -> str:
        path, (video, _, text, *_) = self.paths[locate(self.ends, i)[0]], self.rows[i]
        offset = video if video >= 0 else text
        if offset < 0:
            return path
        with open(path, "rb") as file:                # a member's name stands in the 512 bytes before its data
            file.seek(offset - 512)
            return f"{path}:{file.read(100).rstrip(bytes(1)).decode(errors='replace')}"

    def read(self, i: int) -> tuple:
        row, parts = self.rows[i].tolist(), []
        if row[0] < 0:
            raise ValueError("no video beside this caption" if row[2] >= 0 else f"damaged tar from byte {row[1]} on")
        with open(self.paths[locate(self.ends, i)[0]], "rb") as file:
            for offset, size in zip(row[::2], row[1::2], strict=True):
                file.seek(max(offset, 0))
                parts.append(file.read(size) if offset >= 0 else None)
        video, text, extra = parts
        extra = json.loads(extra) if extra else {}
        if not isinstance(extra, dict):
            raise ValueError("its .json is not an object")
        return video, text.decode() if text is not None else extra.get("caption"), extra.get("reward_caption") or None


def shard_index(path: str, cache: str | None = None) -> np.ndarray:
    """A shard's index, kept as .npy beside it or else in `cache`; made anew when the shard's size or time changed."""
    stat = os.stat(path)
    stamp = [1, stat.st_size, stat.st_mtime_ns, 0, 0, 0]      # first row of the file; 1 = version of this format
    name = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:16]
    places = [Path(f"{path}.index.npy")] + ([Path(cache, f"{name}.index.npy")] if cache else [])
    for place in places:
        try:
            table = np.load(place)
        except (OSError, ValueError, EOFError):       # not there, not readable, not an index
            continue
        if table.ndim == 2 and table[0].tolist() == stamp:
            return table[1:]
    table = np.concatenate([[stamp], scan_shard(path, stat.st_size)])
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic(place) as temporary, open(temporary, "wb") as file:
                np.save(file, table)
            break
        except ValueError:                            # not writable
            continue
    else:
        warnings.warn(f"{os.path.dirname(path) or '.'} is not writable: name a cache folder, or every start indexes "
                      "its shards again", stacklevel=2)
    return table[1:]


def scan_shard(path: str, size: int) -> np.ndarray:
    """Headers of a tar -> int64 (clips, 6). What follows a damaged one becomes one bad clip: (-1, where, -1, ...)."""
    rows, end = {}, 0
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.offset_data + member.size > size:
                        break
                    end = tar.offset                  # where the next header is
                    folder, name = os.path.split(member.name)
                    key, dot, suffix = name.partition(".")
                    column = COLUMN.get((dot + suffix).lower())
                    if member.isreg() and key and column is not None:
                        rows.setdefault((folder, key), [-1] * 6)[column:column + 2] = member.offset_data, member.size
        except (tarfile.TarError, ValueError):        # seen below: tarfile may also stop at a bad header without a word
            pass
        file.seek(end)
        damaged = size == 0 or any(file.read(512))    # a sound tar ends in zeros or right after its last member
    good = [row for row in rows.values() if row[0] >= 0 or row[2] >= 0]
    return np.array(good + [[-1, end, -1, -1, -1, -1]] * damaged, np.int64).reshape(-1, 6)


# ---- the dataset ----


class Clips:
    """The clips of all sources under one index. The loader takes anything that has len() and get(index, generator)."""

    def __init__(self, sources: list, **shape):
        self.sources, self.shape = sources, shape     # shape: frames, fps, height, width for read_video
        self.ends = np.cumsum([len(source) for source in sources])

    def __len__(self):
        return int(self.ends[-1])

    def get(self, index: int, generator: torch.Generator | None = None) -> dict:
        """dict(clip uint8 (3, T, H, W), caption, reward_caption or None, index); from frame 0 without a generator."""
        part, i = locate(self.ends, index)
        source = self.sources[part]
        try:
            video, caption, reward_caption = source.read(i)
            if not isinstance(caption, str) or not caption.strip():
                raise ValueError("no caption" if caption is None else "empty caption")
            clip, fps = read_video(video, **self.shape, generator=generator)
        except (OSError, ValueError) as error:
            raise BadClip(source.name(i), str(error)) from error
        return dict(clip=clip, fps=fps, caption=caption.strip(), reward_caption=reward_caption, index=index)


def open_dataset(spec: str | list, frames: int = 16, fps: float = 16, height: int = 320, width: int = 512,
                 cache: str | None = None) -> Clips:
    """All clips of `spec` (see the head of this file) as one dataset; cache: see shard_index."""
    specs = re.split(r",(?![^{]*\})", spec) if isinstance(spec, str) else map(str, spec)     # not at commas in braces
    sources = []
    for part in filter(None, map(str.strip, specs)):
        if part.endswith(".tar"):
            sources.append(Shards(expand(part), cache))
        elif part.endswith((".csv", ".jsonl")):
            sources.append(manifest_source(part))
        elif os.path.isdir(part):
            sources.append(folder_source(part))
        else:
            raise ValueError(f"no data at {part}: expected a folder of clips, a .csv or .jsonl manifest, or .tars")
    if not sum(map(len, sources)):
        raise ValueError(f"no clips in {spec}: a shard has members KEY.mp4 and KEY.txt")
    return Clips(sources, frames=frames, fps=fps, height=height, width=width)


# ---- the loader ----


def seed_of(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


class Steps:
    """steps[n] = (this rank's batch of step n, the bad clips met on the way); the batch is None if all tries failed."""

    def __init__(self, dataset, batch: int, rank: int, world: int, seed: int):
        self.dataset, self.batch, self.rank, self.world, self.seed = dataset, batch, rank, world, seed
        self.epoch, self.order = None, None

    def __getitem__(self, step: int) -> tuple[dict | None, list[dict]]:
        first, bad = (step * self.world + self.rank) * self.batch, []
        items = [item for position in range(first, first + self.batch) for item in self.draw(position, bad)]
        return collate(items) if len(items) == self.batch else None, bad

    def draw(self, position: int, bad: list[dict]) -> list[dict]:
        """The clip at a position, or the first usable one of its substitutes; [] if there is none."""
        epoch, k = divmod(position, len(self.dataset))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
        for attempt in range(TRIES):
            index = seed_of(self.seed, epoch, k, attempt) % len(self.dataset) if attempt else int(self.order[k])
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, index))
            try:
                return [{**self.dataset.get(index, generator), "position": position}]
            except BadClip as error:
                bad.append(dict(index=index, clip=error.name, reason=error.reason))
        return []


def collate(items: list[dict]) -> dict:
    """Dicts -> dict of batches: tensors and numbers are stacked, everything else becomes a list."""
    batch = {key: [item[key] for item in items] for key in items[0]}
    for key, values in batch.items():
        if torch.is_tensor(values[0]):
            batch[key] = torch.stack(values)
        elif isinstance(values[0], (int, float)):
            batch[key] = torch.tensor(values)
    return batch


def loader(dataset, batch: int, rank: int = 0, world: int = 1, workers: int = 0, seed: int = 0, start_step: int = 0,
           bad_file: str | Path | None = None) -> Iterator[dict]:
    """Batches of the steps from start_step on, without end: dict(clip (B, 3, T, H, W), caption, reward_caption, index,
    position, bad = how many bad clips this rank has met). bad_file: a JSON row for each of them is appended to it."""
    if not len(dataset):
        raise ValueError("the dataset is empty")
    steps = Steps(dataset, batch, rank, world, seed)
    batches = DataLoader(steps, batch_size=None, sampler=range(start_step, 2 ** 62), num_workers=workers,
                         collate_fn=tuple, generator=torch.Generator())       # keeps off torch's global random state
    return watched(batches, batch, start_step, bad_file)


def watched(batches: DataLoader, batch: int, start_step: int, bad_file: str | Path | None) -> Iterator[dict]:
    """Pass the batches on, log the bad clips, and raise when they are too many (the rule is in the file's head)."""
    recent, total = deque(maxlen=WINDOW), 0
    for step, (out, bad) in enumerate(batches, start_step):
        recent.extend(bad + [None] * (batch if out else 0))
        total += len(bad)
        if bad_file and bad:
            append_rows(bad_file, [dict(step=step, **row) for row in bad])
        rows = [row for row in recent if row] if bad else []
        if out is None or len(rows) >= TRIES and len(rows) > SHARE * len(recent):
            reasons = Counter(row["reason"] for row in rows).most_common(3)
            raise ValueError(f"too many bad clips: {len(rows)} of the last {len(recent)} (the limit is {SHARE:.0%}): "
                             + ", ".join(f"{count} x {reason}" for reason, count in reasons)
                             + f"; the last one is {rows[-1]['clip']}" + (f"; see {bad_file}" if bad_file else ""))
        yield {**out, "bad": total}


def append_rows(path: str | Path, rows: list[dict]) -> None:
    """JSON lines, each by one appending write, so that any number of processes may share the file."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for row in rows:
        os.write(file, (json.dumps(row) + "\n").encode())
    os.close(file)


# ---- the cache that T2V-Turbo-v2 trains from: what the teacher says about each clip, computed once ----


class CacheWriter:
    """add() dicts of tensors, numbers and strings to safetensors shards, each rank to its own.

    `done` samples are safe on disk: after an interruption go on with sample `done`."""

    def __init__(self, folder: str | Path, per_shard: int = 64, rank: int = 0):
        self.folder, self.per_shard, self.rank, self.items = Path(folder), per_shard, rank, []
        self.folder.mkdir(parents=True, exist_ok=True)
        shards = sorted(self.folder.glob(f"{rank:04d}-*.safetensors"))
        self.shards, self.done = len(shards), sum(len(cache_rows(path)) for path in shards)

    def add(self, item: dict) -> None:
        self.items.append({k: v.detach().cpu().clone() if torch.is_tensor(v) else v for k, v in item.items()})
        if len(self.items) == self.per_shard:
            self.flush()

    def flush(self) -> None:
        """Write what has been added as one shard: tensors under '3.z_t', everything else as JSON in the header."""
        tensors = {f"{i}.{k}": v for i, item in enumerate(self.items) for k, v in item.items() if torch.is_tensor(v)}
        rows = [{k: v for k, v in item.items() if not torch.is_tensor(v)} for item in self.items]
        if rows:
            with atomic(self.folder / f"{self.rank:04d}-{self.shards:06d}.safetensors") as temporary:
                save_file(tensors, temporary, metadata={"rows": json.dumps(rows)})
            self.shards, self.done, self.items = self.shards + 1, self.done + len(rows), []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.flush()


def cache_rows(path: Path) -> list[dict]:
    """What a shard of the cache holds besides tensors, one dict per sample."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["rows"])
    except (SafetensorError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a whole cache shard ({error}); delete it and make the cache again") from error


class TensorCache:
    """Reads what CacheWriter wrote, one sample at a time from mapped memory; a dataset for the loader."""

    def __init__(self, folder: str | Path):
        self.paths = sorted(Path(folder).glob("*.safetensors"))
        if not self.paths:
            raise ValueError(f"no cache in {folder}: expected 0000-000000.safetensors and so on")
        self.rows = [cache_rows(path) for path in self.paths]
        self.ends = np.cumsum([len(rows) for rows in self.rows])

    def __len__(self):
        return int(self.ends[-1])

    def get(self, index: int, generator: torch.Generator | None = None) -> dict:
        part, i = locate(self.ends, index)
        with safe_open(self.paths[part], "pt") as file:
            names = [name for name in file.keys() if name.startswith(f"{i}.")]
            return self.rows[part][i] | {name.split(".", 1)[1]: file.get_tensor(name) for name in names}
