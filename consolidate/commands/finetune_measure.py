"""The Fisher of the last task, measured before the next one is trained where it has none."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed import ProcessGroup

from consolidate.chain.tasks import pending_task, settled_merging
from consolidate.commands.fisher import Plan as FisherPlan
from consolidate.commands.fisher import measure
from consolidate.commands.run_options import fisher_options
from consolidate.options import Merging
from consolidate.runtime.distributed import all_processes, is_first, summed
from formats.digest import json_digest
from formats.errors import ConsolidateError
from formats.fisher_folder import StoredFisher, check_intact, read_fisher
from formats.task_file import open_task

if TYPE_CHECKING:
    from consolidate.commands.finetune_plan import Plan

LOG = logging.getLogger("consolidate")


def with_last_task(plan: "Plan", cut: ProcessGroup | None) -> "Plan":
    """Measure the last task if --measure names it, else report one that has no Fisher.

    The Fisher is kept beside the output until that is written, so that it is measured once however
    often the run is interrupted. It is measured as the training that left it out would have.
    """
    task, options = pending_task(plan.opened.before), plan.options
    if task is None:
        return plan
    if not options.measuring.measure:
        LOG.info(
            "%s was not measured, and nothing protects it now: --measure %s=DATA measures it first",
            task.name,
            task.name,
        )
        return plan
    opened, before, folder = plan.opened, plan.opened.before, measured_folder(plan.target)
    ((name, data),) = options.measuring.measure.items()
    task_file, rows = open_task(data)
    asked = replace(
        fisher_options(options),
        data=data,
        task=name,
        output_dir=None,
        add=False,
        dtype="float32",  # like the master weights of a training
        merging=Merging(),
        saving=replace(options.saving, overwrite=True),
    )
    fisher_plan = FisherPlan(
        source=opened.source,
        before=before,
        task_file=task_file,
        rows=rows,
        merging=settled_merging(before, Merging()),
        options=asked,
        folder=opened.source.path,
        there=None,
        completes=True,
        alone=folder,
    )
    if options.saving.restart:
        discard_measured(plan.target)
    if not _is_there(fisher_plan):
        measure(fisher_plan, cut)
    return replace(plan, measured=read_fisher(folder))


def measured_folder(target: Path) -> Path:
    """Name the folder beside an output for the Fisher that is measured before training."""
    place = target if target.name not in ("", "..") else target.resolve()
    return place.with_name(f".{place.name}.measured")


def discard_measured(target: Path) -> None:
    """Remove the Fisher that was measured before training, once nothing resumes from it."""
    group = all_processes()
    if is_first(group):
        shutil.rmtree(measured_folder(target), ignore_errors=True)
    summed(group, 0)  # no process looks for it before it is gone


def _is_there(plan: FisherPlan) -> bool:
    """Return whether this Fisher was measured before an interruption."""
    assert plan.alone is not None
    try:
        stored: StoredFisher = read_fisher(plan.alone)
        if stored.ledger.tasks[-1].made_from != json_digest(plan.description(plan.earlier)):
            return False
        check_intact(stored)
    except ConsolidateError:
        return False
    LOG.info("%s was measured before the interruption", plan.task)
    return True
