"""Matrices over a layer's inputs, R = Σ_x E_y[Jᵀ J], from the gradients J of single examples.

With outputs W a_t + b at position t and the gradients g_t there, J = Σ_t g_t [a_t, 1]ᵀ and

    Jᵀ J = [A, 1]ᵀ (G Gᵀ) [A, 1]

A is (T, n), G is (T, out). With few positions the T × T products G Gᵀ are cheaper than J, and are
summed over vectors before the one product with the inputs, which the vectors share.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from consolidate.estimation.example_gradients import THIN, Convolved, Gradients, Outer, Whole

LEAF = 256  # rows up to which a square on the diagonal is computed whole, not its upper triangle
CHUNK_ELEMENTS = 1 << 23  # of inputs, or of explicit gradients, that are in one product


class InputBlock(NamedTuple):
    """A layer whose matrix is measured."""

    parameters: tuple[str, ...]  # the names of its weight, and of its bias if that is measured
    dims: tuple[int, ...]  # of the weight, those of the inputs: all but the outputs'


def zero_blocks(
    blocks: Mapping[str, InputBlock], parameters: Mapping[str, nn.Parameter], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return sums of zero by the blocks' names, on the devices of their weights.

    Each is flat: n × n elements for the inputs, of which only the upper triangle is used, then the
    n + 1 of the last column where there is a bias. So the rows of the matrix stay aligned.
    """
    sums = {}
    for name, (members, dims) in blocks.items():
        weight = parameters[members[0]]
        n = width(weight, dims)
        size = n * n + (n + 1) * (len(members) - 1)
        sums[name] = torch.zeros(size, dtype=dtype, device=weight.device)
    return sums


def whole_matrix(sums: Tensor) -> Tensor:
    """Return the exactly symmetric matrix, (n, n) or with a bias (n + 1, n + 1), of flat sums."""
    n = math.isqrt(sums.numel())  # Of n² + n + 1 too.
    last = sums[n * n :]
    matrix = sums.new_zeros(n + bool(len(last)), n + bool(len(last)))
    matrix[:n, :n] = sums[: n * n].view(n, n).triu()
    if len(last):
        matrix[:, n] = last
    matrix += matrix.triu(1).T
    matrix.diagonal().clamp_(min=0)  # It can round to a little below 0 where a gradient is 0.
    return matrix


def with_partners(names: Collection[str], blocks: Mapping[str, InputBlock]) -> set[str]:
    """Return the names, and those of the parameters that share a block with one of them."""
    each = [block.parameters for block in blocks.values()]
    return set(names).union(*(members for members in each if not {*names}.isdisjoint(members)))


class BlockSums:
    """Adds Σ_b Jᵀ J to the upper triangles of the blocks' matrices, J (out, n) for each example."""

    def __init__(
        self,
        blocks: Mapping[str, InputBlock],
        sums: Mapping[str, Tensor],
        parameters: Mapping[str, nn.Parameter],
        dtype: torch.dtype,
    ):
        """Add to `sums`, in `dtype`, by the blocks' names; `parameters` have the shapes."""
        self.shared = False  # whether there are several vectors
        self.last = True  # whether the vector is the last
        self._sums = {block.parameters[0]: sums[name] for name, block in blocks.items()}
        self._blocks = {block.parameters[0]: block for block in blocks.values()}
        self._parameters = parameters
        self._dtype = dtype
        self._pairs: dict[str, Tensor] = {}  # G Gᵀ of the vectors before the last, by weight

    def add_uses(self, uses: Mapping[str, Sequence[Gradients]], size: int) -> None:
        """Add gradients that are sums over several uses, for one vector and `size` examples."""
        for weight in uses:
            if weight not in self._blocks:
                continue
            bias = next((n for n in self._blocks[weight].parameters[1:] if n in uses), None)
            match uses[weight]:
                case [Convolved() as one]:
                    self._add_positions(weight, one.g, one.patches, bias is not None)
                case [Outer(g, a)]:
                    self._add_positions(weight, g, a.__getitem__, bias is not None)
                case [*several] if len(outers := _outers(several)) == len(several):
                    g, a = (torch.cat(parts, 1) for parts in zip(*outers, strict=True))
                    self._add_positions(weight, g, a.__getitem__, bias is not None)
                case several:
                    for some in _chunks(size, self._parameters[weight].numel()):
                        rows = self._explicit(weight, several, some)
                        last = None if bias is None else self._explicit(bias, uses[bias], some)
                        self._add_explicit(weight, rows, last)

    def add_example(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Add the explicit gradients of one example for one vector, in the parameters' shapes."""
        for weight, block in self._blocks.items():
            found = (gradients.get(name) for name in block.parameters)
            each = [g.to_dense().to(self._dtype)[None] for g in found if g is not None]
            if gradients.get(weight) is not None:
                self._add_explicit(weight, each[0], each[1] if len(each) > 1 else None)

    def _add_positions(
        self, weight: str, g: Tensor, inputs: Callable[[slice], Tensor], biased: bool
    ) -> None:
        """Add from g (B, T, out) and the inputs (…, T, n) of some examples."""
        size, positions, out = g.shape
        n = self._width(weight)
        wait = self.shared and positions <= n  # What waits is not larger than the inputs.
        vectors = 2 if wait else 1  # at least
        by_pairs = positions * positions * (vectors * out + n) + positions * n * n
        explicit = vectors * out * n * (positions + n)
        pairs = g @ g.mT if by_pairs <= explicit else None
        if pairs is not None and wait:
            if weight in self._pairs:
                pairs += self._pairs.pop(weight)
            if not self.last:
                self._pairs[weight] = pairs
                return
        for some in _chunks(size, n * (positions if pairs is not None else max(positions, out))):
            a = inputs(some)
            if pairs is None:
                bias = g[some].sum(1) if biased else None
                self._add_rows(weight, g[some].mT @ a, bias)
            else:
                products = (pairs[some] @ a).reshape(-1, n)
                last = pairs[some].sum(2).flatten() if biased else None
                self._add_product(weight, a.reshape(-1, n), products, last)
                if last is not None:
                    self._sums[weight][-1] += last.sum()

    def _add_explicit(self, weight: str, gradients: Tensor, bias: Tensor | None) -> None:
        """Add from gradients in the weight's shape, (B, …), and those of the bias, (B, out)."""
        transposed = self._blocks[weight].dims == (0,)
        self._add_rows(weight, gradients.mT if transposed else gradients.flatten(2), bias)

    def _add_rows(self, weight: str, rows: Tensor, bias: Tensor | None) -> None:
        """Add Jᵀ J from the rows of J, (B, out, n), and its last column, (B, out)."""
        rows = rows.reshape(-1, rows.shape[-1])
        last = None if bias is None else bias.flatten()
        self._add_product(weight, rows, rows, last)
        if last is not None:
            self._sums[weight][-1] += last.dot(last)

    def _add_product(self, weight: str, left: Tensor, right: Tensor, last: Tensor | None) -> None:
        """Add leftᵀ right, (n, n), and leftᵀ last beside it."""
        sums, n = self._sums[weight], left.shape[1]
        _add_upper(sums[: n * n].view(n, n), left, right)
        if last is not None:
            sums[n * n : -1] += left.T @ last

    def _explicit(self, name: str, uses: Sequence[Gradients], examples: slice) -> Tensor:
        """Return the sum over the uses of some examples' gradients, (…, *parameter)."""
        match uses:
            case [Whole() as one]:
                return one.gradients[examples]
        numbers, parameter = range(examples.start, examples.stop), self._parameters[name]
        shape = len(numbers), *parameter.shape
        made = torch.zeros(shape, dtype=self._dtype, device=parameter.device)
        for gradient, example in zip(made, numbers, strict=True):
            for use in uses:
                use.add_to(gradient, example)
        return made

    def _width(self, weight: str) -> int:
        return width(self._parameters[weight], self._blocks[weight].dims)


def _outers(uses: Sequence[Gradients]) -> list[tuple[Tensor, Tensor]]:
    return [(use.g, use.a) for use in uses if isinstance(use, Outer)]


def _add_upper(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the upper triangle of leftᵀ right, (n, n), and what is cheap to compute with it."""
    n = len(total)
    if n < THIN:
        total += left.T @ right
    elif n <= LEAF:
        total.addmm_(left.T, right)
    else:
        half = -(-n // 32) * 16  # so that rows stay aligned
        total[:half, half:].addmm_(left[:, :half].T, right[:, half:])
        _add_upper(total[:half, :half], left[:, :half], right[:, :half])
        _add_upper(total[half:, half:], left[:, half:], right[:, half:])


def width(weight: Tensor, dims: Sequence[int]) -> int:
    """Return the product of a weight's sizes along some dimensions."""
    return math.prod(weight.shape[dim] for dim in dims)


def _chunks(size: int, elements: int) -> Iterator[slice]:
    """Yield slices of as many examples as have CHUNK_ELEMENTS, if each has `elements`."""
    step = max(1, CHUNK_ELEMENTS // max(1, elements))
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
