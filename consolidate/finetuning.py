"""What `consolidate finetune` does, without the command line: read, train, measure, write."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial, wraps
from inspect import signature
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from consolidate.chain import (
    Chain,
    add_task,
    find_fisher,
    merging_options,
    stored_fisher,
    task_name,
)
from consolidate.commands import (
    best_device,
    check_output,
    columns_of,
    evaluate_all,
    fisher_summary,
    log_notes,
)
from consolidate.examples import Columns, Examples, encode, label_names, subset
from consolidate.forgetting import beyond, check_gate, failed_folder, forgetting
from consolidate.heads import HEADS, Fitted, fit_model, models_of_tasks
from consolidate.hub import FISHER, commits_of, locate
from consolidate.likelihood import get_likelihood
from consolidate.measuring import estimator_options, measure_fisher
from consolidate.models import (
    Model,
    config_of,
    file_weights,
    lacks_head,
    load_model,
)
from consolidate.penalty import STEPS, Penalty
from consolidate.progress import progress
from consolidate.search_plot import plot_search
from consolidate.searching import Subject, plan_search, search_lambda
from consolidate.training import (
    MIXED_PRECISION,
    OPTIMIZERS,
    SCHEDULES,
    Step,
    data_order,
    has_statistics,
    make_optimizer,
    make_scheduler,
    seeded,
    train_epoch,
)
from formats.atomic import claimed, replace_folder, write_file
from formats.checkpoint import (
    Checkpoint,
    check_finite,
    open_checkpoint,
    weight_records,
    write_checkpoint,
)
from formats.digest import set_digest
from formats.errors import ForgettingError, InputError, NonFiniteError, UsageError
from formats.fisher_folder import StoredFisher, write_fisher
from formats.rows import Rows
from formats.task_file import open_task

LOG = logging.getLogger("consolidate")
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Recipe:
    """How a run descends: the options of `finetune` of these names."""

    penalty_step: str
    epochs: int | None
    max_steps: int | None
    max_examples: int | None
    batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    optimizer: str
    momentum: float | None
    weight_decay: float
    lr_scheduler: str
    warmup_steps: int
    max_grad_norm: float | None
    mixed_precision: str
    norm_statistics: str
    log_every: int
    evaluate_every: int | None
    seed: int


@dataclass(frozen=True)
class Opened:
    """What a run reads, checked before anything of it is loaded."""

    source: Checkpoint
    before: StoredFisher | None  # the chain so far
    rows: Rows
    task: str
    objective: str | None
    columns: Columns
    merge_rule: str
    gamma: float


@dataclass(frozen=True)
class Start:
    """What a run starts from; training changes the model in place."""

    model: Model
    before: Chain | None  # as the model has a place for it
    examples: Examples
    evaluations: dict[str, Examples]
    held_out: dict[str, Examples]  # to choose λ by
    with_heads: dict[str, Model]  # by evaluation, of tasks with a head of their own
    penalty: Penalty | None


@dataclass(frozen=True)
class Trained:
    """Where a run ended."""

    weights: dict[str, Tensor]  # by the names of the weights file, as they will be stored
    steps: list[Step]
    metrics: dict[str, dict[str, dict[str, float]]]


def _claiming_output(command: Callable[P, R]) -> Callable[P, R]:
    """Keep ``output_dir`` for the command from its start to its end."""

    @wraps(command)
    def claiming(*arguments: P.args, **options: P.kwargs) -> R:
        target = signature(command).bind(*arguments, **options).arguments["output_dir"]
        with claimed(Path(target)):
            return command(*arguments, **options)

    return claiming


@_claiming_output
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
    evaluate_every: int | None = None,
    max_forgetting: float | None = None,
    log_every: int = 50,
    seed: int = 0,
    device: str | None = None,
    freeze: Sequence[str] = (),
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
        penalty_dtype: Of Λ and μ in memory: float32 unless given, or bfloat16.
        penalty_device: Where Λ and μ are kept, such as ``cpu``; beside the weights unless given.
        fisher: The Fisher to use where it is not beside the weights: a folder or a repository.
        task: The new task's name in the ledger; the data's name unless given.
        objective: What is predicted; the architecture's own unless given.
        model: ``package.module:factory`` for a model that transformers does not know.
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
        batch_size: Examples per micro-batch.
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
        norm_statistics: ``frozen`` or ``update``: running statistics of normalisation layers;
            frozen where there is a penalty unless given.
        evaluate: Data to measure before, after each epoch and at the end, by task name; a task
            whose output layer was put aside is measured with that.
        evaluate_every: Measure them after so many optimizer steps too, and at the last.
        max_forgetting: The score that an old task of the ledger, among those of `evaluate`, may
            lose at most between the start and the end: accuracy, else minus the loss. Of
            `validation` where `evaluate` has no old task.
        log_every: Steps between two lines of progress.
        seed: Of the data order, dropout, masks, subsets and sampled labels.
        device: Such as ``cpu`` or ``cuda``; the best there is unless given.
        freeze: Glob patterns of parameters that are neither trained nor measured.
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

    Returns:
        What was done: steps, loss, penalty, the share of weights that moved, metrics, history;
        and the search, if there was one, under ``lambda_search``.

    Raises:
        InputError: Something in the checkpoint, its Fisher or the data does not fit.
        UsageError: The options contradict each other or the checkpoint.
        NonFiniteError: NaN or infinity in weights, loss or Fisher; nothing is written.
        ForgettingError: An old task lost more than `max_forgetting`; the output is kept beside
            `output_dir`, under its name with ``.failed-forgetting``.
    """
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
        norm_statistics=norm_statistics or ("update" if penalty == "none" else "frozen"),
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
    target = Path(output_dir)
    opened = _open(
        checkpoint,
        data,
        target,
        penalty=penalty,
        fisher=fisher,
        task=task,
        objective=objective,
        model=model,
        columns=columns,
        split=split,
        overwrite=overwrite,
        revision=revision,
        merge_rule=merge_rule,
        gamma=gamma,
        task_weight=task_weight,
    )
    old = [] if opened.before is None else [known.name for known in opened.before.ledger.tasks]
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
        try:
            check_output(failed_folder(target), opened.source, overwrite=overwrite, whole=True)
        except InputError as error:
            raise InputError(f"a run that --max-forgetting fails is kept, and {error}") from None
    start = _load(
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
        encoding={"max_length": max_length, "pack": pack, "seed": seed},
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
    if norm_statistics is not None and not has_statistics(start.model.module):
        LOG.info("--norm-statistics does nothing: the model keeps no running statistics")
    search = None
    if plan is not None:
        subject = _subject(start, recipe)
        with torch.random.fork_rng():  # the run that follows must not see that there was a search
            search = search_lambda(plan, subject, batch_size=batch_size, seed=seed)
        ewc_lambda = float(search["ewc_lambda"])
        if search_plot is not None:
            plot_search(search, Path(search_plot))
    trained = _train(start, recipe, target)
    forgotten = {}
    if max_forgetting is not None:
        lost = forgetting(trained.metrics["before"], trained.metrics["after"], old)
        forgotten = beyond(lost, max_forgetting)
    result = _finish(
        opened,
        start,
        trained,
        failed_folder(target) if forgotten else target,
        overwrite=overwrite,
        data_digest=data_digest,
        penalty=penalty,
        ewc_lambda=ewc_lambda,
        task_weight=task_weight,
        estimation={
            **estimation,
            "max_examples": fisher_max_examples,
            "batch_size": fisher_batch_size or batch_size,
            "seed": seed,
            "tolerance": fisher_tolerance,
            "accumulate_dtype": fisher_accumulate_dtype,
        },
    )
    if search is not None:
        result["lambda_search"] = search
    if forgotten:
        losses = ", ".join(f"{name} lost {by:.4f}" for name, by in forgotten.items())
        raise ForgettingError(
            f"forgot too much: {losses} in score, and --max-forgetting is {max_forgetting:g}\n"
            f"The output is kept in {result['checkpoint']}; nothing was written to {target}",
            result | {"status": "forgot too much"},
        )
    return result


def check_options(
    penalty: str,
    ewc_lambda: object,
    penalty_dtype: torch.dtype | None,
    penalty_device: str | None,
    recipe: Recipe,
) -> None:
    """Refuse options of `finetune` that no run could have, whatever the checkpoint and the data.

    Args:
        penalty: As in `finetune`.
        ewc_lambda: As in `finetune`.
        penalty_dtype: As in `finetune`.
        penalty_device: As in `finetune`.
        recipe: The others.

    Raises:
        UsageError: One is out of its range, or two contradict each other.
    """
    for option, value, known in (
        ("penalty", penalty, ("ewc", "l2", "none")),
        ("penalty-step", recipe.penalty_step, STEPS),
        ("optimizer", recipe.optimizer, OPTIMIZERS),
        ("lr-scheduler", recipe.lr_scheduler, SCHEDULES),
        ("mixed-precision", recipe.mixed_precision, MIXED_PRECISION),
    ):
        if value not in known:
            raise UsageError(f"--{option} {value}: expected one of {', '.join(known)}")
    for option, number in (
        ("epochs", recipe.epochs),
        ("max-steps", recipe.max_steps),
        ("batch-size", recipe.batch_size),
        ("gradient-accumulation-steps", recipe.gradient_accumulation_steps),
        ("log-every", recipe.log_every),
        ("evaluate-every", recipe.evaluate_every),
    ):
        if number is not None and number < 1:
            raise UsageError(f"--{option} {number}: expected at least 1")
    strength = ewc_lambda if isinstance(ewc_lambda, int | float) else None
    for option, amount, least in (
        ("ewc-lambda", strength, "from 0"),
        ("learning-rate", recipe.learning_rate, "above 0"),
        ("momentum", recipe.momentum, "from 0"),
        ("weight-decay", recipe.weight_decay, "from 0"),
        ("warmup-steps", recipe.warmup_steps, "from 0"),
        ("max-grad-norm", recipe.max_grad_norm, "above 0"),
    ):
        fits = amount is None or (amount >= 0 and math.isfinite(amount))
        if not fits or (amount == 0 and least == "above 0"):
            raise UsageError(f"--{option} {amount}: expected a finite number {least}")
    free = penalty == "none" and "--penalty none"
    plain = recipe.optimizer != "sgd" and f"--optimizer {recipe.optimizer}"
    for option, given, without in (
        ("ewc-lambda", ewc_lambda is not None, free),
        ("penalty-step", recipe.penalty_step != "gradient", free),
        ("penalty-dtype", penalty_dtype is not None, free),
        ("penalty-device", penalty_device is not None, free),
        ("momentum", recipe.momentum is not None, plain),
    ):
        if given and without:
            raise UsageError(f"--{option} has no meaning with {without}: leave one of them out")
    if penalty != "none" and ewc_lambda is None:
        raise UsageError(f"--penalty {penalty} needs --ewc-lambda: the strength has no default")


def _open(
    checkpoint: str | Path,
    data: str | Path,
    target: Path,
    *,
    penalty: str,
    fisher: str | Path | None,
    task: str | None,
    objective: str | None,
    model: str | None,
    columns: Columns | None,
    split: str | None,
    overwrite: bool,
    revision: str | None,
    merge_rule: str | None,
    gamma: float | None,
    task_weight: float | str,
) -> Opened:
    """Open checkpoint, Fisher and data, and refuse what would fail later."""
    folder = locate(checkpoint, revision, without=() if fisher is None else FISHER)
    source = open_checkpoint(folder)
    check_output(target, source, overwrite=overwrite, whole=True)
    stored_at = find_fisher(folder, fisher)
    before = None
    if stored_at is not None:
        before = stored_fisher(stored_at, source)
    elif penalty == "ewc":
        if model is None and objective and lacks_head(source, objective):
            raise InputError(
                f"{folder} has no output layer for {objective} yet: let it learn a first task with "
                "--penalty none"
            )
        raise InputError(
            f"{folder} holds no Fisher: run `consolidate fisher {checkpoint} --data OLD_DATA` "
            "first, or name one with --fisher"
        )
    merge_rule, gamma = merging_options(before, merge_rule, gamma, task_weight)
    check_finite(source.weights, folder)
    task_file, rows = open_task(data, split=split)
    return Opened(
        source=source,
        before=before,
        rows=rows,
        task=task_name(task or task_file.name, rows.name, before),
        objective=objective or task_file.objective,
        columns=columns_of(columns, task_file),
        merge_rule=merge_rule,
        gamma=gamma,
    )


def _load(
    opened: Opened,
    *,
    penalty: str,
    ewc_lambda: float | None,
    penalty_dtype: torch.dtype | None,
    penalty_device: str | None,
    model: str | None,
    head: str,
    head_parameters: Sequence[str],
    evaluate: Mapping[str, str | Path],
    validation: Mapping[str, str | Path],
    device: str | None,
    freeze: Sequence[str],
    encoding: dict[str, Any],
) -> Start:
    """Load the model, encode the data for it, and make the penalty around its weights."""
    source, objective = opened.source, opened.objective
    new_labels = None
    if penalty == "none" and model is None and objective and lacks_head(source, objective):
        new_labels = label_names(opened.rows, objective, opened.columns)
    learned = 0 if opened.before is None else len(opened.before.ledger.tasks)
    load = partial(
        load_model,
        objective=objective,
        factory=model,
        seed=encoding["seed"] + learned,  # heads that begin alike compete for the same features
        dtype=torch.float32,  # master weights: small updates vanish in bf16
        device=best_device(device),
        freeze=freeze,
    )
    fitted = fit_model(
        load,
        source,
        opened.before,
        opened.rows,
        opened.columns,
        head=head,
        patterns=head_parameters,
        new_labels=new_labels,
    )
    loaded, before = fitted.model, fitted.before
    with_heads: dict[str, Model] = {}
    if before is not None:
        tasks = {name: name for name in (*evaluate, *validation)}
        with_heads = models_of_tasks(load, loaded, before, tasks)
    examples = encode(opened.rows, loaded, columns=opened.columns, **encoding)

    def encode_named(data: Mapping[str, str | Path]) -> dict[str, Examples]:
        encoded = {}
        for name, spec in data.items():
            task_file, rows = open_task(spec)
            # A task file of its own knows better than the options, which are the new task's.
            used = Columns(**{**asdict(opened.columns), **task_file.columns()})
            encoded[name] = encode(rows, with_heads.get(name, loaded), columns=used, **encoding)
        return encoded

    evaluations, held_out = encode_named(evaluate), encode_named(validation)
    storage = {
        "dtype": penalty_dtype,
        "device": None if penalty_device is None else best_device(penalty_device),
    }
    term = _penalty(penalty, ewc_lambda, fitted, **storage)
    if before is not None and penalty != "ewc":
        LOG.info(
            "the Fisher of %s does not hold the weights in this run; it is kept, around %s",
            ", ".join(task.name for task in before.ledger.tasks),
            "the weights as they will be" if opened.merge_rule == "online" else "its anchor",
        )
    return Start(loaded, before, examples, evaluations, held_out, with_heads, term)


def _subject(start: Start, recipe: Recipe) -> Subject:
    """Give a search what it trains: runs as that of `_train`, each with its own schedule."""
    assert start.penalty is not None  # a search is refused without one

    def length(examples: Examples) -> int:
        return _length(len(subset(len(examples), recipe.max_examples, recipe.seed)), recipe)[1]

    def train(examples: Examples, steps: int) -> None:
        warmup = round(recipe.warmup_steps * steps / length(examples))
        shortened = replace(recipe, max_steps=steps, warmup_steps=warmup, log_every=steps)
        _descend(replace(start, examples=examples), shortened, lambda *when: None)
        _take_stored_values(start.model, file_weights(start.model))

    return Subject(
        start.model,
        start.penalty,
        start.examples,
        start.held_out,
        start.with_heads,
        train,
        length,
    )


def _train(start: Start, recipe: Recipe, target: Path) -> Trained:
    """Train from the model's present weights, and give it the weights as they will be stored."""
    metrics: dict[str, dict[str, dict[str, float]]] = {}

    def take_metrics(when: str, same_as: str = "") -> None:
        if not start.evaluations:
            return
        if same_as in metrics:
            metrics[when] = metrics[same_as]
            return
        with torch.random.fork_rng():  # a module may draw in eval mode too; training must not see
            metrics[when] = evaluate_all(
                start.model,
                start.evaluations,
                batch_size=recipe.batch_size,
                with_heads=start.with_heads,
            )
        for measured, values in metrics[when].items():
            LOG.info("%s: %s %s", when, measured, _in_words(values))

    take_metrics("before")
    steps = _descend(start, recipe, take_metrics)
    weights = file_weights(start.model)
    try:
        check_finite(weights, target)
    except NonFiniteError as error:
        raise NonFiniteError(
            f"training diverged: {error}; lower --learning-rate or --ewc-lambda"
        ) from None
    _take_stored_values(start.model, weights)
    take_metrics("after")
    return Trained(weights, steps, metrics)


def _finish(
    opened: Opened,
    start: Start,
    trained: Trained,
    target: Path,
    *,
    overwrite: bool,
    data_digest: bool,
    penalty: str,
    ewc_lambda: float | None,
    task_weight: float | str,
    estimation: dict[str, Any],
) -> dict[str, Any]:
    """Measure the new task's Fisher, merge it, and write the checkpoint."""
    loaded, before = start.model, start.before
    # The output may replace the source, so all that is read from there comes before it.
    started_from = (
        weight_records(opened.source.weights)
        if opened.before is None
        else opened.before.ledger.weights
    )
    diagonal = measure_fisher(
        loaded, start.examples, label=f"Fisher of {opened.task}", **estimation
    )
    log_notes(loaded, start.examples, diagonal)
    merged, anchor, ledger = add_task(
        before,
        loaded,
        trained.weights,
        diagonal,
        name=opened.task,
        data=opened.rows.name,
        data_digest=opened.rows.digest() if data_digest else None,
        ewc_lambda=ewc_lambda,
        penalty=penalty,
        parent=set_digest(started_from),
        metrics=trained.metrics,
        merge_rule=opened.merge_rule,
        gamma=opened.gamma,
        task_weight=task_weight,
    )
    share_moved = _share_moved(loaded.checkpoint.weights, trained.weights)
    heads = None if before is None else before.heads
    with replace_folder(target, overwrite=overwrite) as staging:
        write_checkpoint(staging, opened.source, trained.weights)
        if config_of(loaded) != opened.source.config:
            write_file(staging / "config.json", json.dumps(config_of(loaded), indent=2) + "\n")
        write_fisher(staging / "fisher", merged, ledger, anchor=anchor, heads=heads)
    steps = trained.steps
    return {
        "status": "done",
        "checkpoint": str(target),
        "commits": commits_of(
            opened.source.path, None if opened.before is None else opened.before.folder
        ),
        "penalty": penalty,
        "ewc_lambda": ewc_lambda,
        "steps": steps[-1].step if steps else 0,
        "loss": steps[-1].loss if steps else None,
        "penalty_value": steps[-1].penalty if steps else None,
        "share_moved": share_moved,
        "metrics": trained.metrics,
        "history": [asdict(step) for step in steps],
        "fisher": {"folder": str(target / "fisher"), **fisher_summary(ledger, diagonal)},
    }


def _descend(start: Start, recipe: Recipe, take_metrics: Callable[..., None]) -> list[Step]:
    """Take the optimizer's steps, calling `take_metrics` at times and after each epoch."""
    model, examples = start.model, start.examples
    chosen = subset(len(examples), recipe.max_examples, recipe.seed)
    epochs, total = _length(len(chosen), recipe)
    if not any(parameter.requires_grad for parameter in model.module.parameters()):
        raise UsageError("--freeze leaves no parameter to train")
    descent = make_optimizer(
        recipe.optimizer,
        model.module.parameters(),
        learning_rate=recipe.learning_rate,
        momentum=recipe.momentum or 0.0,
        weight_decay=recipe.weight_decay,
    )
    schedule = make_scheduler(
        recipe.lr_scheduler, descent, warmup_steps=recipe.warmup_steps, total_steps=total
    )
    device = next(model.module.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.mixed_precision == "fp16")
    steps: list[Step] = []
    orders = data_order(len(chosen), recipe.seed)
    with progress("training", total, "steps") as advance, seeded(recipe.seed):

        def on_step(step: Step) -> None:
            steps.append(step)
            advance(1)
            if step.step % recipe.log_every == 0 or step.step == total:
                LOG.info(
                    "step %d of %d: loss %.4f, penalty %.4g, learning rate %.3g",
                    step.step,
                    total,
                    step.loss,
                    step.penalty,
                    step.learning_rate,
                )
            every = recipe.evaluate_every
            if every and (step.step % every == 0 or step.step == total):
                take_metrics(f"step {step.step}")

        for epoch in range(epochs):
            if len(steps) >= total:
                break
            order = [chosen[i] for i in next(orders)]
            train_epoch(
                model.module,
                examples.batches(recipe.batch_size, order=order, epoch=epoch),
                get_likelihood(model.objective.likelihood),
                descent,
                schedule,
                penalty=start.penalty,
                penalty_step=recipe.penalty_step,
                gradient_accumulation_steps=recipe.gradient_accumulation_steps,
                max_grad_norm=recipe.max_grad_norm,
                mixed_precision=recipe.mixed_precision,
                scaler=scaler,
                first_step=len(steps),
                max_steps=total,
                norm_statistics=recipe.norm_statistics,
                on_step=on_step,
            )
            take_metrics(f"epoch {epoch + 1}", f"step {len(steps)}")
    return steps


def _length(count: int, recipe: Recipe) -> tuple[int, int]:
    """Give the epochs and the optimizer steps of a run over `count` examples."""
    per_epoch = -(-count // (recipe.batch_size * recipe.gradient_accumulation_steps))
    epochs, most = recipe.epochs, recipe.max_steps
    if epochs is None:
        epochs = 1 if most is None else -(-most // per_epoch)
    total = epochs * per_epoch
    return epochs, total if most is None else min(total, most)


def _penalty(
    kind: str,
    ewc_lambda: float | None,
    fitted: Fitted,
    **storage: Any,
) -> Penalty | None:
    if kind == "none" or ewc_lambda is None:
        return None
    model, stored = fitted.model, fitted.before
    to_module = model.layout.to_module
    if kind == "l2":
        if not fitted.free:
            return Penalty.l2(model.module, ewc_lambda=ewc_lambda, **storage)
        held = {name: torch.ones_like(p) for name, p in model.module.named_parameters()}
        for name, first in fitted.free.items():
            for at in model.layout.module_names(name):
                held[at][first:] = 0
        return Penalty(model.module, held, ewc_lambda=ewc_lambda, **storage)
    assert stored is not None  # finetune has refused by now
    # What stays in the mapped files takes no memory of its own.
    anchor = stored.anchor or {name: model.checkpoint.weights[name] for name in stored.fisher}
    penalty = Penalty(
        model.module,
        to_module(stored.fisher),
        to_module(anchor),
        ewc_lambda=ewc_lambda,
        offset=stored.ledger.penalty_offset,
        **storage,
    )
    if penalty.unprotected:
        LOG.info(
            "the penalty does not hold %d parameters, which have no Fisher: %s",
            len(penalty.unprotected),
            ", ".join(sorted(penalty.unprotected)[:5]),
        )
    return penalty


@torch.no_grad()
def _take_stored_values(model: Model, stored: Mapping[str, Tensor]) -> None:
    """Give the module the values as they are stored: F is measured at exactly these."""
    state = model.module.state_dict()
    for name, values in model.layout.to_module(stored).items():
        state[name].copy_(values)


def _share_moved(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> float:
    there = [name for name in end if name in start]  # a fresh output layer was nowhere
    moved = sum(int((start[name] != end[name].cpu()).sum()) for name in there)
    return moved / max(1, sum(end[name].numel() for name in there))


def _in_words(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value:.4f}" for key, value in metrics.items() if key != "score")
