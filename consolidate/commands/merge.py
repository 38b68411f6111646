"""Merge whole checkpoints, tensor by tensor: weights, Fishers, anchors and ledgers."""

import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from consolidate.chain.claims import claiming
from consolidate.chain.factors import offset_with_factors
from consolidate.chain.output import check_output, refuse_existing
from consolidate.chain.up_to_date import cached, factor_totals, find_output
from consolidate.commands.merge_blocks import Computed, MergedBlocks
from consolidate.commands.merge_plan import (
    COUNTER,
    OpenModel,
    Plan,
    checked_coefficients,
    plan_merge,
)
from consolidate.ewc.fisher_merging import MergedTensor, ModelTensor, merge_models
from consolidate.models.layout import renamed_factors
from consolidate.options import MergeOptions
from consolidate.results import MergeResult
from consolidate.runtime.progress import progress
from consolidate.views.output_card import write_card
from formats.atomic import replace_folder
from formats.checkpoint import open_checkpoint, weight_records, write_checkpoint
from formats.errors import InputError
from formats.fisher_folder import write_fisher
from formats.fisher_json import SAME_AS, Ledger
from formats.hub import commits_of
from formats.tensors import dtype_of, shape_of
from formats.versions import program_versions

LOG = logging.getLogger("consolidate")
_CHUNK = 1 << 16  # elements in float64 at a time: they stay in the cache, however large the tensor


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
    coefficients = checked_coefficients(options.weights, len(options.checkpoints))
    target = Path(options.output_dir)
    there = find_output(target, merged=True)
    if there is None:
        refuse_existing(target, overwrite=options.overwrite)
    plan = plan_merge(options.checkpoints, coefficients, options.base)

    def check() -> None:
        for model in plan.everything:
            check_output(target, model.source, overwrite=options.overwrite, whole=True)

    if there is None:
        check()

    def result(status: Literal["done", "cached"], ledger: Ledger, trace: float) -> MergeResult:
        return {
            "status": status,
            "checkpoint": str(target),
            "fisher": str(target / "fisher"),
            "models": [str(checkpoint) for checkpoint in options.checkpoints],
            "weights": coefficients,
            "base": None if options.base is None else str(options.base),
            "commits": commits_of(*(model.path for model in plan.everything)),
            "tasks": [task.name for task in plan.tasks],
            "parameters": sum(record.count for record in ledger.fisher.values()),
            "trace": trace,
            "penalty_offset": ledger.penalty_offset,
            "anchor": "the weights" if ledger.anchor is None else "fisher/anchor",
            "factors": factor_totals(ledger),
            "without_factors": plan.without_factors,
        }

    if (done := cached(there, plan.made_from)) is not None:
        trace = math.fsum(float(done.fisher[name].sum(dtype=torch.float64)) for name in done.fisher)
        return result("cached", done.ledger, trace)
    if there is not None:
        check()
    ledger, trace = _write(plan, target, overwrite=options.overwrite)
    return result("done", ledger, trace)


def _write(plan: Plan, target: Path, *, overwrite: bool) -> tuple[Ledger, float]:
    """Write the merged checkpoint; give its ledger and the trace of Λ."""
    first = plan.models[0].stored.ledger.unprotected
    with replace_folder(target, overwrite=overwrite) as staging:
        solved = staging / ".blocks"
        merged = _Merged(plan)
        merged.layers.solve(solved)
        found = _survey(merged, plan.everything)
        own = found.factor_offset != found.offset
        write_checkpoint(staging, plan.models[0].source, merged.weights, card=False)
        ledger = Ledger(
            tasks=plan.tasks,
            merge_rule="separate",
            gamma=1.0,
            penalty_offset=found.offset,
            blocks=merged.blocks or None,
            factor_offset=found.factor_offset if merged.blocks and own else None,
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
            merged.layers.discard(solved)
        write_card(staging, target, ledger, [model.source for model in plan.models], "merge")
    return ledger, found.trace


class _Merged:
    """Merged tensors by the names of the first model, one chunk or layer at a time in memory."""

    def __init__(self, plan: Plan) -> None:
        models, base, blocks = plan.models, plan.base, plan.blocks
        self.models = models
        self.base = base
        first = models[0]
        weights = first.source.weights
        self.common = first.common
        # Each name in the first model's file, with the name there that represents it.
        self.file_names = {name: first.names[first.common(name)] for name in weights}
        protected = [
            name
            for name, representative in self.file_names.items()
            if name == representative
            and any(first.common(name) in model.fisher for model in models)
        ]
        shapes = {name: shape_of(weights, name) for name in weights}
        wide = {name: (torch.float32, shapes[name]) for name in protected}
        self.weights = Computed(
            {name: (dtype_of(weights, name), shapes[name]) for name in weights}, self._weight
        )
        self.fisher = Computed(wide, partial(self._whole, "fisher"))
        self.anchor = Computed(wide, partial(self._whole, "anchor"))
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
            {n: (torch.float32, shapes[n]) for n in weights if n in of_anchor},
            lambda name: self.layers.anchor(of_anchor[name]),
        )

    def _weight(self, name: str) -> Tensor:
        at = self.common(name)
        if not self.weights.dtype(name).is_floating_point:
            if name.endswith(COUNTER):
                return reduce(torch.maximum, (model.weights[at] for model in self.models))
            return self.models[0].source.weights[name]
        if at in self.layers.covered:
            return self.layers.weight(at)
        return self._whole("weights", name)

    def _whole(self, field: Literal["weights", "fisher", "anchor"], name: str) -> Tensor:
        """Merge a tensor, its parts one after the other."""
        headers = self.weights if field == "weights" else self.fisher
        made = torch.empty(headers.shape(name), dtype=headers.dtype(name))
        flat = made.view(-1)
        for start, part in self.parts(name):
            values: Tensor = getattr(part, field)
            flat[start : start + values.numel()] = values
        return made

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


def _chunk(model: OpenModel, name: str, chunk: slice) -> ModelTensor:
    fisher = anchor = None
    if name in model.fisher:
        fisher = model.fisher[name].reshape(-1)[chunk]
        if model.anchor is not None:
            anchor = model.anchor[name].reshape(-1)[chunk]
    values = model.weights[name].reshape(-1)[chunk]
    return ModelTensor(model.coefficient, values, fisher, anchor)


class _Survey(NamedTuple):
    offset: float
    factor_offset: float
    trace: float
    anchored: bool  # whether μ differs from the weights


def _survey(merged: _Merged, everything: Sequence[OpenModel]) -> _Survey:
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


def _check_contained(model: OpenModel, base: OpenModel, name: str) -> None:
    shared = base.fisher[name]
    whole = model.fisher[name] if name in model.fisher else torch.zeros(())
    if below := int((whole < shared).sum()):
        raise InputError(
            f"{model.stored.folder}: the Fisher of {name!r} is below that of the base {base.path} "
            f"in {below} of {shared.numel()} values, so γ was below 1 and the share of the base in "
            "it is unknown: fine-tune with --gamma 1"
        )
