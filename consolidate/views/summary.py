"""The text of what `show` reports, plain and in Markdown."""

from collections.abc import Mapping
from typing import Any

from consolidate.chain.consistency import side_by_side_text
from consolidate.views.markdown import escaped
from consolidate.views.matrix import matrix_rows, matrix_table, means_text

_WIDTH = 72


def show_text(summary: Mapping[str, Any]) -> str:
    """Lay out what `show` returns as plain text, control characters in names escaped.

    Args:
        summary: What `show` returned.

    Returns:
        Lines of text without a newline at the end.
    """
    fisher = summary["fisher"]
    rule = f"{summary['merge_rule']}, γ = {summary['gamma']:g}"
    if summary["penalty_offset"]:
        rule += f", penalty offset {summary['penalty_offset']:.6g}"
    lines = [
        _plain(summary["checkpoint"]),
        f"Fisher: {fisher['values']:,} values in {fisher['tensors']} tensors of {fisher['dtype']}",
        f"trace: {fisher['trace']:.6g}",
        f"merged: {rule}; anchor: {summary['anchor']}",
        _weights_text(summary),
        *_heads(summary),
        "",
        *_table(
            [
                *("task", "objective", "units", "estimator", "seed", "weight"),
                *("learned with", "trained from", "data"),
            ],
            [
                [
                    task["name"],
                    task["objective"],
                    f"{task['units'] or 0:,} {task['unit']}s",
                    estimator_text(task),
                    str(task["seed"]),
                    f"{task['weight']:g}",
                    penalty_text(task),
                    (task["parent"] or "–")[:12],
                    task["data"],
                ]
                for task in summary["tasks"]
            ],
        ),
        "",
        *_table(
            ["parameter", "shape", "trace", "mean", "largest", "share"],
            [
                [
                    parameter["name"],
                    "×".join(map(str, parameter["shape"])),
                    f"{parameter['trace']:.4g}",
                    f"{parameter['mean']:.4g}",
                    "–" if parameter["max"] is None else f"{parameter['max']:.4g}",
                    f"{parameter['share']:.1%}",
                ]
                for parameter in summary["parameters"]
            ],
            right_from=2,
        ),
    ]
    if summary["parameters_left_out"]:
        lines.append(f"and {summary['parameters_left_out']} more")
    if metrics := _metrics(summary["tasks"]):
        lines += ["", *_table(["after training", "when", "on task", "metrics"], metrics)]
    if summary["accuracy_matrix"] is not None:
        lines += ["", matrix_text(summary["accuracy_matrix"])]
        if note := side_by_side_text(summary["side_by_side"]):
            lines.append(note)
    if summary["overlap"] is not None:
        lines += ["", *_overlap_lines(summary["overlap"])]
    if summary["unprotected"]:
        reasons: dict[str, list[str]] = {}
        for name, reason in summary["unprotected"].items():
            reasons.setdefault(reason, []).append(name)
        lines += ["", "not protected:"]
        for reason, names in reasons.items():
            few = ", ".join(_plain(name) for name in names[:4])
            rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
            lines.append(f"  {_plain(reason)}: {few}{rest}")
    return "\n".join(lines)


def _overlap_lines(overlap: Mapping[str, Any]) -> list[str]:
    rows = [[layer["name"], f"{layer['overlap']:.3f}"] for layer in overlap["layers"]]
    header = ["layer", f"overlap with the Fisher of {_plain(overlap['with'])}"]
    lines = _table(header, rows, right_from=1)
    if left := overlap["left_out"]:
        few = ", ".join(_plain(name) for name in left[:4])
        rest = f" and {len(left) - 4} more" if len(left) > 4 else ""
        lines.append(f"in one of them only: {few}{rest}")
    return lines


def matrix_text(summary: Mapping[str, Any]) -> str:
    """Lay out an accuracy matrix as plain text, with ACC, BWT and forgetting under it.

    Args:
        summary: What `matrix_summary` returned.

    Returns:
        Lines of text without a newline at the end.
    """
    header, *rows = matrix_rows(summary)
    return "\n".join([*_table(header, rows, right_from=1), means_text(summary)])


def _weights_text(summary: Mapping[str, Any]) -> str:
    """Say which weights the Fisher is of, and whether they are an adapter's."""
    text = f"of the weights {summary['weights']['digest'][:12]}…"
    if summary["base"] is None:
        return text
    return f"{text}, an adapter's, on the base model {summary['base'][:12]}…"


def _heads(summary: Mapping[str, Any]) -> list[str]:
    """Say which tasks have an output layer of their own, where any has."""
    if not summary["heads"]:
        return []
    own = ", ".join(summary["heads"])
    rest = [task["name"] for task in summary["tasks"] if task["name"] not in summary["heads"]]
    return [f"heads of their own: {own}; in the weights: {', '.join(rest) or 'of no task'}"]


def estimator_text(task: Mapping[str, Any]) -> str:
    """Say with what a task's Fisher was measured.

    Args:
        task: A task of `show`.

    Returns:
        The estimator, and the samples per example where it draws any.
    """
    samples = task["mc_samples"]
    sampled = task["estimator"] in ("mc", "batched") and samples is not None
    return f"{task['estimator']} × {samples}" if sampled else task["estimator"] or "not measured"


def penalty_text(task: Mapping[str, Any]) -> str:
    """Say what a task was learned with.

    Args:
        task: A task of `show`.

    Returns:
        The penalty and λ; a dash where the task was only measured.
    """
    if task["penalty"] is None:
        return "–"
    strength = task["ewc_lambda"]
    if strength is None:
        return "no penalty"
    held = {None: "", "adapter": " on the adapter", "merged": " on merged weights"}
    return f"{task['penalty']}{held[task['penalty_on']]}, λ = {strength:g}"


def _metrics(tasks: list[dict[str, Any]]) -> list[list[str]]:
    """List what was measured before and after each task; the epochs between are in the JSON."""
    return [
        [
            task["name"],
            when,
            evaluated,
            ", ".join(f"{k} {value:.4g}" for k, value in values.items() if k != "score"),
        ]
        for task in tasks
        for when, measured in task["metrics"].items()
        if when in ("before", "after")
        for evaluated, values in measured.items()
    ]


def _table(header: list[str], rows: list[list[str]], *, right_from: int | None = None) -> list[str]:
    """Align columns; those from `right_from` on are numbers and stand to the right."""
    cells = [[_plain(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return [
        "  ".join(
            cell.rjust(width)
            if right_from is not None and column >= right_from
            else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _plain(text: str) -> str:
    """Escape what is not printable, as it could steer a terminal, and cut what is very long."""
    escaped = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
    return escaped if len(escaped) <= _WIDTH else escaped[: _WIDTH - 1] + "…"


def show_markdown(summary: Mapping[str, Any]) -> str:
    """Write what `show` returns for the summary of a CI job: the matrix under a heading.

    Args:
        summary: What `show` returned.

    Returns:
        Lines without a newline at the end.
    """
    tasks = ", ".join(escaped(task["name"]) for task in summary["tasks"])
    matrix = summary["accuracy_matrix"]
    scores = "No scores on its tasks are known." if matrix is None else matrix_table(matrix)
    merged = side_by_side_text(summary["side_by_side"])
    return (
        f"### {escaped(summary['checkpoint'])}\n\nIt has learned {tasks}.\n\n{scores} {merged}"
    ).rstrip()
