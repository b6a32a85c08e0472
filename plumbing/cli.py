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
from functools import partial

from plumbing.errors import UserError


@dataclasses.dataclass(frozen=True)
class Within:
    """The range of a number, as a type annotation: `steps: Annotated[int, Within(1, 1000)]`."""
    low: float = -1e9
    high: float = 1e9
    above: bool = False                                     # the lower bound itself is excluded


Count = typing.Annotated[int, Within(1)]                    # 1, 2, 3, ...
Size = typing.Annotated[int, Within(0)]                     # 0, 1, 2, ...
Positive = typing.Annotated[float, Within(0, above=True)]
NotNegative = typing.Annotated[float, Within(0)]
Share = typing.Annotated[float, Within(0, 1)]
Seed = typing.Annotated[int, Within(0, 2 ** 32 - 1)]        # torch reads 32 bits of a CPU generator's seed
File = typing.Annotated[str, "FILE"]                        # or a folder; ~ is the home folder
Folder = typing.Annotated[str, "FOLDER"]

# ---- values ------------------------------------------------------------------------------------------------


def number(kind: type, within: Within, text: str) -> float:
    """Text -> a number within a range; nan and infinity are in none."""
    try:
        value = kind(text)
        if within.low <= value <= within.high and not (within.above and value == within.low):
            return value
    except ValueError:
        pass
    noun, start = "a whole number" if kind is int else "a number", "above" if within.above else "from"
    bounds = f"{start} {within.low:.15g} to {within.high:.15g}"
    raise argparse.ArgumentTypeError(f"{text!r:.60} is not {noun} {bounds}")


def switch(text: str) -> bool:
    """The value of a switch that was typed with one."""
    if text.lower() not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is neither true nor false")
    return text.lower() in ("1", "true", "yes", "on")


def path(text: str) -> str:
    """A path with ~ expanded; no pipe and no device, which can be read only once."""
    place = os.path.expanduser(text)
    if not text.strip() or os.path.exists(place) and not (os.path.isfile(place) or os.path.isdir(place)):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is neither a file's name nor a folder's")
    return place


class Once(argparse.Action):
    """Keeps the value of an option; a second one is refused."""

    def __call__(self, parser, namespace, value, flag=None):
        if hasattr(namespace, self.dest):
            parser.error(f"{flag} is given twice, as {getattr(namespace, self.dest)} and as {value}")
        setattr(namespace, self.dest, value)


class Collected(argparse.Action):
    """Keeps all values of a repeatable option."""

    def __call__(self, parser, namespace, value, flag=None):
        values = value if isinstance(value, list) else [value]
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), *values))


# ---- fields as options -------------------------------------------------------------------------------------


def settings_of(annotation) -> dict:
    """An annotation for argparse: bool, int, float, str, tuple[...], Literal, Annotated, unions with None."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        kind, note = arguments
        special = dict(type=partial(number, kind, note)) if kind is not str else dict(type=path, metavar=note)
        return settings_of(kind) | special
    if origin is typing.Literal:
        return dict(action=Once, type=type(arguments[0]), choices=arguments)
    if arguments:                                           # X | None, tuple[X, ...]
        return settings_of(arguments[0]) | (dict(action=Collected) if origin is tuple else {})
    if annotation is bool:
        return dict(action=Once, type=switch, nargs="?", const=True, metavar="BOOL")
    if annotation is str:
        return dict(action=Once, metavar="TEXT")
    return dict(action=Once, type=partial(number, annotation, Within()), metavar="NUMBER")


def field_help(cls) -> dict[str, str]:
    """{field: the comment behind it}, base classes included."""
    source = "\n".join(inspect.getsource(base) for base in reversed(cls.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", source, re.M))


def flag_of(field: str) -> str:
    """The option of a field."""
    return "--" + field.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser_for(cls, description="", positional=None, prog=None, defaults=None) -> Parser:
    """A parser with an --option per field that cls itself declares, in groups titled `# ---- title`."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    comments, annotations = field_help(cls), typing.get_type_hints(cls, include_extras=True)
    in_force = {field.name: field.default for field in dataclasses.fields(cls)} | (defaults or {})
    group = parser
    for title, name in re.findall(r"^    (?:# ---- ([^-\n]+)|(\w+):)", inspect.getsource(cls), re.M):
        if title:
            group = parser.add_argument_group(title.strip())
        if name not in comments:
            continue
        value = ", ".join(map(str, in_force[name])) if isinstance(in_force[name], tuple) else in_force[name]
        text = comments[name] + (f" [{value}]" if value not in (None, "", False, dataclasses.MISSING) else "")
        settings = settings_of(annotations[name]) | dict(help=text.replace("%", "%%"))
        if name == positional:
            settings |= dict(nargs="*" if settings["action"] is Collected else "?", metavar=None)
        group.add_argument(name if name == positional else flag_of(name), **settings)
    return parser


def parse(cls, argv=None, description="", positional=None, defaults=None, prog=None):
    """Command line -> instance of the dataclass. defaults: a preset's, also for inherited fields."""
    parser = parser_for(cls, description, positional, prog, defaults)
    args, unknown = parser.parse_known_args(argv)
    for word in unknown:
        flag = word.split("=")[0]
        near = difflib.get_close_matches(flag, list(parser._option_string_actions), 1)
        if flag.startswith("--"):
            parser.error(f"unknown option {flag}" + (f", did you mean {near[0]}?" if near else ""))
        parser.error(f"unexpected argument {word!r}" + (" (quote the prompt)" if positional else ""))
    return cls(**(defaults or {}) | vars(args))


def typed(cls, argv=None, positional=None) -> dict:
    """{field: value} of what was typed, whatever the defaults; --help is passed over."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ("-h", "--help")]
    return vars(parser_for(cls, positional=positional).parse_known_args(words)[0])


def given(cls, argv=None, positional=None) -> set[str]:
    """The names of the fields that were typed."""
    return set(typed(cls, argv, positional))


# ---- programs ----------------------------------------------------------------------------------------------


def place() -> tuple[int, int, int]:
    """This process among those of torchrun: its rank, how many there are, its rank on this machine."""
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    texts = [os.environ.get(name, default) for name, default in defaults.items()]
    if not all(re.fullmatch("[0-9]{1,9}", text) for text in texts) or int(texts[0]) >= int(texts[1]):
        said = ", ".join(f"{name}={text}" for name, text in zip(defaults, texts))
        raise UserError(f"the environment says {said}: that is no place among processes; unset them, "
                        "or start with torchrun, which sets them")
    return tuple(map(int, texts))


class Stream(io.FileIO):
    """A standard stream that stops no work: what a full disk does not take, or nobody reads, is dropped."""
    lost = ""                                               # why the last write failed, for standard output

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self.fileno() == 1 and error.errno != errno.EPIPE:           # `| head` has read enough
                Stream.lost = f"standard output cannot be written: {error.strerror}"
            return len(data)


def keep_streams() -> None:
    """Output that is closed or full, or whose letters a terminal lacks, stops no work."""
    for number, name in enumerate(("stdout", "stderr"), 1):
        stream = getattr(sys, name)
        if stream is None:                                  # closed: its number must not become some file's
            setattr(sys, name, open(os.devnull, "w"))
        elif stream is getattr(sys, f"__{name}__") and not stream.isatty():
            buffer = io.BufferedWriter(Stream(number, "w", closefd=False))
            text = io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=True)
            setattr(sys, name, text)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def main(command):
    """Decorator for a program's `main`: a user's mistake ends in one line and status 2, Ctrl-C in 130."""
    def run(argv=None):
        keep_streams()
        status, message = 2, ""
        try:
            result = command(argv)
            sys.stdout.flush()
            if not Stream.lost:
                return result
            message = Stream.lost
        except UserError as error:
            message = str(error)
        except KeyboardInterrupt:
            status, message = 130, "interrupted"
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""   # a progress bar gives way to the message
        print(f"{clear}{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
        sys.exit(status)
    run.__doc__ = command.__doc__
    return run
