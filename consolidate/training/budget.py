"""λ that follows what earlier tasks lose, so that they lose no more than a budget of nats.

The penalty's strength is a control variable: it grows while the measured loss is over the budget,
and falls while it is below, by a step in log λ. A last step along the way back to the start makes
the budget certain on the rows it is measured on.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

MEASUREMENTS = 50  # of a run at most, evenly
ROWS = (64, 256)  # in a measurement, at least and at most
GAIN = 0.3  # in log10 λ, per measurement and factor of 10 between loss and budget
DAMPING = 0.5  # in log10 λ, per factor of 10 that the loss has risen since the last measurement
NOTABLE = 1.0  # such factors that count in one measurement
GROWTH = 10.0  # of λ over its first value, at most
PARTS = 128  # of the way from the start, to which the end is rounded down


@dataclass(frozen=True)
class Measured:
    """What was found after a step, and the λ from there on."""

    step: int
    lost: float  # rise of the mean loss, in nats, of the task that lost most
    ewc_lambda: float


def is_due(step: int, steps: int, *, begun: bool) -> bool:
    """Say whether to measure after a step: up to 50 times in a run, and at first more often.

    Before λ has begun, after the steps 1, 2, 4, 8, … too, as loss grows fastest at the beginning.
    """
    return step % interval(steps) == 0 or not (begun or step & (step - 1))


def interval(steps: int) -> int:
    """Return the steps between two measurements of a run."""
    return max(1, -(-steps // MEASUREMENTS))


def rows_measured(count: int, steps: int, step_rows: int) -> list[range]:
    """Divide an old task's rows into parts, of which each measurement takes the next.

    A part has as many rows as are trained on between two measurements, but at least 64 and at most
    256; every n-th row belongs to it, so that data in an order are measured evenly.

    Args:
        count: The rows of the task.
        steps: The optimizer steps of the run.
        step_rows: The rows of a step.
    """
    least, most = ROWS
    rows = min(most, max(least, interval(steps) * step_rows))
    parts = min(max(round(count / rows), math.ceil(count / most)), max(1, count // least))
    return [range(first, count, parts) for first in range(parts)]


def first_strength(losses: Sequence[float], squares: float) -> float | None:
    """Give the first λ, once the budget is passed: what the new loss fell per unit of the penalty.

    λ₀ = (L_first − L_now) / Q, the mean multiplier over the way so far: for the training to end
    where it is, λ would have to be −dL/dQ there.

    Args:
        losses: The new task's loss at each step so far, at least one.
        squares: Q, the rise of the penalty at λ = 1 since the start.

    Returns:
        λ₀; None where the penalty has not risen, so that no λ would hold anything back.
    """
    if squares <= 0:
        return None
    latest = losses[-3:]
    fall = max(losses[:2]) - math.fsum(latest) / len(latest)
    return max(fall, 0.1 * losses[0]) / squares


def next_strength(now: Measured, first: float, lost: float, budget: float) -> float:
    """Give the next λ, by a proportional and integral controller of its logarithm, to base 10.

        e = clip(log(lost / budget), −1, 1)
        log λ ← log λ + 0.3 e + 0.5 (e − e of the last measurement)

    The first term brings the loss to the budget, the second keeps it from swinging around it, as
    weights follow λ only after some steps.

    λ is at most 10 times its first value: where not even that keeps the budget, more of it only
    costs the new task.

    Args:
        now: The last measurement, with the present λ.
        first: The first λ.
        lost: The rise of the old loss that was measured since.
        budget: The rise that is allowed, above 0.

    Source: the multiplicative update of GECO (Rezende and Viola 2018,
    https://arxiv.org/abs/1810.00597) with the controller of Sohrabi et al. 2024
    (https://arxiv.org/abs/2406.04558), both in log λ.
    """
    error, before = _error(lost, budget), _error(now.lost, budget)
    change = GAIN * error + DAMPING * (error - before)
    return float(min(now.ewc_lambda * 10**change, GROWTH * first))


def _error(lost: float, budget: float) -> float:
    """Return how many factors of 10 a loss is over the budget, within bounds."""
    ratio = lost / max(budget, sys.float_info.min)  # smaller numbers may be flushed to zero
    return -NOTABLE if ratio <= 0 else max(-NOTABLE, min(NOTABLE, math.log10(ratio)))


def next_alpha(tried: Sequence[tuple[float, bool]]) -> float | None:
    """Give the next α to measure on the way from the start to the end; None once it is found.

    The end, α = 1, comes first; where that is over the budget, the largest multiple of 1/128 that
    keeps it is found by bisection, as far as the loss grows with α.

    Args:
        tried: Each α that was measured, with whether it keeps the budget.
    """
    if not tried:
        return 1.0
    low, high = 0, PARTS
    for alpha, keeps in tried:
        place = round(alpha * PARTS)
        if keeps:
            low = max(low, place)
        else:
            high = min(high, place)
    return None if high - low <= 1 or low == PARTS else ((low + high) // 2) / PARTS


def largest_kept(tried: Sequence[tuple[float, bool]]) -> float:
    """Give the largest α that keeps the budget: 0, the start, where none of the others does."""
    return max((alpha for alpha, keeps in tried if keeps), default=0.0)
