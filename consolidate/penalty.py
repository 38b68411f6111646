"""The penalty (λ/2) Σ Λ (θ − μ)², added to gradients in place, with no autograd graph."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from formats.errors import InputError, NonFiniteError, UsageError

NamedParameters = nn.Module | Iterable[tuple[str, nn.Parameter]]


class _Term(NamedTuple):
    parameter: nn.Parameter
    fisher: Tensor
    anchor: Tensor


class Penalty:
    """(λ/2) Σ_i Λ_i (θ_i − μ_i)² over the parameters that have a Fisher (Kirkpatrick et al. 2017).

    Once per optimizer step, after the loss's gradients are accumulated and unscaled and before they
    are clipped::

        penalty = Penalty(model, fisher, ewc_lambda=100.0)
        …
        loss.backward()
        penalty.add_gradient_()
        optimizer.step()

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
        ewc_lambda: float,
        offset: float = 0.0,
    ):
        """Match Fisher and anchor with the parameters.

        Args:
            parameters: A module, or pairs of name and parameter. What does not require gradients is
                left alone.
            fisher: Λ by parameter name, of the parameters' shapes, finite and not negative.
            anchor: μ by parameter name, of the same shapes; by default the parameters' present
                values, copied.
            ewc_lambda: λ, finite and not negative.
            offset: A constant, times λ in every value: `penalty_offset` of a ledger.

        Raises:
            UsageError: If λ is negative or not finite.
            InputError: If a name or shape does not match, or a Fisher is negative.
            NonFiniteError: If a Fisher or an anchor is not finite.
        """
        if not (math.isfinite(ewc_lambda) and ewc_lambda >= 0):
            raise UsageError(f"ewc_lambda is {ewc_lambda}; it must be finite and not negative.")
        if isinstance(parameters, nn.Module):
            parameters = parameters.named_parameters()
        known = dict(parameters)
        if unknown := [name for name in fisher if name not in known]:
            raise InputError(
                f"The Fisher holds {unknown[0]!r} ({len(unknown)} such names), which is no "
                "parameter of this model: it belongs to another model or to other names."
            )
        trained = {name: p for name, p in known.items() if p.requires_grad}
        self.ewc_lambda = ewc_lambda
        self._constant = torch.tensor(ewc_lambda * offset)
        self._terms = [
            _term(name, parameter, fisher[name], anchor)
            for name, parameter in trained.items()
            if name in fisher
        ]
        protected = {id(term.parameter) for term in self._terms}
        if len(protected) < len(self._terms):
            raise InputError("A tied parameter is given under two names: it would count twice.")
        self.unprotected = [name for name, p in trained.items() if id(p) not in protected]

    @classmethod
    def l2(
        cls,
        parameters: NamedParameters,
        anchor: Mapping[str, Tensor] | None = None,
        *,
        ewc_lambda: float,
    ) -> "Penalty":
        """Return (λ/2) Σ (θ − μ)², that is Λ = 1 for every trainable parameter."""
        if isinstance(parameters, nn.Module):
            parameters = parameters.named_parameters()
        trained = {name: p for name, p in parameters if p.requires_grad}
        ones = {
            name: torch.ones((), device=p.device).expand(p.shape) for name, p in trained.items()
        }
        return cls(trained.items(), ones, anchor, ewc_lambda=ewc_lambda)

    @torch.no_grad()
    def value(self) -> float:
        """Return (λ/2) Σ Λ (θ − μ)² + λ · offset at the parameters' present values."""
        return sum((self._value(*_pull(term)) for term in self._terms), self._constant).item()

    @torch.no_grad()
    def add_gradient_(self) -> Tensor:
        """Add λ Λ (θ − μ) to each parameter's gradient, creating it where there is none.

        Returns:
            The penalty's value at the present values, 0-dimensional, on the parameters' device.
        """
        values = []
        for term in self._terms:
            difference, pull = _pull(term)
            values.append(self._value(difference, pull))
            parameter, pull = term.parameter, self.ewc_lambda * pull
            if parameter.grad is None:
                parameter.grad = pull.to(parameter.dtype)
            else:
                # Summed before it is rounded to a narrower type: the smaller of the two survives.
                parameter.grad.copy_(parameter.grad.to(pull.dtype) + pull)
        return sum(values, self._constant)

    def _value(self, difference: Tensor, pull: Tensor) -> Tensor:
        return self.ewc_lambda / 2 * (difference * pull).sum()


def _pull(term: _Term) -> tuple[Tensor, Tensor]:
    """Return θ − μ and Λ (θ − μ), in float32 or wider."""
    difference = term.parameter.to(term.anchor.dtype) - term.anchor
    return difference, term.fisher * difference


def _term(
    name: str, parameter: nn.Parameter, fisher: Tensor, anchors: Mapping[str, Tensor] | None
) -> _Term:
    if anchors is not None and name not in anchors:
        raise InputError(f"The anchor holds no {name!r}, which the Fisher protects.")
    anchor = parameter if anchors is None else anchors[name]
    for kind, tensor in (("Fisher", fisher), ("anchor", anchor)):
        if tensor.shape != parameter.shape:
            raise InputError(
                f"The {kind} of {name!r} has shape {tuple(tensor.shape)}, the parameter "
                f"{tuple(parameter.shape)}: they belong to different models."
            )
        if not tensor.isfinite().all():
            raise NonFiniteError(f"The {kind} of {name!r} holds values that are not finite.")
    if (fisher < 0).any():
        raise InputError(f"The Fisher of {name!r} holds negative values.")
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return _Term(
        parameter,
        fisher.detach().to(parameter.device, wide),
        anchor.detach().to(parameter.device, wide, copy=True),
    )
