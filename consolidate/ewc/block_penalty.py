"""The penalty on layers that have a matrix R: I ⊗ R/out in place of the diagonal."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from consolidate.ewc.matching import (
    NamedParameters,
    check_once,
    check_strength,
    checked_tensors,
    kept,
    named,
    storages,
    wide,
)
from consolidate.ewc.penalty import (
    Penalty,
    Pieces,
    SumPenalty,
    Term,
    add_,
    gradients,
    piece_size,
    present,
)
from consolidate.runtime.shards import is_cut
from formats.errors import InputError, NonFiniteError, UsageError

if TYPE_CHECKING:
    from formats.fisher_json import Block

LEAST_ROWS = 256  # of a piece: with fewer, the product is slower
SAME_TRACE = 0.01  # Λ and R may be stored in bfloat16, which has a relative error of 0.004
NOTHING = 1e-30  # a trace below this comes from numbers that float32 rounds to 0


class BlockPenalty(SumPenalty):
    """(λ/2) Σ tr(ΔW R ΔWᵀ) / out over the layers with a matrix R, the diagonal for the rest.

    ΔW = [W, b] − [W, b]_anchor is the change of a layer, out × in, or out × (in + 1) with its bias.
    I ⊗ R/out stands for the layer's Fisher with the same trace as its diagonal, so that one λ
    serves both. The gradient is λ/out · ΔW R, computed some rows at a time. Use it as `Penalty`;
    there is no proximal step, as the penalty is not separable.

    Attributes:
        ewc_lambda: λ.
        unprotected: Names of trainable parameters that have no Fisher.
    """

    def __init__(
        self,
        parameters: NamedParameters,
        fisher: Mapping[str, Tensor],
        anchor: Mapping[str, Tensor] | None = None,
        *,
        factors: Mapping[str, Tensor],
        blocks: Mapping[str, "Block"],
        factor_anchor: Mapping[str, Tensor] | None = None,
        ewc_lambda: float,
        offset: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        """Match Fisher, factors and anchors with the parameters.

        Tensors that already have the dtype and the device are stored without a copy: those of a
        safetensors file stay in the mapped file. They must not be written to afterwards.

        Args:
            parameters: A module, or pairs of name and parameter. A layer none of whose parameters
                requires gradients is ignored; if only one does, the other counts with its present
                difference.
            fisher: Λ by parameter name, in the parameters' shapes, also of the layers with an R.
            anchor: μ by parameter name, in the same shapes; by default the parameters' current
                values. Tensors that share memory with the parameters are copied.
            factors: R by block name, n × n: symmetric, with the trace of Λ over its parameters,
                within 1 %.
            blocks: The weight, perhaps with its bias, that each R is of, by the same names.
            factor_anchor: μ of parameters with an R, where it is not that in `anchor`.
            ewc_lambda: λ, finite and not negative.
            offset: A constant, times λ in every value: `factor_offset` of a ledger, or
                `penalty_offset` where it has none.
            dtype: The stored dtype of Λ and μ, as for `Penalty`. R is float32, or wider where the
                parameter is: rounded to bfloat16 it has negative eigenvalues, which push away.
            device: The device of Λ, μ and R; that of each parameter unless given.

        Raises:
            UsageError: If λ is negative or not finite, `dtype` is not floating, or parameters are
                sharded.
            InputError: If a name, shape or trace does not match, a Fisher is negative, or an R is
                not symmetric.
            NonFiniteError: If a Fisher, an anchor or an R is not finite.
        """
        check_strength(ewc_lambda, dtype)
        covered = covered_parameters(factors, blocks)
        known = named(parameters, [*fisher, *covered])
        self.ewc_lambda = ewc_lambda
        self._device = None if device is None else torch.device(device)
        self._terms: list[Term] = []
        live = storages(known.values())
        for name, block in blocks.items():
            ends, matrix = checked_block(name, block, factors, known)
            if not any(end.requires_grad for end in ends):
                continue
            anchors = checked_anchors(name, block, matrix, ends, fisher, anchor, factor_anchor)
            place = self._device or ends[0].device
            matrix = matrix.to(place, wide(ends[0].dtype))
            pairs = zip(anchors, ends, strict=True)
            mus = (kept(mu, end, dtype, place, live) for mu, end in pairs)
            self._terms.append(Term(ends, (matrix, *mus), block.dims))
        rest = Penalty(
            known.items(),
            {name: fisher[name] for name in fisher if name not in covered},
            anchor,
            ewc_lambda=ewc_lambda,
            offset=offset,
            dtype=dtype,
            device=device,
        )
        self._beside = (rest,)
        self.unprotected = [name for name in rest.unprotected if name not in covered]
        check_once(self.parameters())

    def _pieces(self, *, adding: bool) -> Pieces:
        for term in present(self._terms, self._device):
            ends = term.parameters
            out, matrix = len(by_row(ends[0], term.dims)), term.stored[0].to(ends[0].device)
            columns = zip(ends, columns_of(ends, term.dims), strict=True)
            trained = {end: inside for end, inside in columns if adding and end.requires_grad}
            with gradients(trained) as dense:
                into = [by_row(gradient, term.dims) for gradient in dense]
                for rows in row_pieces(out, matrix, LEAST_ROWS):
                    difference = _difference(term, rows)
                    pull = times(difference, matrix)
                    for gradient, inside in zip(into, trained.values(), strict=True):
                        add_(gradient[rows], pull[:, inside], self.ewc_lambda / out)
                    yield partial(_value, difference, pull, out)


def _difference(term: Term, rows: slice) -> Tensor:
    """ΔW of some rows, in float32 or wider."""
    weight, parts = term.parameters[0], []
    for end, anchor in zip(term.parameters, term.stored[1:], strict=True):
        theta, mu = (by_row(tensor.detach(), term.dims)[rows] for tensor in (end, anchor))
        dtype = wide(weight.dtype)
        parts.append((theta.to(dtype) - mu.to(weight.device, dtype)).flatten(1))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _value(difference: Tensor, pull: Tensor, out: int) -> Tensor:
    """tr(ΔW R ΔWᵀ) / out of some rows."""
    return inner(difference, pull) / out


def row_pieces(count: int, like: Tensor, least: int = 1) -> Iterator[slice]:
    """Split rows as long as those of a matrix so that the results of a piece fit the cache."""
    step = max(least, piece_size(like) // like.shape[1])
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def times(difference: Tensor, matrix: Tensor) -> Tensor:
    """ΔW R, in full precision within autocast too."""
    with torch.autocast(difference.device.type, enabled=False):
        return difference @ matrix.to(difference.dtype)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Σ a b over all elements."""
    return torch.dot(a.flatten(), b.flatten())


def by_row(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """View a weight with the dimension that is not in dims first; a bias as out × 1."""
    if tensor.ndim == 1:
        return tensor[:, None]
    (row,) = set(range(tensor.ndim)).difference(dims)
    return tensor.movedim(row, 0)


def columns_of(ends: Sequence[Tensor], dims: tuple[int, ...]) -> list[slice]:
    """Return the columns of ΔW that a weight, and then its bias, take."""
    inside = by_row(ends[0], dims)[0].numel()
    return [slice(inside), slice(inside, inside + 1)][: len(ends)]


def covered_parameters(factors: Mapping[str, Tensor], blocks: Mapping[str, "Block"]) -> set[str]:
    """Return the names of the parameters that blocks are of; refuse one that is in two."""
    if lost := [name for name in factors if name not in blocks]:
        raise InputError(f"the factor {lost[0]!r} has no block; pass the blocks of all factors")
    names = [at for block in blocks.values() for at in block.parameters]
    if len(set(names)) < len(names):
        twice = next(at for at in names if names.count(at) > 1)
        raise InputError(f"{twice!r} is in two blocks: expected at most one; measure them again")
    return set(names)


def checked_block(
    name: str,
    block: "Block",
    factors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
) -> tuple[tuple[nn.Parameter, ...], Tensor]:
    """Return the weight of a block, with its bias if it has one, and its R.

    An R that does not fit them, is not finite or not symmetric, is refused.
    """
    where = f"the block {name!r}"
    if block.matrix != "R":
        raise InputError(
            f"{where} is a matrix {block.matrix}: expected R; use the diagonal alone "
            '(structure="diagonal")'
        )
    for at in block.parameters:
        if at not in parameters:
            raise InputError(
                f"{where} is of {at!r}, which is not a parameter of this model; use the Fisher of "
                "this model, with its names"
            )
        if is_cut(parameters[at]):
            raise UsageError(
                f"{where} is of {at!r}, which is sharded: use the diagonal alone "
                '(structure="diagonal")'
            )
    if name not in factors:
        raise InputError(f"{where} has no matrix; pass its factor too")
    ends, matrix = tuple(parameters[at] for at in block.parameters), factors[name].detach()
    weight, biases = ends[0], ends[1:]
    others = set(range(weight.ndim)).difference(block.dims)
    if len(others) != 1 or max(block.dims) >= weight.ndim or len(biases) > 1:
        raise InputError(
            f"{where}: expected a weight and at most a bias, and all dimensions of the weight but "
            f"one, found {', '.join(block.parameters)} and the dimensions {list(block.dims)}"
        )
    rows = by_row(weight, block.dims)
    if biases and biases[0].shape != rows.shape[:1]:
        raise InputError(
            f"{where}: expected a bias of shape {(len(rows),)} for the weight of shape "
            f"{tuple(weight.shape)}, found {tuple(biases[0].shape)}"
        )
    n = rows[0].numel() + len(biases)
    if matrix.shape != (n, n):
        raise InputError(
            f"the factor of {name!r} has shape {tuple(matrix.shape)}: expected {(n, n)} for "
            f"{' and '.join(block.parameters)}; use the Fisher of this model"
        )
    _check_matrix(name, matrix)
    return ends, matrix


def checked_anchors(
    name: str,
    block: "Block",
    matrix: Tensor,
    ends: Sequence[nn.Parameter],
    fisher: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor] | None,
    factor_anchor: Mapping[str, Tensor] | None,
) -> tuple[Tensor, ...]:
    """Return μ of each parameter of a block, the parameter itself if there are no anchors.

    Λ and μ that do not fit are refused, and an R of another scale than Λ.
    """
    anchors, expected = [], 0.0
    for at, end in zip(block.parameters, ends, strict=True):
        if at not in fisher:
            raise InputError(
                f"the block {name!r} is of {at!r}, which has no Fisher; pass its Fisher too"
            )
        own = factor_anchor if factor_anchor is not None and at in factor_anchor else anchor
        values, mu = checked_tensors(at, end, fisher[at], own)
        expected += float(values.sum(dtype=torch.float64))
        anchors.append(mu)
    found = float(matrix.diagonal().sum(dtype=torch.float64))
    if abs(found - expected) > SAME_TRACE * max(found, expected) + NOTHING:
        # A reader takes the scale from Λ; one that differs is not what was measured with it.
        raise InputError(
            f"the factor of {name!r} has the trace {found:.6g}: expected {expected:.6g} as the "
            f"Fisher of its parameters, within {SAME_TRACE:.0%}; measure both again"
        )
    return tuple(anchors)


def _check_matrix(name: str, matrix: Tensor) -> None:
    if not matrix.isfinite().all():
        raise NonFiniteError(f"the factor of {name!r} has values that are NaN or infinite")
    if not torch.equal(matrix, matrix.T):
        raise InputError(f"the factor of {name!r} is not symmetric; measure it again")
    if (matrix.diagonal() < 0).any():
        raise InputError(
            f"the factor of {name!r} has negative values on its diagonal; measure it again"
        )
