"""What `consolidate finetune` does, without the command line: read, train, measure, write."""

import json
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from consolidate.chain.claims import claiming_output
from consolidate.chain.fingerprint import (
    data_content,
    digest,
    module_content,
    options_content,
    versions,
)
from consolidate.chain.heads import HEADS
from consolidate.chain.opening import find_fisher
from consolidate.chain.output import check_output, failed_folder, output_bytes
from consolidate.chain.resume import SAVE_EVERY, KeptPass, KeptWork
from consolidate.chain.tasks import Merging, Training, add_task
from consolidate.chain.up_to_date import cached, find_output, recorded_fisher
from consolidate.commands.finetune_run import (
    Recipe,
    Trained,
    check_options,
    descend,
    kept_of,
    run_length,
    take_stored_values,
    train,
)
from consolidate.commands.finetune_search import Plan, Subject, plan_search, search_lambda
from consolidate.commands.finetune_start import Opened, Start, load_start, open_start
from consolidate.commands.measurement import (
    estimator_options,
    fisher_summary,
    log_notes,
    measure_fisher,
)
from consolidate.data.columns import Columns
from consolidate.data.examples import Examples, subset
from consolidate.models.lora import Lora
from consolidate.models.model import config_of, file_weights
from consolidate.runtime import signals
from consolidate.runtime.devices import best_device
from consolidate.runtime.distributed import (
    all_processes,
    as_one,
    from_first,
    is_first,
    is_lost,
    place_in,
    shards_among,
)
from consolidate.training.forgetting import beyond, check_gate, forgetting
from consolidate.training.lambda_search import Trial
from consolidate.training.loop import Step, default_statistics, has_statistics
from consolidate.views.output_card import write_card
from consolidate.views.search_plot import plot_search
from formats.atomic import replace_folder, write_file
from formats.checkpoint import write_checkpoint
from formats.digest import set_digest
from formats.errors import ForgettingError, InputError, NonFiniteError, UsageError
from formats.fisher_folder import write_fisher
from formats.fisher_json import Ledger
from formats.partial_work import StoredWork
from formats.tensors import Overlaid

LOG = logging.getLogger("consolidate")


@as_one
@claiming_output
def finetune(
    checkpoint: str | Path,
    data: str | Path,
    *,
    output_dir: str | Path,
    ewc_lambda: float | Sequence[float] | str | None = None,
    validation: Mapping[str, str | Path] | None = None,
    choose: str | None = None,
    search_plot: str | Path | None = None,
    penalty: str = "ewc",
    penalty_step: str = "gradient",
    penalty_dtype: torch.dtype | None = None,
    penalty_device: str | None = None,
    fisher: str | Path | None = None,
    task: str | None = None,
    objective: str | None = None,
    model: str | None = None,
    base_model: str | Path | None = None,
    lora_rank: int | None = None,
    lora_targets: Sequence[str] = (),
    lora_alpha: float | None = None,
    rslora: bool = False,
    penalty_on: str | None = None,
    head: str = "keep",
    head_parameters: Sequence[str] = (),
    columns: Columns | None = None,
    split: str | None = None,
    max_length: int | None = None,
    pack: bool = False,
    epochs: int | None = None,
    max_steps: int | None = None,
    max_examples: int | None = None,
    batch_size: int = 16,
    gradient_accumulation_steps: int = 1,
    learning_rate: float = 5e-5,
    optimizer: str = "adamw",
    momentum: float | None = None,
    weight_decay: float = 0.0,
    lr_scheduler: str = "constant",
    warmup_steps: int = 0,
    max_grad_norm: float | None = None,
    mixed_precision: str = "no",
    norm_statistics: str | None = None,
    evaluate: Mapping[str, str | Path] | None = None,
    evaluate_ahead: Collection[str] = (),
    evaluate_every: int | None = None,
    max_forgetting: float | None = None,
    log_every: int = 50,
    seed: int = 0,
    device: str | None = None,
    freeze: Sequence[str] = (),
    gradient_checkpointing: bool = False,
    save_every: float = SAVE_EVERY,
    restart: bool = False,
    force: bool = False,
    shard: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    data_digest: bool = True,
    fisher_estimator: str | None = None,
    fisher_mc_samples: int | None = None,
    fisher_max_outcomes: int | None = None,
    fisher_max_examples: int | None = None,
    fisher_batch_size: int | None = None,
    fisher_tolerance: float | None = None,
    fisher_accumulate_dtype: torch.dtype = torch.float32,
    fisher_check: bool = False,
    merge_rule: str | None = None,
    gamma: float | None = None,
    task_weight: float | str = 1.0,
    on_step: Callable[[Step], None] | None = None,
) -> dict[str, Any]:
    """Fine-tune a checkpoint on a new task with a penalty that keeps what it knew.

    L(θ) = L_new(θ) + (λ/2) Σ_i Λ_i (θ_i − μ_i)², Kirkpatrick et al. 2017, eq. 3. The output is a
    whole checkpoint whose Fisher holds the new task as well, so that the next call starts from it.

    Args:
        checkpoint: A folder, a weights file, or a repository on the Hub.
        data: The new task: a file, a folder, a data set on the Hub, or a ``task.toml``.
        output_dir: Where the new checkpoint is written.
        ewc_lambda: λ, the strength of the penalty; needed unless `penalty` is ``none``. Several, or
            ``auto``, are a search: see `choose`.
        validation: Held-out data to choose λ by, by name: of old tasks, and of the new one, of
            whose data a seeded tenth is held out where there is none here.
        choose: ``mean`` takes the λ of the largest mean score; ``least`` the least with which no
            old task loses more than `max_forgetting`; ``most`` the largest that keeps 95 % of what
            the new task gains. ``most`` without old data, ``least`` with `max_forgetting`, else
            ``mean``, unless given.
        search_plot: A file for the plot of the search, such as ``lambda.png``.
        penalty: ``ewc``, ``l2`` (Λ = 1 around the start) or ``none``.
        penalty_step: ``gradient`` adds λ Λ (θ − μ) to the gradient; ``proximal`` takes the
            penalty's step implicitly after the optimizer's, which is stable for every λ.
        penalty_dtype: Of Λ and μ in memory, float32 or bfloat16; as stored unless given.
        penalty_device: Where Λ and μ are kept, such as ``cpu``; beside the weights unless given.
        fisher: The Fisher to use where it is not beside the weights: a folder or a repository.
        task: The new task's name in the ledger; the data's name unless given.
        objective: What is predicted; the architecture's own unless given.
        model: ``package.module:factory`` for a model that transformers does not know.
        base_model: Of a checkpoint that is an adapter of peft, as in `fisher`.
        lora_rank: Train a fresh low-rank adapter W + s B A of this rank in place of the weights W
            (Hu et al. 2021). The output is a whole checkpoint, with the adapter merged.
        lora_targets: Glob patterns of the names of the layers that get one, or of their last parts;
            those that peft has for the architecture unless given.
        lora_alpha: α of s = α/r; the rank unless given.
        rslora: s = α/√r instead.
        penalty_on: Where an adapter is trained: ``adapter`` holds its own parameters by their
            Fisher, ``merged`` holds W + s B A by that of the whole weights. ``adapter`` for a
            checkpoint that is an adapter with its own Fisher, else ``merged``, unless given.
        head: The output layer: ``keep`` it, whose labels must be the data's by name; ``new`` puts
            it aside for the tasks that use it and starts a fresh one; ``extend`` adds rows for
            the labels it lacks.
        head_parameters: Glob patterns of the output layer's parameters: those outside the base
            model of transformers, else of the last module that has some, unless given.
        columns: Where the inputs and labels are in the data.
        split: Of a data set that has several.
        max_length: Tokens after which a text is truncated.
        pack: Fill sequences of `max_length` with consecutive texts (language modelling).
        epochs: Passes over the data; 1 unless given or `max_steps` is.
        max_steps: Optimizer steps in all; ends the run before `epochs` do.
        max_examples: Train on a seeded random subset of this size.
        batch_size: Examples per micro-batch and process.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        learning_rate: The peak of the schedule.
        optimizer: ``adamw``, ``adam`` or ``sgd``.
        momentum: Of SGD; 0 unless given.
        weight_decay: 0 unless given: it would pull unprotected weights to zero, task after task.
        lr_scheduler: ``constant``, ``linear`` or ``cosine``, after the warm-up.
        warmup_steps: Steps from zero to the peak.
        max_grad_norm: Clip the norm of the gradient, that of the penalty included where it is
            added.
        mixed_precision: ``no``, ``bf16`` or ``fp16`` autocast; the master weights are float32.
        norm_statistics: ``frozen`` or ``update``: running statistics of normalisation layers.
            Unless given they are frozen, whatever the penalty, and follow the data only where
            nothing old is there: no penalty, no Fisher, and no other task in `evaluate`.
        evaluate: Data to measure before, after each epoch and at the end, by task name; a task
            whose output layer was put aside is measured with that.
        evaluate_ahead: Names among them of tasks that are not learned yet, and so not old.
        evaluate_every: Measure them after so many optimizer steps too, and at the last.
        max_forgetting: The score that an old task of the ledger, among those of `evaluate`, may
            lose at most between the start and the end: accuracy, else minus the loss. Of
            `validation` where `evaluate` has no old task.
        log_every: Steps between two lines of progress.
        seed: Of the data order, dropout, masks, subsets and sampled labels.
        device: Such as ``cpu`` or ``cuda``; the best there is unless given.
        freeze: Glob patterns of parameters that are neither trained nor measured.
        gradient_checkpointing: As in `fisher`; while training and while measuring.
        save_every: Minutes between two times that what was done is kept beside the output folder;
            the same call started again goes on from there, to the same bytes. 0: after every step.
        restart: Throw away what was kept of an unfinished run.
        force: Do it anew, and replace the output, even where that is there and was made from the
            same.
        shard: Each of several processes holds a shard of weights, Λ, μ and of the optimizer's state
            (FSDP2).
        overwrite: Replace the output folder that is there.
        revision: Of a checkpoint on the Hub.
        data_digest: Keep the data's digest in the ledger.
        fisher_estimator: As `estimator` of `fisher`, for the new task.
        fisher_mc_samples: As `mc_samples` of `fisher`.
        fisher_max_outcomes: As `max_outcomes` of `fisher`.
        fisher_max_examples: As `max_examples` of `fisher`.
        fisher_batch_size: As `batch_size` of `fisher`; `batch_size` unless given.
        fisher_tolerance: As `tolerance` of `fisher`.
        fisher_accumulate_dtype: As `accumulate_dtype` of `fisher`.
        fisher_check: As `check` of `fisher`.
        merge_rule: As in `fisher`.
        gamma: As in `fisher`.
        task_weight: As in `fisher`.
        on_step: Called after each optimizer step with its loss, its penalty and its learning rate;
            not for the candidates of a search.

    Returns:
        What was done: steps, loss, penalty, the share of weights that moved, metrics, history;
        and the search, if there was one, under ``lambda_search``. Where the output is there, whole
        and made from the same, nothing is done, and the ``status`` is ``cached``: what the ledger
        knows.

    Raises:
        InputError: Something in the checkpoint, its Fisher or the data does not fit.
        UsageError: The options contradict each other or the checkpoint.
        NonFiniteError: NaN or infinity in weights, loss or Fisher; nothing is written.
        ForgettingError: An old task lost more than `max_forgetting`; the output is kept beside
            `output_dir`, under its name with ``.failed-forgetting``.
    """
    given = dict(locals())
    recipe = Recipe(
        penalty_step=penalty_step,
        epochs=epochs,
        max_steps=max_steps,
        max_examples=max_examples,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=learning_rate,
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
        lr_scheduler=lr_scheduler,
        warmup_steps=warmup_steps,
        max_grad_norm=max_grad_norm,
        mixed_precision=mixed_precision,
        norm_statistics=norm_statistics or "frozen",
        log_every=log_every,
        evaluate_every=evaluate_every,
        seed=seed,
    )
    check_options(penalty, ewc_lambda, penalty_dtype, penalty_device, recipe)
    if evaluate_every is not None and not evaluate:
        raise UsageError("--evaluate-every needs data to measure: name them with --evaluate")
    if head not in HEADS:
        raise UsageError(f"--head {head}: expected one of {', '.join(HEADS)}")
    if head_parameters and head == "keep":
        raise UsageError("--head-parameters has no meaning with --head keep: leave it out")
    lora = _lora(lora_rank, lora_targets, lora_alpha, rslora)
    group, cut = all_processes(), shards_among(shard=shard, check=fisher_check)
    target = Path(output_dir)
    overwrite = overwrite or force
    there = None if force else find_output(target)
    opened = open_start(
        checkpoint,
        data,
        target if there is None else None,
        penalty=penalty,
        fisher=fisher,
        task=task,
        objective=objective,
        model=model,
        columns=columns,
        split=split,
        overwrite=overwrite,
        revision=revision,
        base_model=base_model,
        lora=lora,
        penalty_on=penalty_on,
        merge_rule=merge_rule,
        gamma=gamma,
        task_weight=task_weight,
    )
    if opened.penalty_on == "merged" and penalty_step == "proximal":
        raise UsageError(
            "--penalty-step proximal has no meaning with the penalty on merged weights, whose "
            "minimum in A and B cannot be told element by element: use gradient"
        )
    old = [] if opened.before is None else [known.name for known in opened.before.ledger.tasks]
    if norm_statistics is None:
        others = set(evaluate or ()) - {opened.task, *evaluate_ahead}
        recipe = replace(
            recipe,
            norm_statistics=default_statistics(
                penalty, old=bool(old or others or _base_has_fisher(opened))
            ),
        )
    evaluate, validation = dict(evaluate or {}), dict(validation or {})
    plan = None
    if ewc_lambda is not None and not isinstance(ewc_lambda, int | float):
        plan = plan_search(
            ewc_lambda,
            choose=choose,
            max_forgetting=max_forgetting,
            validation=validation,
            other_data=[data, *evaluate.values()],
            new=opened.task,
            ledger=old,
            plot=search_plot,
        )
        if shard:
            raise UsageError("--shard takes one --ewc-lambda: look for it without")
        ewc_lambda = 1.0  # until one is chosen
        if max_forgetting is not None and not set(old) & set(evaluate):
            evaluate |= {name: validation[name] for name in plan.old}
    elif validation or choose or search_plot:
        raise UsageError(
            "--validation, --choose and --search-plot are for a search: give several numbers with "
            "commas, or auto, as --ewc-lambda"
        )
    if max_forgetting is not None:
        check_gate(max_forgetting, old, evaluate)

    @cache
    def description() -> dict[str, Any]:
        return {
            "command": "finetune",
            "versions": versions(),
            **opened.content(),
            "evaluate": {name: data_content(spec) for name, spec in evaluate.items()},
            "validation": {name: data_content(spec) for name, spec in validation.items()},
            "module": module_content(model),
            "options": options_content(given)
            | {
                "task": opened.task,
                "norm_statistics": recipe.norm_statistics,
                "device": best_device(device).type,
                "processes": place_in(group)[1],
            },
        }

    work = KeptWork(
        target,
        description,
        every=60 * save_every,
        result_bytes=output_bytes(opened.source, whole=True),
        restart=restart,
        group=group,
        shard=shard,
    )
    if (done := cached(there, lambda: digest(description()))) is not None:
        work.remove_own()
        return _cached(opened, target, done.ledger, recipe)
    if there is not None:
        check_output(target, opened.source, overwrite=overwrite, whole=True)
    if target.exists() and target.samefile(opened.source.path):
        LOG.info("%s is what this starts from: it will be replaced by what comes of it", target)
    found = work.start()
    if max_forgetting is not None:
        try:
            check_output(failed_folder(target), opened.source, overwrite=overwrite, whole=True)
        except InputError as error:
            raise InputError(f"a run that --max-forgetting fails is kept, and {error}") from None
    start = load_start(
        opened,
        penalty=penalty,
        ewc_lambda=ewc_lambda,
        penalty_dtype=penalty_dtype,
        penalty_device=penalty_device,
        model=model,
        head=head,
        head_parameters=head_parameters,
        evaluate=evaluate,
        validation=validation,
        device=device,
        freeze=freeze,
        gradient_checkpointing=gradient_checkpointing,
        lora=lora,
        encoding={"max_length": max_length, "pack": pack, "seed": seed},
        shards_among=cut,
    )
    estimation = estimator_options(
        start.model,
        start.examples,
        estimator=fisher_estimator,
        mc_samples=fisher_mc_samples,
        max_outcomes=fisher_max_outcomes,
        check=fisher_check,
        prefix="fisher-",
    )
    statistics = recipe.norm_statistics if has_statistics(start.model.module) else None
    if statistics is not None:
        LOG.info("%s", _of_statistics(statistics, given=norm_statistics is not None))
    elif norm_statistics is not None:
        LOG.info("--norm-statistics does nothing: the model keeps no running statistics")
    if gradient_checkpointing and statistics == "update":
        raise UsageError(
            "--gradient-checkpointing runs layers twice, which would update running statistics "
            "twice: leave it out, or use --norm-statistics frozen"
        )
    search = None if found is None else found.state.get("search")
    if search is not None and start.penalty is not None:
        start.penalty.ewc_lambda = search["ewc_lambda"]
    elif plan is not None:
        search = _search(plan, start, recipe, work, found, group)
    if search is not None:
        ewc_lambda = float(search["ewc_lambda"])
        if search_plot is not None and is_first(group):
            plot_search(search, Path(search_plot))
    beside = {"search": search}
    try:
        trained = train(
            start,
            recipe,
            target,
            work=work,
            found=found,
            beside=beside,
            group=group,
            on_step=on_step,
        )
    except NonFiniteError:
        work.remove()  # it would only diverge again
        raise
    forgotten = {}
    if max_forgetting is not None:
        lost = forgetting(trained.metrics["before"], trained.metrics["after"], old)
        forgotten = beyond(lost, max_forgetting)
    kept = KeptPass(work, found, *kept_of(start.model, trained, beside))
    try:
        result = _finish(
            opened,
            start,
            trained,
            failed_folder(target) if forgotten else target,
            overwrite=overwrite,
            data_digest=data_digest,
            made_from=digest(description()) if data_digest else None,
            penalty=penalty,
            ewc_lambda=ewc_lambda,
            norm_statistics=statistics,
            task_weight=task_weight,
            estimation={
                **estimation,
                "max_examples": fisher_max_examples,
                "batch_size": fisher_batch_size or batch_size,
                "seed": seed,
                "tolerance": fisher_tolerance,
                "accumulate_dtype": fisher_accumulate_dtype,
                "group": group,
                "kept": kept,
            },
        )
    except BaseException as error:
        if (isinstance(error, signals.STOPS) or is_lost(error)) and work.can_keep(error):
            kept.keep_what_was_before()
        raise
    work.remove()
    if search is not None:
        result["lambda_search"] = search
    if forgotten and is_first(group):
        losses = ", ".join(f"{name} lost {by:.4f}" for name, by in forgotten.items())
        raise ForgettingError(
            f"forgot too much: {losses} in score, and --max-forgetting is {max_forgetting:g}\n"
            f"The output is kept in {result['checkpoint']}; nothing was written to {target}",
            result | {"status": "forgot too much"},
        )
    return result


def _lora(
    rank: int | None, targets: Sequence[str], alpha: float | None, rslora: bool
) -> Lora | None:
    """Gather the options of a fresh adapter; none has a meaning without its rank."""
    if rank is not None:
        if rank < 1:
            raise UsageError(f"--lora-rank {rank}: expected at least 1")
        if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
            raise UsageError(f"--lora-alpha {alpha}: expected a finite number above 0")
        return Lora(rank, tuple(targets), alpha)
    for option, given in (
        ("lora-targets", bool(targets)),
        ("lora-alpha", alpha is not None),
    ):
        if given:
            raise UsageError(f"--{option} has no meaning without --lora-rank")
    return None


def _base_has_fisher(opened: Opened) -> bool:
    """Return whether a checkpoint is an adapter of weights that have a Fisher."""
    base = opened.source.base
    return base is not None and find_fisher(base.path, None) is not None


def _of_statistics(value: str, *, given: bool) -> str:
    """Say what becomes of running statistics, and who decided it."""
    does = "stay as they are" if value == "frozen" else "follow the new data"
    if given:
        return f"running statistics of normalisation layers {does}: --norm-statistics {value}"
    why, other = "with a penalty, a Fisher or an old task", "update"
    if value == "update":
        why, other = "without a penalty, a Fisher or an old task", "frozen"
    return (
        f"running statistics of normalisation layers {does}, the default {why}: "
        f"--norm-statistics {other} changes that"
    )


def _cached(opened: Opened, target: Path, ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    task = ledger.tasks[-1]
    source = opened.source
    weights = source.weights if source.base is None else source.base.weights
    kept = any(name.rpartition(".")[2] == "running_mean" for name in weights)
    return {
        "status": "cached",
        "checkpoint": str(target),
        "commits": opened.commits(),
        "penalty": task.penalty,
        "penalty_on": task.penalty_on,
        "ewc_lambda": task.ewc_lambda,
        "norm_statistics": recipe.norm_statistics if kept else None,
        "metrics": task.metrics,
        "fisher": {"folder": str(target / "fisher"), **recorded_fisher(ledger)},
    }


def _search(
    plan: Plan,
    start: Start,
    recipe: Recipe,
    work: KeptWork,
    found: StoredWork | None,
    group: ProcessGroup | None,
) -> dict[str, Any]:
    """Choose λ; candidates that were trained before the work was broken off are not again."""
    trials = [] if found is None else list(found.state.get("trials", []))

    def keep(trial: Trial) -> None:
        trials.append(asdict(trial))
        work.keep({}, {"trials": trials}, "search")

    with torch.random.fork_rng():  # the run that follows must not see that there was a search
        return search_lambda(
            plan,
            _subject(start, recipe, group),
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            done=[Trial(**trial) for trial in trials],
            keep=keep,
            group=group,
        )


def _subject(start: Start, recipe: Recipe, group: ProcessGroup | None) -> Subject:
    """Give a search what it trains: runs as `train` makes them, each with its own schedule."""
    assert start.penalty is not None  # a search is refused without one

    def length(examples: Examples) -> int:
        chosen = subset(len(examples), recipe.max_examples, recipe.seed)
        return run_length(len(chosen), recipe, group)[1]

    def train_shortly(examples: Examples, steps: int) -> None:
        warmup = round(recipe.warmup_steps * steps / length(examples))
        shortened = replace(recipe, max_steps=steps, warmup_steps=warmup, log_every=steps)
        descend(replace(start, examples=examples), shortened, lambda *when: None, group)
        if start.frozen is None:  # else the weights are what they were, and the adapter is float32
            take_stored_values(start.model, file_weights(start.model))

    return Subject(
        start.model,
        start.penalty,
        start.examples,
        start.held_out,
        start.with_heads,
        train_shortly,
        length,
    )


def _finish(
    opened: Opened,
    start: Start,
    trained: Trained,
    target: Path,
    *,
    overwrite: bool,
    data_digest: bool,
    made_from: str | None,
    penalty: str,
    ewc_lambda: float | None,
    norm_statistics: str | None,
    task_weight: float | str,
    estimation: dict[str, Any],
) -> dict[str, Any]:
    """Measure the new task's Fisher, merge it, and write the checkpoint."""
    loaded, before = start.model, start.before
    # The output may replace the source, so all that is read from there comes before it.
    started_from = opened.records()
    diagonal = measure_fisher(
        loaded, start.examples, label=f"Fisher of {opened.task}", **estimation
    )
    group = estimation["group"]
    if not is_first(group):
        return from_first(None, group)
    log_notes(loaded, start.examples, diagonal)
    merged, anchor, ledger = add_task(
        before,
        loaded,
        trained.weights,
        diagonal,
        name=opened.task,
        data=opened.rows.name,
        data_digest=opened.rows.digest() if data_digest else None,
        made_from=made_from,
        training=Training(
            ewc_lambda, penalty, opened.penalty_on, set_digest(started_from), trained.metrics
        ),
        merging=Merging(opened.merge_rule, opened.gamma, task_weight),
    )
    once = Overlaid(trained.weights, without=loaded.layout.duplicates)
    share_moved = _share_moved(loaded.checkpoint.weights, once)
    heads = None if before is None else before.heads
    with replace_folder(target, overwrite=overwrite) as staging:
        write_checkpoint(staging, opened.source, trained.weights, card=False)
        if opened.source.adapter is None and config_of(loaded) != opened.source.config:
            write_file(staging / "config.json", json.dumps(config_of(loaded), indent=2) + "\n")
        ledger = write_fisher(staging / "fisher", merged, ledger, anchor=anchor, heads=heads)
        write_card(staging, target, ledger, [opened.source], "finetune")
    steps = trained.steps
    result = {
        "status": "done",
        "checkpoint": str(target),
        "commits": opened.commits(),
        "penalty": penalty,
        "penalty_on": opened.penalty_on,
        "ewc_lambda": ewc_lambda,
        "norm_statistics": norm_statistics,
        "steps": steps[-1].step if steps else 0,
        "loss": steps[-1].loss if steps else None,
        "penalty_value": steps[-1].penalty if steps else None,
        "share_moved": share_moved,
        "metrics": trained.metrics,
        "history": [asdict(step) for step in steps],
        "fisher": {"folder": str(target / "fisher"), **fisher_summary(ledger, diagonal)},
    }
    return from_first(result, group)


def _share_moved(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> float:
    there = [name for name in end if name in start]  # a fresh output layer was nowhere
    moved = sum(int((start[name] != end[name].cpu()).count_nonzero()) for name in there)
    return moved / max(1, sum(start[name].numel() for name in there))
