"""The training loop: mean negative log-likelihood per unit, and a penalty that is passed in."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _NormBase

from consolidate.estimation.batches import model_outputs, place_of, placed
from consolidate.estimation.likelihoods import Likelihood
from consolidate.ewc.low_rank_penalty import MergedPenalty
from consolidate.ewc.penalty import Penalty, check_proximal
from consolidate.runtime.distributed import place_in, sum_, summed
from consolidate.runtime.shards import is_sharded, whole
from formats.errors import NonFiniteError

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("constant", "linear", "cosine")
FUSED = ("cpu", "cuda", "mps", "xpu")
"""Devices on which torch has Adam as one kernel."""
MIXED_PRECISION = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


APART = 0x9E3779B97F4A7C15
"""Between the seeds of two processes: the golden ratio's, far from any that a user would choose."""

REMEDY = "lower --learning-rate or --ewc-lambda, or use --max-grad-norm"


@dataclass(frozen=True)
class Step:
    """What one optimizer step reports."""

    step: int
    loss: float  # mean negative log-likelihood per unit, over all micro-batches
    penalty: float  # ½ λ Σ Λ (θ − μ)², before the step
    learning_rate: float
    gradient_norm: float | None  # before clipping; None where nothing is clipped


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Make torch's optimizer of that name over the parameters that train.

    Args:
        name: ``adamw``, ``adam`` or ``sgd``.
        parameters: Frozen ones are left out.
        learning_rate: The peak of the schedule.
        momentum: Of SGD.
        weight_decay: Decoupled for AdamW, added to the gradient for the other two.

    Returns:
        The optimizer.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(
            trained, lr=learning_rate, momentum=momentum, weight_decay=weight_decay
        )
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    # One pass over the memory in place of ten, and no copies.
    fused = all(parameter.device.type in FUSED for parameter in trained)
    return kind(trained, lr=learning_rate, weight_decay=weight_decay, fused=fused)


def make_scheduler(
    name: str, optimizer: torch.optim.Optimizer, *, warmup_steps: int, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Make a learning-rate schedule: a linear warm-up, then the named decay to zero.

    Args:
        name: ``constant``, ``linear`` or ``cosine``.
        optimizer: Whose learning rate is the peak.
        warmup_steps: Steps from zero to the peak.
        total_steps: Steps of the whole run.

    Returns:
        The scheduler, to be stepped once per optimizer step.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        left = (total_steps - step) / max(1, total_steps - warmup_steps)
        if name == "linear":
            return left
        return 0.5 * (1 + math.cos(math.pi * (1 - left))) if name == "cosine" else 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def data_order(count: int, seed: int) -> Iterator[list[int]]:
    """Yield one permutation of `count` examples per epoch, without end.

    Args:
        count: The number of examples.
        seed: The same seed gives the same permutations.

    Yields:
        The order of the examples in the next epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(count, generator=generator).tolist()


def freeze_statistics(model: nn.Module) -> None:
    """Keep running statistics as they are: put every normalisation that has them in eval mode.

    They are no parameters, so no penalty holds them, and they forget even under an infinite λ.

    Args:
        model: Changed in place.
    """
    for module in _with_statistics(model):
        module.eval()


def has_statistics(model: nn.Module) -> bool:
    """Return whether a model keeps running statistics of what passes through it.

    Args:
        model: Any module.
    """
    return any(True for _ in _with_statistics(model))


def default_statistics(penalty: str, *, old: bool) -> str:
    """Say what becomes of running statistics unless somebody says so: the same for all penalties.

    Args:
        penalty: Its kind; ``none`` where there is none.
        old: Whether there is something that can be forgotten: a Fisher, or an old task's data.

    Returns:
        ``frozen`` or ``update``.
    """
    return "frozen" if old or penalty != "none" else "update"


def _with_statistics(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            yield module


@contextmanager
def seeded(seed: int, group: ProcessGroup | None = None) -> Iterator[None]:
    """Seed torch's global generators (dropout knows no other) and put them back afterwards.

    Each process of a group draws other numbers.
    """
    with torch.random.fork_rng():
        torch.manual_seed((seed + place_in(group)[0] * APART) % 2**63)
        yield


def train_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor] | None],
    likelihood: Likelihood,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    *,
    penalty: Penalty | MergedPenalty | None = None,
    penalty_step: str = "gradient",
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    mixed_precision: str = "no",
    scaler: torch.amp.GradScaler | None = None,
    first_step: int = 0,
    max_steps: int | None = None,
    norm_statistics: str = "frozen",
    on_step: Callable[[Step], None] = lambda step: None,
    group: ProcessGroup | None = None,
    stand_in: tuple[Any, Tensor] | None = None,
    settle: Callable[[float], Sequence[float]] | None = None,
) -> int:
    """Train on every batch once.

    Each optimizer step follows the gradient of

        L(θ) = −(1/units) Σ_x log p(y|x, θ) + (λ/2) Σ_i Λ_i (θ_i − μ_i)²

    where the mean is over the units of all micro-batches of the step, in all processes. The
    penalty's gradient is added once, after unscaling and before clipping (Kirkpatrick et al. 2017,
    eq. 3), or its proximal step is taken after the optimizer's.

    Args:
        model: Trained in place, in train mode.
        batches: Pairs (inputs, labels), each a micro-batch, or this process's share of one; None
            where it has no part in one.
        likelihood: The likelihood of the labels given the model's outputs.
        optimizer: Any torch optimizer that needs no closure.
        scheduler: Stepped once per optimizer step.
        penalty: None trains on the task alone.
        penalty_step: ``gradient`` or ``proximal``, which needs SGD, Adam or AdamW.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        max_grad_norm: Clips the norm of the whole gradient, that of the penalty included where it
            is added.
        mixed_precision: ``no``, ``bf16`` or ``fp16``: the autocast of the forward pass.
        scaler: The loss scaler that fp16 needs.
        first_step: Optimizer steps taken before.
        max_steps: Ends the epoch when this many steps were taken in all.
        norm_statistics: ``frozen`` keeps running statistics, ``update`` lets them follow the data.
        on_step: Called after each optimizer step.
        group: Processes that share the micro-batches: as many of them in each. A model in shards
            runs as often in each of them, on `stand_in` where there is no other batch.
        stand_in: A batch, which adds nothing; the first one unless given.
        settle: Sums the loss of a step over the processes, and with it what else they have to say.

    Returns:
        The optimizer steps taken so far, `first_step` included.

    Raises:
        NonFiniteError: The loss or the penalty is not finite; no step is taken on it.
    """
    model.train()
    if norm_statistics == "frozen":
        freeze_statistics(model)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    device = trained[0].device
    place = place_of(model)
    autocast_dtype = MIXED_PRECISION[mixed_precision]
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    step = first_step
    sharded = is_sharded(model)
    penalty_value = 0.0
    proximal = penalty if penalty_step == "proximal" else None
    if proximal is not None:
        check_proximal(optimizer)
        penalty_value = proximal.value()
    for micro_batches in _grouped(batches, gradient_accumulation_steps):
        if max_steps is not None and step >= max_steps:
            break
        parts = [batch for batch in micro_batches if batch is not None]
        (units,) = summed(group, sum(int(likelihood.units(labels).sum()) for _, labels in parts))
        if sharded:
            stand_in = stand_in or parts[0]
        loss = 0.0
        optimizer.zero_grad()
        for batch in micro_batches if sharded else parts:
            running = batch or stand_in
            assert running is not None
            inputs, labels = placed(place, *running)
            with torch.autocast(
                device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None
            ):
                outputs = model_outputs(model, inputs, labels)
            likelihood.check_labels(outputs, labels)
            micro_loss = likelihood.negative_log_likelihood(outputs, labels).sum() / max(units, 1)
            if batch is None:
                micro_loss = micro_loss * 0
            loss += float(micro_loss.detach())
            if group is None:  # Elsewhere all leave together.
                _check_loss(loss, step)
            if sharded:  # FSDP takes the mean of the gradients over the processes.
                micro_loss = micro_loss * place_in(group)[1]
            scaler.scale(micro_loss).backward()
        (loss,) = summed(group, loss) if settle is None else settle(loss)
        _check_loss(loss, step)
        if not sharded:
            _sum_gradients(trained, group)
        scaler.unscale_(optimizer)
        if penalty is not None and proximal is None:
            penalty_value = penalty.add_gradient_(value=True).item()
        if not math.isfinite(penalty_value):
            raise NonFiniteError(f"step {step + 1}: the penalty is {penalty_value}; {REMEDY}")
        gradient_norm = None
        if max_grad_norm is not None:
            gradient_norm = float(whole(nn.utils.clip_grad_norm_(trained, max_grad_norm)))
        learning_rate = optimizer.param_groups[0]["lr"]
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        before = penalty_value
        if norm_statistics == "update":
            _average_statistics(model, group)
        if scaler.get_scale() >= scale:  # a lowered scale means the scaler skipped this step
            if proximal is not None:
                penalty_value = proximal.proximal_step_(optimizer, value=True).item()
            scheduler.step()
        step += 1
        on_step(Step(step, loss, before, learning_rate, gradient_norm))
    return step


def _check_loss(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise NonFiniteError(f"step {step + 1}: the loss is {loss}; {REMEDY}")


def _sum_gradients(parameters: Sequence[nn.Parameter], group: ProcessGroup | None) -> None:
    """Sum gradients over processes: each has divided its own by the units of all."""
    if group is None:
        return
    having = summed(group, *(parameter.grad is not None for parameter in parameters))
    reached = [p for p, count in zip(parameters, having, strict=True) if count]
    for parameter in reached:  # perhaps by no example of this process
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        elif parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()
    sum_([p.grad for p in reached if p.grad is not None], group)


@torch.no_grad()
def _average_statistics(model: nn.Module, group: ProcessGroup | None) -> None:
    """Give every process the mean of the running statistics that each took of its own share."""
    if group is None:
        return
    for module in _with_statistics(model):
        statistics = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        sum_(statistics, group)
        for buffer in statistics:
            buffer /= group.size()


def _grouped(
    batches: Iterable[tuple[Any, Tensor] | None], size: int
) -> Iterator[Sequence[tuple[Any, Tensor] | None]]:
    group: list[tuple[Any, Tensor] | None] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
