"""How much of the old tasks a run has lost, and the limit on it."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from consolidate.ewc.penalty import WeightPenalty
from formats.errors import UsageError
from formats.fisher_json import Ledger

ROUNDING = 1e-9  # 0.90 − 0.87 is no more than 0.03
Scores = Mapping[str, Mapping[str, float]]  # what was measured, by task and metric


@dataclass(frozen=True)
class Forecast:
    """Predicts by their merged Fisher how many nats of loss the earlier tasks gain.

    To second order, Q(θ) − Q(θ₀) with Q(θ) = ½ Σ Λ (θ − μ)², or ½ tr(ΔW R ΔWᵀ)/out in layers with a
    matrix R, and θ₀ the start of training. As Λ is a mean per example, or token, times the task's
    weight, it is Σ w_t (rise of the mean negative log-likelihood on task t).
    """

    ledger: Ledger  # of Λ
    quadratic: Callable[[], WeightPenalty]  # Q at the model's values when it is called; λ = 1
    at_start: float  # Q(θ₀)

    def nats(self) -> float:
        """Return the prediction at the model's present values."""
        return self.quadratic().value() - self.at_start

    def weights(self) -> dict[str, float]:
        """Return w_t by task: that of the ledger, times γ for each task that was merged later."""
        measured = [task for task in self.ledger.tasks if task.measured]
        later = range(len(measured) - 1, -1, -1)
        gamma = self.ledger.gamma
        return {t.name: t.weight * gamma**k for t, k in zip(measured, later, strict=True)}


def nats_lost(metrics: Mapping[str, Scores], tasks: Collection[str]) -> dict[str, float]:
    """Give the rise of the loss on each old task that was measured: after − before, per unit."""
    before = metrics.get("before", {})
    return {
        name: values["loss"] - before[name]["loss"]
        for name, values in metrics.get("after", {}).items()
        if name in tasks and "loss" in values and "loss" in before.get(name, ())
    }


def forgetting(before: Scores, after: Scores, tasks: Collection[str]) -> dict[str, float]:
    """Give the score that each old task lost: before − after, negative where it gained."""
    return {
        name: before[name]["score"] - values["score"]
        for name, values in after.items()
        if name in tasks
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
        raise UsageError("--max-forgetting needs old tasks, and the checkpoint has no ledger")
    if not set(old) & set(measured):
        raise UsageError(
            "--max-forgetting needs data of an old task to measure: give --evaluate NAME=DATA, "
            f"where NAME is one of {', '.join(old)}"
        )


def check_compared(old: Collection[str], measured: Collection[str]) -> None:
    """Refuse a comparison without a measured old task."""
    if not set(old) & set(measured):
        names = f"where NAME is one of {', '.join(old)}" if old else "and the ledger has no task"
        raise UsageError(
            f"--compare-none needs test data of an old task: give --evaluate NAME=DATA, {names}"
        )


def beyond(lost: Mapping[str, float], max_forgetting: float) -> dict[str, float]:
    """Give the tasks that lost more than allowed, with what they lost."""
    return {name: loss for name, loss in lost.items() if loss > max_forgetting + ROUNDING}
