"""Files that are written: whole or not at all, and never in the place of somebody else's."""
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

from safetensors import SafetensorError, safe_open

from plumbing.errors import UserError, reading

MARK = "made by T2V-Turbo from scratch"          # in clips, pictures and .json: what may be replaced


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a hidden file beside `path`; the block writes it, and then it becomes `path`. A process that is
    killed leaves .NAME.XXXXXXXX.part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, mode)                                       # safetensors makes files of mode 600
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())                                     # the content is there before the name
        os.replace(temporary, path)
    except RuntimeError as error:
        if "inline_container" not in str(error):                # torch.save's file
            raise
        raise UserError(f"{path} cannot be written: is the disk full? Make room, and go on") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def remove_leftovers(folder: Path) -> None:
    """Removes what `atomic`, and safetensors within it, left in a folder when their process was killed."""
    for file in (*folder.glob(".*.????????.part"), *folder.glob(".tmp??????")):
        if file.is_file() and (file.suffix == ".part" or is_safetensors(file)):
            file.unlink()


def check_writable(folder: str | Path) -> None:
    """Makes a folder, if it is not there, and raises UserError where no file can be made in it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: nothing can be written there: {error.strerror}") from error


def is_safetensors(path: str | Path) -> bool:
    """By content: eight bytes of length, then JSON."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def read_header(path: str | Path, key: str = "config") -> dict:
    """The JSON header of a .safetensors file of ours; {} where someone else wrote it. Needs no torch."""
    with reading(path, "a weight file"):
        if not is_safetensors(path):
            return {}
        with safe_open(path, "np") as file:
            text = (file.metadata() or {}).get(key, "{}")
        with suppress(json.JSONDecodeError):
            content = json.loads(text)
            return content if isinstance(content, dict) else {}
    return {}


def check_outputs(outputs: dict, inputs: dict) -> None:
    """Raises UserError where something could be lost: an output is no input, two options' outputs are not one
    place, nor one within the other, and an existing file is replaced only if this program made it.

    outputs, inputs: {option: path, list of paths, or None}."""
    outputs, inputs = pairs(outputs), pairs(inputs)
    for (option, path), (source, source_path) in product(outputs, inputs):
        if path.exists() and source_path.exists() and path.samefile(source_path):
            raise UserError(f"{option} {path} is also {source}; an output never replaces an input")

    owners = {path.resolve(): option for option, path in outputs}
    for option, path in outputs:
        for folder in (path.resolve(), *path.resolve().parents):
            if owners.get(folder, option) != option:
                raise UserError(f"{option} {path} and {owners[folder]} are one place; give each its own")
        if path.is_file() and not replaceable(path):
            raise UserError(f"{option} {path} exists, and was not made by this program; choose another name")


def pairs(options: dict) -> list[tuple[str, Path]]:
    """(option, path) of each path."""
    return [(option, Path(path).expanduser()) for option, paths in options.items()
            for path in ([paths] if isinstance(paths, (str, Path)) else paths or ()) if path]


def replaceable(path: Path) -> bool:
    """Does an existing file carry our mark? It stands near the beginning, in an mp4 at the end."""
    with open(path, "rb") as file:
        start = file.read(4096)
        file.seek(max(0, path.stat().st_size - 4096))
        return MARK.encode() in start + file.read()
