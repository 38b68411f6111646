"""What is written from `consolidate/options.py`: `consolidate/api.py` and the page of options."""

import inspect
import re
import textwrap
from collections.abc import Callable, Collection
from importlib import import_module
from types import UnionType
from typing import Any, get_args, get_origin

from consolidate import results
from consolidate.fields import REQUIRED, Flat, bounds_of, default_words, flat_options
from consolidate.flags import grouped_with
from consolidate.options import COMMANDS, TYPED
from consolidate.views import markdown

# what they name is described by digest
CONTENT = ("data", "prompts", "fisher", "base_model", "revision", "replay", "after")

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

Every option of every command, in the groups of `--help`, written by `scripts/write_docs`.
`--learning-rate` on the command line is `learning_rate` in Python, `learning-rate` in
[a run file](run-file.md) and in the TOML file of `--config`, and the environment variable
`CONSOLIDATE_FINETUNE_LEARNING_RATE`. The options of the groups Output and Other options have no
keyword in Python, `--log-every` and `--dry-run` excepted. `fisher` and `finetune` make a result
again if an option that changes it has another value; otherwise the result is up to date.
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
    default = f" (default: {flat.option.by_default})" if flat.option.by_default else ""
    text = _help(flat) + (default if flat.default in (None, ()) else "")
    text = re.sub(r"`[^`]*`|--([a-z][a-z-]*[a-z])", _as_parameter, text)
    text = text.replace("a CHECKPOINT", "a checkpoint").replace("CHECKPOINT", "the checkpoint")
    text = f"{flat.name}: {text}"
    return textwrap.fill(text, 96, initial_indent="    ", subsequent_indent=" " * 8) + "\n"


def _as_parameter(found: re.Match[str]) -> str:
    """Write a flag as the parameter it is; code stays as it is."""
    return f"`{found[1].replace('-', '_')}`" if found[1] else found[0]


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
    """Return the page of options."""
    parts = [OPTIONS]
    for name, record in COMMANDS.items():
        parts.append(f"## {name}\n")
        typed = {flat.name for other in TYPED[name] for flat in flat_options(other)}
        kept = name in ("fisher", "finetune")  # whose outputs are kept while they are up to date
        heads = ["option", "value", "default", *["changes the result"] * kept, "meaning"]
        for title, flats in grouped_with(record, *TYPED[name]).items():
            parts.append(f"**{title}**\n")
            parts.append(table(heads, [_row(flat, kept, typed) for flat in flats]))
    return "\n".join(parts)


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Write a Markdown table; a | in a cell is escaped."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (heads, *rows)]
    return markdown.table(lines) + "\n"


def _row(flat: Flat, kept: bool, typed: Collection[str]) -> list[str]:
    default = "required" if flat.default is REQUIRED else default_words(flat)
    content = flat.names_data or flat.name in CONTENT
    changes = "yes" if flat.option.changes_result else "by content" if content else ""
    changes = "" if flat.name in typed else changes
    repeated = "; repeatable" * flat.repeatable
    value = f"{_value(flat)}{repeated}"
    return [f"`--{flat.flag}`", value, default, *[changes] * kept, flat.option.help]


def _value(flat: Flat) -> str:
    option = flat.option
    if bool in flat.kinds:
        return "flag"
    if option.choices and not option.typed:
        return ", ".join(option.choices)
    words = {int: "integer", float: "number"}
    kind = next((words[kind] for kind in flat.kinds if kind in words), "")
    shown = option.metavar if option.typed or not kind else f"{kind} {bounds_of(option)}".strip()
    return shown or "text"
