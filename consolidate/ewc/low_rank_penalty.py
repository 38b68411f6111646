"""The penalty on weights that low-rank adapters change, applied to the adapters' factors."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from consolidate.ewc.block_penalty import (
    by_row,
    checked_anchors,
    checked_block,
    columns_of,
    covered_parameters,
    inner,
    row_pieces,
    times,
)
from consolidate.ewc.penalty import (
    CPU_PIECE,
    DEVICE_PIECE,
    Penalty,
    WeightPenalty,
    check_strength,
    checked_tensors,
    converted,
    kept,
    storages,
    wide,
)
from formats.errors import InputError

if TYPE_CHECKING:
    from formats.fisher_json import Block


class LowRank(NamedTuple):
    """A layer's weight W with a low-rank change: W + s B A, or W + s (B A)ᵀ where transposed."""

    weight: nn.Parameter  # W, (out, in, …); (in, out) where transposed, as Conv1D and embeddings
    a: nn.Parameter  # A, (r, in, …)
    b: nn.Parameter  # B, (out, r, …)
    scale: float  # s, α/r or α/√r
    transposed: bool = False
    bias: nn.Parameter | None = None  # of the layer, used as it is


class _Term(NamedTuple):
    layer: LowRank
    fisher: Tensor
    anchor: Tensor | None  # None where it is W


class _BlockTerm(NamedTuple):
    layer: LowRank
    dims: tuple[int, ...]
    matrix: Tensor
    anchor: Tensor | None  # None where it is W
    bias_anchor: Tensor | None  # None where R has no row for the bias


class MergedPenalty:
    """(λ/2) Σ Λ (W + s B A − μ)² over the layers whose weights low-rank adapters change.

    The weights W are frozen, and A and B are trained. With G = λ Λ (W + s B A − μ), elementwise,
    the gradients are s Bᵀ G of A and s G Aᵀ of B (Kirkpatrick et al. 2017, eq. 3, and the chain
    rule). They are computed layer by layer, some rows at a time: W + s B A never exists as a whole.
    Of a layer with a matrix R, as in `BlockPenalty`, G is λ/out · (W + s B A − μ) R.

    There is no proximal step, as the penalty is not separable in A and B.
    """

    def __init__(
        self,
        layers: Mapping[str, LowRank],
        fisher: Mapping[str, Tensor],
        anchor: Mapping[str, Tensor] | None = None,
        *,
        ewc_lambda: float,
        offset: float = 0.0,
        beside: WeightPenalty | None = None,
        factors: Mapping[str, Tensor] | None = None,
        blocks: Mapping[str, "Block"] | None = None,
        factor_anchor: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        """Match Fisher and anchor with the layers, by the names and shapes of their weights.

        Tensors that already have the dtype and the device are stored without a copy, and must not
        be written to afterwards.

        Args:
            layers: The adapted layers by the name of their weight.
            fisher: Λ by weight name, in the weights' shapes, finite and not negative, and that of
                biases with an R; that of other parameters is ignored.
            anchor: μ by the same names, in the same shapes; None where it is W, which takes no
                memory.
            ewc_lambda: λ, finite and not negative.
            offset: A constant, times λ in every value: `penalty_offset` of a ledger, or
                `factor_offset` with factors, if it has one.
            beside: The penalty on parameters that are trained without an adapter; its λ is ignored.
            factors: R by block name, as for `BlockPenalty`; those of other weights are ignored.
            blocks: The weight, perhaps with its bias, that each R is of, by the same names. A bias
                counts as it is, and gets a gradient if it requires one.
            factor_anchor: μ of weights and biases with an R, where it is not that in `anchor`.
            dtype: The stored dtype of Λ and μ: float32, or wider where W is, unless given. R is
                float32, or wider where W is.
            device: The device of Λ, μ and R; that of each weight unless given.

        Raises:
            UsageError: If λ is negative or not finite, or `dtype` is not floating.
            InputError: If no layer has a Fisher, a shape or trace does not match, a Fisher is
                negative, or an R is not symmetric.
            NonFiniteError: If a Fisher, an anchor or an R is not finite.
        """
        check_strength(ewc_lambda, dtype)
        self.ewc_lambda = ewc_lambda
        self._beside: WeightPenalty = beside or Penalty((), {}, ewc_lambda=ewc_lambda)
        self.unprotected = [name for name in layers if name not in fisher]
        self.unprotected += self._beside.unprotected
        self._offset = offset
        self._terms = []
        self._block_terms = []
        factors, blocks = factors or {}, blocks or {}
        covered = covered_parameters(factors, blocks)
        for name, block in blocks.items():
            if (adapted := layers.get(block.parameters[0])) is not None:
                ends, matrix = _checked_ends(name, block, factors, adapted)
                mus = checked_anchors(name, block, matrix, ends, fisher, anchor, factor_anchor)
                self._block_terms.append(_block_term(adapted, block, matrix, mus, dtype, device))
        for name, layer in layers.items():
            if name not in fisher or name in covered:
                continue
            tensors = checked_tensors(name, layer.weight, fisher[name], anchor)
            place = layer.weight.device if device is None else torch.device(device)
            stored = [converted(t, place, dtype or wide(layer.weight.dtype)) for t in tensors]
            self._terms.append(_Term(layer, stored[0], None if anchor is None else stored[1]))
        if not (self._terms or self._block_terms):
            raise InputError(
                "the Fisher contains none of the weights that the adapter changes: "
                f"{', '.join(list(layers)[:3])}"
            )

    def parameters(self) -> list[nn.Parameter]:
        """Return the penalized parameters: A and B of each layer, and those beside."""
        layers = [term.layer for term in self._terms]
        layers += [term.layer for term in self._block_terms]
        own = [factor for layer in layers for factor in (layer.a, layer.b)]
        biases = [term.layer.bias for term in self._block_terms if term.bias_anchor is not None]
        own += [bias for bias in biases if bias is not None and bias.requires_grad]
        return own + self._beside.parameters()

    @torch.no_grad()
    def value(self) -> float:
        """Return (λ/2) Σ Λ (W + s B A − μ)² + λ · offset at the current values."""
        values = [
            torch.sum(difference * difference * fisher)
            for term in self._terms
            for _, difference, fisher in _pieces(term)
        ]
        values += [_block_gradients(term)[0] for term in self._block_terms]
        return self._total(values).item() + self._at_lambda().value()

    @torch.no_grad()
    def add_gradient_(self) -> None:
        """Add s Bᵀ G and s G Aᵀ to the gradients of A and B, creating them where there are none."""
        for _ in self._adding_gradient():
            pass
        self._at_lambda().add_gradient_()

    @torch.no_grad()
    def value_and_add_gradient_(self) -> Tensor:
        """Do what `add_gradient_` does, and return the penalty's value at the current values."""
        pieces = self._adding_gradient()
        total = self._total([inner(*piece) for piece in pieces])
        return total + self._at_lambda().value_and_add_gradient_().to(total)

    def _adding_gradient(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Add the gradient; yield pairs whose products are the value, apart from λ/2, meanwhile."""
        for term in self._terms:
            left, right = _factors(term.layer)
            of_left, of_right = torch.empty_like(left), torch.zeros_like(right)
            for rows, difference, fisher in _pieces(term):
                pull = fisher * difference
                of_left[rows] = pull @ right.T
                of_right.addmm_(left[rows].T, pull)
                yield pull, difference
            factor = self.ewc_lambda * term.layer.scale
            if term.layer.transposed:
                of_left, of_right = of_right.T, of_left.T
            _add(term.layer.a, of_right.mul_(factor))
            _add(term.layer.b, of_left.mul_(factor))
        for block in self._block_terms:
            layer, rank = block.layer, len(block.layer.a)
            value, of_p, of_q = _block_gradients(block)
            inside = columns_of((layer.weight,), block.dims)[0]
            _add(layer.a, of_q[:rank, inside] * self.ewc_lambda)
            _add(layer.b, of_p[:, :rank] * (self.ewc_lambda * layer.scale))
            if block.bias_anchor is not None:
                assert layer.bias is not None
                _add(layer.bias, of_p[:, rank] * self.ewc_lambda)
            yield value, torch.ones_like(value)

    def _at_lambda(self) -> WeightPenalty:
        self._beside.ewc_lambda = self.ewc_lambda
        return self._beside

    def _total(self, values: list[Tensor]) -> Tensor:
        total = torch.zeros(())
        if values:
            total = torch.stack([value.to(values[0]) for value in values]).sum()
        return self.ewc_lambda * (total / 2 + self._offset)


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to a parameter's gradient, creating it where there is none, unless it is frozen."""
    if not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    # Summed before it is rounded to a narrower type: the smaller one survives.
    parameter.grad.copy_(gradient.reshape(parameter.shape) + parameter.grad)


def _factors(layer: LowRank) -> tuple[Tensor, Tensor]:
    """Return L (rows, r) and R (r, columns) of W + s L R, in float32 or wider."""
    dtype = wide(torch.promote_types(layer.weight.dtype, layer.a.dtype))
    a, b = (factor.detach().flatten(1).to(dtype) for factor in (layer.a, layer.b))
    return (a.T, b.T) if layer.transposed else (b, a)


def _pieces(term: _Term) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Split a layer by rows: yield the slice, and its W + s L R − μ and Λ."""
    left, right = _factors(term.layer)
    weight, fisher = term.layer.weight.detach().flatten(1), term.fisher.flatten(1)
    anchor = None if term.anchor is None else term.anchor.flatten(1)
    size = CPU_PIECE * torch.get_num_threads() if left.is_cpu else DEVICE_PIECE
    step = max(1, size // right.shape[1])
    for first in range(0, len(left), step):
        rows = slice(first, min(first + step, len(left)))
        difference = (left[rows] @ right).mul_(term.layer.scale)
        if anchor is not None:
            difference.add_(weight[rows].to(difference) - anchor[rows].to(difference))
        yield rows, difference, fisher[rows].to(difference)


def _checked_ends(
    name: str, block: "Block", factors: Mapping[str, Tensor], layer: LowRank
) -> tuple[tuple[nn.Parameter, ...], Tensor]:
    """Return the weight of a block, with its bias if it has one, and its R, if they fit a layer."""
    given = zip(block.parameters, (layer.weight, layer.bias), strict=False)
    ends, matrix = checked_block(
        name, block, factors, {at: end for at, end in given if end is not None}
    )
    if layer.transposed != (0 in block.dims):
        raise InputError(
            f"the block {name!r} is over the dimensions {list(block.dims)}: expected those of the "
            "layer's inputs; use the Fisher of this model"
        )
    return ends, matrix


def _block_term(
    layer: LowRank,
    block: "Block",
    matrix: Tensor,
    anchors: tuple[Tensor, ...],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> _BlockTerm:
    """Convert R and μ; leave out a μ that is W."""
    weight = layer.weight
    place = weight.device if device is None else torch.device(device)
    precise = wide(weight.dtype)
    anchor: Tensor | None = anchors[0]
    if torch.equal(anchors[0].to(weight.device, precise), weight.to(precise)):
        anchor = None
    else:
        anchor = converted(anchors[0], place, dtype or precise)
    bias_anchor = None
    if len(anchors) > 1:
        assert layer.bias is not None
        bias_anchor = kept(anchors[1], layer.bias, dtype, place, storages([layer.bias]))
    matrix = matrix.to(place, precise)
    return _BlockTerm(layer, block.dims, matrix, anchor, bias_anchor)


def _block_gradients(term: _BlockTerm) -> tuple[Tensor, Tensor, Tensor]:
    """Return tr(D R Dᵀ)/out and its half's gradients of P and Q, where D = P Q + W − μ.

    P = [s B, Δb] and Q = [[A, 0], [0, 1]], without their last where R has no row for the bias.
    Where μ is W, no matrix of W's shape is made: P Q R = P (Q R).
    """
    layer = term.layer
    dtype = wide(torch.promote_types(layer.weight.dtype, layer.a.dtype))
    p, q = (factor.detach().flatten(1).to(dtype) for factor in (layer.b, layer.a))
    p = p * layer.scale
    if term.bias_anchor is not None:
        assert layer.bias is not None
        change = layer.bias.detach().to(p) - term.bias_anchor.to(p)
        p, q = torch.cat([p, change[:, None]], 1), torch.block_diag(q, q.new_ones(1, 1))
    matrix, out = term.matrix.to(q.device), len(p)
    if term.anchor is None:
        pulled = times(q, matrix).div_(out)
        squares, cross = p.T @ p, pulled @ q.T
        return inner(squares, cross), p @ cross, squares @ pulled
    value, of_p, of_q = q.new_zeros(()), torch.empty_like(p), torch.zeros_like(q)
    weight, anchor = (by_row(t.detach(), term.dims) for t in (layer.weight, term.anchor))
    inside = columns_of((layer.weight,), term.dims)[0]
    for rows in row_pieces(out, matrix):
        difference = p[rows] @ q
        difference[:, inside] += (weight[rows].to(q) - anchor[rows].to(q)).flatten(1)
        pull = times(difference, matrix).div_(out)
        of_p[rows] = pull @ q.T
        of_q.addmm_(p[rows].T, pull)
        value += inner(difference, pull)
    return value, of_p, of_q
