"""Measure the Fisher of a task's encoded examples: the order they are read in, the estimator."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from consolidate.chain.resume import KeptPass, KeptWork
from consolidate.data.examples import Examples, subset
from consolidate.estimation.batches import eval_mode, model_outputs, place_of, placed
from consolidate.estimation.estimates import FisherDiagonal
from consolidate.estimation.fisher_diagonal import check_outcomes, fisher_diagonal, measurable
from consolidate.estimation.likelihoods import get_likelihood
from consolidate.models.model import Model
from consolidate.options import EXACT_UP_TO, Estimation, FinetuneOptions, FisherOptions
from consolidate.runtime import signals
from consolidate.runtime.devices import dtype_of_name
from consolidate.runtime.distributed import all_processes, dealt, place_in
from consolidate.runtime.progress import progress
from consolidate.runtime.shards import is_sharded
from formats.errors import UsageError

LOG = logging.getLogger("consolidate")

MAX_OUTCOMES = 4096
"""Most backward passes per example of ``exact``, unless ``max_outcomes`` is given."""

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
            **estimator_arguments(estimation, structure, seed),
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


def estimator_arguments(estimation: Estimation, structure: str, seed: int) -> dict[str, Any]:
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
        "kernel": estimation.kernel,
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
        ("kernel", estimation.kernel, ("exact", "mc", "empirical")),
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


def check_measurable(model: Model, examples: Examples, estimation: Estimation, seed: int) -> None:
    """Refuse before a training what the Fisher that is asked for would refuse after it."""
    if any(p.requires_grad for p in model.module.parameters()):  # else nothing can be trained
        measurable(model.module)
    if estimation.estimator == "exact" or estimation.max_outcomes is not None:  # only exact has it
        measured = subset(len(examples), estimation.max_examples, seed)
        most = estimation.max_outcomes or MAX_OUTCOMES
        check_outcomes(_outcomes(model, examples, measured), most)


def default_estimator(model: Model, examples: Examples) -> str:
    """Return ``exact`` where an example has up to EXACT_UP_TO outcomes, and ``mc`` beyond."""
    return "exact" if _outcomes(model, examples, range(len(examples))) <= EXACT_UP_TO else "mc"


def _outcomes(model: Model, examples: Examples, measured: Sequence[int]) -> int:
    """Return how many outcomes the longest of some examples has."""
    longest = max(measured, key=examples.length)
    with eval_mode(model.module), torch.no_grad():
        batch = next(iter(examples.batches(1, order=[longest])))
        inputs, labels = placed(place_of(model.module), *batch)
        outputs = model_outputs(model.module, inputs, labels)
    return get_likelihood(model.objective.likelihood).outcomes(outputs, labels)
