"""The record of a step: the same content, the same bytes; strangers are refused."""

from pathlib import Path

import pytest

from formats.errors import InputError
from formats.step_record import StepRecord, read_step_record, write_step_record


def test_it_comes_back_and_order_means_nothing(tmp_path: Path) -> None:
    one, other = tmp_path / "new" / "01-a.json", tmp_path / "02-a.json"
    assert read_step_record(one) is None
    record = StepRecord({"data": "é", "options": {"x": 1.5, "b": [1]}}, {"weights": "ab"})
    write_step_record(one, record)
    write_step_record(other, StepRecord(dict(reversed(record.made_from.items())), record.made))
    assert read_step_record(one) == record
    assert one.read_bytes() == other.read_bytes()
    write_step_record(one, StepRecord({}, None))
    assert read_step_record(one) == StepRecord({}, None)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "consolidate-run-step", "version": 2}', '{"format": "x"}', "\xff"],
)
def test_a_stranger_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "01-a.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"01-a\.json is not a step record"):
        read_step_record(path)
