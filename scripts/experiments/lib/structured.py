"""Penalties on layers by other matrices than the library's: written out, slow and obvious.

A layer's change ΔW = [W, b] − [W, b]_start, out × (in + 1), is penalized by (λ/2) tr(G ΔW A ΔWᵀ).
A = mean over positions of a aᵀ, a = [input, 1]; G = (1/texts) Σ_x E_y[Σ_t g_t g_tᵀ], g_t the
gradient of log p(y|x) for the layer's output at position t. Padded positions are left out.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from consolidate.ewc.block_penalty import BlockPenalty
from consolidate.ewc.penalty import Penalty
from formats.fisher_json import Block
from scripts.experiments.lib.block_fisher import block_fisher
from scripts.experiments.lib.kept import kept
from scripts.experiments.lib.tuning import Done, Job, fit

STRUCTURES = {
    "diagonal": "diagonal",
    "r": "R ⊗ I (`inputs`)",
    "a": "A ⊗ I",
    "a_rows": "A ⊗ rows of the diagonal",
    "a_diagonal": "A ⊗ diagonal of G",
    "a_g": "A ⊗ G (K-FAC)",
}
"""The matrix over a layer's inputs, and that over its outputs."""


class Factors(NamedTuple):
    """The matrices of a layer."""

    inputs: Tensor  # A
    outputs: Tensor  # G


def factors_of(
    model: nn.Module, batches: Iterable[tuple[Any, Tensor]], weights: Iterable[str]
) -> dict[str, Factors]:
    """Sum A and G of linear layers, text by text and class by class, by the names of the weights.

    Args:
        model: Of one output of logits a text; put into eval mode.
        batches: Inputs with an `attention_mask`, and labels, which do not count.
        weights: Names of the layers' weights.
    """
    model.eval()
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in weights}
    seen: dict[str, tuple[Tensor, Tensor]] = {}  # of the last call: inputs and outputs

    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            seen[name] = inputs[0].detach(), output

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    found: dict[str, Factors] = {}
    texts, positions = 0, dict.fromkeys(layers, 0)
    try:
        for inputs, _ in batches:
            for i in range(len(inputs["attention_mask"])):
                mask = inputs["attention_mask"][i].bool()
                one = {key: value[i : i + 1] for key, value in inputs.items()}
                logits = model(**one).logits[0]
                texts += 1
                outputs = [seen[name][1] for name in layers]
                at = {name: _rows(seen[name][0][0], mask) for name in layers}
                for name, a in at.items():
                    positions[name] += len(a)
                    biased = torch.cat([a, a.new_ones(len(a), 1)], 1)
                    g = model.get_parameter(name).new_zeros([seen[name][1].shape[-1]] * 2)
                    found.setdefault(name, Factors(torch.zeros_like(biased.T @ biased), g))
                    found[name].inputs.add_(biased.T @ biased)
                log_p = logits.log_softmax(0)
                for y, chance in enumerate(log_p.detach().exp()):
                    gradients = torch.autograd.grad(log_p[y], outputs, retain_graph=True)
                    for name, gradient in zip(layers, gradients, strict=True):
                        g = _rows(gradient[0], mask)
                        found[name].outputs.add_(chance * g.T @ g)
    finally:
        for handle in handles:
            handle.remove()
    return {name: Factors(a / positions[name], g / texts) for name, (a, g) in found.items()}


def _rows(values: Tensor, mask: Tensor) -> Tensor:
    """Return the rows of the positions that are no padding; one row where there are none."""
    return values[mask] if values.ndim == 2 else values[None]


class StructuredPenalty:
    """(λ/2) Σ tr(G ΔW A ΔWᵀ) over layers with two matrices, the diagonal for the rest."""

    def __init__(
        self,
        model: nn.Module,
        diagonal: Mapping[str, Tensor],
        factors: Mapping[str, Factors],
        blocks: Iterable[Block],
        structure: str,
        ewc_lambda: float,
    ):
        """Scale each layer's matrices so that the trace is that of its diagonal.

        Args:
            model: At the start.
            diagonal: Λ by parameter name.
            factors: A and G by the names of the weights.
            blocks: The layers: weight and bias.
            structure: One of STRUCTURES with A.
            ewc_lambda: λ.
        """
        parameters = dict(model.named_parameters())
        self.ewc_lambda = ewc_lambda
        self._layers = []
        rest = dict(diagonal)
        for block in blocks:
            weight, bias = block.parameters
            rows = rest.pop(weight).double().sum(1) + rest.pop(bias).double()
            a, g = (one.double() for one in factors[weight])
            left = {
                "a": torch.eye(len(rows), dtype=a.dtype),
                "a_rows": rows.diag(),
                "a_diagonal": g.diagonal().diag(),
                "a_g": g,
            }[structure]
            a = a * (rows.sum() / (a.trace() * left.trace()))
            ends = parameters[weight], parameters[bias]
            start = torch.cat([ends[0].detach(), ends[1].detach()[:, None]], 1)
            self._layers.append((ends, start, left.to(start.dtype), a.to(start.dtype)))
        self._rest = Penalty(parameters.items(), rest, ewc_lambda=ewc_lambda)

    def value(self) -> float:
        """Return the penalty at the parameters' current values."""
        found = self._rest.value()
        for ends, start, left, right in self._layers:
            change = _joined(ends) - start
            found += self.ewc_lambda / 2 * float((left @ change @ right * change).sum())
        return found

    def add_gradient_(self) -> None:
        """Add λ G ΔW A, and λ Λ (θ − θ_start) of the rest, to the gradients."""
        for (weight, bias), start, left, right in self._layers:
            pull = self.ewc_lambda * (left @ (_joined((weight, bias)) - start) @ right)
            for end, part in ((weight, pull[:, :-1]), (bias, pull[:, -1])):
                end.grad = part.clone() if end.grad is None else end.grad.add_(part)
        self._rest.add_gradient_()


def _joined(ends: tuple[nn.Parameter, nn.Parameter]) -> Tensor:
    return torch.cat([ends[0].detach(), ends[1].detach()[:, None]], 1)


def tune(job: Job, structure: str) -> Done:
    """Train all weights, pulled back by one of STRUCTURES."""
    setting, strength = job.setting, job.strength
    found = block_fisher(job)
    penalty: Penalty | BlockPenalty | StructuredPenalty
    if structure == "diagonal":
        penalty = Penalty(job.model, found.diagonal, ewc_lambda=strength)
    elif structure == "r":
        penalty = BlockPenalty(
            job.model,
            found.diagonal,
            factors=found.factors,
            blocks=found.blocks,
            ewc_lambda=strength,
        )
    else:
        blocks = list(found.blocks.values())
        factors = _kept_factors(job, [block.parameters[0] for block in blocks])
        penalty = StructuredPenalty(job.model, found.diagonal, factors, blocks, structure, strength)
    return fit(
        job.model,
        job.new_batches(),
        setting.loss,
        rate=job.rate,
        steps=setting.steps,
        after_backward=penalty.add_gradient_,
    )


def _kept_factors(job: Job, weights: Sequence[str]) -> dict[str, Factors]:
    """Measure A and G of the start once, and keep them beside the Fisher."""

    def make() -> tuple[dict[str, Tensor], None]:
        found = factors_of(job.start(), job.setting.fisher_batches(), weights)
        return {
            f"{name}.{side}": one
            for name, pair in found.items()
            for side, one in zip("AG", pair, strict=True)
        }, None

    tensors, _ = kept(f"{job.fisher_name}-factors", make)
    return {name: Factors(tensors[f"{name}.A"], tensors[f"{name}.G"]) for name in weights}
