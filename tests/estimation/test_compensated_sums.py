import math

import pytest
import torch
from torch import Tensor, nn

from consolidate.estimation.compensated_sums import FOLDED_BATCHES, Accumulators
from formats.errors import NonFiniteError


def parameters() -> dict[str, nn.Parameter]:
    return {"w": nn.Parameter(torch.zeros(2, 3)), "b": nn.Parameter(torch.zeros(()))}


def add(sums: Accumulators, squares: Tensor, units: Tensor | None = None) -> None:
    """Add a batch whose squares of `w` are (B, 2, 3), and nothing of `b`."""
    sums.sums["w"] += squares.sum(0)
    units = torch.ones(len(squares), dtype=torch.long) if units is None else units
    sums.end_batch({"w": squares.sum((1, 2))}, units, len(squares), "batch 1")


def test_the_standard_error_of_a_ratio():
    torch.manual_seed(0)
    squares = torch.rand(9, 2, 3)
    units = torch.randint(1, 6, (9,))
    sums = Accumulators(parameters(), torch.float32)
    for part, u in zip(squares.split(4), units.split(4), strict=True):
        add(sums, part, u)
    s, u = squares.double().sum((1, 2)), units.double()
    ratio = s.sum() / u.sum()
    variance = 9 / 8 * ((s - ratio * u) ** 2).sum() / u.sum() ** 2
    errors = sums.relative_errors()
    assert list(errors) == ["w"]  # The trace of b is zero.
    assert errors["w"] == pytest.approx(variance.sqrt().item() / ratio.item(), rel=1e-6)


def test_with_one_unit_each_it_is_that_of_a_mean():
    torch.manual_seed(0)
    squares = torch.rand(50, 2, 3)
    sums = Accumulators(parameters(), torch.float32)
    add(sums, squares)
    s = squares.double().sum((1, 2))
    expected = s.std().item() / math.sqrt(50) / s.mean().item()
    assert sums.relative_errors()["w"] == pytest.approx(expected, rel=1e-6)


def test_one_example_tells_nothing_of_the_spread():
    sums = Accumulators(parameters(), torch.float32)
    add(sums, torch.ones(1, 2, 3))
    assert sums.relative_errors() == {"w": math.inf}


@pytest.mark.parametrize(("size", "counts"), [(2e-7, True), (0.5e-7, False)])
def test_a_trace_that_is_rounding_noise_has_no_standard_error(size: float, counts: bool):
    torch.manual_seed(0)
    sums = Accumulators(parameters(), torch.float32)
    traces = torch.rand(20)
    sums.end_batch({"w": traces, "b": traces.flip(0) * size}, torch.ones(20), 20, "batch 1")
    assert list(sums.relative_errors()) == (["w", "b"] if counts else ["w"])


def test_rewinding_goes_back_to_the_last_fold():
    sums = Accumulators(parameters(), torch.float32)
    for _ in range(FOLDED_BATCHES):
        assert not sums.fold_if_due()
        add(sums, torch.ones(2, 2, 3))
    assert sums.fold_if_due()
    kept = sums.counts
    add(sums, torch.full((5, 2, 3), 7.0))
    sums.sums["b"] += 3  # Half a batch.
    sums.rewind()
    assert sums.counts is kept
    assert kept.examples == 2 * FOLDED_BATCHES
    means = sums.means(kept.units)
    assert torch.equal(means["w"], torch.ones(2, 3))
    assert means["b"] == 0


def test_what_is_stored_goes_on_to_the_same_bits():
    torch.manual_seed(0)
    batches = torch.rand(3 * FOLDED_BATCHES, 4, 2, 3)

    def run(stop: int | None) -> dict[str, Tensor]:
        sums = Accumulators(parameters(), torch.float32)
        for number, squares in enumerate(batches):
            add(sums, squares)
            if sums.fold_if_due() and number + 1 == stop:
                stored = {name: values.clone() for name, values in sums.tensors().items()}
                sums = Accumulators(parameters(), torch.float32)
                sums.load(stored)
                assert sums.counts.batches == stop
                assert sums.counts.reached == {"w"}
        assert sums.counts.units == batches[:, :, 0, 0].numel()
        errors = sums.relative_errors()["w"]
        return {**sums.means(sums.counts.units), "errors": torch.tensor(errors)}

    straight, resumed = run(None), run(2 * FOLDED_BATCHES)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_rounding_does_not_add_up():
    sums = Accumulators(parameters(), torch.float32)
    for _ in range(20_000):
        sums.sums["b"] += 0.1
        sums.end_batch({"b": torch.tensor([0.1])}, torch.ones(1), 1, "batch 1")
        sums.fold_if_due()
    assert sums.means(20_000)["b"].item() == pytest.approx(0.1, rel=2e-7)


def test_what_is_not_finite_is_named():
    sums = Accumulators(parameters(), torch.float32)
    traces = {"w": torch.ones(2), "b": torch.tensor([1.0, math.inf])}
    sums.end_batch(traces, torch.ones(2), 2, "batch 3 (examples 4 to 5)")
    with pytest.raises(NonFiniteError, match=r"'b' is not finite in batch 3 \(examples 4 to 5\)"):
        _ = sums.counts


def test_what_is_not_finite_is_found_where_it_was_not_measured():
    sums = Accumulators(parameters(), torch.float32)
    for number in range(FOLDED_BATCHES):
        sums.sums["w"][1, 2] += math.nan if number == 3 else 1
        sums.end_batch({"w": torch.tensor([-1.0])}, torch.ones(1), 1, f"batch {number + 1}")
    with pytest.raises(NonFiniteError, match=f"'w' .* one of the batches 1 to {FOLDED_BATCHES}"):
        sums.fold_if_due()


def test_the_spread_is_that_of_what_was_measured():
    torch.manual_seed(0)
    squares = torch.rand(40, 2, 3)
    sums = Accumulators(parameters(), torch.float32)
    traces = squares.sum((1, 2))
    traces[torch.arange(40) % 4 != 0] = -2  # Two vectors of -1 each.
    sums.end_batch({"w": traces}, torch.ones(40), 40, "batch 1")
    s = squares[::4].double().sum((1, 2))
    expected = s.std().item() / math.sqrt(40) / s.mean().item()
    assert sums.relative_errors()["w"] == pytest.approx(expected, rel=1e-6)


def test_rounding_below_nothing_is_nothing():
    sums = Accumulators(parameters(), torch.float32)
    sums.sums["w"] -= 1e-16  # g_s g_t over the pairs of positions, where Σ_t g_t is 0
    add(sums, torch.zeros(1, 2, 3))
    assert torch.equal(sums.means(1)["w"], torch.zeros(2, 3))
