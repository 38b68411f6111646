"""The accuracy matrix to look at: as JSON-ready data, a table, CSV and a plot."""

import csv
import io
import logging
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from consolidate.training.accuracy_matrix import AccuracyMatrix, accuracy_matrix
from consolidate.views.drawing import beside, png, svg_file
from consolidate.views.figures import TASKS, score_figures
from consolidate.views.markdown import escaped, table
from formats.atomic import check_file, write_file
from formats.errors import UsageError
from formats.fisher_json import Ledger

LOG = logging.getLogger("consolidate")
PLOTS = (".png", ".svg")


def check_view(path: str | Path, *, plot: bool) -> None:
    """Refuse, before any work is done, a file that could not be written after it.

    Args:
        path: The file that is to be made or replaced.
        plot: Whether it is a plot; CSV otherwise.

    Raises:
        UsageError: It is no kind of plot that is known, or matplotlib is missing for a ``.png``.
        InputError: It cannot be written there, or is a folder.
    """
    path = Path(path)
    if plot and path.suffix.lower() not in PLOTS:
        raise UsageError(f"--plot {path}: the name must end in {' or '.join(PLOTS)}")
    if plot and path.suffix.lower() == ".png" and find_spec("matplotlib") is None:
        raise UsageError(
            f"--plot {path} needs matplotlib: pip install 'consolidate-ewc[plot]', or name a .svg"
        )
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


def plot_matrix(path: str | Path, ledger: Ledger, summary: Mapping[str, Any]) -> None:
    """Draw the matrix as a heat map, and beside it the scores while learning, as a report does.

    Args:
        path: A ``.png`` or ``.svg`` file to make or to replace.
        ledger: The ledger.
        summary: What `matrix_summary` returned of its matrix.

    Raises:
        InputError: It cannot be written.
    """
    figures = score_figures(ledger, summary)
    picture = beside(means_text(summary), [figure.drawing for figure in figures])
    if len(summary["tasks"]) > TASKS:
        LOG.info("the plot has the last %d of %d tasks", TASKS, len(summary["tasks"]))
    svg = Path(path).suffix.lower() == ".svg"
    write_file(Path(path), svg_file(picture) if svg else png(picture))


def _exact(score: float | None) -> str:
    return "" if score is None else repr(score)


def ledger_matrix(ledger: Ledger) -> AccuracyMatrix | None:
    """Give the accuracy matrix of a ledger's tasks; None where no score on them was taken.

    Args:
        ledger: The ledger of a chain of tasks.

    Returns:
        The matrix.
    """
    matrix = accuracy_matrix({task.name: task.metrics for task in ledger.tasks})
    known = any(score is not None for row in [matrix.start, *matrix.scores] for score in row)
    return matrix if known or any(point.scores for point in matrix.points) else None


MEANS = ("ACC", "BWT", "forgetting")


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


def _mean(mean: Mapping[str, Any]) -> str:
    if mean["value"] is None:
        return "–"
    partly = f" (over {mean['terms']} of {mean['of']})" if mean["terms"] < mean["of"] else ""
    return f"{mean['value']:.4f}{partly}"


def _cell(score: float | None) -> str:
    return "–" if score is None else f"{score:.4f}"


def matrix_table(summary: Mapping[str, Any]) -> str:
    """Write an accuracy matrix as a table, and ACC, BWT and forgetting beneath it.

    Args:
        summary: What `matrix_summary` returned.

    Returns:
        Lines without a newline at the end.
    """
    header, *rows = matrix_rows(summary)
    named = [[escaped(name), *scores] for name, *scores in rows]
    scores = table([["after ↓ on →", *map(escaped, header[1:])], *named])
    return f"{scores}\n\n{means_text(summary)}."
