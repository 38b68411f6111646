"""The Fisher diagonal by its definition in float64, of log p and outcomes written out plainly."""

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from consolidate.estimation.definition import fisher_by_definition

Log = Callable[[Tensor, Tensor], Tensor]


def log_softmax(output: Tensor, label: Tensor) -> Tensor:
    """log p(label) of one example; output (C,), label ()."""
    return output[label] - output.exp().sum().log()


def log_bernoulli(output: Tensor, label: Tensor) -> Tensor:
    """Sum over K labels; output (K,), label (K,) of 0 and 1."""
    p = 1 / (1 + (-output).exp())
    return torch.where(label == 1, p, 1 - p).log().sum()


def log_gaussian(output: Tensor, label: Tensor) -> Tensor:
    """-½‖label - output‖²; both (D,)."""
    return -0.5 * ((label.reshape(output.shape) - output) ** 2).sum()


def log_tokens(output: Tensor, label: Tensor) -> Tensor:
    """Sum over positions that are not -100; output (T, C), label (T,)."""
    kept = [log_softmax(output[t], label[t]) for t in range(len(label)) if label[t] != -100]
    return torch.stack(kept).sum() if kept else output.sum() * 0


def log_next_tokens(output: Tensor, label: Tensor) -> Tensor:
    """As log_tokens, output t against label t + 1."""
    return log_tokens(output[:-1], label[1:])


def outcomes_softmax(output: Tensor, label: Tensor) -> Iterable[Tensor]:
    return [torch.tensor(c) for c in range(len(output))]


def outcomes_bernoulli(output: Tensor, label: Tensor) -> Iterable[Tensor]:
    return [torch.tensor(y) for y in itertools.product([0, 1], repeat=len(output))]


def outcomes_tokens(output: Tensor, label: Tensor) -> Iterable[Tensor]:
    """Every sequence of classes, -100 staying where it is."""
    choices = [range(output.shape[1]) if y != -100 else [-100] for y in label.tolist()]
    return [torch.tensor(y) for y in itertools.product(*choices)]


def outcomes_next_tokens(output: Tensor, label: Tensor) -> Iterable[Tensor]:
    rest = outcomes_tokens(output[:-1], label[1:])
    return [torch.cat([torch.tensor([-100]), y]) for y in rest]


REFERENCE: dict[str, tuple[Log, Callable[[Tensor, Tensor], Iterable[Tensor]] | None]] = {
    "softmax": (log_softmax, outcomes_softmax),
    "bernoulli": (log_bernoulli, outcomes_bernoulli),
    "gaussian": (log_gaussian, None),
    "token-softmax": (log_tokens, outcomes_tokens),
    "next-token-softmax": (log_next_tokens, outcomes_next_tokens),
}


def outputs(model: nn.Module, inputs: Any) -> Tensor:
    result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return result if isinstance(result, Tensor) else result.logits


def float64(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {key: float64(value) for key, value in inputs.items()}
    return inputs.double() if inputs.is_floating_point() else inputs


def example(inputs: Any, i: int) -> Any:
    if isinstance(inputs, dict):
        return {key: value[i : i + 1] for key, value in inputs.items()}
    return inputs[i : i + 1]


def fisher(
    model: nn.Module, examples: Iterable[tuple[Any, Tensor]], likelihood: str, kind: str
) -> dict[str, Tensor]:
    """Sum over examples of E_y[(∇ log p)²] (kind "exact") or of the labels' own ("empirical").

    `examples` are pairs (inputs, labels), as many examples in each as one likes. Not divided by
    anything. The expectation goes over every outcome, its probability being exp(log p).
    """
    model = copy.deepcopy(model).double().eval()
    log_p, outcomes = REFERENCE[likelihood]
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    single = [
        (float64(example(inputs, i)), labels[i])
        for inputs, labels in examples
        for i in range(len(labels))
    ]
    if kind == "exact" and outcomes is not None:
        probabilities = []

        def log(x: Any, y: Tensor) -> Tensor:
            value = log_p(outputs(model, x)[0], y)
            probabilities.append(value.exp().item())
            return value

        with torch.no_grad():
            every = [(x, outcomes(outputs(model, x)[0], y)) for x, y in single]
        found = fisher_by_definition(log, named, every)
        assert abs(sum(probabilities) - len(every)) < 1e-9 * len(every)
        return found
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for x, label in single:
        output = outputs(model, x)[0]
        # E over y ~ N(f, 1) of (Σ_d (y_d - f_d) ∂f_d)² = Σ_d (∂f_d)².
        sent = [log_p(output, label)] if kind == "empirical" else list(output.flatten())
        for value in sent:
            gradients = torch.autograd.grad(
                value, list(named.values()), retain_graph=True, materialize_grads=True
            )
            for name, gradient in zip(named, gradients, strict=True):
                total[name] += gradient**2
    return total
