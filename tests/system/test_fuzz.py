"""The fuzz script finds no fault in a few hundred damaged files, and would find one."""

import json
import warnings
from pathlib import Path
from random import Random
from typing import Any

import pytest


@pytest.fixture
def fuzzing() -> Any:
    from scripts.robustness import fuzz

    return fuzz


def test_damaged_files_of_every_kind_are_read_or_refused(fuzzing: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes, faults = fuzzing.fuzz(300, 20, None)
    assert faults == []
    assert sum(sum(counts.values()) for counts in outcomes.values()) == 300
    assert len(outcomes) >= 18
    for counts in outcomes.values():
        assert counts["refused"] > 0


def test_a_fault_is_told(fuzzing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fragile(folder: Path) -> None:
        json.loads((folder / "a.json").read_bytes())

    def harmful(folder: Path) -> None:
        (folder / "a.json").write_text("{}")

    def write(folder: Path) -> list[str]:
        (folder / "a.json").write_text('{"a": [1, 2]}')
        return ["a.json"]

    def cut(data: bytes, random: Random) -> bytes:
        return data[: random.randrange(1, len(data))]

    kinds = {
        "fragile": fuzzing.Kind(write, cut, (fragile,)),
        "harmful": fuzzing.Kind(write, cut, (harmful,)),
    }
    monkeypatch.setattr(fuzzing, "kinds", lambda: kinds)
    outcomes, faults = fuzzing.fuzz(6, 0, tmp_path)
    assert outcomes["fragile"] == outcomes["harmful"] == {"fault": 3}
    assert faults[0].what.startswith("JSONDecodeError at ")
    assert faults[-1].what == "the original was changed"
    assert faults[-2].what == "reading changed a file"
    assert len(list(tmp_path.iterdir())) == 6


def test_damage_is_a_function_of_the_seed(fuzzing: Any) -> None:
    from scripts.robustness import mutations

    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    file = len(header).to_bytes(8, "little") + header + b"0000"
    for mutate, good in (
        (mutations.mutated_bytes, file),
        (mutations.mutated_text, header),
        (mutations.mutated_json, header),
        (mutations.mutated_safetensors, file),
    ):
        made = [mutate(good, Random(seed)) for seed in range(300)]
        assert made == [mutate(good, Random(seed)) for seed in range(300)]
        assert len(set(made)) > 150
