"""The penalty (λ/2) Σ Λ (θ − μ)², computed in place and in pieces, without an autograd graph."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from consolidate.ewc.matching import (
    NamedParameters,
    check_once,
    check_strength,
    checked_tensors,
    converted,
    kept,
    named,
    storages,
    wide,
)
from consolidate.runtime.shards import local, sum_of_parts
from formats.errors import InputError, UsageError

STEPS = ("gradient", "proximal")
CPU_PIECE = 2**16  # elements per thread: intermediate results stay in its cache until used
DEVICE_PIECE = 2**24
SMALLEST, LARGEST = 1e-37, 1e38  # within float32
TINY = torch.finfo(torch.float32).tiny


class Term(NamedTuple):
    """Parameters that are penalized together, and the tensors stored for them."""

    parameters: tuple[nn.Parameter, ...]
    stored: tuple[Tensor, ...]
    dims: tuple[int, ...] = ()  # of a weight that has a matrix R: those that R ranges over


Pieces = Iterator[Callable[[], Tensor]]  # each computes 2/λ times its part of the value, once


class _Pull(NamedTuple):
    """1/(s λ) of a proximal step: `floor`, and with Adam `inverse` · √`square` on top of it."""

    inverse: float
    floor: float
    square: Tensor | None


class WeightPenalty(Protocol):
    """What training requires of a penalty, on the weights or on their change by adapters."""

    ewc_lambda: float
    unprotected: list[str]

    def parameters(self) -> list[nn.Parameter]:
        """Return the penalized parameters."""

    def value(self) -> float:
        """Return the penalty at the current values."""

    def add_gradient_(self) -> None:
        """Add the penalty's gradient to the parameters'."""

    def value_and_add_gradient_(self) -> Tensor:
        """Do the same in the same pass over memory, and return the value, 0-dimensional."""


class SumPenalty:
    """The sum over the pieces of some terms, and over other penalties: what all penalties share.

    A subclass has `_pieces`, which adds the gradient on the way if asked to.
    """

    ewc_lambda: float
    unprotected: list[str]
    _terms: list[Any]
    _offset = 0.0
    _beside: Sequence[WeightPenalty] = ()  # on other parameters, at the same λ

    def parameters(self) -> list[nn.Parameter]:
        """Return the penalized parameters."""
        own = [p for term in self._terms for p in term.parameters if p.requires_grad]
        return own + [p for other in self._beside for p in other.parameters()]

    @torch.no_grad()
    def value(self) -> float:
        """Return the penalty, with λ · offset, at the parameters' current values."""
        own = self._total(self._pieces(adding=False)).item()
        return own + sum(other.value() for other in self._others())

    @torch.no_grad()
    def add_gradient_(self) -> None:
        """Add the penalty's gradient to the parameters', creating it where there is none."""
        for _ in self._pieces(adding=True):
            pass
        for other in self._others():
            other.add_gradient_()

    @torch.no_grad()
    def value_and_add_gradient_(self) -> Tensor:
        """Do what `add_gradient_` does, in at most a quarter more time, and return the value."""
        total = self._total(self._pieces(adding=True))
        for other in self._others():
            total = total + other.value_and_add_gradient_().to(total)
        return total

    def _pieces(self, *, adding: bool) -> Pieces:
        raise NotImplementedError

    def _others(self) -> Sequence[WeightPenalty]:
        for other in self._beside:
            other.ewc_lambda = self.ewc_lambda
        return self._beside

    def _total(self, pieces: Pieces) -> Tensor:
        values = [piece() for piece in pieces]
        total = torch.zeros(())
        if values:
            dtype = max((value.dtype for value in values), key=lambda dtype: dtype.itemsize)
            total = torch.stack([value.to(values[0].device, dtype) for value in values]).sum()
            total = sum_of_parts(total, self._terms[0].parameters[0])
        return self.ewc_lambda * (total / 2 + self._offset)


class Penalty(SumPenalty):
    """(λ/2) Σ_i Λ_i (θ_i − μ_i)² over the parameters that have a Fisher (Kirkpatrick et al. 2017).

    Once per optimizer step, after the loss's gradients are accumulated and unscaled and before they
    are clipped::

        penalty = Penalty(model, fisher, ewc_lambda=100.0)
        …
        loss.backward()
        penalty.add_gradient_()
        optimizer.step()

    Or implicitly, by `proximal_step_` after the optimizer's step.

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
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        """Match Fisher and anchor with the parameters.

        Tensors that already have the dtype and the device are stored without a copy: those of a
        safetensors file stay in the mapped file. They must not be written to afterwards.

        Args:
            parameters: A module, or pairs of name and parameter. Parameters that do not require
                gradients are ignored.
            fisher: Λ by parameter name, in the parameters' shapes, finite and not negative.
            anchor: μ by parameter name, in the same shapes; by default the parameters' current
                values. Tensors that share memory with the parameters are copied.
            ewc_lambda: λ, finite and not negative.
            offset: A constant, times λ in every value: `penalty_offset` of a ledger.
            dtype: The stored dtype of Λ and μ; by default their own, at most float32, or wider
                where the parameter is. torch.bfloat16 rounds μ too, which is exact if the weights
                are bfloat16. The penalty is computed in float32 or wider in any case.
            device: The device of Λ and μ, such as ``cpu``; that of each parameter unless given.

        Raises:
            UsageError: If λ is negative or not finite, or `dtype` is not floating.
            InputError: If a name or shape does not match, or a Fisher is negative.
            NonFiniteError: If a Fisher or an anchor is not finite.
        """
        check_strength(ewc_lambda, dtype)
        known = named(parameters, fisher)
        if unknown := [name for name in fisher if name not in known]:
            raise InputError(
                f"the Fisher contains {unknown[0]!r} ({len(unknown)} such names), which is not a "
                "parameter of this model; use the Fisher of this model, with its names"
            )
        trained = {name: p for name, p in known.items() if p.requires_grad}
        self.ewc_lambda = ewc_lambda
        self._offset = offset
        self._device = None if device is None else torch.device(device)
        live = storages(known.values())
        self._terms: list[Term] = []
        for name, parameter in trained.items():
            if name in fisher:
                tensors = checked_tensors(name, parameter, fisher[name], anchor)
                place = self._device or parameter.device
                stored = tuple(kept(tensor, parameter, dtype, place, live) for tensor in tensors)
                self._terms.append(Term((parameter,), stored))
        check_once(self.parameters())
        protected = {id(parameter) for parameter in self.parameters()}
        self.unprotected = [name for name, p in trained.items() if id(p) not in protected]

    @classmethod
    def l2(
        cls,
        parameters: NamedParameters,
        anchor: Mapping[str, Tensor] | None = None,
        *,
        ewc_lambda: float,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "Penalty":
        """Return (λ/2) Σ (θ − μ)², that is Λ = 1 for every trainable parameter."""
        trained = {
            name: p for name, p in named(parameters, anchor or ()).items() if p.requires_grad
        }
        ones = {
            name: torch.ones((), device=p.device).expand(p.shape) for name, p in trained.items()
        }
        return cls(trained.items(), ones, anchor, ewc_lambda=ewc_lambda, dtype=dtype, device=device)

    @torch.no_grad()
    def proximal_step_(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Take the penalty's step, implicitly, after the optimizer's step on the loss.

            θ ← argmin_z (λ/2) Σ Λ (z − μ)² + Σ (z − θ)² / (2 s) = (θ + s λ Λ μ) / (1 + s λ Λ)

        with the optimizer's rate s of each parameter: η (1 − dampening)/(1 − momentum) for SGD and
        η / (√v̂ + ε), bias-corrected, for Adam and AdamW. Its fixed points are stationary points of
        loss plus penalty; and it is stable for every λ, whereas the gradient form diverges where
        s λ Λ > 2. Parameters that are not the optimizer's, or that Adam has not stepped yet, are
        unchanged.

        Call it, or register it once, which is needed under a GradScaler that may skip the
        optimizer's step: ``optimizer.register_step_post_hook(penalty.proximal_step_)``.

        Args:
            optimizer: torch's SGD, Adam or AdamW.

        Raises:
            UsageError: If the optimizer is another one, whose rate is unknown.
        """
        for _ in self._stepping(optimizer):
            pass

    @torch.no_grad()
    def proximal_step_and_value_(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Do what `proximal_step_` does, and return the penalty's value after it."""
        pieces = self._stepping(optimizer)
        return self._total(
            partial(_weighed, theta - anchor, fisher) for theta, fisher, anchor in pieces
        )

    def _pieces(self, *, adding: bool) -> Pieces:
        for term in present(self._terms, self._device):
            with gradients(term.parameters if adding else ()) as dense:
                for theta, fisher, anchor, *gradient in _cut(term, *map(local, dense)):
                    difference = theta - anchor
                    for total in gradient:
                        _add_pull_(total, difference, fisher, self.ewc_lambda)
                    yield partial(_weighed, difference, fisher)

    def _stepping(
        self, optimizer: torch.optim.Optimizer
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Take the proximal step; yield the new θ, Λ and μ of each piece meanwhile."""
        check_proximal(optimizer)
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        if getattr(optimizer, "found_inf", False):
            groups = {}  # A GradScaler calls a fused optimizer even if it must skip its step.
        for term in present(self._terms, self._device):
            (parameter,) = term.parameters
            group = groups.get(id(parameter))
            state = optimizer.state.get(parameter, {})
            pull = None if group is None else self._pull(group, state)
            squares = [] if pull is None or pull.square is None else [local(pull.square)]
            for theta, fisher, anchor, *square in _cut(term, *squares):
                if pull is not None:
                    _pull_back(theta, fisher, anchor, pull, *square)
                yield theta, fisher, anchor

    def _pull(self, group: dict[str, Any], state: dict[str, Any]) -> _Pull | None:
        """Return the pull on a parameter; None if there is none."""
        rate, floor, square = float(group["lr"]), 1.0, None
        if "betas" in group:
            # Adam: 1/s = (√v + ε √c) / (η √c) with the bias correction c = 1 − β₂ᵗ.
            if "step" not in state:
                return None
            square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
            correction = (1 - float(group["betas"][1]) ** float(state["step"])) ** 0.5
            rate, floor = rate * correction, group["eps"] * correction
        elif group["momentum"]:
            rate *= (1 - group["dampening"]) / (1 - group["momentum"])
        if rate * self.ewc_lambda == 0:
            return None
        inverse = min(1 / (rate * self.ewc_lambda), LARGEST)
        return _Pull(inverse, max(floor * inverse, SMALLEST), square)  # avoids 0 / 0


def check_proximal(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose per-parameter rate is unknown: all but SGD, Adam and AdamW."""
    if not isinstance(optimizer, torch.optim.SGD | torch.optim.Adam):  # AdamW is an Adam
        raise UsageError(
            f"the proximal step supports SGD, Adam and AdamW, not "
            f"{type(optimizer).__name__}; use the penalty's gradient instead"
        )


def present(terms: list[Term], device: torch.device | None) -> Iterator[Term]:
    """Yield the terms of which a parameter currently requires gradients.

    Without a device, what is stored follows a model that was moved since.
    """
    for i, term in enumerate(terms):
        if any(parameter.requires_grad for parameter in term.parameters):
            place = term.parameters[0].device
            if device is None and term.stored[0].device != place:
                moved = tuple(converted(t, place, t.dtype) for t in term.stored)
                terms[i] = term._replace(stored=moved)
            yield terms[i]


@contextmanager
def gradients(parameters: Collection[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Give the dense gradients of parameters to add to, creating them where there are none."""
    dense = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        sparse = parameter.grad.is_sparse
        dense.append(torch.zeros_like(parameter) if sparse else parameter.grad)
    yield dense
    for parameter, added in zip(parameters, dense, strict=True):
        # A sparse gradient stays sparse, as SparseAdam requires: unchanged rows add nothing.
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad.add_(added.to_sparse(parameter.grad.sparse_dim()))


def piece_size(tensor: Tensor) -> int:
    """Return how many elements to take at a time, so that intermediate results fit the cache."""
    return CPU_PIECE * torch.get_num_threads() if tensor.is_cpu else DEVICE_PIECE


def _cut(term: Term, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split a parameter's tensors and others of its shape into pieces, if their layouts agree.

    Yields θ; Λ and μ, on its device in float32 or wider; and the others.
    """
    parameter = local(term.parameters[0].detach())
    device, dtype = parameter.device, wide(parameter.dtype)
    tensors = (parameter, *term.stored, *others)
    cut: Iterable[tuple[Tensor, ...]] = [tensors]
    size = piece_size(parameter)
    if parameter.numel() > size and all(
        tensor.is_contiguous() or not any(tensor.stride()) for tensor in tensors
    ):
        cut = zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)
    for theta, fisher, anchor, *rest in cut:
        yield theta, fisher.to(device, dtype), anchor.to(device, dtype), *rest


def _add_pull_(gradient: Tensor, difference: Tensor, fisher: Tensor, ewc_lambda: float) -> None:
    """Add λ Λ (θ − μ) to a gradient."""
    if gradient.dtype == difference.dtype:
        gradient.addcmul_(fisher, difference, value=ewc_lambda)
    else:
        add_(gradient, difference * fisher, ewc_lambda)


def add_(gradient: Tensor, pull: Tensor, factor: float) -> None:
    """Add a multiple of a pull, of as many elements, to a gradient."""
    pull = pull.reshape(gradient.shape)
    if gradient.dtype == pull.dtype:
        gradient.add_(pull, alpha=factor)
    else:
        # Summed before it is rounded to a narrower type: the smaller one survives.
        gradient.copy_((pull * factor).add_(gradient))


def _pull_back(
    theta: Tensor, fisher: Tensor, anchor: Tensor, pull: _Pull, square: Tensor | None = None
) -> None:
    """Take a piece's proximal step: the part w = Λ / (Λ + 1/(s λ)) of the way to μ."""
    weight = fisher + pull.floor
    if square is not None:
        # Roots of 0, as in rows that no example touched, take 20 times as long on a CPU.
        weight.add_(square.to(weight).clamp(min=TINY).sqrt_(), alpha=pull.inverse)
    torch.div(fisher, weight, out=weight)
    if theta.dtype == weight.dtype:
        theta.lerp_(anchor, weight)
    else:
        theta.copy_(theta.to(weight).lerp_(anchor, weight))


def _weighed(difference: Tensor, fisher: Tensor) -> Tensor:
    """Σ Λ (θ − μ)², overwriting the difference."""
    return torch.dot(difference.mul_(difference).flatten(), fisher.flatten())
