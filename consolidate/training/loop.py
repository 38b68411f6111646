"""The training loop: mean negative log-likelihood per unit, and a penalty that is passed in."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _NormBase

from consolidate.estimation.batches import Place, eval_mode, model_outputs, place_of, placed
from consolidate.estimation.likelihoods import Likelihood
from consolidate.ewc.penalty import Penalty, WeightPenalty
from consolidate.options import Recipe
from consolidate.runtime.distributed import place_in, sum_, summed
from consolidate.runtime.shards import is_sharded, whole
from formats.errors import NonFiniteError

FUSED = ("cpu", "cuda", "mps", "xpu")  # devices on which torch has Adam as one kernel
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
MIXED_PRECISION = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Pair = tuple[Any, Tensor]  # inputs and labels
APART = 0x9E3779B97F4A7C15
"""Between the seeds of two processes: from the golden ratio, as no user would choose it."""

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
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Make torch's optimizer, ``adamw``, ``adam`` or ``sgd``, over the parameters that train.

    Weight decay is decoupled for AdamW, and added to the gradient for the other two.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(
            trained, lr=learning_rate, momentum=momentum, weight_decay=weight_decay
        )
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    # One pass over the memory in place of ten, and no copies.
    fused = all(parameter.device.type in FUSED for parameter in trained)
    beta1, beta2 = betas
    return kind(
        trained, lr=learning_rate, betas=(beta1, beta2), weight_decay=weight_decay, fused=fused
    )


def make_scheduler(
    name: str, optimizer: torch.optim.Optimizer, *, warmup_steps: int, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Make a schedule of the learning rate: a linear warm-up to the optimizer's, then the decay.

    ``linear`` and ``cosine`` decay to zero, ``constant`` does not; stepped once per optimizer step.
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
    """Yield one permutation of `count` examples per epoch, without end, the same for each seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(count, generator=generator).tolist()


def freeze_statistics(model: nn.Module) -> None:
    """Freeze running statistics: put every normalization layer that has them in eval mode.

    They are not parameters, so no penalty protects them, and they forget even under an infinite λ.
    """
    for module in with_statistics(model):
        module.eval()


def with_statistics(model: nn.Module) -> list[_NormBase]:
    """Return the layers that have running statistics."""
    return [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]


@torch.no_grad()
def remeasure_statistics(
    model: nn.Module, batches: Iterable[Pair], group: ProcessGroup | None = None
) -> None:
    """Measure running statistics again at the present weights, in place: means over `batches`.

    Each batch counts by its rows. A batch norm keeps its statistics where a channel has one value,
    which has no variance, as in training. All else runs in eval mode, so that dropout has no part.
    Counters of batches stay as they are.

    Args:
        model: Comes back with the modes that its modules had.
        batches: Pairs (inputs, labels).
        group: Processes that share the batches; all get the same means.
    """
    norms = with_statistics(model)
    momenta = [norm.momentum for norm in norms]
    counts = [None if (n := norm.num_batches_tracked) is None else n.clone() for norm in norms]
    place, seen = place_of(model), dict.fromkeys(norms, 0)

    def weigh(norm: _NormBase, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        values = [*given, *named.values()][0]
        norm.train(not isinstance(norm, BATCH_NORMS) or _has_variance(values))
        if norm.training:
            seen[norm] += len(values)
            norm.momentum = len(values) / seen[norm]

    hooks = [norm.register_forward_pre_hook(weigh, with_kwargs=True) for norm in norms]
    try:
        with eval_mode(model):
            for inputs, labels in batches:
                model_outputs(model, *placed(place, inputs, labels))
    finally:
        for norm, hook, momentum, count in zip(norms, hooks, momenta, counts, strict=True):
            hook.remove()
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)
    for norm, rows in seen.items():
        _average_statistics([norm], group, rows)


def _has_variance(values: Tensor) -> bool:
    """Return whether each channel of a batch norm's inputs has several values."""
    return values.numel() > values.shape[1]


def default_statistics(penalty: str, *, old: bool) -> str:
    """Return the default of `norm_statistics`, the same for all penalties but ``none``.

    `old` says whether something can be forgotten: a Fisher, or an old task's data.
    """
    return "frozen" if old or penalty != "none" else "update"


@contextmanager
def seeded(seed: int, group: ProcessGroup | None = None) -> Iterator[None]:
    """Seed torch's global generators, which dropout draws from, and restore them afterwards.

    Each process of a group draws different numbers.
    """
    with torch.random.fork_rng():
        torch.manual_seed((seed + place_in(group)[0] * APART) % 2**63)
        yield


def training_steps(
    model: nn.Module,
    batches: Iterable[Pair | None],
    likelihood: Likelihood,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    recipe: Recipe,
    *,
    penalty: WeightPenalty | None = None,
    scaler: torch.amp.GradScaler | None = None,
    first_step: int = 0,
    group: ProcessGroup | None = None,
    stand_in: Pair | None = None,
    sum_loss: Callable[[float], Sequence[float]] | None = None,
) -> Iterator[Step]:
    """Train on every batch once, one optimizer step for each item.

    Each step follows the gradient of

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
        recipe: Its `penalty_step`, `gradient_accumulation_steps`, `max_grad_norm` (which clips the
            norm of the gradient, including the penalty's where it is added),
            `mixed_precision` (the autocast of the forward pass) and `norm_statistics`.
        penalty: None trains on the task alone.
        scaler: The loss scaler that fp16 needs.
        first_step: Optimizer steps taken before.
        group: Processes that share the micro-batches: as many of them in each. A sharded model runs
            as often in each of them, on `stand_in` where there is no other batch.
        stand_in: A batch, which adds nothing; the first one unless given.
        sum_loss: Sums the loss of a step over the processes, and with it what else they have to
            say; the sum alone unless given.

    Yields:
        What each step reports, once it is taken.

    Raises:
        NonFiniteError: The loss or the penalty is not finite; no step is taken on it.
    """
    model.train()
    if recipe.norm_statistics != "update":
        freeze_statistics(model)
    tracking = [m for m in with_statistics(model) if m.training]
    norms = [m for m in tracking if isinstance(m, BATCH_NORMS)]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    # Nothing else takes sparse gradients; momentum would be sparse too, and could not be saved.
    plain = recipe.max_grad_norm is None and isinstance(optimizer, torch.optim.SGD)
    plain = plain and not any(g["momentum"] or g["weight_decay"] for g in optimizer.param_groups)
    place, sharded = place_of(model), is_sharded(model)
    scaler = scaler or torch.amp.GradScaler(place.device.type, enabled=False)
    scaler.scale(torch.zeros((), device=place.device))  # as a first step without rows does not
    proximal = penalty if recipe.penalty_step == "proximal" else None
    assert proximal is None or isinstance(proximal, Penalty)  # others have no step of their own
    penalty_value, valued_at = 0.0, None
    grouped = _grouped(batches, recipe.gradient_accumulation_steps)
    for step, micro_batches in enumerate(grouped, first_step + 1):
        if proximal is not None and proximal.ewc_lambda != valued_at:
            penalty_value, valued_at = proximal.value(), proximal.ewc_lambda
        parts = [batch for batch in micro_batches if batch is not None]
        (units,) = summed(group, sum(int(likelihood.units(labels).sum()) for _, labels in parts))
        if sharded:
            stand_in = stand_in or parts[0]
        loss = 0.0
        optimizer.zero_grad()
        for batch in micro_batches if sharded else parts:
            running = batch or stand_in
            assert running is not None
            with _several_values(norms if len(running[1]) == 1 else ()):
                micro_loss = _loss(model, place, running, likelihood, recipe) / max(units, 1)
            if batch is None:
                micro_loss = micro_loss * 0
            loss += float(micro_loss.detach())
            if group is None:  # Elsewhere all leave together.
                _check_finite("loss", loss, step)
            if sharded:  # FSDP takes the mean of the gradients over the processes.
                micro_loss = micro_loss * place_in(group)[1]
            scaler.scale(micro_loss).backward()
        (loss,) = summed(group, loss) if sum_loss is None else sum_loss(loss)
        _check_finite("loss", loss, step)
        if not sharded:
            _sum_gradients(trained, group)
        if not plain:
            _make_dense(trained)
        scaler.unscale_(optimizer)
        if penalty is not None and proximal is None:
            penalty_value = penalty.value_and_add_gradient_().item()
        _check_finite("penalty", penalty_value, step)
        gradient_norm = None
        if recipe.max_grad_norm is not None:
            gradient_norm = float(whole(nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)))
        taken = Step(step, loss, penalty_value, optimizer.param_groups[0]["lr"], gradient_norm)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if recipe.norm_statistics == "update":
            _average_statistics(tracking, group, sum(len(labels) for _, labels in parts))
        if scaler.get_scale() >= scale:  # a lowered scale means the scaler skipped this step
            if proximal is not None:
                penalty_value = proximal.proximal_step_and_value_(optimizer).item()
            scheduler.step()
        yield taken


@contextmanager
def _several_values(norms: Iterable[nn.Module]) -> Iterator[None]:
    """Normalize by running statistics where a channel has one value, which has no variance."""

    def choose(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        norm.train(_has_variance(given[0]))

    hooks = [norm.register_forward_pre_hook(choose) for norm in norms]
    try:
        yield
    finally:
        for norm, hook in zip(norms, hooks, strict=True):
            hook.remove()
            norm.train()


def _loss(
    model: nn.Module, place: Place, batch: Pair, likelihood: Likelihood, recipe: Recipe
) -> Tensor:
    """Return −Σ_x log p(y|x, θ) over a batch, with its graph."""
    inputs, labels = placed(place, *batch)
    dtype = MIXED_PRECISION[recipe.mixed_precision]
    with torch.autocast(place.device.type, dtype=dtype, enabled=dtype is not None):
        outputs = model_outputs(model, inputs, labels)
    likelihood.check_labels(outputs, labels)
    return likelihood.negative_log_likelihood(outputs, labels).sum()


def _check_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise NonFiniteError(f"step {step}: the {name} is {value}; {REMEDY}")


def _sum_gradients(parameters: Sequence[nn.Parameter], group: ProcessGroup | None) -> None:
    """Sum gradients over processes: each has divided its own by the units of all."""
    if group is None:
        return
    having = summed(group, *(parameter.grad is not None for parameter in parameters))
    reached = [p for p, count in zip(parameters, having, strict=True) if count]
    for parameter in reached:  # perhaps by no example of this process
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    _make_dense(reached)
    sum_([p.grad for p in reached if p.grad is not None], group)


def _make_dense(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()


@torch.no_grad()
def _average_statistics(
    layers: Sequence[nn.Module], group: ProcessGroup | None, weight: float
) -> None:
    """Give every process the mean of the running statistics that each took of its own share.

    `weight` is what this process's count in the mean: its rows.
    """
    if group is None or not layers:
        return
    (total,) = summed(group, weight)
    if not total:
        return
    for module in layers:
        statistics = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        for buffer in statistics:
            buffer *= weight
        sum_(statistics, group)
        for buffer in statistics:
            buffer /= total


def _grouped(batches: Iterable[Pair | None], size: int) -> Iterator[Sequence[Pair | None]]:
    """Yield `size` batches at a time, fewer at the end."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group
