"""The weights of a model that is trained, as they will be stored."""

from collections.abc import Mapping

import torch
from torch import Tensor

from consolidate.models.model import Model, file_weights
from consolidate.runtime.distributed import all_processes, is_first
from consolidate.runtime.shards import is_sharded, local
from formats.errors import InputError
from formats.tensors import dtype_of

UNMOVED = "before interpolation"
"""Marks progress that was saved after the last step and before the weights are interpolated."""


def stored_weights(model: Model) -> Mapping[str, Tensor]:
    """Give the module's present values as the weights file's tensors, by file name.

    The first process has all of a sharded model on the CPU, the others have none.
    """
    weights = file_weights(model)
    if not is_sharded(model.module):
        return weights
    gathered = {}
    for name in weights:
        values = weights[name]
        if is_first(all_processes()):
            gathered[name] = values.cpu()
    return gathered


@torch.no_grad()
def take_stored_values(model: Model) -> None:
    """Give the module the values as they are stored: F is measured at exactly these.

    A sharded model is rounded where it is.
    """
    state, sharded = model.module.state_dict(), is_sharded(model.module)
    layout, at_start, stored = model.layout, model.checkpoint.weights, file_weights(model)
    parts = [(group.file_names, group.module_names) for group in layout.groups]
    fresh = (name for name in layout.fresh if name in at_start)
    parts += [((name,), tuple(layout.module_names(name))) for name in fresh]
    for file_names, module_names in parts:  # one at a time, as each may have to be made
        if not sharded:
            own = {name: stored[name] for name in file_names}
            for name, values in layout.to_module(own).items():
                state[name].copy_(values)
            continue
        dtype, *others = {dtype_of(at_start, name) for name in file_names}
        if others:
            raise InputError(
                f"--shard: the tensors that form one parameter with {file_names[0]} differ in "
                "dtype: store them in one dtype"
            )
        for name in module_names:
            values = local(state[name])
            values.copy_(values.to(dtype))
