"""The two kinds of errors: a user's mistake, said in a line, and the rest, which keeps its traceback."""
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A user's mistake: one line with the option or file, its value and the remedy. `cli.main` prints it."""


@contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """Parses somebody else's file within the block: `with reading(path, "a VBench result"):`.

    Whatever parsing raises, and libraries raise errors of many kinds, becomes a UserError that names the file
    and keeps the cause."""
    try:
        if (place := Path(f"{path}")).exists() and not (place.is_file() or place.is_dir()):
            raise UserError(f"{path} is a pipe or a device, not {what}")
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        reason = " ".join(f"{error}".split())[:200]
        raise UserError(f"{path} is not {what}, or is damaged ({type(error).__name__}: {reason})") from error
