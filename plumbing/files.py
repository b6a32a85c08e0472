"""Files that are written: whole or not at all, and never in the place of somebody else's."""
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from plumbing.errors import UserError, reading

COUNT = itertools.count()               # tells apart the files that one process writes at the same time


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a name of the same suffix; the block writes that file, and then it becomes `path`.

    It lies in a hidden folder beside `path`, which also takes the temporary files of libraries.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} cannot be written: it is a folder")
    start = os.fsdecode(os.fsencode(path.name)[:100])                   # a name may have 255 bytes
    folder = path.with_name(f".{start}.{os.getpid()}-{next(COUNT)}.part")
    temporary = folder / f"file{path.suffix}"
    try:
        folder.mkdir(parents=True)
        yield temporary
        os.chmod(temporary, folder.stat().st_mode & 0o666)              # safetensors makes files of mode 600
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())                                     # the content is there before the name
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: str | Path) -> None:
    """Deletes what `atomic` left when a process was killed; nobody else may be writing into the folder."""
    for leftover in Path(folder).glob(".*.part"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)


def check_writable(folder: str | Path) -> None:
    """Makes a folder, if it is not there, and raises UserError where no file can be made in it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: nothing can be written there: {error.strerror}") from error


def read_header(path: str | Path) -> dict:
    """The JSON header of a .safetensors file of ours; {} where someone else wrote it. Needs no torch."""
    with reading(path, "a weight file"), safe_open(path, "np") as file:
        return {**json.loads((file.metadata() or {}).get("config", "{}"))}


# ---- the rule about outputs --------------------------------------------------------------------------------


def check_outputs(outputs: dict, inputs: dict) -> None:
    """Raises UserError where something could be lost: an output is no input, two outputs are not one place,
    nor one within the other, and an existing file is replaced only by one of its own kind.

    outputs, inputs: {option: path, list of paths, or None}.
    """
    outputs = {option: [Path(path) for path in as_list(paths)] for option, paths in outputs.items()}
    inputs = {option: [Path(path) for path in as_list(paths)] for option, paths in inputs.items()}

    for (one, paths), (other, other_paths) in itertools.combinations(outputs.items(), 2):
        for path, other_path in itertools.product(paths, other_paths):
            a, b = path.resolve(), other_path.resolve()
            if a == b or a in b.parents or b in a.parents:
                raise UserError(f"{one} {path} and {other} {other_path} are one place; give each its own")

    for option, path in ((option, path) for option, paths in outputs.items() for path in paths):
        for source, source_path in ((name, path) for name, paths in inputs.items() for path in paths):
            linked = path.exists() and source_path.exists() and path.samefile(source_path)
            if linked or path.resolve() == source_path.resolve():
                raise UserError(f"{option} {path} is also {source}; an output never replaces an input")
        if path.is_file() and not replaceable(path):
            raise UserError(f"{option} {path} exists, and no such command wrote it; choose another name")


def as_list(paths) -> list:
    """No path, one, or several, as a list."""
    return [] if not paths else [paths] if isinstance(paths, (str, Path)) else list(paths)


def replaceable(path: Path) -> bool:
    """Does an existing file hold what the commands write under its suffix? Of most the suffix is enough."""
    try:
        if path.suffix.lower() == ".safetensors":
            with safe_open(path, "np") as file:
                return set(file.keys()) == {"clip"}
        if path.suffix.lower() == ".json":
            return not {"scores", "rows"}.isdisjoint(json.loads(path.read_text(encoding="utf-8")))
    except (SafetensorError, OSError, ValueError, TypeError):
        return False
    return path.suffix != ""
