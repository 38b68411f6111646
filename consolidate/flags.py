"""Options as click knows them: made from the records of `options.py`, and those of all commands."""

import tomllib
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_origin

import click

from consolidate.fields import REQUIRED, Flat, fits, flat_options, gather, words_of
from consolidate.options import COMMANDS

R = TypeVar("R")
NEGATED = {"data_digest": "--data-digest/--no-data-digest"}


def options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Make one decorator of several options; `--help` lists them in this order."""

    def apply(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def flags_of(record: type) -> Callable[[Any], Any]:
    """Give the arguments and options of a command, made from its record."""
    flats = [flat for flat in flat_options(record) if not flat.option.python_only]
    return options(*(_argument(flat) if flat.option.argument else _flag(flat) for flat in flats))


def _argument(flat: Flat) -> Callable[[Any], Any]:
    several = -1 if get_origin(flat.kinds[0]) is tuple else 1
    metavar = flat.option.metavar
    return click.argument(flat.name, nargs=several, required=True, metavar=metavar)


def _flag(flat: Flat) -> Callable[[Any], Any]:
    option, default = flat.option, flat.default
    settings: dict[str, Any] = {"help": option.help, "metavar": option.metavar}
    if default is REQUIRED:
        settings["required"] = True
    if bool in flat.kinds:
        return click.option(
            NEGATED.get(flat.name, f"--{flat.flag}"), is_flag=True, default=default, **settings
        )
    if isinstance(default, tuple) or flat.names_data:
        return click.option(f"--{flat.flag}", multiple=True, **settings)
    if default is not REQUIRED and default is not None:
        settings |= {"default": default, "show_default": True}
    if option.typed is not None:
        settings |= {"callback": _reading(option.typed)}
        if not isinstance(default, str | None):
            settings |= {"default": f"{default:g}"}
    elif option.choices:
        settings["type"] = click.Choice(option.choices)
    elif int in flat.kinds:
        least, below = option.least, option.below
        most = None if below is None else int(below) - 1
        settings["type"] = click.IntRange(None if least is None else int(least), most)
    elif float in flat.kinds:
        settings["type"] = click.FloatRange(
            option.least if option.above is None else option.above,
            option.most if option.below is None else option.below,
            min_open=option.above is not None,
            max_open=option.below is not None,
        )
    return click.option(f"--{flat.flag}", **settings)


def _reading(typed: Callable[[str], Any]) -> Callable[..., Any]:
    def read(context: click.Context, option: click.Parameter, value: str | None) -> Any:
        try:
            return None if value is None else typed(value)
        except ValueError as error:
            raise click.BadParameter(f"{value!r}: {error}") from None

    return read


def record_of(record: type[R], typed: dict[str, Any]) -> R:
    """Make a command's record of what click has read of its options."""
    for flat in flat_options(record):
        if flat.names_data:
            named = named_data(typed[flat.name], f"--{flat.flag}")
            typed[flat.name] = named or None
    return gather(record, typed)


def named_data(values: Sequence[str], option: str) -> dict[str, str]:
    """Read NAME=DATA, or DATA alone, which is named like its file."""
    named: dict[str, str] = {}
    for value in values:
        name, found, data = value.partition("=")
        if not found or Path(value).exists():
            name, data = Path(value).stem, value
        if not name or not data:
            raise click.UsageError(f"{option} {value}: expected NAME=DATA")
        if name in named:
            raise click.UsageError(f"{option}: two data sets are named {name!r}; write NAME=DATA")
        named[name] = data
    return named


def _read_config(context: click.Context, option: click.Parameter, path: Path | None) -> None:
    """Take defaults for the command's options from a TOML file; flags and variables win over it."""
    if path is None:
        return
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path} is not TOML: {error}") from None
    command = str(context.command.name)
    names = {str(p.name): p for p in context.command.params if isinstance(p, click.Option)}
    flats = {flat.name: flat for flat in flat_options(COMMANDS[command])} if names else {}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in names or name == "config":
            near = [other.replace("_", "-") for other in get_close_matches(name, names, 3)]
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise click.BadParameter(f"{path}: {command} has no option {key!r}{hint}")
        if name in defaults:
            raise click.BadParameter(f"{path}: {key} is there twice, once with _ for -")
        defaults[name] = _as_typed(path, key, value, names[name], flats.get(name))
    context.default_map = {**(context.default_map or {}), **defaults}


def _as_typed(path: Path, key: str, value: Any, option: click.Option, flat: Flat | None) -> Any:
    """Give a value of a TOML file as click takes it, or refuse one of another type."""
    if flat is not None and flat.names_data and isinstance(value, dict):
        value = [f"{name}={data}" for name, data in value.items()]
    if option.multiple:
        expected = "a list of strings"
        value = [value] if isinstance(value, str) else value
        right = isinstance(value, list) and all(isinstance(one, str) for one in value)
    elif option.is_flag or flat is None:
        expected = "true or false" if option.is_flag else "a string"
        right = isinstance(value, bool if option.is_flag else str)
    else:
        expected = words_of(flat)
        text = flat.option.typed is not None and isinstance(value, str)
        right = text or fits(flat.kinds, value)
    if not right:
        raise click.BadParameter(f"{path}: {key}: expected {expected}, found {value!r}")
    return value


def _remember(context: click.Context, option: click.Parameter, value: bool) -> bool:
    """Let `main` know how to report what fails."""
    context.ensure_object(dict)[option.name] = value
    return value


def _place_of_metrics(
    context: click.Context, option: click.Parameter, value: str | None
) -> Path | None:
    from formats.atomic import check_file

    if value is None:
        return None
    check_file(Path(value))  # before the work
    return Path(value)


COMMON = options(
    click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="TOML file with options of this command; flags and variables win over it.",
    ),
    click.option(
        "--json",
        is_flag=True,
        is_eager=True,  # known before anything else is found wrong
        callback=_remember,
        help="Write the result as one JSON object.",
    ),
    click.option(
        "--debug",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_remember,
        help="Show the traceback of an error.",
    ),
)
MEASURED = options(
    click.option(
        "--metrics",
        metavar="FILE",
        callback=_place_of_metrics,
        help="Write the numbers here too, as one flat JSON object, which DVC and CI jobs read.",
    ),
    click.option(
        "--mlflow",
        is_flag=True,
        help="Log options, metrics and digests as a run of MLflow, in the store "
        "MLFLOW_TRACKING_URI; where MLFLOW_RUN_ID names a run, in that.",
    ),
    COMMON,
)
"""Of a command that measures something."""
