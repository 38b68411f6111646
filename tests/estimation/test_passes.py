import copy
import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from consolidate.estimation import layer_hooks, layer_rules
from consolidate.estimation.batches import HookError
from consolidate.estimation.compensated_sums import FOLDED_BATCHES
from consolidate.estimation.example_gradients import Whole
from consolidate.estimation.fisher_diagonal import fisher_diagonal
from consolidate.estimation.passes import PartialPass
from formats.errors import InputError
from formats.fisher_json import ESTIMATORS
from support.modules import OneAtATime, TimeFirst

Batches = list[tuple[Tensor, Tensor]]


class Layer(nn.Module):
    """A module without a rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain.exp()


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), Layer(), nn.LayerNorm(4), nn.Linear(4, 3))


def batches(sizes: list[int], seed: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 5, generator=generator), torch.randint(3, (n,), generator=generator))
        for n in sizes
    ]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-9)


def fail_when(condition: Callable[[Tensor], bool], error: Exception, *, backward: bool) -> Any:
    """Make a hook for a module that fails in its forward or in its backward pass."""

    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if not condition(args[0]):
            return
        if not backward:
            raise error

        def fail(gradient: Tensor) -> None:
            raise error

        if output.requires_grad:
            output.register_hook(fail)

    return hook


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["device", "host"])
@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
def test_without_memory_batches_are_halved_and_nothing_is_lost(estimator, error, backward):
    data = batches([8] * 11 + [5])
    expected = fisher_diagonal(network(), data, "softmax", estimator=estimator)
    model, notes, seen = network(), [], []
    # The first layer's gradient comes last: all others have been added by then.
    hook = fail_when(lambda x: len(x) > 3, error, backward=backward)
    model[1].register_forward_hook(hook)
    found = fisher_diagonal(
        model, data, "softmax", estimator=estimator, note=notes.append, progress=seen.append
    )
    assert_close(found, expected)
    assert (found.examples, found.units) == (93, 93)
    assert found.methods == expected.methods
    assert found.relative_errors == pytest.approx(expected.relative_errors, rel=1e-4)
    assert notes == [
        "out of memory with 8 examples: continuing with 4",
        "out of memory with 4 examples: continuing with 2",
    ]
    assert sum(seen) == 93


@pytest.mark.parametrize("estimator", ["exact", "mc"])
def test_memory_may_run_out_in_the_middle(estimator):
    data = batches([4] * (2 * FOLDED_BATCHES + 3))
    expected = fisher_diagonal(network(), data, "softmax", estimator=estimator)
    model = network()
    calls = itertools.count()
    hook = fail_when(lambda x: next(calls) == 20, OUT_OF_MEMORY[0], backward=True)
    model[0].register_forward_hook(hook)
    found = fisher_diagonal(model, data, "softmax", estimator=estimator)
    assert next(calls) > 20
    assert_close(found, expected)
    assert found.examples == expected.examples


def test_without_memory_for_one_example_nothing_helps():
    model = network()
    model[0].register_forward_hook(fail_when(lambda x: True, OUT_OF_MEMORY[0], backward=False))
    with pytest.raises(InputError, match="batch 1: out of memory with a single"):
        fisher_diagonal(model, batches([3, 3]), "softmax")


def test_a_batch_that_is_squared_whole_is_squared_in_its_halves():
    model = network()
    model[0].register_forward_hook(
        fail_when(lambda x: len(x) > 2, OUT_OF_MEMORY[0], backward=False)
    )
    found = fisher_diagonal(model, batches([4, 4]), "softmax", estimator="batched")
    (a, b), (c, d) = batches([4, 4])
    halves = [(a[:2], b[:2]), (a[2:], b[2:]), (c[:2], d[:2]), (c[2:], d[2:])]
    assert_close(found, fisher_diagonal(network(), halves, "softmax", estimator="batched"))
    assert found.examples == 8


def test_another_error_is_told():
    model = network()
    model[0].register_forward_hook(
        fail_when(lambda x: len(x) > 2, RuntimeError("a fault"), backward=False)
    )
    with pytest.raises(InputError, match=r"accept float32 \[4, 5\]: RuntimeError: a fault"):
        fisher_diagonal(model, batches([2, 4]), "softmax")


class Moody(nn.Module):
    """Can be run for several examples by vmap, but not always."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        if torch._C._functorch.is_batchedtensor(x) and Moody.refuses:
            raise ValueError("not now")
        return torch.lerp(torch.zeros_like(x), x, self.gain)  # It has no rule.

    refuses = False


def test_a_module_that_fails_later_goes_the_slower_way(monkeypatch):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), Moody(), nn.Linear(4, 3))
    data = batches([4] * 5)
    expected = fisher_diagonal(copy.deepcopy(model), data, "softmax")
    assert expected.methods["1.gain"] == "module"

    def read():
        yield from data[:3]
        monkeypatch.setattr(Moody, "refuses", True)
        yield from data[3:]

    notes: list[str] = []
    found = fisher_diagonal(model, read(), "softmax", note=notes.append)
    assert_close(found, expected)
    assert found.examples == 20
    (note,) = notes
    assert note == (
        "batch 4: by module, the gradients of 1 cannot be computed (ValueError: not now): "
        "continuing by module, one example at a time"
    )


def test_a_module_that_disagrees_is_named():
    torch.manual_seed(1)
    notes: list[str] = []
    data = (torch.randn(6, 6, 2), torch.randint(3, (6,)))
    found = fisher_diagonal(TimeFirst(), [data], "softmax", note=notes.append)
    assert found.methods["inner.weight"] != "rule"
    assert found.methods["head.weight"] == "rule"
    assert len(notes) == 1
    assert notes[0].startswith("by rule, the gradients of inner differ from single examples")
    assert notes[0].endswith(f"continuing by {found.methods['inner.weight']}")


class Asking(nn.Module):
    """Cannot be run again with tensors in the place of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(5) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.weight, nn.Parameter):
            raise TypeError("the weight must be a Parameter")
        return x @ self.weight


def test_a_module_that_raises_when_it_is_run_again_is_named_with_the_exception():
    torch.manual_seed(1)
    notes: list[str] = []
    model, data = nn.Sequential(Asking(), nn.Linear(5, 3)), batches([6])
    found = fisher_diagonal(model, data, "softmax", note=notes.append)
    assert found.methods["0.weight"] == "loop"
    (note,) = notes
    assert note == (
        "by module, the gradients of 0 cannot be computed (TypeError: the weight must be a "
        "Parameter): continuing by loop"
    )


@pytest.mark.parametrize("check", [False, True])
def test_a_model_that_takes_one_example_only_is_told_once(check):
    notes: list[str] = []
    fisher_diagonal(OneAtATime(), batches([4] * 3), "softmax", note=notes.append, check=check)
    assert len(notes) == 1
    assert notes[0].startswith(
        "the model accepts only one example at a time (InputError: the model"
    )
    assert "shape '[1, 5]' is invalid" in notes[0]


class WeightStandardised(nn.Conv2d):
    """A convolution of one's own."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


def test_a_large_module_goes_in_chunks(monkeypatch):
    # 221,184 weights: 18 examples at a time.
    torch.manual_seed(1)
    model = nn.Sequential(
        WeightStandardised(96, 256, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(256, 3),
    )  # fmt: skip
    x, y = torch.randn(25, 96, 4, 4), torch.arange(25) % 3
    alone = list(zip(x.double().split(1), y.split(1), strict=True))
    expected = fisher_diagonal(
        copy.deepcopy(model).double(), alone, "softmax", accumulate_dtype=torch.float64
    )
    notes: list[str] = []
    found = fisher_diagonal(model, [(x, y)], "softmax", note=notes.append)
    assert notes == []
    assert found.methods == {
        "0.weight": "module", "0.bias": "module", "4.weight": "rule", "4.bias": "rule"
    }  # fmt: skip
    for name, value in expected.items():
        scale = value.max().item()
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("chunk", [1, 2, 4, 5])
def test_the_spread_is_that_of_all_chunks(monkeypatch, chunk):
    data = batches([8, 8, 5])
    expected = fisher_diagonal(network(), data, "softmax")
    assert expected.methods["2.gain"] == "rule"  # Taken back from its uses in chunks.
    monkeypatch.setattr(layer_hooks, "VMAP_ELEMENTS", 4 * chunk)
    found = fisher_diagonal(network(), data, "softmax")
    assert found.methods == expected.methods
    assert found.relative_errors == pytest.approx(expected.relative_errors, rel=1e-5)
    assert_close(found, expected)


# Errors of our own code are nobody else's.


@pytest.mark.parametrize("error", [IndexError("ours"), TypeError("ours")])
def test_an_error_in_a_rule_surfaces(monkeypatch, error):
    def broken(module: nn.Module, a: Tensor, g: Tensor) -> Any:
        raise error

    monkeypatch.setitem(layer_rules.RULES, "torch.nn.modules.linear.Linear", broken)
    with pytest.raises(type(error), match="ours"):
        fisher_diagonal(network(), batches([4]), "softmax")


@pytest.mark.parametrize("where", ["add_to", "add_squares"])
def test_an_error_in_what_takes_the_gradients_surfaces(monkeypatch, where):
    def broken(*_: object) -> Any:
        raise IndexError("ours")

    monkeypatch.setattr(Whole, where, broken)
    with pytest.raises(IndexError, match="ours"):
        fisher_diagonal(network(), batches([4]), "softmax")


def test_an_error_in_a_mark_is_not_the_models(monkeypatch):
    def broken(*_: object) -> Any:
        raise IndexError("ours")

    monkeypatch.setattr(layer_hooks.Recording, "mark", broken)
    with pytest.raises(HookError, match="IndexError: ours"):
        fisher_diagonal(network(), batches([4]), "softmax")


def test_a_rule_that_does_not_fit_the_module_is_named(monkeypatch):
    def misfit(module: nn.Module, a: Tensor, g: Tensor) -> Any:
        return {"weight": Whole(g * module.no_such_scale)}

    monkeypatch.setitem(layer_rules.RULES, "torch.nn.modules.linear.Linear", misfit)
    notes: list[str] = []
    found = fisher_diagonal(network(), batches([4]), "softmax", note=notes.append)
    assert found.methods["0.weight"] == "module"
    (note,) = notes
    assert note == (
        "by rule, the gradients of 4, 0 cannot be computed (AttributeError: 'Linear' object has no "
        "attribute 'no_such_scale'): continuing by module"
    )


# Going on.


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("check", [False, True])
def test_a_pass_that_goes_on_ends_with_the_same_bits(estimator, check):
    sizes = [4] * (2 * FOLDED_BATCHES) + [1, 7, 3]
    options = {"estimator": estimator, "check": check}
    kept: list[PartialPass] = []

    def keep(partial: PartialPass) -> None:
        tensors = {name: values.clone() for name, values in partial.tensors.items()}
        kept.append(partial._replace(tensors=tensors))

    straight = fisher_diagonal(network(), batches(sizes), "softmax", keep=keep, **options)
    assert [partial.examples for partial in kept] == [4 * FOLDED_BATCHES, 8 * FOLDED_BATCHES]
    for partial in kept:
        seen: list[int] = []
        found = fisher_diagonal(
            network(), batches(sizes), "softmax", start=partial, progress=seen.append, **options
        )
        assert all(torch.equal(found[name], straight[name]) for name in straight)
        assert vars(found) == vars(straight)
        assert sum(seen) == straight.examples - partial.examples


def test_a_pass_goes_on_in_the_middle_of_a_batch():
    """Where the memory did not suffice for a whole one."""
    data = batches([8] * 9)
    kept: list[PartialPass] = []

    def keep(partial: PartialPass) -> None:
        tensors = {name: values.clone() for name, values in partial.tensors.items()}
        kept.append(partial._replace(tensors=tensors))

    def model() -> nn.Module:
        limited = network()
        limited[0].register_forward_hook(
            fail_when(lambda x: len(x) > 5, OUT_OF_MEMORY[0], backward=False)
        )
        return limited

    straight = fisher_diagonal(model(), data, "softmax", keep=keep)
    assert kept[0].most == 4
    assert kept[0].examples == 4 * FOLDED_BATCHES
    for partial in kept:
        found = fisher_diagonal(model(), data, "softmax", start=partial)
        assert all(torch.equal(found[name], straight[name]) for name in straight)
        assert found.examples == 72


REAL = """
import resource, torch
from torch import nn
from consolidate.estimation.fisher_diagonal import fisher_diagonal

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 3000), nn.Tanh(), nn.Linear(3000, 2))
x, y = torch.randn(6000, 4), torch.randint(2, (6000,))
sizes = [500] * 2 + [5000]
expected = fisher_diagonal(model, zip(x.split(500), y.split(500)), "softmax", estimator="mc")
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 120 * 2**20,) * 2)
notes = []
found = fisher_diagonal(
    model, zip(x.split(sizes), y.split(sizes)), "softmax", estimator="mc", note=notes.append
)
assert found.examples == 6000 and notes, notes
for name in expected:
    torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-9)
print(notes[0])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_memory_that_really_runs_out():
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("out of memory with 5000 examples: continuing with 2500")
