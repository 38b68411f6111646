"""Outputs that are there already, whole, and made from the same: nothing is to be done."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from consolidate.chain.opening import stored_fisher
from consolidate.results import MeasuredFisher
from formats.atomic import recover
from formats.checkpoint import open_checkpoint
from formats.errors import ConsolidateError
from formats.fisher_folder import LEDGER_NAME, StoredFisher
from formats.fisher_json import Ledger, read_ledger

LOG = logging.getLogger("consolidate")


class Output(NamedTuple):
    """An output that says what it was made from."""

    checkpoint: Path
    made_from: str  # digest of all that the result depended on


def find_output(checkpoint: Path, *, merged: bool = False) -> Output | None:
    """Find what a command has left, as far as its ledger says what it was made from.

    With `merged` models were merged, and not a task learned or measured.
    """
    folder = checkpoint / "fisher"
    for target in (checkpoint, folder):
        recover(target)
    try:
        ledger = read_ledger(folder / LEDGER_NAME)
    except ConsolidateError:
        return None
    if merged:
        told = ledger.made_from
    else:
        told = None if ledger.made_from is not None else ledger.tasks[-1].made_from
    return None if told is None else Output(checkpoint, told)


def cached(output: Output | None, made_from: Callable[[], str]) -> StoredFisher | None:
    """Give the Fisher of an output that is up to date; None where it has to be made.

    Every byte is compared; `made_from` gives the digest of all that the result would depend on.
    """
    if output is None or output.made_from != made_from():
        return None
    try:
        stored = stored_fisher(output.checkpoint / "fisher", open_checkpoint(output.checkpoint))
    except ConsolidateError as error:
        LOG.info("%s was made from the same, but is not whole: %s", output.checkpoint, error)
        return None
    LOG.info("%s is up to date: nothing to do", output.checkpoint)
    return stored


def recorded_fisher(ledger: Ledger) -> MeasuredFisher:
    """Give what a ledger knows of its last task's Fisher; not how certain its traces are."""
    task = ledger.tasks[-1]
    return {
        "task": task.name,
        "weight": task.weight,
        "merge_rule": ledger.merge_rule,
        "gamma": ledger.gamma,
        "estimator": str(task.estimator),
        "examples": task.examples or 0,
        "units": task.units or 0,
        "parameters": sum(math.prod(ledger.fisher[name].shape) for name in task.layers),
        "trace": math.fsum(layer.trace for layer in task.layers.values()),
        "layers": {
            name: {"trace": layer.trace, "relative_error": None}
            for name, layer in task.layers.items()
        },
    }
