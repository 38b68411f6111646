"""The accuracy matrix to look at: as JSON-ready data, a table, CSV and a plot."""

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from consolidate.accuracy_matrix import AccuracyMatrix, Point
from formats.atomic import check_file, write_file
from formats.errors import UsageError

PLOTS = (".png", ".svg")
MEANS = ("ACC", "BWT", "forgetting")


def check_view(path: str | Path, *, plot: bool) -> None:
    """Refuse, before any work is done, a file that could not be written after it.

    Args:
        path: The file that is to be made or replaced.
        plot: Whether it is a plot; CSV otherwise.

    Raises:
        UsageError: It is no kind of plot that is known, or matplotlib is missing.
        InputError: It cannot be written there, or is a folder.
    """
    path = Path(path)
    if plot and path.suffix.lower() not in PLOTS:
        raise UsageError(f"--plot {path}: the name must end in {' or '.join(PLOTS)}")
    if plot and find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'consolidate-ewc[plot]'")
    check_file(path)


def matrix_summary(matrix: AccuracyMatrix) -> dict[str, Any]:
    """Give the matrix, ACC, BWT, forgetting and the curves over steps, ready for JSON.

    Args:
        matrix: The matrix.

    Returns:
        ``tasks``, ``scores`` (row i after training task i), ``start``; under ``acc``, ``bwt`` and
        ``forgetting`` the ``value``, and over how many ``terms`` ``of`` how many; ``points``.
    """
    return {
        "tasks": matrix.tasks,
        "scores": matrix.scores,
        "start": matrix.start,
        "acc": asdict(matrix.acc()),
        "bwt": asdict(matrix.bwt()),
        "forgetting": asdict(matrix.forgetting()),
        "points": [asdict(point) for point in matrix.points],
    }


def matrix_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Lay the matrix out as a table, its header first; what was not measured is a dash.

    Args:
        summary: What `matrix_summary` returned.

    Returns:
        Rows of cells; that of the start is left out where nothing was measured there.
    """
    named = [("(start)", summary["start"])] if any(s is not None for s in summary["start"]) else []
    named += zip(summary["tasks"], summary["scores"], strict=True)
    rows = [[name, *(_cell(score) for score in scores)] for name, scores in named]
    return [["after \\ on", *summary["tasks"]], *rows]


def means_text(summary: Mapping[str, Any]) -> str:
    """Give ACC, BWT and forgetting on one line, and say where they are over a part only.

    Args:
        summary: What `matrix_summary` returned.

    Returns:
        A line without a newline.
    """
    return ", ".join(f"{title} {_mean(summary[title.lower()])}" for title in MEANS)


def write_matrix_csv(path: str | Path, matrix: AccuracyMatrix) -> None:
    """Write the matrix and the curves as CSV, in the order of time.

    The columns are ``training`` (a task), ``when`` and one for each task that may have been
    evaluated. The rows whose ``when`` is ``after`` are R; those of ``before`` the start, and of
    ``step N`` the curves. What was not measured is empty.

    Args:
        path: The file to make or to replace.
        matrix: The matrix.

    Raises:
        InputError: It cannot be written.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["training", "when", *matrix.tasks])
    table.writerow([matrix.tasks[0], "before", *map(_exact, matrix.start)])
    for task, scores in zip(matrix.tasks, matrix.scores, strict=True):
        for point in matrix.points:
            if point.task == task and point.step:
                found = (point.scores.get(name) for name in matrix.tasks)
                table.writerow([task, f"step {point.step}", *map(_exact, found)])
        table.writerow([task, "after", *map(_exact, scores)])
    write_file(Path(path), text.getvalue())


def plot_matrix(path: str | Path, matrix: AccuracyMatrix) -> None:
    """Draw the matrix as a heat map, and beside it the curves over training steps, if any.

    Args:
        path: A ``.png`` or ``.svg`` file to make or to replace.
        matrix: The matrix.

    Raises:
        InputError: It cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    size = max(3.5, 1.2 + 0.7 * len(matrix.tasks))
    panels = 2 if matrix.points else 1
    figure = Figure(figsize=(size * 1.2 + (6 if matrix.points else 0), size), layout="constrained")
    ratios = [size * 1.2, 6][:panels]
    axes = figure.subplots(1, panels, squeeze=False, width_ratios=ratios)[0]
    _draw_matrix(axes[0], matrix)
    if matrix.points:
        _draw_curves(axes[1], matrix.points)
    image = io.BytesIO()
    kind = Path(path).suffix.lower().removeprefix(".")
    # No time of day and no random ids: the same matrix gives the same bytes.
    metadata = {"Date": None} if kind == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "consolidate"}):
        figure.savefig(image, format=kind, dpi=130, metadata=metadata)
    write_file(Path(path), image.getvalue())


def _draw_matrix(axes: Any, matrix: AccuracyMatrix) -> None:
    nan = float("nan")
    values = [[nan if score is None else score for score in row] for row in matrix.scores]
    known = [score for row in matrix.scores for score in row if score is not None]
    accuracies = all(0 <= score <= 1 for score in known)
    low, high = (0.0, 1.0) if accuracies else (min(known), max(known))
    image = axes.imshow(values, vmin=low, vmax=high, cmap="viridis")
    for i, row in enumerate(matrix.scores):
        for j, score in enumerate(row):
            bright = score is not None and score > (low + high) / 2
            color = "black" if bright or score is None else "white"
            axes.text(j, i, _cell(score), ha="center", va="center", color=color)
    places = range(len(matrix.tasks))
    names = [name.replace("$", r"\$") for name in matrix.tasks]
    axes.set_xticks(places, names, rotation=45, ha="right")
    axes.set_yticks(places, names)
    axes.set_xlabel("score on task")
    axes.set_ylabel("after training task")
    axes.set_title(means_text(matrix_summary(matrix)), fontsize=9)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def _draw_curves(axes: Any, points: list[Point]) -> None:
    """Draw the score on each task over the steps of all tasks, one after the other."""
    curves: dict[str, list[tuple[int, float]]] = {}
    done = 0
    for task, group in groupby(points, key=lambda point: point.task):
        own = list(group)
        axes.axvline(done, color="lightgrey", zorder=0)
        axes.annotate(f" {task}", (done, 1.01), xycoords=("data", "axes fraction"), fontsize=8)
        for point in own:
            for name, score in point.scores.items():
                curves.setdefault(name, []).append((done + point.step, score))
        done += own[-1].step
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=name, marker=".", markersize=3)
    axes.set_xlabel("optimizer steps; the lines are where a task begins")
    axes.set_ylabel("score")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _mean(mean: Mapping[str, Any]) -> str:
    if mean["value"] is None:
        return "–"
    partly = f" (over {mean['terms']} of {mean['of']})" if mean["terms"] < mean["of"] else ""
    return f"{mean['value']:.4f}{partly}"


def _cell(score: float | None) -> str:
    return "–" if score is None else f"{score:.4f}"


def _exact(score: float | None) -> str:
    return "" if score is None else repr(score)
