"""Merge whole checkpoints, tensor by tensor: weights, Fishers, anchors and ledgers."""

import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from consolidate.chain.claims import claiming
from consolidate.chain.factors import Factors, factors_of, offset_with_factors
from consolidate.chain.fingerprint import checkpoint_content, plain, versions
from consolidate.chain.opening import stored_fisher
from consolidate.chain.output import refuse_existing
from consolidate.chain.fitted_chain import pending_task
from consolidate.chain.up_to_date import cached, factor_totals, find_output
from consolidate.commands.merge_blocks import BlockSource, Computed, MergedBlocks, shared_blocks
from consolidate.commands.verify import check_fisher_values
from consolidate.ewc.fisher_merging import MergedTensor, ModelTensor, merge_models
from consolidate.models.tensor_names import renamed_factors
from consolidate.options import MergeOptions
from consolidate.results import MergeResult
from consolidate.runtime.progress import progress
from consolidate.views.output_card import write_card
from formats.atomic import replace_folder, unreplaced
from formats.checkpoint import (
    Checkpoint,
    check_finite,
    open_checkpoint,
    weight_records,
    write_checkpoint,
)
from formats.digest import json_digest
from formats.errors import InputError, UsageError
from formats.fisher_folder import LEDGER_NAME, StoredFisher, write_fisher
from formats.fisher_json import SAME_AS, Block, Ledger, TaskRecord, copies
from formats.hub import commits_of, locate
from formats.tensors import LazyTensors, Renamed, TensorFiles, dtype_of, shape_of
from formats.versions import program_versions

LOG = logging.getLogger("consolidate")
_CHUNK = 1 << 16  # elements in float64 at a time: they stay in the cache, however large the tensor

_COUNTER = "num_batches_tracked"  # of batch norm: the largest is taken
_ALIKE = "only checkpoints of one architecture can be merged"


def merge(options: MergeOptions) -> MergeResult:
    """Merge checkpoints of one architecture, and their Fishers, into one checkpoint.

    Λ = Σ c_k Λ_k, θ = Σ c_k Λ_k θ_k / Λ, μ = Σ c_k Λ_k μ_k / Λ (Matena & Raffel 2022), and where
    Λ = 0 the mean weighted by c_k. A layer that all have a factor of takes R = Σ c_k R_k, and W
    where W R = Σ c_k W_k R_k (Jin et al. 2023). With a base, Σ c_k − 1 times its terms are
    subtracted from each sum, so that the tasks of the base count once. Other files are the first
    checkpoint's.

    Returns:
        The folder, the models, the tasks, the Fisher's trace, the offset, the factors, and the
        layers ``without_factors``, which some of the checkpoints have factors of. If the output is
        up to date, nothing is done, and the ``status`` is ``cached``.

    Raises:
        InputError: A checkpoint has no Fisher, is damaged, is of another architecture, or has a
            task that another one has; or the base is not their common ancestor.
        UsageError: The coefficients are not positive numbers, one per checkpoint.
        NonFiniteError: NaN or infinity in weights or Fisher.
    """
    with claiming(Path(options.output_dir)):
        return _merge(options)


def _merge(options: MergeOptions) -> MergeResult:
    coefficients = _coefficients(options.weights, len(options.checkpoints))
    target = Path(options.output_dir)
    there = find_output(target, merged=True)
    if there is None:
        refuse_existing(target, overwrite=options.overwrite)
    plan = _planned(options.checkpoints, coefficients, options.base)

    def result(
        status: Literal["done", "cached"], ledger: Ledger, trace: float, *, anchored: bool
    ) -> MergeResult:
        return {
            "status": status,
            "checkpoint": str(target),
            "fisher": str(target / "fisher"),
            "models": [str(checkpoint) for checkpoint in options.checkpoints],
            "weights": coefficients,
            "base": None if options.base is None else str(options.base),
            "commits": commits_of(*(model.path for model in plan.everything)),
            "tasks": [task.name for task in plan.tasks],
            "parameters": sum(math.prod(record.shape) for record in ledger.fisher.values()),
            "trace": trace,
            "penalty_offset": ledger.penalty_offset,
            "anchor": "fisher/anchor" if anchored else "the weights",
            "factors": factor_totals(ledger),
            "without_factors": plan.without_factors,
        }

    if (done := cached(there, plan.made_from)) is not None:
        trace = math.fsum(float(done.fisher[name].sum(dtype=torch.float64)) for name in done.fisher)
        return result("cached", done.ledger, trace, anchored=done.anchor is not None)
    if there is not None:
        refuse_existing(target, overwrite=options.overwrite)
    ledger, trace = _write(plan, target, overwrite=options.overwrite)
    return result("done", ledger, trace, anchored=ledger.anchor is not None)


def _coefficients(weights: Sequence[float] | None, count: int) -> list[float]:
    if count < 2:
        raise UsageError(
            f"merge needs at least two checkpoints, found {count}; to copy one, copy its folder"
        )
    coefficients = [1.0] * count if weights is None else [float(c) for c in weights]
    if len(coefficients) != count:
        gives = f"--weights: expected {count} numbers, one per checkpoint"
        raise UsageError(f"{gives}, found {len(coefficients)}")
    for coefficient in coefficients:
        if not (math.isfinite(coefficient) and coefficient > 0):
            raise UsageError(
                f"--weights: expected numbers above 0, found {coefficient}: leave that "
                "checkpoint out"
            )
    return coefficients


@dataclass(frozen=True)
class _Model:
    """A checkpoint to merge, with its Fisher and its coefficient.

    `weights`, `fisher` and `anchor` have a tensor that the file has under several names only once,
    under the name that is used for it in all models.
    """

    path: Path
    source: Checkpoint
    stored: StoredFisher
    coefficient: float
    names: Mapping[str, str]  # in the file, by common name
    same: Mapping[str, str]  # the common name of each tensor with several names

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        return self._renamed_tensors(self.source.weights)

    @cached_property
    def fisher(self) -> Mapping[str, Tensor]:
        return self._renamed_tensors(self.stored.fisher)

    @cached_property
    def anchor(self) -> Mapping[str, Tensor] | None:
        anchor = self.stored.anchor
        return None if anchor is None else self._renamed_tensors(anchor)

    def _renamed_tensors(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return Renamed(tensors, {at: name for at, name in self.names.items() if name in tensors})

    @cached_property
    def factors(self) -> Factors:
        """The matrices R by common names; none where they are of another kind."""
        found = factors_of(self.stored) or Factors({}, {})
        return Factors(*renamed_factors(*found, {n: self.same.get(n, n) for n in found.covered}))

    def block_source(self) -> BlockSource:
        """Give what its layers are merged from."""
        mu = self.stored.factor_anchor
        anchor = None if mu is None else Renamed(mu, {self.same.get(n, n): n for n in mu})
        return BlockSource(
            self.path, self.coefficient, self.factors, self.fisher, self.weights, anchor
        )

    @property
    def tasks(self) -> dict[str, TaskRecord]:
        return {task.name: _renamed(task, self.same) for task in self.stored.ledger.tasks}

    def content(self) -> dict[str, Any]:
        """Describe this checkpoint by content, JSON-ready."""
        ledger = self.stored.ledger
        return checkpoint_content(self.source, self.stored.folder / LEDGER_NAME, ledger.weights)


@dataclass(frozen=True)
class _Plan:
    """What is merged: compatible models, their base, and the tasks of all."""

    models: list[_Model]
    base: _Model | None
    tasks: list[TaskRecord]
    heads: dict[str, TensorFiles]
    blocks: dict[str, Block]  # of layers that all have a matrix R of, by common names
    without_factors: list[str]  # weights of layers that some of the models have a block of

    @property
    def everything(self) -> list[_Model]:
        return self.models if self.base is None else [*self.models, self.base]

    def made_from(self) -> str:
        return json_digest(
            {
                "command": "merge",
                "versions": versions(),
                "models": [model.content() for model in self.models],
                "coefficients": plain([model.coefficient for model in self.models]),
                "base": None if self.base is None else self.base.content(),
            }
        )


def _planned(
    checkpoints: Sequence[str | Path], coefficients: Sequence[float], base: str | Path | None
) -> _Plan:
    """Open all checkpoints, and refuse those that cannot be merged."""
    opened = [_open(*pair) for pair in zip(checkpoints, coefficients, strict=True)]
    if base is not None:
        opened.append(_open(base, 1.0 - sum(coefficients)))
    _refuse_unmeasured(opened)
    same = _same_tensors(opened)
    everything = [_once(model, same) for model in opened]
    models, shared = everything[: len(checkpoints)], None if base is None else everything[-1]
    for model in models[1:]:
        _check_alike(models[0], model)
    if shared is not None:
        _check_base(models, shared)
    blocks = shared_blocks([model.block_source() for model in everything])
    return _Plan(models, shared, *_joined(models, shared), *blocks)


def _refuse_unmeasured(opened: Sequence["_Model"]) -> None:
    """Refuse models whose last task has no Fisher yet: it can only be measured at their weights."""
    for model in opened if len(opened) > 1 else ():
        if (task := pending_task(model.stored)) is not None:
            raise InputError(
                f"{model.path}: the Fisher of {task.name!r} was not measured, so merging would not "
                f"protect it: run `consolidate fisher {model.path} --data DATA --task {task.name}`"
            )


def _write(plan: _Plan, target: Path, *, overwrite: bool) -> tuple[Ledger, float]:
    """Write the merged checkpoint; give its ledger and the trace of Λ."""
    first = plan.models[0].stored.ledger.unprotected
    with replace_folder(target, overwrite=overwrite) as staging:
        solved = staging / ".blocks"
        merged = _Merged(plan)
        merged.layers.solve(solved)
        found = _survey(merged, plan.everything)
        write_checkpoint(staging, plan.models[0].source, merged.weights, card=False)
        ledger = Ledger(
            tasks=plan.tasks,
            merge_rule="separate",
            gamma=1.0,
            penalty_offset=found.offset,
            blocks=merged.blocks or None,
            factor_offset=found.factor_offset if merged.blocks else None,
            unprotected={
                name: first[name] if at == name else SAME_AS + at
                for name, at in merged.file_names.items()
                if name not in merged.fisher
            },
            weights=weight_records(open_checkpoint(staging).weights),
            versions=program_versions(),
            made_from=plan.made_from(),
        )
        ledger = write_fisher(
            staging / "fisher",
            merged.fisher,
            ledger,
            anchor=merged.anchor if found.anchored else None,
            heads=plan.heads,
            factors=merged.factors if merged.blocks else None,
            factor_anchor=merged.factor_anchor if merged.layers.anchored else None,
        )
        if solved.is_dir():
            shutil.rmtree(solved)
        write_card(staging, target, ledger, [model.source for model in plan.models], "merge")
    return ledger, found.trace


class _Tensors(LazyTensors):
    """The merged weights, Fisher or anchor, computed on access."""

    def __init__(
        self,
        merged: "_Merged",
        field: Literal["weights", "fisher", "anchor"],
        names: Sequence[str],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        self._merged = merged
        self._field = field
        first = merged.models[0].source.weights
        self.headers = {
            name: (dtypes.get(name, torch.float32), shape_of(first, name)) for name in names
        }

    def __getitem__(self, name: str) -> Tensor:
        if not self.dtype(name).is_floating_point:
            models = self._merged.models
            if name.endswith(_COUNTER):
                at = models[0].same.get(name, name)
                return reduce(torch.maximum, (model.weights[at] for model in models))
            return models[0].source.weights[name]
        layers, at = self._merged.layers, self._merged.common(name)
        if self._field == "weights" and at in layers.covered:
            return layers.weight(at)
        made = torch.empty(self.shape(name), dtype=self.dtype(name))
        flat = made.view(-1)
        for start, part in self._merged.parts(name):
            values: Tensor = getattr(part, self._field)
            flat[start : start + values.numel()] = values
        return made


class _Merged:
    """Merged tensors by the names of the first model, one chunk or layer at a time in memory."""

    def __init__(self, plan: _Plan) -> None:
        models, base, blocks = plan.models, plan.base, plan.blocks
        self.models = models
        self.base = base
        first = models[0]
        weights, same = first.source.weights, first.same
        # Each name in the first model's file, with the name there that represents it.
        self.file_names = {name: first.names[same.get(name, name)] for name in weights}
        protected = [
            name
            for name, representative in self.file_names.items()
            if name == representative
            and any(same.get(name, name) in model.fisher for model in models)
        ]
        dtypes = {name: dtype_of(weights, name) for name in weights}
        self.weights = _Tensors(self, "weights", list(weights), dtypes)
        self.fisher = _Tensors(self, "fisher", protected, {})
        self.anchor = _Tensors(self, "anchor", protected, {})
        shared = None if base is None else base.block_source()
        self.layers = MergedBlocks([model.block_source() for model in models], shared, blocks)
        _, self.blocks = renamed_factors(dict.fromkeys(blocks, torch.empty(0)), blocks, first.names)
        of_matrix = {new: old for old, new in zip(blocks, self.blocks, strict=True)}
        of_anchor = {first.names[at]: at for at in self.layers.covered}
        self.factors = Computed(
            {new: (torch.float32, (self.layers.size(old),) * 2) for new, old in of_matrix.items()},
            lambda name: self.layers.matrix(of_matrix[name]),
        )
        self.factor_anchor = Computed(
            {n: (torch.float32, shape_of(weights, n)) for n in weights if n in of_anchor},
            lambda name: self.layers.anchor(of_anchor[name]),
        )

    def common(self, name: str) -> str:
        """Give the name that all models share for a tensor of the first."""
        return self.models[0].same.get(name, name)

    def parts(self, name: str) -> Iterator[tuple[int, MergedTensor]]:
        """Merge a tensor chunk by chunk; yield the start of each chunk with it."""
        count = math.prod(self.weights.shape(name))
        at = self.common(name)
        for start in range(0, count, _CHUNK):
            chunk = slice(start, start + _CHUNK)
            base = None
            if self.base is not None and at in self.base.fisher:
                base = _chunk(self.base, at, chunk)
            yield start, merge_models((_chunk(m, at, chunk) for m in self.models), base)


def _chunk(model: _Model, name: str, chunk: slice) -> ModelTensor:
    fisher = anchor = None
    if name in model.fisher:
        fisher = model.fisher[name].reshape(-1)[chunk]
        if model.anchor is not None:
            anchor = model.anchor[name].reshape(-1)[chunk]
    values = model.weights[name].reshape(-1)[chunk]
    return ModelTensor(model.coefficient, values, fisher, anchor)


def _open(checkpoint: str | Path, coefficient: float) -> _Model:
    """Open a checkpoint and its Fisher, and check their digests and values."""
    path = locate(checkpoint)
    return unreplaced(path, lambda: _open_folder(path, coefficient))


def _open_folder(path: Path, coefficient: float) -> _Model:
    source = open_checkpoint(path)
    if source.adapter is not None:
        raise InputError(
            f"{path}: expected a whole model, found an adapter, whose factors cannot be averaged: "
            "merge whole models"
        )
    stored = stored_fisher(path / "fisher", source)
    check_finite(source.weights, path)
    check_fisher_values(stored)
    return _Model(path, source, stored, coefficient, {name: name for name in source.weights}, {})


def _renamed(task: TaskRecord, names: Mapping[str, str]) -> TaskRecord:
    """Rename a task's layers."""
    return replace(task, layers={names.get(at, at): layer for at, layer in task.layers.items()})


def _same_tensors(models: Sequence[_Model]) -> dict[str, str]:
    """Map the names of each tensor that some file has under several names to the common one."""
    same: dict[str, str] = {}
    for model in models:
        for name, first in copies(model.stored.ledger).items():
            one, other = same.get(name, name), same.get(first, first)
            same |= {at: other for at, to in same.items() if to == one}
            same |= {name: other, one: other}
    return same


def _once(model: _Model, same: Mapping[str, str]) -> _Model:
    """Keep one name of a tensor with several, that of its Fisher if it has one."""
    ledger = model.stored.ledger
    again = copies(ledger)
    names: dict[str, str] = {}
    for name in model.source.weights:
        at = same.get(name, name)
        other = names.setdefault(at, name)
        if other == name:
            continue
        differ = ledger.weights[name] != ledger.weights[other]
        if differ or (name in ledger.fisher and other in ledger.fisher):
            raise InputError(
                f"{model.path}: {other} and {name} are two tensors here, and one in another model: "
                + _ALIKE
            )
        if name in ledger.fisher or (other in again and other not in ledger.fisher):
            names[at] = name
    return replace(model, names=names, same=same)


def _check_alike(first: _Model, other: _Model) -> None:
    """Refuse another architecture: other names, shapes, dtypes or buffers."""
    ours, theirs = first.weights, other.weights
    for here, there in ((other, first), (first, other)):
        for name in there.weights:
            if name not in here.weights:
                raise InputError(
                    f"{here.path} has no tensor {name!r}, which {there.path} has: {_ALIKE}"
                )
    for name in ours:
        _check_shape(name, first, other)
        dtypes = dtype_of(ours, name), dtype_of(theirs, name)
        if dtypes[0] != dtypes[1]:
            found = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise InputError(
                f"the tensor {name!r} in {first.path} and {other.path} is {found}: save them in "
                "one dtype"
            )
        mergeable = dtypes[0].is_floating_point or name.endswith(_COUNTER)
        if not mergeable and not torch.equal(ours[name], theirs[name]):
            raise InputError(
                f"the integer tensor {name!r} differs in {first.path} and {other.path} and cannot "
                "be averaged: make it the same in both"
            )
    one, two = first.source.config, other.source.config
    changed = [key for key in {**one, **two} if one.get(key) != two.get(key)]
    for key in ("model_type", "architectures"):
        if key in changed:
            raise InputError(
                f"config.json: {key} is {one.get(key)} in {first.path} and {two.get(key)} in "
                f"{other.path}: {_ALIKE}"
            )
    if "id2label" in changed:
        raise InputError(
            f"config.json: the labels are {_labels(one)} in {first.path} and {_labels(two)} in "
            f"{other.path}: only heads with the same labels can be merged"
        )
    if changed:
        differs = f"config.json of {other.path} differs in {', '.join(changed)}"
        LOG.info("%s: that of %s is used", differs, first.path)


def _labels(config: Mapping[str, Any]) -> str:
    names = config.get("id2label")
    return ", ".join(map(str, names.values())) if isinstance(names, dict) and names else "no names"


def _check_base(models: Sequence[_Model], base: _Model) -> None:
    first = models[0]
    for model in models:
        for task, head in model.stored.heads.items():
            moved = any(name in base.stored.fisher for name in head)
            if moved and task in base.tasks and task not in base.stored.heads:
                raise InputError(
                    f"the head of {task} is saved in {model.path} but in use in the base "
                    f"{base.path}: set --base to a common ancestor with the new head"
                )
    for name in base.fisher:
        if name not in first.weights:
            raise InputError(
                f"{first.path} has no tensor {name!r}, which the base {base.path} has: set "
                "--base to a checkpoint that it was fine-tuned from"
            )
        _check_shape(name, first, base)


def _check_shape(name: str, first: _Model, other: _Model) -> None:
    ours, theirs = (list(shape_of(model.weights, name)) for model in (first, other))
    if ours != theirs:
        raise InputError(
            f"the tensor {name!r} has shape {ours} in {first.path} and {theirs} in {other.path}: "
            + _ALIKE
        )


def _joined(
    models: Sequence[_Model], base: _Model | None
) -> tuple[list[TaskRecord], dict[str, TensorFiles]]:
    """Join the ledgers' tasks, weighted by model, and their saved heads; the base's once."""
    shared = {} if base is None else base.tasks
    heads = {} if base is None else dict(base.stored.heads)
    tasks = dict(shared)
    holder: dict[str, _Model] = {}
    for model in models:
        for name, task in shared.items():
            if model.tasks.get(name) != task:
                what = "another record of the" if name in model.tasks else "no"
                raise InputError(
                    f"{model.stored.folder} has {what} task {name!r} of the base: set --base to a "
                    "checkpoint that it was fine-tuned from"
                )
        own = {name: task for name, task in model.tasks.items() if name not in shared}
        if twice := [name for name in own if name in tasks]:
            other = holder[twice[0]]
            if all(own[name] == other.tasks[name] for name in twice):
                advice = "name their last common ancestor with --base"
            else:
                advice = "if they are different tasks, measure one again under another --task"
            raise InputError(
                f"{other.path} and {model.path} both have the tasks {', '.join(twice)}, which "
                f"would count twice: {advice}"
            )
        for name, task in own.items():
            tasks[name] = replace(task, weight=task.weight * model.coefficient)
            holder[name] = model
        # Children may have saved the head of a shared task that is still in the base's weights.
        heads = model.stored.heads | heads
    return [_renamed(task, models[0].names) for task in tasks.values()], heads


class _Survey(NamedTuple):
    offset: float
    factor_offset: float
    trace: float
    anchored: bool  # whether μ differs from the weights


def _survey(merged: _Merged, everything: Sequence[_Model]) -> _Survey:
    """Give the offsets, the trace, and whether μ differs from the weights; check the base."""
    ledgers = [(model.coefficient, model.stored.ledger) for model in everything]
    offset = math.fsum(c * ledger.penalty_offset for c, ledger in ledgers)
    of_factors = math.fsum(c * offset_with_factors(ledger) for c, ledger in ledgers)
    of_factors += merged.layers.growth
    trace = 0.0
    anchored = False
    with progress("merging", len(merged.fisher), "tensors") as advance:
        for name in merged.fisher:
            at = merged.common(name)
            layer = merged.weights[name].view(-1) if at in merged.layers.covered else None
            if merged.base is not None and at in merged.base.fisher:
                for model in merged.models:
                    _check_contained(model, merged.base, at)
            for start, part in merged.parts(name):
                offset += part.offset
                trace += float(part.fisher.sum())
                weights = part.weights.to(merged.weights.dtype(name))
                if layer is None:
                    of_factors += part.offset
                else:
                    weights = layer[start : start + weights.numel()]
                anchored = anchored or not torch.equal(part.anchor.float(), weights.float())
            advance(1)
    # Only `online` children of a base fall below 0: they moved its anchor, each elsewhere.
    return _Survey(max(offset, 0.0), max(of_factors, 0.0), trace, anchored)


def _check_contained(model: _Model, base: _Model, name: str) -> None:
    shared = base.fisher[name]
    whole = model.fisher[name] if name in model.fisher else torch.zeros(())
    if below := int((whole < shared).sum()):
        raise InputError(
            f"{model.stored.folder}: the Fisher of {name!r} is below that of the base {base.path} "
            f"in {below} of {shared.numel()} values, so γ was below 1 and the share of the base in "
            "it is unknown: fine-tune with --gamma 1"
        )
