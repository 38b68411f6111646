"""A Fisher of what a language model generates itself, measured at the start of fine-tuning."""

import logging
from dataclasses import replace

from torch.distributed import ProcessGroup

from consolidate.chain.output import measured_folder
from consolidate.commands.finetune_plan import Plan, plan_finetune
from consolidate.commands.fisher import measure_self
from consolidate.commands.run_options import fisher_options
from consolidate.options import (
    Encoding,
    Estimation,
    FinetuneOptions,
    Gate,
    Generation,
    Interpolating,
    Merging,
    Search,
)
from formats.errors import InputError, UsageError
from formats.wording import few

LOG = logging.getLogger("consolidate")


def with_own_fisher(options: FinetuneOptions, cut: ProcessGroup | None) -> FinetuneOptions:
    """Measure the Fisher that --protect-self asks for, and name it with --fisher instead.

    It is kept beside the output until that is written, so that it is measured once however often
    the run is interrupted, and the rest is the run of the two commands.
    """
    count = options.penalty.protect_self
    if count is None:
        return options
    plan = _checked(options)
    folder = measured_folder(plan.target)
    like_fisher = fisher_options(options)
    asked = replace(
        like_fisher,
        data=None,
        task=None,
        output_dir=None,
        generation=Generation(generate=count),
        encoding=Encoding(),
        estimation=Estimation(batch_size=like_fisher.estimation.batch_size),
        merging=Merging(),
        saving=replace(options.saving, overwrite=True),
    )
    measure_self(asked, plan.opened.source, folder, cut)
    penalty = replace(options.penalty, protect_self=None, fisher=folder)
    return replace(options, penalty=penalty)


def _checked(options: FinetuneOptions) -> Plan:
    """Refuse what is known to be wrong before the measurement; the rest needs its ledger."""
    plan = plan_finetune(
        replace(
            options,
            penalty=replace(options.penalty, penalty="l2"),  # which needs no Fisher
            search=Search(1.0),
            interpolating=Interpolating(),
            gate=Gate(),
        )
    )
    opened = plan.opened
    if opened.before is not None:
        tasks = few([task.name for task in opened.before.ledger.tasks], 5)
        raise InputError(
            f"{opened.source.path} has a Fisher, of {tasks}, which the penalty uses: leave "
            "--protect-self out"
        )
    if opened.source.adapter is not None:
        raise UsageError(
            f"{opened.source.path} is an adapter, and --protect-self is for whole models: measure "
            "it first with `consolidate fisher --generate`"
        )
    return plan
