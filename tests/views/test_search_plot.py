import builtins
from pathlib import Path
from typing import Any

import pytest

from consolidate.views.search_plot import check_plot, plot_search
from formats.errors import InputError, UsageError


def search(*, old: bool) -> dict[str, Any]:
    def trial(strength: float, steps: int, new: float) -> dict[str, Any]:
        metrics = {"new": {"score": new}} | ({"old": {"score": 1 - new}} if old else {})
        return {
            "ewc_lambda": strength,
            "steps": steps,
            "metrics": metrics,
            "penalty_per_lambda": 0.1,
        }

    return {
        "trials": [
            trial(1.0, 10, 0.2),
            trial(10.0, 80, 0.5),
            trial(0.0, 80, 0.9),
            {"ewc_lambda": 100.0, "steps": 80, "metrics": None, "penalty_per_lambda": None},
        ],
        "new_task": "new",
        "old_tasks": ["old"] if old else [],
        "ewc_lambda": 10.0,
    }


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_it_is_drawn(tmp_path: Path, old: bool, suffix: str, start: bytes) -> None:
    path = tmp_path / "to be made" / f"curve{suffix}"
    check_plot(path)
    plot_search(search(old=old), path)
    assert path.read_bytes().startswith(start)


def test_what_cannot_be_drawn_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"\.png, \.svg or \.pdf"):
        check_plot(tmp_path / "curve.txt")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is no folder"):
        check_plot(tmp_path / "file" / "curve.png")
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"consolidate-ewc\[plot\]"):
        check_plot(tmp_path / "curve.png")
