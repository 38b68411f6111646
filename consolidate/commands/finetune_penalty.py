"""The penalty of a fine-tuning run, made around the weights it starts from, and its forecast."""

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from consolidate.chain.factors import module_factors
from consolidate.chain.fitted_chain import Chain
from consolidate.chain.fitted_model import Fitted
from consolidate.chain.module_penalty import adapter_penalty
from consolidate.commands.finetune_nats import Forecast, quadratic
from consolidate.ewc.block_penalty import BlockPenalty
from consolidate.ewc.low_rank_penalty import MergedPenalty
from consolidate.ewc.penalty import Penalty, WeightPenalty
from consolidate.models.lora import low_rank_layers, other_parameters
from consolidate.models.model import Model
from consolidate.models.tensor_names import NAME
from consolidate.runtime.devices import best_device, dtype_of_name
from formats.fisher_json import Block, covered

if TYPE_CHECKING:
    from consolidate.commands.finetune_plan import Plan

LOG = logging.getLogger("consolidate")

USES = "the penalty uses the matrices of %d layers, and the diagonal elsewhere"


def penalty_of(plan: "Plan", fitted: Fitted) -> WeightPenalty | None:
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


def forecast_of(plan: "Plan", fitted: Fitted, term: WeightPenalty | None) -> Forecast | None:
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
    beside = [block for name, block in blocks.items() if name not in of_layers]
    others |= _partners(model.module, others, beside)
    names = [*held, *others, *covered(of_layers)]
    files = {file for name in names for file in layout.file_names(name)}

    def of_held(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return layout.to_module({name: tensors[name] for name in tensors if name in files})

    fisher, anchor = of_held(stored.fisher), None
    if stored.anchor is not None:
        anchor = of_held(stored.anchor)
    elif source.base is not None and others:  # which may have moved away from the base model's
        around = {name: source.base.weights[name] for name in stored.fisher if name in files}
        anchor = of_held(around)
    if found is not None and (anchor is not None or stored.factor_anchor is not None):
        storage["factor_anchor"] = found["factor_anchor"]
    if found is not None and not quiet:
        of_others = [name for name, b in blocks.items() if {*b.parameters} <= {*others}]
        LOG.info(USES, len({*of_layers, *of_others}))
    how = {name: factors[name] for name in ("offset", "factors", "blocks")}
    return adapter_penalty(layers, others, fisher, anchor, **how, **storage)


def _partners(
    module: nn.Module, others: Mapping[str, nn.Parameter], blocks: Iterable[Block]
) -> dict[str, nn.Parameter]:
    """Give the frozen parameters that share a matrix with one that trains beside an adapter."""
    shared = [b.parameters for b in blocks if others.keys() & b.parameters]
    wanted = {at for parameters in shared for at in parameters} - others.keys()
    plain = ((name.replace(f".modules_to_save.{NAME}.", "."), p)
             for name, p in module.named_parameters())  # fmt: skip
    return {name: p for name, p in plain if name in wanted}


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
