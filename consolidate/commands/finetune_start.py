"""What a fine-tuning run starts from: the model loaded, the data encoded, the penalty made."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from consolidate.chain.factors import module_factors
from consolidate.chain.fitted_chain import Chain
from consolidate.chain.fitted_model import Fitted, fit_model
from consolidate.chain.heads import check_labels, head_tensors, models_of_tasks
from consolidate.chain.modules import adapter_penalty
from consolidate.chain.tasks import check_names_to_be
from consolidate.commands.finetune_nats import Forecast, quadratic
from consolidate.data.benchmarks import Benchmark, open_benchmark
from consolidate.data.columns import can_have_loss
from consolidate.data.encoding import encode, log_images
from consolidate.data.examples import Examples
from consolidate.data.labels import label_names
from consolidate.data.replay import Replay, check_alike
from consolidate.ewc.block_penalty import BlockPenalty
from consolidate.ewc.low_rank_penalty import MergedPenalty
from consolidate.ewc.penalty import Penalty, WeightPenalty
from consolidate.models.adapters import load
from consolidate.models.architectures import lacks_head
from consolidate.models.lora import adapt, low_rank_layers, other_parameters
from consolidate.models.model import Model
from consolidate.options import REPLAY_SHARE, Columns
from consolidate.runtime.devices import best_device, dtype_of_name
from consolidate.runtime.shards import shard
from formats.errors import UsageError
from formats.fisher_json import Block, covered
from formats.rows import Rows
from formats.task_file import open_task

if TYPE_CHECKING:
    from consolidate.commands.finetune_plan import Plan

LOG = logging.getLogger("consolidate")

USES = "the penalty uses the matrices of %d layers, and the diagonal elsewhere"


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


def load_start(plan: "Plan", shards_among: ProcessGroup | None = None) -> Start:
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
    frozen, forecast = None, None
    if plan.lora is not None:
        forecast = _forecast(plan, fitted, None)  # before the adapter freezes the weights
        whole = {*fitted.free, *loaded.layout.fresh, *_head(plan, loaded)}
        frozen = adapt(loaded, plan.lora, whole, with_heads.values(), seed=plan.recipe.seed)
    term = _penalty(plan, fitted)
    if plan.lora is None:
        forecast = _forecast(plan, fitted, term)
    if before is not None and plan.options.penalty.penalty != "ewc":
        online = opened.merging.merge_rule == "online"
        LOG.info(
            "the penalty does not use the Fisher of %s; the output keeps it, around %s",
            ", ".join(opened.old_tasks),
            "the new weights" if online else "its anchor",
        )
    fresh = dict(fitted.free)
    if plan.options.head.head != "extend":  # which keeps the rows that are there
        fresh |= dict.fromkeys(loaded.layout.fresh, 0)
    return Start(
        loaded,
        before,
        examples,
        evaluations,
        held_out,
        with_heads,
        term,
        frozen,
        fresh,
        forecast,
        replay,
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
    free = options.penalty.penalty == "none" and factory is None
    if free and objective and lacks_head(source, objective):
        new_labels = label_names(opened.rows, objective, opened.columns)
    load_as = partial(
        load,
        objective=objective,
        factory=factory,
        # Heads that begin alike compete for the same features.
        seed=plan.recipe.seed + len(opened.old_tasks),
        # Master weights: small updates vanish in bf16. Shards are widened one block at a time.
        dtype=torch.float32 if whole else None,
        device=best_device(options.source.device) if whole else "cpu",
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
    for name, spec in data.items():
        task_file, rows = open_task(spec)
        # A task file of its own knows better than the options, which are the new task's.
        columns = Columns(**{**asdict(plan.opened.columns), **task_file.columns()})
        loss_on = _loss_on(plan, rows, columns, name)
        encoded[name] = _encode(plan, rows, with_heads.get(name, model), columns, loss_on)
    return encoded


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


def _penalty(plan: "Plan", fitted: Fitted) -> WeightPenalty | None:
    """Make the penalty around the weights that the model has now."""
    asked, opened = plan.options.penalty, plan.opened
    if asked.penalty == "none":
        return None
    model, stored = fitted.model, fitted.before
    place = None if asked.penalty_device is None else best_device(asked.penalty_device)
    storage: dict[str, Any] = {"dtype": dtype_of_name(asked.penalty_dtype), "device": place}
    # Where λ is searched for, or follows a budget, 1 until one is chosen.
    chosen = plan.search is not None or plan.options.search.budget is not None
    storage["ewc_lambda"] = 1.0 if chosen else plan.options.search.ewc_lambda
    penalty: WeightPenalty
    if opened.penalty_on == "merged":
        of_base = model.base_layout is not None
        chain = opened.protecting if of_base else stored
        uses = opened.uses_factors
        penalty = _merged_penalty(asked.penalty, fitted, chain, with_factors=uses, **storage)
    elif asked.penalty == "l2":
        if not fitted.free:
            return Penalty.l2(model.module, **storage)
        alike = _alike(fitted, dict(model.module.named_parameters()))
        return Penalty(model.module, alike, **storage)
    else:
        assert stored is not None  # the plan has refused by now
        penalty = _fisher_penalty(model, stored, with_factors=opened.uses_factors, **storage)
    if penalty.unprotected:
        LOG.info(
            "%d parameters have no Fisher and are not penalized: %s",
            len(penalty.unprotected),
            ", ".join(sorted(penalty.unprotected)[:5]),
        )
    return penalty


def _forecast(plan: "Plan", fitted: Fitted, term: WeightPenalty | None) -> Forecast | None:
    """Prepare to predict what the earlier tasks lose, whatever the penalty of the run is.

    `term` is the run's penalty on the weights themselves; it also predicts where it is that of the
    Fisher as stored.
    """
    opened, chain, asked = plan.opened, fitted.before, plan.options.penalty
    of_base = opened.protecting is not opened.before and asked.penalty == "ewc"
    ledger = opened.protecting.ledger if of_base and opened.protecting is not None else None
    if ledger is None:
        if chain is None or not chain.fisher:
            return None
        ledger = chain.ledger
    if term is not None and asked.penalty == "ewc" and asked.penalty_dtype is None:
        return Forecast(ledger, lambda: term, quadratic(term))
    how: dict[str, Any] = {"ewc_lambda": 1.0, "device": "cpu", "quiet": True}
    how["with_factors"] = opened.uses_factors
    if of_base:  # under an adapter that stays one
        # Made now: what trains beside the adapter is where it begins.
        merged = _merged_penalty("ewc", fitted, opened.protecting, **how)
        return Forecast(ledger, lambda: merged, merged.value())
    assert chain is not None
    # Made when it is used: what the file stores in another form is copied for it.
    make = partial(_fisher_penalty, fitted.model, chain, **how)
    return Forecast(ledger, make, make().value())


def _fisher_penalty(
    model: Model, stored: Chain, *, with_factors: bool, quiet: bool = False, **storage: Any
) -> WeightPenalty:
    """Protect a model's weights by the Fisher of the earlier tasks."""
    # What stays in the mapped files takes no memory of its own.
    weights, to_module = model.checkpoint.weights, model.layout.to_module
    anchor = stored.anchor or {name: weights[name] for name in stored.fisher}
    fisher, around = to_module(stored.fisher), to_module(anchor)
    factors = module_factors(stored, model.layout, weights) if with_factors else None
    if factors is None:
        offset = stored.ledger.penalty_offset
        return Penalty(model.module, fisher, around, offset=offset, **storage)
    if not quiet:
        LOG.info(USES, len(factors["blocks"]))
    return BlockPenalty(model.module, fisher, around, **factors, **storage)


def _merged_penalty(
    kind: str,
    fitted: Fitted,
    stored: Chain | None,
    *,
    with_factors: bool,
    quiet: bool = False,
    **storage: Any,
) -> MergedPenalty:
    """Protect the weights that an adapter changes, and what trains beside it, by a whole Fisher."""
    model = fitted.model
    layers, others = low_rank_layers(model.module), other_parameters(model.module)
    held = {**{name: layer.weight for name, layer in layers.items()}, **others}
    if kind == "l2":
        fisher = _alike(fitted, held)
        own = {name: values for name, values in fisher.items() if name in others}
        whole = Penalty(others.items(), own, **storage)
        return MergedPenalty(layers, fisher, beside=whole, **storage)
    assert stored is not None  # finetune has refused by now
    layout, source = model.base_layout or model.layout, model.checkpoint
    found = None
    if with_factors:
        weights = source.weights if source.base is None else source.base.weights
        found = module_factors(stored, layout, weights)
    factors = found or {"offset": stored.ledger.penalty_offset, "factors": {}, "blocks": {}}
    blocks: Mapping[str, Block] = factors["blocks"]
    of_layers = {name: b for name, b in blocks.items() if b.parameters[0] in layers}
    names = [*held, *covered(of_layers)]
    files = {file for name in names for file in layout.file_names(name)}

    def of_held(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return layout.to_module({name: tensors[name] for name in tensors if name in files})

    fisher, anchor = of_held(stored.fisher), None
    if stored.anchor is not None:
        anchor = of_held(stored.anchor)
    if found is not None and (anchor is not None or stored.factor_anchor is not None):
        storage["factor_anchor"] = found["factor_anchor"]
    if found is not None and not quiet:
        of_others = [name for name, b in blocks.items() if {*b.parameters} <= {*others}]
        LOG.info(USES, len({*of_layers, *of_others}))
    how = {name: factors[name] for name in ("offset", "factors", "blocks")}
    return adapter_penalty(layers, others, fisher, anchor, **how, **storage)


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
