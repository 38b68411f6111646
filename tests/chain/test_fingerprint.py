"""What a result is made from: the same for the same, another for what can be seen in it."""

from pathlib import Path
from typing import Any

import pytest

from consolidate.chain import fingerprint


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
