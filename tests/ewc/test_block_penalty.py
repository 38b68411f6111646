"""The penalty by blocks against the explicit matrix I ⊗ R/out, in float64."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from consolidate.ewc.block_penalty import BlockPenalty
from consolidate.ewc.penalty import Penalty
from formats.errors import InputError, NonFiniteError, UsageError
from formats.fisher_json import Block

LAMBDA = 3.0
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
DIMS = {"linear": (1,), "turned": (0,), "conv": (1, 2, 3), "line": (1, 2), "bare": (1,)}


class Network(nn.Module):
    """Every kind of layer that a block can be of, and parameters that have none."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 3)
        self.linear = nn.Linear(5, 4)
        self.turned = Conv1D(6, 3)
        self.conv = nn.Conv2d(2, 3, (2, 3))
        self.line = nn.Conv1d(2, 5, 2)
        self.bare = nn.Linear(4, 9, bias=False)
        self.norm = nn.LayerNorm(4)


def network(dtype: torch.dtype = torch.float64) -> Network:
    torch.manual_seed(0)
    made = Network().to(dtype)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def joined(model: nn.Module, layer: str, tensors: dict[str, Tensor]) -> Tensor:
    """[W, b] as out × n."""
    weight = tensors[f"{layer}.weight"]
    weight = weight.T if layer == "turned" else weight.flatten(1)
    if f"{layer}.bias" not in dict(model.named_parameters()):
        return weight
    return torch.cat([weight, tensors[f"{layer}.bias"][:, None]], 1)


def measured(model: nn.Module, seed: int = 1) -> dict[str, Any]:
    """Λ, R and blocks as of three examples: R is the sum of the Fisher's row blocks."""
    torch.manual_seed(seed)
    fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    factors: dict[str, Tensor] = {}
    for _ in range(3):
        scores = {name: torch.randn_like(values) for name, values in fisher.items()}
        fisher = {name: values + scores[name] ** 2 / 3 for name, values in fisher.items()}
        for layer in DIMS:
            rows = joined(model, layer, scores)
            name = f"{layer}.weight.R"
            factors[name] = factors.get(name, 0) + rows.T @ rows / 3
    blocks = {
        f"{layer}.weight.R": Block(
            "R", dims, tuple(n for n in fisher if n.rpartition(".")[0] == layer)
        )
        for layer, dims in DIMS.items()
    }
    factors = {name: (values + values.T) / 2 for name, values in factors.items()}
    return {"fisher": fisher, "factors": factors, "blocks": blocks}


def moved(model: nn.Module, seed: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: p.detach() + torch.randn_like(p) for name, p in model.named_parameters()}


def explicit(model: nn.Module, known: dict[str, Any], anchor: dict[str, Tensor]) -> Tensor:
    """The penalty by autograd, with the matrix I ⊗ R/out of each block."""
    change = {name: p - anchor[name] for name, p in model.named_parameters()}
    total = torch.zeros((), dtype=torch.float64)
    for layer in DIMS:
        rows = joined(model, layer, change)
        one = torch.eye(len(rows), dtype=torch.float64)
        matrix = torch.kron(one, known["factors"][f"{layer}.weight.R"]) / len(rows)
        trace = sum(
            known["fisher"][n].sum() for n in known["blocks"][f"{layer}.weight.R"].parameters
        )
        torch.testing.assert_close(matrix.trace(), trace)
        total = total + rows.flatten() @ matrix @ rows.flatten()
    for name, values in known["fisher"].items():
        if name.split(".")[0] not in DIMS:
            total = total + (values * change[name] ** 2).sum()
    return LAMBDA / 2 * total


@pytest.mark.parametrize("piece", [1, 2, 10**6])
def test_value_and_gradient_are_those_of_the_explicit_matrix(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consolidate.ewc.penalty.CPU_PIECE", piece)
    monkeypatch.setattr("consolidate.ewc.block_penalty.LEAST_ROWS", piece)
    model = network()
    known, anchor = measured(model), moved(model)
    penalty = BlockPenalty(model, anchor=anchor, **known, ewc_lambda=LAMBDA, offset=0.25)
    expected = explicit(model, known, anchor)
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    before = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    for name, parameter in list(model.named_parameters())[1:]:  # the first has no gradient yet
        parameter.grad = before[name].clone()
    assert penalty.value() == pytest.approx(expected.item() + LAMBDA * 0.25, rel=1e-12)
    found = penalty.value_and_add_gradient_()
    assert found.shape == ()
    assert float(found) == pytest.approx(penalty.value(), rel=1e-12)
    for i, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
        parameter = model.get_parameter(name)
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient + (i > 0) * before[name], **EXACT)
    assert {id(p) for p in penalty.parameters()} == {id(p) for p in model.parameters()}
    assert penalty.unprotected == []
    penalty.ewc_lambda = 2 * LAMBDA
    assert penalty.value() == pytest.approx(2 * float(found), rel=1e-12)
    again = {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
    penalty.add_gradient_()
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(
            model.get_parameter(name).grad, again[name] + 2 * gradient, **EXACT
        )


def test_a_multiple_of_one_in_each_block_is_the_diagonal_penalty() -> None:
    model = network()
    known, anchor = measured(model), moved(model)
    for name, matrix in known["factors"].items():
        known["factors"][name] = 0.5 * torch.eye(len(matrix), dtype=torch.float64)
    for block in known["blocks"].values():
        out = 6 if block.dims == (0,) else len(model.get_parameter(block.parameters[0]))
        for at in block.parameters:
            known["fisher"][at] = torch.full_like(known["fisher"][at], 0.5 / out)
    by_blocks = BlockPenalty(model, anchor=anchor, **known, ewc_lambda=LAMBDA)
    diagonal = Penalty(model, known["fisher"], anchor, ewc_lambda=LAMBDA)
    assert by_blocks.value() == pytest.approx(diagonal.value(), rel=1e-12)


def test_without_an_anchor_it_is_around_the_present_weights_however_they_move() -> None:
    model = network()
    known = measured(model)
    penalty = BlockPenalty(model, **known, ewc_lambda=LAMBDA)
    assert penalty.value() == 0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    assert penalty.value() == pytest.approx(explicit(model, known, before).item(), rel=1e-12)


def test_an_anchor_of_the_factors_replaces_that_of_the_diagonal() -> None:
    model = network()
    known, anchor = measured(model), moved(model)
    other = moved(model, 3)
    covered = {"linear.weight": other["linear.weight"], "linear.bias": other["linear.bias"]}
    penalty = BlockPenalty(model, anchor=anchor, factor_anchor=covered, **known, ewc_lambda=LAMBDA)
    expected = explicit(model, known, {**anchor, **covered}).item()
    assert penalty.value() == pytest.approx(expected, rel=1e-12)


def test_a_frozen_end_counts_with_its_difference_and_a_frozen_layer_does_not() -> None:
    model = network()
    known, anchor = measured(model), moved(model)
    model.linear.weight.requires_grad_(False)
    model.turned.bias.requires_grad_(False)
    model.bare.requires_grad_(False)
    expected = explicit(model, known, anchor)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected, [p for _, p in trained])
    penalty = BlockPenalty(model, anchor=anchor, **known, ewc_lambda=LAMBDA)
    without = expected.item()
    rows = joined(model, "bare", {n: p - anchor[n] for n, p in model.named_parameters()})
    without -= LAMBDA / 2 * float((rows @ known["factors"]["bare.weight.R"] * rows).sum()) / 9
    assert float(penalty.value_and_add_gradient_()) == pytest.approx(without, rel=1e-12)
    for (_, parameter), gradient in zip(trained, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **EXACT)
    assert model.linear.weight.grad is model.turned.bias.grad is model.bare.weight.grad is None
    assert {id(p) for p in penalty.parameters()} == {id(p) for _, p in trained}
    model.linear.bias.requires_grad_(False)  # since then: as in Penalty, it does not count now
    model.requires_grad_(False)
    assert penalty.value() == 0


def test_training_with_it_stops_where_the_two_pulls_meet() -> None:
    # ‖W − T‖²/2 + (λ/2) tr(W R Wᵀ)/out has its minimum at T (1 + λ R/out)⁻¹.
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False).double()
    root = torch.randn(3, 3, dtype=torch.float64)
    matrix = (root[:, None] * root).sum(2)
    target = torch.randn(2, 3, dtype=torch.float64)
    zero = torch.zeros(2, 3, dtype=torch.float64)
    penalty = BlockPenalty(
        layer,
        {"weight": (matrix.diagonal() / 2).expand(2, 3).clone()},
        {"weight": zero},
        factors={"weight.R": matrix},
        blocks={"weight.R": Block("R", (1,), ("weight",))},
        ewc_lambda=0.5,
    )
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
    for _ in range(400):
        optimizer.zero_grad()
        ((layer.weight - target) ** 2 / 2).sum().backward()
        penalty.add_gradient_()
        optimizer.step()
    expected = torch.linalg.solve(torch.eye(3, dtype=torch.float64) + 0.25 * matrix, target.T).T
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_float32_parameters_and_narrow_ones_are_near_the_explicit_penalty() -> None:
    wide = network()
    known, anchor = measured(wide), moved(wide)
    expected = explicit(wide, known, anchor)
    gradients = torch.autograd.grad(expected, list(wide.parameters()))
    single = {
        kind: {n: t.float() for n, t in known[kind].items()} for kind in ("fisher", "factors")
    }
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        model = network().to(dtype)
        penalty = BlockPenalty(
            model, anchor=anchor, **{**known, **single}, ewc_lambda=LAMBDA, dtype=None
        )
        value = penalty.value_and_add_gradient_()
        assert float(value) == pytest.approx(expected.item(), rel=near)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert parameter.grad is not None
            assert parameter.grad.dtype == dtype
            error = (parameter.grad - gradient).norm() / gradient.norm()
            assert float(error) < near


def test_factors_are_not_rounded_with_the_rest() -> None:
    model = network(torch.float32)
    known, anchor = measured(model), moved(model)
    wide = BlockPenalty(model, anchor=anchor, **known, ewc_lambda=LAMBDA)
    narrow = BlockPenalty(model, anchor=anchor, **known, ewc_lambda=LAMBDA, dtype=torch.bfloat16)
    assert {term.stored[0].dtype for term in narrow._terms} == {torch.float32}
    assert narrow.value() == pytest.approx(wide.value(), rel=0.02)
    assert narrow.value() != wide.value()


def test_it_is_the_same_inside_autocast() -> None:
    model = network(torch.float32)
    known, anchor = measured(model), moved(model)
    penalty = BlockPenalty(model, anchor=anchor, **known, ewc_lambda=LAMBDA)
    with torch.autocast("cpu", torch.bfloat16):
        inside = penalty.value()
    assert inside == penalty.value()


def test_no_further_copy_is_made_of_what_is_given() -> None:
    model = network(torch.float32)
    known, anchor = measured(model), moved(model)
    penalty = BlockPenalty(model, anchor=anchor, **known, ewc_lambda=LAMBDA)
    for term, (name, block) in zip(penalty._terms, known["blocks"].items(), strict=True):
        given = [known["factors"][name], *(anchor[at] for at in block.parameters)]
        assert [t.data_ptr() for t in term.stored] == [t.data_ptr() for t in given]


def test_a_parameter_without_a_fisher_is_named() -> None:
    model = network()
    known = measured(model)
    for name in ("words.weight", "norm.bias"):
        del known["fisher"][name]
    assert BlockPenalty(model, **known, ewc_lambda=1.0).unprotected == ["words.weight", "norm.bias"]


def test_a_wrapped_module_is_looked_into() -> None:
    model = network()
    known, anchor = measured(model), moved(model)
    expected = BlockPenalty(model, anchor=anchor, **known, ewc_lambda=1.0).value()
    inside = nn.DataParallel(model)
    assert BlockPenalty(inside, anchor=anchor, **known, ewc_lambda=1.0).value() == expected


NAME = "linear.weight.R"


def changed(known: dict[str, Any], what: str, name: str, value: Any) -> dict[str, Any]:
    known = copy.copy(known)
    known[what] = {**known[what], name: value}
    if value is None:
        del known[what][name]
    return known


def refusals() -> list[tuple[str, str, Any, str]]:
    known = measured(network())
    matrix = known["factors"][NAME]
    skew = matrix.clone()
    skew[0, 1] += 1e-6
    turned = matrix.clone()
    turned[0, 0] = -matrix[0, 0]
    both = ("linear.weight", "linear.bias")
    return [
        ("factors", NAME, matrix * 1.02, "trace"),
        ("factors", NAME, matrix[:5, :5], r"shape \(5, 5\): expected \(6, 6\)"),
        ("factors", NAME, skew, "not symmetric"),
        ("factors", NAME, turned, "negative values on its diagonal"),
        ("factors", NAME, None, "no matrix"),
        ("factors", "more.R", matrix, "'more.R' has no block"),
        ("blocks", NAME, Block("A", (1,), both), "is a matrix A: expected R"),
        ("blocks", NAME, Block("R", (1,), ("linear.weight", "lost")), "'lost', which is not"),
        ("blocks", NAME, Block("R", (0, 1), both), r"the dimensions \[0, 1\]"),
        ("blocks", NAME, Block("R", (2,), both), r"the dimensions \[2\]"),
        ("blocks", NAME, Block("R", (0,), both), r"expected a bias of shape \(5,\)"),
        ("blocks", NAME, Block("R", (1,), ("linear.bias", "linear.weight")), "expected a weight"),
        ("blocks", NAME, Block("R", (1,), (*both, "norm.bias")), "at most a bias"),
        ("blocks", "more.R", Block("R", (1,), ("linear.weight",)), "in two blocks"),
        ("fisher", "linear.bias", None, "'linear.bias', which has no Fisher"),
        ("fisher", "linear.bias", torch.ones(3), r"shape \(3,\)"),
    ]


@pytest.mark.parametrize(("what", "name", "value", "why"), refusals())
def test_what_does_not_fit_is_refused(what: str, name: str, value: Any, why: str) -> None:
    model = network()
    with pytest.raises(InputError, match=why):
        BlockPenalty(model, **changed(measured(model), what, name, value), ewc_lambda=1.0)


def test_what_is_not_finite_is_refused() -> None:
    model = network()
    known = measured(model)
    matrix = known["factors"][NAME].clone()
    matrix[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"the factor of 'linear\.weight\.R'"):
        BlockPenalty(model, **changed(known, "factors", NAME, matrix), ewc_lambda=1.0)
    anchor = moved(model)
    anchor["linear.bias"][0] = math.inf
    with pytest.raises(NonFiniteError, match="anchor"):
        BlockPenalty(model, anchor=anchor, **known, ewc_lambda=1.0)
    with pytest.raises(UsageError, match="ewc_lambda"):
        BlockPenalty(model, **known, ewc_lambda=-1.0)


def test_stored_in_bfloat16_it_keeps_the_trace() -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 30)
    scores = torch.randn(8, 30, 41).exp()
    matrix = torch.einsum("xoi,xoj->ij", scores, scores)
    both = (scores**2).sum(0)
    matrix = (matrix + matrix.T).bfloat16() / 2
    fisher = {"weight": both[:, :40].bfloat16(), "bias": both[:, 40].bfloat16()}
    blocks = {"weight.R": Block("R", (1,), ("weight", "bias"))}
    BlockPenalty(model, fisher, factors={"weight.R": matrix}, blocks=blocks, ewc_lambda=1.0)
