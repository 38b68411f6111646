"""A torch module with its layout, objective and labels."""

import difflib
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from consolidate.estimation.batches import eval_mode, logits_of
from consolidate.models.file_weights import FileWeights
from consolidate.models.layout import Layout
from consolidate.models.objectives import Objective
from consolidate.models.tensor_names import (
    adapter_layout,
    full_names,
    same_names_layout,
    transformers_layout,
)
from consolidate.runtime.distributed import is_lost
from formats.checkpoint import Checkpoint
from formats.errors import InputError, UsageError
from formats.fisher_json import SAME_AS
from formats.tensors import Renamed, shape_of
from formats.wording import suggestion


@dataclass(eq=False)
class Model:
    """A module with a checkpoint's weights."""

    module: nn.Module
    checkpoint: Checkpoint
    objective: Objective
    labels: list[str] | None  # in the order of their ids; None where they have no names
    processor: Any  # tokenizer or image processor of transformers; None where there is none
    layout: Layout
    notes: list[str] = field(default_factory=list)  # what is reported to the user about loading
    config_changes: dict[str, Any] = field(default_factory=dict)  # see `config_of`
    base_layout: Layout | None = None  # of an adapter: that of its base model

    @property
    def outputs(self) -> int | None:
        """How many classes or values are predicted, if the config has the number."""
        if self.objective.language:
            return None
        if self.labels is not None:
            return len(self.labels)
        config = getattr(self.module, "config", None)
        return getattr(config, "num_labels", None)


def layout_of(module: nn.Module, checkpoint: Checkpoint, *, own: bool = False) -> Layout:
    """Map a module, of transformers or a user's own, to the names in its weights file."""
    shapes = {name: shape_of(checkpoint.weights, name) for name in checkpoint.weights}
    try:
        if checkpoint.adapter is not None:
            return adapter_layout(module, shapes)
        return same_names_layout(module, shapes) if own else transformers_layout(module, shapes)
    except InputError as error:
        raise InputError(f"{checkpoint.path}: {error}") from error


def with_full_names(model: Model) -> tuple[Model, dict[str, str]]:
    """Name the weights of a model that was stored without a head as transformers writes them.

    The second result has the changed names by those of the checkpoint's file.
    """
    source = model.checkpoint
    changed = full_names(model.module, source.weights)
    if not changed:
        return model, {}
    names = {changed.get(name, name): name for name in source.weights}
    named = replace(source, weights=Renamed(source.weights, names))
    layout = layout_of(model.module, named)
    return replace(model, checkpoint=named, layout=layout), changed


def file_weights(model: Model) -> FileWeights:
    """Return the module's current values as tensors of its weights file; see `FileWeights`."""
    return FileWeights(model.module, model.layout, model.checkpoint.weights)


def config_of(model: Model) -> dict[str, Any]:
    """Return the ``config.json`` that belongs to `file_weights`, with the labels of a new head."""
    return deepcopy(model.checkpoint.config) | deepcopy(model.config_changes)


def unprotected(model: Model, protected: Iterable[str]) -> dict[str, str]:
    """Return the reason for each tensor of the weights file that has no Fisher."""
    have = frozenset(protected)
    parameters = dict(model.module.named_parameters())
    reasons = {}
    for name in [*model.checkpoint.weights, *model.layout.fresh]:
        if name in have:
            continue
        names = model.layout.module_names(name)
        if name in model.layout.duplicates:
            reasons[name] = SAME_AS + model.layout.duplicates[name]
        elif not names:
            reasons[name] = "not used by the model"
        elif not any(module_name in parameters for module_name in names):
            reasons[name] = "a buffer, not a parameter"
        elif not any(parameters[n].requires_grad for n in names if n in parameters):
            reasons[name] = "frozen"
        else:
            reasons[name] = "not measured"
    return reasons


def freeze_parameters(model: Model, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose name, in the module or in the file, matches a glob pattern."""
    parameters = dict(model.module.named_parameters())
    names: dict[str, set[str]] = {}  # file and module names -> parameters
    for name in model.module.state_dict():
        canonical = model.layout.canonical(name)
        if canonical in parameters:
            names.setdefault(name, set()).add(str(canonical))
    # A base model's own names too, as its checkpoint without a head has them.
    body = f"{getattr(model.module, 'base_model_prefix', '')}."
    for name in parameters:
        if len(body) > 1 and name.startswith(body):
            names.setdefault(name.removeprefix(body), set()).add(name)
    for name in [*model.checkpoint.weights, *model.layout.fresh]:
        found = [n for n in model.layout.module_names(name) if n in parameters]
        names.setdefault(name, set()).update(found)
    for pattern in patterns:
        matched = {p for name, ps in names.items() if fnmatchcase(name, pattern) for p in ps}
        if not matched:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            hint = suggestion(near) or "; check the pattern"
            raise UsageError(f"--freeze {pattern} matches no parameter{hint}")
        for name in matched:
            file_names = model.layout.file_names(name)
            left = [n for n in file_names if not fnmatchcase(n, pattern)]
            if left and len(left) < len(file_names) and not fnmatchcase(name, pattern):
                raise UsageError(
                    f"--freeze {pattern} matches only a part of {name}, which is one parameter of "
                    f"the model and also contains {left[0]}; match all of it or none"
                )
            parameters[name].requires_grad_(False)


def module_dtype(model: Model) -> torch.dtype:
    """Return the dtype of the module's first parameter, which its inputs are cast to."""
    return next((p.dtype for p in model.module.parameters()), torch.float32)


@torch.no_grad()
def outputs_of_first(model: Model, first: Tensor, where: str, hint: str = "") -> Tensor:
    """Run the module on the inputs of the first row, (1, …), and return its outputs."""
    module = model.module
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    try:
        with eval_mode(module):  # a batch of one must not touch running statistics
            outputs = module(first.to(device))
    except Exception as error:
        if is_lost(error):  # another process of a sharded model
            raise
        raise InputError(
            f"{where}: the model does not accept inputs of shape {list(first.shape)} and dtype "
            f"{str(first.dtype).removeprefix('torch.')}: {error}{hint}"
        ) from error
    return logits_of(outputs, f"{where}: ")
