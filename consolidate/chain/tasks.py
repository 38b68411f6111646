"""Add a task to a chain: its name, the merged Fisher, the new ledger."""

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consolidate.chain.factors import (
    Factors,
    MergedFactors,
    check_continued,
    factors_of,
    measured_factors,
    merged_factors,
    offset_with_factors,
)
from consolidate.chain.fitted_chain import Chain, FittedChain, pending_task
from consolidate.estimation.estimates import FisherDiagonal
from consolidate.ewc.fisher_merging import merge_online, merge_separate
from consolidate.ewc.overlap import fisher_overlap
from consolidate.models.layout import Layout
from consolidate.models.model import Model, file_weights, unprotected
from consolidate.options import Merging
from formats.checkpoint import weight_records
from formats.digest import TensorRecord, dtype_name, set_digest
from formats.errors import InputError, UsageError
from formats.fisher_folder import write_fisher
from formats.fisher_json import (
    BenchmarkRecord,
    Budget,
    Generated,
    Interpolation,
    LayerRecord,
    Ledger,
    Replayed,
    TaskRecord,
    check_names,
    check_task_name,
    covered,
)
from formats.tensors import shape_of
from formats.versions import program_versions
from formats.wording import few

LOG = logging.getLogger("consolidate")


@dataclass(frozen=True)
class Training:
    """What the ledger records of how a task was trained; empty if it was only measured."""

    ewc_lambda: float | None = None
    penalty: str | None = None
    penalty_on: str | None = None
    parent: str | None = None  # set digest of the weights that training began from
    metrics: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    interpolation: Interpolation | None = None
    replayed: Replayed | None = None
    budget: Budget | None = None
    benchmarks: dict[str, BenchmarkRecord] | None = None  # by name in metrics


@dataclass(frozen=True)
class Encoded:
    """What the ledger records of how a task's rows became examples; None: as by default."""

    loss_on: str | None = None
    max_length: int | None = None
    generated: Generated | None = None


@dataclass(frozen=True)
class Merged:
    """The Fisher of all tasks; an anchor is None where it is the weights."""

    fisher: Mapping[str, Tensor]
    anchor: Mapping[str, Tensor] | None
    offset: float
    factors: MergedFactors | None = None
    factor_offset: float = 0.0


@dataclass(frozen=True)
class Added:
    """A chain with a new task, as it is to be written."""

    ledger: Ledger
    merged: Merged
    heads: Mapping[str, Mapping[str, Tensor]]

    def write(self, folder: Path) -> Ledger:
        """Write the Fisher folder, and return the ledger as written."""
        factors = self.merged.factors
        return write_fisher(
            folder,
            self.merged.fisher,
            self.ledger,
            anchor=self.merged.anchor,
            heads=self.heads,
            factors=None if factors is None else factors.matrices,
            factor_anchor=None if factors is None else factors.anchor,
        )


def task_name(name: str | None, data: str, before: Chain | None) -> str:
    """Choose the name of a new task: the one given, else one made from the name of the data."""
    if name is None:
        name = "".join(c if c.isascii() and c.isalnum() else "-" for c in Path(data).stem)
        name = name.strip("-")[:64] or "task"
    check_task_name(name)
    if before is not None and name in [task.name for task in before.ledger.tasks]:
        raise UsageError(f"the ledger already has a task {name!r}: choose another name with --task")
    return name


def settled_merging(before: Chain | None, asked: Merging) -> Merging:
    """Choose the merge rule and γ of a new task: those given, else those of the chain so far."""
    so_far = Ledger([]) if before is None else before.ledger
    rule, gamma = asked.merge_rule or so_far.merge_rule, asked.gamma
    if rule == "separate":
        if gamma not in (None, 1.0):
            raise UsageError(
                f"--gamma {gamma} cannot be combined with --merge-rule separate, which keeps every "
                "task at full weight: leave it out, or use --merge-rule online"
            )
        return replace(asked, merge_rule=rule, gamma=1.0)
    return replace(asked, merge_rule=rule, gamma=so_far.gamma if gamma is None else gamma)


def add_task(
    before: Chain | None,
    model: Model,
    weights: Mapping[str, Tensor],  # what is stored of the model
    diagonal: FisherDiagonal | None,  # None: the task is listed as not measured
    *,
    name: str,
    merging: Merging,
    data: str = "",
    data_digest: str | None = None,
    made_from: str | None = None,
    records: dict[str, TensorRecord] | None = None,  # of `weights`, where they are known already
    training: Training | None = None,
    encoded: Encoded | None = None,
) -> Added:
    """Merge a task's Fisher into the chain so far.

    The last task of the chain, if it has this name, is measured now: it is merged as its training
    asked, and keeps what is recorded of it.
    """
    past = before or FittedChain(Ledger([]), {}, None, {})
    tasks, pending = past.ledger.tasks, pending_task(before, name)
    if pending is not None:
        tasks, merging = tasks[:-1], Merging(task_weight=pending.weight_by or pending.weight)
    merging = settled_merging(before, merging)
    fisher = {} if diagonal is None else model.layout.to_file(diagonal)
    record = replace(
        pending or _new_record(name, model, training or Training()),
        **vars(encoded or Encoded()),
        data=data,
        data_digest=data_digest,
        made_from=made_from,
        layers=_layers(fisher, past.fisher),
        **_how_measured(diagonal),
    )
    tasks = [*tasks, record]
    apart = past.heads.get(tasks[0].name, ())
    record.weight, record.weight_by = _weight(merging.task_weight, tasks, apart)
    if diagonal is None:
        merged = _unmeasured(past, model, weights)
    else:
        new = measured_factors(diagonal, model.layout)
        if new.blocks:
            check_continued(before)
        merged = _merged(past, model, weights, fisher, new, merging, record.weight)
    ledger = _ledger(past.ledger, model, tasks, merging, merged, records or weight_records(weights))
    return Added(ledger, merged, past.heads)


def _new_record(name: str, model: Model, training: Training) -> TaskRecord:
    """Give what the ledger records of a task before it is measured."""
    return TaskRecord(
        name=name,
        objective=model.objective.name,
        likelihood=model.objective.likelihood,
        labels=model.labels,
        unit=model.objective.unit,
        examples=None,
        units=None,
        estimator=None,
        mc_samples=None,
        seed=0,
        **vars(training),
    )


def _ledger(
    past: Ledger,
    model: Model,
    tasks: list[TaskRecord],
    merging: Merging,
    merged: Merged,
    weights: dict[str, TensorRecord],
) -> Ledger:
    """Give the ledger of these tasks, which continues that of the chain so far."""
    base = past.base  # of an adapter: already compared with its base model
    if not past.tasks and model.checkpoint.base is not None:
        base = set_digest(weight_records(model.checkpoint.base.weights))
    factors, own = merged.factors, merged.factor_offset != merged.offset
    return Ledger(
        tasks=tasks,
        merge_rule=str(merging.merge_rule),
        gamma=float(merging.gamma or 0),
        penalty_offset=merged.offset,
        unprotected=unprotected(model, merged.fisher),
        weights=weights,
        blocks=None if factors is None else factors.blocks,
        factor_offset=merged.factor_offset if factors is not None and own else None,
        versions=program_versions(),
        heads=past.heads,
        base=base,
    )


def with_structure(chain: Chain | None, structure: str) -> Chain | None:
    """Give a chain as a task of this structure continues it: `diagonal` leaves the factors out."""
    if structure != "diagonal" or chain is None or chain.factors is None:
        return chain
    names = few([task.name for task in chain.ledger.tasks], 5)
    LOG.info("the factors of %s are neither used nor kept: the diagonal protects all", names)
    ledger = replace(
        chain.ledger, factors=None, blocks=None, factor_anchor=None, factor_offset=None
    )
    return FittedChain(ledger, chain.fisher, chain.anchor, chain.heads)


def _unmeasured(past: Chain, model: Model, weights: Mapping[str, Tensor]) -> Merged:
    """Give the Fisher of a chain whose last task is not measured: it stays around its anchor."""
    where = past.anchor or model.checkpoint.weights
    anchor, factors = {at: where[at] for at in past.fisher}, None
    if (own := factors_of(past)) is not None and own.blocks:
        there = past.factor_anchor or model.checkpoint.weights
        around = {at: there[at] for at in own.covered}
        factors = MergedFactors(own.matrices, dict(own.blocks), _moved(around, weights), 0.0)
    fisher = {at: past.fisher[at] for at in past.fisher}
    offsets = past.ledger.penalty_offset, offset_with_factors(past.ledger)
    return Merged(fisher, _moved(anchor, weights), offsets[0], factors, offsets[1])


def _merged(
    past: Chain,
    model: Model,
    weights: Mapping[str, Tensor],
    fisher: Mapping[str, Tensor],
    new: Factors,
    merging: Merging,
    weight: float,
) -> Merged:
    """Merge a task's Fisher and its factors with those of the chain."""
    # Either rule can follow the other: weights merged `online` are where the anchor was, and
    # `online` moves the anchor of a `separate` chain to the new weights, so that the offset is 0.
    where = past.anchor or model.checkpoint.weights
    there = past.factor_anchor or model.checkpoint.weights
    rule, gamma = str(merging.merge_rule), float(merging.gamma or 0)
    factors = merged_factors(
        past, new, weights, there, fisher, rule=rule, gamma=gamma, weight=weight
    )
    if rule == "online":
        merged = merge_online(past.fisher, fisher, gamma=gamma, weight=weight)
        return Merged(merged, None, 0.0, factors)
    in_blocks = set() if factors is None else covered(factors.blocks)
    parts: list[tuple[dict[str, Tensor], dict[str, Tensor], float]] = [
        merge_separate(
            {at: past.fisher[at] for at in past.fisher if (at in in_blocks) == has_block},
            where,
            {at: values for at, values in fisher.items() if (at in in_blocks) == has_block},
            weights,
            weight=weight,
        )
        for has_block in (False, True)
    ]
    order = dict.fromkeys([*past.fisher, *fisher])
    merged = {name: parts[name in in_blocks][0][name] for name in order}
    anchor = {name: parts[name in in_blocks][1][name] for name in order}
    growth, by_diagonal = (part[2] for part in parts)
    offset = past.ledger.penalty_offset + (growth + by_diagonal)
    with_factors = offset
    if factors is not None:
        factors = factors._replace(anchor=_moved(factors.anchor or {}, weights))
        with_factors = offset_with_factors(past.ledger) + growth + factors.growth
    return Merged(merged, _moved(anchor, weights), offset, factors, with_factors)


def _moved(
    anchor: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> Mapping[str, Tensor] | None:
    """Give an anchor; None where it is the weights."""
    same = all(
        at in weights and torch.equal(mu, weights[at].cpu().to(mu.dtype))
        for at, mu in anchor.items()
    )
    return None if same else anchor


def _how_measured(diagonal: FisherDiagonal | None) -> dict[str, Any]:
    """Give what the ledger records of a measurement."""
    if diagonal is None:
        return {}
    names = ("examples", "units", "estimator", "mc_samples", "seed")
    return {name: getattr(diagonal, name) for name in names}


def _layers(fisher: Mapping[str, Tensor], total: Mapping[str, Tensor]) -> dict[str, LayerRecord]:
    return {
        at: LayerRecord(
            trace=float(values.cpu().double().sum()),  # MPS has no float64
            overlap=fisher_overlap(values, total[at]) if at in total else None,
        )
        for at, values in fisher.items()
    }


def check_names_to_be(before: Chain | None, model: Model) -> None:
    """Refuse, before a pass, a model whose protection the ledger after it could not record."""
    where = str(model.checkpoint.path)
    trained = [name for name, p in model.module.named_parameters() if p.requires_grad]
    weights, past = file_weights(model), {} if before is None else before.fisher
    shapes = {name: shape_of(past, name) for name in past}
    for name in trained:
        for at in model.layout.file_names(name):
            shapes.setdefault(at, weights.shape(at))
    check_held_once(shapes, model.layout, where)
    check_names(
        Ledger(
            [],
            unprotected=unprotected(model, shapes),
            weights={
                at: TensorRecord(dtype_name(weights.dtype(at)), weights.shape(at), "")
                for at in weights
            },
            fisher={at: TensorRecord("F32", shape, "") for at, shape in shapes.items()},
        ),
        where,
    )


def _weight(
    asked: float | str, tasks: Sequence[TaskRecord], apart: Collection[str]
) -> tuple[float, str | None]:
    """Give the last task's weight: a number, or w_1 n_t/n_1 by units, or w_1 tr F_1 / tr F_t.

    Of a task that is not measured yet, also what the weight will be computed by.
    """
    if not isinstance(asked, str):
        return float(asked), None
    if not tasks[-1].measured:
        return 1.0, asked
    return _computed_weight(asked, tasks, apart), None


def _computed_weight(asked: str, tasks: Sequence[TaskRecord], apart: Collection[str]) -> float:
    first, new = tasks[0], tasks[-1]
    if first is new:
        return 1.0
    scale = first.weight or 1.0
    if asked == "units":
        units = [task.units for task in tasks if task.units is not None]
        return scale * units[-1] / units[0]
    # A saved head of the first task is not common to both.
    common = (first.layers.keys() & new.layers.keys()) - set(apart)
    past, present = (math.fsum(task.layers[at].trace for at in common) for task in (first, new))
    # A Fisher of zero protects nothing at any weight, and no weight can match it.
    return scale * (past / present if past > 0 and present > 0 else 1.0)


def check_held_once(fisher: Iterable[str], layout: Layout, where: str) -> None:
    """Refuse a Fisher under a second name of a tensor, where it is to be under the first too."""
    seen: dict[str, str] = {}
    for name in fisher:
        other = seen.setdefault(layout.duplicates.get(name, name), name)
        if other != name:
            raise InputError(
                f"{where}: {other} and {name} are one tensor in the model: expected one Fisher, "
                "under the name that the model lists first: use a model in which they are two "
                "tensors, or measure the Fisher again"
            )
