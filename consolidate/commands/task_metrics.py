"""Evaluate a model on several tasks."""

from collections.abc import Mapping, Sequence

from consolidate.data.benchmarks import Benchmark
from consolidate.data.examples import Examples
from consolidate.estimation.likelihoods import get_likelihood
from consolidate.models.model import Model
from consolidate.runtime.distributed import all_processes, shares
from consolidate.runtime.progress import progress
from consolidate.training.evaluation import measure


def evaluate_all(
    model: Model,
    tasks: Mapping[str, Examples | Benchmark],
    with_heads: Mapping[str, Model],
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """Evaluate a loaded model on each task's examples or benchmark, some with a saved head."""
    metrics, group = {}, all_processes()
    own = {
        name: [part for part in shares(_order(examples), batch_size, group) if part]
        for name, examples in tasks.items()
    }
    total = sum(len(part) for parts in own.values() for part in parts)
    with progress("evaluating", total, "examples", phase="evaluation") as advance:
        for name, examples in tasks.items():
            measured = with_heads.get(name, model)
            if isinstance(examples, Benchmark):
                metrics[name] = examples.measure(
                    measured, batch_size=batch_size, progress=advance, group=group
                )
                continue
            metrics[name] = measure(
                measured.module,
                (examples.collate(part) for part in own[name]),
                get_likelihood(measured.objective.likelihood),
                language=measured.objective.language,
                progress=advance,
                group=group,
            )
    return metrics


def _order(examples: Examples | Benchmark) -> Sequence[int]:
    if isinstance(examples, Benchmark):
        return range(len(examples))
    return examples.longest_first()
