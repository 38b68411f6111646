import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def test_the_benchmark_of_the_penalty_writes_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import benchmark_penalty
    import benchmarks

    for key, value in benchmarks.STABLE.items():
        monkeypatch.setenv(key, value)  # else the process would start anew
    monkeypatch.setattr(benchmarks, "results_folder", lambda quick: tmp_path)
    monkeypatch.setattr(benchmark_penalty, "NAMES", ("mlp",))
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / "benchmark_penalty.py"), "--quick"])
    benchmark_penalty.main()
    page = (tmp_path / "penalty.md").read_text(encoding="utf-8")
    for form in ("gradient", "gradient and value", "gradient, bfloat16", "proximal", "autograd"):
        assert page.count(f"\n| {form} | ") == len(benchmark_penalty.OPTIMIZERS)
    assert "A quick run" in page


def test_the_benchmark_of_memory_writes_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import benchmark_memory
    import benchmarks

    for module in (benchmarks, benchmark_memory):
        monkeypatch.setattr(module, "results_folder", lambda quick: tmp_path)
    words = ["--quick", "--command", "evaluate"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / "benchmark_memory.py"), *words])
    benchmark_memory.main()
    page = (tmp_path / "memory.md").read_text(encoding="utf-8")
    (row,) = [line.split(" | ") for line in page.splitlines() if "| empty, evaluate |" in line]
    own, mapped = float(row[1]), float(row[6])
    assert 0.05 < own < 2 > mapped > 0.05  # GB: torch and transformers, and their libraries
    assert "consolidate evaluate old --data old=old.jsonl" in page


def test_what_was_measured_is_kept_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import benchmark_memory as memory

    runs = {"finetune": memory.Run({"finetune: training": memory.Peak(3, 4)}, 1.5, 0.5, "x")}
    measured = memory.Measured(7, runs)
    assert memory.measured_of(json.loads(json.dumps(memory.as_json(measured)))) == measured
