"""The state of training as plain tensors and numbers, from which it resumes to the same bits.

Of a sharded model it is this process's part.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from consolidate.runtime.shards import cut_as, local
from consolidate.training.loop import Step

OWN = ("buffer/", "random/")
"""What the names of tensors begin with that may differ between processes with the whole model."""


@dataclass(frozen=True)
class Descent:
    """What changes from step to step."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler
    steps: list[Step]


def training_state(descent: Descent) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Give the state of training between two steps: tensors, without copying, and the rest.

    They are values, the optimizer's state by parameter name, random number generators and history;
    and JSON-ready numbers of the schedule and the loss scaler.
    """
    tensors = trained_tensors(descent.module, descent.steps, frozen=False)
    names = {id(parameter): name for name, parameter in descent.module.named_parameters()}
    for parameter, entries in descent.optimizer.state.items():
        for key, value in entries.items():
            if value is not None:
                name = names[id(parameter)]
                tensors[f"optimizer/{key}/{name}"] = local(torch.as_tensor(value))
    for kind, (state, _) in _generators(descent.module).items():
        tensors[f"random/{kind}"] = state()
    schedule = descent.scheduler.state_dict()
    return tensors, {
        "schedule": {key: schedule[key] for key in ("last_epoch", "_step_count", "_last_lr")},
        "scaler": descent.scaler.state_dict(),
    }


def load_training(
    descent: Descent, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Resume training, which has taken no step yet, from what `training_state` gave."""
    descent.steps[:] = load_trained(descent.module, tensors)
    names = {id(parameter): name for name, parameter in descent.module.named_parameters()}
    optimizer = descent.optimizer
    fresh = optimizer.state_dict()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    places = {names[id(parameter)]: at for at, parameter in enumerate(trained)}
    for path, tensor in tensors.items():
        if path.startswith("optimizer/"):
            _, key, name = path.split("/", 2)
            at = places[name]
            fresh["state"].setdefault(at, {})[key] = cut_as(tensor, trained[at])
    rates = numbers["schedule"]["_last_lr"]
    for group, rate in zip(fresh["param_groups"], rates, strict=True):
        group["lr"] = rate
    optimizer.load_state_dict(fresh)
    descent.scheduler.load_state_dict({**descent.scheduler.state_dict(), **numbers["schedule"]})
    if descent.scaler.is_enabled():
        descent.scaler.load_state_dict(dict(numbers["scaler"]))
    for kind, (_, set_state) in _generators(descent.module).items():
        set_state(tensors[f"random/{kind}"])


def trained_tensors(
    module: nn.Module, steps: Sequence[Step], *, frozen: bool = True
) -> dict[str, Tensor]:
    """Give the result of training, uncopied: history, and values, also of frozen parameters.

    Merging an adapter changes frozen parameters. The history is (steps, 4).
    """
    history = [[math.nan if v is None else v for v in astuple(step)[1:]] for step in steps]
    numbers = torch.tensor(history, dtype=torch.float64).reshape(-1, 4)
    return values_of(module, frozen=frozen) | {"history": numbers}


@torch.no_grad()
def load_trained(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[Step]:
    """Give a module the values of `trained_tensors`, and return what each step reported."""
    for name, tensor in values_of(module, frozen=True).items():
        if name in tensors:
            tensor.copy_(tensors[name])
    return [
        Step(number, loss, penalty, rate, None if math.isnan(norm) else norm)
        for number, (loss, penalty, rate, norm) in enumerate(tensors["history"].tolist(), 1)
    ]


def values_of(module: nn.Module, *, frozen: bool) -> dict[str, Tensor]:
    """Give parameters and buffers, uncopied, by their names in saved progress."""
    parameters = {
        f"value/{name}": local(parameter.detach())
        for name, parameter in module.named_parameters()
        if frozen or parameter.requires_grad
    }
    return parameters | {f"buffer/{name}": buffer for name, buffer in module.named_buffers()}


def _generators(module: nn.Module) -> dict[str, tuple[Callable[[], Tensor], Callable[..., None]]]:
    """Give, by type of device, what reads and sets the state that dropout draws from."""
    found = {"cpu": (torch.get_rng_state, torch.set_rng_state)}
    device = next(module.parameters()).device
    if device.type == "cuda":  # that of one of several
        read = partial(torch.cuda.get_rng_state, device)
        found["cuda"] = (read, partial(torch.cuda.set_rng_state, device=device))
    elif device.type != "cpu":
        backend = getattr(torch, device.type)
        found[device.type] = (backend.get_rng_state, backend.set_rng_state)
    return found
