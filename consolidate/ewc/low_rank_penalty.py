"""The penalty on weights that low-rank adapters change, applied to the adapters' factors."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from consolidate.ewc.block_penalty import (
    LEAST_ROWS,
    by_row,
    checked_anchors,
    checked_block,
    covered_parameters,
    inner,
    row_pieces,
    times,
)
from consolidate.ewc.matching import (
    check_strength,
    checked_tensors,
    converted,
    kept,
    storages,
    wide,
)
from consolidate.ewc.penalty import Pieces, SumPenalty, WeightPenalty, add_, gradients
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
    """A layer with its Λ, in the weight's shape, or with R over some dimensions of the weight."""

    layer: LowRank
    fisher: Tensor
    anchor: Tensor | None  # None where it is W
    dims: tuple[int, ...] = ()  # none with Λ
    bias_anchor: Tensor | None = None  # None where R has no row for the bias

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """A and B, and the bias where R has a row for it."""
        layer = self.layer
        bias = () if self.bias_anchor is None or layer.bias is None else (layer.bias,)
        return (layer.a, layer.b, *bias)


class MergedPenalty(SumPenalty):
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
        self._beside = () if beside is None else (beside,)
        self.unprotected = [name for name in layers if name not in fisher]
        self.unprotected += [name for other in self._beside for name in other.unprotected]
        self._offset = offset
        self._terms: list[_Term] = []
        factors, blocks = factors or {}, blocks or {}
        covered = covered_parameters(factors, blocks)
        for name, layer in layers.items():
            if name in fisher and name not in covered:
                tensors = checked_tensors(name, layer.weight, fisher[name], anchor)
                place = layer.weight.device if device is None else torch.device(device)
                stored = [converted(t, place, dtype or wide(layer.weight.dtype)) for t in tensors]
                self._terms.append(_Term(layer, stored[0], None if anchor is None else stored[1]))
        for name, block in blocks.items():
            if (adapted := layers.get(block.parameters[0])) is not None:
                ends, matrix = _checked_ends(name, block, factors, adapted)
                mus = checked_anchors(name, block, matrix, ends, fisher, anchor, factor_anchor)
                self._terms.append(_block_term(adapted, block, matrix, mus, dtype, device))
        if not self._terms:
            raise InputError(
                "the Fisher contains none of the weights that the adapter changes: "
                f"{', '.join(list(layers)[:3])}"
            )

    def _pieces(self, *, adding: bool) -> Pieces:
        for term in self._terms:
            p, q, scale = _factors(term)
            of_p, of_q = torch.empty_like(p), torch.zeros_like(q)
            if term.dims and term.anchor is None:
                # D = P Q, so no matrix of W's shape is made: P Q R = P (Q R).
                pulled = times(q, term.fisher.to(q.device)).div_(len(p))
                squares, cross = p.T @ p, pulled @ q.T
                of_p, of_q = p @ cross, squares @ pulled
                yield partial(inner, squares, cross)
            else:
                for rows, difference, pull in _rows(term, p, q, scale):
                    if adding:
                        of_p[rows] = pull @ q.T
                        of_q.addmm_(p[rows].T, pull)
                    yield partial(inner, pull, difference)
            if adding:
                self._add(term, of_p, of_q, scale)

    def _add(self, term: _Term, of_p: Tensor, of_q: Tensor, scale: float) -> None:
        """Add to the gradients of A, B and the bias that are not frozen."""
        layer, strength = term.layer, self.ewc_lambda
        if layer.transposed and not term.dims:
            of_p, of_q = of_q.T, of_p.T
        rank, inside = layer.a.flatten(1).shape
        of_a, of_b = of_q[:rank, :inside] * (strength * scale), of_p[:, :rank]
        parts = (of_a, of_b * (strength * layer.scale), of_p[:, rank:] * strength)
        pairs = zip(term.parameters, parts, strict=False)
        trained = {parameter: part for parameter, part in pairs if parameter.requires_grad}
        with gradients(trained) as dense:
            for gradient, part in zip(dense, trained.values(), strict=True):
                add_(gradient, part, 1.0)


def _factors(term: _Term) -> tuple[Tensor, Tensor, float]:
    """Return P, Q and s of the difference D = s P Q + W − μ, in float32 or wider.

    With Λ its rows are those of W: P and Q are B and A, or Aᵀ and Bᵀ. With R they are the outputs:
    P = [s B, Δb] and Q = [[A, 0], [0, 1]], without their last where R has no row for the bias.
    """
    layer = term.layer
    dtype = wide(torch.promote_types(layer.weight.dtype, layer.a.dtype))
    a, b = (factor.detach().flatten(1).to(dtype) for factor in (layer.a, layer.b))
    if not term.dims:
        return (a.T, b.T, layer.scale) if layer.transposed else (b, a, layer.scale)
    b = b * layer.scale
    if term.bias_anchor is not None:
        assert layer.bias is not None
        change = layer.bias.detach().to(b) - term.bias_anchor.to(b)
        b, a = torch.cat([b, change[:, None]], 1), torch.block_diag(a, a.new_ones(1, 1))
    return b, a, 1.0


def _rows(
    term: _Term, p: Tensor, q: Tensor, scale: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Split a layer by rows: yield the slice, its D, and Λ D or D R / out."""
    weight = term.layer.weight.detach()
    dims = term.dims or tuple(range(1, weight.ndim))
    fisher = term.fisher.to(q.device) if term.dims else term.fisher.flatten(1)
    for rows in row_pieces(len(p), q, LEAST_ROWS if term.dims else 1):
        difference = (p[rows] @ q).mul_(scale)
        if term.anchor is not None:
            theta, mu = (by_row(t, dims)[rows].to(q).flatten(1) for t in (weight, term.anchor))
            difference[:, : theta.shape[1]] += theta - mu
        if term.dims:
            yield rows, difference, times(difference, fisher).div_(len(p))
        else:
            yield rows, difference, fisher[rows].to(difference) * difference


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
) -> _Term:
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
    return _Term(layer, matrix.to(place, precise), anchor, block.dims, bias_anchor)
