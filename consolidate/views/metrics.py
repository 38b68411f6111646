"""Metrics as a flat JSON file of names and numbers, for DVC, MLflow and CI jobs."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from consolidate.results import FinetuneCached, FinetuneDone, MeasuredFisher, RunResult
from consolidate.views.matrix import ledger_matrix
from formats.atomic import write_file
from formats.fisher_folder import LEDGER_NAME
from formats.fisher_json import read_ledger


def fisher_metrics(result: MeasuredFisher) -> dict[str, float]:
    """Give the numbers of a Fisher: counts, trace, largest relative error of a layer."""
    errors = [layer["relative_error"] for layer in result["layers"].values()]
    return _finite(
        {
            "trace": result["trace"],
            "examples": result["examples"],
            "units": result["units"],
            "parameters": result["parameters"],
            "relative_error": max((e for e in errors if e is not None), default=None),
        }
    )


def finetune_metrics(result: FinetuneDone | FinetuneCached) -> dict[str, float]:
    """Give the numbers of a fine-tuning run, and of its chain."""
    numbers: dict[str, float | None] = {"ewc_lambda": result["ewc_lambda"]}
    if result["status"] != "cached":
        numbers |= {
            "steps": result["steps"],
            "loss": result["loss"],
            "penalty_value": result["penalty_value"],
            "share_moved": result["share_moved"],
            "predicted_nats": result["predicted_nats"],
        }
    numbers |= {f"{task}.measured_nats": lost for task, lost in result["measured_nats"].items()}
    return (
        _finite(numbers)
        | evaluate_metrics(result["metrics"].get("after", {}))
        | run_metrics(result)
    )


def run_metrics(result: FinetuneDone | FinetuneCached | RunResult) -> dict[str, float]:
    """Give the metrics after the last task of a chain, with ACC, BWT and forgetting.

    A name has a dot only if it begins with the name of a task or dataset.
    """
    place = Path(result["checkpoint"]) / "fisher" / LEDGER_NAME
    if not place.is_file():  # no task was measured
        return {}
    ledger = read_ledger(place)
    numbers: dict[str, Any] = evaluate_metrics(ledger.tasks[-1].metrics.get("after", {}))
    matrix = ledger_matrix(ledger)
    if matrix is not None:
        means = {"acc": matrix.acc(), "bwt": matrix.bwt(), "forgetting": matrix.forgetting()}
        numbers |= {name: mean.value for name, mean in means.items()}
        numbers |= {f"{task}.forgetting": lost for task, lost in matrix.forgotten().items()}
    return _finite(numbers)


def evaluate_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Give the metrics of each task under one name, ``TASK.METRIC``."""
    return _finite(
        {
            f"{task}.{name}": value
            for task, values in metrics.items()
            for name, value in values.items()
            if name != "benchmark"
        }
    )


def write_metrics(path: str | Path, metrics: Mapping[str, float]) -> None:
    """Write numbers as one JSON object without nesting, sorted by name."""
    text = json.dumps(metrics, ensure_ascii=False, indent=2, sort_keys=True, allow_nan=False)
    write_file(Path(path), text + "\n")


def is_metrics(text: str) -> bool:
    """Return whether a text is one JSON object of numbers, as `write_metrics` writes it."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and all(
        isinstance(value, int | float) for value in found.values()
    )


def _finite(numbers: Mapping[str, float | None]) -> dict[str, float]:
    return {k: value for k, value in numbers.items() if value is not None and math.isfinite(value)}
