"""The cost of measuring a Fisher, estimated from a few batches before it is measured."""

import resource
import sys
import time
from dataclasses import replace
from itertools import pairwise

import torch

from consolidate.commands.measurement import estimator_arguments, reading_order
from consolidate.data.examples import Examples
from consolidate.estimation.fisher_diagonal import fisher_diagonal
from consolidate.estimation.likelihoods import get_likelihood
from consolidate.models.model import Model
from consolidate.options import Estimation
from consolidate.results import PassCost, PeakMemory
from consolidate.runtime.distributed import all_processes, from_first, place_in
from consolidate.runtime.shards import is_sharded

SAMPLED_BATCHES = 3
"""Batches from which the time of a whole pass is estimated."""

SAMPLED_LABELS = 8
"""Labels of an example, at most, from which the time of more is estimated."""


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
    group = all_processes() if is_sharded(model.module) else None
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
        **estimator_arguments(few_labels, structure, seed),
        indices=[i for batch in sample for i in batch],
        progress=clock,
        group=group,
    )
    checked, *others = [(after - before) * labels / fewer for before, after in pairwise(times)]
    each = sum(others) / sum(map(len, sample[1:]))
    cost: PassCost = {
        "estimator": str(estimation.estimator),
        "structure": structure,
        "examples": count,
        "parameters": from_first(sum(values.numel() for values in diagonal.values()), group),
        "seconds_per_example": each,
        "seconds": checked + each * max(0, count / processes - batch_size),
        **peak_memory(device),
    }
    return cost, sum(matrix.numel() for matrix in diagonal.factors.values())


def peak_memory(device: torch.device) -> PeakMemory:
    """Give the most memory in bytes that this process has taken so far, and of a CUDA device."""
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "peak_device_memory": (
            torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        ),
    }
