"""The accuracy matrix as JSON-ready data, a table and CSV."""

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import cast

from consolidate.results import MatrixSummary, Mean
from consolidate.training.accuracy_matrix import AccuracyMatrix, accuracy_matrix
from consolidate.views.markdown import escaped, shown, table
from formats.atomic import write_file
from formats.fisher_json import Ledger, benchmarks_of

FIRST_COLUMNS = ("training", "when")


def matrix_summary(matrix: AccuracyMatrix) -> MatrixSummary:
    """Give the matrix, ACC, BWT, forgetting and the curves over steps, ready for JSON."""
    summary = {
        "tasks": matrix.tasks,
        "scores": matrix.scores,
        "start": matrix.start,
        "acc": asdict(matrix.acc()),
        "bwt": asdict(matrix.bwt()),
        "forgetting": asdict(matrix.forgetting()),
        "points": [asdict(point) for point in matrix.points],
        "benchmarks": matrix.benchmarks,
    }
    return cast(MatrixSummary, summary)


def write_matrix_csv(path: str | Path, matrix: AccuracyMatrix) -> None:
    """Write the matrix and the curves as CSV, in the order of time.

    The columns are ``training`` (a task), ``when`` and the score on each task and benchmark. Rows
    with ``after`` are R, the row with ``before`` is the start, rows with ``step N`` are the curves.
    What was not measured is empty.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    names, (start, *rows) = columns_and_rows(matrix_summary(matrix))
    table.writerow([*FIRST_COLUMNS, *names])
    table.writerow([matrix.tasks[0], "before", *start])
    for task, scores in zip(matrix.tasks, rows, strict=True):
        for point in matrix.points:
            if point.task == task and point.step:
                found = (point.scores.get(name) for name in names)
                table.writerow([task, f"step {point.step}", *found])
        table.writerow([task, "after", *scores])
    write_file(Path(path), text.getvalue())


def is_matrix_csv(text: str) -> bool:
    """Return whether a text begins as what `write_matrix_csv` writes."""
    return text.startswith(",".join(FIRST_COLUMNS))


def columns_and_rows(summary: MatrixSummary) -> tuple[list[str], list[list[float | None]]]:
    """Give the tasks and then the benchmarks, and the scores on them: at the start, after each."""
    rows = [
        [*scores, *(on[i] for on in summary["benchmarks"].values())]
        for i, scores in enumerate([summary["start"], *summary["scores"]])
    ]
    return [*summary["tasks"], *summary["benchmarks"]], rows


def chain_matrix(ledger: Ledger) -> AccuracyMatrix:
    """Give the accuracy matrix of a ledger's tasks and benchmarks."""
    metrics = {task.name: task.metrics for task in ledger.tasks}
    return accuracy_matrix(metrics, benchmarks_of(ledger))


def ledger_matrix(ledger: Ledger) -> AccuracyMatrix | None:
    """Give the accuracy matrix of a ledger's tasks; None if no score on them was measured."""
    matrix = chain_matrix(ledger)
    known = any(score is not None for row in [matrix.start, *matrix.scores] for score in row)
    known = known or bool(matrix.benchmarks)
    return matrix if known or any(point.scores for point in matrix.points) else None


def means(summary: MatrixSummary) -> dict[str, Mean]:
    """Give the means over the matrix by name."""
    return {"ACC": summary["acc"], "BWT": summary["bwt"], "forgetting": summary["forgetting"]}


def partly(mean: Mean) -> str:
    """Note a mean over only some of its terms; empty if it is over all."""
    return f" (over {mean['terms']} of {mean['of']})" if mean["terms"] < mean["of"] else ""


def matrix_rows(summary: MatrixSummary) -> list[list[str]]:
    """Give the rows of the matrix, header first; a dash where nothing was measured."""
    names, scores = columns_and_rows(summary)
    named = zip(["(start)", *summary["tasks"]], scores, strict=True)
    rows = [[name, *(shown(score, ".4f") for score in row)] for name, row in named]
    without = all(score is None for score in scores[0])
    return [["after \\ on", *names], *rows[without:]]


def means_text(summary: MatrixSummary) -> str:
    """Give ACC, BWT and forgetting on one line, and note means over only some terms."""
    found = {
        title: "–" if mean["value"] is None else f"{mean['value']:.4f}{partly(mean)}"
        for title, mean in means(summary).items()
    }
    return ", ".join(f"{title} {text}" for title, text in found.items())


def matrix_table(summary: MatrixSummary) -> str:
    """Format an accuracy matrix as a Markdown table, with ACC, BWT and forgetting below."""
    header, *rows = matrix_rows(summary)
    named = [[escaped(name), *scores] for name, *scores in rows]
    scores = table([["after ↓ on →", *map(escaped, header[1:])], *named])
    return f"{scores}\n\n{means_text(summary)}."
