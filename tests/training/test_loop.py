import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from consolidate.estimation.likelihoods import get_likelihood
from consolidate.ewc.penalty import Penalty
from consolidate.options import Recipe
from consolidate.training.loop import (
    Step,
    data_order,
    freeze_statistics,
    make_optimizer,
    make_scheduler,
    remeasure_statistics,
    seeded,
    training_steps,
)
from formats.errors import NonFiniteError

SOFTMAX = get_likelihood("softmax")
LAMBDA = 3.0


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batches(sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 5, generator=generator, dtype=torch.float64),
            torch.randint(3, (n,), generator=generator),
        )
        for n in sizes
    ]


def run(
    model: nn.Module,
    data: list[tuple[Tensor, Tensor]],
    penalty: Penalty | None = None,
    scaler: torch.amp.GradScaler | None = None,
    first_step: int = 0,
    **recipe: object,
) -> list[Step]:
    optimizer = make_optimizer("sgd", model.parameters(), learning_rate=0.1)
    scheduler = make_scheduler("constant", optimizer, warmup_steps=0, total_steps=100)
    steps = training_steps(
        model,
        data,
        SOFTMAX,
        optimizer,
        scheduler,
        Recipe(**recipe),
        penalty=penalty,
        scaler=scaler,
        first_step=first_step,
    )
    return list(steps)


def ewc(model: nn.Module) -> Penalty:
    """A penalty that pulls: its anchor is not where the model is."""
    fisher = {name: torch.full_like(p, 0.5) for name, p in model.named_parameters()}
    anchor = {name: p.detach() + 0.3 for name, p in model.named_parameters()}
    return Penalty(model, fisher, anchor, ewc_lambda=LAMBDA)


def test_a_step_follows_the_gradient_of_equation_3() -> None:
    data = batches([6])
    model = network()
    expected = copy.deepcopy(model)
    penalty = ewc(model)
    loss = cross_entropy(expected(data[0][0]), data[0][1])
    pull = sum(0.5 * ((p - (p.detach() + 0.3)) ** 2).sum() for p in expected.parameters())
    (loss + LAMBDA / 2 * pull).backward()
    with torch.no_grad():
        for p in expected.parameters():
            p -= 0.1 * p.grad
    (step,) = run(model, data, penalty=penalty)
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    assert step.loss == pytest.approx(loss.item())
    assert step.penalty == pytest.approx(LAMBDA / 2 * pull.item())


def test_micro_batches_of_unequal_size_make_the_step_of_one_batch() -> None:
    data = batches([4, 4, 1])
    whole = [(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))]
    first, second = network(), network()
    run(first, data, gradient_accumulation_steps=3, penalty=ewc(first))
    run(second, whole, penalty=ewc(second))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_tokens_weigh_alike_in_every_micro_batch() -> None:
    likelihood = get_likelihood("token-softmax")
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    twin = copy.deepcopy(model)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    y = torch.randint(3, (2, 5))
    y[0, 1:] = -100  # one token in the first sequence, five in the second
    for module, data, accumulate in (
        (model, [(x[:1], y[:1]), (x[1:], y[1:])], 2),
        (twin, [(x, y)], 1),
    ):
        optimizer = make_optimizer("sgd", module.parameters(), learning_rate=0.5)
        scheduler = make_scheduler("constant", optimizer, warmup_steps=0, total_steps=1)
        recipe = Recipe(gradient_accumulation_steps=accumulate)
        list(training_steps(module, data, likelihood, optimizer, scheduler, recipe))
    torch.testing.assert_close(model.weight, twin.weight, rtol=1e-12, atol=1e-14)


def test_clipping_sees_the_penalty() -> None:
    model = network()
    start = copy.deepcopy(model)
    (step,) = run(model, batches([6]), penalty=ewc(model), max_grad_norm=0.01)
    moved = torch.cat(
        [(a - b).flatten() for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    )
    assert step.gradient_norm is not None
    assert step.gradient_norm > 1
    assert moved.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_scaled_losses_leave_the_penalty_unscaled() -> None:
    data = [(x.float(), y) for x, y in batches([6])]
    model = network().float()
    plain = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run(model, data, penalty=ewc(model), scaler=scaler)
    run(plain, data, penalty=ewc(plain))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("penalty_step", ["gradient", "proximal"])
def test_a_skipped_step_moves_neither_weights_nor_schedule(penalty_step: str) -> None:
    model = network().float()
    start = copy.deepcopy(model)
    optimizer = make_optimizer("sgd", model.parameters(), learning_rate=0.1)
    scheduler = make_scheduler("linear", optimizer, warmup_steps=0, total_steps=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38, growth_interval=1)
    data = [(1e3 * x.float(), y) for x, y in batches([6])]
    recipe, held = Recipe(penalty_step=penalty_step), {"penalty": ewc(model), "scaler": scaler}
    list(training_steps(model, data, SOFTMAX, optimizer, scheduler, recipe, **held))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True)
    )
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_proximal_steps_follow_the_optimizers(name: str) -> None:
    data = batches([6, 6, 6])
    model = network()
    twin = copy.deepcopy(model)
    penalties = [ewc(model), ewc(twin)]
    optimizers = [make_optimizer(name, m.parameters(), learning_rate=0.1) for m in (model, twin)]
    scheduler = make_scheduler("linear", optimizers[0], warmup_steps=0, total_steps=3)
    recipe = Recipe(penalty_step="proximal")
    steps = list(
        training_steps(model, data, SOFTMAX, optimizers[0], scheduler, recipe, penalty=penalties[0])
    )
    for (x, y), step in zip(data, steps, strict=True):
        optimizers[1].param_groups[0]["lr"] = step.learning_rate
        assert step.penalty == pytest.approx(penalties[1].value())
        optimizers[1].zero_grad()
        cross_entropy(twin(x), y).backward()
        optimizers[1].step()
        penalties[1].proximal_step_(optimizers[1])
    assert [step.learning_rate for step in steps] == pytest.approx([0.1, 0.2 / 3, 0.1 / 3])
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_penalty_of_a_proximal_step_is_that_of_the_lambda_it_is_taken_with() -> None:
    model = network()
    penalty = ewc(model)
    optimizer = make_optimizer("sgd", model.parameters(), learning_rate=0.1)
    scheduler = make_scheduler("constant", optimizer, warmup_steps=0, total_steps=4)
    recipe = Recipe(penalty_step="proximal")
    given = (model, batches([4] * 4), SOFTMAX, optimizer, scheduler, recipe)
    penalty.ewc_lambda, expected, found = 0.0, 0.0, []
    for step in training_steps(*given, penalty=penalty):
        found.append((step.penalty, expected))
        penalty.ewc_lambda += 3.0
        expected = penalty.value()
    assert found[1][0] > 0
    assert all(value == pytest.approx(wanted) for value, wanted in found)


@pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
def test_mixed_precision_learns_with_float32_masters(mixed_precision: str) -> None:
    model = network().float()
    data = [(x.float(), y) for x, y in batches([32])] * 20
    scaler = torch.amp.GradScaler("cpu", enabled=mixed_precision == "fp16")
    seen: set[torch.dtype] = set()
    model[0].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    steps = run(model, data, mixed_precision=mixed_precision, scaler=scaler)
    assert seen == {{"bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]}
    assert steps[-1].loss < steps[0].loss
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_step_is_taken_when_it_is_asked_for() -> None:
    model = network()
    optimizer = make_optimizer("sgd", model.parameters(), learning_rate=0.1)
    scheduler = make_scheduler("constant", optimizer, warmup_steps=0, total_steps=5)
    given = (model, batches([2] * 5), SOFTMAX, optimizer, scheduler, Recipe())
    steps = training_steps(*given, first_step=2)
    assert [next(steps).step, next(steps).step] == [3, 4]
    kept = model[0].weight.clone()
    steps.close()
    assert torch.equal(model[0].weight, kept)


def test_statistics_stay_frozen_unless_told() -> None:
    def normed() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()

    frozen, updated = normed(), normed()
    before = copy.deepcopy(frozen[1].state_dict())
    run(frozen, batches([8, 8]))
    run(updated, batches([8, 8]), norm_statistics="update")
    assert all(
        torch.equal(frozen[1].state_dict()[key], before[key])
        for key in ("running_mean", "running_var", "num_batches_tracked")
    )
    assert not torch.equal(updated[1].running_mean, before["running_mean"])
    assert not torch.equal(frozen[1].weight, before["weight"])


def test_a_batch_of_one_example_is_normalized_by_running_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    *_, last = run(model, batches([8, 1]), norm_statistics="update")
    assert math.isfinite(last.loss)
    assert model[1].num_batches_tracked == 1
    run(model, batches([8]), norm_statistics="update")
    assert model[1].num_batches_tracked == 2
    pictures = nn.Sequential(
        nn.Unflatten(1, (1, 5)),
        nn.Conv1d(1, 4, 3),
        nn.BatchNorm1d(4),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    run(pictures.double(), batches([1]), norm_statistics="update")
    assert pictures[2].num_batches_tracked == 1  # three values a channel have a variance


def test_statistics_are_measured_again_wherever_there_are_several_values() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Flatten(),
        nn.Linear(12, 3), nn.BatchNorm1d(3),
    ).double()  # fmt: skip
    wide, narrow = model[2], model[5]
    data = batches([8, 1, 1])
    parts = [model[:2](x) for x, _ in data]

    def mean(over: list[Tensor], dims: tuple[int, ...]) -> list[Tensor]:
        rows = sum(map(len, over))
        moments = [(len(x) / rows * x.mean(dims), len(x) / rows * x.var(dims)) for x in over]
        return [sum(one) for one in zip(*moments, strict=True)]

    start = [narrow.running_mean.clone(), narrow.running_var.clone()]
    remeasure_statistics(model, data[1:])
    torch.testing.assert_close([wide.running_mean, wide.running_var], mean(parts[1:], (0, 2)))
    torch.testing.assert_close([narrow.running_mean, narrow.running_var], start)
    remeasure_statistics(model, data)
    torch.testing.assert_close([wide.running_mean, wide.running_var], mean(parts, (0, 2)))
    # Of the first batch, which the other layer normalized by that batch alone.
    normed = nn.functional.batch_norm(parts[0], None, None, wide.weight, wide.bias, training=True)
    expected = mean([model[4](normed.flatten(1))], (0,))
    torch.testing.assert_close([narrow.running_mean, narrow.running_var], expected)
    assert model.training
    assert wide.momentum == narrow.momentum == 0.1
    assert wide.num_batches_tracked == narrow.num_batches_tracked == 0


def test_statistics_that_follow_a_new_task_forget_the_old_one() -> None:
    """Even where no weight moves: the penalty holds parameters, and statistics are none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    inputs = torch.randn(64, 5, dtype=torch.float64)
    old = [(inputs, inputs[:, :3].argmax(1))] * 200
    run(model, old, norm_statistics="update")
    new = [(4 * inputs + 5, torch.randint(3, (64,)))] * 50

    def old_loss(model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            return float(cross_entropy(model(inputs), old[0][1]))

    losses = {"start": old_loss(model)}
    for statistics in ("frozen", "update"):
        after = copy.deepcopy(model)
        held = Penalty.l2(after, ewc_lambda=1e12)
        run(after, new, penalty=held, penalty_step="proximal", norm_statistics=statistics)
        for a, b in zip(after.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
        losses[statistics] = old_loss(after)
    assert losses["frozen"] == pytest.approx(losses["start"], abs=1e-6)
    assert losses["update"] > losses["start"] + 0.5


def test_freezing_leaves_norms_without_statistics_alone() -> None:
    model = nn.Sequential(nn.InstanceNorm1d(3), nn.Dropout())
    model.train()
    freeze_statistics(model)
    assert all(module.training for module in model)


def test_a_loss_that_is_not_finite_takes_no_step() -> None:
    model = network()
    start = copy.deepcopy(model)
    x, y = batches([4])[0]
    with pytest.raises(NonFiniteError, match=r"step 1: the loss is nan"):
        run(model, [(x * float("nan"), y)])
    assert torch.equal(model[0].weight, start[0].weight)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adam", {}),
        ("adamw", {}),
        ("sgd", {}),
        ("sgd", {"max_grad_norm": 0.1}),
        ("sgd", {"weight_decay": 0.1}),
        ("sgd", {"momentum": 0.9}),
    ],
)
def test_sparse_gradients_are_learned_from_like_dense_ones(
    name: str, options: dict[str, float]
) -> None:
    found, own = [], {key: value for key, value in options.items() if key != "max_grad_norm"}
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(6, 3, sparse=sparse), nn.Flatten(), nn.Linear(6, 3))
        data = [(torch.tensor([[0, 1], [1, 4]]), torch.tensor([0, 2]))] * 3
        optimizer = make_optimizer(name, model.parameters(), learning_rate=0.1, **own)
        scheduler = make_scheduler("constant", optimizer, warmup_steps=0, total_steps=3)
        list(training_steps(model, data, SOFTMAX, optimizer, scheduler, Recipe(**options)))
        kept = [value for values in optimizer.state.values() for value in values.values()]
        assert not any(isinstance(value, Tensor) and value.is_sparse for value in kept)
        found.append(model[0].weight)
    torch.testing.assert_close(*found)


def test_frozen_parameters_do_not_move() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    start = model[0].weight.clone()
    run(model, batches([4, 4]), penalty=Penalty.l2(model, ewc_lambda=1.0))
    assert torch.equal(model[0].weight, start)


def test_data_orders_are_permutations_by_seed() -> None:
    first, second = data_order(10, 3), data_order(10, 3)
    epochs = [next(first) for _ in range(3)]
    assert epochs == [next(second) for _ in range(3)]
    assert epochs[0] != epochs[1]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert next(data_order(10, 4)) != epochs[0]


def test_seeding_is_put_back() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(0):
        first = torch.rand(3)
    with seeded(0):
        assert torch.equal(torch.rand(3), first)
    torch.manual_seed(5)
    with seeded(1):
        torch.rand(3)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1, 0.8536, 0.5, 0.1464]),
    ],
)
def test_schedules_warm_up_and_decay(name: str, expected: list[float]) -> None:
    optimizer = make_optimizer("sgd", [nn.Parameter(torch.zeros(1))], learning_rate=1.0)
    scheduler = make_scheduler(name, optimizer, warmup_steps=3, total_steps=7)
    rates = []
    for _ in expected:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected, abs=1e-4)
