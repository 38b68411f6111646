import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from consolidate.ewc.low_rank_penalty import LowRank, MergedPenalty
from consolidate.models.lora import Lora, add_lora, low_rank_layers
from formats.errors import InputError, NonFiniteError, UsageError
from formats.fisher_json import Block

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
    monkeypatch.setattr("consolidate.ewc.penalty.CPU_PIECE", piece)
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


def test_frozen_factors_get_no_gradient_and_narrow_ones_are_summed_before_rounding():
    network = adapted(["linear"], torch.bfloat16)
    (layer,) = low_rank_layers(network).values()
    layer.a.requires_grad_(False)
    fisher = {"linear.weight": torch.rand(7, 5)}
    twin = LowRank(*(nn.Parameter(p.detach().double()) for p in layer[:3]), *layer[3:5])
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


DIMS = {"conv": (1, 2), "linear": (1,), "turned": (0,)}


def blocks_and_factors(
    network: nn.Module, *, bias: bool
) -> tuple[dict[str, Tensor], dict[str, Block], dict[str, Tensor]]:
    """Λ of all, and an R of every adapted layer but the embedding, with its trace."""
    generator = torch.Generator().manual_seed(6)
    fisher, blocks, factors = random_fisher(network), {}, {}
    for layer, dims in DIMS.items():
        base = network.get_submodule(layer).get_base_layer()
        sizes = [base.weight.shape[d] for d in dims]
        n = math.prod(sizes) + bias
        root = torch.randn(n, 5, generator=generator, dtype=torch.float64)
        factors[f"{layer}.weight.R"] = (root[:, None] * root).sum(2)
        ends = {f"{layer}.weight": base.weight}
        if bias:
            ends[f"{layer}.bias"] = base.bias
        blocks[f"{layer}.weight.R"] = Block("R", dims, tuple(ends))
        elements = sum(end.numel() for end in ends.values())
        for name, end in ends.items():
            trace = factors[f"{layer}.weight.R"].trace()
            fisher[name] = torch.full_like(end.detach(), float(trace / elements))
    return fisher, blocks, factors


def dense_penalty(
    network: nn.Module,
    fisher: dict[str, Tensor],
    blocks: dict[str, Block],
    factors: dict[str, Tensor],
    anchor: dict[str, Tensor],
) -> Tensor:
    """The penalty on the merged weights by autograd, with I ⊗ R/out of each block."""
    total = torch.zeros((), dtype=torch.float64)
    for name, module in network.named_modules():
        if not isinstance(module, peft.tuners.lora.LoraLayer):
            continue
        base = module.get_base_layer()
        change = base.weight + module.get_delta_weight("default") - anchor[f"{name}.weight"]
        if (block := blocks.get(f"{name}.weight.R")) is None:
            total = total + (fisher[f"{name}.weight"] * change**2).sum()
            continue
        rows = change.T if name == "turned" else change.flatten(1)
        if len(block.parameters) > 1:
            rows = torch.cat([rows, (base.bias - anchor[f"{name}.bias"])[:, None]], 1)
        one = torch.eye(len(rows), dtype=torch.float64)
        matrix = torch.kron(one, factors[f"{name}.weight.R"]) / len(rows)
        total = total + rows.flatten() @ matrix @ rows.flatten()
    return LAMBDA / 2 * total


@pytest.mark.parametrize("trained_bias", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("where", ["at W", "at W, given", "elsewhere", "factors elsewhere"])
def test_blocks_pull_the_factors_as_the_dense_penalty_does(
    where: str, bias: bool, trained_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consolidate.ewc.penalty.CPU_PIECE", 1)
    monkeypatch.setattr("consolidate.ewc.low_rank_penalty.LEAST_ROWS", 2)
    network = adapted(EVERYTHING, alpha=5)
    layers = low_rank_layers(network)
    fisher, blocks, factors = blocks_and_factors(network, bias=bias)
    bare = {f"{name}.bias": network.get_submodule(name).get_base_layer().bias for name in DIMS}
    for parameter in bare.values():
        parameter.requires_grad_(trained_bias)
    ends = {**{name: layer.weight for name, layer in layers.items()}, **bare}
    present = {name: end.detach().clone() for name, end in ends.items()}
    torch.manual_seed(7)
    other = {name: torch.randn_like(mu) for name, mu in present.items()}
    covered = {at: other[at] for block in blocks.values() for at in block.parameters}
    given = {
        "at W": (None, None, present),
        "at W, given": (present, None, present),
        "elsewhere": (other, None, other),
        "factors elsewhere": (None, covered, {**present, **covered}),
    }
    anchor, factor_anchor, means = given[where]
    penalty = MergedPenalty(
        layers,
        fisher,
        anchor,
        ewc_lambda=LAMBDA,
        offset=0.25,
        factors=factors,
        blocks=blocks,
        factor_anchor=factor_anchor,
    )
    if trained_bias:
        with torch.no_grad():
            for parameter in bare.values():
                parameter += torch.randn_like(parameter)
    expected = dense_penalty(network, fisher, blocks, factors, means)
    trained = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected, [p for _, p in trained], allow_unused=True)
    value = penalty.value_and_add_gradient_()
    assert float(value) == pytest.approx(expected.item() + LAMBDA * 0.25, rel=1e-11)
    assert penalty.value() == pytest.approx(float(value), rel=1e-12)
    for (_, parameter), gradient in zip(trained, gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-11)
    held = {id(p) for (_, p), g in zip(trained, gradients, strict=True) if g is not None}
    assert {id(p) for p in penalty.parameters()} == held


def test_around_w_no_matrix_of_its_shape_is_made() -> None:
    layer = nn.Linear(512, 512, bias=False)
    a, b = nn.Parameter(torch.randn(2, 512)), nn.Parameter(torch.randn(512, 2))
    factors = {"weight.R": torch.eye(512)}
    penalty = MergedPenalty(
        {"weight": LowRank(layer.weight.requires_grad_(False), a, b, 1.0)},
        {"weight": torch.full((512, 512), 1 / 512)},
        ewc_lambda=1.0,
        factors=factors,
        blocks={"weight.R": Block("R", (1,), ("weight",))},
    )
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        penalty.add_gradient_()
    assert max(event.cpu_memory_usage for event in profile.events()) < 512 * 512 * 4
    torch.testing.assert_close(a.grad, b.detach().T @ b.detach() @ a.detach() / 512)


def test_a_block_that_does_not_fit_an_adapted_layer_is_refused() -> None:
    network = adapted(["linear", "turned"])
    layers = low_rank_layers(network)
    fisher, blocks, factors = blocks_and_factors(adapted(EVERYTHING), bias=True)

    def made(**changes: Any) -> MergedPenalty:
        given = {"fisher": fisher, "factors": factors, "blocks": blocks} | changes
        return MergedPenalty(layers, **given, ewc_lambda=1.0)

    assert len(made().parameters()) == 4  # the block of the convolution is not its concern
    name = "linear.weight.R"
    turned = Block("R", (0,), ("linear.weight",))
    with pytest.raises(InputError, match=r"shape \(6, 6\): expected \(7, 7\)"):
        made(blocks={**blocks, name: turned})
    with pytest.raises(InputError, match=r"expected those of the layer's inputs"):
        made(blocks={**blocks, name: turned}, factors={**factors, name: torch.eye(7).double()})
    with pytest.raises(InputError, match="trace"):
        made(factors={**factors, name: factors[name] * 2})
    with pytest.raises(InputError, match=r"'linear\.bias', which has no Fisher"):
        made(fisher={at: values for at, values in fisher.items() if at != "linear.bias"})
    bare = {at: layer._replace(bias=None) for at, layer in layers.items()}
    with pytest.raises(InputError, match=r"'linear\.bias', which is not a parameter"):
        MergedPenalty(bare, fisher, ewc_lambda=1.0, factors=factors, blocks=blocks)
