"""Measure the Fisher of a task's encoded examples: subset, estimator, cost."""

import logging
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from consolidate.chain.resume import KeptPass, KeptWork
from consolidate.chain.tasks import Encoded
from consolidate.chain.up_to_date import recorded_fisher
from consolidate.data.columns import default_loss
from consolidate.data.examples import Examples, subset
from consolidate.estimation.batches import model_outputs, place_of, placed
from consolidate.estimation.estimates import FisherDiagonal
from consolidate.estimation.fisher_diagonal import fisher_diagonal
from consolidate.estimation.likelihoods import get_likelihood
from consolidate.models.adapters import without_fisher
from consolidate.models.model import Model
from consolidate.options import (
    EXACT_UP_TO,
    Columns,
    Encoding,
    Estimation,
    FinetuneOptions,
    FisherOptions,
)
from consolidate.results import EncodedAs, MeasuredFisher, PassCost
from consolidate.runtime import signals
from consolidate.runtime.devices import dtype_of_name
from consolidate.runtime.distributed import all_processes, dealt, place_in
from consolidate.runtime.progress import progress
from consolidate.runtime.shards import is_sharded
from formats.errors import UsageError
from formats.fisher_json import Ledger, covered
from formats.rows import Rows
from formats.wording import few

LOG = logging.getLogger("consolidate")

MAX_OUTCOMES = 4096
"""Most backward passes per example of ``exact``, unless ``max_outcomes`` is given."""

SAMPLED_BATCHES = 3
"""Batches from which the time of a whole pass is estimated."""

SAMPLED_LABELS = 8
"""Labels of an example, at most, from which the time of more is estimated."""

WINDOW = 4
"""With a tolerance, the batches of each process within which texts are sorted by length.

Four save four fifths of the padding on 20 Newsgroups; the more there are, the later the pass ends.
"""


def kept_work(
    options: FisherOptions | FinetuneOptions,
    target: Path,
    description: Callable[[], Mapping[str, Any]],
    result_bytes: int,
) -> KeptWork:
    """Prepare to save the progress of a command beside its target, by its options."""
    return KeptWork(
        target,
        description,
        every=60 * options.saving.save_every_minutes,
        result_bytes=result_bytes,
        restart=options.saving.restart,
        group=all_processes(),
        shard=options.parameters.shard,
    )


def measure_fisher(
    model: Model,
    examples: Examples,
    estimation: Estimation,
    *,
    task: str,
    seed: int,
    structure: str,
    kept: KeptPass,
) -> FisherDiagonal:
    """Measure the Fisher of encoded examples by a settled estimation, with progress on stderr.

    `kept` resumes and saves the pass, whose batches are divided among all processes.
    """
    tolerance, group = estimation.tolerance, all_processes()
    assert estimation.batch_size is not None
    batch_size = estimation.batch_size
    if is_sharded(model.module) and estimation.estimator != "batched":
        batch_size = 1  # examples go one by one, which divides them most evenly
    everything, every = reading_order(examples, estimation, batch_size, seed)
    order = dealt(everything, batch_size, group)
    several = "" if group is None else f", process 1 of {group.size()}"
    start = kept.start()
    done = 0 if start is None else start.examples
    if done:
        LOG.info("resuming after %d of %d examples", done, len(order))
    with (
        signals.waiting(),
        progress(
            f"Fisher of {task}{several}", len(order), "examples", before=done, phase="fisher"
        ) as advance,
    ):
        diagonal = fisher_diagonal(
            model.module,
            examples.batches(batch_size, order=order),
            get_likelihood(model.objective.likelihood),
            **_how(estimation, structure, seed),
            tolerance_every=every,
            indices=order,
            start=start,
            keep=kept.keep,
            note=LOG.info,
            progress=advance,
            group=group,
        )
        kept.end()
    uncertain = max(diagonal.relative_errors.values(), default=0.0)
    if tolerance is not None and uncertain > tolerance:
        LOG.info(
            "--tolerance %g was not reached: with all %d examples the largest relative standard "
            "error of a trace is %.2g",
            tolerance,
            diagonal.examples,
            uncertain,
        )
    return diagonal


def reading_order(
    examples: Examples, estimation: Estimation, batch_size: int, seed: int
) -> tuple[Sequence[int], int]:
    """Give the examples in reading order, and `tolerance_every` for them.

    Texts are sorted by length, the longest first, so that a batch that is too large fails at once.
    With a tolerance they are drawn at random and sorted in windows; after a whole window those that
    were read are a random sample. The result of `batched` depends on the batches: it sorts nothing.
    """
    tolerance = estimation.tolerance
    order = subset(len(examples), estimation.max_examples, seed, shuffled=tolerance is not None)
    if estimation.estimator == "batched":
        return order, 1
    window = WINDOW * batch_size * place_in(all_processes())[1]
    by_length = examples.longest_first(order, None if tolerance is None else window)
    return by_length, 1 if by_length is order else WINDOW


def of_own_labels(diagonal: FisherDiagonal) -> FisherDiagonal:
    """Name the estimator of generated texts with their own labels: the model drew them, as `mc`."""
    if diagonal.estimator == "empirical":
        diagonal.estimator, diagonal.mc_samples = "mc", 1
    return diagonal


def _how(estimation: Estimation, structure: str, seed: int) -> dict[str, Any]:
    """Give the arguments of `fisher_diagonal` that choose the estimator."""
    return {
        "estimator": estimation.estimator,
        "mc_samples": estimation.mc_samples,
        "max_outcomes": estimation.max_outcomes,
        "tolerance": estimation.tolerance,
        "seed": seed,
        "structure": structure,
        "accumulate_dtype": dtype_of_name(estimation.accumulate_dtype),
        "check": estimation.check,
    }


def settled_estimation(
    estimation: Estimation, model: Model, examples: Examples | None = None, *, prefix: str = ""
) -> Estimation:
    """Choose the estimator by examples if none is given, and fill in what depends on it.

    Raises UsageError for a given option that the estimator does not use; `prefix` is that of the
    options' names.
    """
    chosen = estimation.estimator
    if chosen is None:
        assert examples is not None
        chosen = default_estimator(model, examples)
    for option, given, sensible in (
        ("mc-samples", estimation.mc_samples is not None, ("mc", "batched")),
        ("max-outcomes", estimation.max_outcomes is not None, ("exact",)),
        ("check", estimation.check, ("exact", "mc", "empirical")),
    ):
        if given and chosen not in sensible:
            which = "" if estimation.estimator else ", the default for this model"
            raise UsageError(
                f"--{prefix}{option} cannot be combined with --{prefix}estimator {chosen}{which}: "
                f"leave it out, or use {' or '.join(sensible)}"
            )
    return replace(
        estimation,
        estimator=chosen,
        mc_samples=estimation.mc_samples or 1,
        max_outcomes=estimation.max_outcomes or MAX_OUTCOMES,
    )


def settled_on_texts(estimation: Estimation, model: Model, *, unchanged: bool) -> Estimation:
    """Settle the estimator on texts that the model generated: `empirical` takes their own labels.

    They are a sample of the model's own distribution if the texts are (`unchanged`), and are used
    unless other labels are asked for.
    """
    asked = estimation.estimator is not None or estimation.mc_samples is not None
    own = "empirical" if unchanged and not asked else "mc"
    return settled_estimation(replace(estimation, estimator=estimation.estimator or own), model)


def default_estimator(model: Model, examples: Examples) -> str:
    """Return ``exact`` where an example has up to EXACT_UP_TO outcomes, and ``mc`` beyond."""
    training = model.module.training
    model.module.eval()
    with torch.no_grad():
        batch = next(iter(examples.batches(1, order=[0])))
        inputs, labels = placed(place_of(model.module), *batch)
        outputs = model_outputs(model.module, inputs, labels)
    model.module.train(training)
    outcomes = get_likelihood(model.objective.likelihood).outcomes(outputs, labels)
    return "exact" if outcomes <= EXACT_UP_TO else "mc"


def pass_cost(
    model: Model,
    examples: Examples,
    estimation: Estimation,
    structure: str,
    *,
    seed: int,
    count: int | None = None,
) -> tuple[PassCost, int]:
    """Estimate the cost of measuring the Fisher of encoded examples from a few batches of them.

    Counts, seconds per example and in total, and the peak memory in bytes with the longest examples
    in a batch; and the elements of all factors. Each of several processes estimates for itself.
    The examples may be the first few of `count`.
    """
    batch_size = estimation.batch_size
    assert batch_size is not None
    order, _ = reading_order(examples, estimation, batch_size, seed)
    count = len(order) if count is None else count
    processes = place_in(all_processes())[1]
    # The first batch is checked, which takes longer; the others are spread over the order.
    labels = estimation.mc_samples or 1
    fewer = min(labels, SAMPLED_LABELS)
    few_labels = replace(estimation, mc_samples=fewer, tolerance=None)
    starts = range(0, len(order), batch_size)
    places = range(1, 2 * SAMPLED_BATCHES, 2)
    some = sorted({starts[len(starts) * place // (2 * SAMPLED_BATCHES)] for place in places})
    sample = [examples.longest_first(order)[:batch_size]]
    sample += [order[start : start + batch_size] for start in some]
    device = next(model.module.parameters()).device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    times = [time.perf_counter()]

    def clock(count: int) -> None:
        if cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())

    diagonal = fisher_diagonal(
        model.module,
        map(examples.collate, sample),
        get_likelihood(model.objective.likelihood),
        **_how(few_labels, structure, seed),
        indices=[i for batch in sample for i in batch],
        progress=clock,
    )
    checked, *others = [(after - before) * labels / fewer for before, after in pairwise(times)]
    each = sum(others) / sum(map(len, sample[1:]))
    unit = 1 if sys.platform == "darwin" else 1024
    cost: PassCost = {
        "estimator": str(estimation.estimator),
        "structure": structure,
        "examples": count,
        "parameters": sum(values.numel() for values in diagonal.values()),
        "seconds_per_example": each,
        "seconds": checked + each * max(0, count / processes - batch_size),
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "peak_device_memory": torch.cuda.max_memory_allocated(device) if cuda else None,
    }
    return cost, sum(matrix.numel() for matrix in diagonal.factors.values())


def fisher_summary(ledger: Ledger, diagonal: FisherDiagonal) -> MeasuredFisher:
    """Summarize the Fisher that was measured for a ledger's last task."""
    errors = {name: e for name, e in diagonal.relative_errors.items() if math.isfinite(e)}
    recorded = recorded_fisher(ledger)
    assert recorded is not None  # it was measured by now
    return {
        **recorded,
        "parameters": sum(values.numel() for values in diagonal.values()),
        "trace": sum(diagonal.trace().values()),
        "layers": {
            layer: {"trace": trace, "relative_error": errors.get(layer)}
            for layer, trace in diagonal.trace().items()
        },
        "methods": dict(Counter(diagonal.methods.values())),
    }


def encoding_record(encoding: Encoding, rows: Rows, columns: Columns) -> Encoded:
    """Give what the ledger records of how rows became examples."""
    usual = encoding.loss_on == default_loss(rows, columns)
    return Encoded(None if usual else encoding.loss_on, encoding.max_length)


def encoded_as(ledger: Ledger, rows: Rows, columns: Columns) -> EncodedAs:
    """Report how the rows of a ledger's last task became examples, now or earlier."""
    task = ledger.tasks[-1]
    if (generated := task.generated) is not None:
        loss_on = "all" if generated.prompts is None else "completion"
        return {"loss_on": loss_on, "max_length": generated.max_length}
    usual = default_loss(rows, columns) if task.objective == "causal-lm" else None
    return {"loss_on": task.loss_on or usual, "max_length": task.max_length}


def log_notes(
    model: Model, examples: Examples, diagonal: FisherDiagonal, used: Sequence[int]
) -> None:
    """Log notes on a model, the examples used and the Fisher measured on them."""
    factors = [] if model.checkpoint.base is None else without_fisher(model, diagonal)
    for note in [*model.notes, *examples.notes_on(used), *factors]:
        LOG.info("%s", note)
    if diagonal.blocks:
        LOG.info("%s", _coverage(model.module, diagonal))
    slow = [name for name, method in diagonal.methods.items() if method == "loop"]
    if slow and diagonal.examples > 1:
        LOG.info(
            "%d parameters were measured one example at a time, which is slow: %s",
            len(slow),
            few(slow, 3),
        )
    if unreached := diagonal.unreached:
        LOG.info(
            "the Fisher of %d parameters is zero, since the loss does not depend on them: %s",
            len(unreached),
            few(unreached, 3),
        )


def _coverage(module: nn.Module, diagonal: FisherDiagonal) -> str:
    """Report how many layers have a matrix, and which large weights have the diagonal alone."""
    size = sum(matrix.numel() for matrix in diagonal.factors.values())
    text = f"{len(diagonal.blocks)} layers are protected by matrices ({size:,} values)"
    have = covered(diagonal.blocks)
    others = [n for n, values in diagonal.items() if values.ndim > 1 and n not in have]
    others.sort(key=lambda name: -diagonal[name].numel())
    if not others:
        return text
    reasons = [f"{name} ({_why_diagonal(module, name)})" for name in others]
    return f"{text}, by the diagonal alone {few(reasons, 3)}"


def _why_diagonal(module: nn.Module, name: str) -> str:
    """Say in few words why a weight has no matrix of its layer's inputs."""
    weight = module.get_parameter(name)
    users = [m for m in module.modules() if any(p is weight for p in m._parameters.values())]
    kind = type(users[0]).__name__
    if sum(p is weight for m in users for p in m._parameters.values()) > 1:
        return "tied"
    if getattr(users[0], "groups", 1) != 1:
        return "a grouped convolution"
    many = kind in ("Linear", "Conv1D") or kind.startswith("Conv")
    return "more than 4 times as many inputs as outputs" if many else f"in {kind}"
