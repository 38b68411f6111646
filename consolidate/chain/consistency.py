"""Consistency of ledgers: tasks, traces of Λ, and which checkpoint descends from which."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from formats.digest import set_digest
from formats.fisher_json import Ledger, TaskRecord, copies
from formats.renaming import renaming

_ROUNDING = {"F32": 2.0**-20, "BF16": 2.0**-8}  # of a merge, relative, with room to spare
_TINY = 1e-30
_OF_A_MEASUREMENT = (
    *("examples", "units", "estimator", "mc_samples", "seed", "weight", "weight_by"),
    *("loss_on", "max_length", "data", "data_digest", "generated", "made_from", "description"),
    "layers",
)


def contradictions(ledger: Ledger, traces: Mapping[str, float]) -> list[str]:
    """List where a ledger contradicts itself or the Fisher beside it.

    Λ = Σ_t c_t w_t F_t with 0 ≤ c_t ≤ 1 and c_T = 1, so w_T tr F_T ≤ tr Λ ≤ Σ_t w_t tr F_t. With
    `online` and γ = 1 also c_{T−1} = 1, unless the head is new since then; for two tasks that is an
    equality. F = 0 for a task that was not measured.
    """
    lines = [line for task in ledger.tasks for line in _of_task(task)]
    last = ledger.tasks[-1]
    lines += [
        f"the task {last.name!r} has a trace for {name!r}, which has no Fisher"
        for name in last.layers
        if name not in ledger.fisher
    ]
    lines += [
        f"{name!r} is listed as the same tensor as {first!r}, but their weights differ"
        for name, first in copies(ledger).items()
        if ledger.weights[name] != ledger.weights[first]
    ]
    fresh = {name for head in ledger.heads.values() for name in head}
    all_known = all(task.layers or not task.measured for task in ledger.tasks)
    for name, trace in traces.items():
        parts = [
            task.weight * task.layers[name].trace if name in task.layers else 0.0
            for task in ledger.tasks
        ]
        whole = 2 if (ledger.merge_rule, ledger.gamma) == ("online", 1.0) else 1
        least = math.fsum(parts[-1:] if name in fresh else parts[-whole:])
        most = math.fsum(parts) if all_known else math.inf
        # An earlier task may have been stored in bfloat16 and continued in float32.
        dtype = ledger.fisher[name].dtype if len(parts) == 1 else "BF16"
        slack = len(parts) * _ROUNDING[dtype] * max(trace, least) + _TINY
        if not least - slack <= trace <= most + slack:
            expected = f"{least:.6g}" if least == most else f"{least:.6g} to {most:.6g}"
            lines.append(
                f"the Fisher of {name!r}: expected a trace of {expected} from the traces of its "
                f"tasks, found {trace:.6g}"
            )
    return lines


def descent(earlier: Ledger, later: Ledger) -> tuple[str, list[str]]:
    """Say by what one checkpoint descends from another, and list what contradicts it."""
    for i, task in enumerate(earlier.tasks):
        if i >= len(later.tasks):
            return "tasks", [f"the task {task.name!r} is missing"]
        known = (task, _measured_later(task, later.tasks[i]))
        if later.tasks[i] not in known and not _same_but_names(task, later.tasks[i]):
            other = later.tasks[i].name
            if other == task.name:
                return "tasks", [f"the record of the task {task.name!r} differs"]
            return "tasks", [f"task {i + 1}: expected {task.name!r}, found {other!r}"]
    before, after = set_digest(earlier.weights), set_digest(later.weights)
    for task in later.tasks[len(earlier.tasks) :]:
        if task.parent is not None:
            found = f"the task {task.name!r} was trained from the weights {task.parent[:12]}…"
            return "weights", [] if task.parent == before else [f"{found}, not from {before[:12]}…"]
        if task.penalty is not None:
            return "tasks", []  # by a program that does not write the parent
    if after != before and not renaming(earlier, later.weights).is_pure:
        return "weights", ["the weights differ, although no task was trained"]
    return "weights", []


def _measured_later(task: TaskRecord, measured: TaskRecord) -> TaskRecord:
    """Give a task that was not measured with what its measurement records."""
    if task.measured:
        return task
    return replace(task, **{name: getattr(measured, name) for name in _OF_A_MEASUREMENT})


def side_by_side(ledger: Ledger) -> list[list[str]]:
    """Find the tasks that were trained from the same weights, not one after the other."""
    groups: dict[str, list[str]] = {}
    for task in ledger.tasks:
        if task.parent is not None:
            groups.setdefault(task.parent, []).append(task.name)
    return [names for names in groups.values() if len(names) > 1]


def _same_but_names(task: TaskRecord, other: TaskRecord) -> bool:
    """Whether two records differ at most in the names of tensors, as after `consolidate remap`."""
    if task.layers.keys() == other.layers.keys():
        return False
    layers = [
        # In any order, which a reader must not depend on.
        sorted((layer.trace, -1.0 if layer.overlap is None else layer.overlap) for layer in each)
        for each in (task.layers.values(), other.layers.values())
    ]
    return layers[0] == layers[1] and replace(task, layers={}) == replace(other, layers={})


def _of_task(task: TaskRecord) -> list[str]:
    sampled = task.estimator in ("mc", "batched")
    checks = {
        f"has {task.units} units in {task.examples} examples, although its unit is the example": (
            task.unit != "example" or task.units == task.examples
        ),
        f"gives mc_samples with the estimator {task.estimator}": sampled or task.mc_samples is None,
        f"gives no mc_samples with the estimator {task.estimator}": (
            not sampled or task.mc_samples is not None
        ),
        "gives ewc_lambda, but was trained without a penalty": (
            task.penalty not in (None, "none") or task.ewc_lambda is None
        ),
        f"gives no ewc_lambda with the penalty {task.penalty}": (
            task.penalty not in ("ewc", "l2") or task.ewc_lambda is not None
        ),
        f"gives penalty_on {task.penalty_on}, but was trained without a penalty": (
            task.penalty_on is None or task.penalty in ("ewc", "l2")
        ),
        "gives a parent, but was only measured": task.penalty is not None or task.parent is None,
    }
    return [f"the task {task.name!r} {what}" for what, holds in checks.items() if not holds]


def side_by_side_text(groups: Sequence[Sequence[str]]) -> str:
    """Explain the rows of such tasks in an accuracy matrix."""
    if not groups:
        return ""
    named = "; ".join(", ".join(names) for names in groups)
    return (
        f"Trained in parallel from the same weights, then merged: {named}. Their rows are of the "
        "checkpoints before the merge; `consolidate evaluate` measures the merged one."
    )
