"""Games in sequence (Kirkpatrick et al. 2017, figure 4): five of MinAtar, or ten of Atari.

    scripts/experiments/all --only games           the five, all rows and seeds
    python scripts/experiments/paper/games/games.py --suite atari --plan

With `--suite atari` the same program plays Atari's games with the published network and buffers.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from scripts.experiments.lib.records import Experiment, Figures, Record, Unit, best
from scripts.experiments.lib.sittings import main
from scripts.experiments.paper.games.agent import PUBLISHED, Learning
from scripts.experiments.paper.games.environments import (
    ATARI,
    CHANNELS,
    GAMES,
    GREY,
    MINATAR,
    OCCUPIED,
    PACKAGES,
    REPEATS,
)
from scripts.experiments.paper.games.games_page import REACHED, report
from scripts.experiments.paper.games.games_scores import scores
from scripts.experiments.paper.games.protocol import (
    EWC,
    GAUSSIAN,
    HEADS,
    JOINT,
    L2,
    NONE,
    PROTECTED,
    RECOGNISED,
    SEARCH,
    SHARED,
    SINGLE,
    SOFTMAX,
    Settings,
    from_record,
    measure_sequence,
    measure_single,
    settings_of,
)
from scripts.experiments.paper.games.recogniser import Recognising

NAME, ATARI_NAME = "games", "games-atari"
SEEDS = 3
ROWS = {
    CHANNELS: (JOINT, NONE, L2, EWC, RECOGNISED, SHARED, HEADS),
    OCCUPIED: (NONE, EWC, RECOGNISED),
}
ATARI_ROWS = (NONE, EWC, RECOGNISED)
LATER = (JOINT, L2, SHARED, HEADS)
SEARCHED = ("breakout", "space_invaders")
SEARCH_SEED = 1000  # of no row
STRENGTHS = {
    (EWC, GAUSSIAN): (1.0, 10.0, 100.0, 1000.0),
    (EWC, SOFTMAX): (1.0, 10.0, 100.0, 1000.0),
    (L2, GAUSSIAN): (0.001, 0.01, 0.1),
    (NONE, GAUSSIAN): (0.0,),  # to compare with
}
"""What is tried first; while the best is at an end, ten times beyond it, BEYOND times at most."""
BEYOND = 2
ABSENT = len(GAMES[MINATAR]) - 1
"""How much the game that is not played counts in the search: so many are not played in the rows."""
SPEED = {MINATAR: 1000.0, ATARI: 30.0}
"""Steps a second of one core: measured for MinAtar, at most so many for Atari."""

BASE = Settings(games=GAMES[MINATAR], noise=(0.003, 0.01, 0.02, 0.03, 0.05, 0.1))
SMALL = replace(
    BASE,
    games=SEARCHED,
    visits=2,
    stretch=200,
    capacity=400,
    convolutions=((4, 3, 1),),
    hidden=16,
    learning=Learning(least=100, epsilon_steps=200, target_updates=20),
    fisher_batches=2,
    least_steps=100,
    looks=4,
    look_copies=2,
    look_steps=20,
    random_copies=4,
    noise=(0.01, 0.1),
    noise_draws=1,
)
SHORT = Recognising(window=4, alike=2.0, most=4)
ATARI_BASE = Settings(
    suite=ATARI,
    view=GREY,
    games=GAMES[ATARI],
    visits=3,
    stretch=REACHED // REPEATS // 3 // 4 * 4,
    convolutions=PUBLISHED.convolutions,
    hidden=PUBLISHED.hidden,
    learning=Learning(
        learning_rate=2.5e-4, target_updates=7500 // 4, least=50_000 // 4, epsilon=0.01,
        epsilon_steps=1_000_000,
    ),
    ewc_lambda=400.0,
    looks=300,
    look_steps=4500,
    random_copies=30,
)  # fmt: skip
MACHINERY = replace(
    ATARI_BASE, games=("breakout", "pong"), visits=2, stretch=1200, capacity=4000,
    learning=replace(ATARI_BASE.learning, least=200, epsilon_steps=1000), fisher_batches=10,
    least_steps=500, looks=2, look_copies=2, look_steps=100,
    recognising=Recognising(window=16, most=4),
)  # fmt: skip
SMALL_ATARI = replace(
    MACHINERY, stretch=24, capacity=100, fisher_batches=1, least_steps=12, look_copies=1,
    look_steps=5, learning=replace(MACHINERY.learning, least=12, epsilon_steps=50), hidden=32,
    recognising=Recognising(window=2, most=4),
)  # fmt: skip


def plan(records: Sequence[Record], quick: bool) -> list[Unit]:
    """List the single games, the search on two of them, and once it is done all rows.

    The view with channels comes first, and in it all seeds of what the paper claims; single agents
    of further seeds make their references better, and come after them.
    """
    return sorted(_units(records, quick), key=_turn)


def _turn(unit: Unit) -> tuple[bool, bool, bool, int]:
    seed = 0 if unit.method == SEARCH else unit.seed
    again = unit.method == SINGLE and seed > 0
    return unit.settings["view"] == OCCUPIED, unit.method in LATER, again, seed


def _units(records: Sequence[Record], quick: bool) -> list[Unit]:
    base, seeds = (SMALL, 1) if quick else (BASE, SEEDS)
    units = [_atari_unit(quick)]
    for view in ROWS:
        for game in base.games:
            noise = base.noise if view == CHANNELS else ()
            one = replace(base, view=view, games=(game,), noise=noise)
            units += [_unit(SINGLE, one, seed) for seed in range(seeds)]
    done = {record.unit.digest: record for record in records}
    references = []
    for game in SEARCHED:
        unit = _unit(SINGLE, replace(base, view=CHANNELS, games=(game,)), 0)
        if unit.digest not in done:
            return units
        figures = done[unit.digest].figures
        references.append([figures.get("random", 0.0), figures.get("end", 1.0)])
    found: dict[str, Settings] = {}
    for method in (EWC, L2, NONE):
        search, is_done = _search(base, method, references, done, quick)
        units += search
        if is_done:
            found[method] = from_record(best([done[unit.digest] for unit in search]).unit.settings)
    for view, methods in ROWS.items():
        for method in methods:
            chosen = found.get(L2 if method == L2 else EWC)
            one = replace(base, view=view, noise=())
            if method in PROTECTED:
                if chosen is None:
                    continue
                one = replace(one, ewc_lambda=chosen.ewc_lambda, likelihood=chosen.likelihood)
            if method == RECOGNISED:
                one = replace(one, recognising=SHORT if quick else Recognising())
            units += [_unit(method, one, seed) for seed in range(seeds)]
    return units


def _search(
    base: Settings, method: str, references: Any, done: Mapping[str, Record], quick: bool
) -> tuple[list[Unit], bool]:
    """Return the trials of a method so far, and whether these are all."""
    two = replace(
        base,
        games=SEARCHED,
        visits=2,
        stretch=base.stretch // 2,
        looks=base.looks // 3 or 1,
        noise=(),
    )

    def trial(likelihood: str, strength: float) -> Unit:
        one = replace(two, ewc_lambda=strength, likelihood=likelihood)
        return _unit(SEARCH, one, SEARCH_SEED, searched=method, references=references)

    units: list[Unit] = []
    for (searched, likelihood), strengths in STRENGTHS.items():
        if searched == method:
            units += _tried(partial(trial, likelihood), strengths[: 1 if quick else None], done)
    return units, all(unit.digest in done for unit in units)


def _tried(
    trial: Callable[[float], Unit], strengths: Sequence[float], done: Mapping[str, Record]
) -> list[Unit]:
    """Return the trials of some strengths, and of further ones beyond an end that is best."""
    tried = list(strengths)
    for _ in range(BEYOND if len(tried) > 1 else 0):
        units = [trial(strength) for strength in tried]
        if any(unit.digest not in done for unit in units):
            break
        strength = best([done[unit.digest] for unit in units]).unit.settings["ewc_lambda"]
        if strength == tried[0]:
            tried.insert(0, float(f"{strength / 10:g}"))
        elif strength == tried[-1]:
            tried.append(strength * 10)
        else:
            break
    return [trial(strength) for strength in tried]


def _unit(method: str, settings: Settings, seed: int, name: str = NAME, **others: Any) -> Unit:
    return Unit(name, method, seed, {**others, **settings_of(settings)})


def _atari_unit(quick: bool) -> Unit:
    return _unit(RECOGNISED, SMALL_ATARI if quick else MACHINERY, 0)


def plan_atari(records: Sequence[Record], quick: bool) -> list[Unit]:
    """List Atari's rows in the published size, or two games for seconds."""
    if quick:
        return [_unit(RECOGNISED, SMALL_ATARI, 0, ATARI_NAME)]
    singles = [
        _unit(SINGLE, replace(ATARI_BASE, games=(game,)), 0, ATARI_NAME) for game in GAMES[ATARI]
    ]
    known = [_unit(method, ATARI_BASE, 0, ATARI_NAME) for method in (NONE, EWC)]
    one = replace(ATARI_BASE, recognising=Recognising())
    return [*singles, *known, _unit(RECOGNISED, one, 0, ATARI_NAME)]


def cost(unit: Unit) -> float:
    """Return about how long a unit takes on one core."""
    settings = from_record(unit.settings)
    games, visits = len(settings.games), settings.visits
    steps = games * visits * settings.stretch
    looked = settings.looks * settings.look_copies * settings.look_steps * games
    looked += len(settings.noise) * 2 * settings.noise_draws * (
        settings.look_copies * settings.look_steps
    )  # fmt: skip
    frames = steps / SPEED[settings.suite]
    return frames + looked * (40e-6 if settings.suite == MINATAR else 3e-3)


def measure(unit: Unit) -> Figures:
    """Play one row with one seed, or a single game, or a trial of the search."""
    settings = from_record(unit.settings)
    began = time.process_time()
    if unit.method == SINGLE:
        figures = measure_single(settings, unit.seed)
    elif unit.method == SEARCH:
        figures = measure_sequence(settings, unit.settings["searched"], unit.seed)
        figures["validation"] = searched_score(figures, unit.settings["references"])
    else:
        figures = measure_sequence(settings, unit.method, unit.seed)
    figures["steps a second"] = figures["steps"] / (time.process_time() - began)
    return figures


def searched_score(figures: Figures, references: Sequence[tuple[float, float]]) -> float:
    """Return the mean score over the second half; a game that is not played counts ABSENT times.

    Args:
        figures: Of a run.
        references: Returns of random actions and of a single agent, by game.
    """
    ends = np.cumsum([steps for _, steps in figures["stretches"]])
    total = weights = 0.0
    for step, *found in figures["looks"][len(figures["looks"]) // 2 :]:
        played, _ = figures["stretches"][int(np.searchsorted(ends, step))]
        for game, (value, pair) in enumerate(zip(found, references, strict=True)):
            weight = 1 if game == played else ABSENT
            total += weight * float(scores(value, *pair))
            weights += weight
    return total / weights


def _experiment(
    name: str, suites: tuple[str, ...], seeds: int, planned: Mapping[str, tuple[str, ...]]
) -> Experiment:
    return Experiment(
        name,
        "Games in sequence" if name == NAME else "Atari's games in sequence",
        cost,
        plan if name == NAME else plan_atari,
        measure,
        partial(report, name=name, seeds=seeds, planned=planned),
        packages=tuple(PACKAGES[suite] for suite in suites),
    )


EXPERIMENT = _experiment(NAME, (MINATAR, ATARI), SEEDS, ROWS)
ATARI_EXPERIMENT = _experiment(ATARI_NAME, (ATARI,), 1, {GREY: ATARI_ROWS})


def suite_of(arguments: list[str]) -> str:
    """Take `--suite NAME` out of the arguments; exits where there is no such suite."""
    if "--suite" not in arguments:
        return MINATAR
    at = arguments.index("--suite")
    suite = arguments[at + 1] if at + 1 < len(arguments) else ""
    if suite not in GAMES:
        sys.exit(f"--suite: expected {' or '.join(GAMES)}, found {suite!r}")
    del arguments[at : at + 2]
    return suite


if __name__ == "__main__":
    main(ATARI_EXPERIMENT if suite_of(sys.argv) == ATARI else EXPERIMENT)
