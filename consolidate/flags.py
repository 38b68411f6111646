"""Options as click knows them, in the groups of --help: made from the records of `options.py`."""

import tomllib
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import click
import cloup
from click.shell_completion import BashComplete, CompletionItem, add_completion_class

from consolidate.fields import (
    OTHER,
    REQUIRED,
    Flat,
    at_home,
    fits,
    flat_options,
    gather,
    grouped,
    help_text,
    kinds_of,
    words_of,
)
from consolidate.options import COMMANDS, TYPED
from formats.benchmark import data_name
from formats.wording import suggestion

R = TypeVar("R")
Command = Callable[..., Any]


def flags_of(record: type, *others: type) -> Callable[[Command], Command]:
    """Give the arguments and options of a command, made from its record and from others.

    They are grouped as --help lists them: options of the same heading together.
    """
    arguments = [flat for flat in flat_options(record) if flat.option.argument]
    groups = grouped_with(record, *others)

    def apply(command: Command) -> Command:
        made = [_argument(flat) for flat in arguments]
        # Without a heading, so that they come last; and first here, as --config is read first.
        made += [_flag(flat, None) for flat in groups.get(OTHER, ())]
        for title, flats in groups.items():
            if title != OTHER:
                group = cloup.OptionGroup(title)
                made += [_flag(flat, group) for flat in flats]
        for decorator in reversed(made):
            command = decorator(command)
        return command

    return apply


def grouped_with(record: type, *others: type) -> dict[str, list[Flat]]:
    """Give the flags of several records by their headings, those of the others last."""
    groups = grouped(record)
    for other in others:
        for title, flats in grouped(other).items():
            groups[title] = [*groups.pop(title, []), *flats]
    return groups


class _Option(cloup.Option):
    """An option whose help text is complete, with its range and default."""

    def get_help_extra(self, ctx: click.Context) -> Any:
        return {}


def _argument(flat: Flat) -> Callable[[Any], Any]:
    several = -1 if get_origin(flat.kinds[0]) is tuple else 1
    return click.argument(
        flat.name,
        nargs=several,
        required=True,
        metavar=flat.option.metavar,
        shell_complete=_complete_files if _names_file(flat) else None,
    )


def _flag(flat: Flat, group: cloup.OptionGroup | None) -> Callable[[Any], Any]:
    option, default = flat.option, flat.default
    settings: dict[str, Any] = {"help": help_text(flat), "metavar": option.metavar}
    settings |= {"cls": _Option, "group": group} | SPECIAL.get(flat.name, {})
    if default is REQUIRED:
        settings["required"] = True
    if _names_file(flat):
        named = any(get_origin(kind) is dict for kind in flat.kinds)
        settings["shell_complete"] = _complete_named_files if named else _complete_files
    if bool in flat.kinds:
        name = f"--{flat.flag}/--no-{flat.flag}" if default is True else f"--{flat.flag}"
        return cloup.option(name, is_flag=True, default=default, **settings)
    if flat.repeatable:
        return cloup.option(f"--{flat.flag}", multiple=True, **settings)
    if default is not REQUIRED and default is not None:
        settings["default"] = default
    if option.typed is not None:
        settings["callback"] = _reading(option.typed)
        if not isinstance(default, str | None):
            settings["default"] = f"{default:g}"
    elif option.choices:
        settings["type"] = click.Choice(option.choices)
    else:  # the record checks the range
        for kind, metavar in ((int, "N"), (float, "X")):
            if kind in flat.kinds:
                settings |= {"type": kind, "metavar": option.metavar or metavar}
    return cloup.option(f"--{flat.flag}", **settings)


def _names_file(flat: Flat) -> bool:
    """Tell whether a value, or an entry of it, may be a path."""
    inner = [
        get_args(kind) if get_origin(kind) in (tuple, dict) else (kind,) for kind in flat.kinds
    ]
    return any(Path in kinds_of(one) for ones in inner for one in ones)


def _complete_files(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Let the shell complete the name of a file or folder."""
    return [CompletionItem(incomplete, type="file")]


def _complete_named_files(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """List the files that may stand after the `=` of NAME=DATA."""
    name, equals, start = incomplete.partition("=")
    folder, _, begun = start.rpartition("/")
    if not equals:
        return []
    place = Path(f"{folder}/" if "/" in start else ".").expanduser()
    entries = sorted(place.iterdir()) if place.is_dir() else []
    before = start.removesuffix(begun) if begun else start
    return [
        CompletionItem(f"{name}={before}{entry.name}{'/' if entry.is_dir() else ''}", after=equals)
        for entry in entries
        if entry.name.startswith(begun) and (begun or not entry.name.startswith("."))
    ]


class _Bash(BashComplete):
    """Bash, for which `NAME=DATA` is three words, and which completes files itself."""

    def get_completion_args(self) -> tuple[list[str], str]:
        args, incomplete = super().get_completion_args()
        words = [*args, incomplete]
        while "=" in words[1:]:
            at = words.index("=", 1)
            words[at - 1 : at + 2] = ["".join(words[at - 1 : at + 2])]
        return words[:-1], words[-1]

    def format_completion(self, item: CompletionItem) -> str:
        return "file," if item.after else super().format_completion(item)


add_completion_class(_Bash)


def _reading(typed: Callable[[str], Any]) -> Callable[..., Any]:
    def read(context: click.Context, option: click.Parameter, value: str | None) -> Any:
        try:
            return None if value is None else typed(value)
        except ValueError as error:
            raise click.BadParameter(f"{value!r}: {error}") from None

    return read


def record_of(record: type[R], typed: dict[str, Any]) -> R:
    """Make a command's record from what click has read of its options."""
    for flat in flat_options(record):
        if flat.names_data:
            named = named_data(typed[flat.name], f"--{flat.flag}")
            typed[flat.name] = named or None
    return gather(record, typed)


def named_data(values: Sequence[str], option: str) -> dict[str, str]:
    """Read NAME=DATA, or DATA alone, which is named after its file."""
    named: dict[str, str] = {}
    for value in values:
        name, found, data = value.partition("=")
        if not found or Path(value).exists():
            name, data = data_name(value), value
        if not name or not data:
            raise click.UsageError(f"{option} {value}: expected NAME=DATA")
        if name in named:
            raise click.UsageError(f"{option}: two datasets are named {name!r}: write NAME=DATA")
        named[name] = data
    return named


def _read_config(context: click.Context, option: click.Parameter, path: Path | None) -> None:
    """Take defaults of the command's options from a TOML file; flags and variables come first."""
    if path is None:
        return
    try:
        values = tomllib.loads(path.read_text("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path} is not TOML: {error}") from None
    command = str(context.command.name)
    names = {str(p.name): p for p in context.command.params if isinstance(p, click.Option)}
    records = (COMMANDS[command], *TYPED[command])
    flats = {flat.name: flat for record in records for flat in flat_options(record)}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in names or name == "config":
            near = [other.replace("_", "-") for other in get_close_matches(name, names, 3)]
            raise click.BadParameter(f"{path}: {command} has no option {key!r}{suggestion(near)}")
        if name in defaults:
            raise click.BadParameter(f"{path}: {key} is given twice, with - and with _")
        defaults[name] = _as_typed(path, key, value, names[name], flats[name])
    context.default_map = {**(context.default_map or {}), **defaults}


def _as_typed(path: Path, key: str, value: Any, option: click.Option, flat: Flat) -> Any:
    """Give a value of a TOML file as click takes it, or refuse one of another type."""
    if flat.names_data and isinstance(value, dict):
        value = [f"{name}={data}" for name, data in value.items()]
    if option.multiple:
        expected = "a list of strings"
        value = [value] if isinstance(value, str) else value
        right = isinstance(value, list) and all(isinstance(one, str) for one in value)
    else:
        expected = words_of(flat)
        text = flat.option.typed is not None and isinstance(value, str)
        right = text or fits(flat.kinds, value)
    if not right:
        raise click.BadParameter(f"{path}: {key}: expected {expected}, found {value!r}")
    return value


def _remember(context: click.Context, option: click.Parameter, value: bool) -> bool:
    """Record for `main` how to report a failure."""
    context.ensure_object(dict)[option.name] = value
    return value


def _place_of_metrics(
    context: click.Context, option: click.Parameter, value: str | None
) -> Path | None:
    if value is None or context.resilient_parsing:  # as when the shell completes a word
        return None
    from consolidate.views.metrics import is_metrics
    from formats.atomic import check_own_file

    place = Path(at_home(value, "--metrics"))
    check_own_file(place, "a file of metrics", is_metrics)  # before the work
    return place


SPECIAL: dict[str, dict[str, Any]] = {
    "config": {
        "type": click.Path(exists=True, dir_okay=False, path_type=Path),
        "is_eager": True,
        "expose_value": False,
        "callback": _read_config,
    },
    # known before anything else is found wrong
    "json": {"is_eager": True, "callback": _remember},
    "debug": {"is_eager": True, "expose_value": False, "callback": _remember},
    "metrics": {"callback": _place_of_metrics},
}
"""Settings of options that the command line itself follows."""
