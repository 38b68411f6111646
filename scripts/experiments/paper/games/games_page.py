"""The page of the games: scores over time, what was recognised, what the Fisher knows."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.experiments.lib.common import markdown
from scripts.experiments.lib.pictures import COLOURS, error_bars, panels, save_picture, write_csv
from scripts.experiments.lib.records import Figures, Findings, Mean, Record, Row, chosen, mean
from scripts.experiments.paper.games.environments import (
    ATARI,
    CHANNELS,
    GAMES,
    GREY,
    OCCUPIED,
    REPEATS,
)
from scripts.experiments.paper.games.environments import VIEWS as SEEN
from scripts.experiments.paper.games.protocol import (
    EWC,
    HEADS,
    JOINT,
    L2,
    NONE,
    RECOGNISED,
    SEARCH,
    SHARED,
    SINGLE,
    Settings,
    from_record,
)
from scripts.experiments.paper.weight_noise import SHAPED, UNIFORM

REACHED = 20_000_000
"""Frames of a game after which the published EWC is on, four to a step: as far as published."""
METHODS = (JOINT, NONE, L2, EWC, RECOGNISED, SHARED, HEADS)
COLOUR = dict(zip(METHODS, ("#666666", *COLOURS), strict=False))
LEAST = 3  # times random, and a point above: a single agent below has not learned its game
NEARLY = 0.95  # of the sum with true labels: as much as them
TITLES = {CHANNELS: "ten channels", OCCUPIED: "occupied or not", GREY: "grey, 84 × 84"}
Looks = NDArray[np.float64]
TEXT = """
{s[games]} games in sequence, {s[visits]} visits to each in a random order, {s[stretch]:,} steps a
visit on average ({low:,} to {high:,}); all methods see the same stretches. Double DQN sees one
screen, or the last four where cells are only occupied or not: {network}. All games share the
weights; each has its own gains and biases in every layer, its own replay buffer of {s[capacity]:,}
steps and its own ε, which falls from 1 to {s[epsilon]:g} in its first {s[epsilon_steps]:,} steps.
{s[copies]} copies of a game step together, and one minibatch of {s[batch_size]} is learned for
{s[copies]} steps. Adam at {s[learning_rate]:g}, γ {s[discount]:g}, rewards clipped to ±1, target
network copied every {s[target_updates]} updates. Where cells are only occupied or not, the gold and
the enemies of asterix look alike.

A game's score is (return − random) / (single − random), clipped to 0 … 1, where single is an agent
that plays this game alone for as many steps (mean of its last three looks and of the seeds). A
return is the mean of {s[look_copies]} episodes of at most {s[look_steps]} steps, without random
actions. Scores are clipped at each look, which raises those near random and lowers those near
single, by all methods. Seeds that are done: {done} of {seeds}; a claim holds here above two
standard errors over them, which is lenient with three.

![Sum of scores over training]({name}.png)

{table}

The figures are sums over {counted} games; the last third is the mean of all looks in
it.{ratios}{apart}

![Score of each game over training, its visits shaded]({name}-each.png)

Curves and visits of the first seed. The returns of agents that play one game alone, and of random
actions:

{singles}

## Protection

At each switch the Fisher of the game that was left is measured on {s[fisher_batches]} minibatches
of {s[fisher_states]} states of its buffer, in place of what an earlier visit had measured; the
penalty is the sum over all other games, merged by the rule separate. A game's own gains and biases
are outside both. L2 is the same with a Fisher of 1. DQN has no likelihood: `gaussian` takes all Q
values as means of variance 1, `softmax` takes Q/τ as logits, τ = {s[temperature]:g}. λ and the
likelihood are those with the best mean score over the second half of a run of {searched}, one seed
that is not a row's ({cost:.1f} hours of processor time in all); the game that is not played counts
four times, since four of five are not played in the rows. They are fixed for all rows, also for
those with other heads, gains or frames:

{search}

Other than published: the penalty holds from the first switch, not after 20 million frames; Adam
takes the place of RMSProp; a run has {s[visits]} visits of each game.

{overlap}

{recognition}

{noise}

{atari}
"""
OVERLAP = """
## Overlap of the games' Fishers

![Overlap of Fishers by layer]({name}-overlap.png)

After the last visit, mean over all pairs of games and seeds: {overlaps}.
"""
RECOGNITION = """
## Recognising the game

The recogniser sees one copy, every fourth step. In each context each pixel has a Dirichlet prior
that weighs as much as {prior:g} frames. Its mean is how often each value is seen, whatever the
pixel; the hold-out has this prior alone. (The published hold-out is uniform. It would never win
here, where few cells are occupied.) The paper's windows have 4 frames. Here a window of {window} is
one frame to the recogniser, of all cells that were occupied in it: in single frames, scripted play
of one game was split into many contexts. Windows of 4 are measured beside it, as are the other
frames, on the same play. Prior and window were chosen on scripted play of all games, before any
run. To measure a score, each episode takes the context that its last {window} frames fit best, or
those so far. Purity is the share of time in which the game is the one that its context has seen
most. A switch is found if the context changes before the next one, with a delay to that change; all
other changes are false alarms. The baseline takes the highest channel in use as the context. Means
over seeds:

{table}

![Recognised context over time]({name}-contexts.png)
"""
NOISE = """
## Noise on a trained agent

![Score against the size of the noise]({name}-noise.png)

Noise on the shared weights of agents that play one game alone, uniform or with a variance in
proportion to 1/(F + ε) as for [MNIST](weight-noise.md), F by the likelihood `gaussian`; size is the
root mean square over weights. Noise in the null space is [on MNIST](weight-noise.md) alone.
Mean score over seeds, then over all games that are learned:

{table}
"""
MACHINE = """
## Atari

The same program with `--suite atari` (84 × 84, four frames, the published network) took {steps:,}
steps with {updates:,} updates at {speed:.0f} steps a second, the Fishers included. {games} games of
{frames:,} frames each, after which the published EWC is on, would take {hours:,.0f} hours for a row
and seed on one such core; the buffers of {games} games hold {memory:.1f} GB.
"""


def report(records: Sequence[Record], folder: Path, *, name: str, seeds: int) -> Findings:
    """Draw all figures, and write the tables."""
    rows = _rows(records, name, seeds)
    played = [r for r in records if r.unit.method != SEARCH]
    if not played:
        return Findings("", rows)
    main = [r for r in played if r.unit.settings["suite"] != ATARI or name != "games"]
    text = "\n\n".join(_atari(r) for r in played if r.unit.settings["suite"] == ATARI)
    write_csv(folder, name, ["frames", "method", "seed", "step", "game", "return"], _lines(main))
    _draw_sums(main, folder, name)
    if chosen(main, method=SINGLE) and any(r.unit.method in METHODS for r in main):
        text = _whole(records, main, folder, name, seeds, text)
    return Findings("\n\n".join(part for part in text.split("\n\n") if part.strip()), rows)


def _whole(
    records: Sequence[Record], main: Sequence[Record], folder: Path, name: str, seeds: int, end: str
) -> str:
    rows = [r for r in main if r.unit.method in METHODS]
    settings = from_record(rows[0].unit.settings)
    lengths = [steps for r in rows for _, steps in r.figures["stretches"]]
    _draw_each(main, folder, name)
    apart = {view: _apart(main, view) for view in _views(main)}
    said = "; ".join(f"{', '.join(some)} ({TITLES[v]})" for v, some in apart.items() if some)
    network = ", ".join(
        [f"a convolution of {n} channels, {k} × {k}" for n, k, _ in settings.convolutions]
        + [f"a hidden layer of {settings.hidden}"]
    )
    searches = chosen(records, method=SEARCH)
    hours = sum(r.processor_seconds or r.seconds for r in searches) / 3600
    apart_text = (
        f" Apart, since a single agent stays under {LEAST} times random or one point above it: "
        f"{said}."
    )
    return TEXT.format(
        s={**vars(settings), **vars(settings.learning), "games": len(settings.games)},
        low=min(lengths),
        high=max(lengths),
        network=network,
        done=len({r.unit.seed for r in rows}),
        seeds=seeds,
        name=name,
        table=_table(main),
        counted=" or ".join(
            dict.fromkeys(str(len(references(main, v)) - len(some)) for v, some in apart.items())
        ),
        ratios=_ratios(main),
        apart=apart_text if said else "",
        singles=_singles(main),
        searched=_searched(searches[0].unit.settings) if searches else "–",
        cost=hours,
        search=_search(searches),
        overlap=_overlap(main, folder, name),
        recognition=_recognition(main, folder, name),
        noise=_noise(main, folder, name),
        atari=end,
    )


# Scores


def references(records: Sequence[Record], view: str) -> dict[str, tuple[float, float]]:
    """Return the returns of random actions and of a single agent by game, means over seeds."""
    found: dict[str, list[Figures]] = {}
    for record in chosen(records, method=SINGLE, view=view):
        found.setdefault(record.unit.settings["games"][0], []).append(record.figures)
    return {
        game: (
            float(np.mean([one["random"] for one in some])),
            float(np.mean([one["end"] for one in some])),
        )
        for game, some in found.items()
    }


def learned(low: float, high: float) -> bool:
    """Return whether a single agent has learned its game: three times random, a point above."""
    return high >= LEAST * low and high - low >= 1


def scores(returns: Any, low: float, high: float) -> Looks:
    """Return (return − random) / (single − random), clipped to 0 … 1; 0 where single is no more."""
    values = np.asarray(returns, dtype=float)
    if high <= low:
        return np.zeros_like(values)
    return ((values - low) / (high - low)).clip(0, 1)


def _apart(records: Sequence[Record], view: str) -> list[str]:
    return [game for game, pair in references(records, view).items() if not learned(*pair)]


def _games(record: Record, references: Mapping[str, tuple[float, float]]) -> dict[str, Looks]:
    """Return the scores of each game that has a reference, over the looks."""
    looks = np.array(record.figures["looks"])
    return {
        game: scores(looks[:, 1 + i], *references[game])
        for i, game in enumerate(record.unit.settings["games"])
        if game in references
    }


def _sums(records: Sequence[Record], view: str, method: str) -> tuple[Looks, Looks]:
    """Return steps, and the sum of scores over the games that can be learned, (seeds, looks)."""
    found = references(records, view)
    counted = {game: pair for game, pair in found.items() if learned(*pair)}
    some = chosen(records, method=method, view=view)
    if not some:
        return np.zeros(0), np.zeros((0, 0))
    steps = np.array(some[0].figures["looks"])[:, 0]
    zero = np.zeros(len(steps))
    return steps, np.array([sum(_games(record, counted).values(), zero) for record in some])


def _views(records: Sequence[Record]) -> list[str]:
    return [view for view in TITLES if chosen(records, view=view)]


def _last(sums: Looks) -> list[float]:
    """Return each seed's mean over the last third of its looks."""
    return [float(line[-max(1, len(line) // 3) :].mean()) for line in sums]


def _with_error(found: Mean, digits: int = 2) -> str:
    error = f" ± {found.error:.{digits}f}" if found.seeds > 1 else ""
    return f"{found.value:.{digits}f}{error}"


def _table(records: Sequence[Record]) -> str:
    lines = []
    for view in _views(records):
        for method in METHODS:
            _, sums = _sums(records, view, method)
            if len(sums):
                some = chosen(records, method=method, view=view)
                speed = [r.figures["steps a second"] for r in some]
                lines.append([
                    f"{method} ({TITLES[view]})",
                    _with_error(mean([float(line.mean()) for line in sums])),
                    _with_error(mean(_last(sums))),
                    _with_error(mean([float(line[-1]) for line in sums])),
                    str(len(sums)),
                    f"{np.mean(speed):,.0f}",
                ])  # fmt: skip
    header = ["sum of scores", "whole training", "last third", "last look", "seeds", "steps / s"]
    return markdown(header, lines)


def _ratios(records: Sequence[Record]) -> str:
    """Compare the sums of the last third: with no protection, true labels, and single agents."""
    said = []
    for view in _views(records):
        ewc, without, recognised = (
            mean([*_lasts(records, view, method).values()]).value
            if chosen(records, method=method, view=view)
            else 0.0
            for method in (EWC, NONE, RECOGNISED)
        )
        parts = [f"{ewc / without:.2f} times that without protection"] if ewc and without else []
        if counted := sum(learned(*pair) for pair in references(records, view).values()):
            parts += [f"{ewc / counted:.0%} of what the single agents reach"] if ewc else []
        parts += [f"with the recogniser {recognised / ewc:.0%} of it"] if ewc and recognised else []
        if parts:
            said.append(f" In it EWC's sum ({TITLES[view]}) is {', '.join(parts)}.")
    return "".join(said)


def _singles(records: Sequence[Record]) -> str:
    lines = []
    for view in _views(records):
        for game, (low, _) in references(records, view).items():
            some = [
                one.figures["end"]
                for one in chosen(records, method=SINGLE, view=view)
                if one.unit.settings["games"][0] == game
            ]
            lines.append([f"{game} ({TITLES[view]})", f"{low:.2f}", _with_error(mean(some))])
    return markdown(["return", "random", "single"], lines)


def _searched(settings: Mapping[str, Any]) -> str:
    games = " and ".join(settings["games"])
    return f"{games}, {settings['visits']} visits of {settings['stretch']:,} steps each"


def _search(searches: Sequence[Record]) -> str:
    lines = []
    for one in searches:
        values = one.unit.settings
        searched = values["searched"]
        penalty = f"EWC, {values['likelihood']}" if searched == EWC else searched
        strength, score = f"{values['ewc_lambda']:g}", f"{one.figures['validation']:.3f}"
        lines.append([penalty, strength, score])
    return markdown(["penalty", "λ", "mean score"], lines)


def _lines(records: Sequence[Record]) -> Iterable[list[Any]]:
    for record in records:
        settings, games = record.unit.settings, record.unit.settings["games"]
        for step, *found in record.figures["looks"]:
            for game, value in zip(games, found, strict=True):
                yield [settings["view"], record.unit.method, record.unit.seed, step, game, value]


def _draw_sums(records: Sequence[Record], folder: Path, name: str) -> None:
    views = _views(records) or [CHANNELS]
    figure, axes = panels(len(views), width=5, sharey=True)
    for view, axis in zip(views, axes, strict=True):
        for method in METHODS:
            steps, sums = _sums(records, view, method)
            if len(sums):
                middle, error = sums.mean(0), error_bars(sums)
                axis.plot(steps, middle, color=COLOUR[method], lw=1.2, label=method)
                axis.fill_between(
                    steps, middle - error, middle + error, color=COLOUR[method], alpha=0.2, lw=0
                )
        axis.set_title(TITLES[view], fontsize="medium")
        axis.set_xlabel("steps")
    axes[0].set_ylabel("sum of scores")
    axes[0].legend(*axes[0].get_legend_handles_labels(), fontsize="x-small")
    save_picture(figure, folder, name)


def _draw_each(records: Sequence[Record], folder: Path, name: str) -> None:
    view = _views(records)[0]
    found = references(records, view)
    rows = _of_first_seed([r for m in METHODS for r in chosen(records, method=m, view=view)])
    games = rows[0].unit.settings["games"]
    figure, axes = panels(len(games), width=3.2, height=3, sharey=True)
    for number, (game, axis) in enumerate(zip(games, axes, strict=True)):
        at = 0
        for other, steps in rows[0].figures["stretches"]:
            if other == number:
                axis.axvspan(at, at + steps, color="0.88", lw=0)
            at += steps
        for record in rows:
            curves = _games(record, found)
            if game in curves:
                steps = np.array(record.figures["looks"])[:, 0]
                label, colour = record.unit.method, COLOUR[record.unit.method]
                axis.plot(steps, curves[game], color=colour, lw=1, label=label)
        axis.set_title(game, fontsize="medium")
        axis.set_xlabel("steps")
    axes[0].set_ylabel("score")
    axes[0].legend(*axes[0].get_legend_handles_labels(), fontsize="xx-small")
    save_picture(figure, folder, f"{name}-each")


# What else is measured


def _overlap(records: Sequence[Record], folder: Path, name: str) -> str:
    view = _views(records)[0]
    some = [r for r in chosen(records, method=EWC, view=view) if r.figures.get("overlaps")]
    if not some:
        return ""
    games = some[0].unit.settings["games"]
    layers = list(next(iter(some[0].figures["overlaps"].values())))
    figure, axes = panels(len(layers), width=3.4, height=3.2)
    said = []
    for layer, axis in zip(layers, axes, strict=True):
        table = np.eye(len(games))
        values = []
        for pair in some[0].figures["overlaps"]:
            a, b = (games.index(game) for game in pair.split(", "))
            found = [
                r.figures["overlaps"][pair][layer] for r in some if pair in r.figures["overlaps"]
            ]
            table[a, b] = table[b, a] = np.mean(found)
            values += found
        title = "head" if layer.startswith("heads") else layer.rpartition(".")[2]
        said.append(f"{np.mean(values):.2f} in the layer {title}")
        axis.imshow(table, vmin=0, vmax=1, cmap="viridis")
        axis.grid(visible=False)
        axis.set_title(title, fontsize="medium")
        axis.set_xticks(range(len(games)), games, rotation=60, fontsize="x-small")
        axis.set_yticks(range(len(games)), games, fontsize="x-small")
        for (i, j), value in np.ndenumerate(table):
            colour = "k" if value > 0.6 else "w"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
    save_picture(figure, folder, f"{name}-overlap")
    return OVERLAP.format(name=name, overlaps=", ".join(said)).strip()


def _recognition(records: Sequence[Record], folder: Path, name: str) -> str:
    some = [r for view in _views(records) for r in chosen(records, method=RECOGNISED, view=view)]
    if not some:
        return ""
    by_name: dict[str, list[Figures]] = {}
    for record in some:
        for which, found in record.figures["recognition"].items():
            view = record.unit.settings["view"]
            title = which if which.startswith(view) else f"{which}, on the play of {view}"
            by_name.setdefault(title, []).append(found)
    lines = []
    for which, found in by_name.items():
        delays = [one["delay"] for one in found if one["delay"] is not None]
        lines.append([
            which,
            f"{np.mean([one['purity'] for one in found]):.3f}",
            f"{np.mean([one['contexts'] for one in found]):.1f}",
            f"{sum(one['found'] for one in found)} of {sum(one['switches'] for one in found)}",
            f"{np.mean(delays):,.0f}" if delays else "–",
            f"{np.mean([one['false_alarms'] for one in found]):,.1f}",
        ])  # fmt: skip
    header = ["frames", "purity", "contexts", "switches found", "delay, steps", "false alarms"]
    _draw_contexts(some, folder, name)
    settings = from_record(some[0].unit.settings)
    return RECOGNITION.format(
        name=name, table=markdown(header, lines), prior=settings.prior, window=settings.window
    ).strip()


def _of_first_seed(records: Sequence[Record]) -> list[Record]:
    first = min(record.unit.seed for record in records)
    return [record for record in records if record.unit.seed == first]


def _draw_contexts(records: Sequence[Record], folder: Path, name: str) -> None:
    shown = _of_first_seed(records)
    figure, axes = panels(len(shown), width=6, height=2.6)
    for record, axis in zip(shown, axes, strict=True):
        games, at = record.unit.settings["games"], 0
        for game, steps in record.figures["stretches"]:
            axis.axvspan(at, at + steps, color=COLOURS[game % len(COLOURS)], alpha=0.25, lw=0)
            at += steps
        changes = [*record.figures["contexts"], [at, record.figures["contexts"][-1][1]]]
        axis.step(*zip(*changes, strict=True), where="post", color="k", lw=0.8)
        for game, colour in zip(games, COLOURS, strict=False):
            axis.plot([], [], color=colour, alpha=0.5, lw=5, label=game)
        axis.set_title(TITLES[record.unit.settings["view"]], fontsize="medium")
        axis.set_xlabel("steps")
        axis.set_ylabel("context")
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize="xx-small")
    save_picture(figure, folder, f"{name}-contexts")


def _noisy(records: Sequence[Record]) -> tuple[list[float], dict[str, Looks]]:
    """Return the sizes of noise, and the mean score over seeds by kind, (games, sizes)."""
    view = (_views(records) or [CHANNELS])[0]
    found = references(records, view)
    by_game: dict[str, list[Figures]] = {}
    for record in chosen(records, method=SINGLE, view=view):
        game = record.unit.settings["games"][0]
        if "noise" in record.figures and learned(*found[game]):
            by_game.setdefault(game, []).append(record.figures)
            sizes = list(record.unit.settings["noise"])
    if not by_game:
        return [], {}
    return sizes, {
        kind: np.array([
            np.mean([scores(one["noise"][kind], *found[game]) for one in some], axis=0)
            for game, some in by_game.items()
        ])
        for kind in (UNIFORM, SHAPED)
    }  # fmt: skip


def _noise(records: Sequence[Record], folder: Path, name: str) -> str:
    sizes, found = _noisy(records)
    if not found:
        return ""
    figure, (axis,) = panels(1, width=5.5)
    for (kind, values), colour in zip(found.items(), COLOURS, strict=False):
        axis.errorbar(
            sizes, values.mean(0), error_bars(values), color=colour, marker="o", label=kind
        )
    axis.set_xscale("log")
    axis.set_xlabel("size of the noise, ‖δ‖/√N")
    axis.set_ylabel("mean score")
    axis.legend(fontsize="small")
    save_picture(figure, folder, f"{name}-noise")
    lines = [[kind, *(f"{v:.2f}" for v in values.mean(0))] for kind, values in found.items()]
    table = markdown(["noise", *(f"{size:g}" for size in sizes)], lines)
    return NOISE.format(name=name, table=table).strip()


def _atari(record: Record) -> str:
    figures = record.figures
    games, speed = len(GAMES[ATARI]), figures["steps a second"]
    return MACHINE.format(
        steps=figures["steps"],
        updates=figures["updates"],
        speed=speed,
        games=games,
        frames=REACHED,
        hours=games * (REACHED // REPEATS) / speed / 3600,
        memory=games * Settings().capacity * math.prod(SEEN[GREY].shape) / 1e9,
    ).strip()


def _rows(records: Sequence[Record], name: str, seeds: int) -> list[Row]:
    """Write the lines of the table that sets the figures beside the paper's."""
    claims = {
        NONE: ("stays below 1 (of ten games)", "five games of MinAtar here, ten of Atari there"),
        L2: ("–", "the same protocol with a Fisher of 1"),
        EWC: ("well above no protection", "sum of scores, last third of training"),
        RECOGNISED: ("nearly as with true labels", "sum of scores, last third of training"),
    }
    main = [r for r in records if r.unit.settings["suite"] != ATARI or name != "games"]
    view = (_views(main) or [CHANNELS])[0]
    lasts = {method: _lasts(main, view, method) for method in claims}
    rows = []
    for method, (published, reason) in claims.items():
        row = Row(f"{name.replace('-', ', ')}: {method}, sum of scores", published)
        if found := lasts[method]:
            done = f"{len(found)} of {seeds} seeds"
            row = row._replace(
                here=f"{_with_error(mean([*found.values()]))} ({done})",
                difference=_verdict(method, lasts),
                reason=reason,
            )
        rows.append(row)
    row = Row(
        f"{name.replace('-', ', ')}: noise shaped by the Fisher harms less than uniform", "less"
    )
    _, noisy = _noisy(main)
    if noisy:
        gaps = (noisy[SHAPED] - noisy[UNIFORM]).mean(1)
        gap = mean(gaps.tolist())
        row = row._replace(
            here=f"{_with_error(gap)} of the score more, mean over sizes",
            difference=_above(gap),
            reason="holds above two standard errors over games",
        )
    return [*rows, row]


def _lasts(records: Sequence[Record], view: str, method: str) -> dict[int, float]:
    """Return the mean sum of scores over the last third of training, by seed."""
    seeds = [record.unit.seed for record in chosen(records, method=method, view=view)]
    return dict(zip(seeds, _last(_sums(records, view, method)[1]), strict=True))


def _verdict(method: str, lasts: Mapping[str, Mapping[int, float]]) -> str:
    """Say whether a claim of the paper holds: by two standard errors, seed by seed."""
    found = lasts[method]
    if method == NONE:
        top = mean([*found.values()])
        if len(found) < 2:
            return "–"
        return "holds" if top.value + 2 * top.error < 1 else "does not hold"
    other = {EWC: NONE, RECOGNISED: EWC}.get(method)
    both = sorted(found.keys() & lasts[other].keys()) if other else []
    if other is None or len(both) < 2:
        return "–"
    gap = mean([found[seed] - lasts[other][seed] for seed in both])
    if method == EWC:
        return _above(gap)
    if gap.value < -2 * gap.error:
        return "does not hold"
    kept = math.fsum(found[seed] for seed in both) / math.fsum(lasts[other][seed] for seed in both)
    return "holds" if kept >= NEARLY else "undecided"


def _above(gap: Mean) -> str:
    """Say whether a gap is above two standard errors; of one figure nothing is said."""
    if math.isnan(gap.error):
        return "–"
    return "holds" if gap.value > 2 * gap.error else "does not hold"
