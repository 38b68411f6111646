"""What is written from `consolidate/options.py`: `consolidate/api.py` and the options page."""

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from importlib import import_module
from types import UnionType
from typing import Any, get_args, get_origin

from consolidate import results
from consolidate.fields import REQUIRED, Flat, flat_options
from consolidate.options import COMMANDS

CONTENT = ("data", "fisher", "base_model", "revision")  # what they name is described by digest

API = '''"""The commands as functions, with all their keywords.

Written by scripts/write_docs from consolidate/options.py: change the options there.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from consolidate.fields import gather
from consolidate.options import (
    {records},
)
from consolidate.results import (
    {results},
)
from consolidate.training.loop import Step
'''

OPTIONS = """# Options

Every option of every command, written by `scripts/write_docs`.
One that is `--learning-rate` on the command line is `learning_rate` in Python, `learning-rate` in
[a run file](run-file.md) and in the TOML file that `--config` names, and the variable
`CONSOLIDATE_FINETUNE_LEARNING_RATE`. The result of `fisher` and `finetune` is made again where
an option that changes it has another value, and is up to date otherwise.
"""


def api_source() -> str:
    """Return the source of consolidate/api.py."""
    commands = [getattr(import_module(f"consolidate.commands.{name}"), name) for name in COMMANDS]
    records = sorted(["Columns", *(record.__name__ for record in COMMANDS.values())])
    returned = sorted({_returned(command) for command in commands})
    imports = API.format(records=",\n    ".join(records), results=",\n    ".join(returned))
    return "\n\n".join([imports, *map(_function, COMMANDS, COMMANDS.values(), commands)])


def _returned(function: Callable[..., Any]) -> str:
    annotation = inspect.signature(function).return_annotation
    return next(name for name, kind in vars(results).items() if kind == annotation)


def _function(name: str, record: type, function: Callable[..., Any]) -> str:
    flats = sorted(
        flat_options(record, python=True),
        key=lambda flat: (not _is_positional(flat), flat.default is not REQUIRED),
    )
    positional = [flat for flat in flats if _is_positional(flat)]
    parameters = [f"    {_parameter(flat)},\n" for flat in flats]
    if not any(flat.option.star for flat in flats):
        parameters.insert(len(positional), "    *,\n")
    told, *rest = re.split(r"\n\n(?=Returns:)", inspect.getdoc(function) or "")
    arguments = "".join(_argument(flat) for flat in flats)
    text = "\n\n".join([told, f"Args:\n{arguments.rstrip()}", *rest])
    return (
        f"def {name}(\n{''.join(parameters)}) -> {_returned(function)}:\n"
        f'    """{textwrap.indent(text, "    ").lstrip()}\n    """\n'
        f"    given = locals()\n"
        f"    from consolidate.commands import {name} as command\n\n"
        f"    return command.{name}(gather({record.__name__}, given))\n"
    )


def _is_positional(flat: Flat) -> bool:
    return flat.option.argument or flat.name == "data"


def _parameter(flat: Flat) -> str:
    if flat.option.star:
        (each,) = {kind for kind in get_args(flat.kinds[0]) if kind is not Ellipsis}
        return f"*{flat.name}: {_type(each)}"
    return f"{flat.name}: {_annotation(flat)}{_default(flat)}"


def _argument(flat: Flat) -> str:
    text = re.sub(r"--([a-z][a-z-]*[a-z])", lambda m: f"`{m[1].replace('-', '_')}`", _help(flat))
    text = re.sub(r"; may be repeated(?=[.])|\s*May be repeated\.", "", text)
    text = f"{flat.name}: {text.replace('a CHECKPOINT', 'a checkpoint')}"
    return textwrap.fill(text, 96, initial_indent="    ", subsequent_indent=" " * 8) + "\n"


def _help(flat: Flat) -> str:
    choices = ", ".join(flat.option.choices)
    named = all(choice in flat.option.help for choice in flat.option.choices)
    return flat.option.help if named else f"{flat.option.help} One of {choices}."


def _annotation(flat: Flat) -> str:
    option = flat.option
    if option.python is not None:
        return option.python + (" | None" if option.python == "Columns" else "")
    if option.dtype:
        return "torch.dtype | str" + (" | None" if type(None) in flat.kinds else "")
    return " | ".join(_type(kind) for kind in flat.kinds)


def _type(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"Sequence[{_type(get_args(kind)[0])}]"
    if isinstance(kind, UnionType):
        return " | ".join(_type(each) for each in get_args(kind))
    if get_origin(kind) is dict:
        return "Mapping[str, str | Path]"
    return "None" if kind is type(None) else str(kind.__name__)


def _default(flat: Flat) -> str:
    if flat.default is REQUIRED:
        return ""
    if flat.option.python == "Columns":
        return " = None"
    return f' = "{flat.default}"' if isinstance(flat.default, str) else f" = {flat.default!r}"


def options_page() -> str:
    """Return docs/reference/options.md."""
    parts = [OPTIONS]
    for name, record in COMMANDS.items():
        kept = name in ("fisher", "finetune")  # whose outputs are left where they are up to date
        heads = ["option", "value", "default", *["changes the result"] * kept, "meaning"]
        rows = [heads, ["---"] * len(heads), *_rows(record, kept)]
        lines = [" | ".join(cell.replace("|", "\\|") for cell in cells) for cells in rows]
        table = "\n".join(f"| {line} |" for line in lines)
        parts.append(f"## {name}\n\n{table}\n")
    return "\n".join(parts)


def _rows(record: type, kept: bool) -> Iterator[list[str]]:
    for flat in flat_options(record):
        option = flat.option
        if option.argument or option.python_only:
            continue
        default = "" if flat.default in (None, ()) else flat.default
        default = "required" if flat.default is REQUIRED else default
        default = {True: "on", False: ""}[default] if isinstance(default, bool) else default
        content = flat.names_data or flat.name in CONTENT
        changes = "yes" if option.changes_result else "by content" if content else ""
        yield [f"`--{flat.flag}`", _value(flat), str(default), *[changes] * kept, _help(flat)]


def _value(flat: Flat) -> str:
    option = flat.option
    if bool in flat.kinds:
        return "flag"
    if option.choices and not option.typed:
        return ", ".join(option.choices)
    words = {int: "integer", float: "number"}
    kind = next((words[kind] for kind in flat.kinds if kind in words), "")
    bounds = [
        f"{word} {bound:g}" if bound < 2**53 else ""
        for word, bound in (
            ("from", option.least),
            ("above", option.above),
            ("to", option.most),
            ("below", option.below),
        )
        if bound is not None
    ]
    shown = option.metavar if option.typed or not kind else " ".join([kind, *filter(None, bounds)])
    return shown or "text"
