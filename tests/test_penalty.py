import copy

import pytest
import torch
from torch import Tensor, nn

from consolidate.penalty import Penalty
from formats.errors import InputError, NonFiniteError, UsageError


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


def positive(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}


def move(model: nn.Module) -> dict[str, Tensor]:
    """Move the weights and return where they were."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).to(p)
    return before


def by_autograd(
    model: nn.Module, fisher: dict[str, Tensor], anchor: dict[str, Tensor], ewc_lambda: float
) -> tuple[float, dict[str, Tensor]]:
    """The value of equation 3's second term and its gradient, in float64."""
    values = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    loss = sum(
        ewc_lambda / 2 * (fisher[n].double() * (values[n] - anchor[n].double()) ** 2).sum()
        for n in fisher
    )
    gradients = torch.autograd.grad(loss, [values[n] for n in fisher])
    return loss.item(), dict(zip(fisher, gradients, strict=True))


def test_value_and_gradient_are_those_of_the_formula_with_its_half():
    model = Tied()
    fisher = positive(model)
    penalty = Penalty(model, fisher, ewc_lambda=3.0)
    assert penalty.value() == 0
    anchor = move(model)
    value, gradients = by_autograd(model, fisher, anchor, 3.0)
    assert penalty.value() == pytest.approx(value, rel=1e-6)
    found = penalty.add_gradient_()
    assert found.shape == ()
    assert not found.requires_grad
    assert found.item() == pytest.approx(value, rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.double(), gradients[name], rtol=1e-6, atol=1e-7)
    assert penalty.unprotected == []
    assert penalty.ewc_lambda == 3.0


def test_one_number_by_hand():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 5.0)
    penalty = Penalty(
        model, {"weight": torch.tensor([[3.0]])}, {"weight": torch.tensor([[1.0]])}, ewc_lambda=2.0
    )
    assert penalty.value() == 48.0  # 2/2 · 3 · 4²
    penalty.add_gradient_()
    assert model.weight.grad.item() == 24.0  # 2 · 3 · 4


def test_it_adds_to_the_losss_gradient_once_for_each_call():
    model = Tied()
    fisher = positive(model)
    penalty = Penalty(model, fisher, ewc_lambda=2.0)
    anchor = move(model)
    model(torch.tensor([[1, 2]])).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    before = {name: grad.clone() for name, grad in grads.items()}
    penalty.add_gradient_()
    for name, p in model.named_parameters():
        assert p.grad is grads[name]
        expected = before[name] + 2 * fisher[name] * (p.detach() - anchor[name])
        torch.testing.assert_close(p.grad, expected)
        assert not p.grad.requires_grad


def test_training_with_it_stops_where_the_two_pulls_meet():
    # (θ − 1)²/2 + (4/2)·Λ (θ − 0)² has its minimum at 1 / (1 + 4 Λ).
    theta = nn.Parameter(torch.zeros(3))
    fisher = torch.tensor([0.0, 0.25, 2.0])
    penalty = Penalty([("theta", theta)], {"theta": fisher}, ewc_lambda=4.0)
    optimizer = torch.optim.SGD([theta], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        ((theta - 1) ** 2 / 2).sum().backward()
        penalty.add_gradient_()
        optimizer.step()
    torch.testing.assert_close(theta.detach(), 1 / (1 + 4 * fisher))


def test_the_anchor_is_a_copy():
    model = Tied()
    given = {name: p.detach().clone() for name, p in model.named_parameters()}
    penalties = [
        Penalty(model, positive(model), ewc_lambda=1.0),
        Penalty(model, positive(model), given, ewc_lambda=1.0),
    ]
    move(model)
    for tensor in given.values():
        tensor.zero_()
    assert penalties[0].value() == penalties[1].value() > 0


def test_nothing_is_written_to_fisher_or_anchor():
    model = Tied()
    fisher, anchor = positive(model), positive(model)
    copies = copy.deepcopy((fisher, anchor))
    Penalty(model, fisher, anchor, ewc_lambda=7.0).add_gradient_()
    for tensors, expected in zip((fisher, anchor), copies, strict=True):
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_of_weights(dtype):
    model = Tied().to(dtype)
    fisher = positive(model)
    penalty = Penalty(model, fisher, ewc_lambda=0.5)
    anchor = move(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.125)
    value, gradients = by_autograd(model, fisher, anchor, 0.5)
    assert penalty.add_gradient_().item() == pytest.approx(value, rel=1e-6)
    for name, p in model.named_parameters():
        assert p.grad.dtype == dtype
        # One rounding from the exact sum, not several.
        exact = gradients[name] + 0.125
        tolerance = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6
        assert ((p.grad.double() - exact).abs() <= tolerance).all()


def test_small_moves_of_narrow_weights_from_a_float32_anchor_are_seen():
    theta = nn.Parameter(torch.ones(1).bfloat16())
    penalty = Penalty(
        [("w", theta)], {"w": torch.ones(1)}, {"w": torch.tensor([1.0001])}, ewc_lambda=2.0
    )
    assert penalty.value() == pytest.approx(1e-8, rel=1e-2)


def test_l2_is_a_fisher_of_one():
    model = Tied()
    ones = {name: torch.ones(p.shape) for name, p in model.named_parameters()}
    l2, ewc = Penalty.l2(model, ewc_lambda=3.0), Penalty(model, ones, ewc_lambda=3.0)
    anchor = move(model)
    assert l2.value() == ewc.value() > 0
    l2.add_gradient_()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 3 * (p.detach() - anchor[name]))
    around = Penalty.l2(model.named_parameters(), anchor, ewc_lambda=3.0)
    assert around.value() == l2.value()


def test_tied_parameters_are_pulled_once():
    model = Tied()
    assert "head.weight" not in positive(model)
    twice = model.named_parameters(remove_duplicate=False)
    fisher = {"embedding.weight": torch.ones(6, 4), "head.weight": torch.ones(6, 4)}
    with pytest.raises(InputError, match="tied"):
        Penalty(twice, fisher, ewc_lambda=1.0)
    # The file's name for the pair may be the other one.
    twice = model.named_parameters(remove_duplicate=False)
    penalty = Penalty(twice, {"head.weight": torch.ones(6, 4)}, ewc_lambda=1.0)
    assert penalty.unprotected == ["head.bias"]


def test_parameters_without_a_fisher_are_named_and_left_alone_and_so_are_frozen_ones():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    fisher = {"0.weight": torch.ones(3, 3), "1.weight": torch.ones(2, 3)}
    model[1].weight.requires_grad_(False)
    penalty = Penalty(model, fisher, ewc_lambda=1.0)
    assert penalty.unprotected == ["0.bias", "1.bias", "2.weight", "2.bias"]
    move(model)
    penalty.add_gradient_()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["0.weight"]


def test_it_works_beside_parameter_groups_and_accumulation():
    model = nn.Linear(3, 2)
    penalty = Penalty(model, positive(model), ewc_lambda=5.0)
    anchor = move(model)
    optimizer = torch.optim.SGD(
        [{"params": [model.weight], "lr": 1.0}, {"params": [model.bias]}], lr=0
    )
    x = torch.randn(4, 3)
    for part in x.split(2):
        (model(part).square().sum() / 4).backward()
    penalty.add_gradient_()
    whole = copy.deepcopy(model)
    whole.zero_grad()
    (whole(x).square().sum() / 4).backward()
    start = model.weight.detach().clone()
    optimizer.step()
    pull = 5 * positive(model)["weight"] * (start - anchor["weight"])
    torch.testing.assert_close(start - model.weight.detach(), whole.weight.grad + pull)


def test_no_lambda_is_a_fisher_without_effect():
    model = Tied()
    penalty = Penalty(model, positive(model), ewc_lambda=0.0)
    move(model)
    assert penalty.add_gradient_().item() == penalty.value() == 0
    assert Penalty(model, {}, ewc_lambda=1.0).add_gradient_().item() == 0


@pytest.mark.parametrize("ewc_lambda", [-1.0, float("nan"), float("inf")])
def test_a_lambda_that_makes_no_sense(ewc_lambda):
    with pytest.raises(UsageError, match="ewc_lambda is"):
        Penalty(Tied(), positive(Tied()), ewc_lambda=ewc_lambda)


def test_a_fisher_or_anchor_of_another_model():
    model = Tied()
    good = positive(model)

    def fails(error: type[Exception], message: str, fisher=good, anchor=None) -> None:
        with pytest.raises(error, match=message):
            Penalty(model, fisher, anchor, ewc_lambda=1.0)

    fails(InputError, r"'extra' \(1 such names\)", {**good, "extra": torch.ones(1)})
    fails(
        InputError, r"Fisher of 'head.bias' has shape \(5,\).*\(6,\)", {"head.bias": torch.ones(5)}
    )
    fails(InputError, "Fisher of 'head.bias' holds negative", {"head.bias": -torch.ones(6)})
    fails(NonFiniteError, "Fisher of 'head.bias'", {"head.bias": torch.full((6,), torch.nan)})
    fails(NonFiniteError, "Fisher of 'head.bias'", {"head.bias": torch.full((6,), torch.inf)})
    fails(InputError, "anchor holds no 'embedding.weight'", anchor={"head.bias": torch.ones(6)})
    fails(
        InputError, "anchor of 'head.bias' has shape", anchor={**good, "head.bias": torch.ones(5)}
    )
    nan = {**good, "head.bias": torch.full((6,), torch.nan)}
    fails(NonFiniteError, "anchor of 'head.bias'", anchor=nan)
