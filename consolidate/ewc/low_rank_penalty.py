"""The penalty on weights that low-rank adapters change, applied to the adapters' factors."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from consolidate.ewc.penalty import (
    CPU_PIECE,
    DEVICE_PIECE,
    Penalty,
    check_strength,
    checked_tensors,
    converted,
    wide,
)
from formats.errors import InputError


class LowRank(NamedTuple):
    """A layer's weight W with a low-rank change: W + s B A, or W + s (B A)ᵀ where transposed."""

    weight: nn.Parameter  # W, (out, in, …); (in, out) where transposed, as Conv1D and embeddings
    a: nn.Parameter  # A, (r, in, …)
    b: nn.Parameter  # B, (out, r, …)
    scale: float  # s, α/r or α/√r
    transposed: bool = False


class _Term(NamedTuple):
    layer: LowRank
    fisher: Tensor
    anchor: Tensor | None  # None where it is W


class MergedPenalty:
    """(λ/2) Σ Λ (W + s B A − μ)² over the layers whose weights low-rank adapters change.

    The weights W are frozen, and A and B are trained. With G = λ Λ (W + s B A − μ), elementwise,
    the gradients are s Bᵀ G of A and s G Aᵀ of B (Kirkpatrick et al. 2017, eq. 3, and the chain
    rule). They are computed layer by layer, some rows at a time: W + s B A never exists as a whole.

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
        beside: Penalty | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        """Match Fisher and anchor with the layers, by the names and shapes of their weights.

        Tensors that already have the dtype and the device are stored without a copy, and must not
        be written to afterwards.

        Args:
            layers: The adapted layers by the name of their weight.
            fisher: Λ by weight name, in the weights' shapes, finite and not negative; that of
                other weights is ignored.
            anchor: μ by weight name, in the same shapes; None where it is W, which takes no memory.
            ewc_lambda: λ, finite and not negative.
            offset: A constant, times λ in every value: `penalty_offset` of a ledger.
            beside: The penalty on parameters that are trained without an adapter; its λ is ignored.
            dtype: The stored dtype of Λ and μ: float32, or wider where W is, unless given.
            device: The device of Λ and μ; that of each weight unless given.

        Raises:
            UsageError: If λ is negative or not finite, or `dtype` is not floating.
            InputError: If no layer has a Fisher, a shape does not match, or a Fisher is negative.
            NonFiniteError: If a Fisher or an anchor is not finite.
        """
        check_strength(ewc_lambda, dtype)
        self.ewc_lambda = ewc_lambda
        self._beside = beside or Penalty((), {}, ewc_lambda=ewc_lambda)
        self.unprotected = [name for name in layers if name not in fisher]
        self.unprotected += self._beside.unprotected
        self._offset = offset
        self._terms = []
        for name, layer in layers.items():
            if name not in fisher:
                continue
            tensors = checked_tensors(name, layer.weight, fisher[name], anchor)
            place = layer.weight.device if device is None else torch.device(device)
            kept = [converted(t, place, dtype or wide(layer.weight.dtype)) for t in tensors]
            self._terms.append(_Term(layer, kept[0], None if anchor is None else kept[1]))
        if not self._terms:
            raise InputError(
                "the Fisher contains none of the weights that the adapter changes: "
                f"{', '.join(list(layers)[:3])}"
            )

    def parameters(self) -> list[nn.Parameter]:
        """Return the penalized parameters: A and B of each layer, and those beside."""
        factors = [factor for term in self._terms for factor in (term.layer.a, term.layer.b)]
        return factors + self._beside.parameters()

    @torch.no_grad()
    def value(self) -> float:
        """Return (λ/2) Σ Λ (W + s B A − μ)² + λ · offset at the current values."""
        values = [
            torch.sum(difference * difference * fisher)
            for term in self._terms
            for _, difference, fisher in _pieces(term)
        ]
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
        total = self._total([torch.dot(pull.flatten(), far.flatten()) for pull, far in pieces])
        return total + self._at_lambda().value_and_add_gradient_().to(total)

    def _adding_gradient(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Add the gradient; yield Λ (W + s B A − μ) and W + s B A − μ of some rows meanwhile."""
        for term in self._terms:
            left, right = _factors(term.layer)
            of_left, of_right = torch.empty_like(left), torch.zeros_like(right)
            for rows, difference, fisher in _pieces(term):
                pull = fisher * difference
                of_left[rows] = pull @ right.T
                of_right.addmm_(left[rows].T, pull)
                yield pull, difference
            factor = self.ewc_lambda * term.layer.scale
            for parameter, gradient in zip(
                (term.layer.a, term.layer.b),
                (of_left.T, of_right.T) if term.layer.transposed else (of_right, of_left),
                strict=True,
            ):
                if not parameter.requires_grad:
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradient = gradient.mul_(factor).reshape(parameter.shape)
                # Summed before it is rounded to a narrower type: the smaller one survives.
                parameter.grad.copy_(gradient + parameter.grad)

    def _at_lambda(self) -> Penalty:
        self._beside.ewc_lambda = self.ewc_lambda
        return self._beside

    def _total(self, values: list[Tensor]) -> Tensor:
        total = torch.zeros(())
        if values:
            total = torch.stack([value.to(values[0]) for value in values]).sum()
        return self.ewc_lambda * (total / 2 + self._offset)


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
