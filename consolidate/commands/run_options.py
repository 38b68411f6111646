"""The options of `finetune` as a run file writes them: spelled as on the command line."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch

from consolidate.chain.fingerprint import WITHOUT_EFFECT
from consolidate.data.columns import Columns
from formats.errors import InputError
from formats.task_file import resolve

# What the run itself says of a task, and what concerns the start alone.
_NOT_OPTIONS = {"checkpoint", "data", "output_dir", "task", "evaluate", "overwrite", "columns"}
_NOT_OPTIONS |= {"revision", "fisher", "base_model", "restart", "force", "on_step", "shard"}
_NOT_OPTIONS |= {"evaluate_ahead"}
_OF_THE_PENALTY = {"ewc_lambda", "max_forgetting", "validation", "choose", "search_plot"}

_COLUMNS = {f"{field.name.replace('_', '-')}-column": field.name for field in fields(Columns)}


class Parameters(NamedTuple):
    """The parameters of `finetune` that a run file may set.

    Attributes:
        defaults: By name.
        hints: Their types, by name.
        of_fisher: The names of the parameters of `fisher`.
    """

    defaults: dict[str, Any]
    hints: dict[str, Any]
    of_fisher: frozenset[str]


def parameters_of(finetune: Callable[..., Any], fisher: Callable[..., Any]) -> Parameters:
    """Read the parameters of the two commands from their signatures."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(finetune).parameters.items()
        if name not in _NOT_OPTIONS
    }
    hints = {name: hint for name, hint in get_type_hints(finetune).items() if name in defaults}
    return Parameters(defaults, hints, frozenset(inspect.signature(fisher).parameters))


def option_names(parameters: Parameters) -> tuple[str, ...]:
    """Give the names that a run file may use, as on the command line."""
    return (*(name.replace("_", "-") for name in parameters.defaults), *_COLUMNS)


def read_options(
    parameters: Parameters, written: Mapping[str, Any], folder: Path, where: str
) -> dict[str, Any]:
    """Turn what a run file says into arguments of `finetune`.

    Args:
        parameters: Of the commands.
        written: By option name; each one is known.
        folder: That of the run file, which paths are relative to.
        where: What a message calls the place.

    Returns:
        By parameter name.

    Raises:
        InputError: A value of another type than the option's.
    """
    options: dict[str, Any] = {}
    columns: dict[str, str] = {}
    for key, value in written.items():
        if key in _COLUMNS:
            columns[_COLUMNS[key]] = _value(value, str, folder, f"{where}: {key}", key)
        else:
            name = key.replace("-", "_")
            options[name] = _value(value, parameters.hints[name], folder, f"{where}: {key}", name)
    if columns:
        options["columns"] = Columns(**columns)
    return options


def effective(parameters: Parameters, options: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of the arguments of `finetune` those that change nothing.

    Args:
        parameters: Of the commands.
        options: By parameter name.

    Returns:
        Those that are not the default, and can be seen in the checkpoint.
    """
    return {
        name: value
        for name, value in options.items()
        if name not in WITHOUT_EFFECT and value != parameters.defaults.get(name)
    }


def is_data(parameters: Parameters, name: str) -> bool:
    """Tell whether an option names data to be read, one or several by name.

    Args:
        parameters: Of the commands.
        name: Of the parameter.
    """
    hints = parameters.hints
    return name in hints and Path in _kinds(hints[name]) and name not in WITHOUT_EFFECT


def without_penalty(options: Mapping[str, Any]) -> dict[str, Any]:
    """Give the options of a first task, for which there is no Fisher yet.

    Args:
        options: By parameter name.

    Returns:
        Those that have a meaning with ``penalty="none"``, and that.
    """
    kept = {
        name: value
        for name, value in options.items()
        if not name.startswith("penalty") and name not in _OF_THE_PENALTY
    }
    return kept | {"penalty": "none"}


def measuring_options(parameters: Parameters, options: Mapping[str, Any]) -> dict[str, Any]:
    """Give the options of `finetune` that have a meaning where a Fisher is only measured.

    Args:
        parameters: Of the commands.
        options: Of `finetune`, by parameter name.

    Returns:
        Those that `fisher` knows too, and those that mean the Fisher only.
    """
    # --max-examples of finetune is of the training, --fisher-max-examples of the Fisher.
    known, defaults = parameters.of_fisher, parameters.defaults
    return {
        name: value
        for name, value in options.items()
        if (name in known and (f"fisher_{name}" not in defaults or name == "batch_size"))
        or name.removeprefix("fisher_") in known - {name}
    }


def fisher_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Translate options of `finetune` into those of `fisher`.

    Args:
        options: As `measuring_options` gives them.

    Returns:
        By the names that the parameters have in `fisher`.
    """
    means_fisher_only = sorted(options, key=lambda name: name.startswith("fisher_"))
    return {name.removeprefix("fisher_"): options[name] for name in means_fisher_only}


def _value(value: Any, hint: Any, folder: Path, where: str, name: str) -> Any:
    kinds = _kinds(hint)
    for kind in kinds:
        origin, arguments = get_origin(kind), get_args(kind)
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if kind is torch.dtype and isinstance(value, str):
            dtype = getattr(torch, value, None)
            if isinstance(dtype, torch.dtype):
                return dtype
        if origin is Sequence and (isinstance(value, list) or arguments[0] not in kinds):
            several = value if isinstance(value, list) else [value]
            return [_value(one, arguments[0], folder, where, name) for one in several]
        if origin is Mapping and isinstance(value, dict):
            return {
                key: _value(one, arguments[1], folder, where, name) for key, one in value.items()
            }
        if kind is str and isinstance(value, str) and value:
            if Path not in kinds:
                return value
            return str(folder / value) if name == "search_plot" else resolve(value, folder)
    raise InputError(f"{where}: expected {_words(kinds)}, found {value!r}")


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Give the types that a value may have; a mapping to paths counts as a path itself."""
    kinds = get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
    for kind in kinds:
        if get_origin(kind) is Mapping and Path in get_args(get_args(kind)[1]):
            return (*kinds, Path)
    return kinds


def _words(kinds: Sequence[Any]) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    names |= {Sequence: "a list", Mapping: "a table", torch.dtype: "a dtype such as 'float32'"}
    found = [names.get(get_origin(kind) or kind) for kind in kinds]
    return " or ".join(dict.fromkeys(word for word in found if word))
