import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from consolidate.ewc.penalty import Penalty
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


def assert_by_autograd(
    penalty: Penalty, model: nn.Module, fisher: dict[str, Tensor], anchor: dict[str, Tensor]
) -> None:
    value, gradients = by_autograd(model, fisher, anchor, penalty.ewc_lambda)
    assert penalty.value() == pytest.approx(value, rel=1e-6)
    found = penalty.value_and_add_gradient_()
    assert found.shape == ()
    assert not found.requires_grad
    assert found.item() == pytest.approx(value, rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.double(), gradients[name], rtol=1e-6, atol=1e-7)


def test_value_and_gradient_are_those_of_the_formula_with_its_half():
    model = Tied()
    fisher = positive(model)
    penalty = Penalty(model, fisher, ewc_lambda=3.0)
    assert penalty.value() == 0
    assert_by_autograd(penalty, model, fisher, move(model))
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


def test_an_anchor_that_would_move_with_the_parameters_is_copied():
    model = Tied()
    given = {name: p.detach().clone() for name, p in model.named_parameters()}
    penalties = [
        Penalty(model, positive(model), anchor, ewc_lambda=1.0)
        for anchor in (None, given, model.state_dict(), {n: p[:] for n, p in given.items()})
    ]
    move(model)
    values = [penalty.value() for penalty in penalties]
    assert values == values[:1] * 4
    assert values[0] > 0


def test_no_third_copy_is_made_of_what_is_given():
    model = Tied()
    fisher, anchor = positive(model), positive(model)
    penalty = Penalty(model, fisher, anchor, ewc_lambda=1.0)
    for term, (name, expected) in zip(penalty._terms, model.named_parameters(), strict=True):
        assert term.parameters[0] is expected
        given = fisher[name], anchor[name]
        assert [t.data_ptr() for t in term.stored] == [t.data_ptr() for t in given]
    ones = [
        term.stored[0] for term in Penalty.l2(model, ewc_lambda=1.0, dtype=torch.bfloat16)._terms
    ]
    assert all(one.untyped_storage().nbytes() == 2 for one in ones)


def test_fisher_and_anchor_in_bfloat16():
    model = Tied()
    fisher, anchor = positive(model), {n: p * 0.9 for n, p in model.state_dict().items()}
    penalty = Penalty(model, fisher, anchor, ewc_lambda=3.0, dtype=torch.bfloat16, device="cpu")
    assert all(t.dtype == torch.bfloat16 for term in penalty._terms for t in term.stored)
    rounded = [
        {name: tensor.bfloat16() for name, tensor in tensors.items()}
        for tensors in (fisher, anchor)
    ]
    assert_by_autograd(penalty, model, *rounded)
    with pytest.raises(UsageError, match=r"stored in torch.int8"):
        Penalty(model, fisher, ewc_lambda=1.0, dtype=torch.int8)


def test_tensors_that_are_taken_in_pieces(monkeypatch):
    monkeypatch.setattr("consolidate.ewc.penalty.CPU_PIECE", 7)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Linear(4, 6)).to(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    fisher = positive(model)
    fisher["1.weight"] = torch.tensor(0.5).expand(6, 4)
    penalty = Penalty(model, fisher, ewc_lambda=3.0)
    model[1].weight.grad = torch.zeros(4, 6).T  # laid out otherwise than its parameter
    assert_by_autograd(penalty, model, fisher, move(model))


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
    assert penalty.value_and_add_gradient_().item() == pytest.approx(value, rel=1e-6)
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
    moved = [p.detach().double() - anchor[name] for name, p in model.named_parameters()]
    expected = 3 / 2 * sum(d.square().sum().item() for d in moved)
    # Each in its own order of float32 sums.
    assert [l2.value(), ewc.value()] == pytest.approx([expected] * 2, rel=1e-6)
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
    model[0].weight.requires_grad_(False)
    model[0].weight.grad = None
    assert penalty.value_and_add_gradient_().item() == penalty.value() == 0
    assert model[0].weight.grad is None


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
    assert penalty.value_and_add_gradient_().item() == penalty.value() == 0
    assert Penalty(model, {}, ewc_lambda=1.0).value_and_add_gradient_().item() == 0


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
    fails(InputError, "Fisher of 'head.bias' has negative", {"head.bias": -torch.ones(6)})
    fails(NonFiniteError, "Fisher of 'head.bias'", {"head.bias": torch.full((6,), torch.nan)})
    fails(NonFiniteError, "Fisher of 'head.bias'", {"head.bias": torch.full((6,), torch.inf)})
    fails(InputError, "anchor lacks 'embedding.weight'", anchor={"head.bias": torch.ones(6)})
    fails(
        InputError, "anchor of 'head.bias' has shape", anchor={**good, "head.bias": torch.ones(5)}
    )
    nan = {**good, "head.bias": torch.full((6,), torch.nan)}
    fails(NonFiniteError, "anchor of 'head.bias'", anchor=nan)


# Every optimizer of torch that needs no closure.
OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS")
)


class Rows(nn.Module):
    """All parameters are matrices, as Muon asks for; sparse gradients at will."""

    def __init__(self, sparse: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(6, 4, sparse=sparse)
        self.out = None if sparse else nn.Linear(4, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.embedding(ids))
        return hidden if self.out is None else self.out(hidden)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_follows_the_sum_of_loss_and_penalty(name: str) -> None:
    sparse = name == "SparseAdam"
    model, dense = Rows(sparse).double(), Rows().double()
    if sparse:
        dense.out = None
    fisher = {n: values.double() for n, values in positive(model).items()}
    anchor = {n: p.detach() + 0.1 for n, p in model.named_parameters()}
    kind = partial(getattr(torch.optim, name), lr=0.05)
    optimizer, expected = kind(model.parameters()), kind(dense.parameters())
    penalty = Penalty(model, fisher, anchor, ewc_lambda=2.0)
    for step in range(4):
        ids = torch.tensor([step, step + 1])
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        penalty.add_gradient_()
        optimizer.step()
        expected.zero_grad()
        pull = sum((fisher[n] * (p - anchor[n]) ** 2).sum() for n, p in dense.named_parameters())
        (dense(ids).square().sum() + pull).backward()
        if sparse:
            dense.embedding.weight.grad = dense.embedding.weight.grad.to_sparse(1)
        expected.step()
        for a, b in zip(model.parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_rows_that_have_not_moved_stay_out_of_a_sparse_gradient() -> None:
    model = Rows(sparse=True)
    penalty = Penalty(model, positive(model), ewc_lambda=2.0)
    with torch.no_grad():
        model.embedding.weight[3] += 1
    model(torch.tensor([1])).sum().backward()
    penalty.add_gradient_()
    gradient = model.embedding.weight.grad.coalesce()
    assert gradient.indices().tolist() == [[1, 3]]
    torch.testing.assert_close(gradient.values()[1], 2 * positive(model)["embedding.weight"][3])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_plain_loop_with_accumulation_groups_a_frozen_part_and_clipping(accumulate: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    model[2].requires_grad_(False)
    twin = copy.deepcopy(model)
    fisher = {n: values.double() for n, values in positive(model).items()}
    anchor = {n: p.detach() + 0.2 for n, p in model.named_parameters()}
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    penalty = Penalty(model, fisher, anchor, ewc_lambda=2.0)

    def optimizer(module: Any) -> torch.optim.Optimizer:
        groups = [{"params": module[0].parameters(), "lr": 0.3}, {"params": module[3].parameters()}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    first, second = optimizer(model), optimizer(twin)
    for _ in range(3):
        first.zero_grad()
        for a, b in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
            ((model(a) - b).square().sum() / 6).backward()
        penalty.add_gradient_()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        first.step()
        second.zero_grad()
        pull = sum((fisher[n] * (p - anchor[n]) ** 2).sum() for n, p in twin.named_parameters())
        ((twin(x) - y).square().sum() / 6 + pull).backward()
        expected = nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        second.step()
        torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
        assert norm > 0.5
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("form", ["gradient", "proximal"])
def test_a_loss_scaler_skips_a_step_as_if_there_were_no_penalty(form: str, fused: bool) -> None:
    model = nn.Linear(3, 2)
    fisher = {"weight": torch.zeros(2, 3), "bias": torch.ones(2)}  # 0 · infinity must not count
    penalty = Penalty(model, fisher, {n: p + 1 for n, p in fisher.items()}, ewc_lambda=2.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0, fused=fused)
    if form == "proximal":
        optimizer.register_step_post_hook(penalty.proximal_step_)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    start = copy.deepcopy(model)
    for factor, scale in ((float("inf"), 4.0), (1.0, 4.0)):
        optimizer.zero_grad()
        scaler.scale((model(torch.ones(1, 3)) * factor).sum()).backward()
        scaler.unscale_(optimizer)
        if form == "gradient":
            penalty.add_gradient_()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale
        moved = not torch.equal(model.bias, start.bias)
        assert moved == (factor == 1)
    assert model.weight.isfinite().all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, float("nan"), 2.0], r"'weight' has values that are NaN .*found nan to nan"),
        ([1.0, float("inf"), 2.0], r"'weight' has values that are NaN .*found 1 to inf"),
        ([-float("inf"), 1.0, 2.0], r"'weight' has values that are NaN .*found -inf to 2"),
        ([1.0, -0.5, 2.0], r"'weight' has negative values, found -0.5"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_no_fisher_are_found(
    values: list[float], message: str, dtype: torch.dtype
) -> None:
    model = nn.Linear(3, 1, bias=False)
    fisher = {"weight": torch.tensor([values], dtype=dtype)}
    with pytest.raises((NonFiniteError, InputError), match=message):
        Penalty(model, fisher, {"weight": torch.zeros(1, 3)}, ewc_lambda=1.0)


def test_an_anchor_may_be_negative_and_tensors_empty_or_of_integers() -> None:
    model = nn.Module()
    model.some, model.none = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(0, 3))
    fisher = {"some": torch.tensor([3, 1]), "none": torch.zeros(0, 3)}
    anchor = {"some": torch.tensor([-1.0, 2.0]), "none": torch.zeros(0, 3)}
    penalty = Penalty(model, fisher, anchor, ewc_lambda=2.0)
    assert penalty.value() == pytest.approx(3.0 * 1 + 1.0 * 4)


def test_a_scaled_loop_takes_the_steps_of_an_unscaled_one() -> None:
    models = [nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    anchor = {n: p + 0.5 for n, p in models[0].state_dict().items()}
    for model, enabled in zip(models, (False, True), strict=True):
        penalty = Penalty(model, positive(model), anchor, ewc_lambda=2.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(torch.ones(4, 3)).square().sum()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            penalty.add_gradient_()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)


SGDS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.5},
    {"momentum": 0.9, "dampening": 0.3},
    {"dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
]


@pytest.mark.parametrize("options", SGDS, ids=str)
def test_the_proximal_step_of_sgd_minimises_the_penalty_near_its_step(options: dict) -> None:
    model = Tied().double()
    fisher = {n: values.double() for n, values in positive(model).items()}
    penalty = Penalty(model, fisher, ewc_lambda=30.0)
    anchor = move(model)
    optimizer = torch.optim.SGD(
        [{"params": [model.head.weight], "lr": 0.7}, {"params": [model.head.bias]}],
        lr=0.1,
        **options,
    )
    model(torch.tensor([[1, 2]])).square().sum().backward()
    optimizer.step()
    between = {n: p.detach().clone() for n, p in model.named_parameters()}
    penalty.proximal_step_(optimizer)
    momentum = options.get("momentum", 0)
    factor = (1 - options.get("dampening", 0)) / (1 - momentum) if momentum else 1
    for (name, p), rate in zip(model.named_parameters(), (0.7 * factor, 0.1 * factor), strict=True):
        # The gradient of (λ/2) Λ (θ − μ)² + (θ − between)² / 2s is zero.
        pull = 30 * fisher[name] * (p.detach() - anchor[name])
        torch.testing.assert_close(pull + (p.detach() - between[name]) / rate, 0 * pull)


@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True}, {"lr": torch.tensor(0.05, dtype=torch.float64)}], ids=str
)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_proximal_step_of_adam_takes_adams_rate(kind: Any, options: dict) -> None:
    model = Tied().double()
    fisher = {n: values.double() for n, values in positive(model).items()}
    penalty = Penalty(model, fisher, ewc_lambda=30.0)
    anchor = move(model)
    optimizer = kind(model.parameters(), betas=(0.8, 0.9), eps=1e-3, **{"lr": 0.05, **options})
    squares = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    largest = copy.deepcopy(squares)
    for step in range(1, 4):
        optimizer.zero_grad()
        (model(torch.tensor([[1, 2]])).square().sum() / step**3).backward()
        optimizer.step()
        between = {n: p.detach().clone() for n, p in model.named_parameters()}
        penalty.proximal_step_(optimizer)
        for name, p in model.named_parameters():
            squares[name] = 0.9 * squares[name] + 0.1 * p.grad**2
            largest[name] = torch.maximum(largest[name], squares[name])
            used = largest[name] if "amsgrad" in options else squares[name]
            rate = 0.05 / ((used / (1 - 0.9**step)).sqrt() + 1e-3)
            strength = rate * 30 * fisher[name]
            expected = (between[name] + strength * anchor[name]) / (1 + strength)
            torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_proximal_steps_come_to_rest_at_the_minimum_where_gradients_diverge(kind: Any) -> None:
    # (θ − 1)²/2 + (λ/2) Λ θ² has its minimum at 1 / (1 + λ Λ); η λ max Λ is 200.
    found = {}
    for form in ("gradient", "proximal"):
        theta = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        fisher = torch.tensor([0.0, 0.25, 2.0], dtype=torch.float64)
        penalty = Penalty([("theta", theta)], {"theta": fisher}, ewc_lambda=1000.0)
        optimizer = kind([theta], lr=0.1)
        if form == "proximal":
            optimizer.register_step_post_hook(penalty.proximal_step_)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        for _ in range(1000 if form == "proximal" else 50):
            optimizer.zero_grad()
            ((theta - 1) ** 2 / 2).sum().backward()
            if form == "gradient":
                penalty.add_gradient_()
            optimizer.step()
            schedule.step()
        found[form] = theta.detach()
    if kind is torch.optim.SGD:
        assert found["gradient"].abs().max() > 1e20
    torch.testing.assert_close(found["proximal"], 1 / (1 + 1000 * fisher), rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_proximal_step_of_no_and_of_endless_strength(dtype: torch.dtype) -> None:
    theta = nn.Parameter(torch.tensor([2.0, 3.0, 4.0], dtype=dtype))
    fisher = torch.tensor([0.0, 1e-30, 3e38])
    penalty = Penalty([("w", theta)], {"w": fisher}, {"w": torch.ones(3)}, ewc_lambda=1e30)
    optimizer = torch.optim.SGD([theta], lr=1.0)
    penalty.proximal_step_(optimizer)
    assert theta.tolist() == [2.0, 2.0, 1.0]
    assert theta.dtype == dtype
    none = Penalty([("w", theta)], {"w": fisher}, {"w": torch.zeros(3)}, ewc_lambda=0.0)
    none.proximal_step_(optimizer)
    assert theta.tolist() == [2.0, 2.0, 1.0]


def test_a_proximal_step_leaves_alone_what_the_optimizer_does_not_step() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    penalty = Penalty(model, positive(model), ewc_lambda=3.0)
    move(model)
    start = copy.deepcopy(model)
    optimizer = torch.optim.Adam([*model[0].parameters(), *model[1].parameters()], lr=0.01)
    model[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    penalty.proximal_step_(optimizer)
    assert not torch.equal(model[0].weight, start[0].weight)
    for layer in (1, 2):
        assert torch.equal(model[layer].weight, start[layer].weight)


@pytest.mark.parametrize("found_inf", [False, True])
def test_a_proximal_step_gives_the_value_after_it_of_what_it_leaves_alone_too(
    found_inf: bool,
) -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(2, 2), nn.Linear(2, 2))
    penalty = Penalty(model, positive(model), ewc_lambda=3.0, offset=0.5)
    move(model)
    optimizer = torch.optim.Adam([*model[0].parameters(), *model[1].parameters()], lr=0.01)
    model[0](torch.ones(1, 300)).sum().backward()
    optimizer.step()
    before = penalty.value()
    optimizer.found_inf = torch.tensor(float(found_inf))  # type: ignore[attr-defined]
    value = penalty.proximal_step_and_value_(optimizer).item()
    assert value == pytest.approx(penalty.value(), rel=1e-6)
    assert (value == pytest.approx(before, rel=1e-6)) == found_inf


def test_other_optimizers_are_refused_by_name() -> None:
    model = nn.Linear(2, 2)
    penalty = Penalty(model, positive(model), ewc_lambda=3.0)
    for name in OPTIMIZERS:
        if name not in ("SGD", "Adam", "AdamW", "Muon", "SparseAdam"):
            optimizer = getattr(torch.optim, name)(model.parameters())
            with pytest.raises(UsageError, match=rf"not {name}; use"):
                penalty.proximal_step_(optimizer)


def test_a_narrow_anchor_is_kept_as_it_is_and_pulls_as_if_it_were_wide():
    model = Tied()
    fisher = positive(model)
    narrow = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    wide = {name: p.float() for name, p in narrow.items()}
    found = []
    for anchor in (narrow, wide):
        penalty = Penalty(model, fisher, anchor, ewc_lambda=3.0)
        model.zero_grad()
        value = penalty.value_and_add_gradient_().item()
        found.append([value, *(p.grad.clone() for p in model.parameters())])
        for term, name in zip(penalty._terms, anchor, strict=True):
            assert term.stored[1].data_ptr() == anchor[name].data_ptr()
    assert found[0][0] == found[1][0] > 0
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:], strict=True))
    # What is wider than the penalty is computed in is rounded once, and for all.
    doubles = {name: p.double() for name, p in wide.items()}
    penalty = Penalty(model, fisher, doubles, ewc_lambda=3.0)
    assert all(term.stored[1].dtype == torch.float32 for term in penalty._terms)
