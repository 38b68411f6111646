"""What `finetune --protect-self` measures before it trains, as options of `fisher`."""

from dataclasses import replace

from consolidate.commands.finetune_plan import plan_finetune
from consolidate.commands.generation_options import TASK
from consolidate.commands.run_options import fisher_options
from consolidate.options import (
    Encoding,
    Estimation,
    FinetuneOptions,
    FisherOptions,
    Generation,
    Merging,
)
from formats.checkpoint import Checkpoint
from formats.errors import InputError, UsageError
from formats.wording import few


def fisher_of_itself(options: FinetuneOptions) -> tuple[FisherOptions, Checkpoint]:
    """Give the options that measure a checkpoint on texts it generates, and the checkpoint."""
    like_fisher = fisher_options(options)
    asked = replace(
        like_fisher,
        data=None,
        task=None,
        output_dir=None,
        generation=Generation(generate=options.penalty.protect_self),
        encoding=Encoding(),
        estimation=Estimation(batch_size=like_fisher.estimation.batch_size),
        merging=Merging(),
        saving=replace(options.saving, overwrite=True),
    )
    return asked, _checked(options)


def _checked(options: FinetuneOptions) -> Checkpoint:
    """Refuse before the measurement what would be refused after it."""
    plan = plan_finetune(options)
    source, before = plan.opened.source, plan.opened.before
    if before is not None:
        tasks = few([task.name for task in before.ledger.tasks], 5)
        raise InputError(
            f"{source.path} has a Fisher, of {tasks}, which the penalty uses: leave "
            "--protect-self out"
        )
    if plan.opened.task == TASK:
        raise UsageError(
            f"--protect-self names its own task {TASK!r}: choose another name with --task"
        )
    if source.adapter is not None:
        raise UsageError(
            f"{source.path} is an adapter, and --protect-self is for whole models: measure it "
            "first with `consolidate fisher --generate`"
        )
    if plan.there is None or plan.there.tasks[0] != TASK:  # else it may be up to date
        plan.check_target()
    return source
