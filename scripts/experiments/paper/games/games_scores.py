"""What the records of the games say: scores, what is kept, and which claims hold."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scripts.experiments.lib.records import Figures, Mean, Record, chosen, mean
from scripts.experiments.paper.games.environments import CHANNELS, GREY, OCCUPIED
from scripts.experiments.paper.games.protocol import (
    EWC,
    HEADS,
    JOINT,
    L2,
    NONE,
    RECOGNISED,
    SHARED,
    SINGLE,
)

METHODS = (JOINT, NONE, L2, EWC, RECOGNISED, SHARED, HEADS)
TITLES = {CHANNELS: "ten channels", OCCUPIED: "occupied or not", GREY: "grey, 84 × 84"}
LEAST = 3  # times random, and a point above: a single agent below has not learned its game
TWICE = 2.0  # times the sum without protection
NEARLY = 0.95  # of the sum with true labels: as much as them
CEILING = 0.75  # of the sum of the single agents
Looks = NDArray[np.float64]


def last_third(values: Any) -> Looks:
    """Return the last third of some looks, of one at least."""
    looks = np.asarray(values, dtype=float)
    return looks[-max(1, len(looks) // 3) :]


def views(records: Sequence[Record]) -> list[str]:
    """Return the views that have a row, and a single agent of each of its games."""
    found = []
    for view in TITLES:
        rows = [r for r in chosen(records, view=view) if r.unit.method in METHODS]
        if rows and set(rows[0].unit.settings["games"]) <= references(records, view).keys():
            found.append(view)
    return found


def singles(records: Sequence[Record], view: str) -> dict[str, list[Figures]]:
    """Return the figures of the single agents by game, in the order of the seeds."""
    found: dict[str, list[Figures]] = {}
    for record in chosen(records, method=SINGLE, view=view):
        found.setdefault(record.unit.settings["games"][0], []).append(record.figures)
    return found


def single_return(figures: Figures) -> float:
    """Return a single agent's mean return over the last third of its looks."""
    return float(last_third(figures["looks"])[:, 1].mean())


def references(records: Sequence[Record], view: str) -> dict[str, tuple[float, float]]:
    """Return the returns of random actions and of a single agent by game, means over seeds."""
    return {
        game: (
            float(np.mean([one["random"] for one in some])),
            float(np.mean([single_return(one) for one in some])),
        )
        for game, some in singles(records, view).items()
    }


def learned(low: float, high: float) -> bool:
    """Return whether a single agent has learned its game: three times random, a point above."""
    return high >= LEAST * low and high - low >= 1


def counted(records: Sequence[Record], view: str) -> dict[str, tuple[float, float]]:
    """Return the references of the games that a single agent has learned."""
    return {game: pair for game, pair in references(records, view).items() if learned(*pair)}


def scores(returns: Any, low: float, high: float) -> Looks:
    """Return (return − random) / (single − random), clipped to 0 … 1; 0 where single is no more."""
    values = np.asarray(returns, dtype=float)
    if high <= low:
        return np.zeros_like(values)
    return ((values - low) / (high - low)).clip(0, 1)


def ceiling(records: Sequence[Record], view: str) -> float:
    """Return the single agents' own sum of scores, over the last third of their looks."""
    found = singles(records, view)
    return math.fsum(
        float(
            np.mean([scores(last_third(one["looks"])[:, 1], *pair).mean() for one in found[game]])
        )
        for game, pair in counted(records, view).items()
    )


def scores_of(record: Record, found: Mapping[str, tuple[float, float]]) -> dict[str, Looks]:
    """Return the scores of each game that has a reference, over the looks."""
    looks = np.array(record.figures["looks"])
    return {
        game: scores(looks[:, 1 + i], *found[game])
        for i, game in enumerate(record.unit.settings["games"])
        if game in found
    }


def sums(records: Sequence[Record], view: str, method: str) -> tuple[Looks, Looks]:
    """Return steps, and the sum of scores over the games that count, (seeds, looks)."""
    some = chosen(records, method=method, view=view)
    if not some:
        return np.zeros(0), np.zeros((0, 0))
    found = counted(records, view)
    steps = np.array(some[0].figures["looks"])[:, 0]
    zero = np.zeros(len(steps))
    return steps, np.array([sum(scores_of(record, found).values(), zero) for record in some])


def lasts(records: Sequence[Record], view: str, method: str) -> dict[int, float]:
    """Return the mean sum of scores over the last third of training, by seed."""
    seeds = [record.unit.seed for record in chosen(records, method=method, view=view)]
    found = sums(records, view, method)[1]
    return {s: float(last_third(line).mean()) for s, line in zip(seeds, found, strict=True)}


def returns(records: Sequence[Record], view: str, method: str) -> dict[str, Mean]:
    """Return each game's mean return over the last third of training, over seeds."""
    some = chosen(records, method=method, view=view)
    means = np.array([last_third(record.figures["looks"]).mean(0)[1:] for record in some])
    return {
        game: mean(column.tolist())
        for game, column in zip(some[0].unit.settings["games"], means.T, strict=True)
    }


def after_as_many_steps(records: Sequence[Record], view: str) -> dict[str, float]:
    """Return single agents' returns at as many steps of a game as a row has had by then.

    The mean over the looks of the last third, over the stretches of all seeds.
    """
    rows = [r for m in METHODS if m != JOINT for r in chosen(records, method=m, view=view)]
    of_seed = {record.unit.seed: record for record in rows}
    found: dict[str, list[float]] = {}
    for record in of_seed.values():
        starts, ends, players = _stretches(record)
        looks = last_third(record.figures["looks"])[:, 0]
        for number, game in enumerate(record.unit.settings["games"]):
            curves = [np.array(one["looks"]) for one in singles(records, view)[game]]
            own = players == number
            for look in looks:
                steps = float((np.minimum(ends[own], look) - starts[own]).clip(0).sum())
                values = [np.interp(steps, curve[:, 0], curve[:, 1]) for curve in curves]
                found.setdefault(game, []).append(float(np.mean(values)))
    return {game: float(np.mean(values)) for game, values in found.items()}


def _stretches(record: Record) -> tuple[Looks, Looks, NDArray[np.int64]]:
    """Return where each stretch begins and ends, in steps, and the number of its game."""
    stretches = np.array(record.figures["stretches"])
    ends = stretches[:, 1].cumsum()
    return ends - stretches[:, 1], ends, stretches[:, 0]


class Kept(NamedTuple):
    """Mean scores of the games that count: by seed, over the last third or all visits."""

    played: Mean  # of the game that is played
    away: Mean  # of all others
    left: Mean  # at the last look of a visit
    found: Mean  # at the last look before the game's next visit


def kept(records: Sequence[Record], view: str, method: str) -> Kept | None:
    """Return what is known of games while they are played and while they are away."""
    lines = [_kept(record, records, view) for record in chosen(records, method=method, view=view)]
    if not lines:
        return None
    return Kept(*(mean(column) for column in zip(*lines, strict=True)))


def _kept(record: Record, records: Sequence[Record], view: str) -> list[float]:
    names = record.unit.settings["games"]
    found = scores_of(record, counted(records, view))
    steps = np.array(record.figures["looks"])[:, 0]
    starts, ends, players = _stretches(record)
    at = np.searchsorted(ends, steps)
    late = np.arange(len(steps)) >= len(steps) - len(last_third(steps))
    played, away, left, before = [], [], [], []
    for number, game in enumerate(names):
        if game not in found:
            continue
        own = players[at] == number
        played += found[game][late & own].tolist()
        away += found[game][late & ~own].tolist()
        visits = np.flatnonzero(players == number)
        for visit, following in pairwise(visits):
            inside = np.flatnonzero((steps > starts[visit]) & (steps <= ends[visit]))
            until = np.flatnonzero((steps > ends[visit]) & (steps <= starts[following]))
            if len(inside) and len(until):
                left.append(found[game][inside[-1]])
                before.append(found[game][until[-1]])
    return [float(np.mean(some)) if some else math.nan for some in (played, away, left, before)]


def known_again(record: Record) -> tuple[int, int]:
    """Return how many visits to a known game are in the context of its first, and of how many."""
    starts, ends, players = _stretches(record)
    changes = record.figures["contexts"]
    begins = np.array([step for step, _ in changes] + [ends[-1]], dtype=float)
    contexts = np.array([context for _, context in changes])
    first: dict[int, int] = {}
    same = visits = 0
    for start, end, game in zip(starts, ends, players.tolist(), strict=True):
        within = (np.minimum(begins[1:], end) - np.maximum(begins[:-1], start)).clip(0)
        main = int(np.argmax(np.bincount(contexts, weights=within)))
        if game in first:
            same, visits = same + (first[game] == main), visits + 1
        first.setdefault(game, main)
    return same, visits


class Claim(NamedTuple):
    """What is claimed of a method, and by how much it is so, seed by seed."""

    method: str
    text: str
    ratio: float  # of the sum to that of the other, or to the limit
    by_seed: list[float]  # the same of each seed alone
    gap: Mean  # above 0 where the claim is true
    verdict: str


def claims(records: Sequence[Record], view: str, seeds: int) -> list[Claim]:
    """Return the claims whose methods have a seed in common, those of the paper first."""
    if view not in views(records):
        return []
    found = {method: lasts(records, view, method) for method in METHODS}
    single = ceiling(records, view)
    alone = singles(records, view)
    whole = all(len(alone[game]) >= seeds for game in counted(records, view))
    limits: list[tuple[str, str, float, str | float]] = [
        (NONE, "no protection is below 1", 1.0, 1.0),
        (EWC, "EWC is above no protection", 1.0, NONE),
        (RECOGNISED, f"the recogniser has at least {NEARLY:.0%} of true labels", NEARLY, EWC),
        (EWC, f"EWC is at least {TWICE:g} times no protection", TWICE, NONE),
        (EWC, f"EWC has at least {CEILING:.0%} of the single agents", CEILING, single),
        (EWC, "EWC is above L2", 1.0, L2),
    ]
    result = []
    for method, text, share, other in limits:
        own = found[method]
        against = found[other] if isinstance(other, str) else dict.fromkeys(own, other)
        both = sorted(own.keys() & against.keys())
        if not both:
            continue
        gap = mean([own[seed] - share * against[seed] for seed in both])
        if method == NONE:
            gap = gap._replace(value=-gap.value)
        by_seed = [_ratio(own[seed], against[seed]) for seed in both]
        ratio = _ratio(*(math.fsum(one[seed] for seed in both) for one in (own, against)))
        result.append(
            Claim(method, text, ratio, by_seed, gap, verdict(gap, seeds) if whole else "–")
        )
    return result


def _ratio(one: float, other: float) -> float:
    return one / other if other else math.nan


def verdict(gap: Mean, seeds: int) -> str:
    """Say whether a gap is above 0 by two standard errors, once all seeds are done."""
    if gap.seeds < max(2, seeds):
        return "–"
    if gap.value > 2 * gap.error:
        return "holds"
    return "does not hold" if gap.value < -2 * gap.error else "undecided"
