"""Three permutations of MNIST (Kirkpatrick et al. 2017, figure 3A): SGD, L2 and EWC."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scripts.experiments.lib.common import markdown
from scripts.experiments.lib.continual import (
    Method,
    Network,
    learn_chain,
    method_of,
    permuted_tasks,
    random_orders,
    score,
    scores,
    seconds,
    settings_of,
)
from scripts.experiments.lib.mnist_files import MNIST, SMALL
from scripts.experiments.lib.pictures import COLOURS, error_bars, panels, save_picture, write_csv
from scripts.experiments.lib.records import (
    Experiment,
    Figures,
    Findings,
    Mean,
    Record,
    Row,
    Unit,
    accuracy_row,
    best,
    chosen,
    mean,
)
from scripts.experiments.lib.sittings import main

NAME = "three-tasks"
TASKS = "ABC"
SEARCH = "search"
SEEDS = 5
PENALTIES = {"none": "SGD", "l2": "L2", "ewc": "EWC"}
STRENGTHS = {"l2": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0), "ewc": (10.0, 30.0, 100.0, 300.0, 1000.0)}
SHOWN = {  # in the paper's figure 3A
    "SGD": "A and B are forgotten",
    "L2": "A is kept, C is not learned well",
    "EWC": "all three are kept",
}
NEAR = 0.05
EPOCH = 860  # steps of 64 of the 55,000 images
BASE = Method(
    optimizer="sgd",
    learning_rate=1e-3,
    momentum=0.9,
    batch_size=64,
    steps=20 * EPOCH,
    every=EPOCH,
    penalty_step="proximal",
)
SMALL_BASE = Method(
    sizes=(784, 50, 10), optimizer="sgd", learning_rate=0.01, momentum=0.9, batch_size=32,
    steps=40, every=20, fisher_examples=100, penalty_step="proximal",
)  # fmt: skip
TEXT = """
Task A is MNIST, B and C are the same digits under two permutations of the pixels. A network
784–400–400–10 with one head learns them one after the other, with the settings of table S1: SGD at
1e-3, 20 epochs a task, no dropout, no early stopping. What the paper does not say is set here:
momentum 0.9, batches of 64, inputs standardised, the exact Fisher of 2,000 images, the penalty's
step proximal. Other than in the paper, which has a penalty for each task, tasks are merged by the
rule online, which did better on [ten permutations](many-tasks.md). EWC's penalty grows with the
tasks, and λ of L2 does not. Test accuracy on each task while A, B and C are learned, mean over
{done} and its standard error:

![Test accuracy on A, B and C during the whole sequence](three-tasks.png)

{table}

What the paper's plot shows, and whether it holds here; a task is kept where its accuracy is within
{near:g} points of that of the best of the three methods. The paper has no such bar, and {bars}:

{claims}

Each penalty's strength is the best of a search at a fifth of the steps, with the first seed of the
rows, by the mean accuracy on the 5,000 held-out images of all three tasks after the last:

{search}
"""


def plan(records: Sequence[Record], quick: bool) -> list[Unit]:
    """List the search, and once it is done the seeds of each penalty at its best strength."""
    base, data = (SMALL_BASE, SMALL) if quick else (BASE, MNIST)
    short = replace(base, steps=base.steps // 5 or 1, every=0)
    unit = partial(Unit, NAME)
    units, strengths = [], {"none": 0.0}
    for penalty, grid in STRENGTHS.items():
        search = [
            unit(SEARCH, 0, settings_of(replace(short, penalty=penalty, ewc_lambda=x), data=data))
            for x in (grid[2:4] if quick else grid)
        ]
        units += search
        digests = {one.digest for one in search}
        done = [record for record in records if record.unit.digest in digests]
        if len(done) == len(search):
            strengths[penalty] = best(done).unit.settings["ewc_lambda"]
    if len(strengths) == len(PENALTIES):
        for seed in range(1 if quick else SEEDS):
            for penalty, strength in strengths.items():
                held = replace(base, penalty=penalty, ewc_lambda=strength)
                units.append(unit(PENALTIES[penalty], seed, settings_of(held, data=data)))
    return units


def cost(unit: Unit) -> float:
    """Return about how long a unit takes on one core."""
    method = method_of(unit.settings)
    looks = method.steps / method.every if method.every else 0
    return seconds(method, 3) + 3 * looks * 0.5


def measure(unit: Unit) -> Figures:
    """Learn A, B and C."""
    method = method_of(unit.settings)
    pixels = method.sizes[0]
    tasks = permuted_tasks(unit.settings["data"], random_orders(3, pixels, unit.seed))
    curves: list[list[float]] = []

    def look(network: Network, task: int, step: int) -> None:
        curves.append([task, step, *scores(network, tasks, "test")])

    if unit.method == SEARCH:
        network, _ = learn_chain(tasks, method, unit.seed)
        return {"validation": score(network, tasks, "validation")}
    learn_chain(tasks, method, unit.seed, look=look)
    return {"curves": curves}


def report(records: Sequence[Record], folder: Path) -> Findings:
    """Draw the curves, and write the accuracies after the last task."""
    done = {title: chosen(records, method=title) for title in PENALTIES.values()}
    reason = f"kept: within {100 * NEAR:g} points of the best of the three methods"
    reasons = {"L2": f"{reason}; here λ is the best for the mean of all three, theirs is unknown"}
    rows, claims = [], []
    lasts = {title: _last(found) for title, found in done.items() if found}
    behind = {title: np.max([*lasts.values()], axis=0) - last for title, last in lasts.items()}
    for title, found in done.items():
        row = Row(f"three permutations: {title}, accuracy on A / B / C after C", SHOWN[title])
        if found:
            here = " / ".join(f"{100 * value:.1f}" for value in lasts[title])
            holds = _holds(title, behind[title])
            gaps = f"{_in_points(behind[title])} points behind the best"
            row = row._replace(
                here=f"{here} % ({len(found)} of {SEEDS} seeds)",
                difference=holds,
                reason=f"{gaps}; {reasons.get(title, reason)}",
            )
            claims.append(f"- {title}, {SHOWN[title]}: {holds}; {gaps}")
        rows.append(row)
    everything = [
        accuracy_row(
            f"three permutations: {title}, mean", None,
            [float(np.mean(record.figures["curves"][-1][2:])) for record in found], SEEDS,
            "no figures are printed in the paper",
        )
        for title, found in done.items()
    ]  # fmt: skip
    if not any(done.values()):
        return Findings("", rows + everything)
    _draw(done, folder)
    write_csv(
        folder,
        NAME,
        ["method", "seed", "learning", "step", *TASKS],
        [
            [title, record.unit.seed, TASKS[int(line[0])], *line[1:]]
            for title, found in done.items()
            for record in found
            for line in record.figures["curves"]
        ],
    )
    text = TEXT.format(
        done=f"the seeds that are done (of {SEEDS})",
        table=_table(done),
        claims="\n".join(claims),
        near=100 * NEAR,
        bars=_bars(behind),
        search=_search(chosen(records, method=SEARCH)),
    )
    return Findings(text.strip(), rows + everything)


def _last(records: Sequence[Record]) -> Any:
    """Return the mean accuracies on A, B and C after C."""
    return np.array([record.figures["curves"][-1][2:] for record in records]).mean(0)


def _holds(title: str, behind: Any, bar: float = NEAR) -> str:
    """Say whether what the paper shows of a row holds, from how far its tasks are behind."""
    near = behind < bar
    expected = {"SGD": not near[:2].any(), "L2": near[0] and not near[2], "EWC": near.all()}[title]
    return "holds" if expected else "does not hold"


def _in_points(behind: Any) -> str:
    return " / ".join(f"{100 * value:.2f}" for value in behind)


def _bars(behind: Mapping[str, Any]) -> str:
    """Say at which bars all claims hold."""
    bars = [
        bar
        for bar in (i / 1e4 for i in range(1, 1001))
        if all(_holds(title, values, bar) == "holds" for title, values in behind.items())
    ]
    if not bars:
        return "no bar up to ten points makes all claims hold"
    return f"at any from {100 * bars[0]:.2f} to {100 * bars[-1]:.2f} points all claims hold"


def _table(done: dict[str, list[Record]]) -> str:
    lines = []
    for title, found in done.items():
        if not found:
            continue
        last = [[*record.figures["curves"][-1][2:]] for record in found]
        values = [mean(column) for column in zip(*last, strict=True)]
        values.append(mean([sum(row) / len(row) for row in last]))
        strength = found[0].unit.settings["ewc_lambda"]
        name = title + (f", λ = {strength:g}" if strength else "")
        lines.append([name, *map(_percent, values)])
    return markdown(["after C", "A", "B", "C", "mean"], lines)


def _percent(value: Mean) -> str:
    error = f" ± {100 * value.error:.2f}" if value.seeds > 1 else ""
    return f"{100 * value.value:.2f}{error} %"


def _search(records: Sequence[Record]) -> str:
    lines = []
    for record in records:
        penalty, strength = (record.unit.settings[key] for key in ("penalty", "ewc_lambda"))
        validation = f"{record.figures['validation']:.2%}"
        lines.append([PENALTIES[penalty], f"{strength:g}", validation])
    return markdown(["penalty", "λ", "validation"], lines)


def _draw(done: dict[str, list[Record]], folder: Path) -> None:
    figure, axes = panels(3, width=3.8, sharey=True)
    for title, colour in zip(done, COLOURS, strict=False):
        if not (found := done[title]):
            continue
        curves = np.array([record.figures["curves"] for record in found])  # (seeds, looks, 5)
        looks = curves.shape[1] // 3
        x = (np.arange(curves.shape[1]) + 1) / looks
        middle = curves.mean(0)
        error = error_bars(curves)
        for task, axis in enumerate(axes):
            since = slice(task * looks, None)
            y, e = middle[since, 2 + task], error[since, 2 + task]
            axis.plot(x[since], y, color=colour, label=title)
            axis.fill_between(x[since], y - e, y + e, color=colour, alpha=0.25, lw=0)
    for name, axis in zip(TASKS, axes, strict=True):
        axis.set_title(f"task {name}", fontsize="medium")
        axis.set_xlabel("tasks learned")
        axis.set_xlim(0, 3)
        for edge in (1, 2):
            axis.axvline(edge, color="0.6", lw=0.8, ls=":")
    axes[0].set_ylabel("test accuracy")
    axes[0].legend(fontsize="small", loc="lower left")
    save_picture(figure, folder, NAME)


EXPERIMENT = Experiment(NAME, "Three permutations of MNIST", cost, plan, measure, report)

if __name__ == "__main__":
    main(EXPERIMENT)
