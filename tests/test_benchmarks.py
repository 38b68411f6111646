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
