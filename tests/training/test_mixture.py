from fractions import Fraction
from itertools import islice
from math import ceil, floor

import pytest

from consolidate.training.loop import data_order
from consolidate.training.mixture import Mixture

SHARES = [Fraction("0.1"), Fraction(1, 3), Fraction("0.5"), Fraction("0.93"), Fraction("1e-3")]


def run_of(mixture: Mixture, epochs: int) -> list[list[int]]:
    orders = islice(data_order(mixture.new, 4), epochs)
    return [mixture.mixed(order, epoch) for epoch, order in enumerate(orders)]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("new", [1, 2, 37])
def test_any_rows_in_succession_have_the_share_but_for_one_row(share: Fraction, new: int) -> None:
    rows = [row for epoch in run_of(Mixture(new, share), 8) for row in epoch]
    old = [row < 0 for row in rows]
    for length in (1, 3, 16, 100):
        for start in range(len(rows) - length + 1):
            replayed = sum(old[start : start + length])
            assert floor(length * share) <= replayed <= ceil(length * share)
    assert sum(old) == Mixture(new, share).replayed(len(rows)) == floor(len(rows) * share)


@pytest.mark.parametrize("share", SHARES)
def test_an_epoch_has_each_new_row_once_and_the_old_ones_go_on(share: Fraction) -> None:
    mixture = Mixture(37, share)
    epochs = run_of(mixture, 5)
    for number, rows in enumerate(epochs):
        assert sorted(row for row in rows if row >= 0) == list(range(37))
        assert rows[-1] >= 0
        assert len(rows) == mixture.begin(number + 1) - mixture.begin(number)
    old = [~row for rows in epochs for row in rows if row < 0]
    assert old == list(range(len(old)))
    # Steps per epoch over the new rows grow by 1/(1 − X), to less than a row in the whole run.
    total = sum(map(len, epochs))
    assert 5 * 37 / (1 - share) - 1 / (1 - share) <= total <= 5 * 37 / (1 - share)


def test_without_a_share_the_order_is_that_of_the_new_rows() -> None:
    mixture = Mixture(7)
    assert run_of(mixture, 3) == list(islice(data_order(7, 4), 3))
    assert [mixture.steps(epoch, 3) for epoch in range(3)] == [3, 3, 3]


@pytest.mark.parametrize(
    ("epochs", "most", "expected"),
    [(None, None, 6), (3, None, 18), (3, 100, 18), (3, 8, 8), (None, 14, 14), (1, 7, 6)],
)
def test_the_length_of_a_run_counts_all_rows(
    epochs: int | None, most: int | None, expected: int
) -> None:
    mixture = Mixture(10, Fraction("0.4"))  # an epoch takes 16 or 17 rows
    assert [mixture.steps(epoch, 3) for epoch in range(3)] == [6, 6, 6]
    assert [len(rows) for rows in run_of(mixture, 3)] == [16, 16, 17]
    assert mixture.length(3, epochs, most) == expected
