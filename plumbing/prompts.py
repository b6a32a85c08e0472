"""Prompts and the files of their clips: lists of prompts, VBench's names, what may lie in a folder."""
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from plumbing.files import check_writable, remove_leftovers

NAME_MAX = 255                          # bytes of a file's name, on all common file systems


@dataclass(frozen=True)
class Job:
    """One clip to make."""
    prompt: str
    seed: int
    path: Path


# ---- lists of prompts --------------------------------------------------------------------------------------


def read_prompts(path: str) -> dict[str, int]:
    """{prompt: usual number of clips} of a text file (1) or of VBench's json (5; temporal_flickering: 25)."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        rows = json.loads(text) if path.lower().endswith(".json") else text.splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in utf-8 (byte {error.start})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error

    prompts = {}
    for number, row in enumerate(rows if isinstance(rows, list) else [None], 1):
        prompt, usual = read_row(row)
        if prompt is None or "\0" in prompt:
            raise ValueError(f'{path}, entry {number}: neither a prompt nor an object with "prompt_en"')
        if prompt.strip():
            prompts[prompt] = max(usual, prompts.get(prompt, 0))
    if not prompts:
        raise ValueError(f"{path}: no prompts in it")
    return prompts


def read_row(row) -> tuple[str | None, int]:
    """A prompt, or None where there is none, and how many clips of it are usual."""
    if isinstance(row, str):
        return row.strip(), 1
    if not isinstance(row, dict) or not isinstance(row.get("prompt_en"), str):
        return None, 0
    dimensions = row.get("dimension")
    if not isinstance(dimensions, list):
        return row["prompt_en"], 1
    return row["prompt_en"], 25 if "temporal_flickering" in dimensions else 5


# ---- files -------------------------------------------------------------------------------------------------


def clip_paths(out: Path, prompt: str, count: int) -> list[Path]:
    """OUT, or OUT-0, OUT-1, ...; in a folder (a name without suffix) VBench's names, PROMPT-0.mp4, ..."""
    if not out.suffix:
        return [out / f"{prompt.replace('/', ' ')}-{i}.mp4" for i in range(count)]
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(count)]


def plan(prompts: dict[str, int], out: Path, seed: int) -> list[Job]:
    """{prompt: clips} -> all clips to make, in order; clip i of each prompt has seed + i."""
    return [Job(prompt, seed + i, path) for prompt, count in prompts.items()
            for i, path in enumerate(clip_paths(out, prompt, count))]


def check_names(jobs: list[Job]) -> None:
    """Raises ValueError where two prompts would share a file, or a name is too long for a file system."""
    owner, folded = {}, {}
    for job in jobs:
        check_length(job.path)
        other = owner.setdefault(job.path, job)
        if other.prompt != job.prompt:
            raise ValueError(f"the prompts {other.prompt!r} and {job.prompt!r} would both be written to "
                             f"{job.path}; reword one")
        twin = folded.setdefault(str(job.path).casefold(), job)
        if twin.path != job.path and ignores_case(job.path.parent):
            raise ValueError(f"the prompts {twin.prompt!r} and {job.prompt!r} differ in capital letters "
                             f"only, which {job.path.parent} does not tell apart; choose another --out")


def check_length(path: Path) -> None:
    """A file system counts bytes, not letters. Raises ValueError."""
    size = len(os.fsencode(path.name))
    if size > NAME_MAX:
        raise ValueError(f"{path.name[:40]}...: a file's name takes {NAME_MAX} bytes, this one has {size}; "
                         "shorten the prompt")


def ignores_case(folder: Path) -> bool:
    """Does the file system take `a` and `A` for one name?"""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".case-{os.getpid()}"
    probe.touch()
    try:
        return probe.with_name(probe.name.upper()).exists()
    finally:
        probe.unlink()


def check_places(jobs: list[Job], others: dict[str, Path]) -> None:
    """Raises ValueError unless all clips and the other files, {option: path}, can be written."""
    taken = {job.path.resolve(): "--out" for job in jobs}
    for option, path in others.items():
        check_length(path)
        twin = taken.setdefault(path.resolve(), option)
        if twin != option:
            raise ValueError(f"{twin} and {option} both name {path}; give each a file of its own")
        if path.is_dir():
            raise ValueError(f"{option} {path} is a folder; give it a file's name")

    for folder in {path.parent for path in taken}:
        check_writable(folder)
        remove_leftovers(folder)


def check_folder(folder: Path, others: dict[str, Path]) -> None:
    """Raises ValueError where something else than clips lies in a folder, or is to be written there.

    VBench takes all files of a folder for clips with the suffix of the first one."""
    names = [path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    names += [path.name for path in others.values() if path.resolve().parent == folder.resolve()]
    foreign = sorted(name for name in names if not name.endswith(".mp4"))
    if foreign:
        raise ValueError(f"{folder}: VBench wants nothing but clips in it, and there is {foreign[0]}; "
                         "choose another folder")


def check_space(sizes: list[tuple[Path, float]]) -> None:
    """Raises ValueError where all files together, (path, bytes), do not fit their disks."""
    needed = Counter()
    for path, size in sizes:
        disk, free = path.parent.stat().st_dev, shutil.disk_usage(path.parent).free
        needed[disk] += size
        if needed[disk] > free:
            raise ValueError(f"{path}: about {needed[disk] / 1e6:.1f} MB to write in all, and its disk has "
                             f"{free / 1e6:.1f} MB left; make room, or write to another disk")


def write_all(writers: dict[Path, Callable[[Path], None]]) -> None:
    """Each writer(path). What cannot be written, as on a full disk, is kept in a temporary folder.

    Raises ValueError, which names the file, the reason and that folder, after all is written."""
    problem, spare = None, None
    for path, write in writers.items():
        try:
            write(path)
        except ValueError as error:
            problem = problem or error
            spare = spare or Path(tempfile.mkdtemp(prefix="kept-"))
            try:
                write(spare / path.name)
            except ValueError:
                raise problem from None
    if problem:
        raise ValueError(f"{problem}; what was made is kept in {spare}: move it when there is room") \
            from problem
