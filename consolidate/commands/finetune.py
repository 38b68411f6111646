"""What `consolidate finetune` does, without the command line: read, train, measure, write."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import cast

from torch.distributed import ProcessGroup

from consolidate.chain.claims import claiming
from consolidate.chain.fitted_chain import pending_task
from consolidate.chain.opening import stored_fisher
from consolidate.chain.output import discard_measured, failed_folder, measured_folder, output_bytes
from consolidate.chain.resume import KeptPass, KeptWork
from consolidate.chain.up_to_date import cached
from consolidate.commands.finetune_budget import Controller
from consolidate.commands.finetune_compare import completed, train_without_penalty
from consolidate.commands.finetune_cost import report_refused, training_cost
from consolidate.commands.finetune_gate import failed_before, forgotten_in
from consolidate.commands.finetune_interpolation import Interpolator
from consolidate.commands.finetune_options import check_options
from consolidate.commands.finetune_output import (
    report_cached,
    too_much,
    trained_record,
    write_output,
)
from consolidate.commands.finetune_plan import Plan, plan_finetune
from consolidate.commands.finetune_run import kept_of, log_replay, train
from consolidate.commands.finetune_search import searched
from consolidate.commands.finetune_self import as_fisher, fisher_of_itself, without_penalty
from consolidate.commands.finetune_start import Start, load_start, master_dtype
from consolidate.commands.finetune_weights import UNMOVED
from consolidate.commands.fisher import measure_alone
from consolidate.commands.fisher_plan import plan_alone
from consolidate.commands.measurement import (
    check_measurable,
    kept_work,
    measure_fisher,
    settled_estimation,
)
from consolidate.commands.run_options import fisher_options
from consolidate.estimation.estimates import FisherDiagonal
from consolidate.options import FinetuneOptions, FisherOptions, Merging
from consolidate.results import (
    BudgetPoint,
    FinetuneCached,
    FinetuneDone,
    FinetuneDryRun,
    FinetuneResult,
    LambdaSearch,
)
from consolidate.runtime import signals
from consolidate.runtime.distributed import (
    all_processes,
    as_one,
    from_first,
    is_first,
    is_lost,
    shards_among,
)
from consolidate.runtime.progress import start_timing
from consolidate.training.loop import with_statistics
from formats.atomic import partial_path
from formats.digest import set_digest
from formats.errors import ForgettingError, NonFiniteError, UsageError
from formats.fisher_folder import read_fisher
from formats.partial_work import StoredWork

LOG = logging.getLogger("consolidate")


@as_one
def finetune(options: FinetuneOptions, *, again: bool = False) -> FinetuneResult:
    """Fine-tune a checkpoint on a new task with a penalty that protects the earlier ones.

    L(θ) = L_new(θ) + (λ/2) Σ_i Λ_i (θ_i − μ_i)², Kirkpatrick et al. 2017, eq. 3. The output is a
    whole checkpoint whose Fisher protects the new task as well, so that the next call starts from
    it.

    Returns:
        What was done: steps, loss, penalty, the share of weights that moved, the nats of old loss
        that the Fisher predicts and those that were measured, metrics, history;
        the searches, if any, under ``lambda_search`` and ``alpha_search``. An output that is up to
        date is not written again: the ``status`` is ``cached``, with what the ledger records. With
        `dry_run`, the estimated cost.

    Raises:
        InputError: Something in the checkpoint, its Fisher or the data does not fit.
        UsageError: The options contradict each other or the checkpoint.
        NonFiniteError: NaN or infinity in weights, loss or Fisher; nothing is written.
        ForgettingError: An old task lost more than `max_forgetting`; the output is saved as
            `output_dir` with ``.failed-forgetting`` behind its name. Or no α keeps
            `budget`; nothing is written.
    """
    check_options(options)
    cut = shards_among(shard=options.parameters.shard, check=options.estimation.check)
    if options.dry_run:
        return _dry_run(options, cut)
    with claiming(Path(options.output_dir)):
        plan = plan_finetune(options, again=again)
        own = None if options.penalty.protect_self is None else fisher_of_itself(plan)
        needed = output_bytes(plan.opened.source, whole=True)
        work = kept_work(options, plan.target, lambda: plan.description, needed)
        if (done := _done_before(plan)) is not None:
            work.remove_own()
            discard_measured(plan.target)
            return done
        plan.check_target()
        if plan.target.exists() and plan.target.samefile(plan.opened.source.path):
            LOG.info(
                "%s is the checkpoint that training starts from: it will be replaced", plan.target
            )
        plan = _with_last_task(plan, cut) if own is None else _with_own_fisher(plan, own, cut)
        return _finetune(plan, work, cut)


def _dry_run(options: FinetuneOptions, cut: ProcessGroup | None) -> FinetuneDryRun:
    """Check all that can be, and estimate the training; Fishers yet to be measured are left out."""
    plan = plan_finetune(options)
    source, measured = plan.opened.source, measured_folder(plan.target)
    # Each process reads for itself, so that none waits for one that is refused.
    work = KeptWork(plan.target, lambda: plan.description, every=math.inf, result_bytes=0)
    report_refused(plan.check_target, *[] if options.saving.restart else [work.check])
    if options.measuring.measure:
        plan_alone(_asked_for_last(plan), source, plan.opened.before, measured)
    penalty = options.penalty.penalty
    if options.penalty.protect_self is not None:
        own = fisher_of_itself(plan)
        with as_fisher(own):
            alone = plan_alone(own, source, None, measured)
        if not measured.exists():  # else the texts may be its own
            report_refused(alone.check_target)
        plan = without_penalty(plan)
        LOG.info("the penalty is left out, as the model's own texts are not measured in a dry run")
    start = load_start(plan, cut)
    moving = _interpolator(plan, start, _measuring(plan, start), None)
    if moving is not None:  # It may hold out some examples.
        start = replace(start, examples=moving.examples)
    _running_statistics(plan, start)
    log_replay(start, plan.recipe)
    return {**training_cost(plan, start), "penalty": penalty}


def _finetune(plan: Plan, work: KeptWork, cut: ProcessGroup | None) -> FinetuneDone:
    """Train, measure and write what a plan says, sharded among the processes of `cut`."""
    options, group = plan.options, work.group
    if options.saving.data_digest and is_first(group):
        _ = plan.description  # of the files as they are read, even if they change meanwhile
    found = work.start()
    start = load_start(plan, cut)
    measure = _measuring(plan, start)
    statistics = _running_statistics(plan, start)
    budget = options.search.budget
    try:
        search = searched(plan, start, work, found)
        comparison, found = train_without_penalty(plan, start, work, found, search)
        controller = None if budget is None else Controller(budget, start, plan.recipe, found)
        moving = _interpolator(plan, start, measure, found)
        trained_on = start if moving is None else replace(start, examples=moving.examples)
        log_replay(trained_on, plan.recipe)
        start_timing()
        trained = train(
            start,
            plan.recipe,
            plan.target,
            work=work,
            found=found,
            search=search,
            comparison=comparison,
            controller=controller,
            interpolator=moving,
            on_step=options.on_step,
        )
    except (NonFiniteError, ForgettingError):
        work.remove()  # it would only end so again
        raise
    found = None if found is not None and UNMOVED in found.state else found
    kept = KeptPass(work, found, *kept_of(start.model, trained))
    with _saving_what_was_learned(work, kept):
        predicted = None if start.forecast is None else start.forecast.nats()
        forgotten = forgotten_in(plan, trained.metrics)
        target = failed_folder(plan.target) if forgotten else plan.target
        # The output may replace the source, so all that is read from there comes before it.
        started_from = set_digest(plan.opened.records)
        diagonal = None
        if not options.measuring.no_fisher:
            diagonal = measure(task=plan.opened.task, kept=kept)
        result = None
        if is_first(group):
            training = trained_record(plan, start, trained, started_from, moving)
            result = write_output(
                plan, start, trained, diagonal, target, training, statistics, predicted
            )
        result = from_first(result, group)
    work.remove()
    discard_measured(plan.target)
    _add_choices(result, search, moving, controller)
    if comparison is not None:
        result["comparison"] = completed(comparison, trained.metrics)
    if forgotten and is_first(group):
        raise too_much(forgotten, options, result)
    return result


def _add_choices(
    result: FinetuneDone,
    search: LambdaSearch | None,
    moving: Interpolator | None,
    controller: Controller | None,
) -> None:
    """Add to a result how λ, α and a budget's λ were chosen."""
    if search is not None:
        result["lambda_search"] = search
    if moving is not None and (chosen := moving.search()) is not None:
        result["alpha_search"] = chosen
    if controller is not None:
        result["budget_path"] = [cast(BudgetPoint, asdict(one)) for one in controller.measured]


def _done_before(plan: Plan) -> FinetuneCached | None:
    """Report an output that is up to date; one that forgot too much is refused again."""
    if (done := cached(plan.there, plan.made_from)) is not None:
        return report_cached(plan, done.ledger)
    if (failed := failed_before(plan)) is None:
        return None
    result = report_cached(failed.plan, failed.ledger)
    if is_first(all_processes()):
        raise too_much(failed.forgotten, plan.options, result)
    return result


def _with_own_fisher(plan: Plan, asked: FisherOptions, cut: ProcessGroup | None) -> Plan:
    """Measure the Fisher that --protect-self asks for, and make it the chain so far.

    It is kept beside the output until that is written, so that it is measured once however often
    the run is interrupted.
    """
    opened, folder = plan.opened, measured_folder(plan.target)
    if not folder.exists() and not partial_path(folder).exists():
        load_start(without_penalty(plan), cut)  # refuses data, heads and tokenizers that do not fit
    with as_fisher(asked):
        measure_alone(asked, opened.source, None, plan.target, cut)
    stored = stored_fisher(folder, opened.source)
    return replace(plan, opened=replace(opened, before=stored, protecting=stored, to_measure=()))


def _with_last_task(plan: Plan, cut: ProcessGroup | None) -> Plan:
    """Measure the last task if --measure names it, else report one that has no Fisher.

    The Fisher is kept beside the output until that is written, so that it is measured once however
    often the run is interrupted. It is measured as the training that left it out would have.
    """
    task, options = pending_task(plan.opened.before), plan.options
    if task is None:
        return plan
    if not options.measuring.measure:
        LOG.info(
            "%s has no Fisher, so the penalty does not protect it: --measure %s=DATA measures it "
            "first",
            task.name,
            task.name,
        )
        return plan
    opened, asked = plan.opened, _asked_for_last(plan)
    folder = measure_alone(asked, opened.source, opened.before, plan.target, cut)
    LOG.info("the Fisher of %s was measured on %s, and protects it", task.name, asked.data)
    return replace(plan, measured=read_fisher(folder))


def _asked_for_last(plan: Plan) -> FisherOptions:
    """Give the options that --measure measures the last task with."""
    options = plan.options
    ((name, data),) = (options.measuring.measure or {}).items()
    asked = fisher_options(options)
    return replace(
        asked,
        data=data,
        encoding=replace(asked.encoding, split=None),  # which is that of --data
        task=name,
        output_dir=None,
        dtype=str(master_dtype(plan.opened.source, options)).removeprefix("torch."),
        merging=Merging(),
    )


def _measuring(plan: Plan, start: Start) -> Callable[..., FisherDiagonal]:
    """Settle how the new task's Fisher is measured; to call with ``task`` and ``kept``."""
    asked = plan.options.estimation
    asked = replace(asked, batch_size=asked.batch_size or plan.recipe.batch_size)
    estimation = settled_estimation(asked, start.model, start.examples, prefix="fisher-")
    if not plan.options.measuring.no_fisher or plan.options.interpolating.interpolation == "fisher":
        check_measurable(start.model, start.examples, asked, plan.recipe.seed)
    return partial(
        measure_fisher,
        start.model,
        start.examples,
        estimation,
        seed=plan.recipe.seed,
        structure=plan.opened.structure,
    )


def _interpolator(
    plan: Plan, start: Start, measure: Callable[..., FisherDiagonal], found: StoredWork | None
) -> Interpolator | None:
    """Prepare to interpolate; None where it was not asked for."""
    if plan.interpolation is None:
        return None
    return Interpolator(plan.interpolation, start, plan.recipe, measure, found)


def _running_statistics(plan: Plan, start: Start) -> str | None:
    """Report what becomes of running statistics, and why; None where there are none."""
    given = plan.options.recipe.norm_statistics is not None
    if not with_statistics(start.model.module):
        if given:
            LOG.info("--norm-statistics has no effect: the model has no running statistics")
        return None
    value = plan.recipe.norm_statistics
    does = "stay frozen" if value == "frozen" else "follow the new data"
    by = f": --norm-statistics {value}"
    if not given:
        without, other = ("with", "update") if value == "frozen" else ("without", "frozen")
        by = (
            f", the default {without} a penalty, a Fisher or an old task: --norm-statistics "
            f"{other} changes that"
        )
    LOG.info("running statistics of normalization layers %s%s", does, by)
    if plan.options.parameters.gradient_checkpointing and value == "update":
        raise UsageError(
            "--gradient-checkpointing runs layers twice, which would update running statistics "
            "twice: leave it out, or use --norm-statistics frozen"
        )
    return value


@contextmanager
def _saving_what_was_learned(work: KeptWork, kept: KeptPass) -> Iterator[None]:
    """Save the trained weights where the rest is interrupted."""
    try:
        yield
    except BaseException as error:
        if (isinstance(error, signals.STOPS) or is_lost(error)) and work.can_keep(error):
            kept.keep_what_was_before()
        raise
