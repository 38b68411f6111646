"""Merge the layers that every model has a matrix R for, one layer in memory at a time."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from consolidate.chain.factors import Factors, whole_block
from consolidate.ewc.factor_merging import ModelBlock, of_models, of_size
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
        whole = whole_block(name, (source.factors for source in sources))
        lacking = next((s for s in sources if not s.factors.fits(name, whole, s.fisher)), None)
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
    _solved: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def covered(self) -> set[str]:
        """The parameters that have a block."""
        return covered(self.blocks)

    def solve(self, folder: Path) -> None:
        """Solve each block once, and keep its weights and anchor in a folder."""
        if not self.blocks:
            return
        folder.mkdir()
        block_of = {at: name for name, block in self.blocks.items() for at in block.parameters}
        growths: dict[str, float] = {}
        weights = self.sources[0].weights

        @lru_cache(maxsize=1)
        def solved(name: str) -> dict[str, Tensor]:
            block = self.blocks[name]
            base = None if self.base is None else self.base.of(name, block)
            made = of_models(block, (source.of(name, block) for source in self.sources), base)
            advance(name not in growths)
            growths[name] = made.offset
            layers = {"weights": made.weights, "anchor": made.anchor}
            return {
                f"{kind}/{at}": values
                for kind, layer in layers.items()
                for at, values in zip(block.parameters, layer, strict=True)
            }

        headers = {
            f"{kind}/{at}": (
                torch.promote_types(dtype_of(weights, at), torch.float32),
                shape_of(weights, at),
            )
            for at in block_of
            for kind in ("weights", "anchor")
        }
        made = Computed(headers, lambda name: solved(block_of[name.partition("/")[2]])[name])
        with progress("merging", len(self.blocks), "layers") as advance:
            write_tensors(folder, made, metadata={})
        self.growth = sum(growths.values())
        self._solved = open_tensors(folder)
        for name in self.covered:
            self.anchored |= not torch.equal(self.anchor(name), self.weight(name).float())

    def discard(self, folder: Path) -> None:
        """Remove what `solve` wrote; NFS removes no folder with files that are still mapped."""
        self._solved = {}
        shutil.rmtree(folder)

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
        for source in self._everything:
            if (matrix := source.factors.matrices.get(name)) is not None:
                total += source.coefficient * of_size(matrix.double(), size)
        return total

    def size(self, name: str) -> int:
        """Give the rows of a merged matrix."""
        found = [s.factors.matrices for s in self._everything if name in s.factors.matrices]
        return max(shape_of(matrices, name)[0] for matrices in found)

    @property
    def _everything(self) -> list[BlockSource]:
        return [*self.sources, *([] if self.base is None else [self.base])]


class Computed(LazyTensors):
    """Tensors that a function computes on access."""

    def __init__(
        self,
        headers: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        compute: Callable[[str], Tensor],
    ) -> None:
        self.headers = dict(headers)
        self._compute = compute

    def __getitem__(self, name: str) -> Tensor:
        return self._compute(name).to(self.dtype(name))
