"""The search for λ: which strengths are tried for how many steps, and which one is chosen.

Short runs forget less than long ones, so a λ is only chosen among those that were trained for all
of the steps. The shorter runs of `coarse_to_fine` show where to look.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeVar

from consolidate.training.forgetting import ROUNDING
from formats.errors import NonFiniteError, UsageError

# Shares of the steps, and between the candidates of each quarters of a factor of 10.
SHORT = ((1 / 16, 4), (1 / 8, 2))
FIRST = tuple(range(0, 25, 4))  # 1, 10, …, 10⁶, in quarters of a factor of 10
MOST_EXTENSIONS = 3  # candidates in all beyond the range of the short runs
ENDS = (-12, 36)  # 10⁻³ and 10⁹, in quarters of a factor of 10: no λ beyond them is tried
MOST_WHOLE = 4  # whole runs beyond those begun with, until the rule asks for no more
NOTABLE = 0.01  # in mean score
LEAST_STEPS = 20  # of a shortened run
KEPT_GAIN = 0.95
_protection = attrgetter("protection")


class Candidate(ABC):
    """What the rules choose among: a λ or an α, with what was measured."""

    metrics: Mapping[str, Mapping[str, float]] | None  # of held-out data by task; None: it diverged
    forgetting: float | None  # the most that an old task lost in score; None: not measured

    @property
    @abstractmethod
    def protection(self) -> float:
        """At least 0, the larger the closer to the start; 0 only shows the gain without."""

    @property
    def mean(self) -> float:
        """The mean score over the tasks; −∞ where it diverged."""
        if self.metrics is None:
            return -math.inf
        return sum(values["score"] for values in self.metrics.values()) / len(self.metrics)


@dataclass(frozen=True)
class Trial(Candidate):
    """One λ, trained from the same start as all others."""

    ewc_lambda: float
    steps: int
    metrics: dict[str, dict[str, float]] | None
    forgetting: float | None
    penalty_per_lambda: float | None  # ½ Σ Λ (θ − μ)²
    divergence: float | None  # KL(old ‖ new) of the outputs on new inputs, per unit
    seconds: float

    @property
    def protection(self) -> float:
        """λ; 0 only shows what the new task gains without a penalty."""
        return self.ewc_lambda


C = TypeVar("C", bound=Candidate)
Rule = Callable[[Sequence[Trial]], Trial]  # chooses among trials of as many steps
More = Callable[[Sequence[Trial]], int]  # whether whole runs ask for another: −1, 0 or +1
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


def more_by_mean(whole: Sequence[Trial]) -> int:
    """Ask for whole runs beyond the best one while its only neighbour is clearly worse."""
    if not any(one.metrics for one in whole):
        return -1
    order = sorted(whole, key=_protection)
    if len(order) == 1:
        return 0
    best = best_mean(order)
    if best is order[-1] and best.mean - order[-2].mean > NOTABLE:
        return 1
    if best is order[0] and best.mean - order[1].mean > NOTABLE:
        return -1
    return 0


def more_by_limit(whole: Sequence[Trial], *, max_forgetting: float) -> int:
    """Ask for whole runs until one keeps to the limit on forgetting and a weaker one does not."""
    most = max_forgetting + ROUNDING
    keeps = {one.forgetting is not None and one.forgetting <= most for one in whole if one.metrics}
    if not keeps:
        return -1
    return 0 if len(keeps) == 2 else -1 if keeps.pop() else 1


def more_by_gain(whole: Sequence[Trial], *, task: str, before: float) -> int:
    """Ask for whole runs with weaker penalties until one keeps 95 % of the gain."""
    score = {one.protection: one.metrics[task]["score"] for one in whole if one.metrics}
    gain = max(score.values(), default=before) - before
    kept = [strength for strength in score if score[strength] >= before + KEPT_GAIN * gain]
    return 0 if gain <= 0 or any(kept) else -1


def coarse_to_fine(
    train: Train, choose: Rule, more: More, steps: int, *, begin: int = 1, reference: bool = False
) -> list[Trial]:
    """Look for λ in short runs, then take whole ones.

    Seven powers of 10 from 1 to 10⁶ for a sixteenth of the steps; the one chosen and its neighbours
    by √10 for an eighth. Where the chosen one is the least or the largest, the range grows in that
    direction, by at most 3 candidates in all, and not while nothing changes there. The one chosen
    last is trained for all of the steps, with `begin` = 2 the better of its neighbours too; then
    the next beyond these by √10 while `more` asks for it (−1: smaller, +1: larger, 0: none), at
    most 4. No λ below 10⁻³ or above 10⁹ is tried. With `reference`, as `largest` needs it, λ = 0 is
    trained for each length too.
    """
    trials: dict[tuple[float, int], Trial] = {}

    def at(strength: float, length: int) -> Trial:
        if (strength, length) not in trials:
            trials[strength, length] = train(strength, length)
        return trials[strength, length]

    def trained(quarters: int, length: int) -> Trial:
        return at(strength_at(quarters), length)

    def best_of(candidates: Sequence[int], length: int) -> int:
        found = {k: trained(k, length) for k in sorted(candidates)}
        _measured(list(found.values()))  # refuses if all of them diverged, whatever λ = 0 does
        best = choose([*found.values(), *([at(0.0, length)] if reference else [])])
        return next(k for k, trial in found.items() if trial is best)

    candidates, extensions, best, length, spacing = FIRST, MOST_EXTENSIONS, 0, 0, 0
    for share, spacing in SHORT:
        if trials:
            candidates = _between_ends(best - spacing, best, best + spacing)
        length = min(steps, max(LEAST_STEPS, math.ceil(share * steps)))
        while True:
            best = best_of(candidates, length)
            outward = {min(candidates): -spacing, max(candidates): spacing}.get(best, 0)
            nearer = trained(best - outward, length)
            changes = nearer.metrics != trained(best, length).metrics
            if not (outward and extensions and changes and _between_ends(best + outward)):
                break
            candidates, extensions = (*candidates, best + outward), extensions - 1

    places = [best]
    if begin == 2:
        near = [k for k in (best - spacing, best + spacing) if k in candidates]
        near = [k for k in near if trained(k, length).metrics is not None]
        places += [best_of(near, length)] if near else []
    without = [at(0.0, steps)] if reference else []
    whole = [*without, *(trained(k, steps) for k in places)]
    for _ in range(MOST_WHOLE):
        direction = more(whole)
        if direction == 0:
            break
        beyond = (max if direction > 0 else min)(places) + direction * spacing
        if not _between_ends(beyond):
            break
        places.append(beyond)
        whole.append(trained(places[-1], steps))
    return list(trials.values())


def _between_ends(*places: int) -> tuple[int, ...]:
    return tuple(place for place in places if ENDS[0] <= place <= ENDS[1])


def strength_at(quarters: int) -> float:
    """Give λ = 10^(quarters/4) in three digits, so that it can be typed again."""
    return float(f"{10 ** (quarters / 4):.3g}")


def at_an_end(chosen: float, trials: Sequence[Trial]) -> bool:
    """Say whether a better λ may lie beyond those that were tried."""
    strengths = [trial.ewc_lambda for trial in trials if trial.ewc_lambda > 0]
    return chosen > 0 and chosen in (min(strengths), max(strengths))


def _measured(candidates: Sequence[C]) -> list[C]:
    measured = [one for one in candidates if one.metrics is not None]
    if not measured:
        raise NonFiniteError(
            "training diverged with every λ that was tried: lower --learning-rate, or use "
            "--max-grad-norm or --penalty-step proximal"
        )
    return measured
