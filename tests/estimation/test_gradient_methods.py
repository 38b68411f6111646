"""Wrong rules, sums and models, each of which the checks of the first batch must find."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from consolidate.estimation import example_gradients, layer_hooks, layer_rules
from consolidate.estimation.example_gradients import Convolved, Outer, Rows, Whole
from consolidate.estimation.fisher_diagonal import fisher_diagonal
from support.modules import assert_close

F64 = {"accumulate_dtype": torch.float64}
Patch = pytest.MonkeyPatch


class Mean(nn.Module):
    """A body over positions, the mean over them, and a head."""

    def __init__(self, *body: nn.Module, width: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(2).mean(2) if x.ndim > 3 else self.body(x).mean(1))


def points() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def lines() -> nn.Module:
    return Mean(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 5))


def large_lines() -> nn.Module:
    return Mean(nn.Linear(5, 600), nn.Tanh(), nn.Linear(600, 600), nn.Tanh(), nn.Linear(600, 5))


def words() -> nn.Module:
    return Mean(nn.Embedding(9, 5, padding_idx=0), nn.RMSNorm(5), nn.Tanh(), nn.Linear(5, 5))


def planes() -> nn.Module:
    return Mean(
        nn.Conv2d(2, 4, 3, stride=2, padding=2, dilation=2), nn.BatchNorm2d(4), nn.Tanh(),
        nn.Conv2d(4, 4, 3, groups=2, padding=1, padding_mode="reflect"), nn.GroupNorm(2, 4),
        nn.Tanh(), nn.Conv2d(4, 5, 2),
    )  # fmt: skip


class Twice(nn.Module):
    """A layer that is called two times."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.twice(self.twice(x).tanh()).tanh().mean(1))


class Scaled(nn.Module):
    """A scale and a shift that functions use."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(5)), nn.Parameter(torch.zeros(6, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x * self.scale + self.shift).tanh().mean(1))


# Sizes of batches: several chunks of 16 with a rest, and one.
INPUTS: dict[Callable[[], nn.Module], Callable[[int], Tensor]] = {
    points: lambda n: torch.randn(n, 5),
    lines: lambda n: torch.randn(n, 6, 5),
    large_lines: lambda n: torch.randn(n, 6, 5),
    words: lambda n: (
        torch.randint(9, (n, 6)) * (torch.arange(6) < torch.arange(n)[:, None] % 6 + 2)
    ),
    planes: lambda n: torch.randn(n, 2, 12, 11),
    Twice: lambda n: torch.randn(n, 6, 5),
    Scaled: lambda n: torch.randn(n, 6, 5),
}


def instead(kind: Any, name: str, make: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """Put a changed function or method in the place of one."""
    return lambda patch: patch.setattr(kind, name, make(getattr(kind, name)))


def wrong_rule(name: str, change: Callable[..., Any]) -> Callable[[Patch], None]:
    """Change what a rule returns, or what it is given."""

    def patched(patch: Patch) -> None:
        rule = layer_rules.RULES[name]
        patch.setitem(layer_rules.RULES, name, lambda module, a, g: change(rule, module, a, g))

    return patched


# Rules by the names of their layers.
LINEAR = "torch.nn.modules.linear.Linear"
CONV = "torch.nn.modules.conv.Conv[12]d"
EMBEDDING = "torch.nn.modules.sparse.Embedding"


class Changed:
    """A module with some attributes of other values."""

    def __init__(self, module: nn.Module, **values: Any) -> None:
        self.__dict__ |= {"module": module, **values}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def altered(**values: Any) -> Callable[..., Any]:
    return lambda rule, module, a, g: rule(Changed(module, **values), a, g)


def only(name: str, factor: float) -> Callable[..., Any]:
    """Scale the gradients of one of a layer's parameters."""

    def change(rule: Any, module: Any, a: Tensor, g: Tensor) -> Any:
        return rule(module, a, g) | {name: rule(module, a, g * factor)[name]}

    return change


def first_position(rule: Any, module: Any, a: Tensor, g: Tensor) -> Any:
    return rule(module, a, g) | {"bias": Whole(g.reshape(len(g), -1, g.shape[-1])[:, 0])}


def shifted_positions(rule: Any, module: Any, a: Tensor, g: Tensor) -> Any:
    return rule(module, a.roll(1, 1), g)


def neighbour(rule: Any, module: Any, a: Tensor, g: Tensor) -> Any:
    return rule(module, a.roll(1, 0), g)


def of_some(keep: slice) -> Callable[[Any], Any]:
    """Squares of some examples only."""

    def make(add: Any) -> Any:
        def add_squares(self: Any, total: Tensor, first: int = 0) -> Tensor:
            fields = {k: v[keep] if isinstance(v, Tensor) else v for k, v in self._asdict().items()}
            add(type(self)(**fields), total, first)
            return total.new_ones(len(next(iter(self))))

        return add_squares

    return make


without_first, without_last = of_some(slice(1, None)), of_some(slice(-1))


def each_position(_: Any) -> Any:
    """Squares of positions in the place of squares of their sum."""

    def add_squares(self: Outer, total: Tensor, first: int = 0) -> Tensor:
        left, right = self._factors()
        squares = torch.einsum("btm,btn->bmn", left.square(), right.square())
        total.flatten(1).add_(squares.sum(0))
        return squares.sum((1, 2))

    return add_squares


def squared_sum(_: Any) -> Any:
    """The square of the batch's gradient."""

    def add_squares(self: Whole, total: Tensor, first: int = 0) -> Tensor:
        total += self.gradients.sum(0).square()
        return self.gradients.square().reshape(len(self.gradients), -1).sum(1)

    return add_squares


def each_use(_: Any) -> Any:
    """Squares of several uses in the place of squares of their sum."""

    def add(total: Tensor, uses: Any, examples: int, first: int = 0) -> Tensor:
        return sum(use.add_squares(total, first).clamp(min=0) for use in uses)

    return add


def once_only(_: Any) -> Any:
    """Rows of a table where a repeated id counts once."""

    def add_squares(self: Rows, total: Tensor, first: int = 0) -> Tensor:
        for ids, values in zip(self.ids, self.values, strict=True):
            made = torch.zeros_like(total)
            made[ids] = values
            total += made.square()
        return self.values.square().sum((1, 2))

    return add_squares


def first_use(receive: Any) -> Any:
    """Gradients of a second use that are lost."""
    seen: dict[int, set[str]] = {}

    def changed(self: Any, gradients: Any, examples: range) -> None:
        before = seen.setdefault(id(self), set())
        receive(self, {k: v for k, v in gradients.items() if k not in before}, examples)
        before |= gradients.keys()

    return changed


def unit_pairs(pairs: Any) -> Any:
    return lambda x, weight=1: pairs(x, 1)


MUTATIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[Patch], None]]] = {
    "a linear weight a hundredth too large": (points, wrong_rule(LINEAR, only("weight", 1.01))),
    "the same with positions": (lines, wrong_rule(LINEAR, only("weight", 1.01))),
    "a bias a hundredth too small": (points, wrong_rule(LINEAR, only("bias", 0.99))),
    "a bias of the first position": (lines, wrong_rule(LINEAR, first_position)),
    "inputs of the position before": (lines, wrong_rule(LINEAR, shifted_positions)),
    "inputs of the example before": (points, wrong_rule(LINEAR, neighbour)),
    "the same, with positions": (lines, wrong_rule(LINEAR, neighbour)),
    "a sign": (points, wrong_rule(LINEAR, only("weight", -1.0))),
    "a convolution without dilation": (planes, wrong_rule(CONV, altered(dilation=(1, 1)))),
    "a convolution without stride": (planes, wrong_rule(CONV, altered(stride=(1, 1)))),
    "a convolution padded by zeros": (planes, wrong_rule(CONV, altered(padding_mode="zeros"))),
    "a convolution without groups": (planes, wrong_rule(CONV, altered(groups=1))),
    "images of the example before": (planes, wrong_rule(CONV, neighbour)),
    "padding that has a gradient": (words, wrong_rule(EMBEDDING, altered(padding_idx=None))),
    "ids of the example before": (words, wrong_rule(EMBEDDING, neighbour)),
    "a norm without its ε": (
        lines, wrong_rule("torch.nn.modules.normalization.LayerNorm", altered(eps=0.1)),
    ),
    "an RMS norm without its ε": (
        words, wrong_rule("torch.nn.modules.normalization.RMSNorm", altered(eps=0.1)),
    ),
    "a group norm of one group": (
        planes, wrong_rule("torch.nn.modules.normalization.GroupNorm", altered(num_groups=1)),
    ),
    "a batch norm of other statistics": (
        planes,
        wrong_rule(
            "torch.nn.modules.batchnorm.BatchNorm[12]d", altered(running_var=torch.full((4,), 2.0))
        ),
    ),
    "squares of positions": (lines, instead(Outer, "add_squares", each_position)),
    "squares of the batch": (lines, instead(Whole, "add_squares", squared_sum)),
    "pairs of positions once": (planes, instead(example_gradients, "pairs_of", unit_pairs)),
    "squares without the last example": (lines, instead(Outer, "add_squares", without_last)),
    "large squares without the last": (large_lines, instead(Outer, "add_squares", without_last)),
    "squares without the first example": (lines, instead(Outer, "add_squares", without_first)),
    "biases without the last example": (lines, instead(Whole, "add_squares", without_last)),
    "kernels without the last example": (planes, instead(Convolved, "add_squares", without_last)),
    "tables without the last example": (words, instead(Rows, "add_squares", without_last)),
    "repeated ids once": (words, instead(Rows, "add_squares", once_only)),
    "squares of each use": (Twice, instead(layer_hooks, "add_squares_of_sums", each_use)),
    "the last use only": (Twice, instead(layer_hooks.Squares, "__call__", first_use)),
    "what functions use, squared as a batch": (Scaled, instead(Whole, "add_squares", squared_sum)),
}  # fmt: skip


SIZES = [2, 3, 5, 19, 37]
# Random examples without a repeated word do not show it.
MISSED = {("repeated ids once", 19), ("repeated ids once", 37)}


@pytest.mark.parametrize(
    ("name", "size"), [(n, size) for n in MUTATIONS for size in SIZES if (n, size) not in MISSED]
)
def test_what_is_wrong_is_found_on_the_first_batch(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, patch = MUTATIONS[name]
    torch.manual_seed(0)
    model = make().double()
    torch.manual_seed(1)
    is_right_on_one_batch(model, INPUTS[make](size), lambda: patch(monkeypatch))


def is_right_on_one_batch(
    model: nn.Module, x: Tensor, change: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """Compare a batch, after a change, with its examples alone; return the methods."""
    x, y = x.double() if x.is_floating_point() else x, torch.arange(len(x)) % 3
    alone = list(zip(x.split(1), y.split(1), strict=True))
    expected = fisher_diagonal(copy.deepcopy(model), alone, "softmax", **F64)
    change()
    found = fisher_diagonal(model, [(x, y)], "softmax", **F64)
    assert_close(found, expected, 1e-9)
    return found.methods


# Models whose rows are not their examples, though two examples do not show it.


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


@pytest.mark.parametrize("function", [Overwriting, Forgetting])
def test_graphs_that_can_be_used_once(function: type[torch.autograd.Function]) -> None:
    x, y = torch.randn(9, 5), torch.arange(9) % 3
    alone = list(zip(x.split(1), y.split(1), strict=True))
    expected = fisher_diagonal(Product(function), alone, "softmax", estimator="empirical")
    found = fisher_diagonal(Product(function), [(x, y)], "softmax", estimator="empirical")
    assert set(found.methods.values()) == {"rule"}
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
    assert note.startswith("the model accepts only one example at a time (InputError: the model")


# What it costs.


def test_the_checks_run_the_whole_batch_forward_once_and_backward_twice() -> None:
    """As counts of examples: the checks add a pass and a few examples, whatever the size."""
    model, forward, backward = points(), [], []

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        forward.append(len(output))
        output.register_hook(lambda gradient: backward.append(len(gradient)))

    model[1].register_forward_hook(count)
    x, y = torch.randn(24, 5), torch.arange(24) % 3
    fisher_diagonal(model, [(x, y)] * 2, "softmax", estimator="empirical")
    # Two examples, one of them alone, and the two by rules; then batches, the first with a check.
    assert forward == [2, 1, 2, 24, 24, 24]
    assert backward == [2, 1, 2, 24, 24, 24, 24]


def test_the_longest_and_the_shortest_text_are_compared() -> None:
    lengths = torch.tensor([4, 6, 5, 1, 3, 2])
    mask = (torch.arange(6) < lengths[:, None]).long()

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 5), nn.Linear(5, 3)
            self.seen: list[list[int]] = []

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            self.seen.append(attention_mask.sum(1).tolist())
            x = self.table(input_ids) * attention_mask[..., None]
            return self.head(x.sum(1))

    model = Masked()
    batch = {"input_ids": torch.randint(9, (6, 6)), "attention_mask": mask}
    fisher_diagonal(model, [{**batch, "labels": torch.arange(6) % 3}], "softmax")
    assert model.seen == [[6, 1], [6], [6, 1], lengths.tolist(), lengths.tolist()]
