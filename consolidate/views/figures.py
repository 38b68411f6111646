"""What a report draws of a ledger and the traces of Λ: charts, and tables of the same numbers."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from consolidate.chain.consistency import side_by_side, side_by_side_text
from consolidate.results import MatrixSummary, Parameter
from consolidate.training.accuracy_matrix import Scores, score
from consolidate.views.charts import Curve, curves, decades, heat_map, log_bars
from consolidate.views.drawing import Drawing, plain
from consolidate.views.markdown import shown
from formats.fisher_json import Ledger, TaskRecord

TASKS = 40  # the latest so many are drawn and listed
ROWS = 48  # of a chart over layers: where there are more parameters, they are taken by module
LISTED = 1000  # rows of a table
LINES = 16  # curves

Cells = list[str]
Groups = Mapping[str, Sequence[str]]  # names of parameters by that of their layer


@dataclass(frozen=True)
class Figure:
    """A chart with what it means, and its numbers as a table."""

    name: str  # of the file of a picture
    heading: str  # of the section
    caption: str  # how to read it
    drawing: Drawing
    header: Cells
    rows: list[Cells]  # the first cell of each names the row
    left_out: int = 0  # how many more rows there would be


def figures(
    ledger: Ledger, parameters: Sequence[Parameter], matrix: MatrixSummary | None
) -> list[Figure]:
    """Make those figures that a ledger has the numbers for, with every parameter that `show` gives.

    They are, in this order: matrix, curves, protection, added, overlap.
    """
    known = {parameter["name"]: parameter for parameter in parameters}
    groups = layers([name for name in in_order(ledger) if name in known], ROWS)
    tasks = ledger.tasks[-TASKS:]
    others = [_protection(known, groups), _added(tasks, groups), _overlap(tasks, groups)]
    return [*score_figures(ledger, matrix), *(figure for figure in others if figure is not None)]


def score_figures(ledger: Ledger, matrix: MatrixSummary | None) -> list[Figure]:
    """Make the figures of what was measured on the tasks, matrix and curves, as far as known."""
    merged = side_by_side_text(side_by_side(ledger))
    found = [None if matrix is None else _matrix(matrix, merged), _curves(ledger)]
    return [figure for figure in found if figure is not None]


def in_order(ledger: Ledger) -> list[str]:
    """List the protected parameters in the order of the weights file, as the tasks' layers have it.

    Those that no task's layers hold come last.
    """
    order = dict.fromkeys(name for task in ledger.tasks for name in task.layers)
    order |= dict.fromkeys(ledger.fisher)
    return [name for name in order if name in ledger.fisher]


def layers(names: Sequence[str], most: int) -> dict[str, list[str]]:
    """Take parameters together by the module they are in, as far up as `most` groups need.

    Where the outermost modules are too many, the last group holds the rest.
    """
    groups = {name: [name] for name in names}
    deepest = min(max(name.count(".") for name in names), 64)
    for depth in range(deepest, 0, -1):
        if len(groups) <= most:
            break
        outer: dict[str, list[str]] = {}
        for name in names:
            outer.setdefault(".".join(name.split(".")[:depth]), []).append(name)
        # A stack of a hundred layers would become one group.
        if len(outer) < most / 4 and len(groups) <= 4 * most:
            break
        groups = outer
    if len(groups) <= 4 * most:
        return groups
    own = list(groups.items())
    rest = [name for _, members in own[most - 1 :] for name in members]
    return dict([*own[: most - 1], (f"({len(own) - most + 1} more)", rest)])


def _matrix(matrix: MatrixSummary, merged: str) -> Figure | None:
    tasks = matrix["tasks"][-TASKS:]
    scores = [row[-TASKS:] for row in matrix["scores"][-TASKS:]]
    start = matrix["start"][-TASKS:]
    named = list(zip(tasks, scores, strict=True))
    if len(matrix["tasks"]) <= TASKS and any(value is not None for value in start):
        named = [("(start)", start), *named]
    known = [value for _, row in named for value in row if value is not None]
    if not known:
        return None
    latest = ", ".join(
        f"{task} {_score(value)}"
        for task, value in zip(tasks, scores[-1], strict=True)
        if value is not None
    )
    return Figure(
        "matrix",
        "What was kept of each task",
        "A row is what was measured after a task was learned, a column the task it was measured "
        f"on. Going down a column shows what was forgotten. {_SCORES} {merged}".rstrip(),
        heat_map(
            "Accuracy matrix",
            f"Scores after each of {len(tasks)} tasks. After the last one: {latest or 'none'}.",
            [name for name, _ in named],
            tasks,
            [row for _, row in named],
            limits=_limits(known),
            write=_score,
        ),
        ["after learning", *(f"on {task}" for task in tasks)],
        [[name, *(_score(value) for value in row)] for name, row in named],
    )


def _curves(ledger: Ledger) -> Figure | None:
    measured = [task for task in ledger.tasks if task.metrics][-TASKS:]
    order = [task.name for task in ledger.tasks]
    order += sorted({name for task in measured for on in task.metrics.values() for name in on})
    taken = [
        (task.name, when, stage + progress[when], _scores(scores))
        for stage, task in enumerate(measured)
        for progress in [_progress(task)]
        for when, scores in task.metrics.items()
    ]
    points: dict[str, dict[float, float]] = {}
    for _, _, place, found in taken:
        for name, value in found.items():
            points.setdefault(name, {})[place] = value
    names = [name for name in dict.fromkeys(order) if name in points][:LINES]
    if not any(len(points[name]) > 1 for name in names):
        return None
    table = [
        [task, when, *(_score(found.get(name)) for name in names)]
        for task, when, _, found in taken
        if found.keys() & set(names)
    ]
    known = [value for name in names for value in points[name].values()]
    lines = [Curve(name, sorted(points[name].items())) for name in names]
    falls = ", ".join(
        f"{plain(line.name)} from {_score(line.points[0][1])} to {_score(line.points[-1][1])}"
        for line in lines
    )
    return Figure(
        "curves",
        "While learning",
        "The score on each task from before a task to after it; every task is drawn as wide, "
        f"whatever its steps. {_SCORES}",
        curves(
            "Scores while learning",
            f"Scores over {len(measured)} tasks: {falls}.",
            [task.name for task in measured],
            lines,
            limits=_limits(known),
            write=_score,
        ),
        ["learning", "when", *(f"on {name}" for name in names)],
        table[:LISTED],
        max(len(table) - LISTED, 0),
    )


def _protection(known: Mapping[str, Parameter], groups: Groups) -> Figure:
    traces = {group: _sum(known[name]["trace"] for name in own) for group, own in groups.items()}
    top = sorted(traces, key=lambda group: -traces[group])[:3]
    total = _sum(traces.values())

    def cells(name: str) -> Cells:
        own = known[name]
        share = f"{own['trace'] / total:.1%}" if total > 0 else "–"
        return [_number(own["trace"]), share, _number(own["mean"]), _number(own["max"])]

    return Figure(
        "protection",
        "Where the protection sits",
        "The trace of Λ, its sum over a layer's weights, on a log scale: how firmly the penalty "
        "holds the layer as a whole. The mean, in the table, says how firmly it holds a weight.",
        log_bars(
            "Trace of the Fisher per layer",
            f"{len(groups)} layers, log scale. The largest: "
            + ", ".join(f"{plain(group)} {traces[group]:.3g}" for group in top)
            + ".",
            list(groups),
            list(traces.values()),
            write=_number,
        ),
        ["parameter", "trace of Λ", "share", "mean per weight", "largest"],
        *_listed(groups, cells),
    )


def _added(tasks: Sequence[TaskRecord], groups: Groups) -> Figure | None:
    values = [[_trace(task, own) for task in tasks] for own in groups.values()]
    known = [value for row in values for value in row if value is not None]
    if not known:
        return None
    sums = ", ".join(
        f"{task.name} {_sum(row[j] or 0.0 for row in values):.3g}" for j, task in enumerate(tasks)
    )
    return Figure(
        "added",
        "What each task added",
        "The trace of each task's own Fisher, times the task's weight, on a log scale. A task that "
        "is dark all the way down was held little from the start.",
        heat_map(
            "Trace that each task added, per layer",
            f"{len(groups)} layers by {len(tasks)} tasks, log scale. In all: {sums}.",
            list(groups),
            [task.name for task in tasks],
            values,
            limits=decades(known),
            write=_short,
            log=True,
        ),
        *_by_task(tasks, groups, _trace),
    )


def _overlap(tasks: Sequence[TaskRecord], groups: Groups) -> Figure | None:
    later = [
        task
        for task in tasks
        if any(_mean_overlap(task, own) is not None for own in groups.values())
    ]
    if not later:
        return None
    return Figure(
        "overlap",
        "Where tasks want the same weights",
        "How alike a task's Fisher and the Λ before it are distributed over a layer's weights: 1 "
        "where they weigh the same ones, 0 where they weigh others. Where it is high, a new task "
        "has to move what an old one holds. For several parameters together it is their mean, "
        "weighed by the task's trace.",
        heat_map(
            "Overlap of each task's Fisher with the one before it, per layer",
            f"{len(groups)} layers by {len(later)} tasks, from 0 to 1.",
            list(groups),
            [task.name for task in later],
            [[_mean_overlap(task, own) for task in later] for own in groups.values()],
            limits=(0.0, 1.0),
            write=lambda value: f"{value:.2f}",
        ),
        *_by_task(later, groups, _mean_overlap),
    )


def _by_task(
    tasks: Sequence[TaskRecord],
    groups: Groups,
    value: Callable[[TaskRecord, Sequence[str]], float | None],
) -> tuple[Cells, list[Cells], int]:
    """Make a figure's table: a row for each parameter, a column for each task."""

    def cells(name: str) -> Cells:
        return [_number(value(task, [name])) for task in tasks]

    return ["parameter", *(task.name for task in tasks)], *_listed(groups, cells)


def _listed(groups: Groups, cells: Callable[[str], Cells]) -> tuple[list[Cells], int]:
    """Make a row for each parameter, and say how many there are no rows for."""
    held = [name for own in groups.values() for name in own]
    return [[name, *cells(name)] for name in held[:LISTED]], max(len(held) - LISTED, 0)


_SCORES = "Scores are accuracies, else minus the mean negative log-likelihood: more is better."


def _scores(measured: Scores) -> dict[str, float]:
    found = {name: score(values) for name, values in measured.items()}
    return {name: value for name, value in found.items() if value is not None}


def _progress(task: TaskRecord) -> dict[str, float]:
    """Say how far into a task each thing was measured, from 0 to 1."""
    last = {"epoch": 1, "step": 1}
    numbered = [(when, *when.split(" ")) for when in task.metrics if " " in when]
    for _, kind, number in numbered:
        last[kind] = max(last[kind], int(number))
    ends = {when: float(when == "after") for when in task.metrics if " " not in when}
    return ends | {when: int(number) / last[kind] for when, kind, number in numbered}


def _trace(task: TaskRecord, names: Sequence[str]) -> float | None:
    """Give w Σ F over parameters, as far as the ledger knows it."""
    known = [task.layers[name].trace for name in names if name in task.layers]
    return min(task.weight * _sum(known), sys.float_info.max) if known else None


def _mean_overlap(task: TaskRecord, names: Sequence[str]) -> float | None:
    found = [task.layers[name] for name in names if name in task.layers]
    known = [(layer.trace, layer.overlap) for layer in found if layer.overlap is not None]
    if not known:
        return None
    largest = max(trace for trace, _ in known)
    weights = [trace / largest if largest > 0 else 1.0 for trace, _ in known]
    pairs = zip(weights, known, strict=True)
    return math.fsum(weight * overlap for weight, (_, overlap) in pairs) / math.fsum(weights)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


def _sum(values: Iterable[float]) -> float:
    """Add numbers from 0; a sum that no float can hold is the largest of them."""
    return min(sum(values), sys.float_info.max)


def _score(value: float | None) -> str:
    return shown(value, ".4g" if value is not None and abs(value) >= 10 else ".3f")


def _number(value: float | None) -> str:
    return shown(value, ".3g")


def _short(value: float) -> str:
    return f"{value:.2g}" if value == 0 or 0.01 <= value < 1000 else f"{value:.0e}"
