"""Wrong usage in one line: of which command, what is wrong, what is allowed, and the next step."""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from selab.cli.console import print_error

# typer may bring its own copy of click; these are the base classes of wrong usage in it, known by their names.
UsageError: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
STATUS = 2
"""What a program exits with after wrong usage."""

_EXTRA = re.compile(r"unexpected extra arguments?(?:\(s\))? \((.*)\)", re.DOTALL)
_NO_COMMAND = re.compile(r"No such command ['\"](.*?)['\"](?:\. Did you mean .*)?", re.DOTALL)
_NOT_ONE_OF = re.compile(r"'(.*)' is not one of (.*)", re.DOTALL)
# How similar a name must be to be suggested, and so much of a longer one is shown.
_CLOSE, _SHOWN = 0.6, 40


class Command(TyperCommand):
    """A command that refuses an empty text for a value, which no option and no argument means.

    A command without arguments that takes `--arch` takes a word without an option for its value.
    """

    def make_parser(self, ctx: Any) -> Any:
        """Return a parser as click does, which gives a word that belongs to no option to `--arch`."""
        parser: Any = super().make_parser(ctx)
        network = self._network()
        if network is not None:
            parse = parser.parse_args

            def with_network(args: list[str]) -> tuple[dict[str, Any], list[str], list[Any]]:
                given, words, order = parse(args=args)
                if words and network.multiple:
                    given[network.name] = [*given.get(network.name, ()), *words]
                    return given, [], [*order, network]
                if words and network.name not in given:
                    given[network.name] = words.pop(0)
                    order = [*order, network]
                return given, words, order

            parser.parse_args = with_network
        return parser

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what stands behind the command in its usage."""
        pieces: list[str] = super().collect_usage_pieces(ctx)
        network = self._network()
        return pieces if network is None else [*pieces, "[NAME]..." if network.multiple else "[NAME]"]

    def _network(self) -> Any:
        if any(one.param_type_name == "argument" for one in self.params):
            return None
        return next((one for one in self.params if "--arch" in one.opts), None)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words behind the command; as click does, but nothing empty."""
        try:
            if not ctx.resilient_parsing:
                self._refuse_empty(ctx, args)
            return super().parse_args(ctx, args)
        except UsageError as error:
            # The parser itself does not say of which command an option is.
            vars(error)["ctx"] = getattr(error, "ctx", None) or ctx
            raise

    def _refuse_empty(self, ctx: Any, args: list[str]) -> None:
        # A path converts what is empty to `.`, so the words are looked at before they are converted.
        given = self.make_parser(ctx).parse_args(args=list(args))[0]
        for each in self.params:
            parameter: Any = each
            value = given.get(parameter.name)
            # An argument may have an empty text for its default, which then is a value.
            allowed = parameter.param_type_name == "argument" and parameter.default == ""
            if not allowed and "" in (value if isinstance(value, list | tuple) else [value]):
                raise typer.BadParameter(f"is empty; {_allowed(parameter)}", ctx=ctx, param=parameter)


class Group(TyperGroup):
    """A group of commands; called without one, it says so in one line and shows its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words behind the group's name."""
        if not args and self.no_args_is_help and not ctx.resilient_parsing:
            names = ", ".join(self.commands)
            print_error(f"{' '.join(_path(ctx)[1:])}: command missing; give one of {names}")
        return super().parse_args(ctx, args)


def is_help(error: BaseException) -> bool:
    """Return whether an error is no mistake: a group of commands was called without one, and shows its help."""
    return type(error).__name__ == "NoArgsIsHelpError"


def line_of(error: Any) -> str:
    """Return one line for an error of typer's: the command, the option or argument, what is wrong, the next step."""
    context = getattr(error, "ctx", None)
    path = _path(context)
    place = f"{' '.join(path[1:])}: " if path[1:] else ""
    program = " ".join(path)
    text = _text(error, context)
    # What allows something or tells the next step has a semicolon.
    return f"{place}{text}" + ("" if ";" in text else f"; see `{program} --help`")


def _text(error: Any, context: Any) -> str:
    kind = type(error).__name__
    message = str(error.message).strip().removeprefix("Value error, ").rstrip(".")
    parameter = getattr(error, "param", None)
    if kind == "NoSuchOption":
        return _no_option(str(error.option_name), context)
    if kind == "BadOptionUsage":
        return _bad_option(str(error.option_name), message, context)
    if kind == "MissingParameter" and parameter is not None:
        return f"{_name(parameter)}: missing; {_allowed(parameter)}"
    if found := _NO_COMMAND.fullmatch(message):
        return _no_command(found[1], context)
    if found := _EXTRA.search(message):
        return _extra(found[1], context)
    where = getattr(error, "param_hint", None) or (None if parameter is None else _name(parameter))
    if found := _NOT_ONE_OF.fullmatch(message):
        names = re.findall(r"[\w-]+", found[2])
        close = get_close_matches(found[1].lower(), names, n=3, cutoff=_CLOSE)
        meant = f"; did you mean {', '.join(close)}?" if close else ""
        message = f"{_cut(found[1])!r} is not one of {', '.join(names)}{meant}"
        if parameter is not None and "--data" in parameter.opts and Path(found[1]).is_dir():
            message += f"; a folder is --data folder --data-dir {_cut(found[1])}, or without labels --images"
    return message if where is None else f"{where}: {message}"


def _no_option(name: str, context: Any) -> str:
    command = getattr(context, "command", None)
    known = [each for one in getattr(command, "params", ()) for each in (*one.opts, *one.secondary_opts)]
    argument = next((one for one in getattr(command, "params", ()) if one.param_type_name == "argument"), None)
    if name == "--arch" and argument is not None:
        return f"--arch: no such option; write the name alone: `{' '.join(_path(context))} {_name(argument)}`"
    own = {each.lstrip("-"): each for each in (*known, "--help", "--debug") if each.startswith("--")}
    close = [own[each] for each in get_close_matches(name.lstrip("-").lower(), sorted(own), n=3, cutoff=_CLOSE)]
    if not close and any(name in each.opts for one in _commands(command).values() for each in one.params):
        return f"{name}: stands before the command; write it behind, as in `selab count {name} …`"
    return f"{_cut(name)}: no such option{_suggested(close, context)}"


def _bad_option(name: str, message: str, context: Any) -> str:
    parameters = [one for one in getattr(getattr(context, "command", None), "params", ()) if name in one.opts]
    if "does not take" in message or not parameters:
        return f"{name}: takes no value; write {name} alone" if "does not take" in message else f"{name}: {message}"
    return f"{name}: needs a value; {_allowed(parameters[0])}"


def _no_command(name: str, context: Any) -> str:
    words = {path: path.split()[-1] for path in _commands(getattr(context, "command", None))}
    last = list(words.values())
    near = [name] if name in last else get_close_matches(name.lower(), last, n=3, cutoff=_CLOSE)
    close = [path for each in dict.fromkeys(near) for path, own in words.items() if own == each]
    return f"{_cut(name)!r}: no such command{_suggested(close, context)}"


def _extra(words: str, context: Any) -> str:
    parameters = getattr(getattr(context, "command", None), "params", ())
    own = [_name(one) for one in parameters if one.param_type_name == "argument"]
    arch = any("--arch" in one.opts for one in parameters)
    word = _cut(words.split()[0] if words.split() else words)
    if own:
        return f"{word!r}: one argument too many; allowed: {' '.join(own)}"
    if arch:
        return f"{word!r}: one network too many; this command takes one, as --arch NAME or NAME alone"
    return f"{word!r}: this command takes options only; see `{' '.join(_path(context))} --help`"


def _commands(command: Any, before: str = "") -> dict[str, Any]:
    """Return every command below a group by its words, `new family`."""
    found: dict[str, Any] = {}
    for name, one in getattr(command, "commands", {}).items():
        found |= {f"{before}{name}": one} | _commands(one, f"{before}{name} ")
    return found


def _allowed(parameter: Any) -> str:
    """Return what an option or argument takes: `give --json FILE: write JSON to FILE, …`."""
    metavar = parameter.metavar or ("" if parameter.param_type_name == "argument" else "VALUE")
    name = " ".join(filter(None, (_name(parameter), metavar if parameter.param_type_name == "option" else "")))
    text = (parameter.help or "").strip().rstrip(".")
    text = text[:1].lower() + text[1:] if text[1:2].islower() or text[1:2] == " " else text
    return f"give {name}" + (f": {text}" if text else "")


def _name(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name).upper()
    return str(max(parameter.opts, key=len))


def _suggested(close: list[str], context: Any) -> str:
    program = " ".join(_path(context))
    return (
        f"; did you mean {', '.join(close)}? (`{program} --help` lists all)" if close else f"; see `{program} --help`"
    )


def _path(context: Any) -> list[str]:
    """Return the words of a command, `["selab", "new", "family"]`."""
    words: list[str] = []
    while context is not None and context.parent is not None:
        words.insert(0, str(context.info_name))
        context = context.parent
    return ["selab", *words]


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
