"""How much of the old tasks a run has lost, and the limit on it."""

from collections.abc import Collection, Mapping
from typing import Any

from formats.errors import UsageError

ROUNDING = 1e-9  # 0.90 − 0.87 is no more than 0.03
Scores = Mapping[str, Mapping[str, float]]  # what was measured, by task and metric


def forgetting(before: Scores, after: Scores, tasks: Collection[str]) -> dict[str, float]:
    """Give the score that each old task lost: before − after, negative where it gained."""
    return {
        name: before[name]["score"] - values["score"]
        for name, values in after.items()
        if name in tasks
    }


def rises(before: Scores, after: Scores, tasks: Collection[str]) -> dict[str, float]:
    """Give the rise of the loss on each of the tasks that was measured: after − before, per unit.

    A benchmark may have no loss.
    """
    return {
        name: values["loss"] - before[name]["loss"]
        for name, values in after.items()
        if name in tasks and "loss" in values and "loss" in before.get(name, ())
    }


def scores_of(metrics: Mapping[str, Scores], tasks: Collection[str]) -> dict[str, Any]:
    """Give the scores of old tasks before and after a training, as far as they were measured."""
    before, after = metrics.get("before", {}), metrics.get("after", {})
    return {
        name: {"before": before[name]["score"], "after": values["score"]}
        for name, values in after.items()
        if name in tasks and name in before
    }


def check_gate(old: Collection[str], measured: Collection[str]) -> None:
    """Refuse a limit that no measured old task can be checked against."""
    if not old:
        raise UsageError(
            "--max-forgetting needs old tasks, and the checkpoint has no ledger: run `consolidate "
            "fisher` on it first, or leave --max-forgetting out"
        )
    if not set(old) & set(measured):
        raise UsageError(
            "--max-forgetting needs data of an old task to measure: give --evaluate NAME=DATA, "
            f"where NAME is one of {', '.join(old)}"
        )


def check_compared(old: Collection[str], measured: Collection[str]) -> None:
    """Refuse a comparison without a measured old task."""
    if not set(old) & set(measured):
        names = f"where NAME is one of {', '.join(old)}"
        none = "and the checkpoint has no ledger: run `consolidate fisher` on it first"
        raise UsageError(
            "--compare-none needs test data of an old task: give --evaluate NAME=DATA, "
            + (names if old else none)
        )


def beyond(lost: Mapping[str, float], max_forgetting: float) -> dict[str, float]:
    """Give the tasks that lost more than allowed, with what they lost."""
    return {name: loss for name, loss in lost.items() if loss > max_forgetting + ROUNDING}
