"""The gate of a fine-tuning run that was started again: what it refused is refused at once."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from consolidate.chain.output import failed_folder
from consolidate.chain.up_to_date import cached, find_output
from consolidate.commands.finetune_plan import Plan
from consolidate.training.forgetting import Scores, beyond, forgetting
from formats.fisher_json import Ledger


class Failed(NamedTuple):
    """An earlier output of the same command, and what was forgotten in it."""

    plan: Plan  # with the folder of the failed output as its target
    ledger: Ledger
    forgotten: dict[str, float]


def forgotten_in(plan: Plan, metrics: Mapping[str, Scores]) -> dict[str, float]:
    """Give the old tasks that lost more than allowed, and how much."""
    limit = plan.options.gate.max_forgetting
    if limit is None or not {"before", "after"} <= metrics.keys():
        return {}
    return beyond(forgetting(metrics["before"], metrics["after"], plan.old_tasks), limit)


def failed_before(plan: Plan) -> Failed | None:
    """Find the output of the same command, of the same inputs, that forgot too much."""
    if plan.options.gate.max_forgetting is None:  # else every byte would be read
        return None
    folder = failed_folder(plan.target)
    stored = cached(find_output(folder), plan.made_from)
    if stored is None or not (forgotten := forgotten_in(plan, stored.ledger.tasks[-1].metrics)):
        return None
    there = replace(plan, options=replace(plan.options, output_dir=folder))
    return Failed(there, stored.ledger, forgotten)
