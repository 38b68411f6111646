"""Laws of merging and of penalties, on random tensors: what must hold whatever the numbers are."""

from collections.abc import Sequence
from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from consolidate.ewc.fisher_merging import (
    MergedTensor,
    ModelTensor,
    merge_models,
    merge_online,
    merge_separate,
)
from consolidate.ewc.low_rank_penalty import LowRank, MergedPenalty
from consolidate.ewc.penalty import Penalty

LAWS = settings(max_examples=30)
SIZE = 5
# Of many sizes, and 0, where a merge divides by what it sums.
STRENGTHS = st.sampled_from([0.0, 1e-8, 1e-3, 0.5, 1.0, 3.0, 1e4])
# A command flushes denormal numbers to 0, for other tests in this process too.
FLOATS = partial(st.floats, allow_subnormal=False)
WEIGHTS = FLOATS(-8, 8, width=32)
FACTORS = st.sampled_from([0.25, 0.5, 1.0, 2.0, 7.0])


def vectors(elements: st.SearchStrategy[float], size: int = SIZE) -> st.SearchStrategy[Tensor]:
    lists = st.lists(elements, min_size=size, max_size=size)
    return lists.map(lambda values: torch.tensor(values, dtype=torch.float64))


QUADRATICS = st.tuples(vectors(STRENGTHS), vectors(WEIGHTS), FACTORS)
MODELS = st.builds(ModelTensor, FACTORS, vectors(WEIGHTS), vectors(STRENGTHS), vectors(WEIGHTS))
Quadratic = tuple[Tensor, Tensor, float]


def value(fisher: Tensor, anchor: Tensor, theta: Tensor) -> Tensor:
    """½ Σ Λ (θ − μ)², in the order of the formula."""
    return (fisher * (theta - anchor) ** 2).sum() / 2


def close(found: Tensor | float, expected: Tensor | float, scale: Tensor | float = 0.0) -> None:
    """Equal within the rounding of float64 at the size of the larger, or of `scale`."""
    found, expected, size = (
        torch.as_tensor(x, dtype=torch.float64) for x in (found, expected, scale)
    )
    largest = max(x.abs().max().item() for x in (found, expected, size))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * largest)


def separate(quadratics: Sequence[Quadratic]) -> tuple[Tensor, Tensor, float]:
    """Merge one after the other, as a chain of tasks does."""
    total: dict[str, Tensor] = {}
    anchor: dict[str, Tensor] = {}
    offset = 0.0
    for fisher, weights, factor in quadratics:
        total, anchor, growth = merge_separate(
            total, anchor, {"w": fisher}, {"w": weights}, weight=factor
        )
        offset += growth
    return total["w"], anchor["w"], offset


@LAWS
@given(st.lists(QUADRATICS, min_size=1, max_size=5), vectors(WEIGHTS))
def test_separate_is_the_sum_of_the_penalties(tasks: list[Quadratic], theta: Tensor) -> None:
    fisher, anchor, offset = separate(tasks)
    parts = [factor * value(task, weights, theta) for task, weights, factor in tasks]
    close(value(fisher, anchor, theta) + offset, sum(parts), sum(f.sum() * 256 for f, *_ in tasks))
    assert offset >= 0
    close(fisher, torch.stack([factor * task for task, _, factor in tasks]).sum(0))


@LAWS
@given(QUADRATICS, QUADRATICS, QUADRATICS)
def test_separate_is_associative(one: Quadratic, two: Quadratic, three: Quadratic) -> None:
    left = separate([one, two, three])
    fisher, anchor, growth = separate([two, three])
    right = separate([one, (fisher, anchor, 1.0)])
    scale = sum(256 * factor * task.sum() for task, _, factor in (one, two, three))
    close(left[0], right[0])
    # Where Λ = 0 the anchor is that of the newest task, either way; else it is Σ Λ μ / Σ Λ.
    torch.testing.assert_close(left[1], right[1], rtol=1e-9, atol=1e-9)
    close(left[2], right[2] + growth, scale)


@LAWS
@given(st.permutations(range(4)), st.lists(QUADRATICS, min_size=4, max_size=4), vectors(WEIGHTS))
def test_the_order_of_separate_does_not_change_the_penalty(
    order: list[int], tasks: list[Quadratic], theta: Tensor
) -> None:
    values = [
        value(fisher, anchor, theta) + offset
        for fisher, anchor, offset in (separate(tasks), separate([tasks[i] for i in order]))
    ]
    close(*values, scale=sum(256 * factor * task.sum() for task, _, factor in tasks))


@LAWS
@given(st.lists(vectors(STRENGTHS), min_size=1, max_size=6), FLOATS(0, 1), FACTORS)
def test_online_is_the_discounted_sum(tasks: list[Tensor], gamma: float, factor: float) -> None:
    total: dict[str, Tensor] = {}
    for fisher in tasks:
        total = merge_online(total, {"w": fisher}, gamma=gamma, weight=factor)
    powers = [gamma ** (len(tasks) - 1 - n) for n in range(len(tasks))]
    expected = torch.stack([p * factor * f for p, f in zip(powers, tasks, strict=True)]).sum(0)
    torch.testing.assert_close(total["w"].double(), expected, rtol=1e-5, atol=1e-30)


def as_model(merged: MergedTensor) -> ModelTensor:
    return ModelTensor(1.0, merged.weights, merged.fisher, merged.anchor)


@LAWS
@given(st.lists(MODELS, min_size=1, max_size=5), vectors(WEIGHTS))
def test_a_merged_model_has_the_sum_of_the_penalties(
    models: list[ModelTensor], theta: Tensor
) -> None:
    merged = merge_models(models)
    parts = [m.coefficient * value(m.fisher, m.anchor, theta) for m in models]  # type: ignore[arg-type]
    scale = sum(256 * m.coefficient * m.fisher.sum() for m in models)  # type: ignore[union-attr]
    close(value(merged.fisher, merged.anchor, theta) + merged.offset, sum(parts), scale)


@LAWS
@given(MODELS, MODELS, MODELS, st.permutations(range(3)))
def test_merging_models_is_associative_and_has_no_order(
    one: ModelTensor, two: ModelTensor, three: ModelTensor, order: list[int]
) -> None:
    models = [one, two, three]
    together = merge_models(models)
    shuffled = merge_models([models[i] for i in order])
    pair = merge_models([one, two])
    stepwise = merge_models([as_model(pair), three])
    scale = sum(256 * m.coefficient * m.fisher.sum() for m in models)  # type: ignore[union-attr]
    measured = together.fisher > 0  # elsewhere it is a mean, which is not associative
    for other, earlier in ((shuffled, 0.0), (stepwise, pair.offset)):
        close(together.fisher, other.fisher)
        close(together.offset, other.offset + earlier, scale)
        for found, expected in ((other.weights, together.weights), (other.anchor, together.anchor)):
            torch.testing.assert_close(found[measured], expected[measured], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shuffled.weights, together.weights, rtol=1e-9, atol=1e-9)


@LAWS
@given(vectors(WEIGHTS), vectors(STRENGTHS), vectors(WEIGHTS), FLOATS(0, 1e4), FLOATS(0, 9))
def test_a_penalty_and_its_gradient_are_their_sums(
    theta: Tensor, fisher: Tensor, anchor: Tensor, ewc_lambda: float, offset: float
) -> None:
    # Two parameters, one of which is a matrix: the sum is over both.
    parameters = {"a": nn.Parameter(theta.clone()), "b": nn.Parameter(theta.reshape(1, -1) * 2)}
    fishers = {"a": fisher, "b": fisher.reshape(1, -1) * 3}
    anchors = {"a": anchor, "b": anchor.reshape(1, -1) - 1}
    penalty = Penalty(
        parameters.items(),
        fishers,
        anchors,
        ewc_lambda=ewc_lambda,
        offset=offset,
        dtype=torch.float64,
    )
    sums = sum(value(fishers[n], anchors[n], p.detach()) for n, p in parameters.items())
    scale = ewc_lambda * 1e3 * sum(f.sum() for f in fishers.values())
    close(penalty.value(), ewc_lambda * (sums + offset), scale)
    penalty.add_gradient_()
    for name, parameter in parameters.items():
        expected = ewc_lambda * fishers[name] * (parameter.detach() - anchors[name])
        assert parameter.grad is not None
        close(parameter.grad, expected, scale)


@LAWS
@given(vectors(WEIGHTS, 6), vectors(STRENGTHS, 12), vectors(WEIGHTS, 8), FLOATS(0, 1e3))
def test_the_penalty_of_an_adapter_is_that_of_the_weights_it_makes(
    weight: Tensor, fisher: Tensor, factors: Tensor, ewc_lambda: float
) -> None:
    base = nn.Parameter(torch.cat([weight, -weight]).reshape(4, 3), requires_grad=False)
    a = nn.Parameter(factors[:3].reshape(1, 3).clone())
    b = nn.Parameter(factors[3:7].reshape(4, 1).clone())
    strengths = fisher.reshape(4, 3)
    layer = LowRank(weight=base, a=a, b=b, scale=0.5)
    penalty = MergedPenalty({"w": layer}, {"w": strengths}, ewc_lambda=ewc_lambda)
    merged = nn.Parameter(base + 0.5 * (b @ a))
    plain = Penalty({"w": merged}.items(), {"w": strengths}, {"w": base.detach()},
                    ewc_lambda=ewc_lambda, dtype=torch.float64)  # fmt: skip
    close(penalty.value(), plain.value(), ewc_lambda * 1e4 * strengths.sum())
    penalty.add_gradient_()
    plain.add_gradient_()
    assert merged.grad is not None
    for found, expected in ((a.grad, 0.5 * b.T @ merged.grad), (b.grad, 0.5 * merged.grad @ a.T)):
        assert found is not None
        close(found, expected.detach(), ewc_lambda * 1e4 * strengths.sum())
