"""Measuring the Fisher of a task's encoded examples: which of them, how, and what that takes."""

import logging
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.distributed import ProcessGroup

from consolidate.chain.resume import KeptPass
from consolidate.data.examples import Examples, subset
from consolidate.estimation.batches import model_outputs, place_of, placed
from consolidate.estimation.estimates import FisherDiagonal
from consolidate.estimation.fisher_diagonal import ESTIMATORS, fisher_diagonal
from consolidate.estimation.likelihoods import get_likelihood
from consolidate.models.adapters import without_fisher
from consolidate.models.model import Model
from consolidate.runtime import signals
from consolidate.runtime.distributed import dealt, place_in
from consolidate.runtime.progress import progress
from consolidate.runtime.shards import is_sharded
from formats.errors import UsageError
from formats.fisher_json import Ledger

LOG = logging.getLogger("consolidate")

MOST_EXACT_OUTCOMES = 16
"""Up to here the default estimator is exact, beyond it mc."""

MAX_OUTCOMES = 4096
"""``exact`` is refused above so many backward passes per example, unless told otherwise."""

SAMPLED_BATCHES = 3
"""Batches that the time of a whole pass is judged by."""


def measure_fisher(
    model: Model,
    examples: Examples,
    *,
    label: str,
    estimator: str,
    mc_samples: int,
    max_outcomes: int,
    max_examples: int | None,
    batch_size: int,
    seed: int,
    tolerance: float | None = None,
    accumulate_dtype: torch.dtype = torch.float32,
    check: bool = False,
    kept: KeptPass | None = None,
    group: ProcessGroup | None = None,
) -> FisherDiagonal:
    """Measure the Fisher of encoded examples, with progress on stderr.

    Args:
        model: A loaded model.
        examples: Its task's data.
        label: What the progress is headed with.
        estimator: ``exact``, ``mc``, ``empirical`` or ``batched``.
        mc_samples: Labels drawn per example by ``mc``.
        max_outcomes: ``exact`` is refused above this many backward passes per example.
        max_examples: Size of a seeded random subset.
        batch_size: Examples read and run at a time.
        seed: Of the subset, of the order where there is a tolerance, and of the sampled labels.
        tolerance: Read in random order, and stop once every trace is this certain.
        accumulate_dtype: Of the sums, and what gradients are squared in.
        check: Hold every batch against single examples and autograd, not only the first.
        kept: Where to go on, and what keeps the pass in case that it is broken off.
        group: The processes that the batches are dealt to.

    Returns:
        The Fisher diagonal by the module's parameter names.
    """
    everything = subset(len(examples), max_examples, seed, shuffled=tolerance is not None)
    if is_sharded(model.module) and estimator != "batched":
        batch_size = 1  # They go alone, and so come out as evenly as they can.
    order = dealt(everything, batch_size, group)
    if group is not None:
        label = f"{label}, process 1 of {group.size()}"
    start = None if kept is None else kept.start()
    done = 0 if start is None else start.examples
    if done:
        LOG.info("going on after %d of %d examples", done, len(order))
    with (
        signals.waiting(kept is not None),
        progress(label, len(order), "examples", before=done) as advance,
    ):
        diagonal = fisher_diagonal(
            model.module,
            examples.batches(batch_size, order=order),
            get_likelihood(model.objective.likelihood),
            estimator=estimator,
            mc_samples=mc_samples,
            max_outcomes=max_outcomes,
            seed=seed,
            accumulate_dtype=accumulate_dtype,
            indices=order,
            check=check,
            tolerance=tolerance,
            start=start,
            keep=None if kept is None else kept.keep,
            note=LOG.info,
            progress=advance,
            group=group,
        )
        if kept is not None:
            kept.end()
    uncertain = max(diagonal.relative_errors.values(), default=0.0)
    if tolerance is not None and uncertain > tolerance:
        LOG.info(
            "all %d examples were read, and the least certain trace is known to ± %.2g only, "
            "not to the tolerance of %g",
            diagonal.examples,
            uncertain,
            tolerance,
        )
    return diagonal


def estimator_options(
    model: Model,
    examples: Examples,
    *,
    estimator: str | None,
    mc_samples: int | None,
    max_outcomes: int | None,
    check: bool,
    prefix: str = "",
) -> dict[str, Any]:
    """Choose the estimator, and refuse options that do nothing with it.

    Args:
        model: A loaded model.
        examples: Its task's data.
        estimator: None takes ``exact`` up to 16 outcomes and ``mc`` beyond.
        mc_samples: Labels drawn per example; 1 unless given.
        max_outcomes: The limit of ``exact``; MAX_OUTCOMES unless given.
        check: Whether every batch is held against single examples.
        prefix: Of the options' names, for the message.

    Returns:
        These options as `measure_fisher` takes them.

    Raises:
        UsageError: One that was given does nothing with the estimator.
    """
    chosen = estimator or default_estimator(model, examples)
    for option, given, sensible in (
        ("mc-samples", mc_samples is not None, ("mc", "batched")),
        ("max-outcomes", max_outcomes is not None, ("exact",)),
        ("check", check, ("exact", "mc", "empirical")),
    ):
        if given and chosen in ESTIMATORS and chosen not in sensible:
            which = "" if estimator else ", the default for this model"
            raise UsageError(
                f"--{prefix}{option} has no meaning with --{prefix}estimator {chosen}{which}: "
                f"leave it out, or use {' or '.join(sensible)}"
            )
    return {
        "estimator": chosen,
        "mc_samples": 1 if mc_samples is None else mc_samples,
        "max_outcomes": MAX_OUTCOMES if max_outcomes is None else max_outcomes,
        "check": check,
    }


def default_estimator(model: Model, examples: Examples) -> str:
    """Return ``exact`` where an example has up to 16 outcomes, and ``mc`` beyond.

    Args:
        model: A loaded model.
        examples: Its task's data.
    """
    training = model.module.training
    model.module.eval()
    with torch.no_grad():
        batch = next(iter(examples.batches(1, order=[0])))
        inputs, labels = placed(place_of(model.module), *batch)
        outputs = model_outputs(model.module, inputs, labels)
    model.module.train(training)
    outcomes = get_likelihood(model.objective.likelihood).outcomes(outputs, labels)
    return "exact" if outcomes <= MOST_EXACT_OUTCOMES else "mc"


def pass_cost(
    model: Model,
    examples: Examples,
    *,
    estimator: str,
    max_examples: int | None,
    batch_size: int,
    seed: int,
    group: ProcessGroup | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Say what measuring the Fisher of encoded examples would take, from a few batches of them.

    Args:
        model: A loaded model.
        examples: Its task's data.
        estimator: As of `measure_fisher`, like all that follow.
        max_examples: Size of the subset.
        batch_size: Examples at a time.
        seed: Of the subset.
        group: The processes that the batches would be dealt to; each looks for itself.
        options: Others that `fisher_diagonal` takes.

    Returns:
        Counts of parameters and examples, seconds per example and in all, the bytes of memory that
        the process (and the device) had in use at most, with the longest examples in a batch.
    """
    order = subset(len(examples), max_examples, seed)
    processes = place_in(group)[1]
    shuffled = subset(len(examples), max_examples, seed, shuffled=True)
    sample = shuffled[: batch_size * SAMPLED_BATCHES]
    # The last batch is the longest and not timed.
    longest = sorted(order, key=examples.length, reverse=True)[:batch_size]
    device = next(model.module.parameters()).device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    times = [time.perf_counter()]

    def clock(count: int) -> None:
        if cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())

    batches = [*examples.batches(batch_size, order=sample)]
    diagonal = fisher_diagonal(
        model.module,
        [*batches, examples.collate(longest)],
        get_likelihood(model.objective.likelihood),
        estimator=estimator,
        seed=seed,
        indices=[*sample, *longest],
        progress=clock,
        **options,
    )
    # The first batch is checked, which takes longer.
    checked, *others = [after - before for before, after in pairwise(times)][: len(batches)]
    each = sum(others) / (len(sample) - batch_size) if others else checked / len(sample)
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "estimator": estimator,
        "examples": len(order),
        "parameters": sum(values.numel() for values in diagonal.values()),
        "seconds_per_example": each,
        "seconds": checked + each * max(0, len(order) / processes - batch_size),
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "peak_device_memory": torch.cuda.max_memory_allocated(device) if cuda else None,
    }


def fisher_summary(ledger: Ledger, diagonal: FisherDiagonal) -> dict[str, Any]:
    """Give what a command reports of a Fisher that was measured.

    Args:
        ledger: With the task as its last.
        diagonal: The task's Fisher.

    Returns:
        The task, how it was merged, counts, and by layer the trace and its relative error.
    """
    errors = {name: e for name, e in diagonal.relative_errors.items() if math.isfinite(e)}
    return {
        "task": ledger.tasks[-1].name,
        "weight": ledger.tasks[-1].weight,
        "merge_rule": ledger.merge_rule,
        "gamma": ledger.gamma,
        "estimator": diagonal.estimator,
        "examples": diagonal.examples,
        "units": diagonal.units,
        "parameters": sum(values.numel() for values in diagonal.values()),
        "trace": sum(diagonal.trace().values()),
        "layers": {
            layer: {"trace": trace, "relative_error": errors.get(layer)}
            for layer, trace in diagonal.trace().items()
        },
        "methods": dict(Counter(diagonal.methods.values())),
    }


def log_notes(model: Model, examples: Examples, diagonal: FisherDiagonal) -> None:
    """Tell what a user should know of a model, its examples and the Fisher measured on them.

    Args:
        model: The loaded model.
        examples: What was read.
        diagonal: What was measured.
    """
    factors = [] if model.checkpoint.base is None else without_fisher(model, diagonal)
    for note in [*model.notes, *examples.notes(), *factors]:
        LOG.info("%s", note)
    slow = [name for name, method in diagonal.methods.items() if method == "loop"]
    if slow and diagonal.examples > 1:
        LOG.info(
            "%d parameters went by one example at a time, which is slow: %s",
            len(slow),
            _first_three(slow),
        )
    if unreached := diagonal.unreached:
        LOG.info(
            "the Fisher of %d parameters is zero, since the loss does not depend on them: %s",
            len(unreached),
            _first_three(unreached),
        )


def _first_three(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
