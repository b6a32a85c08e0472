"""Command lines: the fields that a frozen dataclass declares are the options, their comments the help."""
import argparse
import dataclasses
import difflib
import errno
import inspect
import io
import os
import re
import sys
import typing
from contextlib import suppress
from functools import partial, wraps

from plumbing.errors import UserError


class Within(typing.NamedTuple):
    """The range of a number, as a type annotation: `steps: Annotated[int, Within(1, 1000)]`."""
    low: float
    high: float = 1e9


Count = typing.Annotated[int, Within(1)]                    # 1, 2, 3, ...
Size = typing.Annotated[int, Within(0)]                     # 0, 1, 2, ...
Share = typing.Annotated[float, Within(0, 1)]
Seed = typing.Annotated[int, Within(0, 2 ** 31 - 1)]        # of 32 bits that torch reads; others follow it
File = typing.Annotated[str, "FILE"]                        # or a folder; ~ is the home folder
Folder = typing.Annotated[str, "FOLDER"]


def number(kind: type, within: Within, text: str) -> float:
    """Text -> a number within a range; nan and infinity are in none."""
    with suppress(ValueError):
        if within.low <= (value := kind(text)) <= within.high:
            return value
    bounds = f"{'whole ' * (kind is int)}number from {within.low:g} to {within.high:.15g}"
    raise argparse.ArgumentTypeError(f"{text!r:.60} is not a {bounds}")


def path(text: str) -> str:
    """A path with ~ expanded."""
    place = os.path.expanduser(text)
    if not text.strip() or place.startswith("~"):           # of nobody's home
        raise argparse.ArgumentTypeError(f"{text!r:.60} is neither a file's name nor a folder's")
    return place


# ---- fields as options -------------------------------------------------------------------------------------

class Once(argparse.Action):
    """Stores a value; an option that holds one is given once."""

    def __call__(self, parser, values, value, flag=None):
        if hasattr(values, self.dest):
            parser.error(f"{flag} is given twice, as {getattr(values, self.dest)} and as {value}")
        setattr(values, self.dest, value)


def settings_of(annotation) -> dict:
    """An annotation for argparse: bool, str, tuple[...], Literal, Annotated, unions with None."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        kind, note = arguments
        if kind is str:
            return dict(type=path, metavar=note)
        return dict(type=partial(number, kind, note), metavar="NUMBER")
    if origin is typing.Literal:
        return dict(type=type(arguments[0]), choices=arguments)
    if arguments:                                           # X | None, tuple[X, ...]
        return settings_of(arguments[0]) | (dict(action="append") if origin is tuple else {})
    return dict(action="store_true") if annotation is bool else dict(metavar="TEXT")


def flag_of(field: str) -> str:
    """The option of a field."""
    return "--" + field.replace("_", "-")


def parser_for(cls, description="", positional=None, prog=None, defaults=None) -> argparse.ArgumentParser:
    """A parser with an --option per field that cls itself declares with a comment, in groups titled
    `# ---- title`. Complaints are one line."""
    parser = argparse.ArgumentParser(prog, description=description, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; see {parser.prog} --help\n")
    annotations = typing.get_type_hints(cls, include_extras=True)
    in_force = {field.name: field.default for field in dataclasses.fields(cls)} | (defaults or {})
    group = parser
    for title, name, comment in re.findall(r"^    (?:# ---- (.+)|(\w+):[^#\n]*# *(.*))$",
                                           inspect.getsource(cls), re.M):
        if title:
            group = parser.add_argument_group(title)
            continue
        default = in_force[name]
        value = ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        text = comment + (f" [{value}]" if value not in ("None", "", "False") else "")
        settings = dict(action=Once, help=text.replace("%", "%%")) | settings_of(annotations[name])
        if name == positional:
            settings |= dict(metavar=None, nargs="?")
            settings |= dict(nargs="*", action="extend") if isinstance(default, tuple) else {}
        group.add_argument(name if name == positional else flag_of(name), **settings)
    return parser


def typed(cls, argv=None, helps=False, **options) -> dict:
    """{field: value} of what was typed, whatever the defaults. helps: --help is heeded, not passed over."""
    words, parser = sys.argv[1:] if argv is None else argv, parser_for(cls, **options)
    args, unknown = parser.parse_known_args([word for word in words if helps or word not in ("-h", "--help")])
    for word in unknown:
        flag = word.split("=")[0]
        near = difflib.get_close_matches(flag, list(parser._option_string_actions), 1)
        if flag.startswith("--"):
            parser.error(f"unknown option {flag}" + (f", did you mean {near[0]}?" if near else ""))
        parser.error(f"unexpected argument {word!r} (quote a prompt)")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(args).items()}


def parse(cls, argv=None, description="", positional=None, defaults=None, prog=None):
    """Command line -> instance of the dataclass. defaults: a preset's, also for inherited fields."""
    options = dict(description=description, positional=positional, prog=prog, defaults=defaults)
    return cls(**(defaults or {}) | typed(cls, argv, helps=True, **options))


def place() -> tuple[int, int, int]:
    """This process among those of torchrun: its rank, how many there are, its rank on this machine."""
    defaults = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in defaults)
    if not 0 <= rank < world_size:
        raise UserError(f"the environment says RANK={rank}, WORLD_SIZE={world_size}; unset both, or start "
                        "with torchrun, which sets them")
    return rank, world_size, local_rank


class Lenient(io.FileIO):
    """Standard error, or standard output whose reader is gone: a failure to write there stops no work."""

    def write(self, data) -> int:
        with suppress(OSError if self.fileno() == 2 else BrokenPipeError):
            return super().write(data)
        return len(data)


def keep_streams() -> None:
    """Standard streams that are closed, full, or lack letters stop no work."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:                                  # closed: its number must not become some file's
            setattr(sys, name, open(os.devnull, "w"))
        elif number > 0 and stream is getattr(sys, f"__{name}__"):
            file = io.BufferedWriter(Lenient(number, "w", closefd=False))
            text = io.TextIOWrapper(file, stream.encoding, "backslashreplace", line_buffering=True)
            setattr(sys, name, text)


def main(command):
    """Decorator for a program's `main`: a user's mistake ends in one line and status 2, Ctrl-C in 130."""
    @wraps(command)
    def run(argv=None):
        keep_streams()
        try:
            return command(argv)
        except UserError as error:
            status, message = 2, str(error)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG):
                raise
            status, message = 2, str(error)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)    # exit would write again to what is full
        except KeyboardInterrupt:
            status, message = 130, "interrupted"
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""   # a progress bar gives way to the message
        print(f"{clear}{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
        sys.exit(status)
    return run
