"""Against published tables: permuted MNIST with ten tasks, split MNIST, Avalanche's baseline."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from scripts.experiments.lib.common import markdown
from scripts.experiments.lib.continual import (
    Method,
    Network,
    Task,
    learn_chain,
    method_of,
    permuted_tasks,
    random_orders,
    score,
    scores,
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
    Unit,
    accuracy_row,
    best,
    chosen,
    mean,
)
from scripts.experiments.lib.sittings import main

NAME = "published-tables"
SEEDS = 3


class Setting(NamedTuple):
    """A published table's setting.

    Attributes:
        name: Of the tasks, in the units' settings.
        base: What all methods share.
        methods: What is tried, and the options of each.
        strengths: λ to choose from, of each method with a penalty.
        share: Of the steps that the search takes.
        published: Accuracy in per cent by method; None where none is published.
        reasons: Of a difference, for the table, by method.
    """

    name: str
    base: Method
    methods: dict[str, dict[str, object]]
    strengths: dict[str, tuple[float, ...]]
    share: float
    published: dict[str, str | None]
    reasons: dict[str, str]


MOMENTS = "Adam starts from scratch with each task; the published program keeps its moments"
FEW = "the published setting; three seeds"
SHORT = "λ from a short search; the published one takes the best of a grid on the test set"
TEN, SPLIT, INCREMENTAL, AVALANCHE = (
    "ten permutations, 2 × 1000 units",
    "split MNIST, a head for each task",
    "split MNIST, one head (class-incremental)",
    "ten permutations, Avalanche's baseline",
)
NONE: dict[str, object] = {"penalty": "none"}
ALL: dict[str, object] = {"fisher_examples": 20_000}  # more than there are of two digits
SEARCH = "search: "
KEPT = ", Adam's moments kept"
INPUTS = "EWC, online, inputs" + KEPT
MATRICES = "the penalty by matrices over the inputs; the published one is by the diagonal"
SETTINGS = (
    Setting(
        TEN,
        Method(
            sizes=(1024, 1000, 1000, 10), learning_rate=1e-4, steps=5000, penalty_step="proximal",
            mixed_precision="bf16", fisher_examples=10_000,
        ),
        {
            "no penalty" + KEPT: NONE,
            "EWC, online" + KEPT: {"task_weight": "trace", "penalty_step": "gradient"},
            "EWC, separate" + KEPT: {"merge_rule": "separate", "penalty_step": "gradient"},
            "EWC, online": {"task_weight": "trace"},
            "EWC, separate": {"merge_rule": "separate"},
        },
        {
            "EWC, online" + KEPT: (100.0, 200.0, 500.0),
            "EWC, separate" + KEPT: (30.0, 100.0, 300.0),
            "EWC, online": (100.0, 300.0, 1000.0),
            "EWC, separate": (25.0, 50.0, 100.0),
        },
        0.5,
        {
            "no penalty" + KEPT: "78.51",
            "EWC, online" + KEPT: "94.42",
            "EWC, separate" + KEPT: "94.31",
            "EWC, online": "94.42",
            "EWC, separate": "94.31",
        },
        {
            "no penalty" + KEPT: FEW,
            "EWC, online" + KEPT: "equal-trace weights, exact Fisher, λ from a short search",
            "EWC, separate" + KEPT: "exact Fisher, λ from a short search",
            "EWC, online": MOMENTS,
            "EWC, separate": MOMENTS,
        },
    ),
    Setting(
        SPLIT,
        Method(batch_size=128, steps=2000),
        {
            "no penalty" + KEPT: NONE,
            "EWC, online" + KEPT: ALL,
            INPUTS: ALL,
            "no penalty": NONE,
            "EWC, online": ALL,
        },
        dict.fromkeys(["EWC, online" + KEPT, "EWC, online"], (1e2, 1e3, 1e4, 1e5, 1e6))
        | {INPUTS: (1e1, 1e2, 1e3, 1e4)},
        0.25,
        {
            "no penalty" + KEPT: "85.41",
            "EWC, online" + KEPT: "99.12",
            INPUTS: "99.12",
            "no penalty": "85.41",
            "EWC, online": "99.12",
        },
        {
            "no penalty" + KEPT: FEW,
            "EWC, online" + KEPT: f"three seeds, published are 30; {SHORT}",
            INPUTS: MATRICES,
            "no penalty": MOMENTS,
            "EWC, online": f"{MOMENTS}; {SHORT}",
        },
    ),
    Setting(
        INCREMENTAL,
        Method(batch_size=128, steps=2000),
        {"no penalty": NONE, "EWC, online": {}},
        {"EWC, online": (1e2, 1e3, 1e4, 1e5)},
        0.25,
        {"no penalty": "19.9", "EWC, online": "20"},
        {
            "no penalty": "about chance between tasks",
            "EWC, online": "EWC does not solve this: about chance between tasks",
        },
    ),
    Setting(
        AVALANCHE,
        Method(
            sizes=(784, 512, 10), optimizer="sgd", learning_rate=1e-3, steps=2150,
            penalty_step="proximal",
        ),
        {"no penalty": NONE, "EWC, separate": {"merge_rule": "separate"}},
        {"EWC, separate": (0.1, 1.0, 3.0, 10.0, 100.0, 1000.0)},
        0.5,
        {"no penalty": None, "EWC, separate": "83"},
        {
            "no penalty": "–",
            "EWC, separate": "SGD at 1e-3 without momentum ends before it has learned a task to "
            "its end",
        },
    ),
)  # fmt: skip
TEXT = """
Each benchmark with its published network, optimizer, rate, steps and batches; what differs is
listed below. The last 5,000 of the 60,000 images are held out everywhere, and λ is chosen on them,
by the mean over all tasks after the last, with the first seed at a fraction of the steps; never on
the test set. The Fisher is exact, on 2,000 images of a task unless said otherwise. Mean test
accuracy over all tasks after the last, mean over seeds and its standard error:

{table}

![Accuracy on each task after the last](published-tables.png)

- *{ten}* ([van de Ven & Tolias 2019](https://arxiv.org/abs/1904.07734), domain-incremental):
  2 × 1000 units, Adam at 1e-4, 5,000 steps of 256, images in [0, 1] padded to 32 × 32, all ten
  tasks permuted, as in its program with all seeds but 0; Fisher on 10,000 images of a task;
  products in bfloat16, weights, Fisher and penalty in float32; the rule online has equal-trace
  weights. Its program keeps Adam's moments from task to task. In the rows that do not say so,
  Adam starts from scratch with each task, as in `consolidate finetune`, with proximal steps of the
  penalty.
- *inputs*: the penalty uses [matrices over a layer's
  inputs](../../how-to/beyond-the-diagonal.md), with gradient steps; heads keep the diagonal.
- *{split}* ([van de Ven 2025](https://arxiv.org/abs/2502.11756), task-incremental): 2 × 400
  units, Adam at 1e-3, 2,000 steps of 128, images in [0, 1], which digits make a task drawn
  for each seed, the Fisher on all images of a task: what a task that is well learned has of it
  comes from a few. The published λ is the best of a grid on the test set, over 30 seeds. Its
  program keeps Adam's moments too.
- *{incremental}*: the same, where the task is not known when an image is tested, with the Fisher
  on 2,000 images, and Adam from scratch with each task; published is about what chance between
  tasks gives. **This is a limit of the method:** nothing in it makes the outputs of old
  and new digits comparable.
- *{avalanche}* (ContinualAI's continual-learning-baselines): 1 × 512 units, SGD at 1e-3, 10 epochs
  in batches of 256, the first task not permuted. Its Fisher is the square of the batch's mean
  gradient, with λ = 1. No penalty does as well: the smallest λ of the grid is found, and larger
  ones cost the new tasks more than they keep of the old.

The searches:

{search}
"""


def plan(records: Sequence[Record], quick: bool) -> list[Unit]:
    """List each setting's searches, and then the seeds at the strengths that they found."""
    units = []
    for setting in SETTINGS:
        base, data, unit = setting.base, MNIST, partial(Unit, NAME)
        if quick:
            sizes = (base.sizes[0], 40, 10)
            base, data = replace(base, sizes=sizes, steps=20, fisher_examples=50), SMALL
        count = {TEN: 10, AVALANCHE: 10}.get(setting.name, 5)
        shared: dict[str, object] = {
            "data": data,
            "setting": setting.name,
            "tasks": 2 if quick else count,
        }
        if setting.name == TEN:
            shared["all_permuted"] = True
        elif setting.name in (SPLIT, INCREMENTAL):
            shared |= {"digits": "drawn", "pixels": "in [0, 1]"}
        for title, options in setting.methods.items():
            method = replace(base, **options)  # type: ignore[arg-type]
            others = shared | ({"optimizer_kept": True} if title.endswith(KEPT) else {})
            if title == INPUTS:
                others |= {"structure": "inputs"}
            if title in setting.strengths:
                short = replace(method, steps=int(base.steps * setting.share))
                search = [
                    unit(SEARCH + title, 0, settings_of(replace(short, ewc_lambda=x), **others))
                    for x in setting.strengths[title][slice(1, 2) if quick else slice(None)]
                ]
                units += search
                digests = {one.digest for one in search}
                done = [record for record in records if record.unit.digest in digests]
                if len(done) < len(search):
                    continue
                method = replace(method, ewc_lambda=best(done).unit.settings["ewc_lambda"])
            units += [
                unit(title, seed, settings_of(method, **others))
                for seed in range(1 if quick else SEEDS)
            ]
    return units


def cost(unit: Unit) -> float:
    """Return about how long a unit takes on one core."""
    structure = unit.settings.get("structure", "diagonal")
    return seconds(method_of(unit.settings), unit.settings["tasks"], structure)


def measure(unit: Unit) -> Figures:
    """Learn the chain."""
    method = method_of(unit.settings)
    tasks = _tasks(unit)
    searching = unit.method.startswith(SEARCH)
    matrix: list[list[float]] = []

    def learned(network: Network, number: int) -> None:
        if not searching:
            matrix.append(scores(network, tasks[: number + 1], "test"))

    network, memory = learn_chain(
        tasks,
        method,
        unit.seed,
        optimizer_kept=unit.settings.get("optimizer_kept", False),
        structure=unit.settings.get("structure", "diagonal"),
        learned=learned,
    )
    if searching:
        return {"validation": score(network, tasks, "validation")}
    return {"matrix": matrix, "traces": memory.traces}


def _tasks(unit: Unit) -> list[Task]:
    name, data, count = (unit.settings[key] for key in ("setting", "data", "tasks"))
    if name in (SPLIT, INCREMENTAL):
        generator = torch.Generator().manual_seed(unit.seed)
        digits = torch.randperm(10, generator=generator).tolist()
        tasks = split_tasks(data, own_outputs=name == SPLIT, digits=digits, standardised=False)
        return tasks[:count]
    side = 32 if name == TEN else 28
    orders = random_orders(count + 1, side * side, unit.seed)
    orders = orders[1:] if unit.settings.get("all_permuted") else orders[:-1]
    return permuted_tasks(data, orders, side=side, standardised=name != TEN)


def report(records: Sequence[Record], folder: Path) -> Findings:
    """Set the means beside the published ones."""
    rows, table, found = [], [], {}
    for setting in SETTINGS:
        for title in setting.methods:
            done = chosen(records, method=title, setting=setting.name)
            found[setting.name, title] = done
            values = [sum(r.figures["matrix"][-1]) / len(r.figures["matrix"][-1]) for r in done]
            row = accuracy_row(
                f"{setting.name}: {title}",
                setting.published[title],
                values,
                SEEDS,
                setting.reasons[title],
            )
            rows.append(row)
            penalised = done and title in setting.strengths
            strength = f"{done[0].unit.settings['ewc_lambda']:g}" if penalised else "–"
            table.append([row.figure, strength, row.here, row.published])
    if not any(found.values()):
        return Findings("", rows)
    _draw(found, folder)
    write_csv(
        folder,
        NAME,
        ["setting", "method", "seed", "after task", "on task", "accuracy"],
        [
            [setting, title, record.unit.seed, i + 1, j + 1, value]
            for (setting, title), done in found.items()
            for record in done
            for i, line in enumerate(record.figures["matrix"])
            for j, value in enumerate(line)
        ],
    )
    text = TEXT.format(
        table=markdown(["", "λ", "here", "published"], table),
        ten=TEN,
        split=SPLIT,
        incremental=INCREMENTAL,
        avalanche=AVALANCHE,
        search=_search(records),
    )
    return Findings(text.strip(), rows)


def _search(records: Sequence[Record]) -> str:
    lines = ["| | λ: mean validation accuracy |", "| --- | --- |"]
    for setting in SETTINGS:
        for title in setting.methods:
            tried = chosen(records, method=SEARCH + title, setting=setting.name)
            if tried:
                cells = [
                    f"{one.unit.settings['ewc_lambda']:g}: {one.figures['validation']:.2%}"
                    for one in sorted(tried, key=lambda one: one.unit.settings["ewc_lambda"])
                ]
                lines.append(f"| {setting.name}: {title} | {', '.join(cells)} |")
    return "\n".join(lines)


def _draw(found: dict[tuple[str, str], list[Record]], folder: Path) -> None:
    figure, axes = panels(len(SETTINGS), width=3.6, sharey=True)
    titles = dict.fromkeys(title for setting in SETTINGS for title in setting.methods)
    colours = dict(zip(titles, COLOURS, strict=False))
    for setting, axis in zip(SETTINGS, axes, strict=True):
        for title in setting.methods:
            if done := found[setting.name, title]:
                last = np.array([record.figures["matrix"][-1] for record in done])
                values = [mean(list(column)) for column in last.T]
                errors = [0.0 if v.seeds < 2 else v.error for v in values]
                axis.errorbar(
                    range(1, last.shape[1] + 1),
                    [value.value for value in values],
                    errors,
                    color=colours[title],
                    marker=".",
                    label=title,
                )
        axis.set_title(setting.name, fontsize="small")
        axis.set_xlabel("task")
        axis.set_ylim(0, 1.02)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("test accuracy after the last task")
    lines = {
        label: line
        for axis in axes
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(lines.values(), lines, fontsize="small", loc="outside lower center", ncols=4)
    save_picture(figure, folder, NAME)


EXPERIMENT = Experiment(NAME, "Against published tables", cost, plan, measure, report)

if __name__ == "__main__":
    main(EXPERIMENT)
