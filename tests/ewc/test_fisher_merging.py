"""Merging Fishers; the laws that hold for any numbers are in system/test_laws_of_merging.py."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from consolidate.ewc.fisher_merging import (
    MergedTensor,
    ModelTensor,
    merge_models,
    merge_online,
    merge_separate,
)

CLOSE = {"rtol": 1e-11, "atol": 1e-11}


class Task(NamedTuple):
    """A task alone: w, F and θ* by parameter name, in float64."""

    weight: float
    fisher: dict[str, Tensor]
    weights: dict[str, Tensor]


class Chain(NamedTuple):
    """Tasks that were merged: Λ, μ, the offset, and the weights after the last."""

    fisher: dict[str, Tensor]
    anchor: dict[str, Tensor]
    offset: float
    weights: dict[str, Tensor]


def random_values(generator: torch.Generator) -> dict[str, Tensor]:
    shapes = {"a": (4, 3), "b": (5,)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def random_tasks(count: int, seed: int = 0) -> list[Task]:
    """Tasks whose Fishers span magnitudes and have zeros, some of them in all tasks."""
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for number in range(count):
        fisher = {
            name: values.exp().square() * (values > -0.5)
            for name, values in random_values(generator).items()
        }
        fisher["a"][0] = 0
        tasks.append(Task(0.5 + number, fisher, random_values(generator)))
    return tasks


def separate(tasks: Sequence[Task]) -> Chain:
    chain = Chain({}, {}, 0.0, {})
    for task in tasks:
        fisher, anchor, growth = merge_separate(
            chain.fisher, chain.anchor, task.fisher, task.weights, weight=task.weight
        )
        chain = Chain(fisher, anchor, chain.offset + growth, task.weights)
    return chain


def online(tasks: Sequence[Task]) -> Chain:
    """As `merge_online` does, without its rounding to float32."""
    last = tasks[-1].weights
    return Chain(separate(tasks).fisher, last, 0.0, last)


def value(chain: Chain, theta: dict[str, Tensor]) -> float:
    moved = {name: theta[name] - chain.anchor[name] for name in chain.fisher}
    return chain.offset + sum(
        float((fisher * moved[name] ** 2).sum()) / 2 for name, fisher in chain.fisher.items()
    )


def models_merged(
    chains: Sequence[Chain],
    coefficients: Sequence[float] | None = None,
    base: Chain | None = None,
) -> Chain:
    coefficients = coefficients or [1.0] * len(chains)

    def tensor(chain: Chain, c: float, name: str) -> ModelTensor:
        return ModelTensor(c, chain.weights[name], chain.fisher[name], chain.anchor[name])

    made: dict[str, MergedTensor] = {}
    offset = sum(c * chain.offset for c, chain in zip(coefficients, chains, strict=True))
    for name in chains[0].fisher:
        pairs = zip(chains, coefficients, strict=True)
        made[name] = merge_models(
            (tensor(chain, c, name) for chain, c in pairs),
            None if base is None else tensor(base, 1.0, name),
        )
        offset += made[name].offset
    if base is not None:
        offset += (1 - sum(coefficients)) * base.offset
    return Chain(
        {name: part.fisher for name, part in made.items()},
        {name: part.anchor for name, part in made.items()},
        offset,
        {name: part.weights for name, part in made.items()},
    )


def assert_same_penalty(found: Chain, expected: Chain) -> None:
    assert found.offset == pytest.approx(expected.offset, rel=1e-11)
    for name, fisher in expected.fisher.items():
        torch.testing.assert_close(found.fisher[name], fisher, **CLOSE)
        held = fisher > 0
        torch.testing.assert_close(found.anchor[name][held], expected.anchor[name][held], **CLOSE)


def test_the_total_decays_and_the_new_task_is_weighed() -> None:
    total = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([4.0])}
    fisher = {"a": torch.tensor([10.0, 0.0]), "c": torch.tensor([3.0])}
    merged = merge_online(total, fisher, gamma=0.5, weight=2.0)
    assert list(merged) == ["a", "b", "c"]
    assert merged["a"].tolist() == [20.5, 1.0]
    assert merged["b"].tolist() == [2.0]
    assert merged["c"].tolist() == [6.0]


def test_a_narrow_total_is_added_in_float32() -> None:
    total = {"a": torch.ones(1, dtype=torch.bfloat16)}
    merged = merge_online(total, {"a": torch.full((1,), 1e-3)})
    assert merged["a"].dtype == torch.float32
    assert merged["a"].item() == torch.tensor(1.0 + 1e-3).item()


def test_without_a_past_the_task_is_the_total() -> None:
    fisher = {"a": torch.tensor([0.1, 0.0])}
    assert torch.equal(merge_online({}, fisher)["a"], fisher["a"])
    merged, anchor, growth = merge_separate({}, {}, fisher, {"a": torch.tensor([3.0, -0.7])})
    assert torch.equal(merged["a"], fisher["a"])
    assert torch.equal(anchor["a"], torch.tensor([3.0, -0.7]))
    assert growth == 0


def test_gamma_zero_forgets_exactly() -> None:
    past, task = random_tasks(2)
    merged = merge_online(past.fisher, task.fisher, gamma=0.0)
    alone = merge_online({}, task.fisher)
    assert all(torch.equal(merged[name], alone[name]) for name in alone)


def test_where_nothing_is_held_separate_is_anchored_at_the_latest_weights() -> None:
    tasks = random_tasks(3)
    chain = separate(tasks)
    assert torch.equal(chain.anchor["a"][0], tasks[-1].weights["a"][0])


def test_separate_keeps_a_parameter_that_the_task_did_not_train() -> None:
    first, second = random_tasks(2)
    before = separate([first])
    del second.fisher["b"]
    merged, anchor, _ = merge_separate(
        before.fisher, before.anchor, second.fisher, second.weights, weight=3.0
    )
    assert torch.equal(merged["b"], before.fisher["b"])
    assert torch.equal(anchor["b"], before.anchor["b"])


def test_what_separate_makes_of_float32_is_the_nearest_float32() -> None:
    wide = random_tasks(2)
    narrow = [
        Task(
            task.weight,
            {name: values.float() for name, values in task.fisher.items()},
            {name: values.float() for name, values in task.weights.items()},
        )
        for task in wide
    ]
    exact = separate(
        [
            Task(t.weight, {n: v.double() for n, v in t.fisher.items()},
                 {n: v.double() for n, v in t.weights.items()})
            for t in narrow
        ]
    )  # fmt: skip
    # The first merge rounds w F once more.
    fisher, anchor, _ = merge_separate(
        {name: narrow[0].weight * values for name, values in narrow[0].fisher.items()},
        narrow[0].weights, narrow[1].fisher, narrow[1].weights, weight=narrow[1].weight,
    )  # fmt: skip
    for name in fisher:
        assert fisher[name].dtype == anchor[name].dtype == torch.float32
        torch.testing.assert_close(fisher[name], exact.fisher[name].float(), rtol=1e-7, atol=0)
        torch.testing.assert_close(anchor[name], exact.anchor[name].float(), rtol=1e-6, atol=1e-7)


def test_merged_models_hold_the_weighed_sum_of_their_penalties() -> None:
    chains = [separate(random_tasks(2, seed)) for seed in range(3)]
    coefficients = [1.0, 0.25, 3.0]
    merged = models_merged(chains, coefficients)
    for seed in range(5):
        theta = random_values(torch.Generator().manual_seed(seed))
        explicit = sum(
            c * value(chain, theta) for c, chain in zip(coefficients, chains, strict=True)
        )
        assert value(merged, theta) == pytest.approx(explicit, rel=1e-12)
    pairs = list(zip(coefficients, chains, strict=True))
    for name, fisher in merged.fisher.items():
        weighed = sum(c * chain.fisher[name] * chain.weights[name] for c, chain in pairs)
        mean = sum(c * chain.weights[name] for c, chain in pairs) / sum(coefficients)
        expected = torch.where(fisher > 0, weighed / fisher.clamp(min=1e-300), mean)
        torch.testing.assert_close(merged.weights[name], expected, **CLOSE)


def test_merging_models_of_a_task_each_is_separate() -> None:
    tasks = random_tasks(4)
    assert_same_penalty(models_merged([separate([task]) for task in tasks]), separate(tasks))
    halves = [separate(tasks[:2]), separate(tasks[2:])]
    assert_same_penalty(models_merged(halves), separate(tasks))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merging_one_and_merging_equals_change_no_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(1000, generator=generator, dtype=torch.float64).to(dtype)
    mu = torch.randn(1000, generator=generator, dtype=torch.float64).float()
    fisher = torch.rand(1000, generator=generator) * (theta > -1)
    one = ModelTensor(1.0, theta, fisher, mu)
    merged = merge_models([one])
    assert torch.equal(merged.weights.to(dtype), theta)
    assert torch.equal(merged.fisher.float(), fisher)
    assert torch.equal(merged.anchor.float(), mu)
    assert merged.offset == 0
    again = merge_models([one, ModelTensor(0.3, theta, fisher.flip(0), mu)])
    assert torch.equal(again.weights.to(dtype), theta)
    assert torch.equal(again.anchor.float(), mu)
    assert again.offset == 0


def test_without_a_fisher_the_mean_is_weighed() -> None:
    models = [ModelTensor(c, torch.tensor([v])) for c, v in ((1.0, 1.0), (2.0, 4.0), (5.0, 7.0))]
    merged = merge_models(models)
    assert merged.weights.item() == pytest.approx(44 / 8)
    assert merged.fisher.item() == merged.offset == 0


def test_children_of_one_base_hold_it_once() -> None:
    old, new, other = random_tasks(3)
    base = separate([old])
    children = [separate([old, new]), separate([old, other])]
    assert_same_penalty(models_merged(children, base=base), separate([old, new, other]))
    assert_same_penalty(
        models_merged(children, [2.0, 3.0], base),
        separate(
            [old, new._replace(weight=2 * new.weight), other._replace(weight=3 * other.weight)]
        ),
    )
    merged = models_merged([online([old, new]), online([old, other])], base=base)
    for name, fisher in separate([old, new, other]).fisher.items():
        torch.testing.assert_close(merged.fisher[name], fisher, **CLOSE)
        assert torch.equal(merged.weights[name], merged.anchor[name])


def test_merging_with_a_base_is_associative_and_the_base_adds_nothing() -> None:
    old, *new = random_tasks(4)
    base = online([old])
    children = [online([old, task]) for task in new]
    together = models_merged(children, base=base)
    by_pairs = models_merged([models_merged(children[:2], base=base), children[2]], base=base)
    assert_same_penalty(by_pairs, together)
    for merged in (
        models_merged(children[:1], base=base),
        models_merged([children[0], base], base=base),
    ):
        assert_same_penalty(merged, children[0])
        for name, fisher in merged.fisher.items():
            held = fisher > 0
            torch.testing.assert_close(
                merged.weights[name][held], children[0].weights[name][held], **CLOSE
            )
