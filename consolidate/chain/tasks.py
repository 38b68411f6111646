"""Add a task to a chain: its name, the merged Fisher, the new ledger."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consolidate.estimation.estimates import FisherDiagonal
from consolidate.ewc.fisher_merging import merge_online, merge_separate
from consolidate.ewc.overlap import fisher_overlap
from consolidate.models.model import Model, file_weights, unprotected
from consolidate.models.tensor_names import Layout
from consolidate.options import Merging
from formats.checkpoint import weight_records
from formats.digest import TensorRecord, dtype_name, set_digest
from formats.errors import InputError, UsageError
from formats.fisher_folder import StoredFisher
from formats.fisher_json import (
    BenchmarkRecord,
    Interpolation,
    LayerRecord,
    Ledger,
    TaskRecord,
    check_names,
    check_task_name,
)
from formats.tensors import shape_of
from formats.versions import program_versions


@dataclass(frozen=True)
class Training:
    """What the ledger records of how a task was trained; empty if it was only measured."""

    ewc_lambda: float | None = None
    penalty: str | None = None
    penalty_on: str | None = None
    parent: str | None = None  # set digest of the weights that training began from
    metrics: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    interpolation: Interpolation | None = None
    benchmarks: dict[str, BenchmarkRecord] | None = None  # by name in metrics


@dataclass(frozen=True)
class Encoded:
    """What the ledger records of how a task's rows became examples; None: as by default."""

    loss_on: str | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class FittedChain:
    """The tasks so far in the shapes of the model to be trained; used like `StoredFisher`."""

    ledger: Ledger
    fisher: Mapping[str, Tensor]
    anchor: Mapping[str, Tensor] | None
    heads: Mapping[str, Mapping[str, Tensor]]


Chain = StoredFisher | FittedChain


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
                "task whole: leave it out, or use --merge-rule online"
            )
        return replace(asked, merge_rule=rule, gamma=1.0)
    return replace(asked, merge_rule=rule, gamma=so_far.gamma if gamma is None else gamma)


def pending_task(chain: Chain | None, name: str | None = None) -> TaskRecord | None:
    """Give the last task of a chain if it was trained and not measured, and has this name."""
    if chain is None:
        return None
    last = chain.ledger.tasks[-1]
    return None if last.measured or name not in (None, last.name) else last


def add_task(
    before: Chain | None,
    model: Model,
    weights: Mapping[str, Tensor],  # what is stored of the model
    diagonal: FisherDiagonal | None,  # None: the task is listed as not measured
    *,
    name: str,
    data: str = "",
    data_digest: str | None = None,
    made_from: str | None = None,
    records: dict[str, TensorRecord] | None = None,  # of `weights`, where they are known already
    training: Training | None = None,
    encoded: Encoded | None = None,
    merging: Merging | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, Ledger]:
    """Merge a task's Fisher into the chain so far: Λ, μ or None where it is the weights, ledger.

    The last task of the chain, if it has this name, is measured now: it is merged as its training
    asked, and keeps what is recorded of it.
    """
    past = before or FittedChain(Ledger([]), {}, None, {})
    tasks, pending = past.ledger.tasks, pending_task(before, name)
    if pending is not None:
        asked = Merging(task_weight=pending.weight_by or pending.weight)
        tasks, merging = tasks[:-1], settled_merging(before, asked)
    merging = settled_merging(before, merging or Merging())
    rule, gamma = str(merging.merge_rule), float(merging.gamma or 0)
    total = past.fisher
    fisher = {} if diagonal is None else model.layout.to_file(diagonal)
    record = TaskRecord(
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
        **vars(training or Training()),
    )
    record = replace(
        record if pending is None else pending,
        **vars(encoded or Encoded()),
        data=data,
        data_digest=data_digest,
        made_from=made_from,
        layers=_layers(fisher, total),
        **_how_measured(diagonal),
    )
    tasks = [*tasks, record]
    apart = past.heads.get(tasks[0].name, ())
    record.weight, record.weight_by = _weight(merging.task_weight, tasks, apart)
    anchor, offset = None, 0.0
    # Either rule can follow the other: weights merged `online` are where the anchor was, and
    # `online` moves the anchor of a `separate` chain to the new weights, so that the offset is 0.
    where = past.anchor or model.checkpoint.weights
    if diagonal is None:
        merged = {at: total[at] for at in total}
        anchor, offset = {at: where[at] for at in total}, past.ledger.penalty_offset
    elif rule == "online":
        merged = merge_online(total, fisher, gamma=gamma, weight=record.weight)
    else:
        merged, anchor, offset = merge_separate(total, where, fisher, weights, weight=record.weight)
        offset += past.ledger.penalty_offset
    if anchor is not None and _same(anchor, weights):
        anchor = None
    base = past.ledger.base  # of an adapter: already compared with its base model
    if before is None and model.checkpoint.base is not None:
        base = set_digest(weight_records(model.checkpoint.base.weights))
    ledger = Ledger(
        tasks=tasks,
        merge_rule=rule,
        gamma=gamma,
        penalty_offset=offset,
        unprotected=unprotected(model, merged),
        weights=records or weight_records(weights),
        versions=program_versions(),
        heads=past.ledger.heads,
        base=base,
    )
    return merged, anchor, ledger


def _how_measured(diagonal: FisherDiagonal | None) -> dict[str, Any]:
    """Give what the ledger records of a measurement."""
    if diagonal is None:
        return {}
    names = ("examples", "units", "estimator", "mc_samples", "seed")
    return {name: getattr(diagonal, name) for name in names}


def _layers(fisher: Mapping[str, Tensor], total: Mapping[str, Tensor]) -> dict[str, LayerRecord]:
    return {
        at: LayerRecord(
            trace=float(values.double().sum()),
            overlap=fisher_overlap(values, total[at]) if at in total else None,
        )
        for at, values in fisher.items()
    }


def _same(anchor: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> bool:
    return all(
        at in weights and torch.equal(mu, weights[at].cpu().to(mu.dtype))
        for at, mu in anchor.items()
    )


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
    """Refuse two Fishers whose names are one tensor in the model."""
    seen: dict[str, str] = {}
    for name in fisher:
        other = seen.setdefault(layout.duplicates.get(name, name), name)
        if other != name:
            raise InputError(
                f"{where}: {other} and {name} are one tensor in the model, but have two Fishers: "
                "use a model in which they are two tensors, or measure the Fisher again"
            )
