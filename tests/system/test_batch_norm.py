"""The experiment on batch norm: its plan, the choice of λ, a quick run, and the page."""

import shutil
from pathlib import Path

import pytest

from scripts.experiments.lib import sittings
from scripts.experiments.lib.records import Record
from scripts.experiments.tasks import batch_norm

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def test_each_shift_has_four_cells_with_three_seeds_and_enough_images() -> None:
    units = batch_norm.plan([], False)
    assert len({unit.digest for unit in units}) == len(units)
    for shift in batch_norm.SHIFTS:
        cells = {
            (unit.settings["penalty"], unit.settings["statistics"], unit.seed)
            for unit in units
            if unit.method == shift
        }
        assert len(cells) == 4 * 3
    assert all(unit.settings["test"] >= 1000 for unit in units)


def test_lambda_is_chosen_by_validation_and_not_by_test() -> None:
    records = [
        Record(
            unit,
            {
                "validation": -abs(unit.settings["ewc_lambda"] - 1000),
                "test": {"A": unit.settings["ewc_lambda"], "B": 0.0},
            },
            1.0,
            {},
        )
        for unit in batch_norm.plan([], False)
    ]
    cells = batch_norm._cells(records, "turned")
    assert list(cells) == list(batch_norm.CELLS)
    for cell, chosen in cells.items():
        assert [record.unit.seed for record in chosen] == [0, 1, 2]
        expected = 1000.0 if cell.penalty == "ewc" else 0.0
        assert {record.unit.settings["ewc_lambda"] for record in chosen} == {expected}
    assert batch_norm._means(cells[batch_norm.Cell("ewc", "frozen")]) == [500.0] * 3


@pytest.mark.slow
def test_a_quick_run_writes_the_page(tmp_path: Path) -> None:
    def no_download() -> None:
        raise AssertionError("a quick run needs no MNIST")

    sittings.run([batch_norm.EXPERIMENT], tmp_path, quick=True, fetch=no_download)
    sittings.write_pages(
        [batch_norm.EXPERIMENT], tmp_path, quick=True, table=None, page=batch_norm.PAGE
    )
    page = (tmp_path / "batch_norm.md").read_text("utf-8")
    assert "A quick run" in page
    assert "{" not in page
    assert page.count("| EWC, frozen |") == 2 * (1 + 2)  # each shift: the table, and two λ


def test_the_page_is_that_of_the_records(tmp_path: Path) -> None:
    shutil.copy(RESULTS / "batch_norm.jsonl", tmp_path)
    sittings.write_pages(
        [batch_norm.EXPERIMENT], tmp_path, quick=False, table=None, page=batch_norm.PAGE
    )
    for name in ("batch_norm.md", "batch_norm.csv"):
        assert (tmp_path / name).read_text("utf-8") == (RESULTS / name).read_text("utf-8")
