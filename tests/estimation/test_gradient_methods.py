"""Wrong rules, sums and models, each of which the checks of the first batch must find."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from consolidate.estimation import example_gradients, layer_hooks, layer_rules
from consolidate.estimation.example_gradients import Convolved, Outer, Rows, Whole
from consolidate.estimation.fisher_diagonal import fisher_diagonal
from support.modules import is_right_on_one_batch

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
    assert model.seen == [[6, 1], [6], [6, 1], lengths.tolist()]
