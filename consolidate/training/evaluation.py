"""How well a model does on a task: loss, and accuracy or perplexity."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from consolidate.estimation.batches import eval_mode, model_outputs, place_of, placed
from consolidate.estimation.likelihoods import Likelihood
from consolidate.runtime import signals
from consolidate.runtime.distributed import in_step, summed
from consolidate.runtime.shards import is_sharded
from formats.errors import InputError, NonFiniteError


@torch.no_grad()
def measure(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    likelihood: Likelihood,
    *,
    language: bool = False,
    progress: Callable[[int], None] = lambda count: None,
    group: ProcessGroup | None = None,
) -> dict[str, float]:
    """Measure a model on a task in eval mode; the modes of its modules are restored.

    Processes that share the batches all get the metrics over all batches. A sharded model runs
    equally often in each. Where a signal to stop waits in one, all stop after the measurement.

    Args:
        model: Any module.
        batches: Pairs (inputs, labels).
        likelihood: The likelihood of the labels given the model's outputs.
        language: Report perplexity, the exponential of the loss, instead of accuracy.
        progress: Called after each batch with its number of examples.
        group: The processes.

    Returns:
        ``loss``, the mean negative log-likelihood per unit; ``accuracy`` or ``perplexity``; and
        ``score``, which is the accuracy where there is one and minus the loss elsewhere.
    """
    loss = units = correct = uncounted = 0.0
    place = place_of(model)
    with eval_mode(model):
        last: tuple[Any, Tensor] | None = None
        for batch in in_step(signals.until_asked(batches), group if is_sharded(model) else None):
            last = batch or last
            if last is None:
                raise InputError("there are fewer examples than processes: start fewer processes")
            inputs, labels = placed(place, *last)
            outputs = model_outputs(model, inputs, labels)
            if batch is None:  # it ran along
                continue
            likelihood.check_labels(outputs, labels)
            nll = likelihood.negative_log_likelihood(outputs, labels)  # (B,)
            loss += float(nll.cpu().double().sum())  # MPS has no float64
            units += int(likelihood.units(labels).sum())
            right = None if language else likelihood.correct(outputs, labels)
            if right is None:
                uncounted += 1
            else:
                correct += float(right.cpu().double().sum())
            progress(len(labels))
    loss, units, correct, uncounted, *wishes = summed(
        group, loss, units, correct, uncounted, *signals.wishes()
    )
    signals.stop_together(*wishes)
    if units == 0:
        raise InputError("there is nothing to predict in this data: no example has a label")
    if not math.isfinite(loss):
        raise NonFiniteError(f"the loss is {loss}: the outputs of the model overflow on this data")
    result = {"loss": loss / units}
    if language:
        result["perplexity"] = math.exp(min(loss / units, 700.0))
    if not uncounted:
        result["accuracy"] = correct / units
    result["score"] = result.get("accuracy", -result["loss"])
    return result


@torch.no_grad()
def divergence(
    model: nn.Module,
    old: Mapping[str, Tensor],
    batches: Iterable[tuple[Any, Tensor]],
    likelihood: Likelihood,
    group: ProcessGroup | None = None,
) -> float:
    """Measure how far a model's outputs have moved: the mean of KL(p_old ‖ p_new) in nats per unit.

    Args:
        model: With its new values; compared in eval mode, and restored.
        old: The values of its parameters and buffers before, by name.
        batches: Pairs (inputs, labels). The labels only mark what is predicted.
        likelihood: The likelihood whose distributions are compared.
        group: Processes that share the batches; each gets the mean over all.
    """
    total = units = 0.0
    place = place_of(model)
    with eval_mode(model):
        for batch in batches:
            inputs, labels = placed(place, *batch)
            outputs = model_outputs(model, inputs, labels)
            with _at(model, old):
                past = model_outputs(model, inputs, labels)
            total += float(likelihood.divergence(past, outputs, labels).cpu().double().sum())
            units += int(likelihood.units(labels).sum())
    total, units = summed(group, total, units)
    return total / max(1, units)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def copies_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy a module's parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}


@torch.no_grad()
def put_back(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give a module's parameters and buffers the values of copies."""
    for name, tensor in tensors_of(model).items():
        tensor.copy_(values[name])


@contextmanager
def _at(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Exchange a module's parameters and buffers for the block, without copying."""
    tensors = tensors_of(model)
    present = {name: tensor.data for name, tensor in tensors.items()}
    try:
        for name, tensor in tensors.items():
            tensor.data = values[name]
        yield
    finally:
        for name, tensor in tensors.items():
            tensor.data = present[name]
