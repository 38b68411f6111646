"""Curves of what is kept of the old task against what is learned of the new one.

A curve is read at one new score: between neighbouring points of its upper envelope in a straight
line, never beyond its ends.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Curve(NamedTuple):
    """A method's points with one seed, and what came of every test row at each."""

    learned: Floats  # (points, rows of the new task)
    kept: Floats  # (points, rows of the old task)
    ended: bool = False  # whether the last point is training without a penalty, at the same rate

    def means(self) -> tuple[Floats, Floats]:
        """Return the scores on the new task and on the old one, a pair a point."""
        return self.learned.mean(1), self.kept.mean(1)


class Estimate(NamedTuple):
    """A figure with its standard error, and how many seeds have it of how many."""

    value: float  # NaN where no seed has it
    error: float
    seeds: int
    of: int
    bound: str = ""  # "≥", "≤" or "~" where in some seed a whole curve learns more than the level


def kept_at(learned: Floats, kept: Floats, level: float) -> Floats:
    """Read curves at a new score.

    The neighbours of the level on the upper envelope are, to the right, the point that keeps most
    of those that learn so much or more; to the left, the point that learns most of those that keep
    more than that one. Where there is none to the left the right one's old score is returned: so
    much is kept, at a higher new score.

    Args:
        learned: New scores, (…, points).
        kept: Old scores, (…, points).
        level: The new score.

    Returns:
        Old scores, (…); NaN where no point learns so much.
    """
    shape = np.broadcast_shapes(learned.shape, kept.shape)
    learned, kept = np.broadcast_to(learned, shape), np.broadcast_to(kept, shape)
    reaches = learned >= level
    right = _first(np.where(reaches, kept, -np.inf), learned)
    x1, y1 = _at(learned, right), _at(kept, right)
    before = ~reaches & (kept > y1[..., None])
    left = _first(np.where(before, learned, -np.inf), kept)
    x0, y0 = _at(learned, left), _at(kept, left)
    with np.errstate(invalid="ignore", divide="ignore"):
        between = y0 + (level - x0) / (x1 - x0) * (y1 - y0)
    found = np.where(before.any(-1), between, y1)
    return np.where(reaches.any(-1), found, np.nan)


def _first(values: Floats, then: Floats) -> NDArray[np.intp]:
    """Return where values are largest along the last axis; of equal ones, where `then` is."""
    largest = values == values.max(-1, keepdims=True)
    return np.where(largest, then, -np.inf).argmax(-1)


def _at(values: Floats, places: NDArray[np.intp]) -> Floats:
    return np.take_along_axis(values, places[..., None], -1)[..., 0]


def bounded(curves: Mapping[int, Curve], level: float) -> bool:
    """Say whether in some seed every point learns more than the level: at least that is kept.

    The end without a penalty does not count: where such a training fails, it learns little.
    """
    points = (one.means()[0][: -1 if one.ended else None] for one in curves.values())
    return any(learned.min() > level for learned in points)


DRAWS = 400
"""Of seeds, and of test rows for each: the errors are the deviation over them."""


def estimate(curves: Mapping[int, Curve], level: float, draws: int = DRAWS) -> Estimate:
    """Read a method's curves at a new score, and average over the seeds that reach it.

    Args:
        curves: By seed.
        level: The new score.
        draws: Of seeds and of test rows.
    """
    values = {seed: float(kept_at(*curve.means(), level)) for seed, curve in curves.items()}
    drawn = {seed: _drawn(seed, curve, level, len(curves), draws) for seed, curve in curves.items()}
    return _averaged(values, drawn, draws)._replace(bound="≥" * bounded(curves, level))


def difference(
    ours: Mapping[int, Curve], theirs: Mapping[int, Curve], level: float, draws: int = DRAWS
) -> Estimate:
    """Read two methods' curves at a new score, and average ours minus theirs over common seeds.

    Both are of the same test rows: each draw of rows is the same for both.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    values, drawn = {}, {}
    for seed in seeds:
        pair = ours[seed], theirs[seed]
        first, second = (float(kept_at(*curve.means(), level)) for curve in pair)
        values[seed] = first - second
        first_draws, second_draws = (_drawn(seed, one, level, len(seeds), draws) for one in pair)
        drawn[seed] = first_draws - second_draws
    ends = [bounded({seed: some[seed] for seed in seeds}, level) for some in (ours, theirs)]
    bound = {"01": "≤", "10": "≥", "11": "~"}.get("".join(str(int(end)) for end in ends), "")
    return _averaged(values, drawn, draws)._replace(bound=bound)


def _averaged(values: Mapping[int, float], drawn: Mapping[int, Floats], draws: int) -> Estimate:
    """Average over the seeds that have a value; the error is that over draws of seeds and rows.

    Draws of n seeds vary by (n − 1)/n of what n seeds vary by: that is made up for. Of one seed
    there is no error.
    """
    seeds = [seed for seed, value in values.items() if not np.isnan(value)]
    if not seeds:
        return Estimate(np.nan, np.nan, 0, len(values))
    generator = np.random.default_rng(0)
    chosen = generator.integers(len(seeds), size=(draws, len(seeds)))
    means = []
    for draw, places in enumerate(chosen):
        # A seed that is drawn twice has other rows each time.
        some = [drawn[seeds[place]][at, draw] for at, place in enumerate(places)]
        some = [value for value in some if not np.isnan(value)]
        if some:
            means.append(np.mean(some))
    some = [values[seed] for seed in seeds]
    error = np.nan
    if len(means) > 1 < len(seeds):
        missing = np.var(some, ddof=1) / len(some) ** 2
        error = float(np.sqrt(np.var(means, ddof=1) + missing))
    return Estimate(float(np.mean(some)), error, len(seeds), len(values))


def _drawn(seed: int, curve: Curve, level: float, times: int, draws: int) -> Floats:
    """Read a curve at a new score with other test rows, (times, draws)."""
    means = []
    for task, rows in enumerate((curve.learned, curve.kept)):
        weights = _weights(seed, task, rows.shape[1], times * draws)
        means.append(
            (weights @ rows.T.astype(np.float32) / rows.shape[1]).reshape(times, draws, -1)
        )
    return kept_at(means[0], means[1], level)


@lru_cache(10)
def _weights(seed: int, task: int, rows: int, draws: int) -> NDArray[np.float32]:
    """Say how often each row is drawn, (draws, rows): alike for every method."""
    generator = np.random.default_rng([seed, task])
    return generator.multinomial(rows, np.full(rows, 1 / rows), size=draws).astype(np.float32)


def best_learned(methods: Sequence[Mapping[int, Curve]]) -> float:
    """Return the highest mean new score over seeds, of any point of any method."""
    return max(
        float(np.mean([curve.means()[0] for curve in curves.values()], axis=0).max())
        for curves in methods
        if curves
    )


def unpacked(outcomes: str | Sequence[float], rows: int) -> Floats:
    """Read what came of each row, as a record has it."""
    if isinstance(outcomes, str):
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(outcomes), dtype=np.uint8))
        return bits[:rows].astype(float)
    return np.array(outcomes, dtype=float)
