"""What `finetune --protect-self` measures before it trains, as options of `fisher`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from consolidate.commands.finetune_plan import Plan
from consolidate.commands.generation_options import TASK, check_generation
from consolidate.commands.run_options import fisher_options
from consolidate.options import Encoding, Estimation, FisherOptions, Generation, Merging
from formats.errors import InputError, UsageError
from formats.wording import few


def fisher_of_itself(plan: Plan) -> FisherOptions:
    """Give the options that measure a checkpoint on texts it generates, unless that is refused."""
    penalty, source, before = plan.options.penalty, plan.opened.source, plan.opened.before
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
    like_fisher = fisher_options(plan.options)
    asked = replace(
        like_fisher,
        data=None,
        task=None,
        generation=Generation(generate=penalty.protect_self, save_generated=penalty.save_generated),
        encoding=Encoding(),
        estimation=Estimation(batch_size=like_fisher.estimation.batch_size),
        merging=Merging(),
    )
    with as_fisher(asked):
        check_generation(asked)
    return replace(asked, output_dir=None)


@contextmanager
def as_fisher(asked: FisherOptions) -> Iterator[None]:
    """Name the command whose options a refused measurement speaks of."""
    try:
        yield
    except (InputError, UsageError) as error:
        if "--" not in str(error):
            raise
        count = asked.generation.generate
        raise type(error)(
            f"{error}\n--protect-self {count} measures as `consolidate fisher {asked.checkpoint} "
            f"--generate {count}` does, which has these options"
        ) from error


def without_penalty(plan: Plan) -> Plan:
    """Give a plan without the penalty, which needs the Fisher, so that all else can be tried."""
    penalty = replace(plan.options.penalty, penalty="none")
    return replace(plan, options=replace(plan.options, penalty=penalty))
