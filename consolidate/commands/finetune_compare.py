"""What the penalty saves: the same training without it, from the same start."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from consolidate.chain.resume import KeptTraining, KeptWork
from consolidate.commands.finetune_run import descend, run_length
from consolidate.commands.finetune_weights import take_stored_values
from consolidate.commands.task_metrics import evaluate_all
from consolidate.results import Comparison, LambdaSearch
from consolidate.runtime import signals
from consolidate.training.evaluation import copies_of, put_back
from formats.atomic import partial_path
from formats.errors import InputError, NonFiniteError
from formats.partial_work import StoredWork

if TYPE_CHECKING:
    from consolidate.commands.finetune_plan import Plan
    from consolidate.commands.finetune_start import Start

LOG = logging.getLogger("consolidate")

_COMPARING = "comparing"
"""Marks saved progress of the run without a penalty."""

Metrics = dict[str, dict[str, float]]


def train_without_penalty(
    plan: "Plan",
    start: "Start",
    work: KeptWork,
    found: StoredWork | None,
    search: LambdaSearch | None,
) -> tuple[Comparison | None, StoredWork | None]:
    """Compare with no penalty, if that was asked; give also the saved progress of what follows.

    The comparison lacks what the run with a penalty ends at. The model comes back as it was.
    """
    comparing = found is not None and _COMPARING in found.state
    rest = None if comparing else found
    if not plan.options.gate.compare_none:
        return None, rest
    if rest is not None and "comparison" in rest.state:
        return rest.state["comparison"], rest
    if rest is not None and {"training", "trained"} & rest.state.keys():
        raise InputError(
            f"{partial_path(plan.target)} is saved progress of the same run without "
            "--compare-none: leave it out to resume, or discard the progress with --restart"
        )
    with torch.random.fork_rng():  # the run that follows must not see it
        without = _train(plan, start, work, found if comparing else None, search)
    compared = _comparison(plan, without)
    work.keep({}, {"search": search, "comparison": compared}, "comparison")
    return compared, None


def completed(comparison: Comparison, metrics: dict[str, Metrics]) -> Comparison:
    """Give a comparison with what the run with a penalty measured."""
    return {**comparison, "before": metrics["before"], "with_penalty": metrics["after"]}


def _comparison(plan: "Plan", without: Metrics | None) -> Comparison:
    return {
        "new_task": plan.opened.task,
        "old_tasks": [name for name in plan.opened.old_tasks if name in plan.evaluate],
        "before": {},
        "with_penalty": {},
        "without_penalty": without,
    }


def _train(
    plan: "Plan",
    start: "Start",
    work: KeptWork,
    found: StoredWork | None,
    search: LambdaSearch | None,
) -> Metrics | None:
    """Train without a penalty and measure; None where it diverges."""
    LOG.info("training without a penalty, for comparison")
    model, recipe = start.model, plan.recipe
    values = copies_of(model.module)
    last = f"step {run_length(start, recipe)}"
    measured: Metrics = {}

    def measure(when: str, same_as: str = "") -> None:
        if same_as != last:
            return
        if start.frozen is None:  # else the weights are what they were, and the adapter is float32
            take_stored_values(model)
        # As in the run that follows: a module may draw, and several processes stop together.
        with signals.waiting(work.group is not None), torch.random.fork_rng():
            measured.update(
                evaluate_all(model, start.evaluations, start.with_heads, recipe.batch_size)
            )

    beside: dict[str, Any] = {"search": search, _COMPARING: True}
    kept = KeptTraining(work, found, beside)
    try:
        descend(replace(start, penalty=None), recipe, measure, kept)
    except NonFiniteError as error:
        LOG.info("without a penalty training diverged: %s", error)
        return None
    finally:
        put_back(model.module, values)
    return measured
