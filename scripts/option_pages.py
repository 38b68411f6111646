"""What is written from `consolidate/options.py`: `consolidate/api.py` and docs/options.md."""

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_origin

from consolidate import results
from consolidate.commands.evaluate import evaluate
from consolidate.commands.finetune import finetune
from consolidate.commands.fisher import fisher
from consolidate.fields import REQUIRED, Flat, flat_options
from consolidate.options import EvaluateOptions, FinetuneOptions, FisherOptions

COMMANDS: dict[str, tuple[type, Callable[..., Any]]] = {
    "fisher": (FisherOptions, fisher),
    "finetune": (FinetuneOptions, finetune),
    "evaluate": (EvaluateOptions, evaluate),
}
POSITIONAL = ("checkpoint", "data")

API = '''"""`fisher`, `finetune` and `evaluate` with all their keywords.

Written by scripts/write_docs from consolidate/options.py: change the options there.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from consolidate.commands import evaluate as _evaluate
from consolidate.commands import finetune as _finetune
from consolidate.commands import fisher as _fisher
from consolidate.fields import gather
from consolidate.options import Columns, EvaluateOptions, FinetuneOptions, FisherOptions
from consolidate.results import {results}
from consolidate.training.loop import Step
'''

OPTIONS = """# Options

Every option of `consolidate fisher`, `finetune` and `evaluate`, written by `scripts/write_docs`.
One that is `--learning-rate` on the command line is `learning_rate` in Python, `learning-rate` in
[a run file](run.md) and in the TOML file that `--config` names, and the variable
`CONSOLIDATE_FINETUNE_LEARNING_RATE`. A result is made again where an option that changes it has
another value, and is up to date otherwise.
"""


def api_source() -> str:
    """Return the source of consolidate/api.py."""
    functions = [_function(name, *COMMANDS[name]) for name in COMMANDS]
    returned = sorted(_returned(function) for _, function in COMMANDS.values())
    return "\n\n".join([API.format(results=", ".join(returned)), *functions])


def _returned(function: Callable[..., Any]) -> str:
    annotation = inspect.signature(function).return_annotation
    return next(name for name, kind in vars(results).items() if kind == annotation)


def _function(name: str, record: type, function: Callable[..., Any]) -> str:
    flats = sorted(
        flat_options(record, python=True),
        key=lambda flat: (flat.name not in POSITIONAL, flat.default is not REQUIRED),
    )
    parameters = [f"    {flat.name}: {_annotation(flat)}{_default(flat)},\n" for flat in flats]
    parameters.insert(len(POSITIONAL), "    *,\n")
    told, *rest = re.split(r"\n\n(?=Returns:)", inspect.getdoc(function) or "")
    arguments = "".join(_argument(flat) for flat in flats)
    text = "\n\n".join([told, f"Args:\n{arguments.rstrip()}", *rest])
    return (
        f"def {name}(\n{''.join(parameters)}) -> {_returned(function)}:\n"
        f'    """{textwrap.indent(text, "    ").lstrip()}\n    """\n'
        f"    return _{name}.{name}(gather({record.__name__}, locals()))\n"
    )


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
        return f"Sequence[{get_args(kind)[0].__name__}]"
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
    """Return docs/options.md."""
    parts = [OPTIONS]
    for name, (record, _) in COMMANDS.items():
        rows = "\n".join(_rows(record))
        parts.append(
            f"## {name}\n\n| option | value | default | changes the result | meaning |\n"
            f"| --- | --- | --- | --- | --- |\n{rows}\n"
        )
    return "\n".join(parts)


def _rows(record: type) -> Iterator[str]:
    for flat in flat_options(record):
        option = flat.option
        if flat.name == "checkpoint" or option.python_only:
            continue
        default = "" if flat.default in (None, ()) else flat.default
        default = "required" if flat.default is REQUIRED else default
        default = {True: "on", False: ""}[default] if isinstance(default, bool) else default
        changes = "yes" if option.changes_result or flat.names_data or flat.name == "data" else ""
        cells = (f"`--{flat.flag}`", _value(flat), str(default), changes, _help(flat))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


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
