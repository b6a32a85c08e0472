"""Command lines: a frozen dataclass whose fields are the options, and whose comments are the help."""
import argparse
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
import typing
from dataclasses import dataclass

from plumbing.errors import UserError

@dataclass(frozen=True)
class Within:
    """The range of a number, as a type annotation: `steps: Annotated[int, Within(1)] = 4`.

    Every number of a command line must be finite; `above` excludes the lower bound itself.
    """
    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def error(self, value: float) -> str | None:
        """What is wrong with a number, in words that follow it, or None."""
        if isinstance(value, float) and not math.isfinite(value):
            return "is not a finite number"
        if value < self.low or (self.above and value == self.low):
            return f"must be {'above' if self.above else 'at least'} {self.low:.15g}"
        if value > self.high:
            return f"must be at most {self.high:.15g}"
        return None


Count = typing.Annotated[int, Within(1)]                    # 1, 2, 3, ...
Size = typing.Annotated[int, Within(0)]                     # 0, 1, 2, ...
Positive = typing.Annotated[float, Within(0, above=True)]
NotNegative = typing.Annotated[float, Within(0)]
Share = typing.Annotated[float, Within(0, 1)]
Seed = typing.Annotated[int, Within(0, 2 ** 32 - 1)]        # torch reads 32 bits of a CPU generator's seed


def field_help(cls) -> dict[str, str]:
    """The comment behind each field of a dataclass, base classes included: {field name: comment}."""
    comments = {}
    for base in reversed(cls.__mro__[:-1]):
        for name, text in re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(base), re.M):
            comments[name] = text
    return comments


def boolean(text: str) -> bool:
    """The value of a switch that was typed with one."""
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def number(kind: type, within: Within):
    """A converter for argparse: text to a finite int or float within a range."""
    def convert(text: str):
        try:
            value = kind(text)
        except ValueError as error:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from error
        wrong = within.error(value)
        if wrong:
            raise argparse.ArgumentTypeError(f"{text} {wrong}")
        return value
    convert.__name__ = kind.__name__
    return convert


@dataclass(frozen=True)
class Option:
    """What a field's annotation says about its option."""
    kind: type                          # str, int, float or bool
    repeatable: bool = False            # tuple[...]
    choices: tuple | None = None        # Literal[...]
    within: Within = Within()

    @classmethod
    def of(cls, annotation) -> "Option":
        """Reads int, bool, float, str, tuple[str, ...], Literal, Annotated, and unions with None."""
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is typing.Annotated:
            return dataclasses.replace(cls.of(arguments[0]), within=arguments[1])
        if origin is typing.Literal:
            return cls(type(arguments[0]), choices=arguments)
        if origin is tuple:
            return dataclasses.replace(cls.of(arguments[0]), repeatable=True)
        if type(None) in arguments:
            return cls.of(next(a for a in arguments if a is not type(None)))
        return cls(annotation)

    @property
    def convert(self):
        """Text to value."""
        return number(self.kind, self.within) if self.kind in (int, float) else self.kind


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def flag_of(field: str) -> str:
    """The option of a field."""
    return "--" + field.replace("_", "-")


def parser_for(cls, description: str = "", positional: str | None = None, prog: str | None = None) -> Parser:
    """A parser with one --option per field: tuples can be repeated, booleans take an optional value."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    comments, annotations = field_help(cls), typing.get_type_hints(cls, include_extras=True)

    for field in dataclasses.fields(cls):
        option, default = Option.of(annotations[field.name]), field.default
        shown = "" if default in (None, "", ()) or default is dataclasses.MISSING else f" [{default}]"
        text = (comments.get(field.name, "") + shown).replace("%", "%%")
        flag, metavar = flag_of(field.name), option.kind.__name__.upper()

        if field.name == positional:
            nargs = "*" if option.repeatable else "?"
            parser.add_argument(field.name, nargs=nargs, default=default, help=text)
        elif option.repeatable:
            parser.add_argument(flag, action="append", type=option.convert, default=None, help=text,
                                metavar=metavar)
        elif option.kind is bool:
            parser.add_argument(flag, nargs="?", const=True, type=boolean, default=default, help=text,
                                metavar="BOOL")
        elif option.choices:
            parser.add_argument(flag, type=option.convert, choices=option.choices, default=default, help=text)
        else:
            parser.add_argument(flag, type=option.convert, default=default, help=text, metavar=metavar)
    return parser


def parse(cls, argv=None, description="", positional=None, defaults=None, prog=None):
    """Command line -> instance of the dataclass.

    defaults: a preset, which replaces the fields' own; what is typed wins over both.
    """
    parser = parser_for(cls, description, positional, prog)
    defaults = defaults or {}
    parser.set_defaults(**{name: value for name, value in defaults.items() if not isinstance(value, tuple)})
    args, unknown = parser.parse_known_args(argv)

    for word in unknown:
        if word.startswith("--"):
            near = difflib.get_close_matches(word.split("=")[0], list(parser._option_string_actions), 1)
            hint = f", did you mean {near[0]}?" if near else ""
            parser.error(f"unknown option {word.split('=')[0]}{hint}")
    if unknown:
        parser.error(f"unexpected argument {unknown[0]!r}" + (" (quote the prompt)" if positional else ""))

    values = vars(args)
    for field in dataclasses.fields(cls):                   # of a repeatable option, None means "not given"
        if isinstance(field.default, tuple):
            typed = values[field.name]
            values[field.name] = defaults.get(field.name, field.default) if typed is None else tuple(typed)
    return cls(**values)


def given(cls, argv=None, positional=None) -> set[str]:
    """The names of the fields that were typed on the command line, whatever their values."""
    parser = parser_for(cls, positional=positional)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_known_args(argv)[0]))


def place() -> tuple[int, int, int]:
    """This process among those of torchrun: its rank, how many there are, its rank on this machine.

    Without torchrun 0, 1, 0. Raises ValueError for numbers that cannot be."""
    numbers = []
    for name, usual in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, usual)
        if not re.fullmatch("[0-9]{1,9}", text):
            raise ValueError(f"the environment variable {name} is {text!r}, not a number; unset it, "
                             "or start with torchrun, which sets it")
        numbers.append(int(text))
    rank, world, local_rank = numbers
    if rank >= world:
        raise ValueError(f"the environment says RANK={rank} and WORLD_SIZE={world}, but ranks end at "
                         "WORLD_SIZE - 1; unset both, or start with torchrun, which sets them")
    return rank, world, local_rank


def main(command):
    """Decorator for a program's `main`: a user's mistake ends in one line and status 2, Ctrl-C in 130.

    Where nobody reads on (`| head`), it ends without a word, in 141, as programs that SIGPIPE ends."""
    def run(argv=None):
        program = sys.argv[0].rsplit("/", 1)[-1]
        try:
            try:
                return command(argv)
            finally:
                if sys.stdout:                              # None where it was closed from the start
                    sys.stdout.flush()
        except BrokenPipeError:
            discard_output()
            sys.exit(141)
        except UserError as error:
            close_bars()
            print(f"{program}: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            close_bars()
            print(f"{program}: interrupted", file=sys.stderr)
            sys.exit(130)
    run.__doc__ = command.__doc__
    return run


def discard_output() -> None:
    """What Python still writes at its exit goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def close_bars() -> None:
    """Ends the lines of progress bars, so that a message begins on a line of its own."""
    tqdm = sys.modules.get("tqdm")
    for bar in list(getattr(tqdm and tqdm.tqdm, "_instances", [])):
        bar.leave = True
        bar.close()
