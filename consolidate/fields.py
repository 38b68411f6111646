"""What an option is: a field of a record that carries its help, bounds and meaning.

`consolidate/options.py` holds the records. From them come flags and variables (`flags.py`), Python
signatures (`api.py`), the keys of run files, range checks, and what a result is made from.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from formats.errors import InputError, UsageError

R = TypeVar("R")


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its name, type and default."""

    help: str  # for --help, docstrings and the page of options; other options are named as flags
    by_default: str | None = None  # what a default of None or () stands for, in words
    group: str | None = None  # its heading in --help, if not the title of its record
    metavar: str | None = None  # the value in --help, if not N or X for a number
    choices: tuple[str, ...] = ()
    least: float | None = None  # a number is at least this
    above: float | None = None  # and larger than this
    most: float | None = None  # and at most this
    below: float | None = None  # and smaller than this
    infinite: bool = False  # infinity is a value too
    argument: bool = False  # given by position, without a flag
    star: bool = False  # *name in Python
    dtype: bool = False  # names a dtype; Python callers may give the torch.dtype
    written: bool = False  # names a file that is written
    # Whether the result depends on its value. Not if it changes nothing, and not if it names
    # content, which is described by digest.
    changes_result: bool = True
    in_run_file: bool = True  # can be set for the tasks of a run file
    python: str | None = None  # the type in the Python signature, if another
    python_only: bool = False  # has no flag
    typed: Callable[[str], Any] | None = None  # reads what was typed, or raises ValueError


@dataclass(frozen=True)
class Part:
    """How the options of a record within a record are named."""

    prefix: str = ""
    suffix: str = ""
    one_argument: bool = False  # in Python the record itself is given


REQUIRED: Any = object()
"""The default of what has to be given."""

COMMON, OPTIONS, OTHER = "Common options", "Options", "Other options"
"""Headings in --help: of options that a command names in COMMON, of those without another, last."""


def option(default: Any, help: str, **settings: Any) -> Any:
    """Make a field of a record: an option with its default and `Option`'s settings."""
    return field(default=default, metadata={"option": Option(help, **settings)})


def part(default: Any, **naming: Any) -> Any:
    """Make a field of a record that holds another record's options, with its defaults."""
    return field(default=default, metadata={"part": Part(**naming)})


class Flat(NamedTuple):
    """One option of a command, as its callers name it."""

    name: str  # the keyword
    path: tuple[str, ...]  # the names of the fields that lead to it
    kinds: tuple[Any, ...]  # the types that a value may have
    default: Any  # REQUIRED where there is none
    option: Option
    group: str  # the heading that --help lists it under

    @property
    def names_data(self) -> bool:
        """Whether it holds task data by name."""
        return dict in {get_origin(kind) for kind in self.kinds}

    @property
    def repeatable(self) -> bool:
        """Whether its flag can be given more than once."""
        return isinstance(self.default, tuple) or self.names_data

    @property
    def flag(self) -> str:
        """The name on the command line and in TOML files."""
        return self.name.replace("_", "-")


def flat_options(record: type, *, python: bool = False) -> Iterator[Flat]:
    """Yield the options of a record and of the records in it, in their order.

    A record that is one argument in Python is one option with `python`.
    """
    common = getattr(record, "COMMON", ())
    for flat in _flat(record, Part(), (), None, python):
        yield flat._replace(group=COMMON) if flat.name in common else flat


def grouped(record: type) -> dict[str, list[Flat]]:
    """Give the flags of a command by their headings in --help, those that all use first."""
    every = [f for f in flat_options(record) if not f.option.argument and not f.option.python_only]
    every.sort(key=lambda flat: flat.option.group is not None)  # what a record gives away is last
    titles = [COMMON, *(flat.group for flat in every)]
    groups = {title: [flat for flat in every if flat.group == title] for title in titles}
    order = getattr(record, "COMMON", ())
    groups[COMMON].sort(key=lambda flat: order.index(flat.name))
    return {title: flats for title, flats in groups.items() if flats}


def _flat(
    record: type, naming: Part, path: tuple[str, ...], defaults: Any, python: bool
) -> Iterator[Flat]:
    title = getattr(record, "TITLE", OPTIONS)
    hints = get_type_hints(record)
    for each in fields(record):
        at = (*path, each.name)
        default = each.default if defaults is None else getattr(defaults, each.name)
        name = f"{naming.prefix}{each.name}{naming.suffix}"
        inner: Part | None = each.metadata.get("part")
        if inner is not None and not (python and inner.one_argument):
            yield from _flat(hints[each.name], inner, at, default, python)
        elif inner is not None:
            whole = Option((hints[each.name].__doc__ or "").strip(), python=f"{each.name.title()}")
            yield Flat(name, at, (hints[each.name],), default, whole, title)
        else:
            known: Option = each.metadata["option"]
            kinds = kinds_of(hints[each.name])
            yield Flat(name, at, kinds, default, known, known.group or title)


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """Give the types in a union, or the one type."""
    return get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)


def value_of(record: Any, flat: Flat) -> Any:
    """Give the value that an option has in a record."""
    for name in flat.path:
        record = getattr(record, name)
    return record


def gather(record: type[R], given: Mapping[str, Any]) -> R:
    """Make a record from flat keywords, each checked; those not given have their defaults."""
    every = (*flat_options(record), *flat_options(record, python=True))
    known, values = {flat.name: flat for flat in every}, {}
    for name, value in given.items():
        if name not in known:
            raise UsageError(f"there is no option {name!r}")
        if value is not None or not is_dataclass(known[name].kinds[0]):
            values[name] = checked(known[name], value)
    required = [name for name, flat in known.items() if flat.default is REQUIRED]
    for name in required:
        if name not in values:
            raise UsageError(f"{name} is required")
    made = record(**{name: values.pop(name) for name in required})
    for name, value in values.items():
        made = _put(made, known[name].path, value)
    return made


def _put(record: Any, path: tuple[str, ...], value: Any) -> Any:
    """Give a record with another value of the option at the end of a path."""
    if len(path) > 1:
        value = _put(getattr(record, path[0]), path[1:], value)
    return replace(record, **{path[0]: value})


def checked(flat: Flat, value: Any) -> Any:
    """Give a value as the records hold it, or refuse it by the name of its flag."""
    option = flat.option
    where = flat.name if option.argument else f"--{flat.flag}"
    if option.dtype and value is not None:
        value = str(value).removeprefix("torch.")
    if "Path" in str(flat.kinds):
        value = at_home(value, where)
    if not fits(flat.kinds, value := _plain(value)) and not option.python_only:
        raise UsageError(f"{where} {value}: expected {words_of(flat)}")
    if option.choices and isinstance(value, str) and value not in option.choices:
        number = "a number, or " if float in flat.kinds else ""
        named = ", ".join(option.choices)
        raise UsageError(f"{where} {value}: expected {number}one of {named}")
    for number in value if isinstance(value, list | tuple) else [value]:
        bits = 128 if float in flat.kinds else 63  # of the largest float32, or integer of torch
        if fits((int, float), number) and 2**bits <= abs(number) < math.inf:
            raise UsageError(f"{where} {number}: expected a number below 2^{bits}")
        if fits((int, float), number) and _outside(option, number):
            raise UsageError(f"{where} {number}: expected {_range(flat)}")
    if isinstance(value, list):
        return tuple(value)
    return dict(value) if isinstance(value, Mapping) else value


def at_home(value: Any, where: str) -> Any:
    """Put the user's home folder in the place of ~, in every path of a value."""
    if isinstance(value, list | tuple):
        return [at_home(one, where) for one in value]
    if isinstance(value, Mapping):
        return {name: at_home(one, where) for name, one in value.items()}
    if not isinstance(value, str | Path) or not str(value).startswith("~"):
        return value
    path = Path(value)
    try:
        # A file that is named so is no home folder, for those either that look at the path again.
        return type(value)(path.absolute() if path.exists() else path.expanduser())
    except RuntimeError as error:
        raise InputError(f"{where} {value}: not a valid path: {error}") from None


def _plain(value: Any) -> Any:
    """Give Python's own numbers and lists for those of numpy and torch."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.tolist() if hasattr(value, "tolist") else value


def fits(kinds: Sequence[Any], value: Any) -> bool:
    """Tell whether a value is of one of these types; a list is a tuple here, an integer a float."""
    return any(_fits(kind, value) for kind in kinds)


def _fits(kind: Any, value: Any) -> bool:
    arguments = get_args(kind)
    if kind in (int, float):
        number = int if kind is int else int | float
        wide = kind is float and isinstance(value, int) and abs(value) > sys.float_info.max
        return isinstance(value, number) and not isinstance(value, bool) and not wide
    if get_origin(kind) is tuple:
        several = isinstance(value, list | tuple) and (bool(value) or arguments[0] is not float)
        return several and all(fits(kinds_of(arguments[0]), one) for one in value)
    if get_origin(kind) is dict:
        named = isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
        return named and all(fits(kinds_of(arguments[1]), one) for one in value.values())
    return isinstance(value, kind) if isinstance(kind, type) else callable(value)


def words_of(flat: Flat) -> str:
    """Give the types of an option's values in words."""
    if flat.option.dtype:
        return "a dtype such as 'float32'"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    words |= {tuple[float, ...]: "a list of numbers", tuple[str, ...]: "a list of strings"}
    found = []
    for kind in flat.kinds:
        other = "a list" if get_origin(kind) is tuple else ""
        other = "a table" if get_origin(kind) is dict else other
        other = f"a {kind.__name__}" if isinstance(kind, type) and is_dataclass(kind) else other
        found.append(words.get(kind, other))
    return " or ".join(dict.fromkeys(word for word in found if word))


def _outside(option: Option, value: float) -> bool:
    bounded = [option.least, option.above, option.most, option.below] != [None] * 4
    return bounded and not (
        (isinstance(value, int) or math.isfinite(value) or (option.infinite and value == math.inf))
        and (option.least is None or value >= option.least)
        and (option.above is None or value > option.above)
        and (option.most is None or value <= option.most)
        and (option.below is None or value < option.below)
    )


def help_text(flat: Flat) -> str:
    """Give the text of --help: what the option does, its range if bounded above, its default."""
    text, notes = flat.option.help, []
    if flat.default is REQUIRED:
        notes.append("required")
    if flat.repeatable:
        notes.append("repeatable")
    if flat.option.most is not None or flat.option.below is not None:
        notes.append(bounds_of(flat.option))
    if default := default_words(flat):
        notes.append(f"default: {default}")
    return f"{text} ({'; '.join(notes)})" if notes else text


def default_words(flat: Flat) -> str:
    """Give the default in words; empty if there is none."""
    default = flat.default
    if default is None or default == ():
        return flat.option.by_default or ""
    if default is REQUIRED or default is False:
        return ""
    if default is True:
        return "on"
    if isinstance(default, float):
        return f"{default:g}".replace("e-0", "e-")
    return str(default)


def bounds_of(option: Option) -> str:
    """Give the range of a number in words; empty if it has no bounds."""
    least = "" if option.least is None else f"from {option.least:g}"
    least = least if option.above is None else f"above {option.above:g}"
    most = "" if option.most is None else f"to {option.most:g}"
    most = most if option.below is None else f"below {_number(option.below)}"
    most = f"to {most}" if least and option.below is not None else most
    return " ".join(filter(None, [least, most]))


def _number(value: float) -> str:
    exponent = math.log2(value) if value > 2**53 else 0.5
    return f"2^{exponent:.0f}" if exponent.is_integer() else f"{value:g}"


def _range(flat: Flat) -> str:
    option = flat.option
    if option.most is not None or option.below is not None:
        return f"a number {bounds_of(option)}"
    if float not in flat.kinds:
        return f"at least {option.least}"
    return f"a {'' if option.infinite else 'finite '}number {bounds_of(option)}"
