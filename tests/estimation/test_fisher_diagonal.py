import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from consolidate.estimation.batches import model_outputs, place_of, placed, split_batch
from consolidate.estimation.estimates import FisherDiagonal
from consolidate.estimation.fisher_diagonal import fisher_diagonal
from consolidate.estimation.likelihoods import LIKELIHOODS
from formats.errors import InputError, NonFiniteError, UsageError
from support import reference
from support.modules import Checkpointed, Experts, Images, Tagger, assert_close, cut, network, tiny
from support.tiny_models import bert_config

F64 = {"accumulate_dtype": torch.float64}


def data(n: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 5, generator=generator)
    return x, torch.randint(classes, (n,), generator=generator)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def check(model: nn.Module, batches: list, likelihood: str, units: int) -> FisherDiagonal:
    """Hold `exact` and `empirical` of any model against the reference, in float64 and float32."""
    for kind in ("empirical", "exact"):
        total = reference.fisher(model, batches, likelihood, kind)
        expected = {name: value / units for name, value in total.items()}
        double = [(reference.float64(x), y) for x, y in batches]
        fisher = fisher_diagonal(
            copy.deepcopy(model).double(), double, likelihood, estimator=kind, **F64
        )
        assert fisher.units == units
        assert_close(fisher, expected, 1e-10)
        fisher = fisher_diagonal(model, batches, likelihood, estimator=kind)
        assert all(value.dtype == torch.float32 for value in fisher.values())
        assert_close(fisher, expected, 1e-4)
    return fisher


# Against the reference: every likelihood, every kind of model.


def test_softmax():
    x, y = data(7)
    fisher = check(network(), cut(x, y, 3), "softmax", 7)
    assert fisher.examples == 7
    assert fisher.estimator == "exact"
    assert fisher.mc_samples is None
    assert fisher.unreached == []
    assert fisher.trace()["0.bias"] == pytest.approx(fisher["0.bias"].sum().item())


def test_bernoulli():
    x, _ = data(5)
    check(network(), cut(x, torch.randint(2, (5, 3)).float(), 2), "bernoulli", 5)


@pytest.mark.parametrize("shape", [(5, 2), (5, 1), (5,)])
def test_gaussian(shape):
    x, _ = data(5)
    outputs = 2 if shape == (5, 2) else 1
    check(network(outputs), cut(x, torch.randn(shape), 2), "gaussian", 5)


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("likelihood", ["token-softmax", "next-token-softmax"])
def test_sequences_with_padding_tied_weights_and_bare_parameters(recurrent, likelihood):
    ids = torch.tensor([[1, 2, 1, 2], [2, 1, 0, 0], [1, 1, 2, 0]])
    labels = torch.tensor([[2, 1, 0, 1], [1, 2, -100, -100], [-100, 1, 0, -100]])
    batches = [
        ({"ids": ids[:2], "keep": ids[:2] > 0}, labels[:2]),
        ({"ids": ids[2:], "keep": ids[2:] > 0}, labels[2:]),
    ]
    units = {"token-softmax": 8, "next-token-softmax": 6}[likelihood]
    fisher = check(Tagger(recurrent), batches, likelihood, units)
    assert "embedding.weight" in fisher
    assert "head.weight" not in fisher
    collated = [{**inputs, "labels": labels} for inputs, labels in batches]
    model = Tagger(recurrent)
    assert_equal(fisher_diagonal(model, collated, likelihood), fisher)


def test_images():
    x = torch.randn(5, 2, 5, 4)
    batches = cut(x, torch.randint(3, (5,)), 2)
    fisher = check(Images(), batches, "softmax", 5)
    assert fisher.unreached == ["unused.weight", "unused.bias"]
    assert not fisher["unused.weight"].any()


def test_routed_experts():
    x, y = data(6)
    check(Experts(), cut(x, y, 4), "softmax", 6)


def test_checkpointed_activations():
    x, y = data(4)
    check(Checkpointed(), cut(x, y, 3), "softmax", 4)


def test_linear_softmax_regression_in_closed_form():
    # E_y[(1_c - p_c)²] x_d² = p_c (1 - p_c) x_d²
    model = nn.Linear(5, 3).double()
    x, y = data(9)
    x = x.double()
    p = model(x).softmax(1).detach()
    fisher = fisher_diagonal(model, cut(x, y, 4), "softmax", **F64)
    expected = torch.einsum("bc,bd->cd", p * (1 - p), x**2) / 9
    assert_close(fisher, {"weight": expected, "bias": (p * (1 - p)).mean(0)}, 1e-12)


# The batch size, the order of things and the seed.


@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
@pytest.mark.parametrize(("n", "size"), [(2, 256), (7, 3), (300, 256)])
def test_the_batch_size_does_not_matter(estimator, n, size):
    model = network()
    x, y = data(n)
    options = {"estimator": estimator, "mc_samples": 2, "seed": 3}
    one = fisher_diagonal(model, cut(x, y, 1), "softmax", **options)
    many = fisher_diagonal(model, cut(x, y, size), "softmax", **options)
    assert (one.examples, one.units) == (many.examples, many.units) == (n, n)
    assert_close(many, one, 1e-6)
    if estimator != "mc":
        total = reference.fisher(model, [(x, y)], "softmax", estimator)
        assert_close(many, {k: v / n for k, v in total.items()}, 1e-5)


def test_the_same_seed_gives_the_same_bytes_and_another_gives_others():
    x, y = data(20)
    for estimator in ("mc", "batched"):
        first, again, other = (
            fisher_diagonal(network(), cut(x, y, 6), "softmax", estimator=estimator, seed=seed)
            for seed in (0, 0, 1)
        )
        assert_equal(first, again)
        assert first.seed == 0
        assert not torch.equal(first["0.weight"], other["0.weight"])


def test_samples_belong_to_examples_not_to_the_order_they_are_read_in():
    x, y = data(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    straight = fisher_diagonal(network(), cut(x, y, 5), "softmax", estimator="mc")
    shuffled = fisher_diagonal(
        network(), cut(x[order], y[order], 5), "softmax", estimator="mc", indices=order.tolist()
    )
    assert_close(shuffled, straight, 1e-6)
    unaware = fisher_diagonal(network(), cut(x[order], y[order], 5), "softmax", estimator="mc")
    assert (unaware["0.weight"] / straight["0.weight"] - 1).abs().max() > 1e-2
    with pytest.raises(InputError, match="11 indices for 12 examples"):
        fisher_diagonal(network(), cut(x, y, 6), "softmax", indices=range(11))


def test_padding_does_not_change_what_is_sampled():
    model = Tagger()
    ids = torch.tensor([[1, 2, 1, 0, 0, 0]])
    labels = torch.tensor([[2, 1, 0, -100, -100, -100]])
    narrow, wide = (
        fisher_diagonal(
            model,
            [({"ids": ids[:, :t], "keep": ids[:, :t] > 0}, labels[:, :t])],
            "token-softmax",
            estimator="mc",
            mc_samples=5,
        )
        for t in (3, 6)
    )
    assert_close(wide, narrow, 1e-4)


# Sampling converges to the closed form.


def relative_error(found: FisherDiagonal, expected: FisherDiagonal) -> float:
    difference = torch.cat([(found[k] - expected[k]).flatten() for k in expected])
    return (difference.norm() / torch.cat([v.flatten() for v in expected.values()]).norm()).item()


@pytest.mark.parametrize("likelihood", ["softmax", "bernoulli", "gaussian"])
def test_mc_converges_to_exact_as_one_over_the_root_of_samples(likelihood):
    model = network()
    x, _ = data(4)
    y = {"softmax": torch.zeros(4).long()}.get(likelihood, torch.zeros(4, 3))
    exact = fisher_diagonal(model, [(x, y)], likelihood)
    errors = {}
    for samples in (10, 1000):
        found = [
            fisher_diagonal(
                model, [(x, y)], likelihood, estimator="mc", mc_samples=samples, seed=seed
            )
            for seed in range(4 if samples == 10 else 1)
        ]
        assert found[0].mc_samples == samples
        errors[samples] = sum(relative_error(f, exact) ** 2 / len(found) for f in found) ** 0.5
    assert errors[1000] < 0.1
    assert 3 < errors[10] / errors[1000] < 33  # 10 in expectation


@pytest.mark.slow
def test_batched_is_unbiased_and_squaring_the_batch_gradient_of_the_data_is_not():
    model = network()
    x, y = data(32)
    exact = fisher_diagonal(model, [(x, y)], "softmax")
    batched = fisher_diagonal(model, cut(x, y, 8), "softmax", estimator="batched", mc_samples=1500)
    assert batched.mc_samples == 1500
    assert relative_error(batched, exact) < 0.1
    assert sum(batched.trace().values()) == pytest.approx(sum(exact.trace().values()), rel=0.05)


def test_batched_runs_once_a_batch_and_squares_its_sum():
    model = network()
    x, y = data(7)
    calls = []
    model.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    fisher = fisher_diagonal(model, cut(x, y, 3), "softmax", estimator="batched")
    assert calls == [3, 3, 1]
    alone = [
        fisher_diagonal(
            model, [b], "softmax", estimator="batched", indices=range(3 * i, 3 * i + len(b[1]))
        )
        for i, b in enumerate(cut(x, y, 3))
    ]
    expected = {k: sum(f[k] * f.units for f in alone) / 7 for k in fisher}
    assert_close(fisher, expected, 1e-6)


# What other software gets wrong.


def test_per_example_squares_are_not_squares_of_the_batch_gradient():
    model = network()
    x, y = data(64)
    trace = {}
    for size in (1, 32, 64):
        fisher = fisher_diagonal(model, cut(x, y, size), "softmax", estimator="empirical")
        trace[size] = sum(fisher.trace().values())
    assert trace[32] == pytest.approx(trace[1], rel=1e-5)
    assert trace[64] == pytest.approx(trace[1], rel=1e-5)
    nn.functional.cross_entropy(model(x), y).backward()
    wrong = sum((p.grad**2).sum().item() for p in model.parameters())
    assert wrong < 0.2 * trace[1]


def test_exactly_the_given_batches_are_read():
    x, y = data(6)
    batches = iter([*cut(x, y, 3), "not to be touched by islice"])
    fisher = fisher_diagonal(network(), itertools.islice(batches, 2), "softmax")
    assert fisher.examples == 6
    assert next(batches) == "not to be touched by islice"


def test_one_example_in_one_batch_larger_than_the_data_is_finite():
    x, y = data(1)
    fisher = fisher_diagonal(network(), cut(x, y, 256), "softmax")
    total = reference.fisher(network(), [(x, y)], "softmax", "exact")
    assert_close(fisher, total, 1e-5)


def test_every_parameter_is_covered_and_old_gradients_neither_count_nor_change():
    model = network()
    x, y = data(4)
    clean = fisher_diagonal(model, [(x, y)], "softmax")
    assert list(clean) == [name for name, _ in model.named_parameters()]
    assert all(value.sum() > 0 for value in clean.values())
    assert all(p.grad is None for p in model.parameters())
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    grads = [p.grad for p in model.parameters()]
    assert_equal(fisher_diagonal(model, [(x, y)], "softmax"), clean)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad
        assert (grad == 7).all()


def test_bfloat16_weights_are_accumulated_in_float32():
    # Gradients of 1e-3: 10⁴ squares of 1e-6 add up to 1e-2, where bfloat16 stalls at 5e-4.
    model = nn.Linear(1, 1, bias=False).bfloat16()
    x = torch.full((10_000, 1), 1e-3)
    fisher = fisher_diagonal(model, cut(x, torch.zeros(10_000), 500), "gaussian")
    assert model.weight.dtype == torch.bfloat16
    assert fisher["weight"].dtype == torch.float32
    expected = torch.tensor(1e-3).bfloat16().double().square().item()
    assert fisher["weight"].item() == pytest.approx(expected, rel=1e-5)


def test_parameters_without_elements_are_in_nobodys_way():
    class WithNothing(nn.Linear):
        def __init__(self) -> None:
            super().__init__(5, 3)
            self.nothing = nn.Parameter(torch.zeros(0))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.nothing.sum()

    fisher = fisher_diagonal(nn.Sequential(WithNothing(), nn.Linear(3, 3)), [data(4)], "softmax")
    assert fisher["0.nothing"].shape == (0,)
    assert fisher.methods["1.weight"] == "rule"


@pytest.mark.slow
def test_large_sums_stay_accurate():
    # 20,000 additions of the same number in float32 drift by 1e-4 unless what is cut off is kept.
    model = nn.Linear(1, 1, bias=False)
    x = torch.full((20_000, 1), 0.1)
    fisher = fisher_diagonal(model, cut(x, torch.zeros(20_000), 1), "gaussian")
    expected = torch.tensor(0.1).double().square().item()
    assert fisher["weight"].item() == pytest.approx(expected, rel=2e-7)


class Scaled(nn.Module):
    """One parameter that is part of no layer, and 2,000 outputs."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x * torch.ones(2000, dtype=x.dtype)


def test_large_sums_over_many_outcomes_stay_accurate():
    # As many additions to the one parameter, of an example's outcomes one by one.
    x, y = torch.full((50, 1), 1.1), torch.zeros(50, 2000)
    fisher = fisher_diagonal(Scaled(), cut(x, y, 1), "gaussian")
    assert fisher.methods["scale"] == "loop"
    expected = 2000 * torch.tensor(1.1).double().square().item()
    assert fisher["scale"].item() == pytest.approx(expected, rel=5e-5)


def test_float64_sums_on_request():
    x, y = data(3)
    fisher = fisher_diagonal(network(), [(x, y)], "softmax", **F64)
    assert all(value.dtype == torch.float64 for value in fisher.values())


# The model comes back as it was.


class Counting(nn.Module):
    """Changes and replaces its own buffers in every forward pass, and makes new ones."""

    def __init__(self):
        super().__init__()
        self.body = network()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(5))
        self.register_buffer("empty", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.detach().mean(0)
        self.empty = x.detach()
        self.register_buffer("new", x.detach(), persistent=False)
        return self.body(x)


def state(model: nn.Module) -> list[tuple[str, bool, list[tuple[str, Tensor | None]]]]:
    return [
        (name, module.training, list(module._buffers.items()))
        for name, module in model.named_modules()
    ]


def assert_untouched(model: nn.Module, before: list, values: dict[str, Tensor]) -> None:
    after = state(model)
    assert [(name, training) for name, training, _ in after] == [
        (name, training) for name, training, _ in before
    ]
    for (_, _, found), (_, _, expected) in zip(after, before, strict=True):
        assert [name for name, _ in found] == [name for name, _ in expected]
        assert all(a is b for (_, a), (_, b) in zip(found, expected, strict=True))
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def in_mixed_modes(model: nn.Module) -> nn.Module:
    """Train mode everywhere but in one module, with one frozen parameter."""
    model.train()
    next(module for module in model.modules() if isinstance(module, nn.Linear)).eval()
    next(model.parameters()).requires_grad_(False)
    return model


@pytest.mark.parametrize("make", [Images, Counting])
@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical", "batched"])
def test_modes_buffers_and_weights_come_back_bit_for_bit(make, estimator):
    model = in_mixed_modes(make())
    before, values = state(model), copy.deepcopy(model.state_dict())
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    x = torch.randn(4, 2, 5, 4) if make is Images else torch.randn(4, 5)
    batches = cut(x, torch.randint(3, (4,)), 3)
    fisher = fisher_diagonal(model, batches, "softmax", estimator=estimator)
    assert_untouched(model, before, values)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == frozen
    assert len(frozen) == 1
    assert frozen[0] not in fisher


def test_products_are_those_of_float32_whatever_the_program_has_set():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 60), nn.ReLU(), nn.Linear(60, 5))
    batch = (torch.randn(40, 70), torch.randint(5, (40,)))
    expected = fisher_diagonal(model, [batch], "softmax")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = fisher_diagonal(model, [batch], "softmax")
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.methods == expected.methods
    for name, values in expected.items():
        assert torch.equal(found[name], values)


def test_products_are_those_of_float32_inside_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 60), nn.ReLU(), nn.Linear(60, 5))
    batch = (torch.randn(40, 70), torch.randint(5, (40,)))
    expected = fisher_diagonal(model, [batch], "softmax", structure="inputs")
    with torch.autocast("cpu", torch.bfloat16):
        found = fisher_diagonal(model, [batch], "softmax", structure="inputs")
        assert torch.is_autocast_enabled("cpu")
    assert found.methods == expected.methods
    for name, values in expected.items():
        assert torch.equal(found[name], values)
    for name, matrix in expected.factors.items():
        assert torch.equal(found.factors[name], matrix)


class Counts(nn.Module):
    """Embeds tokens, with gradients that autograd divides by how often a token is there."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 3, scale_grad_by_freq=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).sum(1)


@pytest.mark.parametrize("size", [1, 3])
def test_how_often_a_token_is_there_scales_no_gradient(size):
    torch.manual_seed(0)
    model, plain = Counts(), Counts()
    plain.table = nn.Embedding(4, 3)
    plain.load_state_dict(model.state_dict())
    ids, labels = torch.tensor([[1, 1, 2], [0, 3, 3], [2, 2, 2]]), torch.tensor([0, 1, 2])
    found, expected = (
        fisher_diagonal(m, cut(ids, labels, size), "softmax") for m in (model, plain)
    )
    torch.testing.assert_close(found["table.weight"], expected["table.weight"])
    assert model.table.scale_grad_by_freq


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, InputError])
@pytest.mark.parametrize("where", ["batches", "model", "progress"])
def test_the_model_comes_back_when_a_pass_is_broken_off(error, where):
    model = in_mixed_modes(Counting())
    before, values = state(model), copy.deepcopy(model.state_dict())
    x, y = data(8)
    calls = itertools.count()

    def stop(*_: object) -> None:
        if next(calls) >= 2:
            raise error("stop")

    def batches():
        for batch in cut(x, y, 2):
            if where == "batches":
                stop()
            yield batch

    if where == "model":
        model.body.register_forward_hook(stop)
    told = InputError if where == "model" and error is RuntimeError else error
    with pytest.raises(told, match="stop"):
        fisher_diagonal(model, batches(), "softmax", progress=stop if where == "progress" else None)
    assert_untouched(model, before, values)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("size", [1, 8])
def test_inputs_of_another_width_are_an_input_error(size):
    model = nn.Sequential(nn.Linear(784, 4), nn.ReLU(), nn.Linear(4, 3))
    why = r"the model does not accept float32 \[1, 64\]: RuntimeError: mat1 and mat2 shapes"
    with pytest.raises(InputError, match=why):
        fisher_diagonal(model, cut(torch.zeros(8, 64), torch.zeros(8).long(), size), "softmax")


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_compiled_modules_are_refused():
    optimized = nn.Sequential(torch.compile(nn.Linear(5, 3)))
    with pytest.raises(InputError, match=r"'0' was compiled by torch\.compile"):
        fisher_diagonal(optimized, [], "softmax")
    compiled = torch.jit.script(nn.Linear(5, 3))
    for model, name in ((compiled, "the model"), (nn.Sequential(compiled), "0")):
        with pytest.raises(InputError, match=f"'{name}' is a torch.jit.ScriptModule"):
            fisher_diagonal(model, [data(4)], "softmax")


class Noisy(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_that_draws_random_numbers_is_refused(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), Noisy(), nn.Linear(4, 3)).to(dtype)
    with pytest.raises(InputError, match="draws random numbers in eval mode"):
        fisher_diagonal(model, [(x.to(dtype), y) for x, y in [data(8)]], "softmax")


def test_dropout_and_batch_statistics_are_off():
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    x, y = data(6)
    training = fisher_diagonal(model.train(), [(x, y)], "softmax")
    evaluating = fisher_diagonal(model.eval(), [(x, y)], "softmax")
    assert_equal(training, evaluating)


def test_it_works_where_gradients_are_switched_off():
    x, y = data(4)
    expected = fisher_diagonal(network(), [(x, y)], "softmax")
    model = network()
    with torch.no_grad():
        assert_equal(fisher_diagonal(model, [(x, y)], "softmax"), expected)
    with torch.inference_mode():
        assert_equal(fisher_diagonal(model, [(x, y)], "softmax"), expected)


def test_a_table_that_renormalises_itself_comes_back_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=0.5), nn.Flatten(), nn.Linear(12, 3))
    before = copy.deepcopy(model.state_dict())
    fisher_diagonal(model, [(torch.randint(7, (5, 3)), torch.randint(3, (5,)))], "softmax")
    assert_equal(model.state_dict(), before)


def test_parameters_on_several_devices_are_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, device="meta"))
    with pytest.raises(InputError, match="are on several devices"):
        fisher_diagonal(model, [(torch.randn(2, 4), torch.tensor([0, 1]))], "softmax")


def test_complex_parameters_are_refused():
    class Filter(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, dtype=torch.cdouble))

        def forward(self, x):
            return torch.fft.irfft(torch.fft.rfft(x) * self.w, n=4)

    with pytest.raises(InputError, match="'w' is complex"):
        fisher_diagonal(Filter(), [(torch.randn(2, 4), torch.tensor([0, 1]))], "softmax")


def test_sums_are_float32_or_float64():
    with pytest.raises(UsageError, match=r"accumulate_dtype is torch.int32"):
        fisher_diagonal(network(), [data(3)], "softmax", accumulate_dtype=torch.int32)


class Centred(nn.Module):
    """Its outputs depend on the other examples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(x - 0.5 * x.mean(0))


def test_examples_that_change_one_another_are_taken_alone_and_that_is_said():
    x, y = data(12)
    notes: list[str] = []
    found = fisher_diagonal(Centred(), cut(x, y, 4), "softmax", note=notes.append)
    assert_close(found, fisher_diagonal(Centred(), cut(x, y, 1), "softmax"), 1e-5)
    assert len(notes) == 1
    assert "head differ from single examples: continuing by loop" in notes[0]


@pytest.mark.parametrize("size", [3, 4, 16])
def test_the_spread_does_not_follow_the_order_of_the_data(size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 160, 40), nn.Tanh(), nn.Flatten(), nn.Linear(160 * 10, 3))
    x, y = torch.randn(256, 4, 49), torch.randint(3, (256,))
    x[::4] *= 0.1
    found = fisher_diagonal(model, cut(x, y, size), "softmax").relative_errors["0.weight"]
    shuffled = torch.randperm(256)
    other = fisher_diagonal(model, cut(x[shuffled], y[shuffled], 16), "softmax")
    assert found == pytest.approx(other.relative_errors["0.weight"], rel=0.35)


# How certain it is, and stopping early.


def shares(model: nn.Module, x: Tensor, y: Tensor, likelihood: str) -> dict[str, Tensor]:
    """The traces that examples give on their own, (n,) by parameter, in float64."""
    alone = [
        reference.fisher(model, [(x[i : i + 1], y[i : i + 1])], likelihood, "exact")
        for i in range(len(y))
    ]
    return {n: torch.stack([one[n].sum() for one in alone]) for n in alone[0]}


def test_the_standard_error_is_that_of_the_examples():
    x, y = data(11)
    found = fisher_diagonal(network().double(), cut(x.double(), y, 4), "softmax", **F64)
    for name, s in shares(network(), x, y, "softmax").items():
        expected = s.std().item() / 11**0.5 / s.mean().item()
        assert found.relative_errors[name] == pytest.approx(expected, rel=1e-9)


def test_the_standard_error_of_tokens_is_that_of_a_ratio():
    ids = torch.randint(1, 3, (6, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(3, (6, 4), generator=torch.Generator().manual_seed(1))
    labels[0, 1:] = labels[3, 2] = labels[4, :2] = -100
    inputs = {"ids": ids, "keep": torch.ones_like(ids, dtype=torch.bool)}
    model = Tagger()
    parts = [({k: v[s] for k, v in inputs.items()}, labels[s]) for s in (slice(4), slice(4, 6))]
    found = fisher_diagonal(copy.deepcopy(model).double(), parts, "token-softmax", **F64)
    u = (labels != -100).sum(1).double()
    alone = [
        reference.fisher(
            model,
            [({k: v[i : i + 1] for k, v in inputs.items()}, labels[i : i + 1])],
            "token-softmax",
            "exact",
        )
        for i in range(6)
    ]
    for name in ("embedding.weight", "positions.weight", "head.bias", "scale"):
        s = torch.stack([one[name].sum() for one in alone])
        ratio = s.sum() / u.sum()
        error = (6 / 5 * ((s - ratio * u) ** 2).sum()).sqrt() / u.sum() / ratio
        assert found.relative_errors[name] == pytest.approx(error.item(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_softmax_does_not_see_has_no_standard_error(dtype: torch.dtype):
    torch.manual_seed(0)
    config = bert_config(num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 10  # else attention hardly matters to a fresh model
    ids = torch.randint(5, (2, 4, 9))
    batches = [{"input_ids": part, "labels": torch.arange(4) % 3} for part in ids]
    found = fisher_diagonal(model, batches, "softmax")
    without = found.keys() - found.relative_errors.keys()
    unseen = {name for name in found if name.endswith("key.bias")}
    assert len(unseen) == 2
    assert all(found.trace()[name] > 0 for name in unseen)
    assert without == unseen


def test_the_standard_error_covers_the_truth():
    """The trace over 100 examples lies within two standard errors about 95 times of 100."""
    x, y = data(4000)
    model = network()
    truth = fisher_diagonal(model, cut(x, y, 1000), "softmax")
    covered = []
    for part in cut(x, y, 100):
        found = fisher_diagonal(model, cut(*part, 50), "softmax")
        for name, trace in found.trace().items():
            away = abs(trace - truth.trace()[name])
            covered.append(away <= 2 * found.relative_errors[name] * trace)
    assert 0.88 <= sum(covered) / len(covered) <= 0.99


@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical", "batched"])
def test_a_tolerance_ends_the_pass(estimator):
    x, y = data(3000)
    options = {"estimator": estimator, "tolerance": 0.1}
    found = fisher_diagonal(network(), cut(x, y, 10), "softmax", **options)
    assert (640 if estimator == "batched" else 64) <= found.examples < 3000
    assert max(found.relative_errors.values()) <= 0.1
    read = found.examples
    same = fisher_diagonal(network(), cut(x[:read], y[:read], 10), "softmax", estimator=estimator)
    assert_equal(found, same)
    before = fisher_diagonal(
        network(), cut(x[: read - 10], y[: read - 10], 10), "softmax", estimator=estimator
    )
    least = 640 if estimator == "batched" else 70  # batches of 10 there
    assert read == least or max(before.relative_errors.values()) > 0.1


def test_a_tolerance_ends_no_pass_before_64_examples():
    x, y = data(200)
    found = fisher_diagonal(network(), cut(x, y, 7), "softmax", tolerance=1e6)
    assert found.examples == 70
    found = fisher_diagonal(network(), cut(x[:50], y[:50], 7), "softmax", tolerance=1e6)
    assert found.examples == 50


def test_a_tolerance_is_compared_at_intervals():
    x, y = data(3000)
    options = {"tolerance": 0.1, "tolerance_every": 6}
    found = fisher_diagonal(network(), cut(x, y, 10), "softmax", **options)
    at_once = fisher_diagonal(network(), cut(x, y, 10), "softmax", tolerance=0.1)
    assert found.examples == -(-at_once.examples // 60) * 60
    with pytest.raises(UsageError, match="tolerance_every is 0"):
        fisher_diagonal(network(), [data(3)], "softmax", tolerance=0.1, tolerance_every=0)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan"), float("inf")])
def test_a_tolerance_is_a_number_above_zero(tolerance):
    with pytest.raises(UsageError, match="tolerance is"):
        fisher_diagonal(network(), [data(3)], "softmax", tolerance=tolerance)


def test_progress_is_told_of_every_example():
    x, y = data(7)
    told: list[int] = []
    fisher_diagonal(network(), cut(x, y, 3), "softmax", progress=told.append)
    assert told == [3, 3, 1]


# What is refused.


def test_options_that_make_no_sense():
    x, y = data(2)
    with pytest.raises(UsageError, match=r"'fast'.*exact, mc, empirical, batched"):
        fisher_diagonal(network(), [(x, y)], "softmax", estimator="fast")
    with pytest.raises(UsageError, match="mc_samples is 0"):
        fisher_diagonal(network(), [(x, y)], "softmax", estimator="mc", mc_samples=0)
    with pytest.raises(UsageError, match=r"3 backward passes.*more than 2.*mc"):
        fisher_diagonal(network(), [(x, y)], "softmax", max_outcomes=2)


def test_no_example_and_no_predicted_position():
    with pytest.raises(InputError, match="at least one example"):
        fisher_diagonal(network(), [], "softmax")
    with pytest.raises(InputError, match="at least one example"):
        fisher_diagonal(network(), [data(0)], "softmax", estimator="batched")
    ids = torch.ones(2, 3).long()
    inputs = {"ids": ids, "keep": ids > 0}
    with pytest.raises(InputError, match="none of the 2 examples"):
        fisher_diagonal(Tagger(), [(inputs, torch.full((2, 3), -100))], "token-softmax")


def test_nothing_to_differentiate():
    x, y = data(2)
    with pytest.raises(InputError, match="no parameter that requires gradients"):
        fisher_diagonal(network().requires_grad_(False), [(x, y)], "softmax")

    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).detach()

    with pytest.raises(InputError, match="do not depend on any parameter"):
        fisher_diagonal(Detached(), [(x, y)], "softmax")


def test_examples_that_interact_are_refused_by_name():
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(InputError, match=r"'1' \(BatchNorm1d\)"):
        fisher_diagonal(model, [data(4)], "softmax")


def test_numbers_that_are_not_finite():
    x, y = data(6)
    model = network()
    broken = x.clone()
    broken[4] = torch.nan
    with pytest.raises(NonFiniteError, match="outputs are not finite in batch 2"):
        fisher_diagonal(model, cut(broken, y, 3), "softmax")

    class Root(nn.Module):
        """Finite at zero, with an infinite slope there."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :3] + (self.w * (x[:, :1] > 0)).sqrt()

    with pytest.raises(NonFiniteError, match=r"batch 1 \(examples 0 to 2, counted from 0\)"):
        fisher_diagonal(Root(), cut(x.abs(), y, 3), "softmax")
    places = [*range(30, 18, -1)]
    message = r"'w' is not finite in batch 1 \(examples 30, 29, 28, 27, 26, 25, 24, 23, …, "
    with pytest.raises(NonFiniteError, match=message):
        fisher_diagonal(
            Root(), cut(x.abs().repeat(2, 1), y.repeat(2), 9), "softmax", indices=places
        )


def test_a_label_out_of_range_is_named():
    x, _ = data(2)
    with pytest.raises(InputError, match=r"label 3 .*expected 0 to 2"):
        fisher_diagonal(network(), [(x, torch.tensor([0, 3]))], "softmax")


def test_batches_of_another_form():
    x, y = data(3)
    with pytest.raises(InputError, match="batch of type Tensor"):
        split_batch(x)
    with pytest.raises(InputError, match=r'batch with the keys x, y: expected one named "labels"'):
        split_batch({"x": x, "y": y})
    with pytest.raises(InputError, match="labels of type list"):
        split_batch((x, [0, 1, 2]))
    with pytest.raises(InputError, match=r"shape \(4, 5\) in a batch of 3 labels"):
        fisher_diagonal(network(), [(torch.randn(4, 5), y)], "softmax")
    assert split_batch([x, y]) == (x, y)
    inputs, labels = split_batch({"x": x, "labels": y})
    assert list(inputs) == ["x"]
    assert labels is y


# What a model is given and gives.


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor, shift: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"logits": self.body(x + shift) * scale, "hidden": x}


def test_inputs_are_a_tensor_a_tuple_or_a_mapping_and_may_be_shared():
    x, y = data(3)
    shift = torch.full((1, 5), 0.5)
    body = network()
    expected = fisher_diagonal(body, [(x + shift, y)], "softmax")
    for inputs in ((x, shift), [x, shift], {"x": x, "shift": shift, "scale": 1.0}):
        fisher = fisher_diagonal(Several(), [(inputs, y)], "softmax")
        assert_close({k.removeprefix("body."): v for k, v in fisher.items()}, expected, 1e-6)
    for outputs in (Several()(x, shift), SimpleNamespace(logits=torch.ones(1))):
        found = model_outputs(lambda _, outputs=outputs: outputs, x, y)
        assert found is (outputs["logits"] if isinstance(outputs, dict) else outputs.logits)
    with pytest.raises(InputError, match="output of type list"):
        model_outputs(lambda _: [x], x, y)


def test_floating_inputs_take_the_models_type_and_others_stay():
    model = network().bfloat16()
    mapping = {"x": torch.ones(2, 5), "ids": torch.ones(2).long()}
    inputs, labels = placed(place_of(model), mapping, data(2)[1])
    assert inputs["x"].dtype == torch.bfloat16
    assert inputs["ids"].dtype == labels.dtype == torch.int64
    model[0].float()
    assert placed(place_of(model), torch.ones(2, 5), labels)[0].dtype == torch.float32


class Seq2Seq(nn.Module):
    config = SimpleNamespace(is_encoder_decoder=True, decoder_start_token_id=7, pad_token_id=9)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        assert "labels" not in self.__dict__
        return decoder_input_ids


def test_an_encoder_decoder_gets_its_inputs_from_the_labels():
    ids, labels = torch.zeros(1, 4).long(), torch.tensor([[3, 4, -100, -100]])
    model = Seq2Seq()
    assert model_outputs(model, {"input_ids": ids}, labels).tolist() == [[7, 3, 4, 9]]
    given = {"input_ids": ids, "decoder_input_ids": ids}
    assert model_outputs(model, given, labels) is ids
    model.prepare_decoder_input_ids_from_labels = lambda labels: labels + 1
    assert model_outputs(model, {"input_ids": ids}, labels).tolist() == [[4, 5, -99, -99]]
    with pytest.raises(
        InputError, match=r"accept input_ids: int64 \[1, 4\]: TypeError.*decoder_inp"
    ):
        model_outputs(model, {"input_ids": ids}, torch.tensor([3]))
    bare = Seq2Seq()
    bare.config = SimpleNamespace(
        is_encoder_decoder=True, decoder_start_token_id=None, pad_token_id=9
    )
    with pytest.raises(InputError, match=r"`pad_token_id`: found None and 9; set"):
        model_outputs(bare, {"input_ids": ids}, labels)


# Real architectures.


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixtral", "t5", "vit"])
def test_transformers(name):
    model, inputs, labels, likelihood = tiny(name)
    model = model.double()
    inputs = reference.float64(inputs)
    fisher = fisher_diagonal(model, [{**inputs, "labels": labels}], likelihood, **F64)
    units = int(LIKELIHOODS[likelihood].units(labels).sum())
    assert fisher.units == units
    reference_inputs = dict(inputs)
    if name == "t5":
        reference_inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    expected = reference.fisher(model, [(reference_inputs, labels)], likelihood, "exact")
    # transformers normalises and takes softmaxes in float32 whatever the weights are.
    assert_close(fisher, {k: v / units for k, v in expected.items()}, 1e-5)
    if name in ("gpt2", "llama"):
        assert "lm_head.weight" not in fisher


def test_processes_that_share_nothing_on_the_cpu_are_refused(monkeypatch):
    name = "consolidate.estimation.fisher_diagonal.get_backend_config"
    monkeypatch.setattr(name, lambda group: "cuda:nccl")
    with pytest.raises(UsageError, match="group has the backend cuda:nccl: expected one for the"):
        fisher_diagonal(nn.Linear(5, 3), [data(4)], "softmax", group=object())


def test_processes_that_would_draw_the_same_labels_are_refused(monkeypatch):
    monkeypatch.setattr("consolidate.estimation.fisher_diagonal.place_in", lambda group: (0, 2))
    with pytest.raises(UsageError, match="draw the same labels: give indices"):
        fisher_diagonal(nn.Linear(5, 3), [data(4)], "softmax", estimator="mc")


def test_outcomes_are_those_of_one_example():
    model, x = nn.Embedding(3, 4), torch.arange(10).view(2, 5) % 3
    y = torch.full((2, 5), -100)
    y[0, :2] = y[1, 3:] = 1  # four positions in all
    classes = 4
    options = {"max_outcomes": 2 * classes}
    together = fisher_diagonal(model, [(x, y)], "token-softmax", **options)
    alone = fisher_diagonal(model, cut(x, y, 1), "token-softmax", **options)
    assert_close(together, dict(alone), 1e-5)
    with pytest.raises(UsageError, match=f"needs {2 * classes} backward passes per example"):
        fisher_diagonal(model, [(x, y)], "token-softmax", max_outcomes=2 * classes - 1)
