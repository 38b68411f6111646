import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from consolidate.estimation import input_blocks
from consolidate.estimation.compensated_sums import FOLDED_BATCHES, Accumulators
from consolidate.estimation.covered_layers import covered_layers
from consolidate.estimation.estimates import FisherDiagonal
from consolidate.estimation.fisher_diagonal import fisher_diagonal
from consolidate.estimation.input_blocks import BlockSums, InputBlock
from consolidate.estimation.passes import PartialPass
from formats.errors import NonFiniteError, UsageError
from formats.fisher_json import Block
from support.input_matrices import input_matrices
from support.modules import Experts, OneAtATime, Tagger, TimeFirst, tiny
from support.reference import float64

Batches = list[tuple[Any, Tensor]]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def unequal(x: Tensor, sizes: tuple[int, ...] = (4, 1, 6), classes: int = 3) -> Batches:
    """Cut examples into batches of unequal sizes, with labels."""
    labels = torch.arange(len(x)) * 7 % classes
    return list(zip(x.split(sizes), labels.split(sizes), strict=True))


def measured(
    model: nn.Module, batches: Batches, likelihood: str = "softmax", **options: Any
) -> FisherDiagonal:
    double = [(float64(x), y) for x, y in batches]
    options = {"accumulate_dtype": torch.float64, "structure": "inputs", **options}
    return fisher_diagonal(copy.deepcopy(model).double(), double, likelihood, **options)


def alone(batches: Batches) -> Batches:
    return [
        ({k: v[i : i + 1] for k, v in x.items()} if isinstance(x, dict) else x[i : i + 1], y)
        for x, labels in batches
        for i, y in enumerate(labels.split(1))
    ]


def assert_blocks_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value.double()).abs().max()
        assert error <= rtol * value.double().abs().max() + 1e-24, (name, error.item())


def agrees(model: nn.Module, batches: Batches, likelihood: str = "softmax") -> FisherDiagonal:
    """Hold the blocks of every estimator against Jᵀ J of single examples, and the traces."""
    for kind in ("empirical", "exact", "mc"):
        found = measured(model, batches, likelihood, estimator=kind, mc_samples=2)
        assert found.factors.keys() == found.blocks.keys()
        if kind == "mc":
            one_by_one = measured(model, alone(batches), likelihood, estimator=kind, mc_samples=2)
            assert set(one_by_one.methods.values()) == {"loop"}
            expected = one_by_one.factors
        else:
            total = input_matrices(model, batches, likelihood, kind, found.blocks)
            expected = {name: value / found.units for name, value in total.items()}
        assert_blocks_close(found.factors, expected, 1e-10)
        for name, matrix in found.factors.items():
            assert torch.equal(matrix, matrix.T)
            assert matrix.diagonal().min() >= 0
            trace = sum(found[parameter].sum() for parameter in found.blocks[name].parameters)
            torch.testing.assert_close(matrix.trace(), trace, rtol=1e-12, atol=1e-18)
    return found


class Positions(nn.Module):
    """A body over positions, then their mean, then a head."""

    def __init__(self, body: nn.Module, width: int = 5):
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh().flatten(1, -2).mean(1))


class Images(nn.Module):
    """A body over images, then the mean over places, then a head."""

    def __init__(self, body: nn.Module, width: int):
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh().flatten(2).mean(2))


# Against single examples.


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_without_positions(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7, bias=bias), nn.Tanh(), nn.Linear(7, 3, bias=bias))
    found = agrees(model, unequal(numbers(11, 5)))
    of_layer = ("0.weight", "0.bias") if bias else ("0.weight",)
    assert found.blocks["0.weight.R"] == Block("R", (1,), of_layer)
    assert found.factors["0.weight.R"].shape == ((6, 6) if bias else (5, 5))


@pytest.mark.parametrize("shape", [(2,), (6,), (19,), (3, 4)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_with_few_and_with_many_positions(shape: tuple[int, ...], bias: bool) -> None:
    """By products of positions, and with the gradients of each example where these are more."""
    model = Positions(nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, 5)))
    agrees(model, unequal(numbers(11, *shape, 4)))


def test_a_transposed_layer_ranges_over_the_first_dimension_of_its_weight() -> None:
    model = Positions(nn.Sequential(Conv1D(7, 4), nn.Tanh(), Conv1D(5, 7)))
    found = agrees(model, unequal(numbers(11, 6, 4)))
    assert found.blocks["body.0.weight.R"] == Block("R", (0,), ("body.0.weight", "body.0.bias"))
    assert found.factors["body.0.weight.R"].shape == (5, 5)


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    "plain": (nn.Conv2d(2, 6, 3), (2, 5, 6), 6),
    "few places": (nn.Conv2d(2, 6, 3), (2, 4, 4), 6),
    "many places": (nn.Conv2d(1, 3, 3, padding=1), (1, 9, 8), 3),
    "padded": (nn.Conv2d(2, 6, 3, padding=1, padding_mode="reflect"), (2, 3, 3), 6),
    "same": (nn.Conv2d(2, 6, (1, 3), padding="same"), (2, 3, 3), 6),
    "strides": (nn.Conv2d(2, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 6, 5), 6),
    "dilated": (nn.Conv2d(2, 6, 2, dilation=(2, 3), stride=2), (2, 7, 8), 6),
    "no bias": (nn.Conv2d(2, 6, 3, bias=False), (2, 5, 5), 6),
    "1-d": (nn.Conv1d(3, 6, 3, stride=2, padding=1, dilation=2), (3, 13), 6),
    "1-d, few places": (nn.Conv1d(3, 6, 3), (3, 5), 6),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    layer, shape, width = CONVOLUTIONS[name]
    found = agrees(Images(layer, width), unequal(numbers(11, *shape)))
    dims = tuple(range(1, layer.weight.ndim))
    assert found.blocks["body.weight.R"].dims == dims


def test_a_convolution_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, shape, width = CONVOLUTIONS["plain"]
    for elements in (1, 500):
        monkeypatch.setattr(input_blocks, "CHUNK_ELEMENTS", elements)
        agrees(Images(layer, width), unequal(numbers(11, *shape)))


def test_a_matrix_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the upper triangle is computed, and products are added in place."""
    monkeypatch.setattr(input_blocks, "LEAF", 64)
    monkeypatch.setattr(input_blocks, "THIN", 8)
    for bias in (True, False):
        for positions in (1, 3, 90):
            torch.manual_seed(0)
            model = Positions(nn.Linear(150, 80, bias=bias), 80)
            batches = unequal(numbers(6, positions, 150), (4, 2))
            found, expected = measured(model, batches), measured(model, alone(batches))
            assert_blocks_close(found.factors, expected.factors, 1e-12)
            total = input_matrices(model, batches, "softmax", "exact", found.blocks)
            assert_blocks_close(
                found.factors, {name: value / 6 for name, value in total.items()}, 1e-12
            )


class Padded(nn.Module):
    """Sequences whose last positions are padding: the mean is over the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        weights = keep.to(x.dtype)
        return self.head((self.body(x) * weights[..., None]).sum(1) / weights.sum(1)[:, None])


def test_padding_adds_nothing() -> None:
    lengths = torch.tensor([3, 1, 7, 5, 2, 6])
    x, keep = numbers(6, 7, 4), torch.arange(7) < lengths[:, None]
    labels = torch.arange(6) % 3
    padded = [
        ({"x": x[some], "keep": keep[some]}, labels[some]) for some in (slice(4), slice(4, 6))
    ]
    found = agrees(Padded(), padded)
    cut = [
        ({"x": x[i : i + 1, :n], "keep": keep[i : i + 1, :n]}, labels[i : i + 1])
        for i, n in enumerate(lengths.tolist())
    ]
    for kind in ("exact", "mc", "empirical"):
        options = {"estimator": kind, "mc_samples": 2}
        found, expected = (measured(Padded(), some, **options) for some in (padded, cut))
        assert_blocks_close(found.factors, expected.factors, 1e-12)


def test_a_predicted_token_is_a_unit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    ids = torch.randint(5, (5, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, 2, -100], [2, -100, -100, -100], [1, 1, 0, 2], [0] * 4, [1] * 4])
    batches = [(ids[:3], labels[:3]), (ids[3:], labels[3:])]
    assert agrees(model, batches, "token-softmax").units == 16


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_transformers(name: str) -> None:
    model, inputs, labels, likelihood = tiny(name)
    if likelihood == "softmax":
        agrees(model, [(inputs, labels)], likelihood)
        return
    batches = [(inputs, labels)]
    for kind in ("mc", "exact"):
        found = measured(model, batches, likelihood, estimator=kind)
        expected = measured(model, alone(batches), likelihood, estimator=kind)
        assert found.factors
        assert_blocks_close(found.factors, expected.factors, 1e-9)


# Which layers.


class Kinds(nn.Module):
    """One of each kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 6)
        self.tied = nn.Linear(6, 5, bias=False)
        self.tied.weight = self.table.weight
        self.norm = nn.LayerNorm(6)
        self.covered = nn.Linear(6, 6)
        self.four = nn.Linear(8, 2)
        self.wide = nn.Linear(9, 2)
        self.frozen = nn.Linear(6, 6)
        self.frozen.weight.requires_grad_(False)
        self.fixed_bias = nn.Linear(6, 6)
        self.fixed_bias.bias.requires_grad_(False)
        self.tied_bias = nn.Linear(6, 6)
        self.tied_bias.bias = self.covered.bias
        self.transposed = Conv1D(6, 5)
        self.grouped = nn.Conv2d(4, 8, 2, groups=2)
        self.image = nn.Conv2d(2, 8, (1, 2))
        self.back = nn.ConvTranspose2d(2, 8, 2)
        self.scale = nn.Parameter(torch.ones(3, 3))


def test_the_structure_of_the_model_decides_which_layers_are_covered() -> None:
    model = Kinds()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert covered_layers(model, parameters) == {
        "covered.weight.R": InputBlock(("covered.weight",), (1,)),
        "four.weight.R": InputBlock(("four.weight", "four.bias"), (1,)),
        "fixed_bias.weight.R": InputBlock(("fixed_bias.weight",), (1,)),
        "tied_bias.weight.R": InputBlock(("tied_bias.weight",), (1,)),
        "transposed.weight.R": InputBlock(("transposed.weight", "transposed.bias"), (0,)),
        "image.weight.R": InputBlock(("image.weight", "image.bias"), (1, 2, 3)),
    }


@pytest.mark.parametrize("frozen", ["0.bias", "0.weight", "2.bias"])
def test_what_is_frozen_has_no_part(frozen: str) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model.get_parameter(frozen).requires_grad_(False)
    found = agrees(model, unequal(numbers(11, 5)))
    assert frozen not in [name for block in found.blocks.values() for name in block.parameters]
    assert ("0.weight.R" in found.blocks) == (frozen != "0.weight")


def test_a_layer_that_nothing_reached_has_a_block_of_zeros() -> None:
    model = Positions(nn.Linear(4, 5))
    model.unused = nn.Linear(3, 3)
    found = measured(model, unequal(numbers(11, 2, 4)))
    assert found.unreached == ["unused.weight", "unused.bias"]
    assert torch.equal(found.factors["unused.weight.R"], torch.zeros(4, 4).double())


# By every method.


class Twice(nn.Module):
    """A layer that is called twice: the gradient is the sum over its calls."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.layer(x).tanh())
        return self.head(x if x.ndim == 2 else x.tanh().flatten(2).mean(2))


TWICE: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(4, 4), (4,)),
    "transposed": (Conv1D(4, 4), (4,)),
    "convolution": (nn.Conv2d(4, 4, 3, padding=1), (4, 5, 3)),
    "few places": (nn.Conv2d(4, 4, 3, padding=1), (4, 2, 2)),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_layer_that_is_called_twice(name: str) -> None:
    layer, shape = TWICE[name]
    found = agrees(Twice(layer), unequal(numbers(11, *shape)))
    assert found.methods["layer.weight"] == "rule"


class Uses(nn.Module):
    """A layer whose parameters are used by functions, and not at the same time."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        match self.how:
            case "linear":
                x = functional.linear(x, weight, bias)
            case "no bias":
                x = functional.linear(x, weight)
            case "apart":
                x = x @ weight.T + bias
            case "twice, apart":
                x = (x @ weight.T).tanh() @ weight.T + bias
            case "bias once more":
                x = functional.linear(x, weight, bias).tanh() + bias
            case "a call and a function":
                x = functional.linear(self.layer(x).tanh(), weight, bias)
            case "a call and a product":
                x = self.layer(x).tanh() @ weight.T
            case "rows":
                x = x + functional.embedding((x[..., 0] > 0).long(), weight) + self.layer(x)
        return self.head(x.tanh().mean(1))


USES = ("linear", "no bias", "apart", "twice, apart", "bias once more", "a call and a function")
USES += ("a call and a product", "rows")


@pytest.mark.parametrize("how", USES)
def test_parameters_where_functions_use_them(how: str) -> None:
    agrees(Uses(how), unequal(numbers(11, 3, 4)))


def test_a_layer_whose_rule_fails_on_the_first_batch_goes_the_slower_way() -> None:
    found = agrees(TimeFirst(), unequal(numbers(11, 6, 2), (6, 1, 4)))
    assert found.methods["inner.weight"] == found.methods["inner.bias"] != "rule"


class Wrapped(nn.Module):
    """A layer run on a transposed copy, inside a module that has rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.outer = TimeFirst()
        self.outer.head = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.outer(x).tanh())


@pytest.mark.parametrize("elements", [1 << 22, 20])
def test_by_module_in_chunks(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr("consolidate.estimation.layer_hooks.VMAP_ELEMENTS", elements)
    found = agrees(Wrapped(), unequal(numbers(10, 6, 2), (5, 1, 4)))
    assert found.methods["outer.inner.weight"] == "module"


class Sometimes(nn.Module):
    """The layer has a row per example, except where a number of the batch is large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 5)
        self.other = nn.Linear(5, 5)
        self.late = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        large = x.abs().max() > 50
        if large:
            h = torch.cat(
                [self.layer(x[:, :1]), self.layer(x[:, 1:].reshape(-1, 4)).view(len(x), -1, 5)], 1
            )
            h = h + self.late(h).tanh()
        else:
            h = self.layer(x)
        return self.head(self.other(h.tanh()).mean(1))


def test_a_later_batch_of_another_form_and_a_layer_that_only_it_uses() -> None:
    x = numbers(13, 3, 4)
    x[6:9, 0, 0] = 100
    found = agrees(Sometimes(), unequal(x, (4, 2, 3, 4)))
    assert found.methods["layer.weight"] == "rule"
    assert found.factors["late.weight.R"].trace() > 0


def test_rows_that_are_routed() -> None:
    agrees(Experts().double(), unequal(numbers(13, 5), (4, 5, 4)))


def test_a_model_that_takes_one_example_only() -> None:
    assert set(agrees(OneAtATime(), unequal(numbers(11, 5))).methods.values()) == {"loop"}


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
def test_a_rule_that_fails_half_way_is_undone(
    monkeypatch: pytest.MonkeyPatch, estimator: str
) -> None:
    batches = unequal(numbers(40, 5), (8, 7, 9, 6, 10))
    expected = measured(network(), batches, estimator=estimator)
    calls, plain = itertools.count(), BlockSums._add_positions

    def failing(self: BlockSums, weight: str, *args: Any) -> None:
        if weight == "2.weight" and next(calls) == 5:
            raise RuntimeError("not now")
        plain(self, weight, *args)

    monkeypatch.setattr(BlockSums, "_add_positions", failing)
    notes: list[str] = []
    found = measured(network(), batches, estimator=estimator, note=notes.append)
    assert next(calls) > 5
    (note,) = notes
    assert "by rule, the gradients of 2 cannot be computed (RuntimeError: not now)" in note
    assert_blocks_close(found.factors, expected.factors, 1e-12)


def test_without_memory_nothing_is_lost_or_added_twice() -> None:
    batches = unequal(numbers(8 * 20, 5), (8,) * 20)
    expected = measured(network(), batches)
    model = network()

    def fail(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        def raise_(gradient: Tensor) -> None:
            if len(gradient) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        if output.requires_grad:
            output.register_hook(raise_)

    model[0].register_forward_hook(fail)
    found = measured(model, batches)
    assert_blocks_close(found.factors, expected.factors, 1e-12)


# The check of the first batch.


def test_a_wrong_block_is_found_on_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added by rule is wrong; only the gradients of single examples are right."""
    batches = unequal(numbers(11, 19, 4))
    model = Positions(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)))
    expected = measured(model, batches)
    plain = BlockSums._add_positions

    def broken(self: BlockSums, weight: str, g: Tensor, *args: Any) -> None:
        plain(self, weight, g.flip(2).cumsum(2) if weight == "body.2.weight" else g, *args)

    monkeypatch.setattr(BlockSums, "_add_positions", broken)
    notes: list[str] = []
    found = measured(model, batches, note=notes.append)
    assert notes == [
        "by rule, the gradients of body.2 differ from single examples: continuing by module"
    ]
    assert_blocks_close(found.factors, expected.factors, 1e-12)


@pytest.mark.parametrize("check", [False, True])
def test_the_check_finds_nothing_wrong_in_what_is_right(check: bool) -> None:
    notes: list[str] = []
    model = Positions(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))).float()
    batches = [(x.float(), y) for x, y in unequal(numbers(11, 19, 4))]
    found = fisher_diagonal(
        model, batches, "softmax", structure="inputs", check=check, note=notes.append
    )
    assert set(found.methods.values()) == {"rule"}
    assert notes == []


# Sums.


@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
def test_the_cut_into_batches_does_not_matter(estimator: str) -> None:
    x = numbers(24, 9, 4)
    model = Positions(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)))
    whole = measured(model, unequal(x, (24,)), estimator=estimator)
    for size in (1, 5, 8):
        sizes = tuple(min(size, 24 - start) for start in range(0, 24, size))
        found = measured(model, unequal(x, sizes), estimator=estimator)
        assert_blocks_close(found.factors, whole.factors, 1e-12)


def test_sums_in_float32_are_those_in_float64_up_to_rounding() -> None:
    x = numbers(400, 6, 4)
    model = Positions(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)))
    exact = measured(model, unequal(x, (20,) * 20))
    single = [(x.float(), y) for x, y in unequal(x, (20,) * 20)]
    found = fisher_diagonal(copy.deepcopy(model).float(), single, "softmax", structure="inputs")
    assert all(matrix.dtype == torch.float32 for matrix in found.factors.values())
    assert all(torch.equal(matrix, matrix.T) for matrix in found.factors.values())
    assert_blocks_close(found.factors, exact.factors, 2e-6)


def test_the_diagonal_is_the_one_without_blocks() -> None:
    batches = unequal(numbers(11, 6, 4))
    model = Positions(nn.Linear(4, 5))
    plain = measured(model, batches, structure="diagonal")
    found = measured(model, batches)
    assert plain.factors == plain.blocks == {}
    assert list(found) == list(plain)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert found.relative_errors == plain.relative_errors


@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("check", [False, True])
def test_a_resumed_pass_ends_with_the_same_bytes(estimator: str, check: bool) -> None:
    sizes = (4,) * (2 * FOLDED_BATCHES) + (1, 7, 3)
    batches = unequal(numbers(sum(sizes), 3, 4), sizes)
    options: dict[str, Any] = {"estimator": estimator, "check": check}
    options["accumulate_dtype"] = torch.float32
    model = Positions(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)))
    kept: list[PartialPass] = []

    def keep(partial: PartialPass) -> None:
        tensors = {name: values.clone() for name, values in partial.tensors.items()}
        kept.append(partial._replace(tensors=tensors))

    straight = measured(model, batches, keep=keep, **options)
    assert len(kept) == 2
    for partial in kept:
        found = measured(model, batches, start=partial, **options)
        assert found.factors.keys() == straight.factors.keys()
        assert all(torch.equal(found.factors[k], straight.factors[k]) for k in straight.factors)
        assert found.blocks == straight.blocks


def test_a_block_that_is_not_finite_is_named() -> None:
    layer = nn.Linear(2, 2)
    parameters = {f"layer.{name}": p for name, p in layer.named_parameters()}
    sums = Accumulators(
        parameters, torch.float32, {"layer.weight.R": InputBlock(("layer.weight",), (1,))}
    )
    sums.blocks["layer.weight.R"][1] = torch.inf
    sums.end_batch({}, torch.ones(1), 1, "batch 1")
    with pytest.raises(NonFiniteError, match=r"'layer\.weight' is not finite in one of the"):
        sums.means(1)


# What is refused, and what is reported.


def test_an_unknown_structure_is_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown structure 'kronecker': expected one of \(diag"):
        measured(network(), unequal(numbers(11, 5)), structure="kronecker")


def test_batched_has_no_single_examples() -> None:
    with pytest.raises(UsageError, match="inputs cannot be combined with the estimator batched"):
        measured(network(), unequal(numbers(11, 5)), estimator="batched")


def test_where_no_layer_is_covered_that_is_reported() -> None:
    notes: list[str] = []
    model, batches = nn.Sequential(nn.Linear(13, 3)), unequal(numbers(11, 13))
    found = measured(model, batches, note=notes.append)
    assert found.factors == found.blocks == {}
    (note,) = notes
    assert note.startswith("structure inputs: no layer is covered, so only the diagonal is")
    assert measured(model, batches).factors == {}


def test_a_tied_head_keeps_the_diagonal() -> None:
    ids = torch.tensor([[1, 2, 0], [2, 1, 2]])
    keep = ids != 0
    found = measured(Tagger(), [({"ids": ids, "keep": keep}, ids)], "token-softmax", estimator="mc")
    assert "embedding.weight.R" not in found.factors
    assert "block.linear1.weight.R" in found.factors
