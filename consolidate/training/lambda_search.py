"""The search for λ: which strengths are tried for how many steps, and which one is chosen.

Short runs forget less than long ones, so a λ is only chosen among those that were trained for all
of the steps. The shorter runs of `coarse_to_fine` say where to look.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from consolidate.training.forgetting import ROUNDING
from formats.errors import NonFiniteError, UsageError

# Shares of the steps, and between the candidates of each quarters of a factor of 10.
RUNGS = ((1 / 8, 4), (1 / 4, 2), (1, 2))
FIRST = tuple(range(0, 25, 4))  # 1, 10, …, 10⁶, in quarters of a factor of 10
MOST_EXTENSIONS = 6  # candidates in all beyond the range that a rung began with
LEAST_STEPS = 20  # of a shortened run
KEPT_GAIN = 0.95


@dataclass(frozen=True)
class Trial:
    """One candidate, trained from the same start as all others."""

    ewc_lambda: float
    steps: int
    metrics: dict[str, dict[str, float]] | None  # of held-out data by task; None: it diverged
    forgetting: float | None  # the most that an old task lost in score; None: not measured
    penalty_per_lambda: float | None  # ½ Σ Λ (θ − μ)²
    divergence: float | None  # KL(old ‖ new) of the outputs on new inputs, per unit
    seconds: float

    @property
    def protection(self) -> float:
        """λ; 0 only shows what the new task gains without a penalty."""
        return self.ewc_lambda

    @property
    def mean(self) -> float:
        """The mean score over the tasks; −∞ where training diverged."""
        return mean_score(self.metrics)


class Candidate(Protocol):
    """What the rules choose among: a λ or an α, with what was measured."""

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float]] | None:
        """Of held-out data by task; None where it diverged."""

    @property
    def forgetting(self) -> float | None:
        """The most that an old task lost in score; None where it was not measured."""

    @property
    def protection(self) -> float:
        """At least 0, the larger the closer to the start; 0 only shows the gain without."""

    @property
    def mean(self) -> float:
        """The mean score over the tasks; −∞ where it diverged."""


C = TypeVar("C", bound=Candidate)
Rule = Callable[[Sequence[Trial]], Trial]  # chooses among trials of as many steps
Train = Callable[[float, int], Trial]  # trains with a λ for so many steps, and measures


def best_mean(candidates: Sequence[C]) -> C:
    """Choose the largest mean score; the larger λ, or smaller α, where two are equal."""
    return max(_measured(candidates), key=lambda one: (one.mean, one.protection))


def smallest(candidates: Sequence[C], *, max_forgetting: float) -> C:
    """Choose the smallest λ with which no old task loses more than it may, else the largest λ."""
    measured = _measured(candidates)
    most = max_forgetting + ROUNDING
    kept = [one for one in measured if one.forgetting is not None and one.forgetting <= most]
    return min(kept, key=_protection) if kept else max(measured, key=_protection)


def largest(candidates: Sequence[C], *, task: str, before: float) -> C:
    """Choose the largest λ, or smallest α, that keeps 95 % of what the new task gains in score.

    Where none does it is the smallest λ, or α = 1. Where nothing is gained on the start it is the
    largest λ, or smallest α. λ = 0 only shows the gain without a penalty.
    """
    measured = _measured(candidates)
    scores = [one.metrics[task]["score"] for one in measured if one.metrics is not None]
    held = [one for one in measured if one.protection > 0] or measured
    gain = max(scores) - before
    if gain <= 0:
        return max(held, key=_protection)
    enough = before + KEPT_GAIN * gain
    kept = [one for one in held if one.metrics and one.metrics[task]["score"] >= enough]
    return max(kept, key=_protection) if kept else min(held, key=_protection)


def choose_rule(
    select: str | None,
    *,
    old: Collection[str],
    validation: Collection[str],
    max_forgetting: float | None,
) -> str:
    """Decide the name of the rule, and refuse one for which nothing will be measured.

    Unless given: ``smallest`` with a limit on forgetting, ``largest`` without old data, else
    ``best-mean``.
    """
    measured = set(old) & set(validation)
    implied = "" if select is not None else " (which --max-forgetting implies)"
    if select is None:
        known = "best-mean" if measured else "largest"
        select = known if max_forgetting is None else "smallest"
    if select == "smallest" and max_forgetting is None:
        raise UsageError("--select smallest needs --max-forgetting: what an old task may lose")
    if select != "largest" and not measured:
        names = f", where NAME is one of {', '.join(old)}" if old else ""
        raise UsageError(
            f"--select {select}{implied} needs held-out data of an old task: give --validation "
            f"NAME=DATA{names}, or --select largest, which needs none"
        )
    return select


def grid(train: Train, strengths: Sequence[float], steps: int) -> list[Trial]:
    """Train every strength for all of the steps, from the least to the largest."""
    return [train(strength, steps) for strength in sorted(set(strengths))]


def coarse_to_fine(
    train: Train, choose: Rule, steps: int, *, reference: bool = False
) -> list[Trial]:
    """Look for λ from 1 to 10⁶ with an eighth of the steps, then nearer by with more.

    Seven powers of 10 for an eighth of the steps; the one chosen and its neighbours by √10 for a
    quarter; the one chosen of these and its neighbours for all. Where the chosen one is the least
    or the largest of its rung, the rung grows in that direction, by at most 6 candidates in all.
    With `reference` λ = 0 is trained in each rung too, as `largest` needs it.
    """
    trials: dict[tuple[float, int], Trial] = {}

    def trained(strengths: Mapping[int, float], length: int) -> Iterator[Trial]:
        for strength in [0.0] * reference + [strengths[k] for k in sorted(strengths)]:
            if (strength, length) not in trials:
                trials[strength, length] = train(strength, length)
            yield trials[strength, length]

    exponents, extensions = set(FIRST), MOST_EXTENSIONS
    for rung, (share, spacing) in enumerate(RUNGS):
        length = min(steps, max(LEAST_STEPS, math.ceil(share * steps)))
        while True:
            strengths = {k: strength_at(k) for k in exponents}
            best = choose(list(trained(strengths, length))).ewc_lambda
            centre = next(k for k in exponents if strengths[k] == best)
            if min(exponents) < centre < max(exponents) or extensions == 0:
                break
            exponents.add(centre + (spacing if centre == max(exponents) else -spacing))
            extensions -= 1
        if rung + 1 < len(RUNGS):
            nearer = RUNGS[rung + 1][1]
            exponents = {centre - nearer, centre, centre + nearer}
    return list(trials.values())


def strength_at(quarters: int) -> float:
    """Give λ = 10^(quarters/4) in three digits, so that it can be typed again."""
    return float(f"{10 ** (quarters / 4):.3g}")


def at_an_end(chosen: float, trials: Sequence[Trial]) -> bool:
    """Say whether a better λ may lie beyond those that were tried."""
    strengths = [trial.ewc_lambda for trial in trials if trial.ewc_lambda > 0]
    return chosen > 0 and chosen in (min(strengths), max(strengths))


def mean_score(metrics: Mapping[str, Mapping[str, float]] | None) -> float:
    """Return the mean score over the tasks; −∞ of a candidate that diverged."""
    if metrics is None:
        return -math.inf
    return sum(values["score"] for values in metrics.values()) / len(metrics)


def _protection(candidate: Candidate) -> float:
    return candidate.protection


def _measured(candidates: Sequence[C]) -> list[C]:
    measured = [one for one in candidates if one.metrics is not None]
    if not measured:
        raise NonFiniteError(
            "training diverged with every λ that was tried: lower --learning-rate, or use "
            "--max-grad-norm or --penalty-step proximal"
        )
    return measured
