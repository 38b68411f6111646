"""Nats of loss that the earlier tasks gain: as their Fisher predicts them, and as measured."""

from collections.abc import Callable
from dataclasses import dataclass

from consolidate.ewc.penalty import WeightPenalty
from formats.fisher_json import Ledger


@dataclass(frozen=True)
class Forecast:
    """Predicts by their merged Fisher how many nats of loss the earlier tasks gain.

    To second order, Q(θ) − Q(θ₀) with Q(θ) = ½ Σ Λ (θ − μ)², or ½ tr(ΔW R ΔWᵀ)/out in layers with a
    matrix R, and θ₀ the start of training. As Λ is a mean per example, or token, times the task's
    weight, it is Σ w_t (rise of the mean negative log-likelihood on task t).
    """

    ledger: Ledger  # of Λ
    penalty: Callable[[], WeightPenalty]  # on the model's values when it is called; λQ
    at_start: float  # Q(θ₀)

    def nats(self) -> float:
        """Return the prediction at the model's present values."""
        return quadratic(self.penalty()) - self.at_start

    def weights(self) -> dict[str, float]:
        """Return w_t by task: that of the ledger, times γ for each task that was merged later."""
        measured = [task for task in self.ledger.tasks if task.measured]
        later = range(len(measured) - 1, -1, -1)
        gamma = self.ledger.gamma
        return {t.name: t.weight * gamma**k for t, k in zip(measured, later, strict=True)}


def quadratic(penalty: WeightPenalty) -> float:
    """Return Q at the model's present values: the penalty at λ = 1."""
    ewc_lambda, penalty.ewc_lambda = penalty.ewc_lambda, 1.0
    try:
        return penalty.value()
    finally:
        penalty.ewc_lambda = ewc_lambda
