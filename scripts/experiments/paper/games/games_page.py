"""The page of the games: scores over time, what was recognised, what the Fisher knows."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
from scripts.experiments.paper.games.games_scores import (
    LEAST,
    METHODS,
    NEARLY,
    TITLES,
    Looks,
    after_as_many_steps,
    ceiling,
    claims,
    counted,
    kept,
    known_again,
    lasts,
    learned,
    references,
    returns,
    scores,
    scores_of,
    single_return,
    singles,
    sums,
    verdict,
    views,
)
from scripts.experiments.paper.games.protocol import (
    EWC,
    JOINT,
    L2,
    NONE,
    PROTECTED,
    RECOGNISED,
    SEARCH,
    SINGLE,
    Settings,
    from_record,
)
from scripts.experiments.paper.weight_noise import SHAPED, UNIFORM

REACHED = 20_000_000
"""Frames of a game after which the published EWC is on, four to a step: as far as published."""
COLOUR = dict(zip(METHODS, ("#666666", *COLOURS), strict=False))
COLUMNS = (
    "frames", "method", "penalty", "likelihood", "lambda", "seed", "step", "game", "return"
)  # fmt: skip
TEXT = """
{s[games]} games in sequence, {s[visits]} visits to each in a random order, {s[stretch]:,} steps a
visit on average ({low:,} to {high:,}); all methods but joint training see the same stretches.
Double DQN sees one screen: {network}. All games share the weights; each has its own gains and
biases in every layer, its own replay buffer of {s[capacity]:,} steps, learned from while it is
played, and its own ε, which falls from 1 to {s[epsilon]:g} in its first {s[epsilon_steps]:,} steps.
All methods have these, also no protection; only with shared gains and biases those are one for all
games. All methods but the recogniser's are told the game, also when they are scored. {s[copies]}
copies of a game step together, and one minibatch of {s[batch_size]} is learned for {s[copies]}
steps. Adam at {s[learning_rate]:g}, γ {s[discount]:g}, rewards clipped to ±1, target network copied
every {s[target_updates]} updates (of all games together in joint training); Adam's moments and the
target network go on from game to game.{occupied}

A game's score is (return − random) / (single − random), clipped to 0 … 1 at each look, where single
is an agent that plays this game alone for {alone:,} steps, mean over the last third of its looks
and over seeds. A return is the mean of {s[look_copies]} episodes of at most {s[look_steps]} steps,
without random actions. Clipping lifts scores near random and lowers those near single, which makes
gaps between methods narrower.

![Sum of scores over training]({name}.png)

{table}

Sums over {counted}, by the same measure {single} for the agents that play one game alone; the last
third is the mean of all looks in it.{apart} ± and the bands are the standard error over seeds,
which leaves out that of the single agents.{missing}

{claims}

A claim holds, or does not, where the gap is two standard errors above, or below, 0 over all {seeds}
seeds{chance}. The ratio is that of the sums of the last third, then that of each seed; the gap says
by how much the claim is true, mean over the seeds that both rows have. The shares and the factor
two are this repository's marks, not the paper's.{compared}

![Score of each game over training, its visits shaded]({name}-each.png)

Curves and visits of the first seed{drawn}. Returns over the last third, and those of a single agent
at as many steps of a game as a row has had of it by then:

{returns}

Forgetting by itself: the mean score of the game that is played and of all that are away, over the
last third; and over the whole training the score at the last look of a visit, and at the last look
before the game's next visit:

{kept}

## Protection

At each switch the Fisher of the game that was left is measured on {s[fisher_batches]} minibatches
of {s[fisher_states]} states of its buffer, in place of what an earlier visit had measured; the
penalty is the sum over all other games, merged by the rule separate. A game's own gains and biases
are outside both. L2 is the same with a Fisher of 1. DQN has no likelihood: `gaussian` takes all Q
values as means of variance 1, `softmax` takes Q/τ as logits, τ = {s[temperature]:g}. The loss is
Huber's, of the action that was taken, and the penalty's gradient passes through Adam: so λ = 1 is
not a scale of its own.{search}

Other than published: the penalty holds from the first switch, not after 20 million frames; Adam
takes the place of RMSProp; a run has {s[visits]} visits of each game; scores are in units of a
single agent, not of a human.

{overlap}

{recognition}

{noise}

{atari}
"""
SEARCH_TEXT = """ λ and the likelihood are those with the best mean score over the second half of a
run{drawn} of {searched}, one seed that is not a row's ({cost:.1f} hours of processor time in all),
against the last three looks of the first seed's single agents; the game that is not played counts
four times, since four of five are not played in the rows. EWC has had more trials than L2, whose
best is hardly above no protection there. The penalty is over one other game there, over all others
in the rows. One seed does not tell neighbouring strengths apart. They are fixed for all rows, also
for those with other heads, gains or frames:

{table}"""
OCCUPIED_TEXT = """ Where cells are only occupied or not, it sees the last four screens,
in which the gold and the enemies of asterix look alike."""
COMPARED = """ While a game that is apart is played, the sum has no game that is being
learned, which lowers no protection most: ratios of the two kinds of frames do not compare."""
OVERLAP = """
## Overlap of the games' Fishers

![Overlap of Fishers by layer]({name}-overlap.png)

After the last visit{drawn}, mean over all pairs of games and seeds: {overlaps}.
"""
RECOGNITION = """
## Recognising the game

The recogniser sees {seen}, of all {copies} copies of the game: they play the same game at once,
which it relies on, where the published agent has one. A window is {window} steps of each copy,
{frames:,} frames, and is taken as a whole. {alike:g} frames count as one. How likely a window is
in a context follows from how often each pixel had each value in the context's windows so far and,
frame by frame, in this one; a Dirichlet prior has the weight of {weight:g} frames. The hold-out,
which becomes a new context where it is the most likely, has the prior and what it learns in the
window. As published, all learn within the window, and only the most likely keeps what it has
learned.

Other than published: frames are counted in part, since those that follow each other are much
alike, and taken for independent ones they split a game into many contexts. The prior's mean is how
often each value is seen, whatever the pixel, where the published one is uniform. A window has 4
frames there, and the Markov model moves from frame to frame; here it moves from window to window.
There is room for {most} contexts.
{choice}
A window's steps go into the buffer of the context that it is found to be of; while it lasts, the
agent plays and learns in the context before. A context is remembered once it has had {least:,}
steps, and anew once it has had as many more; a new one begins with ε near 1 and the steps of its
window. To measure a score, each episode takes the context that its own frames so far fit best, of
those that could be remembered. λ was found with true labels; each context that is too many adds a
penalty, and a buffer of its own.
Purity is the share of time in which the game is the one that the present context has seen most,
before the window that tells has ended too. A switch is found if the context changes before the next
one; the delay is to the last step of the window that tells, in steps of all copies. All other
changes are false alarms, which is what tells against a context that changes all the time.{beside}
Means over seeds, switches summed:

{table}

Of the visits to games that were known, {again} were for the most part in the context of the first
visit.

![Recognised context over time]({name}-contexts.png)
"""
CHOICE = """
The first recogniser, with joined windows of 16 frames of one copy, had reached 0.47 of true labels
in the first seed. This one was made after that, on recorded play of an agent with true labels and
λ = 1 at the five games of the rows, two visits to each: 400,000 steps of seed 1001 and 800,000 of
seed 1002, which are no rows'. About seventy settings of it were tried on the first, in eight
orders of the same stretches, and eleven on the second; these lie between those that split games
and those that take two games for one. The scripts of that choice are not kept. At first a score
could take any context, which gave 0.90 (2.11 ± 0.53; by seed 3.00, 2.18, 1.15; these records are
replaced). In seed 2, as was seen in that row itself, the window in which space invaders came back
had become a context: it knew the first frames of an episode best, and had learned nothing. Contexts
of so few steps are left out of scores since then, which leaves the training as it was.
"""
BESIDE = """ The baseline takes the highest channel in use in the last {window} steps as the
context. Beside it, on the same play and with the same settings, are the frames of one copy alone,
and cells that are only occupied or not."""
OWN_PLAY = """ The row `occupied` is the recogniser that leads the agent whose cells are only
occupied or not, on that play; of its four screens it sees the newest. None of its settings were
chosen for that."""
SEEN_AS = {
    CHANNELS: "one colour for each cell, the highest channel in use or none",
    GREY: "42 × 42 pixels of 16 greys",
}
NOISE = """
## Noise on a trained agent

![Score against the size of the noise]({name}-noise.png)

Noise on the shared weights of agents that play one game alone{drawn}, uniform or with a variance in
proportion to 1/(F + ε) as for [MNIST](weight-noise.md), F by the likelihood `gaussian`; size is the
root mean square over weights. Noise in the null space is [on MNIST](weight-noise.md) alone.
Mean score over seeds, then over the {count} games that are learned (bars: standard error over
them); 0 is the last look before the noise:

{table}

Shaped noise may go to weights of channels that a game does not use.
"""
MACHINE = """
## Atari

The same program with `--suite atari` (84 × 84, four frames, the published network) took {steps:,}
steps with {updates:,} updates at {speed:.0f} steps a second, Fishers and looks included. {games}
games of {frames:,} frames each, after which the published EWC is on, would take {hours:,.0f} hours
of play for a row and seed on one such core, and its looks up to a quarter more; the buffers of
{games} games hold {memory:.1f} GB.
"""


def report(
    records: Sequence[Record],
    folder: Path,
    *,
    name: str,
    seeds: int,
    planned: Mapping[str, Sequence[str]],
) -> Findings:
    """Draw all figures, and write the tables.

    Args:
        records: Of one suite's games, and of Atari's machinery.
        folder: Of the pictures.
        name: Of the page.
        seeds: How many are planned.
        planned: The rows of each view.
    """
    main = [r for r in records if not _is_machinery(r, name)]
    rows = _rows(main, name, seeds, {method for some in planned.values() for method in some})
    played = [r for r in records if r.unit.method != SEARCH]
    if not played:
        return Findings("", rows)
    text = "\n\n".join(_atari(r) for r in played if _is_machinery(r, name))
    write_csv(folder, name, COLUMNS, _lines(main))
    _draw_sums(main, folder, name)
    if views(main):
        text = _whole(main, folder, name, seeds, planned, text)
    return Findings("\n\n".join(part for part in text.split("\n\n") if part.strip()), rows)


def _is_machinery(record: Record, name: str) -> bool:
    """Return whether a record is of the short run of Atari on MinAtar's page."""
    return name == "games" and record.unit.settings["suite"] == ATARI


def _whole(
    main: Sequence[Record],
    folder: Path,
    name: str,
    seeds: int,
    planned: Mapping[str, Sequence[str]],
    end: str,
) -> str:
    rows = [r for r in main if r.unit.method in METHODS]
    settings = from_record(rows[0].unit.settings)
    lengths = [steps for r in rows for _, steps in r.figures["stretches"]]
    _draw_each(main, folder, name)
    network = ", ".join(
        [f"a convolution of {n} channels, {k} × {k}" for n, k, _ in settings.convolutions]
        + [f"a hidden layer of {settings.hidden}"]
    )
    searches = chosen(main, method=SEARCH)
    return TEXT.format(
        s={**vars(settings), **vars(settings.learning), "games": len(settings.games)},
        low=min(lengths),
        high=max(lengths),
        network=network,
        occupied=OCCUPIED_TEXT if OCCUPIED in views(main) else "",
        alone=settings.visits * settings.stretch,
        seeds=seeds,
        chance="; with three, a gap that is 0 in truth holds by chance in 9 of 100 cases"
        if seeds == 3
        else "",
        name=name,
        table=_table(main),
        counted=_ofviews(main, lambda view: f"{len(counted(main, view))} games"),
        single=_ofviews(main, lambda view: f"{ceiling(main, view):.2f}"),
        apart=_apart(main),
        missing=_missing(main, planned, seeds),
        compared=COMPARED if len(views(main)) > 1 else "",
        drawn=_drawn(main),
        claims=_claims(main, seeds),
        returns=_returns(main),
        kept=_kept(main),
        search=_search(searches, main)
        if searches
        else f" λ = {settings.ewc_lambda:g}, as published.",
        overlap=_overlap(main, folder, name),
        recognition=_recognition(main, folder, name),
        noise=_noise(main, folder, name),
        atari=end,
    )


# Tables


def _ofviews(records: Sequence[Record], say: Callable[[str], str]) -> str:
    """Write one thing for all views where it is the same in them, else one for each."""
    found = {view: say(view) for view in views(records)}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return " or ".join(f"{text} ({TITLES[view]})" for view, text in found.items())


def _drawn(records: Sequence[Record]) -> str:
    """Name the view that a picture or a table is of, where there are two."""
    shown = views(records)
    return f" ({TITLES[shown[0]]})" if len(shown) > 1 else ""


def _apart(records: Sequence[Record]) -> str:
    said = [
        f"{game} ({TITLES[view]})"
        for view in views(records)
        for game, pair in references(records, view).items()
        if not learned(*pair)
    ]
    if not said:
        return ""
    return (
        f" Apart, since a single agent stays under {LEAST} times random or one point above it: "
        f"{', '.join(said)}; such a game is played and protected as all others, and its returns "
        "are below."
    )


def _missing(records: Sequence[Record], planned: Mapping[str, Sequence[str]], seeds: int) -> str:
    said = []
    for view, methods in planned.items():
        for method in methods:
            done = len(chosen(records, method=method, view=view))
            if done < seeds:
                said.append(f"{method} ({TITLES[view]}; {done} of {seeds} seeds done)")
        alone = [len(some) for some in singles(records, view).values()]
        if alone and min(alone) < seeds:
            total = f"{sum(alone)} of {seeds * len(alone)}"
            said.append(f"single agents ({TITLES[view]}; {total} done)")
    return f" Still to run: {', '.join(said)}." if said else ""


def _with_error(found: Mean, digits: int = 2) -> str:
    if math.isnan(found.value):
        return "–"
    error = f" ± {found.error:.{digits}f}" if found.seeds > 1 else ""
    return f"{found.value:z.{digits}f}{error}".replace("-", "−")


def _table(records: Sequence[Record]) -> str:
    lines = []
    for view in views(records):
        for method in METHODS:
            _, found = sums(records, view, method)
            if len(found):
                some = chosen(records, method=method, view=view)
                speed = [r.figures["steps a second"] for r in some]
                lines.append([
                    f"{method} ({TITLES[view]})",
                    _with_error(mean([float(line.mean()) for line in found])),
                    _with_error(mean([*lasts(records, view, method).values()])),
                    _with_error(mean([float(line[-1]) for line in found])),
                    str(len(found)),
                    f"{np.mean(speed):,.0f}",
                ])  # fmt: skip
    header = ["sum of scores", "whole training", "last third", "last look", "seeds", "steps / s"]
    return markdown(header, lines)


def _claims(records: Sequence[Record], seeds: int) -> str:
    lines = [
        [
            f"{one.text} ({TITLES[view]})",
            f"{one.ratio:.2f}",
            ", ".join(f"{ratio:.2f}" for ratio in one.by_seed),
            _with_error(one.gap),
            str(one.gap.seeds),
            one.verdict,
        ]
        for view in views(records)
        for one in claims(records, view, seeds)
    ]
    return markdown(["claim", "ratio", "by seed", "gap", "seeds", "here"], lines)


def _returns(records: Sequence[Record]) -> str:
    lines = []
    for view in views(records):
        found, alone = references(records, view), singles(records, view)
        games = sorted(found)
        at_once = after_as_many_steps(records, view)
        every = {game: mean([single_return(one) for one in alone[game]]) for game in games}
        lines += [
            [f"random ({TITLES[view]})", *(f"{found[game][0]:.2f}" for game in games)],
            ["single", *(_with_error(every[game]) for game in games)],
            ["seeds of it", *(str(every[game].seeds) for game in games)],
            ["single, as many steps", *(f"{at_once[game]:.2f}" for game in games if at_once)],
        ]
        for method in METHODS:
            if chosen(records, method=method, view=view):
                own = returns(records, view, method)
                lines.append([method, *(_with_error(own[game]) for game in games)])
    return markdown(["return", *(game.replace("_", " ") for game in games)], lines)


def _kept(records: Sequence[Record]) -> str:
    lines = []
    for view in views(records):
        for method in METHODS:
            found = None if method == JOINT else kept(records, view, method)
            if found is not None:
                lines.append([f"{method} ({TITLES[view]})", *(_with_error(one) for one in found)])
    return markdown(
        ["mean score", "played", "away", "end of a visit", "before the next visit"], lines
    )


def _searched(settings: Mapping[str, Any]) -> str:
    games = " and ".join(settings["games"])
    return f"{games}, {settings['visits']} visits of {settings['stretch']:,} steps on average"


def _search(searches: Sequence[Record], records: Sequence[Record]) -> str:
    lines = []
    for one in sorted(searches, key=_place):
        values = one.unit.settings
        searched = values["searched"]
        penalty = f"EWC, {values['likelihood']}" if searched == EWC else searched
        strength, score = f"{values['ewc_lambda']:g}", f"{one.figures['validation']:.3f}"
        lines.append([penalty, strength, score])
    return SEARCH_TEXT.format(
        searched=_searched(searches[0].unit.settings),
        drawn=_drawn(records),
        cost=sum(r.processor_seconds or r.seconds for r in searches) / 3600,
        table=markdown(["penalty", "λ", "mean score"], lines),
    )


def _place(record: Record) -> tuple[int, str, float]:
    values = record.unit.settings
    return METHODS[::-1].index(values["searched"]), values["likelihood"], values["ewc_lambda"]


def _lines(records: Sequence[Record]) -> Iterable[list[Any]]:
    for record in records:
        settings, games = record.unit.settings, record.unit.settings["games"]
        method, seed = record.unit.method, record.unit.seed
        penalty: list[Any] = ["", "", ""]
        if method in PROTECTED or method == SEARCH:
            searched = settings.get("searched", method)
            penalty = [searched, settings["likelihood"], settings["ewc_lambda"]]
        if method == SINGLE:
            random = record.figures["random"]
            yield [settings["view"], "random actions", *penalty, seed, 0, games[0], random]
        for step, *found in record.figures["looks"]:
            for game, value in zip(games, found, strict=True):
                yield [settings["view"], method, *penalty, seed, step, game, value]


def _draw_sums(records: Sequence[Record], folder: Path, name: str) -> None:
    shown = views(records) or [CHANNELS]
    figure, axes = panels(len(shown), width=5, sharey=True)
    for view, axis in zip(shown, axes, strict=True):
        for method in METHODS:
            steps, found = sums(records, view, method)
            if len(found):
                middle, error = found.mean(0), error_bars(found)
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
    view = views(records)[0]
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
            curves = scores_of(record, found)
            if game in curves:
                steps = np.array(record.figures["looks"])[:, 0]
                label, colour = record.unit.method, COLOUR[record.unit.method]
                axis.plot(steps, curves[game], color=colour, lw=1, label=label)
        title = game if learned(*found[game]) else f"{game} (apart)"
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("steps")
    axes[0].set_ylabel("score")
    axes[0].legend(*axes[0].get_legend_handles_labels(), fontsize="xx-small")
    save_picture(figure, folder, f"{name}-each")


# What else is measured


def _overlap(records: Sequence[Record], folder: Path, name: str) -> str:
    view = views(records)[0]
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
    return OVERLAP.format(name=name, drawn=_drawn(records), overlaps=", ".join(said)).strip()


def _recognition(records: Sequence[Record], folder: Path, name: str) -> str:
    some = [r for view in views(records) for r in chosen(records, method=RECOGNISED, view=view)]
    if not some:
        return ""
    by_name: dict[str, list[Figures]] = {}
    for record in some:
        for which, found in record.figures["recognition"].items():
            view = record.unit.settings["view"]
            title = which if which.startswith(view) else f"{which}, on the play of {view}"
            if which != f"{OCCUPIED}, highest channel in use":  # one channel tells nothing
                by_name.setdefault(title, []).append(found)
    lines = []
    for which, found in by_name.items():
        delays = [one["delay"] for one in found if one["delay"] is not None]
        lines.append([
            which,
            str(len(found)),
            f"{np.mean([one['purity'] for one in found]):.3f}",
            f"{np.mean([one['contexts'] for one in found]):.1f}",
            f"{sum(one['found'] for one in found)} of {sum(one['switches'] for one in found)}",
            f"{np.mean(delays):,.0f}" if delays else "–",
            f"{np.mean([one['false_alarms'] for one in found]):,.1f}",
        ])  # fmt: skip
    header = [
        "frames",
        "seeds",
        "purity",
        "contexts",
        "switches found",
        "delay, steps",
        "false alarms",
    ]
    _draw_contexts(some, folder, name)
    settings = from_record(some[0].unit.settings)
    known = settings.recognising
    assert known is not None
    own_play = OWN_PLAY if OCCUPIED in views(records) else ""

    def again(view: str) -> str:
        rows = [known_again(record) for record in chosen(some, view=view)]
        same, visits = np.sum(rows or [(0, 0)], axis=0)
        return f"{same} of {visits}"

    return RECOGNITION.format(
        name=name,
        table=markdown(header, lines),
        **vars(known),
        seen=SEEN_AS[settings.view],
        frames=settings.copies * known.window,
        weight=known.alike * known.prior,
        choice="These settings were chosen on MinAtar." if settings.view == GREY else CHOICE,
        beside="" if settings.view == GREY else BESIDE.format(window=known.window) + own_play,
        copies=settings.copies,
        least=settings.least_steps,
        again=_ofviews(records, again),
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
    """Return sizes of noise, 0 the first, and the mean score over seeds by kind, (games, sizes)."""
    view = (views(records) or [CHANNELS])[0]
    found = counted(records, view)
    by_game: dict[str, list[Figures]] = {}
    for record in chosen(records, method=SINGLE, view=view):
        game = record.unit.settings["games"][0]
        if "noise" in record.figures and game in found:
            by_game.setdefault(game, []).append(record.figures)
            sizes = [0.0, *record.unit.settings["noise"]]
    if not by_game:
        return [], {}

    def score(figures: Figures, game: str, kind: str) -> Looks:
        return scores([figures["looks"][-1][1], *figures["noise"][kind]], *found[game])

    return sizes, {
        kind: np.array([
            np.mean([score(one, game, kind) for one in some], axis=0)
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
            sizes[1:],
            values[:, 1:].mean(0),
            error_bars(values[:, 1:]),
            color=colour,
            marker="o",
            label=kind,
        )
    axis.set_xscale("log")
    axis.set_xlabel("size of the noise, ‖δ‖/√N")
    axis.set_ylabel("mean score")
    axis.legend(fontsize="small")
    save_picture(figure, folder, f"{name}-noise")
    lines = [[kind, *(f"{v:.2f}" for v in values.mean(0))] for kind, values in found.items()]
    table = markdown(["noise", *(f"{size:g}" for size in sizes)], lines)
    count = len(found[SHAPED])
    return NOISE.format(name=name, drawn=_drawn(records), table=table, count=count).strip()


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


def _rows(records: Sequence[Record], name: str, seeds: int, planned: Collection[str]) -> list[Row]:
    """Write the lines of the table that sets the figures beside the paper's."""
    view = (views(records) or [CHANNELS])[0]
    verdicts = {
        one.method: one.verdict for one in reversed(claims(records, view, seeds))
    }  # the first of each method
    count = len(counted(records, view))
    published = {
        NONE: (
            "stays below 1",
            f"{count} games here{_drawn(records)}, ten of Atari there, in units of a human",
        ),
        L2: ("–", "the same protocol with a Fisher of 1"),
        EWC: ("well above no protection", "held against being above"),
        RECOGNISED: ("nearly as with true labels", f"held against {NEARLY:.0%} of them"),
    }
    prefix = name.replace("-", ", ")
    rows = []
    for method, (claim, reason) in published.items():
        if method not in planned:
            continue
        row = Row(f"{prefix}: {method}, sum of scores in the last third", claim)
        if view in views(records) and (found := lasts(records, view, method)):
            done = f"{len(found)} of {seeds} seeds"
            row = row._replace(
                here=f"{_with_error(mean([*found.values()]))} ({done})",
                difference=verdicts.get(method, "–"),
                reason=reason,
            )
        rows.append(row)
    row = Row(f"{prefix}: noise shaped by the Fisher harms less than uniform", "less")
    sizes, noisy = _noisy(records)
    if noisy:
        by_size = noisy[SHAPED] - noisy[UNIFORM]
        gap = mean(by_size[:, 1:].mean(1).tolist())
        better = [f"{s:g}" for s, d in zip(sizes, by_size.mean(0), strict=True) if d > 0]
        row = row._replace(
            here=f"{_with_error(gap)} of the score more, mean over sizes",
            difference=verdict(gap, 2),
            reason=f"two standard errors over games; more at the sizes {', '.join(better)}",
        )
    return [*rows, row]
