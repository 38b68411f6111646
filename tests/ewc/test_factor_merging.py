"""The laws of merging R: sums of penalties stay sums, in any order and grouping."""

from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from consolidate.ewc.factor_merging import MergedBlock, ModelBlock, of_models, online, separate
from formats.errors import InputError
from formats.fisher_json import Block

BLOCKS = {
    "a.weight.R": Block("R", (1,), ("a.weight", "a.bias")),
    "b.weight.R": Block("R", (0,), ("b.weight",)),
    "c.weight.R": Block("R", (1, 2), ("c.weight", "c.bias")),
}
SHAPES = {
    "a.weight": (3, 4),
    "a.bias": (3,),
    "b.weight": (3, 5),
    "c.weight": (2, 2, 2),
    "c.bias": (2,),
}
SIZES = {"a.weight.R": 5, "b.weight.R": 3, "c.weight.R": 5}
CLOSE = {"rtol": 1e-7, "atol": 1e-8}


class Task(NamedTuple):
    """A task alone: w, R by block name and W* by parameter name, in float64."""

    weight: float
    factors: dict[str, Tensor]
    weights: dict[str, Tensor]


class Chain(NamedTuple):
    """Tasks that were merged: R, M, the offset, and the weights after the last."""

    factors: dict[str, Tensor]
    anchor: dict[str, Tensor]
    offset: float
    weights: dict[str, Tensor]


def random_weights(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def random_task(rank: int, seed: int, weight: float = 1.0) -> Task:
    """A task whose R have at most that rank; all tasks of rank 2 or less leave directions free."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, size in SIZES.items():
        root = torch.randn(size, rank, generator=generator, dtype=torch.float64)
        root[-1] = root[0]  # so that (1, 0, …, −1) is in every null space
        factors[name] = (root[:, None] * root).sum(2)
    return Task(weight, factors, random_weights(generator))


def joined(name: str, tensors: dict[str, Tensor]) -> Tensor:
    block = BLOCKS[name]
    weight, *bias = (tensors[at] for at in block.parameters)
    rows = weight.T if block.dims == (0,) else weight.flatten(1)
    return torch.cat([rows, *(b[:, None] for b in bias)], 1)


def quadratic(
    factors: dict[str, Tensor], anchor: dict[str, Tensor], theta: dict[str, Tensor]
) -> float:
    total = 0.0
    for name, matrix in factors.items():
        change = joined(name, theta) - joined(name, anchor)
        total += float((change @ matrix * change).sum()) / (2 * len(change))
    return total


def chained(tasks: Sequence[Task]) -> Chain:
    chain = Chain({}, {}, 0.0, {})
    for task in tasks:
        factors, anchor, growth = separate(
            chain.factors, chain.anchor, task.factors, task.weights, BLOCKS, weight=task.weight
        )
        assert growth >= 0
        chain = Chain(factors, anchor, chain.offset + growth, task.weights)
    return chain


def value(chain: Chain, theta: dict[str, Tensor]) -> float:
    return chain.offset + quadratic(chain.factors, chain.anchor, theta)


def model_of(chain: Chain, name: str, coefficient: float = 1.0) -> ModelBlock:
    ends = BLOCKS[name].parameters
    return ModelBlock(
        coefficient,
        tuple(chain.weights[at] for at in ends),
        chain.factors[name],
        tuple(chain.anchor[at] for at in ends),
    )


def models_merged(
    chains: Sequence[Chain], coefficients: Sequence[float] = (), base: Chain | None = None
) -> Chain:
    cs = list(coefficients) or [1.0] * len(chains)
    made: dict[str, MergedBlock] = {}
    offset = sum(c * chain.offset for c, chain in zip(cs, chains, strict=True))
    for name, block in BLOCKS.items():
        pairs = zip(chains, cs, strict=True)
        shared = None if base is None else model_of(base, name)
        made[name] = of_models(block, (model_of(chain, name, c) for chain, c in pairs), shared)
        offset += made[name].offset
    if base is not None:
        offset += (1 - sum(cs)) * base.offset
    ends = [(at, name, i) for name, b in BLOCKS.items() for i, at in enumerate(b.parameters)]
    return Chain(
        {name: part.matrix for name, part in made.items()},
        {at: made[name].anchor[i] for at, name, i in ends},
        offset,
        {at: made[name].weights[i] for at, name, i in ends},
    )


def assert_same_penalty(found: Chain, expected: Chain) -> None:
    assert found.offset == pytest.approx(expected.offset, rel=1e-7, abs=1e-9)
    for name, matrix in expected.factors.items():
        torch.testing.assert_close(found.factors[name], matrix, **CLOSE)
        pulls = [joined(name, chain.anchor) @ matrix for chain in (found, expected)]
        torch.testing.assert_close(*pulls, **CLOSE)


TASKS = st.lists(
    st.builds(
        random_task,
        st.integers(0, 6),
        st.integers(0, 2**31),
        st.sampled_from([0.0, 0.25, 1.0, 3.0]),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=50)
@given(tasks=TASKS, seed=st.integers(0, 2**31))
def test_separate_is_the_sum_of_the_penalties_for_every_theta(tasks: list[Task], seed: int) -> None:
    chain = chained(tasks)
    for theta in (random_weights(torch.Generator().manual_seed(seed)), tasks[-1].weights):
        explicit = sum(task.weight * quadratic(task.factors, task.weights, theta) for task in tasks)
        assert value(chain, theta) == pytest.approx(explicit, rel=1e-8, abs=1e-9)
    for matrix in chain.factors.values():
        assert torch.equal(matrix, matrix.T)


@settings(max_examples=25)
@given(tasks=TASKS)
def test_separate_does_not_depend_on_the_order_where_there_is_a_penalty(tasks: list[Task]) -> None:
    for order in list(permutations(tasks))[:6]:
        assert_same_penalty(chained(order), chained(tasks))


@settings(max_examples=25)
@given(tasks=TASKS)
def test_separate_stays_at_the_newest_weights_where_there_is_no_penalty(tasks: list[Task]) -> None:
    chain = chained(tasks)
    for name, size in SIZES.items():
        free = torch.zeros(size, dtype=torch.float64)
        free[0], free[-1] = 1, -1
        found, newest = joined(name, chain.anchor) @ free, joined(name, tasks[-1].weights) @ free
        torch.testing.assert_close(found, newest, **CLOSE)


@settings(max_examples=25)
@given(tasks=TASKS, seed=st.integers(0, 2**31))
def test_models_have_the_weighted_sum_of_their_penalties(tasks: list[Task], seed: int) -> None:
    chains = [chained([task, random_task(3, seed + i)]) for i, task in enumerate(tasks)]
    coefficients = [0.5 + i for i in range(len(chains))]
    merged = models_merged(chains, coefficients)
    theta = random_weights(torch.Generator().manual_seed(seed))
    pairs = list(zip(coefficients, chains, strict=True))
    explicit = sum(c * value(chain, theta) for c, chain in pairs)
    assert value(merged, theta) == pytest.approx(explicit, rel=1e-8)
    for name, matrix in merged.factors.items():
        pull = sum(c * joined(name, chain.weights) @ chain.factors[name] for c, chain in pairs)
        torch.testing.assert_close(joined(name, merged.weights) @ matrix, pull, **CLOSE)


@settings(max_examples=25)
@given(tasks=st.lists(st.builds(random_task, st.integers(0, 6), st.integers(0, 2**31)), min_size=3,
                      max_size=3))  # fmt: skip
def test_models_merge_in_any_order_and_grouping(tasks: list[Task]) -> None:
    chains = [chained([task]) for task in tasks]
    together = models_merged(chains)
    assert_same_penalty(together, chained(tasks))
    for order in permutations(chains):
        by_pairs = models_merged([models_merged(order[:2]), order[2]])
        for merged in (models_merged(order), by_pairs):
            assert_same_penalty(merged, together)
            for name, matrix in together.factors.items():
                pulls = [joined(name, chain.weights) @ matrix for chain in (merged, together)]
                torch.testing.assert_close(*pulls, **CLOSE)


def test_where_no_model_has_a_penalty_the_weights_are_their_weighted_mean() -> None:
    chains = [chained([random_task(rank, seed)]) for seed, rank in enumerate((2, 0, 3))]
    merged = models_merged(chains, [1.0, 2.0, 5.0])
    for name, size in SIZES.items():
        free = torch.zeros(size, dtype=torch.float64)
        free[0], free[-1] = 1, -1
        own = [joined(name, chain.weights) @ free for chain in chains]
        mean = (own[0] + 2 * own[1] + 5 * own[2]) / 8
        torch.testing.assert_close(joined(name, merged.weights) @ free, mean, **CLOSE)


def test_children_of_one_base_count_it_once() -> None:
    old, new, other = (random_task(4, seed, 1.0 + seed) for seed in range(3))
    base = chained([old])
    merged = models_merged([chained([old, new]), chained([old, other])], base=base)
    assert_same_penalty(merged, chained([old, new, other]))
    child = chained([old, new])
    assert_same_penalty(models_merged([child, base], base=base), child)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [2, 5])
def test_equal_weights_and_equal_anchors_come_back_to_the_bit(
    dtype: torch.dtype, rank: int
) -> None:
    tasks = [random_task(rank, seed) for seed in range(3)]
    for name, block in BLOCKS.items():
        theta = tuple(tasks[0].weights[at].to(dtype) for at in block.parameters)
        mu = tuple(tasks[1].weights[at].float() for at in block.parameters)
        models = [
            ModelBlock(c, theta, task.factors[name].float(), mu)
            for c, task in zip((1.0, 0.3, 2.0), tasks, strict=True)
        ]
        for merged in (of_models(block, models), of_models(block, models[:1])):
            assert merged.offset == 0
            for found, end in zip(merged.weights, theta, strict=True):
                assert torch.equal(found.to(dtype), end)
            for found, end in zip(merged.anchor, mu, strict=True):
                assert torch.equal(found.float(), end)
    for task in tasks:
        narrow = {name: end.to(dtype) for name, end in task.weights.items()}
        first, _, _ = separate({}, {}, tasks[0].factors, narrow, BLOCKS)
        _, anchor, growth = separate(first, narrow, task.factors, narrow, BLOCKS)
        assert growth == 0
        assert all(torch.equal(anchor[name].to(dtype), end) for name, end in narrow.items())


def test_a_first_task_and_one_after_tasks_without_a_penalty_change_no_bit() -> None:
    task = random_task(3, 0)
    factors, anchor, growth = separate({}, {}, task.factors, task.weights, BLOCKS)
    nothing = {name: torch.zeros_like(matrix) for name, matrix in task.factors.items()}
    elsewhere = random_task(0, 1).weights
    again = separate(nothing, elsewhere, task.factors, task.weights, BLOCKS)
    for found in ((factors, anchor, growth), again):
        assert all(torch.equal(found[0][name], task.factors[name]) for name in BLOCKS)
        assert all(torch.equal(found[1][name], task.weights[name]) for name in SHAPES)
        assert found[2] == 0


def test_float32_comes_out_of_float32_and_is_near_the_exact_sum() -> None:
    tasks = [random_task(4, seed) for seed in range(2)]
    narrow = [
        Task(
            task.weight,
            {name: matrix.float() for name, matrix in task.factors.items()},
            {name: end.float() for name, end in task.weights.items()},
        )
        for task in tasks
    ]
    chain = chained(narrow)
    assert {t.dtype for t in (*chain.factors.values(), *chain.anchor.values())} == {torch.float32}
    theta = random_weights(torch.Generator().manual_seed(9))
    wide = Chain(
        {name: matrix.double() for name, matrix in chain.factors.items()},
        {name: end.double() for name, end in chain.anchor.items()},
        chain.offset,
        {},
    )
    explicit = sum(quadratic(task.factors, task.weights, theta) for task in tasks)
    assert value(wide, theta) == pytest.approx(explicit, rel=1e-5)


def test_rounding_to_float32_does_not_send_the_anchor_far_away() -> None:
    # Rounded, the first R has the eigenvalue −2⁻²⁵ along (1, −1), the second (1 + 2⁻⁶) 2⁻²⁵.
    block = {"w.R": Block("R", (1,), ("w",))}
    first = {"w.R": torch.tensor([[1.0, 1.0], [1.0, 1 - 2**-24]])}
    second = {"w.R": (2**-26 + 2**-32) * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])}
    before, after = {"w": torch.tensor([[0.0, 0.0]])}, {"w": torch.tensor([[1.0, -1.0]])}
    _, anchor, _ = separate(first, before, second, after, block)
    torch.testing.assert_close(anchor["w"], after["w"])


def test_online_decays_and_adds() -> None:
    first, second = (random_task(3, seed) for seed in range(2))
    merged = online(first.factors, second.factors, gamma=0.5, weight=2.0)
    assert list(merged) == list(BLOCKS)
    for name, matrix in merged.items():
        assert matrix.dtype == torch.float32
        expected = 0.5 * first.factors[name] + 2 * second.factors[name]
        torch.testing.assert_close(matrix.double(), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(matrix, matrix.T)
    alone = {name: matrix.float() for name, matrix in first.factors.items()}
    assert all(torch.equal(online({}, alone)[name], alone[name]) for name in alone)
    decayed = online(alone, {}, gamma=0.5)
    assert all(torch.equal(decayed[name], 0.5 * alone[name]) for name in alone)


def test_a_bias_that_one_task_did_not_measure_has_a_row_of_zeros_in_it() -> None:
    name = "a.weight.R"
    both, lone = random_task(4, 0), random_task(4, 1)
    short = lone.factors[name][:4, :4]
    padded = torch.zeros(5, 5, dtype=torch.float64)
    padded[:4, :4] = short
    blocks = {name: BLOCKS[name]}
    full, part, zeros = {name: both.factors[name]}, {name: short}, {name: padded}
    for one, other, same in ((full, part, zeros), (part, full, full)):
        expected = online(padded_of(one, padded), same)
        assert torch.equal(online(one, other)[name], expected[name])
    for one, other in ((full, part), (part, full)):
        found = separate(one, both.weights, other, lone.weights, blocks)
        expected = separate(
            padded_of(one, padded), both.weights, padded_of(other, padded), lone.weights, blocks
        )
        torch.testing.assert_close(found, expected)
    bare = {name: Block("R", (1,), ("a.weight",))}
    with pytest.raises(InputError, match="5 rows: expected at most 4"):
        separate(part, both.weights, full, lone.weights, bare)


def padded_of(factors: dict[str, Tensor], padded: Tensor) -> dict[str, Tensor]:
    return {name: matrix if len(matrix) == 5 else padded for name, matrix in factors.items()}


def test_a_block_that_the_task_did_not_train_stays() -> None:
    first, second = (random_task(3, seed) for seed in range(2))
    chain = chained([first])
    del second.factors["b.weight.R"]
    factors, anchor, _ = separate(
        chain.factors, chain.anchor, second.factors, second.weights, BLOCKS
    )
    assert torch.equal(factors["b.weight.R"], first.factors["b.weight.R"])
    assert torch.equal(anchor["b.weight"], first.weights["b.weight"])
