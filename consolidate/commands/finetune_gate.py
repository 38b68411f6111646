"""The gate of a fine-tuning run that was started again: what it refused is refused at once."""

from dataclasses import replace
from typing import NamedTuple

from consolidate.chain.output import failed_folder
from consolidate.chain.up_to_date import cached, find_output
from consolidate.commands.finetune_plan import Plan
from consolidate.training.forgetting import beyond, forgetting
from formats.fisher_json import Ledger


class Failed(NamedTuple):
    """An earlier output of the same command, and what was forgotten in it."""

    plan: Plan  # with the folder of the failed output as its target
    ledger: Ledger
    forgotten: dict[str, float]


def failed_before(plan: Plan) -> Failed | None:
    """Find the output of the same command, of the same inputs, that forgot too much."""
    limit, folder = plan.options.gate.max_forgetting, failed_folder(plan.target)
    if limit is None or (stored := cached(find_output(folder), plan.made_from)) is None:
        return None
    metrics = stored.ledger.tasks[-1].metrics
    if not {"before", "after"} <= metrics.keys():
        return None
    lost = forgetting(metrics["before"], metrics["after"], plan.old_tasks)
    if not (forgotten := beyond(lost, limit)):
        return None
    there = replace(plan, options=replace(plan.options, output_dir=folder))
    return Failed(there, stored.ledger, forgotten)
