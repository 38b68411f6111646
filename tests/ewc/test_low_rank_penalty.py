import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from consolidate.ewc.low_rank_penalty import LowRank, MergedPenalty
from consolidate.ewc.penalty import Penalty
from consolidate.models.lora import Lora, add_lora, low_rank_layers
from formats.errors import InputError, NonFiniteError, UsageError

LAMBDA = 3.0
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


class Network(nn.Module):
    """Every kind of layer that LoRA can change by a product: also transposed and convolved ones."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 5, 3, padding=1)
        self.linear = nn.Linear(5, 7)
        self.turned = Conv1D(4, 7)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        a = self.conv(self.words(ids).mT).mT
        return self.head(self.turned(self.linear(a).tanh()).tanh().mean(1))


def adapted(targets: list[str], dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    """A network whose adapter is far from zero."""
    torch.manual_seed(1)
    network = Network().to(dtype)
    add_lora(network, Lora(rank=2, targets=targets, **options))
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return network


def explicit_penalty(
    network: nn.Module, fisher: dict[str, Tensor], anchor: dict[str, Tensor] | None
) -> Tensor:
    """(λ/2) Σ Λ (W' − μ)², W' as peft merges it, by autograd."""
    total = torch.zeros((), dtype=torch.float64)
    for name, module in network.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            weight = module.get_base_layer().weight
            merged = weight + module.get_delta_weight("default")
            mu = weight.detach() if anchor is None else anchor[f"{name}.weight"]
            total = total + (fisher[f"{name}.weight"] * (merged - mu) ** 2).sum()
    return LAMBDA / 2 * total


def random_fisher(network: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        name: torch.rand(layer.weight.shape, generator=generator, dtype=torch.float64)
        for name, layer in low_rank_layers(network).items()
    }


EVERYTHING = ["words", "conv", "linear", "turned"]


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("piece", [1, 20, 10**6])
def test_gradients_and_value_are_those_of_the_explicit_penalty(
    elsewhere: bool, piece: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("consolidate.ewc.low_rank_penalty.CPU_PIECE", piece)
    network = adapted(EVERYTHING, alpha=5)
    layers = low_rank_layers(network)
    assert sorted(layers) == sorted(f"{name}.weight" for name in EVERYTHING)
    assert all(layer.scale == 2.5 for layer in layers.values())
    fisher = random_fisher(network)
    anchor = None
    if elsewhere:
        anchor = {name: torch.randn_like(values) for name, values in fisher.items()}
    penalty = MergedPenalty(layers, fisher, anchor, ewc_lambda=LAMBDA, offset=0.25)
    expected = explicit_penalty(network, fisher, anchor)
    trained = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    assert {n.split(".")[0] for n, _ in trained} == set(EVERYTHING)
    gradients = torch.autograd.grad(expected, [p for _, p in trained])
    whole = expected.item() + LAMBDA * 0.25
    before = {n: torch.randn_like(p) for n, p in trained}
    for name, parameter in trained[1:]:  # the first has no gradient yet
        parameter.grad = before[name].clone()
    value = penalty.value_and_add_gradient_()
    for i, ((name, parameter), gradient) in enumerate(zip(trained, gradients, strict=True)):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient + (i > 0) * before[name], **EXACT)
    assert float(value) == pytest.approx(whole, rel=1e-12)
    assert penalty.value() == pytest.approx(float(value), rel=1e-12)
    assert all(p.grad is None for n, p in network.named_parameters() if not p.requires_grad)


def test_the_penalty_is_that_of_the_merged_weights():
    network = adapted(EVERYTHING)
    layers, fisher = low_rank_layers(network), random_fisher(network)
    anchor = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    by_factors = MergedPenalty(layers, fisher, ewc_lambda=LAMBDA).value()
    merged = {
        name: nn.Parameter(
            layer.weight.detach() + network.get_submodule(name[:-7]).get_delta_weight("default")
        )
        for name, layer in layers.items()
    }
    whole = Penalty(merged.items(), fisher, anchor, ewc_lambda=LAMBDA).value()
    assert by_factors == pytest.approx(whole, rel=1e-12)


def test_frozen_factors_get_no_gradient_and_narrow_ones_are_summed_before_rounding():
    network = adapted(["linear"], torch.bfloat16)
    (layer,) = low_rank_layers(network).values()
    layer.a.requires_grad_(False)
    fisher = {"linear.weight": torch.rand(7, 5)}
    twin = LowRank(*(nn.Parameter(p.detach().double()) for p in layer[:3]), *layer[3:])
    layer.b.grad = torch.full_like(layer.b, 256.0)
    MergedPenalty({"linear.weight": layer}, fisher, ewc_lambda=LAMBDA).add_gradient_()
    MergedPenalty(
        {"linear.weight": twin}, {"linear.weight": fisher["linear.weight"].double()}, ewc_lambda=3.0
    ).add_gradient_()
    assert layer.a.grad is None
    assert twin.b.grad is not None
    torch.testing.assert_close(layer.b.grad, (twin.b.grad + 256).bfloat16(), rtol=0.01, atol=0)


def test_what_has_no_fisher_is_named_and_what_does_not_fit_is_refused():
    network = adapted(["linear", "turned"])
    layers, fisher = low_rank_layers(network), random_fisher(network)
    only = {"linear.weight": fisher["linear.weight"], "head.weight": torch.ones(3, 4)}
    penalty = MergedPenalty(layers, only, ewc_lambda=1.0)
    assert penalty.unprotected == ["turned.weight"]
    assert len(penalty.parameters()) == 2
    with pytest.raises(InputError, match=r"none of the weights.*linear\.weight"):
        MergedPenalty(layers, {}, ewc_lambda=1.0)
    with pytest.raises(InputError, match=r"shape \(5, 7\)"):
        MergedPenalty(layers, {"linear.weight": torch.ones(5, 7)}, ewc_lambda=1.0)
    with pytest.raises(InputError, match="negative"):
        MergedPenalty(layers, {"linear.weight": -fisher["linear.weight"]}, ewc_lambda=1.0)
    mu = {name: values + math.nan for name, values in fisher.items()}
    with pytest.raises(NonFiniteError, match="anchor"):
        MergedPenalty(layers, fisher, mu, ewc_lambda=1.0)
    with pytest.raises(UsageError, match="ewc_lambda"):
        MergedPenalty(layers, fisher, ewc_lambda=-1.0)
