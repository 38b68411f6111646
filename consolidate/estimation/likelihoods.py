"""log p(y|x) from a model's outputs, and its derivative: the same for the loss and for the Fisher.

The Fisher of a task is E_y[(Jᵀ s)²] with J the Jacobian of the outputs and s = ∂log p/∂outputs the
score. Every likelihood returns its scores as vectors to backpropagate, so that estimators differ
only in the vectors that they use.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from formats.errors import InputError, UsageError

IGNORED = -100  # the label of a position that is not predicted, as transformers writes it


class Likelihood(Protocol):
    """What the Fisher, the loss and the evaluation require of a likelihood.

    B is the number of examples; outputs are the model's, (B, …) floating point; labels are (B, …).
    Sums over an example's positions are one number: a sequence is one example with one score.
    """

    @property
    def name(self) -> str:
        """The name in the ledger."""

    def check_labels(self, outputs: Tensor, labels: Tensor) -> None:
        """Raise InputError if the labels do not fit the outputs in shape, kind or range."""

    def negative_log_likelihood(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return −log p(labels|x), (B,) float32 or wider, up to a constant of the data."""

    def divergence(self, old: Tensor, new: Tensor, labels: Tensor) -> Tensor:
        """Return KL(p_old ‖ p_new) of two outputs for the same examples, (B,) like the loss."""

    def units(self, labels: Tensor) -> Tensor:
        """Return how many units each example counts for, (B,) int64: 1, or its predicted tokens."""

    def correct(self, outputs: Tensor, labels: Tensor) -> Tensor | None:
        """Return how many units of each example are predicted right, (B,); None if undefined."""

    def outcomes(self, outputs: Tensor, labels: Tensor) -> int:
        """Return how many outcomes the closed form sums over."""

    def draws(self, outputs: Tensor) -> int:
        """Return how many uniform numbers sampling needs for each example."""

    def exact_scores(self, outputs: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """Yield vectors v, each like outputs, with Σ_v (Jᵀ v)² = E_y[(Jᵀ s)²] per example."""

    def sampled_scores(self, outputs: Tensor, labels: Tensor, uniforms: Tensor) -> Tensor:
        """Return the score of outcomes drawn from the model, like outputs.

        Labels only mark the ignored positions; uniforms are (B, draws).
        """

    def observed_scores(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the score of the labels themselves, like outputs."""


@dataclass(frozen=True)
class Softmax:
    """One of C classes, p = softmax(outputs): per example, or per position where `tokens` is set.

    Without tokens: outputs (B, C), labels (B,). With tokens: outputs (B, T, C), labels (B, T), −100
    where nothing is predicted. With `shift` outputs at t predict the label at t + 1.
    """

    name: str
    tokens: bool = False
    shift: bool = False

    def check_labels(self, outputs: Tensor, labels: Tensor) -> None:
        """Raise InputError unless labels are class indices for these outputs."""
        expected = ("examples", "positions", "classes") if self.tokens else ("examples", "classes")
        _check_outputs(self.name, outputs, *expected)
        _check_shape(self.name, labels, outputs.shape[:-1])
        if labels.dtype.is_floating_point or labels.dtype.is_complex:
            raise InputError(
                f"likelihood {self.name}: expected integer labels, found {labels.dtype}; use class "
                "indices"
            )
        classes = outputs.shape[-1]
        if not self.tokens and labels.numel():
            least, most = map(int, labels.aminmax())
            if least >= 0 and most < classes:
                return
        wrong = (labels < 0) | (labels >= classes)
        if self.tokens:
            wrong &= labels != IGNORED
        if wrong.any():
            where = wrong.nonzero()[0].tolist()
            position = f", position {where[1]}" if self.tokens else ""
            raise InputError(
                f"label {labels[tuple(where)].item()} (example {where[0]} of the batch{position}) "
                f"is out of range: expected 0 to {classes - 1}, as the model has {classes} outputs"
            )

    def negative_log_likelihood(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return −Σ_t log p_t(label_t), (B,)."""
        logits, targets = self._by_position(outputs, labels)
        losses = functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return losses.view(targets.shape).sum(1)

    def divergence(self, old: Tensor, new: Tensor, labels: Tensor) -> Tensor:
        """Return Σ_t Σ_c p_tc (log p_tc − log q_tc) over predicted positions, (B,)."""
        logits, targets = self._by_position(old, labels)
        past, present = logits.log_softmax(-1), self._by_position(new, labels)[0].log_softmax(-1)
        each = (past.exp() * (past - present)).sum(-1)  # (B, T)
        return (each * (targets != IGNORED)).sum(1)

    def units(self, labels: Tensor) -> Tensor:
        """Return the number of predicted positions, (B,); 1 without tokens."""
        if not self.tokens:
            return labels.new_ones(len(labels), dtype=torch.long)
        return (self._targets(labels) != IGNORED).sum(1)

    def correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the number of positions whose likeliest class is the label, (B,)."""
        logits, targets = self._by_position(outputs, labels)
        return (logits.argmax(-1) == targets).sum(1).to(logits.dtype)

    def outcomes(self, outputs: Tensor, labels: Tensor) -> int:
        """Return C times the positions that any example predicts."""
        return outputs.shape[-1] * len(self._predicted(labels))

    def draws(self, outputs: Tensor) -> int:
        """Return the number of positions."""
        return outputs.shape[1] if self.tokens else 1

    def exact_scores(self, outputs: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """Yield the columns of the Cholesky factor of diag(p) − ppᵀ, for one position at a time.

        The score of class c is 1_c − p, and its covariance is diag(p) − ppᵀ. Any factor of it is
        valid; this one has C − 1 columns where √p_c (1_c − p) has C. With tails r_k = Σ_{j≥k} p_j
        column k is √(p_k r_{k+1} / r_k) (1_k − Σ_{j>k} p_j/r_{k+1} 1_j)  (Tanabe & Sagae 1992).
        Scores of different positions are uncorrelated, so their squares add up.
        """
        logits, targets = self._by_position(outputs, labels)
        p = logits.softmax(-1)  # (B, T, C)
        tails = p.flip(-1).cumsum(-1).flip(-1).clamp_min(torch.finfo(p.dtype).tiny)
        rests = tails[..., 1:]
        scales = (p[..., :-1] * rests / tails[..., :-1]).sqrt() * (targets != IGNORED)[..., None]
        shares = -scales / rests
        for t in self._predicted(labels):
            for k in range(p.shape[-1] - 1):
                vector = torch.zeros_like(p)
                vector[:, t, k] = scales[:, t, k]
                vector[:, t, k + 1 :] = p[:, t, k + 1 :] * shares[:, t, k, None]
                yield vector.view(outputs.shape).to(outputs.dtype)

    def sampled_scores(self, outputs: Tensor, labels: Tensor, uniforms: Tensor) -> Tensor:
        """Return 1_y − p with y drawn from p, zero at ignored positions."""
        logits, targets = self._by_position(outputs, labels)
        predicted = targets != IGNORED
        # Numbered among the predicted ones, a position's number does not depend on the padding.
        numbers = (predicted.cumsum(1) - 1).clamp_min(0)
        draws = uniforms.to(_precise(logits)).gather(1, numbers)
        sampled = torch.stack(
            [draw(row.softmax(-1), u) for row, u in zip(logits, draws, strict=True)]
        )
        return self._scores(logits, sampled, ~predicted).view(outputs.shape).to(outputs.dtype)

    def observed_scores(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return 1_label − p, zero at ignored positions."""
        logits, targets = self._by_position(outputs, labels)
        scores = self._scores(logits, targets.clamp_min(0), targets == IGNORED)
        return scores.view(outputs.shape).to(outputs.dtype)

    def _scores(self, logits: Tensor, classes: Tensor, ignored: Tensor) -> Tensor:
        scores = logits.softmax(-1).neg_()  # (B, T, C)
        scores.scatter_add_(-1, classes[..., None], scores.new_ones(1).expand(*classes.shape, 1))
        return scores.masked_fill_(ignored[..., None], 0) if self.tokens else scores

    def _targets(self, labels: Tensor) -> Tensor:
        targets = labels.long() if self.tokens else labels.long()[:, None]
        return functional.pad(targets[:, 1:], (0, 1), value=IGNORED) if self.shift else targets

    def _by_position(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = _wide(outputs)
        return (logits if self.tokens else logits[:, None]), self._targets(labels)

    def _predicted(self, labels: Tensor) -> list[int]:
        return (self._targets(labels) != IGNORED).any(0).nonzero().flatten().tolist()


class _Columns:
    """The common part of likelihoods whose outputs (B, …) belong to independent labels."""

    def units(self, labels: Tensor) -> Tensor:
        """Return 1 for each example, (B,)."""
        return torch.ones(len(labels), dtype=torch.int64, device=labels.device)

    def outcomes(self, outputs: Tensor, labels: Tensor) -> int:
        """Return the number of an example's outputs."""
        return outputs[0].numel()

    def draws(self, outputs: Tensor) -> int:
        """Return the number of an example's outputs."""
        return outputs[0].numel()


@dataclass(frozen=True)
class Bernoulli(_Columns):
    """K independent binary labels, p = sigmoid(outputs): outputs and labels (B, K)."""

    name: str = "bernoulli"

    def check_labels(self, outputs: Tensor, labels: Tensor) -> None:
        """Raise InputError unless labels are 0 or 1, one for each output."""
        _check_outputs(self.name, outputs, "examples", "labels")
        _check_shape(self.name, labels, outputs.shape)
        wrong = (labels != 0) & (labels != 1)
        if wrong.any():
            example, label = wrong.nonzero()[0].tolist()
            raise InputError(
                f"label {label} of example {example} of the batch is "
                f"{labels[example, label].item()}: expected 0 or 1"
            )

    def negative_log_likelihood(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return −Σ_k log p_k(label_k), (B,)."""
        logits = _wide(outputs)
        losses = functional.binary_cross_entropy_with_logits(
            logits, labels.to(logits.dtype), reduction="none"
        )
        return losses.sum(1)

    def divergence(self, old: Tensor, new: Tensor, labels: Tensor) -> Tensor:
        """Return Σ_k KL(p_k ‖ q_k), (B,)."""
        past, present = _wide(old), _wide(new)
        sides = (
            (sign * past).sigmoid()
            * (functional.logsigmoid(sign * past) - functional.logsigmoid(sign * present))
            for sign in (1, -1)
        )
        return sum(sides, torch.zeros_like(past)).sum(1)

    def correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return 1 where all K labels are right, (B,)."""
        return ((outputs > 0) == (labels > 0.5)).all(1).to(_wide(outputs).dtype)

    def exact_scores(self, outputs: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """Yield √(p_k (1 − p_k)) 1_k for each label k."""
        logits = _wide(outputs)
        deviations = (logits.sigmoid() * (-logits).sigmoid()).sqrt().to(outputs.dtype)
        return _one_at_a_time(deviations)

    def sampled_scores(self, outputs: Tensor, labels: Tensor, uniforms: Tensor) -> Tensor:
        """Return y − p with y drawn from p."""
        p = _wide(outputs).sigmoid()
        return ((uniforms.to(_precise(p)) < p).to(p.dtype) - p).to(outputs.dtype)

    def observed_scores(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return labels − p."""
        p = _wide(outputs).sigmoid()
        return (labels.to(p.dtype) - p).to(outputs.dtype)


@dataclass(frozen=True)
class Gaussian(_Columns):
    """D numbers around the outputs with variance 1: outputs and labels (B, D), (B, 1) or (B,)."""

    name: str = "gaussian"

    def check_labels(self, outputs: Tensor, labels: Tensor) -> None:
        """Raise InputError unless there is one finite number for each output."""
        if labels.shape[:1] != outputs.shape[:1] or labels.numel() != outputs.numel():
            _check_shape(self.name, labels, outputs.shape)
        if not labels.isfinite().all():
            example = (~labels.isfinite()).nonzero()[0][0].item()
            raise InputError(
                f"the label of example {example} of the batch is not finite; correct or remove it"
            )

    def negative_log_likelihood(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return ½‖labels − outputs‖², (B,)."""
        return self._residuals(outputs, labels).square().flatten(1).sum(1) / 2

    def divergence(self, old: Tensor, new: Tensor, labels: Tensor) -> Tensor:
        """Return ½‖old − new‖², (B,)."""
        return (_wide(old) - _wide(new)).square().flatten(1).sum(1) / 2

    def correct(self, outputs: Tensor, labels: Tensor) -> None:
        """Return None: a prediction of a number is not right or wrong."""

    def exact_scores(self, outputs: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """Yield 1_d for each number d."""
        return _one_at_a_time(torch.ones_like(outputs))

    def sampled_scores(self, outputs: Tensor, labels: Tensor, uniforms: Tensor) -> Tensor:
        """Return standard normal numbers: y − outputs with y drawn around the outputs."""
        return torch.special.ndtri(uniforms).to(outputs).view(outputs.shape)

    def observed_scores(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return labels − outputs."""
        return self._residuals(outputs, labels).view(outputs.shape).to(outputs.dtype)

    def _residuals(self, outputs: Tensor, labels: Tensor) -> Tensor:
        predicted = _wide(outputs)
        return (labels.to(predicted.dtype).view(outputs.shape) - predicted).view(len(outputs), -1)


LIKELIHOODS: dict[str, Likelihood] = {
    likelihood.name: likelihood
    for likelihood in (
        Softmax("softmax"),
        Bernoulli(),
        Gaussian(),
        Softmax("token-softmax", tokens=True),
        Softmax("next-token-softmax", tokens=True, shift=True),
    )
}


def get_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """Return the likelihood of that name; an object that is a likelihood is returned unchanged."""
    if not isinstance(likelihood, str):
        return likelihood
    if likelihood not in LIKELIHOODS:
        raise UsageError(
            f"unknown likelihood {likelihood!r}: expected one of ({', '.join(LIKELIHOODS)})"
        )
    return LIKELIHOODS[likelihood]


def draw(p: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a class from each row of p by its inverse distribution function.

    Args:
        p: Probabilities, (T, C), of a sum that need not be 1.
        uniforms: Numbers in (0, 1), (T,), whose dtype is that of the sums.

    Returns:
        Classes, (T,) int64, each of a probability above zero.
    """
    # float32 would lose the classes of a large vocabulary that are less likely than 1e-7.
    sums = p.to(uniforms.dtype).cumsum(-1)
    total = sums[:, -1]
    # Strictly below the total, so that the sampled class always has a probability above zero.
    threshold = torch.minimum(uniforms * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(sums, threshold[:, None], right=True)[:, 0]


def _one_at_a_time(values: Tensor) -> Iterator[Tensor]:
    """Yield values (B, …) with all but one column set to zero, for each column."""
    flat = values.flatten(1) if values.ndim > 1 else values[:, None]
    for k in range(flat.shape[1]):
        vector = torch.zeros_like(flat)
        vector[:, k] = flat[:, k]
        yield vector.view(values.shape)


def _wide(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _precise(like: Tensor) -> Tensor:
    """Return an empty tensor on that device in its widest float type, as a target for `to`."""
    wide = torch.float32 if like.device.type == "mps" else torch.float64
    return torch.empty(0, dtype=wide, device=like.device)


def _check_outputs(name: str, outputs: Tensor, *axes: str) -> None:
    if outputs.ndim != len(axes):
        raise InputError(
            f"likelihood {name}: expected outputs of shape ({', '.join(axes)}), "
            f"found {tuple(outputs.shape)}; choose another likelihood or model"
        )


def _check_shape(name: str, labels: Tensor, expected: torch.Size) -> None:
    if labels.shape != expected:
        raise InputError(
            f"likelihood {name}: expected labels of shape {tuple(expected)} for these outputs, "
            f"found {tuple(labels.shape)}; reshape the labels"
        )
