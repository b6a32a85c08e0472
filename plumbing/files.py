"""One way to write a file: under its name a file is whole, or it is the one that was there before."""
import errno
import itertools
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

COUNT = itertools.count()               # tells apart the files that one process writes at the same time
HOUR = 3600.0


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; the block writes that file, and then it becomes `path`.

    The temporary file is `.NAME.HOST.PROCESS.COUNT.part`, so that what a killed process leaves can be told
    (see `remove_leftovers`). Its content reaches the disk before the name does, and its mode follows the umask.
    Raises ValueError, in one line with the path and the reason, where the system refuses to write.
    """
    path = Path(path)
    start = path.name.encode()[:100].decode(errors="ignore")        # a name may have 255 bytes
    owner = f"{host()}.{os.getpid()}.{next(COUNT)}"
    temporary = path.with_name(f".{start}.{owner}.part")

    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777          # 0o666 without the bits of the umask

        yield temporary

        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)                                   # safetensors makes a file of its own, mode 600
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be written: {reason}") from error
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:                                             # the folder itself is not one, or not ours
            pass


def remove_leftovers(folder: str | Path) -> None:
    """Deletes what `atomic` left in a folder when a process was killed while it wrote.

    A leftover is a temporary file whose process, on this host, is dead; one of another host counts as a leftover
    when nothing was written to it for an hour."""
    for leftover in Path(folder).glob(".*.part"):
        parts = leftover.name.split(".")
        if len(parts) < 6 or not parts[-3].isdigit():               # not a name that `atomic` gave
            continue
        owner, process = parts[-4], int(parts[-3])
        try:
            idle = time.time() - leftover.stat().st_mtime > HOUR
            dead = owner == host() and not is_alive(process)
            if dead or idle:
                leftover.unlink(missing_ok=True)
        except OSError:                                             # gone meanwhile, or not ours to delete
            continue


def host() -> str:
    """This machine's name without dots, which separate the parts of a temporary name."""
    return socket.gethostname().replace(".", "-")[:60]


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)                                         # signal 0 tests, and changes nothing
    except ProcessLookupError:
        return False
    except PermissionError:                                         # it runs, for another user
        return True
    return True
