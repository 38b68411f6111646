"""The options of a run file's tasks: those of `finetune`, spelled as on the command line."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_origin

from consolidate.fields import Flat, at_home, checked, fits, flat_options, words_of
from consolidate.options import FinetuneOptions, FisherOptions
from formats.errors import InputError
from formats.task_file import resolve

_ALL = {flat.flag: flat for flat in flat_options(FinetuneOptions)}
OPTIONS = {key: flat for key, flat in _ALL.items() if flat.option.in_run_file}
"""What a run file may set for a task, by key."""
OF_COMMAND = tuple(key for key in _ALL if key not in OPTIONS)
"""What only the command line of `finetune` has."""

_OF_TRAINING = {"search", "penalty", "replaying", "adapter", "head", "recipe", "gate", "measuring"}
_OF_BOTH = {"seed", "batch_size"}  # of the recipe, and meant for the Fisher too


def read_options(written: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Turn known keys of a run file into options by flat name; paths are relative to `folder`."""
    return {OPTIONS[key].name: _read(OPTIONS[key], written[key], folder) for key in written}


def without_penalty(options: Mapping[str, Any], *, keep: Collection[str] = ()) -> dict[str, Any]:
    """Remove the options of the penalty, for a task without one, except those to keep."""
    parts = ("search", "penalty")
    of_penalty = {flat.name for flat in OPTIONS.values() if flat.path[0] in parts}
    of_penalty = (of_penalty | {"penalty_step", "max_forgetting"}) - {*keep}
    kept = {name: value for name, value in options.items() if name not in of_penalty}
    return kept | {"penalty": "none"}


def without_estimation(options: Mapping[str, Any], *, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the options of a Fisher that is not measured, except those `kept`."""
    of_fisher = {flat.name for flat in OPTIONS.values() if flat.path[0] == "estimation"}
    return {name: v for name, v in options.items() if name not in of_fisher or name in kept}


def of_training(options: Mapping[str, Any]) -> list[str]:
    """Name the options, by key, that cannot be used where a Fisher is only measured."""
    return [
        flat.flag
        for flat in OPTIONS.values()
        if flat.name in options and flat.path[0] in _OF_TRAINING and flat.name not in _OF_BOTH
    ]


def fisher_options(options: FinetuneOptions, *, add: bool = False) -> FisherOptions:
    """Give the options of `fisher` that measure as `finetune` would."""
    batch_size = options.estimation.batch_size or options.recipe.batch_size
    return FisherOptions(
        checkpoint=options.checkpoint,
        data=options.data,
        output_dir=options.output_dir,
        task=options.task,
        source=options.source,
        encoding=options.encoding,
        estimation=replace(options.estimation, batch_size=batch_size),
        curvature=options.curvature,
        seed=options.recipe.seed,
        parameters=options.parameters,
        add=add,
        merging=options.merging,
        saving=options.saving,
    )


def _read(flat: Flat, value: Any, folder: Path) -> Any:
    several = {get_origin(kind) for kind in flat.kinds} == {tuple}
    value = [value] if several and not isinstance(value, list) else value
    if value == "" or value is None or not fits(flat.kinds, value):
        raise InputError(f"{flat.flag}: expected {words_of(flat)}, found {value!r}")
    if flat.option.written:
        value = str(folder / at_home(value, flat.flag))
    elif Path in flat.kinds:
        value = resolve(value, folder)
    elif flat.names_data:
        value = {name: resolve(data, folder) for name, data in value.items()}
    return checked(flat, float(value) if float in flat.kinds and fits((int,), value) else value)
