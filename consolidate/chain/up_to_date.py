"""Outputs that are up to date: intact, and made from the same inputs."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from consolidate.chain.opening import with_fisher
from consolidate.results import FactorTotals, MeasuredFisher
from formats.atomic import recover
from formats.errors import ConsolidateError
from formats.fisher_folder import LEDGER_NAME, StoredFisher
from formats.fisher_json import Ledger, read_ledger

LOG = logging.getLogger("consolidate")


class Output(NamedTuple):
    """An output with a record of what it was made from."""

    checkpoint: Path
    made_from: str  # digest of everything that the result depends on


def find_output(checkpoint: Path, *, merged: bool = False) -> Output | None:
    """Find a command's output whose ledger records what it was made from.

    `merged`: the command merged models, and did not learn or measure a task.
    """
    folder = checkpoint / "fisher"
    for target in (checkpoint, folder):
        recover(target)
    try:
        ledger = read_ledger(folder / LEDGER_NAME)
    except ConsolidateError:
        return None
    if merged:
        digest = ledger.made_from
    else:
        digest = None if ledger.made_from is not None else ledger.tasks[-1].made_from
    return None if digest is None else Output(checkpoint, digest)


def cached(output: Output | None, made_from: Callable[[], str]) -> StoredFisher | None:
    """Give the Fisher of an output that is up to date; None where it has to be made.

    Every byte is compared; `made_from` gives the digest of everything the result would depend on.
    """
    if output is None or output.made_from != made_from():
        return None
    try:
        stored = with_fisher(output.checkpoint)[1]
    except ConsolidateError as error:
        LOG.info(
            "%s has the same inputs but is damaged, and is not reused: %s", output.checkpoint, error
        )
        return None
    LOG.info("%s is up to date: nothing to do", output.checkpoint)
    return stored


def factor_totals(ledger: Ledger) -> FactorTotals | None:
    """Count the matrices that a ledger records."""
    if ledger.factors is None:
        return None
    return {
        "layers": len(ledger.factors),
        "bytes": sum(record.nbytes for record in ledger.factors.values()),
    }


def recorded_fisher(ledger: Ledger) -> MeasuredFisher | None:
    """Give what a ledger records of its last task's Fisher, which excludes its standard errors.

    None where the task was not measured.
    """
    task = ledger.tasks[-1]
    if not task.measured:
        return None
    return {
        "task": task.name,
        "weight": task.weight,
        "merge_rule": ledger.merge_rule,
        "gamma": ledger.gamma,
        "estimator": str(task.estimator),
        "examples": task.examples or 0,
        "units": task.units or 0,
        "parameters": sum(ledger.fisher[name].count for name in task.layers),
        "trace": math.fsum(layer.trace for layer in task.layers.values()),
        "structure": "diagonal" if ledger.factors is None else "inputs",
        "factors": factor_totals(ledger),
        "layers": {
            name: {"trace": layer.trace, "relative_error": None}
            for name, layer in task.layers.items()
        },
    }
