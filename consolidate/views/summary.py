"""The text of what `show` reports, plain and in Markdown."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import cast

from consolidate.chain.consistency import side_by_side_text
from consolidate.data.chats import loss_text
from consolidate.results import Generated, MatrixSummary, Overlap, ShownFactors, ShowResult, Task
from consolidate.views.markdown import aligned, benchmarks_text, escaped, shown
from consolidate.views.matrix import matrix_rows, matrix_table, means_text
from formats.fisher_json import UNKNOWN, TaskRecord
from formats.wording import few, printable

_WIDTH = 72


def show_text(summary: ShowResult) -> str:
    """Format what `show` returns as plain text, control characters in names escaped."""
    fisher = summary["fisher"]
    rule = f"{summary['merge_rule']}, γ = {summary['gamma']:g}"
    if summary["penalty_offset"]:
        rule += f", penalty offset {summary['penalty_offset']:.6g}"
    lines = [
        _plain(summary["checkpoint"]),
        f"Fisher: {fisher['values']:,} values in {fisher['tensors']} tensors of {fisher['dtype']}",
        f"trace: {fisher['trace']:.6g}",
        f"merged: {rule}; anchor: {summary['anchor']}",
        *factors_text(summary["factors"]),
        _weights_text(summary),
        *_heads(summary),
        "",
        *_tasks(summary["tasks"]),
        "",
        *_parameters(summary),
    ]
    if metrics := _metrics(summary["tasks"]):
        lines += ["", *_table([["after training", "when", "on task", "metrics"], *metrics])]
    if summary["accuracy_matrix"] is not None:
        lines += ["", matrix_text(summary["accuracy_matrix"])]
        last = {n: b for task in summary["tasks"] for n, b in (task["benchmarks"] or {}).items()}
        lines += map(printable, benchmarks_text(last))
        if note := side_by_side_text(summary["side_by_side"]):
            lines.append(note)
    if summary["overlap"] is not None:
        lines += ["", *_overlap(summary["overlap"])]
        if summary["factors"] is not None:
            lines.append("the overlap is that of the diagonals; factors are not compared")
    if summary["unprotected"]:
        lines += ["", "not protected:"]
        for reason, names in by_reason(summary["unprotected"]).items():
            lines.append(f"  {_plain(reason)}: {few([*map(_plain, names)], 4)}")
    return "\n".join(lines)


def matrix_text(matrix: MatrixSummary) -> str:
    """Format an accuracy matrix as plain text, with ACC, BWT and forgetting below."""
    return "\n".join([*_table(matrix_rows(matrix), right_from=1), means_text(matrix)])


def by_reason(unprotected: Mapping[str, str]) -> dict[str, list[str]]:
    """Group the parameters that are not protected by reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in unprotected.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


def _tasks(tasks: list[Task]) -> list[str]:
    header = ["task", "objective", "units", "estimator", "seed", "weight"]
    rows = [
        [
            task["name"],
            task["objective"],
            _units(task),
            estimator_text(task),
            str(task["seed"]),
            f"{task['weight']:g}",
            learned_text(task),
            (task["parent"] or "–")[:12],
            task["data"],
        ]
        for task in tasks
    ]
    return _table([[*header, "learned with", "trained from", "data"], *rows])


def _units(task: Task) -> str:
    if task["units"] is None:
        return "–"
    return f"{task['units']:,} {task['unit']}s{encoding_text(task)}"


def factors_text(factors: ShownFactors | None) -> list[str]:
    """Give the number, size and share of the matrices beside the diagonal, on at most one line."""
    if factors is None:
        return []
    count = f"{factors['tensors']} {'matrix' if factors['tensors'] == 1 else 'matrices'}"
    offset = f", offset {factors['offset']:.6g}" if factors["offset"] else ""
    text = (
        f"factors: {count} of {factors['dtype']}, {size_text(factors['bytes'])}, for "
        f"{factors['values']:,} of the values, {factors['share']:.1%} of the trace; anchor: "
        f"{factors['anchor']}{offset}"
    )
    return [text]


def protected_by(factors: ShownFactors | None) -> dict[str, str]:
    """Describe the matrix that stands for a parameter, by the parameter's name."""
    matrices = [] if factors is None else factors["matrices"]
    return {
        name: f"{matrix['matrix']} {matrix['size']}×{matrix['size']}, {size_text(matrix['bytes'])}"
        for matrix in matrices
        for name in matrix["parameters"]
    }


def size_text(count: int) -> str:
    """Write a number of bytes."""
    return f"{count:,} bytes" if count < 100_000 else f"{count / 1e6:,.1f} MB"


def _parameters(summary: ShowResult) -> list[str]:
    by = protected_by(summary["factors"])
    rows = [
        [
            parameter["name"],
            "×".join(map(str, parameter["shape"])),
            f"{parameter['trace']:.4g}",
            f"{parameter['mean']:.4g}",
            shown(parameter["max"], ".4g"),
            f"{parameter['share']:.1%}",
            *([by.get(parameter["name"], "diagonal")] if by else []),
        ]
        for parameter in summary["parameters"]
    ]
    header = ["parameter", "shape", "trace", "mean", "largest", "share"]
    header += ["protected by"] if by else []
    left_out = summary["parameters_left_out"]
    more = [f"and {left_out} more"] if left_out else []
    return [*_table([header, *rows], right_from=2), *more]


def _overlap(overlap: Overlap) -> list[str]:
    rows = [[layer["name"], f"{layer['overlap']:.3f}"] for layer in overlap["layers"]]
    header = ["layer", f"overlap with the Fisher of {_plain(overlap['with'])}"]
    lines = _table([header, *rows], right_from=1)
    if left := overlap["left_out"]:
        lines.append(f"in only one of the two: {few([*map(_plain, left)], 4)}")
    return lines


def _weights_text(summary: ShowResult) -> str:
    """Give the digest of the weights, and of the base model of an adapter."""
    text = f"weights: {summary['weights']['digest'][:12]}…"
    if summary["base"] is None:
        return text
    return f"{text}, an adapter of the base model {summary['base'][:12]}…"


def _heads(summary: ShowResult) -> list[str]:
    """List the tasks with a saved head, if any."""
    if not summary["heads"]:
        return []
    own = ", ".join(summary["heads"])
    rest = [task["name"] for task in summary["tasks"] if task["name"] not in summary["heads"]]
    return [f"saved heads: {own}; head in the weights: {', '.join(rest) or 'none'}"]


def shown_task(record: TaskRecord) -> Task:
    """Give a task of the ledger as `show` reports it, without its layers."""
    task = asdict(replace(record, layers={}, description=None))
    del task["layers"], task["description"]
    return cast(Task, task)


def estimator_text(task: Task) -> str:
    """Name the estimator of a task's Fisher, with its number of samples if it draws any."""
    estimator, samples = task["estimator"], task["mc_samples"]
    sampled = estimator in ("mc", "batched") and samples is not None
    return f"{estimator} × {samples}" if sampled else estimator or "not measured"


def encoding_text(task: Task) -> str:
    """Say how rows or texts became examples, to follow their number; nothing where by default."""
    if task["generated"] is not None:
        return f", {_generated_text(task['generated'])}"
    loss = "" if task["loss_on"] is None else f", {loss_text(task['loss_on'])}"
    return loss + ("" if task["max_length"] is None else f", max length {task['max_length']:,}")


def _generated_text(generated: Generated) -> str:
    """Say how a model generated texts; the sampling where it is not that of its distribution."""
    how = [f"{generated['sequences']:,} generated texts, max length {generated['max_length']:,}"]
    how += ["with prompts"] * (generated["prompts"] is not None)
    how += [f"temperature {generated['temperature']:g}"] * (generated["temperature"] != 1)
    how += [f"top-p {generated['top_p']:g}"] * (generated["top_p"] != 1)
    return ", ".join(how)


def learned_text(task: Task) -> str:
    """Name the penalty that a task was trained with, its budget, and what was replayed."""
    penalty, budget, replayed = task["penalty"], task["budget"], task["replayed"]
    if penalty is None:
        return "–"
    if penalty == UNKNOWN:
        text = "trained elsewhere"
    elif task["ewc_lambda"] is None:
        text = "no penalty"
    else:
        place = {None: "", "adapter": " on the adapter", "merged": " on merged weights"}
        text = f"{penalty}{place[task['penalty_on']]}, λ = {task['ewc_lambda']:g}"
    if budget is not None:
        text += f" at the end, for a budget of {budget['nats']:g} nats"
    if replayed is not None:
        text += f", {100 * replayed['share']:g}% replay of {replayed['data']}"
    return text


def _metrics(tasks: list[Task]) -> list[list[str]]:
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


def _table(rows: list[list[str]], *, right_from: int | None = None) -> list[str]:
    return aligned([[_plain(cell) for cell in row] for row in rows], right_from=right_from)


def _plain(text: str) -> str:
    """Escape what is not printable, and truncate what is very long."""
    text = printable(text)
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"


def show_markdown(summary: ShowResult) -> str:
    """Format what `show` returns for the summary of a CI job: the matrix under a heading."""
    tasks = ", ".join(escaped(task["name"]) for task in summary["tasks"])
    matrix = summary["accuracy_matrix"]
    scores = "No scores on its tasks were measured." if matrix is None else matrix_table(matrix)
    merged = side_by_side_text(summary["side_by_side"])
    return (
        f"### {escaped(summary['checkpoint'])}\n\nTasks: {tasks}.\n\n{scores} {merged}"
    ).rstrip()
