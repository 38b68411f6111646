import math
from collections.abc import Callable
from functools import partial

import pytest

from consolidate.training.lambda_search import (
    MOST_EXTENSIONS,
    MOST_WHOLE,
    Trial,
    at_an_end,
    best_mean,
    choose_rule,
    coarse_to_fine,
    grid,
    largest,
    more_by_gain,
    more_by_limit,
    more_by_mean,
    smallest,
    strength_at,
)
from formats.errors import NonFiniteError, UsageError

STEPS = 800


def trial(
    strength: float, old: float = 0.0, new: float = 0.0, *, steps: int = STEPS, lost: float = 0.0
) -> Trial:
    metrics = {"old": {"score": old}, "new": {"score": new}}
    return Trial(strength, steps, metrics, lost, 0.0, None, 0.0)


def diverged(strength: float) -> Trial:
    return Trial(strength, STEPS, None, None, None, None, 0.0)


class World:
    """A smooth stability–plasticity curve with its best mean at λ = `best` for whole runs.

    Shorter runs forget less and learn less, so that their best λ lies elsewhere.
    """

    def __init__(self, best: float, *, drift: float = 0.5, breaks: float = math.inf) -> None:
        self.best, self.drift, self.breaks = math.log10(best), drift, breaks
        self.trained: list[tuple[float, int]] = []

    def train(self, strength: float, steps: int) -> Trial:
        self.trained.append((strength, steps))
        if strength >= self.breaks:
            return Trial(strength, steps, None, None, None, None, 0.0)
        at = math.log10(max(strength, 1e-30)) - self.best
        at += self.drift * math.log2(STEPS / steps) / 3
        lost = 0.5 / (1 + 10 ** (at + 1))
        learned = 0.8 * steps / STEPS / (1 + 10 ** (at - 1))
        return trial(strength, 0.9 - lost, 0.1 + learned, steps=steps, lost=lost)


def by_mean(world: World, steps: int = STEPS) -> list[Trial]:
    return coarse_to_fine(world.train, best_mean, more_by_mean, steps, begin=2)


@pytest.mark.parametrize("best", [1e-2, 1, 20, 316, 1e4, 3e6, 1e8])
@pytest.mark.parametrize("drift", [-1.0, 0.0, 0.5])
def test_auto_comes_near_the_best_wherever_it_lies(best: float, drift: float) -> None:
    world = World(best, drift=drift)
    trials = by_mean(world)
    chosen = best_mean([t for t in trials if t.steps == STEPS])
    fine = max(World(best).train(10 ** (k / 20), STEPS).mean for k in range(-80, 200))
    assert fine - chosen.mean < 0.01
    assert len(world.trained) == len(set(world.trained)) == len(trials)
    cost = sum(steps for _, steps in world.trained) / STEPS
    # In these worlds half a decade costs points, so both neighbours are trained for all steps.
    assert cost <= 7 / 16 + 3 / 8 + MOST_EXTENSIONS / 8 + 2 + MOST_WHOLE
    if drift == 0 and 1 < best < 1e6:
        assert cost <= 7 / 16 + 3 / 8 + 2 + 2


def test_auto_takes_two_whole_runs_where_half_a_decade_makes_no_difference() -> None:
    def smooth(strength: float, steps: int) -> Trial:
        world.trained.append((strength, steps))
        at = math.log10(strength) - 2.9
        return trial(strength, 0.9 - 0.02 * at * at, 0.9, steps=steps)

    world = World(1)
    coarse_to_fine(smooth, best_mean, more_by_mean, STEPS, begin=2)
    assert [s for s, steps in world.trained if steps == 50] == [10.0**k for k in range(7)]
    assert [s for s, steps in world.trained if steps == 100] == [316, 1000, 3160]
    assert [s for s, steps in world.trained if steps == 800] == [1000, 316]
    assert {steps for _, steps in world.trained} == {50, 100, 800}


@pytest.mark.parametrize("drift", [-1.0, 0.0, 0.5])
def test_the_least_lambda_under_a_limit_is_found_between_a_failing_and_a_passing_one(
    drift: float,
) -> None:
    limit = {"max_forgetting": 0.02}
    rule, more = partial(smallest, **limit), partial(more_by_limit, **limit)
    world = World(100, drift=drift)
    trials = coarse_to_fine(world.train, rule, more, STEPS)
    trials = [t for t in trials if t.steps == STEPS]
    chosen = rule(trials)
    assert chosen.forgetting is not None
    assert chosen.forgetting <= 0.02
    below = [t for t in trials if t.ewc_lambda < chosen.ewc_lambda]
    assert below
    assert all(t.forgetting is not None and t.forgetting > 0.02 for t in below)


@pytest.mark.parametrize("drift", [-1.0, 0.0, 0.5])
def test_the_largest_lambda_is_measured_against_a_run_without_penalty(drift: float) -> None:
    rule = partial(largest, task="new", before=0.1)
    more = partial(more_by_gain, task="new", before=0.1)
    world = World(100, drift=drift)
    trials = coarse_to_fine(world.train, rule, more, STEPS, reference=True)
    chosen = rule([t for t in trials if t.steps == STEPS])
    assert {(0.0, steps) for steps in (50, 100, STEPS)} <= set(world.trained)
    assert chosen.metrics is not None
    assert chosen.metrics["new"]["score"] >= 0.1 + 0.95 * 0.8
    whole = [t.ewc_lambda for t in trials if t.steps == STEPS]
    assert min(one for one in whole if one > 0) == chosen.ewc_lambda


def test_a_range_in_which_nothing_changes_does_not_grow() -> None:
    def flat(strength: float, steps: int) -> Trial:
        return trial(strength, 0.5, 0.5, steps=steps)

    trials = coarse_to_fine(flat, best_mean, more_by_mean, STEPS, begin=2)
    assert max(t.ewc_lambda for t in trials) <= 1e6 * 10**0.5 + 1e4
    whole = [t for t in trials if t.steps == STEPS]
    assert len(whole) == 2
    assert at_an_end(best_mean(whole).ewc_lambda, whole)


def test_a_search_that_finds_no_end_is_bounded() -> None:
    def rising(strength: float, steps: int) -> Trial:
        return trial(strength, math.log10(strength), 0.5, steps=steps)

    trials = coarse_to_fine(rising, best_mean, more_by_mean, STEPS, begin=2)
    assert max(t.ewc_lambda for t in trials) == 1e9
    assert len(trials) == 7 + MOST_EXTENSIONS + 2 + 2  # its larger neighbour is never tried

    def forgets(strength: float, steps: int) -> Trial:
        return trial(strength, math.log10(strength), 0.5, steps=steps, lost=0.5)

    rule = partial(smallest, max_forgetting=0.02)
    more = partial(more_by_limit, max_forgetting=0.02)
    trials = coarse_to_fine(forgets, rule, more, STEPS)
    assert max(t.ewc_lambda for t in trials) == 1e9
    assert len([t for t in trials if t.steps == STEPS]) == 1

    def keeps(strength: float, steps: int) -> Trial:
        return trial(strength, math.log10(strength), 0.5, steps=steps, lost=0.0)

    trials = coarse_to_fine(keeps, rule, more, STEPS)
    assert min(t.ewc_lambda for t in trials) == 1e-3
    assert len([t for t in trials if t.steps == STEPS]) == 1


def test_whole_runs_that_diverge_are_followed_by_weaker_ones() -> None:
    failed, good = [diverged(10.0), diverged(3.16)], trial(1.0, 0.9, 0.8)
    by_limit = partial(more_by_limit, max_forgetting=0.02)
    assert more_by_mean(failed) == by_limit(failed) == -1
    assert more_by_mean([good]) == 0
    assert more_by_limit([*failed, good], max_forgetting=0.02) == -1  # it keeps: weaker ones may


def test_large_lambdas_that_diverge_are_passed_over() -> None:
    world = World(100, drift=0.0, breaks=1000)
    trials = by_mean(world)
    assert best_mean([t for t in trials if t.steps == STEPS]).ewc_lambda == 100
    with pytest.raises(NonFiniteError, match="every λ"):
        by_mean(World(100, breaks=0.0))
    rule, more = (partial(one, task="new", before=0.1) for one in (largest, more_by_gain))
    with pytest.raises(NonFiniteError, match="every λ"):  # although λ = 0 does not
        coarse_to_fine(World(100, breaks=1e-9).train, rule, more, STEPS, reference=True)


def test_a_short_run_is_not_shortened_further() -> None:
    world = World(100)
    by_mean(world, 10)
    assert {steps for _, steps in world.trained} == {10}
    assert len(world.trained) == len(set(world.trained))


def test_a_list_is_trained_in_order_and_once() -> None:
    world = World(100)
    trials = grid(world.train, [1000, 1, 10, 1], STEPS)
    assert [t.ewc_lambda for t in trials] == [1, 10, 1000]
    assert {t.steps for t in trials} == {STEPS}


def test_the_mean_is_over_tasks_and_ties_go_to_the_larger_lambda() -> None:
    trials = [trial(1, 0.5, 0.9), trial(10, 0.8, 0.6), trial(100, 0.1, 0.1), diverged(1000)]
    assert best_mean(trials).ewc_lambda == 10
    assert trials[0].mean == pytest.approx(0.7)
    assert diverged(1).mean == -math.inf


def test_where_nothing_stays_under_the_limit_the_largest_is_taken() -> None:
    trials = [trial(1, lost=0.5), trial(10, lost=0.2), trial(100, lost=0.1), diverged(1000)]
    assert smallest(trials, max_forgetting=0.2).ewc_lambda == 10
    assert smallest(trials, max_forgetting=0.05).ewc_lambda == 100
    assert smallest([trial(1, lost=0.9 - 0.87)], max_forgetting=0.03).ewc_lambda == 1


def test_where_nothing_is_gained_the_largest_is_taken() -> None:
    rule = partial(largest, task="new", before=0.6)
    assert rule([trial(0, new=0.5), trial(1, new=0.5), trial(10, new=0.6)]).ewc_lambda == 10
    assert rule([trial(0, new=0.5), trial(1, new=0.4), trial(10, new=0.3)]).ewc_lambda == 10
    assert rule([trial(0, new=1.0), trial(1, new=0.7), trial(10, new=0.8)]).ewc_lambda == 1


@pytest.mark.parametrize(
    ("select", "validation", "limit", "expected"),
    [
        (None, ["a"], None, "best-mean"),
        (None, ["a", "new"], 0.1, "smallest"),
        (None, ["new"], None, "largest"),
        (None, [], None, "largest"),
        ("largest", ["a"], 0.1, "largest"),
        ("best-mean", ["a"], 0.1, "best-mean"),
    ],
)
def test_the_rule_follows_from_what_can_be_measured(
    select: str | None, validation: list[str], limit: float | None, expected: str
) -> None:
    found = choose_rule(select, old=["a"], validation=validation, max_forgetting=limit)
    assert found == expected


@pytest.mark.parametrize(
    ("select", "limit", "message"),
    [
        (None, 0.1, "NAME is one of a, or --select largest"),
        ("best-mean", None, "needs held-out data of an old task"),
        ("smallest", None, "needs --max-forgetting"),
    ],
)
def test_rules_that_have_nothing_to_go_by_are_refused(
    select: str | None, limit: float | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        choose_rule(select, old=["a"], validation=["new"], max_forgetting=limit)


def test_strengths_can_be_typed_again() -> None:
    show: Callable[[float], str] = "{:g}".format
    assert [show(strength_at(k)) for k in (-4, 0, 1, 2, 3, 8)] == [
        *("0.1", "1", "1.78", "3.16", "5.62", "100")
    ]
