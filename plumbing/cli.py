"""One way to make a command line: a frozen dataclass whose fields are the options and whose comments are the help."""
import argparse
import dataclasses
import difflib
import inspect
import re
import sys
import typing


def field_help(cls) -> dict[str, str]:
    """The comment behind each field of a dataclass, base classes included: {field name: comment}."""
    comments = {}
    for base in reversed(cls.__mro__[:-1]):
        for name, text in re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(base), re.M):
            comments[name] = text
    return comments


def _boolean(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


class _Parser(argparse.ArgumentParser):
    """argparse that ends in one line, and knows what was meant."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser_for(cls, description: str = "", positional: str | None = None, prog: str | None = None) -> argparse.ArgumentParser:
    """An argparse parser with one `--option` per field: tuples become repeatable options, booleans take an optional value."""
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    comments, types = field_help(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = types[field.name]
        default = field.default
        shown = "" if default in (None, "", ()) or default is dataclasses.MISSING else f" [{default}]"
        text = (comments.get(field.name, "") + shown).replace("%", "%%")
        if field.name == positional:
            parser.add_argument(field.name, nargs="*" if typing.get_origin(kind) is tuple else "?", default=default, help=text)
            continue
        flag = "--" + field.name.replace("_", "-")
        inner = [a for a in typing.get_args(kind) if a is not type(None)]           # `int | None` → int, tuple[str, ...] → str
        if inner and typing.get_origin(inner[0]) is typing.Literal:                 # Literal[...] | None
            kind = inner[0]
        if typing.get_origin(kind) is tuple:
            parser.add_argument(flag, action="append", type=inner[0], default=None, help=text, metavar=inner[0].__name__.upper())
        elif kind is bool:
            parser.add_argument(flag, nargs="?", const=True, type=_boolean, default=default, help=text, metavar="BOOL")
        elif typing.get_origin(kind) is typing.Literal:
            parser.add_argument(flag, choices=typing.get_args(kind), default=default, help=text)
        else:
            kind = inner[0] if inner else kind
            parser.add_argument(flag, type=kind, default=default, help=text, metavar=kind.__name__.upper())
    return parser


def parse(cls, argv=None, description="", positional=None, defaults=None, prog=None):
    """Command line → instance of the dataclass. `defaults` (a preset) replaces field defaults; what is typed wins over both."""
    parser = parser_for(cls, description, positional, prog)
    defaults = defaults or {}
    parser.set_defaults(**{name: value for name, value in defaults.items() if not isinstance(value, tuple)})
    args, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if word.startswith("--"):
            near = difflib.get_close_matches(word.split("=")[0], [a for a in parser._option_string_actions], 1)
            parser.error(f"unknown option {word.split('=')[0]}" + (f", did you mean {near[0]}?" if near else ""))
    if unknown:
        parser.error(f"unexpected argument {unknown[0]!r}" + (" (quote the prompt)" if positional else ""))
    values = vars(args)
    for field in dataclasses.fields(cls):                                           # tuples: None means "not given"
        if isinstance(field.default, tuple):
            typed = values[field.name]
            values[field.name] = defaults.get(field.name, field.default) if typed is None else tuple(typed)
    return cls(**values)


def main(command):
    """Decorator for a program's `main`: a user's mistake ends in one clear line and exit status 2, Ctrl-C in 130."""
    def run(argv=None):
        program = sys.argv[0].rsplit("/", 1)[-1]
        try:
            return command(argv)
        except (ValueError, OSError) as error:
            print(f"{program}: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print(f"\n{program}: interrupted", file=sys.stderr)
            sys.exit(130)
    run.__doc__ = command.__doc__
    return run
