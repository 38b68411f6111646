"""Merge the layers that every model has a matrix R for, one layer in memory at a time."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from consolidate.chain.factors import Factors
from consolidate.ewc.factor_merging import MergedBlock, ModelBlock, of_models
from consolidate.runtime.progress import progress
from formats.fisher_json import Block, covered
from formats.tensors import LazyTensors, dtype_of, open_tensors, shape_of, write_tensors
from formats.wording import few

LOG = logging.getLogger("consolidate")


@dataclass(frozen=True)
class BlockSource:
    """What a model has of its layers, by names that all models share."""

    path: Path
    coefficient: float
    factors: Factors
    fisher: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    anchor: Mapping[str, Tensor] | None  # that of the factors; None: the weights

    def has(self, name: str, whole: Block) -> bool:
        """Whether it has this block, but for parameters without a Fisher, whose R is 0."""
        block = self.factors.blocks.get(name)
        own = () if block is None else block.parameters
        alike = block is None or (block.dims, own) == (whole.dims, whole.parameters[: len(own)])
        return alike and not any(at in self.fisher for at in whole.parameters[len(own) :])

    def of(self, name: str, block: Block) -> ModelBlock:
        """Give what is merged of a block."""
        weights, anchor = (
            tuple((tensors if at in tensors else self.weights)[at] for at in block.parameters)
            for tensors in (self.weights, self.anchor or self.weights)
        )
        return ModelBlock(self.coefficient, weights, self.factors.matrices.get(name), anchor)


def shared_blocks(sources: Sequence[BlockSource]) -> tuple[dict[str, Block], list[str]]:
    """Give the blocks that all models have, and the weights of layers that one of them lacks."""
    kept: dict[str, Block] = {}
    lost: dict[str, Path] = {}
    for name in dict.fromkeys(name for source in sources for name in source.factors.blocks):
        blocks = [s.factors.blocks[name] for s in sources if name in s.factors.blocks]
        whole = max(blocks, key=lambda block: len(block.parameters))
        lacking = next((source for source in sources if not source.has(name, whole)), None)
        if lacking is None:
            kept[name] = whole
        else:
            lost[whole.parameters[0]] = lacking.path
    for path in dict.fromkeys(lost.values()):
        layers = [weight for weight, at in lost.items() if at == path]
        LOG.warning(
            "%s has no factor of %s: these are merged by the diagonal, and have none from now on",
            path,
            few(layers, 3),
        )
    return kept, [*lost]


@dataclass
class MergedBlocks:
    """Weights, anchors and matrices of the blocks, once `solve` has written the first two."""

    sources: Sequence[BlockSource]
    base: BlockSource | None
    blocks: Mapping[str, Block]
    growth: float = 0.0  # of the offset
    anchored: bool = False  # whether an anchor differs from the weights
    covered: set[str] = field(init=False)
    _solved: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.covered = covered(dict(self.blocks))

    def solve(self, folder: Path) -> None:
        """Solve each block once, and keep its weights and anchor in a folder."""
        if not self.blocks:
            return
        folder.mkdir()
        with progress("merging", len(self.blocks), "layers") as advance:
            solutions = _Solutions(self, advance)
            write_tensors(folder, solutions, metadata={})
        self.growth = solutions.growth
        self._solved = open_tensors(folder)
        for name in self.covered:
            self.anchored |= not torch.equal(self.anchor(name), self.weight(name).float())

    def weight(self, name: str) -> Tensor:
        """Give a merged weight in its own dtype."""
        return self._solved[f"weights/{name}"].to(dtype_of(self.sources[0].weights, name))

    def anchor(self, name: str) -> Tensor:
        """Give what the penalty is around, in float32."""
        return self._solved[f"anchor/{name}"].float()

    def matrix(self, name: str) -> Tensor:
        """Give Σ c_k R_k, with (1 − Σ c_k) times that of the base, in float64."""
        size = self.size(name)
        total = torch.zeros(size, size, dtype=torch.float64)
        for coefficient, source in self._terms():
            if (matrix := source.factors.matrices.get(name)) is not None:
                missing = size - len(matrix)
                total += coefficient * functional.pad(matrix.double(), (0, missing, 0, missing))
        return total

    def size(self, name: str) -> int:
        """Give the rows of a merged matrix."""
        found = [s.factors for _, s in self._terms() if name in s.factors.matrices]
        return max(shape_of(factors.matrices, name)[0] for factors in found)

    def solved(self, name: str) -> MergedBlock:
        """Merge one block of all models."""
        block = self.blocks[name]
        base = None if self.base is None else self.base.of(name, block)
        return of_models(block, (source.of(name, block) for source in self.sources), base)

    def _terms(self) -> Iterator[tuple[float, BlockSource]]:
        yield from ((source.coefficient, source) for source in self.sources)
        if self.base is not None:
            yield 1.0 - sum(source.coefficient for source in self.sources), self.base


class _Solutions(LazyTensors):
    """Weights and anchors of blocks, solved in the order in which they are written."""

    def __init__(self, merged: MergedBlocks, advance: Callable[[int], None]) -> None:
        self._merged, self._advance = merged, advance
        self._last: tuple[str, dict[str, Tensor]] = ("", {})
        self._growths: dict[str, float] = {}
        self._block_of = {at: n for n, block in merged.blocks.items() for at in block.parameters}
        weights = merged.sources[0].weights
        self.headers = {
            f"{kind}/{at}": (
                torch.promote_types(dtype_of(weights, at), torch.float32),
                shape_of(weights, at),
            )
            for block in merged.blocks.values()
            for at in block.parameters
            for kind in ("weights", "anchor")
        }

    @property
    def growth(self) -> float:
        """The growth of the offset by all blocks that were solved."""
        return sum(self._growths.values())

    def __getitem__(self, name: str) -> Tensor:
        block = self._block_of[name.partition("/")[2]]
        if self._last[0] != block:
            solved = self._merged.solved(block)
            ends = self._merged.blocks[block].parameters
            layers = {"weights": solved.weights, "anchor": solved.anchor}
            found = {
                f"{kind}/{at}": values
                for kind, layer in layers.items()
                for at, values in zip(ends, layer, strict=True)
            }
            self._advance(block not in self._growths)
            self._growths[block] = solved.offset
            self._last = block, found
        return self._last[1][name]
