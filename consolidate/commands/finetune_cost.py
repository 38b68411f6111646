"""The cost of a training, estimated from its first steps; nothing is written."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from consolidate.chain.output import output_bytes
from consolidate.commands.finetune_run import descend, rows_of, run_length
from consolidate.commands.pass_cost import peak_memory
from consolidate.results import FinetuneDryRun
from consolidate.runtime.shards import local
from consolidate.training.loop import Step
from formats.errors import InputError

if TYPE_CHECKING:
    from consolidate.commands.finetune_plan import Plan
    from consolidate.commands.finetune_start import Start

LOG = logging.getLogger("consolidate")

SAMPLED_STEPS = 4
"""Steps that are taken; the first, which is slower, does not count for the time."""


def report_refused(*checks: Callable[[], object]) -> None:
    """Report which files that are there would be refused."""
    for check in checks:
        try:
            check()
        except InputError as error:
            LOG.info("without --dry-run this would be refused, unless it is up to date: %s", error)


def training_cost(plan: "Plan", start: "Start") -> FinetuneDryRun:
    """Take a few steps in memory, and give what all of them would take."""
    recipe, opened = plan.recipe, plan.opened
    steps = run_length(start, recipe)
    few = replace(recipe, epochs=None, max_steps=min(steps, SAMPLED_STEPS))
    module = start.model.module
    device = next(module.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [time.perf_counter()]

    def clock(step: Step) -> None:
        times.append(time.perf_counter())

    descend(start, few, lambda *moment: None, report=clock)
    counted = times[1:] if len(times) > 2 else times
    each = (counted[-1] - counted[0]) / (len(counted) - 1)
    chosen = plan.search is not None or plan.options.search.budget is not None
    ewc_lambda = None if chosen else plan.options.search.ewc_lambda
    assert ewc_lambda is None or isinstance(ewc_lambda, float | int)
    return {
        "status": "dry run",
        "task": opened.task,
        "old_tasks": opened.old_tasks,
        "penalty": plan.options.penalty.penalty,
        "ewc_lambda": ewc_lambda,
        "examples": len(rows_of(start, recipe)[0]),
        "parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "steps": steps,
        "seconds_per_step": each,
        "seconds": each * steps,
        "output_bytes": output_bytes(opened.source, whole=True),
        "fisher_memory": None if plan.options.measuring.no_fisher else _fisher_memory(plan, start),
        **peak_memory(device),
    }


def _fisher_memory(plan: "Plan", start: "Start") -> int:
    """Count the bytes of the weights, and of two sums for each that is measured."""
    # An adapter's frozen weights are measured once it is merged; its own few count as well.
    parameters = list(start.model.module.parameters())
    measured = [p for p in parameters if p.requires_grad] + (start.frozen or [])
    weights = sum(local(p).numel() * p.element_size() for p in parameters)
    dtype: torch.dtype = getattr(torch, plan.options.estimation.accumulate_dtype)
    return weights + 2 * dtype.itemsize * sum(local(p).numel() for p in measured)
