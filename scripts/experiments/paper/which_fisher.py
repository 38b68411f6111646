"""Which Fisher: four estimators and one that is none, on split MNIST over a grid of λ."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from scripts.experiments.lib.common import markdown
from scripts.experiments.lib.continual import (
    SQUARED_BATCH,
    Method,
    Network,
    Task,
    learn_chain,
    learn_first,
    method_of,
    score,
    seconds,
    settings_of,
    split_tasks,
)
from scripts.experiments.lib.mnist_files import MNIST, SMALL
from scripts.experiments.lib.pictures import COLOURS, panels, save_picture, write_csv
from scripts.experiments.lib.records import (
    Experiment,
    Figures,
    Findings,
    Record,
    Row,
    Unit,
    chosen,
    mean,
    signed,
)
from scripts.experiments.lib.sittings import main

NAME = "which-fisher"
SEEDS = 5
ESTIMATORS = ("exact", "mc", "empirical", "batched", SQUARED_BATCH)
BATCHES = (16, 256)
STRENGTHS = tuple(10.0**power for power in range(1, 9))
BASE = Method(
    batch_size=128, steps=250, fisher_examples=2048, penalty_step="proximal",
    mixed_precision="bf16",
)  # fmt: skip
WITHIN = 0.005  # of the best accuracy
PUBLISHED = {"exact": 0.9912, "mc": 0.9912, "empirical": 0.9912, SQUARED_BATCH: 0.9911}
HEADER = ["", "batch", "trace", "best λ", "accuracy there", "λ that is enough", "by seed"]
TEXT = """
Split MNIST, a head for each task: five pairs of digits, a network 784–400–400–10 of which each
task uses its two outputs, inputs standardised, {steps} steps of {batch_size} a task with Adam at
{learning_rate:g}, from scratch with each task (products in bfloat16, weights, Fisher and penalty in
float32), the penalty by proximal steps, tasks merged online. The
Fisher of each task's first {fisher_examples:,} images is taken in batches of {small} and of
{large}: exact, mc (one sample), empirical (the data's labels), batched (sampled labels, the square
of a batch's sum over the number of examples), and the square of the batch's mean gradient of the
data's labels, which is not a Fisher, and what most software ships. The published figures
([van de Ven 2025](https://arxiv.org/abs/2502.11756)) are the best of a grid on the test set, as
those here are, after 2,000 steps a task, with inputs in [0, 1], the Fisher of all images of a task,
and Adam's moments kept from task to task. Mean test accuracy over {seeds} seeds after the fifth
task against λ:

![Accuracy against λ for each estimator](which-fisher.png)

{table}

The trace is that of the first task. Near the best λ the curves are flat, and which of their points
is the best is chance; at the largest λ accuracy is {low:.1f} to {high:.1f} points lower. The λ that
is enough is the least that comes within half a point of the best, interpolated: what a user has to
find. A batch size that changes the trace by a factor makes λ mean something else by that factor.
`exact`, `mc` and `empirical` do not depend on it at all: their two Fishers are equal but for
rounding, and what training makes of that is how far the curves differ by chance. `batched` depends
on it by chance only, its noise grows with the batch; the squared batch gradient shrinks with the
batch and takes λ along. The curves of single seeds differ more: the least and the largest λ that is
enough stand beside it. Grids are decades, and pairs of digits the same for all seeds (0 and 1, 2
and 3, …).
"""


def plan(records: Sequence[Record], quick: bool) -> list[Unit]:
    """List every estimator, batch size and λ for each seed."""
    base, data = BASE, MNIST
    if quick:
        base = Method(sizes=(784, 20, 10), batch_size=32, steps=15, fisher_examples=64)
        data = SMALL
    return [
        Unit(
            NAME,
            estimator,
            seed,
            settings_of(
                replace(base, estimator=estimator, fisher_batch=size, ewc_lambda=strength),
                data=data,
                tasks=2 if quick else 5,
            ),
        )
        for seed in range(1 if quick else SEEDS)
        for estimator in ESTIMATORS
        for size in ((16, 64) if quick else BATCHES)
        for strength in (STRENGTHS[2:7:4] if quick else STRENGTHS)
    ]


def cost(unit: Unit) -> float:
    """Return about how long a unit takes on one core."""
    return seconds(method_of(unit.settings), unit.settings["tasks"])


def measure(unit: Unit) -> Figures:
    """Learn the five tasks."""
    settings, method = unit.settings, method_of(unit.settings)
    tasks = _tasks(settings["data"])[: settings["tasks"]]
    alike = replace(method, estimator="exact", fisher_batch=BASE.fisher_batch, ewc_lambda=0.0)
    first = _first(settings["data"], alike, unit.seed)
    network, memory = learn_chain(tasks, method, unit.seed, first=first)
    return {"accuracy": score(network, tasks, "test"), "trace": memory.traces[0]}


@cache
def _tasks(data: str) -> list[Task]:
    return split_tasks(data, own_outputs=True)


@cache
def _first(data: str, method: Method, seed: int) -> Network:
    """Learn the first task once for all estimators and λ, which come after it."""
    return learn_first(_tasks(data)[0], method, seed)


def report(records: Sequence[Record], folder: Path) -> Findings:
    """Draw accuracy against λ, and say how far the best λ moves with the batch."""
    rows, falls, table = [], [], []
    figure, axes = panels(len(ESTIMATORS), width=3, sharey=True)
    sizes = sorted({record.unit.settings["fisher_batch"] for record in records}) or list(BATCHES)
    for estimator, axis in zip(ESTIMATORS, axes, strict=True):
        published = PUBLISHED.get(estimator)
        row = Row(
            f"which Fisher: {estimator}, best accuracy; λ that is enough with batches of "
            f"{sizes[0]} and {sizes[-1]}",
            "–" if published is None else f"{100 * published:.2f} %",
        )
        bests, traces = [], []
        for size, colour in zip(sizes, COLOURS, strict=False):
            found = chosen(records, method=estimator, fisher_batch=size)
            strengths = sorted({record.unit.settings["ewc_lambda"] for record in found})
            if not found:
                continue
            values = [
                mean([r.figures["accuracy"] for r in chosen(found, ewc_lambda=strength)])
                for strength in strengths
            ]
            errors = [0.0 if value.seeds < 2 else value.error for value in values]
            axis.errorbar(
                strengths, [value.value for value in values], errors, color=colour, marker=".",
                label=f"batches of {size}",
            )  # fmt: skip
            best = int(np.argmax([value.value for value in values]))
            enough = _enough(strengths, [value.value for value in values])
            falls.append(values[best].value - values[-1].value)
            traces.append(float(np.mean([record.figures["trace"] for record in found])))
            bests.append((enough, values[best].value))
            table.append([
                estimator, str(size), f"{traces[-1]:.3g}", f"{strengths[best]:g}",
                f"{values[best].value:.2%} ± {100 * errors[best]:.2f}", _two_digits(enough),
                _by_seed(found, strengths),
            ])  # fmt: skip
        axis.set_title(estimator, fontsize="small")
        axis.set_xscale("log")
        axis.set_xlabel("λ")
        if len(bests) == len(sizes):
            top = max(value for _, value in bests)
            smaller, moved = traces[0] / traces[-1], bests[-1][0] / bests[0][0]
            small, large = (_two_digits(enough) for enough, _ in (bests[0], bests[-1]))
            row = row._replace(
                here=f"{100 * top:.2f} %; {small} and {large}",
                difference="–" if published is None else signed(100 * (top - published)),
                reason=f"with the large batch the trace is divided by {smaller:.3g}, λ times "
                f"{moved:.2g}; the best on the test set, as published; an eighth of the steps",
            )
        rows.append(row)
    if not records:
        return Findings("", rows)
    axes[0].set_ylabel("mean test accuracy")
    axes[0].legend(fontsize="small", loc="lower left")
    save_picture(figure, folder, NAME)
    write_csv(
        folder,
        NAME,
        ["estimator", "Fisher batch", "lambda", "seed", "accuracy", "trace of the first task"],
        [
            [
                record.unit.method,
                *(record.unit.settings[key] for key in ("fisher_batch", "ewc_lambda")),
                record.unit.seed,
                *(record.figures[key] for key in ("accuracy", "trace")),
            ]
            for record in records
        ],
    )
    text = TEXT.format(
        **records[0].unit.settings,
        small=sizes[0],
        large=sizes[-1],
        table=markdown(HEADER, table),
        seeds=len({record.unit.seed for record in records}),
        low=100 * min(falls),
        high=100 * max(falls),
    )
    return Findings(text.strip(), rows)


def _enough(strengths: Sequence[float], accuracies: Sequence[float]) -> float:
    """Return the least λ that comes within `WITHIN` of the best, interpolated in log λ."""
    level = max(accuracies) - WITHIN
    first = next(i for i, value in enumerate(accuracies) if value >= level)
    if first == 0:
        return strengths[0]
    low, high = accuracies[first - 1 : first + 1]
    ratio = strengths[first] / strengths[first - 1]
    return float(strengths[first - 1] * ratio ** ((level - low) / (high - low)))


def _by_seed(records: Sequence[Record], strengths: Sequence[float]) -> str:
    """Write the least and the largest λ that is enough for a seed."""
    found = []
    for seed in sorted({record.unit.seed for record in records}):
        own = {
            record.unit.settings["ewc_lambda"]: record.figures["accuracy"]
            for record in records
            if record.unit.seed == seed
        }
        if own.keys() == set(strengths):
            found.append(_enough(strengths, [own[strength] for strength in strengths]))
    return f"{_two_digits(min(found))} to {_two_digits(max(found))}" if found else "–"


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.0f}"


EXPERIMENT = Experiment(NAME, "Which Fisher", cost, plan, measure, report)

if __name__ == "__main__":
    main(EXPERIMENT)
