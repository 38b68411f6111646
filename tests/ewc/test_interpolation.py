import torch

from consolidate.ewc.interpolation import fisher_share, interpolated


def pair(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    start, trained = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in "ab")
    return start.to(dtype), trained.to(dtype)


def test_it_is_the_formula_and_exact_at_both_ends() -> None:
    start, trained = pair()
    for alpha in (0.1, 0.5, 0.7):
        expected = start + alpha * (trained - start)
        torch.testing.assert_close(interpolated(start, trained, alpha), expected)
    assert torch.equal(interpolated(start, trained, 0.0), start)
    assert torch.equal(interpolated(start, trained, 1.0), trained)


def test_equal_ends_stay_what_they_are() -> None:
    start, _ = pair(torch.float32)
    for alpha in (0.1, 0.3, 0.9):
        assert torch.equal(interpolated(start, start.clone(), alpha), start)


def test_new_rows_are_those_of_the_end() -> None:
    start, trained = pair()
    values = interpolated(start, trained, 0.25, first_new=3)
    assert torch.equal(values[3:], trained[3:])
    assert torch.equal(values[:3], interpolated(start, trained, 0.25)[:3])


def test_narrow_weights_are_interpolated_in_float32_and_not_rounded_yet() -> None:
    start, trained = pair(torch.bfloat16)
    values = interpolated(start, trained.float() + 2**-12, 0.5)
    assert values.dtype == torch.float32
    middle = (start.double() + trained.double() + 2**-12) / 2
    torch.testing.assert_close(values.double(), middle, rtol=1e-6, atol=1e-7)
    assert (values != values.bfloat16().float()).any()


def test_the_ends_are_not_written_to() -> None:
    start, trained = pair()
    before = start.clone(), trained.clone()
    interpolated(start, trained, 0.5, first_new=2)[:] = 0
    interpolated(start, trained, 1.0)[:] = 0
    assert torch.equal(start, before[0])
    assert torch.equal(trained, before[1])


def test_the_share_by_fishers_gives_their_weighted_mean() -> None:
    start, trained = pair()
    old, new = (values.abs() for values in pair())
    for alpha, scale in ((0.1, 1.0), (0.5, 3.0), (0.9, 0.2)):
        share = fisher_share(old, new, alpha, scale=scale)
        weights = (1 - alpha) * old, alpha * scale * new
        expected = (weights[0] * start + weights[1] * trained) / sum(weights)
        torch.testing.assert_close(interpolated(start, trained, share), expected)


def test_where_both_fishers_vanish_it_is_plain() -> None:
    old = torch.tensor([0.0, 0.0, 2.0, 1.0])
    new = torch.tensor([0.0, 3.0, 0.0, 1.0])
    assert fisher_share(old, new, 0.25).tolist() == [0.25, 1.0, 0.0, 0.25]
    assert fisher_share(old, new, 0.0).tolist() == [0.0] * 4
    assert fisher_share(old, new, 1.0).tolist() == [1.0] * 4


def test_shares_of_0_and_1_give_the_ends_to_the_bit() -> None:
    start, trained = pair(torch.float32)
    share = torch.tensor([0.0, 1.0, 0.0]).expand(5, 3)
    values = interpolated(start, trained, share)
    assert torch.equal(values[:, 1], trained[:, 1])
    assert torch.equal(values[:, ::2], start[:, ::2])
