"""The overlap of two Fishers, against the distance that defines it."""

import pytest
import torch

from consolidate.ewc.overlap import fisher_overlap, layer_overlaps


def test_overlap_is_one_minus_half_the_squared_distance_of_normalised_roots() -> None:
    a, b = torch.rand(3, 4), torch.rand(3, 4)
    a_hat, b_hat = a.double() / a.double().sum(), b.double() / b.double().sum()
    expected = 1 - 0.5 * ((a_hat.sqrt() - b_hat.sqrt()) ** 2).sum().item()
    assert fisher_overlap(a, b) == pytest.approx(expected, abs=1e-6)
    assert fisher_overlap(a, b) == fisher_overlap(b, a)
    assert fisher_overlap(a, 1e-30 * a) == pytest.approx(1, abs=1e-6)
    assert fisher_overlap(a, a) <= 1
    assert fisher_overlap(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])) == 0
    assert fisher_overlap(a, torch.zeros(3, 4)) == 0


def test_a_layer_is_one_distribution_over_all_its_parameters() -> None:
    one = {"l.weight": torch.rand(5, 3), "l.bias": torch.rand(5), "other": torch.rand(2)}
    two = {"l.bias": 7 * torch.rand(5), "l.weight": torch.rand(5, 3)}
    flat = [torch.cat([fisher["l.weight"].flatten(), fisher["l.bias"]]) for fisher in (one, two)]
    assert layer_overlaps(one, two) == pytest.approx({"l": fisher_overlap(*flat)}, abs=1e-6)


def test_a_fisher_in_bfloat16_is_taken_in_float32() -> None:
    a, b = torch.rand(400, 50).bfloat16(), torch.rand(400, 50).bfloat16()
    assert fisher_overlap(a, b) == fisher_overlap(a.float(), b.float())
