"""λ that follows a budget: when it is measured, by what rule it moves, and the α at the end."""

import math
from itertools import pairwise

import pytest

from consolidate.training.budget import (
    Measured,
    first_strength,
    interval,
    is_due,
    largest_kept,
    next_alpha,
    next_strength,
    rows_measured,
)


@pytest.mark.parametrize("steps", [1, 37, 50, 51, 820, 10_000])
def test_a_run_is_measured_25_to_50_times_and_its_beginning_more_often(steps: int) -> None:
    later = [step for step in range(1, steps + 1) if is_due(step, steps, begun=True)]
    assert len(later) <= 50
    assert {b - a for a, b in pairwise(later)} <= {interval(steps)}
    assert steps < 50 or len(later) >= 25
    first = [step for step in range(1, steps + 1) if is_due(step, steps, begun=False)]
    assert set(first) == {*later, *(2**k for k in range(20) if 2**k <= steps)}


@pytest.mark.parametrize("count", [1, 5, 64, 98, 199, 257, 383, 1000, 40_000])
@pytest.mark.parametrize("steps", [10, 820, 5000])
def test_each_row_is_in_one_part_of_a_fitting_size(count: int, steps: int) -> None:
    parts = rows_measured(count, steps, 16)
    assert sorted(row for part in parts for row in part) == [*range(count)]
    assert all(len(part) <= 256 for part in parts)
    assert len(parts) == 1 or all(len(part) >= 64 for part in parts)
    asked = min(256, max(64, interval(steps) * 16))
    assert len(parts) == 1 or all(asked / 2 <= len(part) <= 1.5 * asked for part in parts)


def test_the_first_lambda_is_the_fall_of_the_new_loss_per_unit_of_the_penalty() -> None:
    assert first_strength([2.0, 1.9, 1.1, 1.0, 0.9], 0.01) == pytest.approx(100.0)
    assert first_strength([1.9, 2.0, 1.1, 1.0, 0.9], 0.01) == pytest.approx(100.0)
    assert first_strength([2.0], 0.01) == pytest.approx(20.0)  # nothing fell yet: a tenth
    assert first_strength([2.0, 1.0], 0.0) is None
    assert first_strength([2.0, 1.0], -0.1) is None


def test_lambda_moves_by_the_logarithm_of_what_is_lost_and_of_its_rise() -> None:
    def after(before: float, lost: float, ewc_lambda: float = 100.0) -> float:
        return next_strength(Measured(3, before, ewc_lambda), 100.0, lost, 0.1)

    assert after(0.1, 0.1) == pytest.approx(100.0)
    assert after(0.2, 0.2) == pytest.approx(100 * 2**0.3)
    assert after(0.05, 0.05) == pytest.approx(100 / 2**0.3)
    assert after(0.1, 0.2) == pytest.approx(100 * 2**0.8)
    assert after(0.4, 0.1) == pytest.approx(100 / 2)
    assert after(7.0, 50.0) == pytest.approx(100 * 10**0.3)  # more than a factor of 10 is one
    for nothing in (1e-9, 0.0, -0.3):
        assert after(0.001, nothing) == pytest.approx(100 / 10**0.3)
    assert after(50.0, 50.0, 900.0) == 1000.0  # ten times the first


@pytest.mark.parametrize("slope", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("start", [100.0, 3000.0])
@pytest.mark.parametrize("pace", [0.1, 0.5, 1.0])
def test_a_loss_that_follows_lambda_slowly_ends_at_the_budget(
    slope: float, start: float, pace: float
) -> None:
    budget, right = 0.1, 300.0  # λ at which the loss rests at the budget
    now = Measured(1, budget, start)
    for step in range(50):
        rest = budget * (right / now.ewc_lambda) ** slope
        lost = now.lost * (rest / now.lost) ** pace
        now = Measured(step, lost, next_strength(now, start, lost, budget))
    assert now.lost == pytest.approx(budget, rel=0.15)


@pytest.mark.parametrize("edge", [0.0, 0.003, 0.31, 0.5, 0.99, 1.0])
def test_the_largest_alpha_that_keeps_the_budget_is_found_in_eight(edge: float) -> None:
    tried: list[tuple[float, bool]] = []
    while (alpha := next_alpha(tried)) is not None:
        tried.append((alpha, alpha <= edge))
    assert tried[0][0] == 1.0
    assert len(tried) <= 8
    assert len(tried) == 1 or edge < 1
    assert largest_kept(tried) == math.floor(edge * 128) / 128
