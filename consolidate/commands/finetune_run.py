"""Training within `finetune`: its steps, and what is measured on the way."""

import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from consolidate.chain.resume import KeptTraining, KeptWork
from consolidate.commands.finetune_weights import UNMOVED, stored_weights, take_stored_values
from consolidate.commands.task_metrics import evaluate_all
from consolidate.data.examples import Examples, subset
from consolidate.data.replay import WithReplay
from consolidate.estimation.likelihoods import get_likelihood
from consolidate.models.lora import end_adapting
from consolidate.models.model import Model
from consolidate.options import Recipe
from consolidate.results import Comparison, LambdaSearch
from consolidate.runtime import signals
from consolidate.runtime.distributed import all_processes, from_first, place_in, shares
from consolidate.runtime.progress import progress
from consolidate.runtime.shards import is_sharded
from consolidate.training.loop import (
    Step,
    data_order,
    make_optimizer,
    make_scheduler,
    seeded,
    training_steps,
)
from consolidate.training.mixture import Mixture
from consolidate.training.state import Descent, load_trained, trained_tensors
from formats.checkpoint import check_finite
from formats.errors import NonFiniteError, UsageError
from formats.partial_work import StoredWork
from formats.tensors import dtype_of

if TYPE_CHECKING:
    from consolidate.commands.finetune_budget import Controller
    from consolidate.commands.finetune_interpolation import Interpolator
    from consolidate.commands.finetune_start import Start

LOG = logging.getLogger("consolidate")


@dataclass(frozen=True)
class Trained:
    """Where a run ended."""

    mark: str  # random, of this end: marks what several processes save after it
    weights: Mapping[str, Tensor]  # by the names of the weights file, as they will be stored
    steps: list[Step]
    metrics: dict[str, dict[str, dict[str, float]]]
    beside: Mapping[str, Any]  # what is saved with it, JSON-ready


def _take_metrics(
    start: "Start",
    batch_size: int,
    metrics: dict[str, dict[str, dict[str, float]]],
    when: str,
    same_as: str = "",
) -> None:
    """Measure at this moment, unless that was done; one that is the same is not measured again."""
    if not start.evaluations or when in metrics:
        return
    if same_as in metrics:
        metrics[when] = metrics[same_as]
        if when != "after":
            return
    else:
        # A module may draw in eval mode too; training must not see.
        # Several processes stop together, after a measurement; before the first step at once.
        several = all_processes() is not None
        with signals.waiting(several and when != "before"), torch.random.fork_rng():
            scores = evaluate_all(start.model, start.evaluations, start.with_heads, batch_size)
        metrics[when] = scores
    for task, values in metrics[when].items():
        words = [f"{key} {value:.4f}" for key, value in values.items() if key != "score"]
        LOG.info("%s: %s %s", when, task, ", ".join(words))


def train(
    start: "Start",
    recipe: Recipe,
    target: Path,
    *,
    work: KeptWork,
    found: StoredWork | None,
    search: LambdaSearch | None,
    comparison: Comparison | None,
    controller: "Controller | None",
    interpolator: "Interpolator | None",
    on_step: Callable[[Step], None] | None,
) -> Trained:
    """Train from the model's present weights, and round them as they will be stored.

    `search` and `comparison` are saved with the progress; `target` names the weights in a message.
    """
    model = start.model
    state = {} if found is None else found.state
    metrics = dict(state.get("metrics", {}))
    beside: dict[str, Any] = {"search": search, "metrics": metrics}
    if comparison is not None:
        beside["comparison"] = comparison
    if controller is not None:
        beside["budget"] = controller.state
    if interpolator is not None:
        beside["interpolation"] = interpolator.state
    take_metrics = partial(_take_metrics, start, recipe.batch_size, metrics)
    if controller is not None:
        controller.begin()
    if found is not None and "trained" in state:
        _merge_adapter(start)
        steps, mark = load_trained(model.module, found.tensors), str(state["trained"])
        LOG.info("resuming after the last of %d steps", len(steps))
    else:
        take_metrics("before")
        if interpolator is not None:
            interpolator.measure_start()
            start = replace(start, examples=interpolator.examples)
    unfinished = "trained" not in state or UNMOVED in state
    with signals.waiting(unfinished):  # until the values are whole, so that they can be saved
        if "trained" not in state:
            kept = KeptTraining(work, found, beside)
            steps = descend(start, recipe, take_metrics, kept, on_step, controller)
            _merge_adapter(start)
            mark = from_first(secrets.token_hex(8), all_processes())
        if unfinished:
            if interpolator is not None:
                moving = Trained(mark, {}, steps, metrics, {**beside, UNMOVED: True})
                interpolator.apply(work, *kept_of(model, moving))
                mark = from_first(secrets.token_hex(8), all_processes())
            _take_finite_values(model, target)
        trained = Trained(mark, stored_weights(model), steps, metrics, beside)
        try:
            unrounded = start.frozen is None and interpolator is None and _stored_as_trained(model)
            epochs = [when for when in metrics if when.startswith("epoch ")]
            take_metrics("after", epochs[-1] if unrounded and epochs else "")
            work.settle()
            work.stop_if_asked("after the last step")
        except signals.STOPS as stop:
            if work.can_keep(stop):
                work.keep(*kept_of(model, trained), "training")
            raise
    return trained


def _take_finite_values(model: Model, target: Path) -> None:
    """Give the model its values as they will be stored, and refuse those that are not finite."""
    try:
        check_finite(stored_weights(model), target)
    except NonFiniteError as error:
        raise NonFiniteError(
            f"training diverged: {error}; lower --learning-rate or --ewc-lambda"
        ) from None
    take_stored_values(model)


def _stored_as_trained(model: Model) -> bool:
    """Whether the values are stored in the dtype that they are trained in."""
    weights = model.checkpoint.weights
    stored = {dtype for name in weights if (dtype := dtype_of(weights, name)).is_floating_point}
    return stored == {p.dtype for p in model.module.parameters()} and len(stored) == 1


def _merge_adapter(start: "Start") -> None:
    if start.frozen is not None:
        end_adapting(start.model, start.frozen, start.with_heads.values())


def kept_of(model: Model, trained: Trained) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Give the saved progress of a training run that has ended, tensors and JSON."""
    return trained_tensors(model.module, trained.steps), {**trained.beside, "trained": trained.mark}


def descend(
    start: "Start",
    recipe: Recipe,
    take_metrics: Callable[..., None],
    kept: KeptTraining | None = None,
    report: Callable[[Step], None] | None = None,
    controller: "Controller | None" = None,
) -> list[Step]:
    """Take the optimizer's steps, measuring at times and after each epoch.

    `take_metrics` is given a moment, and at the end of an epoch the step that may be the same; a
    controller of λ is given all steps so far, after each.
    """
    follow = (lambda steps: None) if controller is None else controller.after_step
    model, group = start.model, all_processes()
    chosen, mixture, trained_on = rows_of(start, recipe)
    total = run_length(start, recipe)
    descent = _start_descent(model, recipe, total)
    steps, kept = descent.steps, kept or KeptTraining()

    def measure() -> None:
        with kept.keeping_if_stopped(descent):
            follow(steps)
            if _is_measured(len(steps), total, recipe):
                take_metrics(f"step {len(steps)}")

    with seeded(recipe.seed, group), signals.waiting(kept.work is not None):
        if kept.load(descent):
            LOG.info("resuming from step %d of %d", len(steps), total)
        with progress("training", total, "steps", before=len(steps)) as advance:
            measure()
            for epoch, examples in _epochs_left(chosen, mixture, recipe, total, len(steps)):
                stand_in = None
                if is_sharded(model.module):  # the same wherever the epoch is resumed
                    stand_in = start.examples.collate(chosen[: recipe.batch_size], epoch)
                own = shares(examples, recipe.batch_size, group)
                micro_batches = (trained_on.collate(s, epoch) if s else None for s in own)
                for step in training_steps(
                    model.module,
                    micro_batches,
                    get_likelihood(model.objective.likelihood),
                    descent.optimizer,
                    descent.scheduler,
                    recipe,
                    penalty=start.penalty,
                    scaler=descent.scaler,
                    first_step=len(steps),
                    group=group,
                    stand_in=stand_in,
                    sum_loss=None if kept.work is None else kept.work.settle,
                ):
                    steps.append(step)
                    advance(1)
                    if report is not None:
                        report(step)
                    _log(step, total, recipe.log_every)
                    kept.after_step(descent, f"after step {step.step} of {total}")
                    measure()
                with kept.keeping_if_stopped(descent):
                    take_metrics(f"epoch {epoch + 1}", f"step {len(steps)}")
            kept.end(descent, f"after the last of {total} steps")
    # What comes next needs the memory; the optimizer and its schedule hold each other.
    descent.optimizer.zero_grad()
    descent.optimizer.state.clear()
    return steps


def _start_descent(model: Model, recipe: Recipe, total: int) -> Descent:
    module = model.module
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise UsageError("--freeze leaves no parameter to train: freeze fewer parameters")
    optimizer = make_optimizer(
        recipe.optimizer,
        module.parameters(),
        learning_rate=recipe.learning_rate,
        momentum=recipe.momentum or 0.0,
        betas=recipe.adam_betas or (0.9, 0.999),
        weight_decay=recipe.weight_decay,
    )
    schedule = make_scheduler(
        recipe.lr_scheduler, optimizer, warmup_steps=recipe.warmup_steps, total_steps=total
    )
    device = next(module.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.mixed_precision == "fp16")
    return Descent(module, optimizer, schedule, scaler, [])


def _epochs_left(
    chosen: Sequence[int], mixture: Mixture, recipe: Recipe, total: int, taken: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield the epochs that are not over after `taken` steps, with the examples left in them.

    An epoch that has only the measurement at its end left comes with no examples.
    """
    step_size, before = _step_size(recipe), 0
    for epoch, order in enumerate(data_order(len(chosen), recipe.seed)):
        if before >= total:
            return
        steps = mixture.steps(epoch, step_size)
        if taken - before <= steps:
            first, last = max(0, taken - before), total - before
            rows = mixture.mixed([chosen[i] for i in order], epoch)
            yield epoch, rows[first * step_size : last * step_size]
        before += steps


def _is_measured(step: int, total: int, recipe: Recipe) -> bool:
    every = recipe.evaluate_every
    return bool(every and step and (step % every == 0 or step == total))


def _log(step: Step, total: int, every: int) -> None:
    if step.step % every == 0 or step.step == total:
        values = (step.step, total, step.loss, step.penalty, step.learning_rate)
        LOG.info("step %d of %d: loss %.4f, penalty %.4g, learning rate %.3g", *values)


def rows_of(start: "Start", recipe: Recipe) -> tuple[list[int], Mixture, Examples]:
    """Give the new examples of an epoch, how old ones are spread among them, and both by index."""
    chosen = subset(len(start.examples), recipe.max_examples, recipe.seed)
    if (replay := start.replay) is None:
        return chosen, Mixture(len(chosen)), start.examples
    both = WithReplay(start.examples, replay.examples, recipe.seed)
    return chosen, Mixture(len(chosen), replay.share), both


def log_replay(start: "Start", recipe: Recipe) -> None:
    """Report how much is replayed, and what it adds to an epoch."""
    if start.replay is None:
        return
    size = _step_size(recipe)
    mixture = rows_of(start, recipe)[1]
    LOG.info(
        "%g%% of the rows trained on are replayed: %d in the first epoch, from %d; it takes %d "
        "steps, %d without",
        100 * start.replay.share,
        mixture.replayed(mixture.begin(1)),
        len(start.replay.examples),
        mixture.steps(0, size),
        Mixture(mixture.new).steps(0, size),
    )


def run_length(start: "Start", recipe: Recipe) -> int:
    """Count the optimizer steps of a run."""
    mixture = rows_of(start, recipe)[1]
    return mixture.length(_step_size(recipe), recipe.epochs, recipe.max_steps)


def _step_size(recipe: Recipe) -> int:
    """Give the examples of one optimizer step, in all processes together."""
    return recipe.step_examples(place_in(all_processes())[1])
