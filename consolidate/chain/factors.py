"""The matrices R of a chain: those that a penalty can use, and merged with those of a new task."""

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from torch import Tensor

from consolidate.estimation.estimates import FisherDiagonal
from consolidate.ewc import factor_merging
from consolidate.models.layout import Layout, renamed_factors
from consolidate.options import Estimation, Parameters
from formats.errors import UsageError
from formats.fisher_json import Block, Ledger, covered
from formats.tensors import Overlaid, shape_of
from formats.wording import few

if TYPE_CHECKING:
    from consolidate.chain.fitted_chain import Chain

LOG = logging.getLogger("consolidate")


class Factors(NamedTuple):
    """Matrices R by block name, with what each covers: a weight, and maybe its bias behind it."""

    matrices: Mapping[str, Tensor]
    blocks: Mapping[str, Block]

    @property
    def covered(self) -> set[str]:
        """The parameters that have a block."""
        return covered(self.blocks)

    def fits(self, name: str, whole: Block, measured: Collection[str]) -> bool:
        """Whether this block is here, but for parameters that were not measured, whose R is 0."""
        block = self.blocks.get(name)
        own = () if block is None else block.parameters
        alike = block is None or (block.dims, own) == (whole.dims, whole.parameters[: len(own)])
        return alike and not any(at in measured for at in whole.parameters[len(own) :])


class MergedFactors(NamedTuple):
    """Matrices after a task was added, by names of the weights file."""

    matrices: Mapping[str, Tensor]
    blocks: dict[str, Block]
    anchor: Mapping[str, Tensor] | None  # None: the weights
    growth: float  # of the offset


def factors_of(chain: "Chain | None") -> Factors | None:
    """Give the factors of a chain, named after their weights; None where it has none of this kind.

    All have to be matrices R, each of one weight and at most one bias.
    """
    if chain is None or chain.factors is None:
        return None
    blocks = chain.ledger.blocks or {}
    ordered = {name: _ordered(block, chain.fisher) for name, block in blocks.items()}
    if any(block is None for block in ordered.values()):
        return None
    known = {name: block for name, block in ordered.items() if block is not None}
    same = {parameter: parameter for parameter in covered(known)}
    return Factors(*renamed_factors(chain.factors, known, same))


def settled_structure(asked: str | None, chain: "Chain | None") -> str:
    """Choose the structure of a new task's Fisher: the one asked for, else that of the chain."""
    return asked or ("diagonal" if factors_of(chain) is None else "inputs")


def offset_with_factors(ledger: Ledger) -> float:
    """Give the constant of the penalty where a ledger's factors are used."""
    return ledger.penalty_offset if ledger.factor_offset is None else ledger.factor_offset


def without_blocks(
    chain: "Chain", parameters: Collection[str], why: str | None = None
) -> dict[str, Any]:
    """Give `ledger`, `factors` and `factor_anchor` of a chain without the blocks of parameters.

    With a reason it is reported that those keep the diagonal.
    """
    ledger, given = chain.ledger, ("factors", "factor_anchor")
    if chain.factors is None:
        return {"ledger": ledger} | {name: getattr(chain, name) for name in given}
    blocks = ledger.blocks or {}
    lost = [name for name, block in blocks.items() if set(block.parameters) & set(parameters)]
    if why is not None:
        _report_lost([blocks[name].parameters[0] for name in lost], why)
    left = {name: block for name, block in blocks.items() if name not in lost}
    gone = covered(blocks) - covered(left)
    anchor = chain.factor_anchor
    return {
        "ledger": replace(ledger, blocks=left),
        "factors": Overlaid(chain.factors, without=lost),
        "factor_anchor": None if anchor is None else Overlaid(anchor, without=gone),
    }


def penalty_of_blocks(chain: "Chain", weights: Mapping[str, Tensor]) -> float:
    """Return Σ ½ tr(D R Dᵀ)/out over the blocks of these weights, apart from λ."""
    factors, anchor = factors_of(chain), chain.factor_anchor
    if factors is None or anchor is None:
        return 0.0
    total = 0.0
    for name, block in factors.blocks.items():
        if set(block.parameters) <= set(weights):
            far = [weights[n].double() - anchor[n].double() for n in block.parameters]
            (rows,) = factor_merging.joined([far], block.dims)
            matrix = factors.matrices[name].double()
            total += float(((rows @ matrix) * rows).sum()) / (2 * len(rows))
    return total


def check_structure(
    structure: str, estimation: Estimation, parameters: Parameters, *, prefix: str = ""
) -> None:
    """Refuse what cannot measure factors; `prefix` is that of the estimation's options."""
    for option, given in (
        ("shard", parameters.shard),
        (f"{prefix}estimator batched", estimation.estimator == "batched"),
    ):
        if given and structure == "inputs":
            raise UsageError(
                f"--{option} cannot be combined with --structure inputs: leave it out, or give "
                "--structure diagonal"
            )


def check_continued(before: "Chain | None") -> None:
    """Refuse a task with factors on a chain whose tasks were measured without them."""
    if before is not None and factors_of(before) is None and before.fisher:
        raise UsageError(
            "--structure inputs: the earlier tasks were measured without factors, which cannot be "
            "added later: use --structure diagonal, or measure their Fisher again with --structure "
            "inputs"
        )


def module_factors(
    chain: "Chain", layout: Layout, weights: Mapping[str, Tensor]
) -> dict[str, Any] | None:
    """Give the arguments of a penalty that are a chain's factors, by the module's names.

    They are around `weights` where the chain has no anchor for them. None where it has no factors.
    """
    if (factors := factors_of(chain)) is None or not factors.blocks:
        return None
    alone, where = layout.loaded_alone(), chain.factor_anchor or weights
    matrices, blocks = renamed_factors(factors.matrices, factors.blocks, alone)
    kept = covered(blocks)
    around = {name: where[name] for name in factors.covered if alone.get(name) in kept}
    return {
        "factors": matrices,
        "blocks": blocks,
        "factor_anchor": layout.to_module(around),
        "offset": offset_with_factors(chain.ledger),
    }


def measured_factors(diagonal: FisherDiagonal, layout: Layout) -> Factors:
    """Give the factors of a measurement by the file's names.

    Layers whose weights the file stores in another form have none.
    """
    alone = layout.stored_alone()
    lost = [b.parameters[0] for b in diagonal.blocks.values() if not set(b.parameters) <= {*alone}]
    _report_lost(lost, "the file stores these weights in another form")
    return Factors(*renamed_factors(diagonal.factors, diagonal.blocks, alone))


def merged_factors(
    before: "Chain",
    new: Factors,
    weights: Mapping[str, Tensor],
    where: Mapping[str, Tensor],  # what the factors so far are around
    measured: Collection[str],  # parameters that have a Fisher of the new task
    *,
    rule: str,
    gamma: float,
    weight: float,
) -> MergedFactors | None:
    """Merge a new task's factors with those of a chain; None where no layer has a block.

    A layer whose parameters one of both measured without a block has none from now on.
    """
    past = factors_of(before) or Factors({}, {})
    if not past.blocks and before.factors:
        _report_lost(before.fisher, "its factors are of another kind")
    kept = {}
    place = {name: i for i, name in enumerate(weights)}
    names = {**past.blocks, **new.blocks}
    for name in sorted(names, key=lambda name: place[names[name].parameters[0]]):
        whole = whole_block(name, (past, new))
        if past.fits(name, whole, before.fisher) and new.fits(name, whole, measured):
            kept[name] = whole
    lost = [block.parameters[0] for name, block in past.blocks.items() if name not in kept]
    _report_lost(lost, "the new task was measured without a block for them")
    if not kept:
        return None
    total = {name: past.matrices[name] for name in past.blocks if name in kept}
    found = {name: new.matrices[name] for name in new.blocks if name in kept}
    if rule == "online":
        merged = factor_merging.online(total, found, gamma=gamma, weight=weight)
        return MergedFactors({name: merged[name] for name in kept}, kept, None, 0.0)
    merged, anchor, growth = factor_merging.separate(
        total, where, found, weights, kept, weight=weight
    )
    around = {at: anchor[at] for block in kept.values() for at in block.parameters}
    return MergedFactors({name: merged[name] for name in kept}, kept, around, growth)


def whole_block(name: str, sides: Iterable[Factors]) -> Block:
    """Give a block of several sides, with its bias if one of them has it."""
    blocks = [side.blocks[name] for side in sides if name in side.blocks]
    return max(blocks, key=lambda block: len(block.parameters))


def _ordered(block: Block, fisher: Mapping[str, Tensor]) -> Block | None:
    """Give a block with its bias last; None if it is another kind of matrix."""
    weights = [name for name in block.parameters if len(shape_of(fisher, name)) > 1]
    biases = [name for name in block.parameters if name not in weights]
    if block.matrix != "R" or len(weights) != 1 or len(biases) > 1:
        return None
    if len(block.dims) != len(shape_of(fisher, weights[0])) - 1:
        return None  # a row of the matrix would not be an output
    return msgspec.structs.replace(block, parameters=(*weights, *biases))


def _report_lost(weights: Iterable[str], why: str) -> None:
    if lost := list(weights):
        LOG.info("the diagonal alone protects %s from now on: %s", few(lost, 3), why)
