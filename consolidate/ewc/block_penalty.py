"""The penalty on layers that have a matrix R: I ⊗ R/out in place of the diagonal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from consolidate.ewc.penalty import (
    CPU_PIECE,
    DEVICE_PIECE,
    NamedParameters,
    Penalty,
    check_strength,
    checked_tensors,
    kept,
    named,
    storages,
    wide,
)
from consolidate.runtime.shards import is_cut
from formats.errors import InputError, NonFiniteError, UsageError

if TYPE_CHECKING:
    from formats.fisher_json import Block

LEAST_ROWS = 256  # of a piece: with fewer, the product is slower
SAME_TRACE = 0.01  # Λ and R may be stored in bfloat16, which has a relative error of 0.004
NOTHING = 1e-30  # a trace below this comes from numbers that float32 rounds to 0


class _Term(NamedTuple):
    ends: tuple[nn.Parameter, ...]  # the weight, and the bias where R has a row for it
    anchors: tuple[Tensor, ...]
    dims: tuple[int, ...]  # of the weight, that R ranges over
    matrix: Tensor


class _Piece(NamedTuple):
    rows: slice
    difference: Tensor  # ΔW of these rows
    pull: Tensor  # ΔW R
    out: int  # rows of the whole

    def value(self) -> Tensor:
        """tr(ΔW R ΔWᵀ) / out of these rows."""
        return inner(self.difference, self.pull) / self.out


class BlockPenalty:
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
        self._terms: list[_Term] = []
        live = storages(known.values())
        for name, block in blocks.items():
            ends, matrix = checked_block(name, block, factors, known)
            if not any(end.requires_grad for end in ends):
                continue
            anchors = checked_anchors(name, block, matrix, ends, fisher, anchor, factor_anchor)
            place = self._device or ends[0].device
            matrix = matrix.to(place, wide(ends[0].dtype))
            pairs = zip(anchors, ends, strict=True)
            anchors = tuple(kept(mu, end, dtype, place, live) for mu, end in pairs)
            self._terms.append(_Term(ends, anchors, block.dims, matrix))
        rest = {name: fisher[name] for name in fisher if name not in covered}
        self._rest = Penalty(
            known.items(),
            rest,
            anchor,
            ewc_lambda=ewc_lambda,
            offset=offset,
            dtype=dtype,
            device=device,
        )
        self.unprotected = [name for name in self._rest.unprotected if name not in covered]
        every = self.parameters()
        if len({id(parameter) for parameter in every}) < len(every):
            raise InputError("a tied parameter has two names and would count twice; pass it once")

    def parameters(self) -> list[nn.Parameter]:
        """Return the penalized parameters."""
        ends = [end for term in self._terms for end in term.ends if end.requires_grad]
        return ends + self._rest.parameters()

    @torch.no_grad()
    def value(self) -> float:
        """Return the penalty, with λ · offset, at the parameters' current values."""
        values = [piece.value() for term in self._present() for piece in _pieces(term)]
        return self._total(values).item() + self._at_lambda().value()

    @torch.no_grad()
    def add_gradient_(self) -> None:
        """Add λ/out · ΔW R and λ Λ (θ − μ) to the gradients, creating them where there are none."""
        for _ in self._adding_gradient():
            pass
        self._at_lambda().add_gradient_()

    @torch.no_grad()
    def value_and_add_gradient_(self) -> Tensor:
        """Do what `add_gradient_` does, and return the value, from the same products."""
        total = self._total([piece.value() for piece in self._adding_gradient()])
        return total + self._at_lambda().value_and_add_gradient_().to(total)

    def _adding_gradient(self) -> Iterator[_Piece]:
        """Add the gradient of the blocks, yielding each piece meanwhile."""
        for term in self._present():
            gradients = [
                (by_row(gradient_of(end), term.dims), columns)
                for end, columns in zip(term.ends, columns_of(term.ends, term.dims), strict=True)
                if end.requires_grad
            ]
            for piece in _pieces(term):
                for gradient, columns in gradients:
                    add_(gradient[piece.rows], piece.pull[:, columns], self.ewc_lambda / piece.out)
                yield piece

    def _present(self) -> Iterator[_Term]:
        """Yield the terms of which a parameter currently requires gradients."""
        for i, term in enumerate(self._terms):
            if not any(end.requires_grad for end in term.ends):
                continue
            device = term.ends[0].device
            if self._device is None and term.matrix.device != device:  # the model was moved since
                anchors = tuple(mu.to(device) for mu in term.anchors)
                self._terms[i] = term._replace(anchors=anchors, matrix=term.matrix.to(device))
            yield self._terms[i]

    def _at_lambda(self) -> Penalty:
        self._rest.ewc_lambda = self.ewc_lambda
        return self._rest

    def _total(self, values: list[Tensor]) -> Tensor:
        if not values:
            return torch.zeros(())
        return self.ewc_lambda / 2 * torch.stack([value.to(values[0]) for value in values]).sum()


def _pieces(term: _Term) -> Iterator[_Piece]:
    """Split a term by rows; yield ΔW and ΔW R, in float32 or wider."""
    weight = term.ends[0]
    device, dtype = weight.device, wide(weight.dtype)
    matrix = term.matrix.to(device)
    thetas = [by_row(end.detach(), term.dims) for end in term.ends]
    anchors = [by_row(mu, term.dims) for mu in term.anchors]
    for rows in row_pieces(len(thetas[0]), matrix):
        parts = [
            theta[rows].to(dtype) - mu[rows].to(device, dtype)
            for theta, mu in zip(thetas, anchors, strict=True)
        ]
        flat = [part.flatten(1) for part in parts]
        difference = torch.cat(flat, 1) if len(flat) > 1 else flat[0]
        yield _Piece(rows, difference, times(difference, matrix), len(thetas[0]))


def row_pieces(count: int, matrix: Tensor) -> Iterator[slice]:
    """Split rows so that the intermediate results of a piece fit the cache."""
    size = CPU_PIECE * torch.get_num_threads() if matrix.is_cpu else DEVICE_PIECE
    step = max(LEAST_ROWS, size // len(matrix))
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


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's gradient, made first where there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def add_(gradient: Tensor, pull: Tensor, factor: float) -> None:
    """Add a multiple of a pull, some rows in a row each, to a gradient."""
    pull = pull.reshape(gradient.shape)
    if gradient.dtype == pull.dtype:
        gradient.add_(pull, alpha=factor)
    else:
        # Summed before it is rounded to a narrower type: the smaller one survives.
        gradient.copy_((pull * factor).add_(gradient))


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
