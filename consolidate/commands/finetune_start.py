"""What a fine-tuning run starts from: the model loaded, the data encoded, the penalty made."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed import ProcessGroup

from consolidate.chain.fitted_chain import Chain
from consolidate.chain.fitted_model import Fitted, fit_model
from consolidate.chain.heads import check_labels, head_tensors, models_of_tasks
from consolidate.chain.tasks import check_names_to_be
from consolidate.commands.finetune_nats import Forecast
from consolidate.commands.finetune_penalty import forecast_of, penalty_of
from consolidate.data.benchmarks import Benchmark, open_benchmark
from consolidate.data.columns import can_have_loss, of_rows
from consolidate.data.encoding import encode, log_images
from consolidate.data.examples import Examples
from consolidate.data.labels import label_names
from consolidate.data.replay import Replay, check_alike
from consolidate.ewc.penalty import WeightPenalty
from consolidate.models.adapters import load, refuse_unmergeable
from consolidate.models.architectures import lacks_head
from consolidate.models.lora import adapt, low_rank_layers
from consolidate.models.model import Model
from consolidate.options import REPLAY_SHARE, Columns, FinetuneOptions
from consolidate.runtime.devices import best_device
from consolidate.runtime.shards import shard
from formats.checkpoint import Checkpoint
from formats.errors import UsageError
from formats.rows import Rows
from formats.task_file import TaskFile, open_task
from formats.tensors import dtype_of
from formats.wording import first_line

if TYPE_CHECKING:
    from consolidate.commands.finetune_plan import Plan

LOG = logging.getLogger("consolidate")


@dataclass(frozen=True)
class Start:
    """What a run starts from; training changes the model in place."""

    model: Model
    before: Chain | None  # fitted to the model
    examples: Examples
    evaluations: dict[str, Examples | Benchmark]
    held_out: dict[str, Examples]  # to choose λ and α by
    with_heads: dict[str, Model]  # by evaluation, of tasks with a head of their own
    penalty: WeightPenalty | None
    frozen: list[nn.Parameter] | None = None  # for a fresh adapter; None where there is none
    fresh: Mapping[str, int] = field(default_factory=dict)  # by file name, the first new row
    forecast: Forecast | None = None  # None: no Fisher of earlier tasks
    replay: Replay | None = None


def load_start(plan: "Plan", shards_among: ProcessGroup | None) -> Start:
    """Load the model, encode the data for it, and make the penalty around its weights.

    `shards_among` are processes that have a shard each; None where each has the whole model.
    """
    opened = plan.opened
    benchmarks = {
        name: open_benchmark(spec, limit=plan.options.gate.benchmark_limit, seed=plan.recipe.seed)
        for name, spec in plan.benchmarks.items()
    }
    fitted, load_as = _fit(plan, whole=shards_among is None)
    loaded, before = fitted.model, fitted.before
    check_names_to_be(before, loaded)
    if before is not None and not before.fisher and plan.options.measuring.no_fisher:
        raise UsageError(
            "--no-fisher: the Fisher so far covers the old head alone, so nothing would protect "
            "the earlier tasks: leave --no-fisher out"
        )
    with_heads: dict[str, Model] = {}
    if before is not None:
        tasks = {name: name for name in (*plan.evaluate, *plan.validation)}
        with_heads = models_of_tasks(load_as, loaded, before, tasks)
    if shards_among is not None:
        _shard(plan, loaded, with_heads, shards_among)
    loss_on = plan.options.encoding.loss_on
    examples = _encode(plan, opened.rows, loaded, opened.columns, loss_on)
    for name, benchmark in benchmarks.items():
        benchmark.check(with_heads.get(name, loaded))
    rows = {name: spec for name, spec in plan.evaluate.items() if name not in benchmarks}
    encoded = _encode_named(plan, rows, loaded, with_heads)
    evaluations = {
        name: benchmarks[name] if name in benchmarks else encoded[name] for name in plan.evaluate
    }
    held_out = _encode_named(plan, plan.validation, loaded, with_heads)
    replay = _encode_replay(plan, loaded, examples)
    log_images(examples, *encoded.values(), *held_out.values())
    frozen, penalty, forecast = _penalized(plan, fitted, with_heads)
    if before is not None and plan.options.penalty.penalty != "ewc":
        _report_unused_fisher(plan)
    fresh = dict(fitted.free)
    if plan.options.head.head != "extend":  # which keeps the rows that are there
        fresh |= dict.fromkeys(loaded.layout.fresh, 0)
    return Start(
        model=loaded,
        before=before,
        examples=examples,
        evaluations=evaluations,
        held_out=held_out,
        with_heads=with_heads,
        penalty=penalty,
        frozen=frozen,
        fresh=fresh,
        forecast=forecast,
        replay=replay,
    )


def _penalized(
    plan: "Plan", fitted: Fitted, with_heads: Mapping[str, Model]
) -> tuple[list[nn.Parameter] | None, WeightPenalty | None, Forecast | None]:
    """Add the adapter, if any, and make the penalty; return what froze, and its forecast last."""
    if plan.lora is None:
        penalty = penalty_of(plan, fitted)
        return None, penalty, forecast_of(plan, fitted, penalty)
    forecast = forecast_of(plan, fitted, None)  # before the adapter freezes the weights
    loaded = fitted.model
    whole = {*fitted.free, *loaded.layout.fresh, *_head(plan, loaded)}
    try:
        frozen = adapt(loaded, plan.lora, whole, with_heads.values(), seed=plan.recipe.seed)
    except ValueError as error:  # of peft, about layers that it does not adapt
        raise UsageError(f"--lora-targets: {first_line(error)}") from error
    refuse_unmergeable(loaded.module)
    _check_adapted(loaded, fitted.before, with_heads)
    return frozen, penalty_of(plan, fitted), forecast


def _report_unused_fisher(plan: "Plan") -> None:
    moves = plan.opened.merging.merge_rule == "online" and not plan.options.measuring.no_fisher
    LOG.info(
        "the penalty does not use the Fisher of %s; the output keeps it, around %s",
        ", ".join(plan.opened.old_tasks),
        "the new weights" if moves else "its anchor",
    )


def _check_adapted(model: Model, before: Chain | None, with_heads: Collection[str]) -> None:
    """Refuse an adapter on a layer in whose place a measured task has a head of its own."""
    layers = low_rank_layers(model.module)
    for task in with_heads:
        assert before is not None
        own = {at for file in before.heads[task] for at in model.layout.module_names(file)}
        if both := sorted(own & layers.keys()):
            raise UsageError(
                f"--lora-targets: an adapter on {both[0]} would also change the saved head of "
                f"{task}: leave that layer out (--lora-train-head trains it whole)"
            )


def _head(plan: "Plan", model: Model) -> list[str]:
    """Name the tensors of a kept head that trains whole beside an adapter; report a frozen one."""
    head = plan.options.head
    if head.head != "keep":
        return []
    if not plan.options.adapter.lora_train_head:
        if not model.objective.language and not model.layout.fresh:
            LOG.info("the head is frozen: --lora-train-head trains it beside the adapter")
        return []
    names = head_tensors(model, head.head_parameters)
    if not names:
        raise UsageError(
            f"{model.checkpoint.path} has no head of its own to train, as its output is tied to "
            "other weights: leave --lora-train-head out"
        )
    parameters = dict(model.module.named_parameters())
    parts = [parameters[at] for name in names for at in model.layout.module_names(name)]
    if not any(part.requires_grad for part in parts):
        raise UsageError(
            "--freeze freezes the head, which --lora-train-head is to train: leave one of them out"
        )
    return names


def _fit(plan: "Plan", *, whole: bool) -> tuple[Fitted, partial[Model]]:
    """Load the model with a head for the data's labels, and give the function that loads it."""
    options, opened = plan.options, plan.opened
    source, objective, factory = opened.source, opened.objective, options.source.model
    new_labels = None
    if factory is None and objective and lacks_head(source, objective):
        new_labels = label_names(opened.rows, objective, opened.columns)
    device = best_device(options.source.device)
    load_as = partial(
        load,
        objective=objective,
        factory=factory,
        # Heads that begin alike compete for the same features.
        seed=plan.recipe.seed + len(opened.old_tasks),
        # Master weights: small updates vanish in bf16. Shards are widened one block at a time.
        dtype=master_dtype(source, options) if whole else None,
        device=device if whole else "cpu",
        freeze=options.parameters.freeze,
        gradient_checkpointing=options.parameters.gradient_checkpointing,
    )
    fitted = fit_model(
        load_as,
        source,
        plan.before,
        opened.rows,
        opened.columns,
        head=options.head.head,
        patterns=options.head.head_parameters,
        new_labels=new_labels,
    )
    return fitted, load_as


def master_dtype(source: Checkpoint, options: FinetuneOptions) -> torch.dtype:
    """Return the dtype to train in: float32, or float64 where all weights are stored in it."""
    stored = {dtype_of(source.weights, name) for name in source.weights}
    if {one for one in stored if one.is_floating_point} != {torch.float64}:
        return torch.float32
    narrow = options.recipe.mixed_precision != "no"  # autocast leaves float64 as it is
    narrow |= best_device(options.source.device).type == "mps"
    return torch.float32 if narrow else torch.float64


def _shard(
    plan: "Plan", model: Model, with_heads: Mapping[str, Model], among: ProcessGroup
) -> None:
    """Give each process its shard of the model."""
    if plan.lora is not None or plan.opened.source.adapter is not None:
        raise UsageError("--shard is for whole models, not for adapters: leave it out")
    if with_heads:
        raise UsageError(
            f"--shard cannot measure {next(iter(with_heads))}, which has a task-specific head: "
            "evaluate it afterwards"
        )
    shard(model.module, among, best_device(plan.options.source.device), torch.float32)


def _encode_named(
    plan: "Plan", data: Mapping[str, str | Path], model: Model, with_heads: Mapping[str, Model]
) -> dict[str, Examples]:
    """Encode test data, each for the model that it is measured with."""
    encoded = {}
    opened = {name: open_task(spec) for name, spec in data.items()}
    known = {*plan.opened.rows.columns, *(c for _, rows in opened.values() for c in rows.columns)}
    for name, (task_file, rows) in opened.items():
        columns = _columns_of(plan, task_file, rows, known if model.objective.language else ())
        loss_on = _loss_on(plan, rows, columns, name)
        encoded[name] = _encode(plan, rows, with_heads.get(name, model), columns, loss_on)
    return encoded


def _columns_of(plan: "Plan", task_file: TaskFile, rows: Rows, known: Collection[str]) -> Columns:
    """Name the columns of test data: as their task file does, else as the new task's.

    The new task's names of known columns that the rows lack are left out, and where the task file
    names what the model reads, so are all others that they lack.
    """
    columns = asdict(of_rows(plan.opened.columns, rows, known))
    stated = task_file.columns()
    if stated.keys() - {"label", "target"}:
        there = {"label", "target"} | {r for r, name in columns.items() if name in rows.columns}
        columns = {role: name for role, name in columns.items() if role in there}
    return Columns(**{**columns, **stated})


def _encode_replay(plan: "Plan", model: Model, new: Examples) -> Replay | None:
    """Encode the rows that are replayed, for the model's own head; None where there are none."""
    if plan.replay is None:
        return None
    task_file, rows = plan.replay
    named = {role: name for role, name in asdict(plan.opened.columns).items() if name is not None}
    if model.objective.language:  # any text will do
        named = {role: name for role, name in named.items() if name in rows.columns}
    columns = Columns(**{**named, **task_file.columns()})
    check_labels(rows, model, columns, remedy="replay rows with the labels of this head")
    loss_on = _loss_on(plan, rows, columns, rows.name)
    examples = _encode(plan, rows, model, columns, loss_on)
    check_alike(new, examples, rows.name, plan.opened.rows.name)
    for note in examples.notes_on():
        LOG.info("replay of %s: %s", rows.name, note)
    share = plan.options.replaying.replay_share or REPLAY_SHARE
    return Replay(examples, Fraction(str(share)))  # the decimal that was written


def _loss_on(plan: "Plan", rows: Rows, columns: Columns, name: str) -> str | None:
    """Choose the tokens that the loss is on: as asked, where the rows have such."""
    loss_on = plan.options.encoding.loss_on
    if loss_on is not None and not can_have_loss(rows, columns, loss_on):
        LOG.info("%s has no tokens for --loss-on %s: the default is used", name, loss_on)
        return None
    return loss_on


def _encode(
    plan: "Plan", rows: Rows, model: Model, columns: Columns, loss_on: str | None
) -> Examples:
    encoding = replace(plan.options.encoding, columns=columns, loss_on=loss_on)
    return encode(rows, model, encoding, seed=plan.recipe.seed)
