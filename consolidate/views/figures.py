"""The figures of a report, from ledger and traces of Λ: charts, and tables of their numbers."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import TypeVar, cast

from consolidate.chain.consistency import side_by_side, side_by_side_text
from consolidate.results import Benchmark, MatrixSummary, Parameter
from consolidate.training.accuracy_matrix import Scores, score
from consolidate.views.charts import (
    Bars,
    Chart,
    Curve,
    HeatMap,
    Lines,
    limits,
    natural_height,
    plain,
)
from consolidate.views.markdown import benchmarks_text, shown
from consolidate.views.matrix import columns_and_rows
from formats.fisher_json import Ledger, TaskRecord, benchmarks_of

TASKS = 40  # at most, the latest, are drawn and listed
ROWS = 48  # of a chart over layers: more parameters are grouped by module
LISTED = 1000  # rows of a table
LINES = 16  # curves

Cells = list[str]
T = TypeVar("T")
Groups = Mapping[str, Sequence[str]]  # names of parameters by that of their layer


@dataclass(frozen=True)
class Figure:
    """A chart, and its numbers as a table; the page explains how to read it."""

    name: str  # of the file of a picture, and of the section of a page
    chart: Chart
    header: Cells
    rows: list[Cells]  # the first cell of each names the row
    left_out: int = 0  # how many more rows there would be
    note: str = ""
    wide: bool = False  # on a page; else there is another beside it
    height: float = 0.0  # at least, in CSS pixels: that of the one beside it


def figures(
    ledger: Ledger,
    parameters: Sequence[Parameter],
    matrix: MatrixSummary | None,
    search: Sequence[Figure] = (),
    factors: Mapping[str, str] | None = None,
) -> list[Figure]:
    """Place the figures that have numbers: scores, a search, protection, added, overlap.

    `factors` describe the matrices that protect parameters in place of Λ, if there are any.
    """
    known = {parameter["name"]: parameter for parameter in parameters}
    groups = layers([name for name in in_order(ledger) if name in known], ROWS)
    tasks = ledger.tasks[-TASKS:]
    added = ("added", "Trace that each task added, per layer", tasks, groups, _trace)
    others = [
        _protection(known, groups, factors or {}),
        _by_task(*added, log=True),
        _overlap(tasks, groups),
    ]
    return _placed(
        [*score_figures(ledger, matrix), *search, *(one for one in others if one is not None)]
    )


def _placed(found: Sequence[Figure]) -> list[Figure]:
    """Lay figures out on a page: crowded ones across it, others in pairs side by side."""
    placed: list[Figure] = []
    for crowded, run in groupby(found, key=lambda figure: figure.chart.crowded):
        own = list(run)
        even = [i for i in range(0, len(own), 2) if not isinstance(own[i].chart, HeatMap)]
        alone = [*even, 0][0] if len(own) % 2 else None  # no half of the page stays empty
        if crowded:
            placed += [replace(one, wide=True) for one in own]
            continue
        wide = [] if alone is None else [replace(own.pop(alone), wide=True)]
        pairs = [_side_by_side(*own[i : i + 2]) for i in range(0, len(own), 2)]
        halves = [figure for pair in pairs for figure in pair]
        placed += [*halves[:alone], *wide, *halves[alone or 0 :]] if wide else halves
    return placed


def _side_by_side(one: Figure, other: Figure) -> tuple[Figure, Figure]:
    """Give two figures the height of the higher one, but none more than twice its own."""
    heights = [natural_height(figure.chart) for figure in (one, other)]
    both = [min(max(heights), 2 * height) for height in heights]
    return replace(one, height=both[0]), replace(other, height=both[1])


def score_figures(ledger: Ledger, matrix: MatrixSummary | None) -> list[Figure]:
    """Return the figures of the known scores on the tasks: matrix, curves, trade-off."""
    merged = side_by_side_text(side_by_side(ledger))
    benchmarks = {n: cast(Benchmark, asdict(b)) for n, b in benchmarks_of(ledger).items()}
    lines = benchmarks_text(benchmarks)
    merged = " ".join(filter(None, [merged, *(f"{line}." for line in lines)]))
    matrix_figure = None if matrix is None else _matrix(matrix, merged)
    found = [matrix_figure, _curves(ledger), _trade_off(ledger), _between(ledger)]
    return [figure for figure in found if figure is not None]


def trade_off(said: str, curves: Sequence[Curve], labels: tuple[str, str]) -> Lines:
    """Chart stability against plasticity: the scores on old tasks over that on the new one."""
    return Lines("Stability against plasticity", said, curves, (), number, labels, zoomed=True)


def in_order(ledger: Ledger) -> list[str]:
    """List the protected parameters in the order of the weights file."""
    order = dict.fromkeys(name for task in ledger.tasks for name in task.layers)
    order |= dict.fromkeys(ledger.fisher)
    return [name for name in order if name in ledger.fisher]


def layers(names: Sequence[str], most: int) -> dict[str, list[str]]:
    """Group parameters by module, at most about `most` groups; the last one has the rest."""
    groups = {name: [name] for name in names}
    depth = min(max(name.count(".") for name in names), 64)
    while len(groups) > most and depth > 0:
        outer: dict[str, list[str]] = {}
        for name in names:
            outer.setdefault(".".join(name.split(".")[:depth]), []).append(name)
        # A stack of a hundred layers would become one group.
        if len(outer) < most / 4 and len(groups) <= 4 * most:
            break
        groups, depth = outer, depth - 1
    if len(groups) <= 4 * most:
        return groups
    own = list(groups.items())
    rest = [name for _, members in own[most - 1 :] for name in members]
    return dict([*own[: most - 1], (f"({len(own) - most + 1} more)", rest)])


def _matrix(matrix: MatrixSummary, merged: str) -> Figure | None:
    columns, (start, *scores) = columns_and_rows(matrix)
    tasks = columns[-TASKS:]
    scores, start = [row[-TASKS:] for row in scores[-TASKS:]], start[-TASKS:]
    named = list(zip(matrix["tasks"][-TASKS:], scores, strict=True))
    if len(matrix["tasks"]) <= TASKS and any(value is not None for value in start):
        named = [("(start)", start), *named]
    if all(value is None for _, row in named for value in row):
        return None
    last = zip(tasks, scores[-1], strict=True)
    latest = ", ".join(f"{task} {_score(value)}" for task, value in last if value is not None)
    said = f"Scores after each of {len(named)} tasks. After the last one: {latest or 'none'}."
    names, values = zip(*named, strict=True)
    labels = ("after learning", "score on")
    chart = HeatMap("Accuracy matrix", said, names, tasks, values, _score, False, labels, "score")
    header = ["after learning", *(f"on {task}" for task in tasks)]
    rows = [[name, *map(_score, row)] for name, row in named]
    return Figure("matrix", chart, header, rows, note=merged)


def _curves(ledger: Ledger) -> Figure | None:
    measured = [task for task in ledger.tasks if task.metrics][-TASKS:]
    others = sorted({name for task in measured for on in task.metrics.values() for name in on})
    order = list(dict.fromkeys([*(task.name for task in ledger.tasks), *others]))
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
    names = [name for name in order if name in points][:LINES]
    if not any(len(points[name]) > 1 for name in names):
        return None
    table = [
        [task, when, *(_score(found.get(name)) for name in names)]
        for task, when, _, found in taken
        if found.keys() & set(names)
    ]
    lines = [Curve(name, sorted(points[name].items()), color=order.index(name)) for name in names]
    ends = [(plain(line.name), line.points[0][1], line.points[-1][1]) for line in lines]
    falls = [f"{name} from {_score(first)} to {_score(last)}" for name, first, last in ends]
    said = f"Scores over {len(measured)} tasks: {', '.join(falls)}."
    ticks = [(stage + 0.5, task.name) for stage, task in enumerate(measured)]
    labels, walls = ("task being learned", "score"), range(len(measured) + 1)
    chart = Lines("Scores during training", said, lines, ticks, number, labels, walls)
    header = ["learning", "when", *(f"on {name}" for name in names)]
    return Figure("curves", chart, header, *listed(table))


def _trade_off(ledger: Ledger) -> Figure | None:
    """Return the path of each later task: its score, and the mean score on the tasks before."""
    curves, rows = [], []
    for i, task in list(enumerate(ledger.tasks))[1:][-LINES:]:
        progress = _progress(task)
        times = sorted(task.metrics, key=progress.__getitem__)
        taken = [(when, _scores(task.metrics[when])) for when in times]
        # The mean is over the same tasks at each point: those that were always measured.
        earlier = [t.name for t in ledger.tasks[:i] if all(t.name in found for _, found in taken)]
        points = [
            (when, found[task.name], _mean([found[name] for name in earlier]))
            for when, found in taken
            if earlier and task.name in found
        ]
        if len(points) > 1:
            way = [(x, y) for _, x, y in points]
            curves.append(Curve(task.name, way, path=True, color=i))
            rows += [[task.name, when, _score(x), _score(y)] for when, x, y in points]
    if not curves:
        return None
    ends = [(plain(curve.name), curve.points[-1]) for curve in curves]
    last = ", ".join(f"{name} {_score(x)} and {_score(y)}" for name, (x, y) in ends)
    said = f"Score on the new task, and mean score on earlier tasks, at the end of each: {last}."
    labels = ("score on the new task", "mean score on earlier tasks")
    chart = trade_off(said, curves, labels)
    header = ["learning", "when", "score on it", "mean score on earlier tasks"]
    return Figure("tradeoff", chart, header, *listed(rows))


def _between(ledger: Ledger) -> Figure | None:
    """Draw the latest curve over α, and list all."""
    chosen = [
        (task.name, task.interpolation)
        for task in ledger.tasks[-TASKS:]
        if task.interpolation is not None and task.interpolation.curve
    ]
    if not chosen:
        return None
    learned, latest = chosen[-1]
    names = list(latest.curve[0].scores)[:LINES]
    lines = [
        Curve(name, [(at.alpha, at.scores[name]) for at in latest.curve if name in at.scores])
        for name in names
    ]
    scores = [score for line in lines for _, score in line.points]
    chosen_at = f"chosen: {latest.alpha:g}"
    lines.append(Curve(chosen_at, [(latest.alpha, end) for end in limits(scores)], guide=True))
    ticks = [(0.0, "0"), *((i / 10, f"{i / 10:g}") for i in (2, 4, 6, 8)), (1.0, "1")]
    said = f"After learning {learned}, α = {latest.alpha:g} was chosen of {len(latest.curve) - 1}."
    chart = Lines(
        "Scores over α",
        said,
        lines,
        ticks,
        _score,
        ("α: from the start, 0, to what was trained, 1", "score on held-out data"),
    )
    every = dict.fromkeys(name for _, one in chosen for at in one.curve for name in at.scores)
    columns = [*every][:LINES]
    rows = [
        [task, f"{at.alpha:g}", *(_score(at.scores.get(name)) for name in columns)]
        for task, one in chosen
        for at in one.curve
    ]
    header = ["learning", "α", *(f"on {name}" for name in columns)]
    return Figure("between", chart, header, *listed(rows))


def _protection(
    known: Mapping[str, Parameter], groups: Groups, factors: Mapping[str, str]
) -> Figure:
    traces = {group: _sum(known[name]["trace"] for name in own) for group, own in groups.items()}
    total = _sum(traces.values())
    top = sorted(traces, key=lambda group: -traces[group])[:3]
    largest = ", ".join(f"{plain(group)} {traces[group]:.3g}" for group in top)
    said = f"{len(groups)} layers, log scale. The largest: {largest}."

    def cells(name: str) -> Cells:
        own = known[name]
        share = f"{own['trace'] / total:.1%}" if total > 0 else "–"
        numbers = [number(own["trace"]), share, number(own["mean"]), number(own["max"])]
        return [*numbers, factors.get(name, "diagonal")] if factors else numbers

    label = "trace of Λ, log scale"
    values = [*traces.values()]
    chart = Bars("Trace of the Fisher per layer", said, [*groups], values, number, label)
    header = ["parameter", "trace of Λ", "share", "mean per weight", "largest"]
    header += ["protected by"] if factors else []
    return Figure("protection", chart, header, *_by_parameter(groups, cells))


def _overlap(tasks: Sequence[TaskRecord], groups: Groups) -> Figure | None:
    known = {name for own in groups.values() for name in own}
    later = [task for task in tasks if _mean_overlap(task, known) is not None]
    title = "Overlap of each task's Fisher with the one before it, per layer"
    return _by_task("overlap", title, later, groups, _mean_overlap, log=False)


def _by_task(
    name: str,
    title: str,
    tasks: Sequence[TaskRecord],
    groups: Groups,
    measure: Callable[[TaskRecord, Sequence[str]], float | None],
    *,
    log: bool,
) -> Figure | None:
    """Return a figure of a measure by layer and task, from 0 to 1 or on a log scale."""
    values = [[measure(task, own) for task in tasks] for own in groups.values()]
    if all(value is None for row in values for value in row):
        return None
    names = [task.name for task in tasks]
    columns = zip(names, zip(*values, strict=True), strict=True)
    sums = ", ".join(f"{name} {_sum(v or 0.0 for v in own):.3g}" for name, own in columns)
    scale = f"log scale. In all: {sums}" if log else "from 0 to 1"
    said = f"{len(groups)} layers by {len(tasks)} tasks, {scale}."
    write = _short if log else "{:.2f}".format
    shades = "trace, log" if log else "overlap"
    labels = ("", "task")
    chart = HeatMap(title, said, [*groups], names, values, write, log, labels, shades)
    rows = _by_parameter(groups, lambda name: [number(measure(task, [name])) for task in tasks])
    return Figure(name, chart, ["parameter", *names], *rows)


def _by_parameter(groups: Groups, cells: Callable[[str], Cells]) -> tuple[list[Cells], int]:
    """Return a row for each parameter, as `listed` does."""
    held, left_out = listed([name for own in groups.values() for name in own])
    return [[name, *cells(name)] for name in held], left_out


def listed(rows: list[T]) -> tuple[list[T], int]:
    """Return the rows that a table has room for, and how many more there are."""
    return rows[:LISTED], max(len(rows) - LISTED, 0)


def _scores(measured: Scores) -> dict[str, float]:
    found = {name: score(values) for name, values in measured.items()}
    return {name: value for name, value in found.items() if value is not None}


def _progress(task: TaskRecord) -> dict[str, float]:
    """Return how far into a task each evaluation was, from 0 to 1."""
    last = {"epoch": 1, "step": 1}
    numbered = [(when, *when.split(" ")) for when in task.metrics if " " in when]
    for _, kind, number in numbered:
        last[kind] = max(last[kind], int(number))
    ends = {when: float(when == "after") for when in task.metrics if " " not in when}
    return ends | {when: int(number) / last[kind] for when, kind, number in numbered}


def _trace(task: TaskRecord, names: Sequence[str]) -> float | None:
    """Return w Σ F over the parameters whose trace is in the ledger."""
    known = [task.layers[name].trace for name in names if name in task.layers]
    return min(task.weight * _sum(known), sys.float_info.max) if known else None


def _mean_overlap(task: TaskRecord, names: Iterable[str]) -> float | None:
    own = [task.layers[name] for name in names if name in task.layers]
    known = [(layer.trace, layer.overlap) for layer in own if layer.overlap is not None]
    largest = max((trace for trace, _ in known), default=0.0)
    if not known:
        return None
    weights = [trace / largest if largest > 0 else 1.0 for trace, _ in known]
    pairs = zip(weights, known, strict=True)
    return math.fsum(weight * overlap for weight, (_, overlap) in pairs) / math.fsum(weights)


def _mean(values: Sequence[float]) -> float:
    """Return the mean; halved first so that nothing overflows."""
    return 2 * math.fsum(value / 2 / len(values) for value in values)


def _sum(values: Iterable[float]) -> float:
    """Return the sum of numbers from 0; the largest float if it overflows."""
    return min(sum(values), sys.float_info.max)


def _score(value: float | None) -> str:
    return shown(value, ".4g" if value is not None and abs(value) >= 10 else ".3f")


def number(value: float | None) -> str:
    """Write a number in three digits; a dash if it is not known."""
    return shown(value, ".3g")


def _short(value: float) -> str:
    return f"{value:.2g}" if value == 0 or 0.01 <= value < 1000 else f"{value:.0e}"
