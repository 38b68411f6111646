"""Models whose rows are not their examples, though two examples do not show it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from consolidate.estimation.fisher_diagonal import fisher_diagonal
from support.modules import assert_close, is_right_on_one_batch, network


class Moved(nn.Module):
    """A layer that is called twice, and gets the rows of a large batch in another order once."""

    def __init__(self, order: Callable[[int], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.head, self.order = nn.Linear(5, 5), nn.Linear(5, 3), order

    def forward(self, x: Tensor) -> Tensor:
        order = self.order(len(x)) if len(x) > 2 else torch.arange(len(x))
        back = order.argsort()
        return self.head(self.twice(self.twice(x).tanh()[order])[back].tanh())


def neighbours(at: int) -> Callable[[int], Tensor]:
    """Two neighbours change places."""

    def order(n: int) -> Tensor:
        numbers = list(range(n))
        numbers[at], numbers[at + 1] = numbers[at + 1], numbers[at]
        return torch.tensor(numbers)

    return order


ORDERS: dict[str, Callable[[int], Tensor]] = {
    "by one": lambda n: torch.arange(n).roll(1),
    "by three": lambda n: torch.arange(n).roll(3),
    "reversed": lambda n: torch.arange(n).flip(0),
    "at random": lambda n: torch.randperm(n, generator=torch.Generator().manual_seed(3)),
    **{f"neighbours {at}": neighbours(at) for at in (0, 1, 4, 7)},
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [9, 16])
def test_rows_that_change_places_in_a_large_batch_are_found(order: str, size: int) -> None:
    model = Moved(ORDERS[order]).double()
    methods = is_right_on_one_batch(model, torch.randn(size, 5))
    assert methods["twice.weight"] != "rule"
    assert methods["head.weight"] == "rule"


class Centred(nn.Module):
    """Examples of a large batch change one another's outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x - x.mean(0) if len(x) > 2 else x)


def test_examples_that_change_one_another_in_a_large_batch_only() -> None:
    notes: list[str] = []
    x, y = torch.randn(9, 5), torch.arange(9) % 3
    found = fisher_diagonal(Centred(), [(x, y)], "softmax", note=notes.append)
    alone = list(zip(x.split(1), y.split(1), strict=True))
    assert_close(found, fisher_diagonal(Centred(), alone, "softmax"), 1e-5)
    assert notes == [
        "batch 1: by rule, the gradients of head differ from single examples: continuing by loop"
    ]


class Neighbour(nn.Module):
    """One example of a large batch adds to the next one alone."""

    def __init__(self, at: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.at = nn.Linear(5, 5), nn.Linear(5, 3), at

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        if len(x) > self.at + 1:
            x = x.index_add(0, torch.tensor([self.at + 1]), x[self.at : self.at + 1])
        return self.head(x)


@pytest.mark.parametrize("at", [2, 5, 6])
def test_an_example_that_changes_its_neighbour_alone_is_found(at: int) -> None:
    methods = is_right_on_one_batch(Neighbour(at).double(), torch.randn(9, 5))
    assert set(methods.values()) == {"loop"}


class Gated(nn.Module):
    """Experts whose shares of an example are of very unlike sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(5, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(4))
        with torch.no_grad():
            self.gate.weight.mul_(40)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(-1)
        return sum(shares[:, i, None] * one(x) for i, one in enumerate(self.experts))


def test_examples_of_unlike_sizes_go_by_rule() -> None:
    assert set(is_right_on_one_batch(Gated().double(), torch.randn(16, 5)).values()) == {"rule"}


class Overwriting(torch.autograd.Function):
    """A product whose backward pass puts its result into the memory of what was saved."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        a, b = ctx.saved_tensors
        of_a, of_b = gradients[0] * b, gradients[0] * a
        a.data.copy_(of_a)  # unseen by autograd, as by a kernel of one's own
        b.data.copy_(of_b)
        return a, b


class Forgetting(Overwriting):
    """A product whose backward pass drops what it needs."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.factors = a.detach(), b.detach()
        return a * b

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        a, b = ctx.factors
        del ctx.factors
        return gradients[0] * b, gradients[0] * a


class Product(nn.Module):
    """Two layers, multiplied by a function whose graph can be used once."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 3)
        self.function: Any = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function.apply(self.a(x), self.b(x)))


class Doubling(Overwriting):
    """Changes without a trace what a further backward pass takes."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.factors = a.detach().clone(), b.detach().clone()
        return a * b

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.factors
        found = g * b, g * a
        a *= 2
        b *= 2
        return found


class Clearing(Doubling):
    """Leaves zeros."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.factors
        found = g * b, g * a
        a.zero_()
        b.zero_()
        return found


class Twice(Doubling):
    """Raises in the third backward pass."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        ctx.passes = getattr(ctx, "passes", 0) + 1
        if ctx.passes > 2:
            raise ValueError("twice")
        a, b = ctx.factors
        return g * b, g * a


@pytest.mark.parametrize("function", [Overwriting, Forgetting, Doubling, Clearing, Twice])
def test_graphs_that_can_be_used_once(function: type[torch.autograd.Function]) -> None:
    x, y = torch.randn(9, 5), torch.arange(9) % 3
    alone = list(zip(x.split(1), y.split(1), strict=True))
    expected = fisher_diagonal(Product(function), alone, "softmax", estimator="empirical")
    found = fisher_diagonal(Product(function), [(x, y)], "softmax", estimator="empirical")
    assert set(found.methods.values()) == {"rule"}
    assert_close(found, expected, 1e-5)


def test_rows_that_change_places_are_found_though_a_graph_can_be_used_once() -> None:
    class Cleared(Moved):
        def forward(self, x: Tensor) -> Tensor:
            order = self.order(len(x)) if len(x) > 2 else torch.arange(len(x))
            y = self.twice(x)
            y = Clearing.apply(y, torch.ones_like(y))
            return self.head(self.twice(y.tanh()[order])[order.argsort()].tanh())

    x, y = torch.randn(9, 5), torch.arange(9) % 3
    model = Cleared(ORDERS["by one"])
    alone = list(zip(x.split(1), y.split(1), strict=True))
    expected = fisher_diagonal(copy.deepcopy(model), alone, "softmax", estimator="empirical")
    found = fisher_diagonal(model, [(x, y)], "softmax", estimator="empirical")
    assert found.methods["twice.weight"] != "rule"
    assert_close(found, expected, 1e-5)


class AtMostFour(nn.Module):
    """Refuses larger batches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 4:
            raise ValueError("at most four")
        return self.head(x)


def test_a_model_that_takes_few_examples_goes_one_at_a_time() -> None:
    notes: list[str] = []
    x, y = torch.randn(9, 5), torch.arange(9) % 3
    found = fisher_diagonal(AtMostFour(), [(x, y)], "softmax", note=notes.append)
    assert set(found.methods.values()) == {"loop"}
    (note,) = notes
    assert note.startswith("the model refuses 9 examples (InputError: the model")


class Restless(Gated):
    """Calls a layer once more in every second run of a large batch."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += len(x) > 2
        outputs = super().forward(x)
        if len(x) > 2 and self.runs % 2:
            outputs = outputs + 0 * self.experts[0](x)
        return outputs


def test_a_layer_that_is_not_called_as_often_in_each_run() -> None:
    methods = is_right_on_one_batch(Restless().double(), torch.randn(16, 5))
    assert set(methods.values()) == {"loop"}


def test_the_checks_run_the_whole_batch_backward_twice() -> None:
    """As counts of examples: the checks add two backward passes and a few examples."""
    model, forward, backward = network(), list[int](), list[int]()

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        forward.append(len(output))
        output.register_hook(lambda gradient: backward.append(len(gradient)))

    model[1].register_forward_hook(count)
    x, y = torch.randn(24, 5), torch.arange(24) % 3
    fisher_diagonal(model, [(x, y)] * 2, "softmax", estimator="empirical")
    # Two examples, one of them alone, and the two by rules; then batches, the first with a check.
    assert forward == [2, 1, 2, 24, 24]
    assert backward == [2, 1, 2, 24, 24, 24, 24]


class Attending(nn.Module):
    """Attention: the gradient of the bias of its keys is nothing but rounding."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query(x) @ self.key(x).mT).softmax(-1)
        return self.head((weights @ x).mean(1)) * self.scale


@pytest.mark.parametrize("scale", [1.0, 2.0**-20, 2.0**-29])
def test_rounding_that_is_flushed_to_zero_does_not_look_like_another_example(scale: float) -> None:
    notes: list[str] = []
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(16, 12, 8, generator=generator), torch.arange(16) % 3
    torch.set_flush_denormal(True)  # as the commands do
    try:
        fisher_diagonal(Attending(scale), [(x, y)], "softmax", note=notes.append)
    finally:
        torch.set_flush_denormal(False)
    assert notes == []
