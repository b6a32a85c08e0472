"""One way to write a file: under its name a file is whole, or it is the one that was there before."""
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; the block writes it, and then it becomes `path`.

    The temporary file is `.NAME.PROCESS.part`: a leftover of a killed process can be recognised by its ending
    (see `remove_leftovers`). The content reaches the disk before the name does, and the file's mode follows the umask.
    Raises ValueError, in one line with the path, where the system refuses to write.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~current_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def current_umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def remove_leftovers(folder: str | Path) -> None:
    """Deletes what `atomic` left in a folder when a process was killed while it wrote."""
    for leftover in Path(folder).glob(".*.part"):
        process = leftover.name.split(".")[-2]
        if process.isdigit() and not os.path.exists(f"/proc/{process}"):
            leftover.unlink(missing_ok=True)
