"""Checkpoints to report on: a Fisher folder whose ledger is as a test wants it, and no weights."""

from pathlib import Path
from typing import Any

import torch

from formats.checkpoint import weight_records
from formats.fisher_folder import write_fisher
from formats.fisher_json import CurvePoint, Interpolation, LayerRecord, Ledger, TaskRecord

HOSTILE = '<script>alert(\'"1&")</script>\x1b[31m\u202e<img src=http://example.invalid/x>'


def task(name: str, **fields: Any) -> TaskRecord:
    given: dict[str, Any] = {
        "objective": "classification",
        "likelihood": "softmax",
        "labels": None,
        "unit": "example",
        "examples": 10,
        "units": 10,
        "estimator": "exact",
        "mc_samples": None,
        "seed": 0,
        "data": f"{name}.jsonl",
    }
    return TaskRecord(name, **{**given, **fields})


def layers(names: list[str], trace: float, overlap: float | None = None) -> dict[str, LayerRecord]:
    return {name: LayerRecord(trace * (i + 1), overlap) for i, name in enumerate(names)}


def on(**scores: float) -> dict[str, dict[str, float]]:
    return {name: {"accuracy": value} for name, value in scores.items()}


def write(
    folder: Path, tasks: list[TaskRecord], names: list[str], values: float = 1.0, **fields: Any
) -> Path:
    """Write FOLDER/fisher: Λ of the parameter i is (2, 3) values of `values` × (i + 1)."""
    tensors = {name: torch.full((2, 3), values * (i + 1)) for i, name in enumerate(names)}
    weights = {**tensors, **{name: torch.zeros(1) for name in fields.get("unprotected", {})}}
    folder.mkdir(parents=True)
    ledger = Ledger(tasks, weights=weight_records(weights), **fields)
    write_fisher(folder / "fisher", tensors, ledger)
    return folder


def chain(folder: Path) -> Path:
    """Three tasks, two of them with scores."""
    names = ["0.weight", "0.bias", "2.weight"]
    return write(
        folder,
        [
            task("a", layers=layers(names, 0.5)),
            task(
                "b",
                layers=layers(names, 5.0, 0.25),
                metrics={
                    "before": on(a=0.9, b=0.1),
                    "epoch 1": on(a=0.8, b=0.6),
                    "epoch 2": on(a=0.7, b=0.8),
                    "after": on(a=0.7, b=0.8),
                },
                penalty="ewc",
                ewc_lambda=10.0,
                weight=2.0,
            ),
            task(
                "c",
                layers=layers(names, 0.0, 0.75),
                metrics={"after": on(a=0.6, c=0.95)},
                penalty="none",
                interpolation=Interpolation(
                    0.5,
                    "plain",
                    [
                        CurvePoint(0.0, {"b": 0.75, "c": 0.25}),
                        CurvePoint(0.5, {"b": 0.7, "c": 0.875}),
                        CurvePoint(1.0, {"b": 0.5, "c": 0.9}),
                    ],
                ),
            ),
        ],
        names,
        unprotected={"1.running_mean": "no gradient"},
        versions={"consolidate": "0.1.0"},
    )


def hostile(folder: Path) -> Path:
    """Everything that a ledger may hold as free text is a script with control characters."""
    own = task(
        "a",
        objective=HOSTILE,
        likelihood=HOSTILE,
        labels=[HOSTILE, "javascript:alert(1)"],
        penalty=HOSTILE,
        ewc_lambda=1e308,
        data=HOSTILE.replace("/", "|"),
        layers=layers([HOSTILE], 1e308, 1.0),
        weight=1e308,
        metrics={
            "before": {HOSTILE: {"accuracy": -1e307, HOSTILE: 1.0}},
            "after": {HOSTILE: {"loss": 1e307}, "a": {"accuracy": 1.0}},
        },
    )
    return write(
        folder, [own], [HOSTILE], versions={HOSTILE: HOSTILE}, unprotected={HOSTILE + "2": HOSTILE}
    )


def _trial(ewc_lambda: float, a: float, b: float, **fields: Any) -> dict[str, Any]:
    metrics = {"a": {"score": a}, "b": {"score": b}}
    return {
        "ewc_lambda": ewc_lambda,
        "steps": 20,
        "metrics": metrics,
        "forgetting": 0.9 - a,
        "penalty_per_lambda": 1 / ewc_lambda,
        "divergence": None,
        "mean": (a + b) / 2,
        "chosen": False,
        **fields,
    }


SEARCH: dict[str, Any] = {
    "lambda_search": {
        "ewc_lambda": 10.0,
        "new_task": "b",
        "old_tasks": ["a"],
        "trials": [_trial(1.0, 0.5, 0.85), _trial(10.0, 0.7, 0.8, chosen=True)],
    }
}
"""What a report reads of the result of the search that `chain` learned its task b with."""
