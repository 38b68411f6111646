"""What a fine-tuning starts from: checkpoint, Fisher and data opened, the model loaded."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from consolidate.chain import Chain, find_fisher, merging_options, stored_fisher, task_name
from consolidate.commands import best_device, check_output, columns_of
from consolidate.examples import Columns, Examples, encode, label_names
from consolidate.heads import Fitted, fit_model, models_of_tasks
from consolidate.hub import FISHER, locate
from consolidate.models import Model, lacks_head, load_model
from consolidate.penalty import Penalty
from formats.checkpoint import Checkpoint, check_finite, open_checkpoint
from formats.errors import InputError
from formats.fisher_folder import StoredFisher
from formats.rows import Rows
from formats.task_file import open_task

LOG = logging.getLogger("consolidate")


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


def open_start(
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
    """Open checkpoint, Fisher and data, and refuse what would fail later.

    Args:
        checkpoint: As in `finetune`, like all others.
        data: The new task.
        target: The output folder.
        penalty: The kind of penalty.
        fisher: Where the Fisher is, if not beside the weights.
        task: The new task's name.
        objective: What is predicted.
        model: The factory of a module of the user's own.
        columns: Where the inputs and labels are.
        split: Of the data.
        overwrite: Whether the target may be replaced.
        revision: Of a checkpoint on the Hub.
        merge_rule: How the task will be merged.
        gamma: γ of ``online``.
        task_weight: The weight of the new Fisher.

    Returns:
        What was opened.

    Raises:
        InputError: Something does not fit, as in `finetune`.
        UsageError: The options contradict each other or the checkpoint.
    """
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


def load_start(
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
    gradient_checkpointing: bool,
    encoding: dict[str, Any],
) -> Start:
    """Load the model, encode the data for it, and make the penalty around its weights.

    Args:
        opened: As `open_start` gives it.
        penalty: As in `finetune`, like the others.
        ewc_lambda: λ; None without a penalty.
        penalty_dtype: Of Λ and μ in memory.
        penalty_device: Where they are.
        model: The factory of a module of the user's own.
        head: What becomes of the output layer.
        head_parameters: Patterns of its parameters.
        evaluate: Data to measure, by name.
        validation: Held-out data to choose λ by, by name.
        device: Where the model is put.
        freeze: Patterns of parameters that do not train.
        gradient_checkpointing: Whether layers keep only their inputs.
        encoding: Options of `encode`, the seed among them.

    Returns:
        What training starts from.

    Raises:
        InputError: Something does not fit, as in `finetune`.
        UsageError: The options contradict each other or the checkpoint.
    """
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
        gradient_checkpointing=gradient_checkpointing,
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
