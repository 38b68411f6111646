"""What `finetune --protect-self` measures before it trains, as options of `fisher`."""

from dataclasses import replace

from consolidate.commands.finetune_plan import Plan, plan_finetune
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
from formats.errors import InputError, UsageError
from formats.wording import few


def fisher_of_itself(options: FinetuneOptions) -> tuple[FisherOptions, Plan]:
    """Give the options that measure a checkpoint on texts it generates, and the plan of the rest.

    The plan has no penalty, which would need the Fisher, so that all else can be tried beforehand.
    """
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


def _checked(options: FinetuneOptions) -> Plan:
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
    if not _may_be_up_to_date(plan):
        plan.check_target()
    return replace(plan, options=replace(options, penalty=replace(options.penalty, penalty="none")))


def _may_be_up_to_date(plan: Plan) -> bool:
    """Return whether an output's first task was measured on as many texts with the same seed."""
    first = None if plan.there is None else plan.there.tasks[0].generated
    if first is None:
        return False
    return (first.sequences, first.seed) == (plan.options.penalty.protect_self, plan.recipe.seed)
