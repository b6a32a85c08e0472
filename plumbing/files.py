"""One way to write a file: under its name a file is whole, or it is the one that was there before."""
import errno
import itertools
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

COUNT = itertools.count()               # tells apart the files that one process writes at the same time
HOUR = 3600.0


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a name of the same suffix; the block writes that file, and then it becomes `path`.

    It lies beside `path` in a hidden folder `.NAME.HOST.PROCESS.COUNT.part`, which also takes what a library
    writes on the way (safetensors has a temporary file of its own) and tells what a killed process left (see
    `remove_leftovers`). The content reaches the disk before the name does, and the file's mode follows the
    umask. Raises ValueError, in one line with the path and the reason, where the system refuses to write. """
    path = Path(path)
    start = path.name.encode()[:100].decode(errors="ignore")          # a name may have 255 bytes
    folder = path.with_name(f".{start}.{host()}.{os.getpid()}.{next(COUNT)}.part")
    temporary = folder / f"file{path.suffix}"

    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        folder.mkdir(parents=True)
        mode = folder.stat().st_mode & 0o666                          # what the umask leaves of it

        yield temporary

        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)                                     # safetensors makes files of mode 600
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be written: {reason}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: str | Path) -> None:
    """Deletes what `atomic` left in a folder when a process was killed while it wrote.

    A leftover is a temporary folder whose process, on this host, is dead; one of another host counts as a
    leftover when nothing was written to it for an hour."""
    for leftover in Path(folder).glob(".*.part"):
        parts = leftover.name.split(".")
        if len(parts) < 6 or not parts[-3].isdigit() or not leftover.is_dir():      # not of `atomic`
            continue
        owner, process = parts[-4], int(parts[-3])
        dead = owner == host() and not is_alive(process)
        if dead or time.time() - last_write(leftover) > HOUR:
            shutil.rmtree(leftover, ignore_errors=True)


def host() -> str:
    """This machine's name without dots, which separate the parts of a temporary name."""
    return socket.gethostname().replace(".", "-")[:60]


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)                                           # signal 0 tests, and changes nothing
    except ProcessLookupError:
        return False
    except PermissionError:                                           # it runs, for another user
        return True
    return True


def last_write(folder: Path) -> float:
    """When something in a folder was written last, in seconds since 1970; now, if it is gone meanwhile."""
    try:
        return max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
    except OSError:
        return time.time()


def check_writable(folder: str | Path) -> None:
    """Makes a folder, if it is not there, and raises ValueError where no file can be made in it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder}: nothing can be written there: {error.strerror}") from error


def read_header(path: str | Path) -> dict:
    """The JSON header of a .safetensors file of ours; {} where someone else wrote the file. Needs no torch.

    Raises ValueError for other files.
    """
    try:
        with safe_open(path, "np") as file:
            header = json.loads((file.metadata() or {}).get("config", "{}"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a weight file, or a truncated one ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its header is not a JSON object; the file is damaged")
    return header
