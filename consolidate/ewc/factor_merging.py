"""Merging the matrices R: of a new task with those of earlier tasks, and of several models.

The penalty of a layer with a matrix R is the quadratic ½ tr((W − M) R (W − M)ᵀ) / out + offset,
apart from λ, with W standing for [W, b], out × n. A sum of such quadratics is one of them, with a
larger offset: R = Σ R_k, and M where M R = Σ M_k R_k.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from consolidate.ewc.block_penalty import by_row, columns_of
from consolidate.ewc.fisher_merging import merge_online
from formats.errors import InputError

if TYPE_CHECKING:
    from formats.fisher_json import Block


def online(
    total: Mapping[str, Tensor],
    factors: Mapping[str, Tensor],
    *,
    gamma: float = 1.0,
    weight: float = 1.0,
) -> dict[str, Tensor]:
    """Merge one task into the running total: R_t = γ R_{t−1} + w R, anchored at θ_t*.

    Args:
        total: R_{t−1} by block name, n × n.
        factors: R of the task by block name; a block it lacks (frozen, say) keeps γ R_{t−1}. Where
            one of the two has no row for the bias, that row is 0 in it.
        gamma: γ in [0, 1], the weight of the earlier tasks.
        weight: w ≥ 0, the new task's weight.

    Returns:
        R_t in float32, in the order of `total`, then of `factors`.
    """
    total, factors = dict(total), dict(factors)
    for name in total.keys() & factors.keys():
        size = max(len(total[name]), len(factors[name]))
        total[name], factors[name] = of_size(total[name], size), of_size(factors[name], size)
    return merge_online(total, factors, gamma=gamma, weight=weight)


def separate(
    total: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    factors: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    blocks: Mapping[str, "Block"],
    *,
    weight: float = 1.0,
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Merge one task so that the penalty stays the sum of all tasks' penalties.

    R_t = R_{t−1} + w R, and M_t where M_t R_t = M_{t−1} R_{t−1} + w W_t R. On the null space of
    R_t, where no task has a penalty, M_t is W_t. The offset grows so that, with
    q(M, R) = ½ tr((W − M) R (W − M)ᵀ) / out,

        q(M_t, R_t) + growth = q(M_{t−1}, R_{t−1}) + w q(W_t, R)        for every W.

    It is computed in float64. Eigenvalues of R_t up to 1.2·10⁻⁷ times the largest count as 0, as
    rounding R to float32 changes them by as much.

    Args:
        total: R_{t−1} by block name, n × n.
        anchor: M_{t−1} by the names of the parameters of the blocks in `total`.
        factors: R of the task by block name; a block it lacks (frozen, say) keeps R_{t−1} and
            M_{t−1}. Where one of the two has no row for the bias, that row is 0 in it.
        weights: W_t, by the names of the parameters of the blocks in `factors`.
        blocks: The blocks of R_t.
        weight: w ≥ 0, the new task's weight.

    Returns:
        R_t by block name and M_t by parameter name, in float32, or in float64 where an input is;
        and the growth of the offset.
    """
    merged: dict[str, Tensor] = {}
    anchors: dict[str, Tensor] = {}
    growth = 0.0
    for name in dict.fromkeys([*total, *factors]):
        at = blocks[name].parameters
        terms = []
        # Weights without an R are those of the newest to the bit, not only up to rounding.
        if name in total and (name not in factors or bool(total[name].any())):
            mu = tuple(anchor[end] if end in anchor else weights[end] for end in at)
            terms.append(_Term(1.0, 0.0, (mu,), total[name]))
        if name in factors:
            theta = tuple(weights[end] if end in weights else anchor[end] for end in at)
            terms.append(_Term(weight, 1.0, (theta,), factors[name]))
        dtypes = [t.dtype for term in terms for t in (*term.layers[0], term.matrix)]
        wide = reduce(torch.promote_types, dtypes, torch.float32)
        matrix, (means,), offset = _sum(terms, blocks[name].dims)
        merged[name] = matrix.to(wide)
        anchors |= {end: mu.to(wide) for end, mu in zip(at, means, strict=True)}
        growth += offset
    return merged, anchors, max(growth, 0.0)  # below 0 only by rounding


class ModelBlock(NamedTuple):
    """The input of `of_models` for one block of a model."""

    coefficient: float  # c, the weight of its R
    weights: tuple[Tensor, ...]  # the layer's weight, and its bias if the block has one
    matrix: Tensor | None = None  # R; 0 where it has none
    anchor: tuple[Tensor, ...] | None = None  # M; the weights unless given


class MergedBlock(NamedTuple):
    """The output of `of_models` for one block, in float64, and the offset's growth."""

    weights: tuple[Tensor, ...]
    matrix: Tensor
    anchor: tuple[Tensor, ...]
    offset: float


def of_models(
    block: "Block", models: Iterable[ModelBlock], base: ModelBlock | None = None
) -> MergedBlock:
    """Merge one block of several models, read one after the other (RegMean).

    R = Σ c_k R_k, W R = Σ c_k W_k R_k, M R = Σ c_k M_k R_k, and on the null space of R, found as in
    `separate`, the mean weighted by c_k. The penalty is the sum of the models' penalties,

        q(M, R) + growth = Σ_k c_k q(M_k, R_k)        for every W, with q as in `separate`.

    A base whose R is contained in each R_k enters with the coefficient 1 − Σ c_k, so that it counts
    once, and does not enter the mean. The result does not depend on the order, up to rounding, and
    is associative except for that mean. Equal weights, or anchors, come back to the bit.

    Args:
        block: What R is of; its parameters are in the order of the tensors.
        models: The models' tensors, of the same shapes, c_k > 0. An R without a row for the bias
            has 0 there.
        base: The tensors of their common ancestor, its coefficient ignored.

    Returns:
        The merged block; the sum over all blocks of its offset, with Σ c_k of the models' own, is
        the merged model's.

    Source: Jin et al. 2023, https://arxiv.org/abs/2212.09849, with R for the inputs' products.
    """

    def terms() -> Iterator[_Term]:
        coefficients = 0.0
        for model in models:
            coefficients += model.coefficient
            yield _term(model, model.coefficient, model.coefficient)
        if base is not None and coefficients != 1.0:
            yield _term(base, 1.0 - coefficients, 0.0)

    matrix, (weights, anchor), offset = _sum(terms(), block.dims)
    return MergedBlock(weights, matrix, anchor, offset)


class _Term(NamedTuple):
    """A quadratic around the last of some layers, each a weight and perhaps its bias."""

    coefficient: float  # of R
    share: float  # of the layers in the mean on the null space
    layers: tuple[tuple[Tensor, ...], ...]
    matrix: Tensor


def _term(model: ModelBlock, coefficient: float, share: float) -> _Term:
    anchor = model.weights if model.anchor is None else model.anchor
    matrix = torch.zeros(0, 0) if model.matrix is None else model.matrix
    return _Term(coefficient, share, (model.weights, anchor), matrix)


def _sum(
    terms: Iterable[_Term], dims: tuple[int, ...]
) -> tuple[Tensor, list[tuple[Tensor, ...]], float]:
    """Sum quadratics: return R, the layers that it is around, and the growth of the offset.

    All is in differences to the first layers, so that equal ones come back to the bit.
    """
    terms = iter(terms)
    first = next(terms)
    start = joined(first.layers, dims)
    total = first.coefficient * of_size(first.matrix.cpu().double(), start.shape[2])
    pulls, mean = torch.zeros_like(start), torch.zeros_like(start)
    shares, squares, epsilon = first.share, 0.0, _epsilon(first.matrix)
    for term in terms:
        difference = joined(term.layers, dims) - start
        matrix = term.coefficient * of_size(term.matrix.cpu().double(), start.shape[2])
        pull = difference @ matrix
        total, pulls, shares = total + matrix, pulls + pull, shares + term.share
        mean += term.share * difference
        squares += float((pull[-1] * difference[-1]).sum())
        epsilon = max(epsilon, _epsilon(term.matrix))
    change = torch.zeros_like(start)
    if bool(pulls.any()) or bool(mean.any()):
        change = _solved(total, pulls, mean / (shares or 1.0), epsilon)
        # Σ c tr((M − M_k) R_k (M − M_k)ᵀ), with the change M − M_1 as it is, rounded or not.
        squares -= 2 * float((pulls[-1] * change[-1]).sum())
        squares += float(((change[-1] @ total) * change[-1]).sum())
    layers = [_split(layer, first.layers[0], dims) for layer in start + change]
    return total, layers, squares / (2 * start.shape[1])


def _solved(total: Tensor, pulls: Tensor, mean: Tensor, epsilon: float) -> Tensor:
    """Solve D R = pulls for D, which is the mean on the null space of R."""
    values, vectors = torch.linalg.eigh(total)
    # What is 0 is found only up to the rounding of float64 itself.
    relative = max(epsilon, 10 * len(values) * torch.finfo(values.dtype).eps)
    known = values > relative * float(values[-1].clamp(min=0))
    inside, null = vectors[:, known], vectors[:, ~known]
    return (pulls @ inside / values[known]) @ inside.T + (mean @ null) @ null.T


def _epsilon(matrix: Tensor) -> float:
    """Return the relative rounding error of R as it is stored: that of float32, or of float64."""
    return torch.finfo(torch.promote_types(matrix.dtype, torch.float32)).eps


def of_size(matrix: Tensor, size: int) -> Tensor:
    """Give R a row and a column of 0 for a bias that it has none for."""
    missing = size - len(matrix)
    if missing < 0:
        raise InputError(
            f"a factor has {len(matrix)} rows: expected at most {size} for its block; pass the "
            "block of the merged factor"
        )
    return functional.pad(matrix, (0, missing, 0, missing)) if missing else matrix


def joined(layers: Iterable[Sequence[Tensor]], dims: tuple[int, ...]) -> Tensor:
    """Return [W, b] of each layer, out × n, in float64."""
    return torch.stack(
        [
            torch.cat([by_row(end, dims).flatten(1).cpu().double() for end in layer], 1)
            for layer in layers
        ]
    )


def _split(layer: Tensor, like: Sequence[Tensor], dims: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Undo `joined` for one layer."""
    ends = []
    for end, columns in zip(like, columns_of(like, dims), strict=True):
        made = torch.empty(end.shape, dtype=layer.dtype)
        rows = by_row(made, dims)
        rows.copy_(layer[:, columns].reshape(rows.shape))
        ends.append(made)
    return tuple(ends)
