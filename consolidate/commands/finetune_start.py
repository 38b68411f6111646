"""What a fine-tuning starts from: checkpoint, Fisher and data opened, the model loaded."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from consolidate.chain.fingerprint import checkpoint_content, rows_content
from consolidate.chain.heads import Fitted, fit_model, models_of_tasks
from consolidate.chain.opening import find_fisher, stored_fisher, with_base
from consolidate.chain.output import check_output
from consolidate.chain.tasks import Chain, check_names_to_be, merging_options, task_name
from consolidate.data.columns import Columns, columns_of
from consolidate.data.encoding import encode
from consolidate.data.examples import Examples
from consolidate.data.labels import label_names
from consolidate.ewc.low_rank_penalty import MergedPenalty
from consolidate.ewc.penalty import Penalty, WeightPenalty
from consolidate.models.adapters import load
from consolidate.models.architectures import lacks_head
from consolidate.models.lora import Lora, adapt, low_rank_layers, other_parameters
from consolidate.models.model import Model
from consolidate.runtime.devices import best_device
from consolidate.runtime.shards import shard
from formats.checkpoint import Checkpoint, check_finite, open_checkpoint, weight_records
from formats.digest import TensorRecord
from formats.errors import InputError, UsageError
from formats.fisher_folder import LEDGER_NAME, StoredFisher
from formats.hub import FISHER, commits_of, locate
from formats.rows import Rows
from formats.task_file import TaskFile, open_task

LOG = logging.getLogger("consolidate")


@dataclass(frozen=True)
class Opened:
    """What a run reads, checked before anything of it is loaded."""

    source: Checkpoint
    before: StoredFisher | None  # the chain so far
    holding: StoredFisher | None  # what the penalty is made of: that, or the base model's
    penalty_on: str | None  # "adapter" or "merged" where an adapter is trained with a penalty
    task_file: TaskFile
    rows: Rows
    task: str
    objective: str | None
    columns: Columns
    merge_rule: str
    gamma: float

    def records(self) -> dict[str, TensorRecord]:
        """Give the digests of the weights; those of a ledger have been compared with them."""
        if self.before is None:
            return weight_records(self.source.weights)
        return self.before.ledger.weights

    def content(self) -> dict[str, Any]:
        """Describe what is opened by content, JSON-ready."""
        base, holding = self.source.base, self.holding
        own = None if self.before is None else self.before.folder / LEDGER_NAME
        content = checkpoint_content(self.source, own, self.records())
        if base is not None:
            of_base = None if holding is None or holding is self.before else holding
            content["base"] = checkpoint_content(
                base,
                None if of_base is None else of_base.folder / LEDGER_NAME,
                weight_records(base.weights) if of_base is None else of_base.ledger.weights,
            )
        return {
            "checkpoint": content,
            "data": rows_content(self.task_file, self.rows),
        }

    def commits(self) -> dict[str, str]:
        """Give the commits of what came from the Hub."""
        return commits_of(self.source.path, None if self.before is None else self.before.folder)


@dataclass(frozen=True)
class Start:
    """What a run starts from; training changes the model in place."""

    model: Model
    before: Chain | None  # as the model has a place for it
    examples: Examples
    evaluations: dict[str, Examples]
    held_out: dict[str, Examples]  # to choose λ by
    with_heads: dict[str, Model]  # by evaluation, of tasks with a head of their own
    penalty: WeightPenalty | None
    frozen: list[nn.Parameter] | None = None  # for a fresh adapter; None where there is none


def open_start(
    checkpoint: str | Path,
    data: str | Path,
    target: Path | None,
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
    base_model: str | Path | None,
    lora: Lora | None,
    penalty_on: str | None,
    merge_rule: str | None,
    gamma: float | None,
    task_weight: float | str,
) -> Opened:
    """Open checkpoint, Fisher and data, and refuse what would fail later.

    Args:
        checkpoint: As in `finetune`, like all others.
        data: The new task.
        target: The output folder; None if it is checked elsewhere.
        penalty: The kind of penalty.
        fisher: Where the Fisher is, if not beside the weights.
        task: The new task's name.
        objective: What is predicted.
        model: The factory of a module of the user's own.
        columns: Where the inputs and labels are.
        split: Of the data.
        overwrite: Whether the target may be replaced.
        revision: Of a checkpoint on the Hub.
        base_model: Of a checkpoint that is an adapter.
        lora: A fresh adapter to train in place of the weights.
        penalty_on: What the penalty is on where an adapter is trained.
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
    source = with_base(open_checkpoint(folder), base_model)
    if target is not None:
        check_output(target, source, overwrite=overwrite, whole=True)
    penalty_on = _penalty_on(penalty_on, penalty, source, lora, fisher)
    of_base = source.base is not None and penalty_on == "merged"
    stored_at = find_fisher(folder, None if of_base else fisher)
    before = None if stored_at is None else stored_fisher(stored_at, source)
    holding = before
    if of_base and penalty == "ewc":
        assert source.base is not None
        place = find_fisher(source.base.path, fisher)
        holding = None if place is None else stored_fisher(place, source.base)
        checkpoint, folder = source.base.path, source.base.path
    if holding is None and penalty == "ewc":
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
        holding=holding,
        penalty_on=penalty_on,
        task_file=task_file,
        rows=rows,
        task=task_name(task or task_file.name, rows.name, before),
        objective=objective or task_file.objective,
        columns=columns_of(columns, task_file.columns()),
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
    lora: Lora | None,
    encoding: dict[str, Any],
    shards_among: ProcessGroup | None = None,
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
        lora: A fresh adapter to train in place of the weights.
        encoding: Options of `encode`, the seed among them.
        shards_among: Processes that each hold a shard of the model; None where each holds all.

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
    load_as = partial(
        load,
        objective=objective,
        factory=model,
        seed=encoding["seed"] + learned,  # heads that begin alike compete for the same features
        # Master weights: small updates vanish in bf16. Shards are widened one block at a time.
        dtype=torch.float32 if shards_among is None else None,
        device=best_device(device) if shards_among is None else "cpu",
        freeze=freeze,
        gradient_checkpointing=gradient_checkpointing,
    )
    fitted = fit_model(
        load_as,
        source,
        opened.before,
        opened.rows,
        opened.columns,
        head=head,
        patterns=head_parameters,
        new_labels=new_labels,
    )
    loaded, before = fitted.model, fitted.before
    check_names_to_be(before, loaded)
    with_heads: dict[str, Model] = {}
    if before is not None:
        tasks = {name: name for name in (*evaluate, *validation)}
        with_heads = models_of_tasks(load_as, loaded, before, tasks)
    if shards_among is not None:
        if lora is not None or source.adapter is not None:
            raise UsageError("--shard cuts whole models, not adapters: leave it out")
        if with_heads:
            raise UsageError(
                f"--shard cannot measure {next(iter(with_heads))}, which has an output layer of "
                "its own: evaluate it afterwards"
            )
        shard(loaded.module, shards_among, best_device(device), torch.float32)
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
    frozen = None
    if lora is not None:
        whole = {*fitted.free, *loaded.layout.fresh}
        frozen = adapt(loaded, lora, whole, with_heads.values(), seed=encoding["seed"])
    term = _penalty(penalty, ewc_lambda, fitted, opened, **storage)
    if before is not None and penalty != "ewc":
        LOG.info(
            "the Fisher of %s does not hold the weights in this run; it is kept, around %s",
            ", ".join(task.name for task in before.ledger.tasks),
            "the weights as they will be" if opened.merge_rule == "online" else "its anchor",
        )
    return Start(loaded, before, examples, evaluations, held_out, with_heads, term, frozen)


def _penalty_on(
    asked: str | None, penalty: str, source: Checkpoint, lora: Lora | None, fisher: object
) -> str | None:
    """Choose what the penalty is on where an adapter is trained."""
    if lora is not None and source.adapter is not None:
        raise UsageError(f"{source.path} is an adapter already: leave --lora-rank out")
    if lora is None and source.adapter is None:
        if asked is not None:
            raise UsageError(
                f"--penalty-on {asked} is for adapters: use it with --lora-rank, or a checkpoint "
                "that is one"
            )
        return None
    if penalty == "none":
        if asked is not None:
            raise UsageError("--penalty-on has no meaning with --penalty none: leave it out")
        return None
    if asked == "adapter" and lora is not None and penalty == "ewc":
        raise UsageError(
            "--penalty-on adapter needs the Fisher of an adapter, and a fresh one has none: start "
            "from an adapter that `consolidate fisher` has measured, or use --penalty-on merged"
        )
    if asked is None:
        own = source.adapter is not None and find_fisher(source.path, None) is not None
        asked = "adapter" if own else "merged"
    return asked


def _penalty(
    kind: str,
    ewc_lambda: float | None,
    fitted: Fitted,
    opened: Opened,
    **storage: Any,
) -> WeightPenalty | None:
    if kind == "none" or ewc_lambda is None:
        return None
    model, stored = fitted.model, fitted.before
    penalty: WeightPenalty
    if opened.penalty_on == "merged":
        of_base = model.base_layout is not None
        penalty = _merged_penalty(
            kind, ewc_lambda, fitted, opened.holding if of_base else stored, **storage
        )
    elif kind == "l2":
        if not fitted.free:
            return Penalty.l2(model.module, ewc_lambda=ewc_lambda, **storage)
        held = _alike(fitted, dict(model.module.named_parameters()))
        return Penalty(model.module, held, ewc_lambda=ewc_lambda, **storage)
    else:
        assert stored is not None  # finetune has refused by now
        # What stays in the mapped files takes no memory of its own.
        anchor = stored.anchor or {name: model.checkpoint.weights[name] for name in stored.fisher}
        to_module = model.layout.to_module
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


def _merged_penalty(
    kind: str, ewc_lambda: float, fitted: Fitted, stored: Chain | None, **storage: Any
) -> MergedPenalty:
    """Hold the weights that an adapter changes, and what trains beside it, by a whole Fisher."""
    model = fitted.model
    layers, others = low_rank_layers(model.module), other_parameters(model.module)
    held = {**{name: layer.weight for name, layer in layers.items()}, **others}
    anchor = None
    if kind == "l2":
        fisher, offset = _alike(fitted, held), 0.0
    else:
        assert stored is not None  # finetune has refused by now
        layout = model.base_layout or model.layout
        files = {file for name in held for file in layout.file_names(name)}

        def of_held(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return layout.to_module({name: tensors[name] for name in tensors if name in files})

        fisher, offset = of_held(stored.fisher), stored.ledger.penalty_offset
        if stored.anchor is not None:
            anchor = of_held(stored.anchor)
    beside = Penalty(
        others.items(),
        {name: values for name, values in fisher.items() if name in others},
        anchor,
        ewc_lambda=ewc_lambda,
        **storage,
    )
    return MergedPenalty(
        layers, fisher, anchor, ewc_lambda=ewc_lambda, offset=offset, beside=beside, **storage
    )


def _alike(fitted: Fitted, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give Λ = 1, but 0 in rows that are new."""
    held = {
        name: torch.ones((), dtype=p.dtype, device=p.device).expand(p.shape)
        for name, p in parameters.items()
    }
    for name, first in fitted.free.items():
        for at in fitted.model.layout.module_names(name):
            if at in held:
                held[at] = held[at].clone()
                held[at][first:] = 0
    return held
