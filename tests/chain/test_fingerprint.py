"""What a result is made from: the same for the same, another for what can be seen in it."""

from pathlib import Path
from typing import Any

import pytest

from consolidate.chain import fingerprint
from consolidate.fields import flat_options, gather
from consolidate.options import FinetuneOptions, FisherOptions


def test_the_source_of_a_factory_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ours.py").write_text("from support.networks import make_network\n")
    monkeypatch.syspath_prepend(tmp_path)
    digest = fingerprint.module_content("ours:make_network")
    assert digest is not None
    (tmp_path / "ours.py").write_text("from support.networks import make_network  # changed\n")
    assert fingerprint.module_content("ours:make_network") != digest
    assert fingerprint.module_content("no_such_module:f") is None
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/__init__.py").write_text("raise RuntimeError")
    assert fingerprint.module_content("broken.nets:f") is None


def test_data_to_measure_count() -> None:
    before: dict[str, Any] = {"versions": {}, "options": {}, "measure": {}}
    after = {**before, "measure": {"b": {"digest": "1"}}}
    assert fingerprint.changes(before, after) == "data to measure of b added"
    assert fingerprint.changes(after, before) == "data to measure of b removed"


@pytest.mark.parametrize("record", [FisherOptions, FinetuneOptions])
def test_a_check_counts_where_it_is_made(record: type) -> None:
    """Without one the description is that of results made before it counted."""
    (name,) = {flat.name for flat in flat_options(record)} & set(fingerprint.UNLESS_DEFAULT)
    given = {"checkpoint": "a", "data": "b", "output_dir": "c"}
    without = fingerprint.asked(gather(record, given), {})
    checked = fingerprint.asked(gather(record, {**given, name: True}), {})
    assert name not in without["options"]
    flag = name.replace("_", "-")
    assert fingerprint.changes(without, checked) == f"{flag} default → True"
    assert fingerprint.changes(checked, without) == f"{flag} True → default"
