"""How a fine-tuning descends: its recipe, its steps, and what is measured on the way."""

import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from consolidate.chain.resume import KeptTraining, KeptWork
from consolidate.commands.task_metrics import evaluate_all
from consolidate.data.examples import subset
from consolidate.estimation.likelihoods import get_likelihood
from consolidate.models.lora import end_adapting
from consolidate.models.model import Model, file_weights
from consolidate.options import Recipe
from consolidate.runtime import signals
from consolidate.runtime.distributed import from_first, is_first, place_in, shares
from consolidate.runtime.progress import progress
from consolidate.runtime.shards import is_sharded, local
from consolidate.training.loop import (
    Step,
    data_order,
    make_optimizer,
    make_scheduler,
    seeded,
    train_epoch,
)
from consolidate.training.state import (
    Descent,
    load_trained,
    load_training,
    trained_tensors,
    training_numbers,
    training_tensors,
)
from formats.checkpoint import check_finite
from formats.errors import InputError, NonFiniteError, UsageError
from formats.partial_work import StoredWork
from formats.tensors import dtype_of

if TYPE_CHECKING:
    from consolidate.commands.finetune_start import Start

LOG = logging.getLogger("consolidate")


@dataclass(frozen=True)
class Trained:
    """Where a run ended."""

    mark: str  # of this end; what several processes keep after it belongs together by it
    weights: Mapping[str, Tensor]  # by the names of the weights file, as they will be stored
    steps: list[Step]
    metrics: dict[str, dict[str, dict[str, float]]]


def train(
    start: "Start",
    recipe: Recipe,
    target: Path,
    *,
    work: KeptWork,
    found: StoredWork | None,
    beside: Mapping[str, Any],
    group: ProcessGroup | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Trained:
    """Train from the model's present weights, and give it the weights as they will be stored.

    Args:
        start: What is trained, in place.
        recipe: How.
        target: What a message calls the weights.
        work: Where the training is kept.
        found: What was kept of it.
        beside: What is kept beside it, JSON-ready.
        group: The processes that share the batches.
        on_step: Called after each optimizer step.

    Returns:
        The weights, the steps and the metrics.

    Raises:
        NonFiniteError: Training diverged.
        UsageError: There is nothing to train.
    """
    model = start.model
    metrics = {} if found is None else dict(found.state.get("metrics", {}))
    beside = {**beside, "metrics": metrics}

    def take_metrics(when: str, same_as: str = "") -> None:
        if not start.evaluations or when in metrics:
            return
        if same_as in metrics:
            metrics[when] = metrics[same_as]
            return
        # A module may draw in eval mode too; training must not see.
        # Several processes stop together, after a measurement; before the first step at once.
        waits = group is not None and when != "before"
        with signals.waiting(waits), torch.random.fork_rng():
            metrics[when] = evaluate_all(
                model,
                start.evaluations,
                batch_size=recipe.batch_size,
                with_heads=start.with_heads,
                group=group,
            )
        for measured, values in metrics[when].items():
            LOG.info("%s: %s %s", when, measured, _in_words(values))

    def end_adapter() -> None:
        if start.frozen is not None:
            end_adapting(model, start.frozen, start.with_heads.values())

    weights: Mapping[str, Tensor]
    if found is not None and "trained" in found.state:
        end_adapter()
        steps = load_trained(model.module, found.tensors)
        LOG.info("going on after the last of %d steps", len(steps))
        weights, mark = stored_weights(model, group), str(found.state["trained"])
    else:
        take_metrics("before")
        kept = KeptTraining(work, found, beside)
        steps = descend(start, recipe, take_metrics, group, kept, on_step)
        end_adapter()
        weights = stored_weights(model, group)
        try:
            check_finite(weights, target)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"training diverged: {error}; lower --learning-rate or --ewc-lambda"
            ) from None
        take_stored_values(model, weights)
        mark = from_first(secrets.token_hex(8), group)
    trained = Trained(mark, weights, steps, metrics)
    try:
        take_metrics("after")
    except signals.STOPS as stop:
        if work.can_keep(stop):
            work.keep(*kept_of(model, trained, beside), "training")
        raise
    return trained


def kept_of(
    model: Model, trained: Trained, beside: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Give what is kept of a training that has ended, tensors and JSON.

    Args:
        model: With the weights as they will be stored.
        trained: Where the training ended.
        beside: What else is kept.
    """
    tensors = trained_tensors(model.module, trained.steps)
    return tensors, {**beside, "metrics": trained.metrics, "trained": trained.mark}


def descend(
    start: "Start",
    recipe: Recipe,
    take_metrics: Callable[..., None],
    group: ProcessGroup | None = None,
    kept: KeptTraining | None = None,
    report: Callable[[Step], None] | None = None,
) -> list[Step]:
    """Take the optimizer's steps, measuring at times and after each epoch.

    Args:
        start: What is trained, in place.
        recipe: How.
        take_metrics: Called with the name of the moment, and of one that may be the same; does
            nothing where that moment was measured.
        group: The processes that share the batches.
        kept: Where to go on, and what keeps the training in case that it is broken off.
        report: Called after each step.

    Returns:
        What each step reported.

    Raises:
        NonFiniteError: The loss or the penalty is not finite.
        UsageError: There is nothing to train.
    """
    model, examples = start.model, start.examples
    chosen = subset(len(examples), recipe.max_examples, recipe.seed)
    epochs, total = run_length(len(chosen), recipe, group)
    if not any(parameter.requires_grad for parameter in model.module.parameters()):
        raise UsageError("--freeze leaves no parameter to train")
    optimizer = make_optimizer(
        recipe.optimizer,
        model.module.parameters(),
        learning_rate=recipe.learning_rate,
        momentum=recipe.momentum or 0.0,
        weight_decay=recipe.weight_decay,
    )
    schedule = make_scheduler(
        recipe.lr_scheduler, optimizer, warmup_steps=recipe.warmup_steps, total_steps=total
    )
    device = next(model.module.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.mixed_precision == "fp16")
    steps: list[Step] = []
    descent = Descent(model.module, optimizer, schedule, scaler, steps)
    found = None if kept is None else kept.start()
    orders = data_order(len(chosen), recipe.seed)
    step_size = recipe.batch_size * recipe.gradient_accumulation_steps * place_in(group)[1]
    per_epoch = -(-len(chosen) // step_size)

    def keep() -> None:
        if kept is not None and steps:
            kept.keep(training_tensors(descent), training_numbers(descent))

    def measure(when: str, same_as: str = "") -> None:
        try:
            take_metrics(when, same_as)
        except signals.STOPS as stop:
            if kept is not None and kept.can_keep(stop):
                keep()
            raise

    def measure_step() -> None:
        every = recipe.evaluate_every
        if every and steps and (len(steps) % every == 0 or len(steps) == total):
            measure(f"step {len(steps)}")

    def on_step(step: Step) -> None:
        steps.append(step)
        advance(1)
        if report is not None:
            report(step)
        if step.step % recipe.log_every == 0 or step.step == total:
            LOG.info(
                "step %d of %d: loss %.4f, penalty %.4g, learning rate %.3g",
                step.step,
                total,
                step.loss,
                step.penalty,
                step.learning_rate,
            )
        if kept is not None and kept.due():
            keep()
            kept.stop_if_asked(f"after step {step.step} of {total}")
        measure_step()

    with seeded(recipe.seed, group), signals.waiting(kept is not None):
        if found is not None:
            load_training(descent, found.tensors, found.state["training"])
            found.tensors.clear()  # they take as much memory as what they were copied to
            LOG.info("going on from step %d of %d", len(steps), total)
        with progress("training", total, "steps", before=len(steps)) as advance:
            measure_step()
            for epoch in range(epochs):
                if epoch * per_epoch >= total:
                    break
                order = next(orders)
                done = len(steps) - epoch * per_epoch
                if done > per_epoch:
                    continue
                left = [chosen[i] for i in order[done * step_size :]]
                stand_in = None
                if is_sharded(model.module):  # the same wherever the epoch is gone on with
                    stand_in = examples.collate(chosen[: recipe.batch_size], epoch)
                train_epoch(
                    model.module,
                    (
                        examples.collate(share, epoch) if share else None
                        for share in shares(left, recipe.batch_size, group)
                    ),
                    get_likelihood(model.objective.likelihood),
                    optimizer,
                    schedule,
                    penalty=start.penalty,
                    penalty_step=recipe.penalty_step,
                    gradient_accumulation_steps=recipe.gradient_accumulation_steps,
                    max_grad_norm=recipe.max_grad_norm,
                    mixed_precision=recipe.mixed_precision,
                    scaler=scaler,
                    first_step=len(steps),
                    max_steps=total,
                    norm_statistics=recipe.norm_statistics or "frozen",
                    on_step=on_step,
                    group=group,
                    stand_in=stand_in,
                    settle=None if kept is None else kept.settle,
                )
                measure(f"epoch {epoch + 1}", f"step {len(steps)}")
            if kept is not None:
                kept.settle()
                if kept.asked():
                    keep()
                    kept.stop_if_asked(f"after the last of {total} steps")
    # What comes next needs the memory; the optimizer and its schedule hold each other.
    optimizer.zero_grad()
    optimizer.state.clear()
    return steps


def run_length(count: int, recipe: Recipe, group: ProcessGroup | None = None) -> tuple[int, int]:
    """Give the epochs and the optimizer steps of a run.

    Args:
        count: The examples that it trains on.
        recipe: How it descends.
        group: The processes that share the batches.
    """
    each_step = recipe.batch_size * recipe.gradient_accumulation_steps * place_in(group)[1]
    per_epoch = -(-count // each_step)
    epochs, most = recipe.epochs, recipe.max_steps
    if epochs is None:
        epochs = 1 if most is None else -(-most // per_epoch)
    total = epochs * per_epoch
    return epochs, total if most is None else min(total, most)


def stored_weights(model: Model, group: ProcessGroup | None) -> Mapping[str, Tensor]:
    """Give the module's present values as the weights file's tensors; see `file_weights`.

    Args:
        model: In shards or not.
        group: The processes that hold shards.

    Returns:
        By file name. Of a model in shards the first process has them all on the CPU, gathered one
        after the other; the others have none.
    """
    weights = file_weights(model)
    if not is_sharded(model.module):
        return weights
    gathered = {}
    for name in weights:
        values = weights[name]
        if is_first(group):
            gathered[name] = values.cpu()
    return gathered


@torch.no_grad()
def take_stored_values(model: Model, stored: Mapping[str, Tensor]) -> None:
    """Give the module the values as they are stored: F is measured at exactly these.

    Args:
        model: Changed in place.
        stored: Values by the names of the weights file; not looked at where the model is in shards,
            which are rounded where they are.
    """
    if is_sharded(model.module):
        _round_shards(model)
        return
    state = model.module.state_dict()
    for group in model.layout.groups:  # one at a time, as each may have to be made
        parts = {name: stored[name] for name in group.file_names}
        for name, values in model.layout.to_module(parts).items():
            state[name].copy_(values)


def _round_shards(model: Model) -> None:
    """Round the module's values to what the file can hold, in place."""
    state, weights = model.module.state_dict(), model.checkpoint.weights
    for group in model.layout.groups:
        dtypes = {dtype_of(weights, name) for name in group.file_names}
        if len(dtypes) > 1:
            raise InputError(
                f"{group.file_names[0]} and others of other dtypes are one tensor in the model, "
                "which --shard cannot round alike: store them in one dtype"
            )
        (dtype,) = dtypes
        for name in group.module_names:
            values = local(state[name])
            values.copy_(values.to(dtype))


def _in_words(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:.4f}" for key, value in metrics.items() if key != "score")
