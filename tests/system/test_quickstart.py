import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCORES = {"A": {"accuracy": 0.5}, "B": {"accuracy": 0.25}}


def form(text: str) -> str:
    """Leave out the numbers, and how many spaces stand before them."""
    return re.sub(r" +[0-9]+\.[0-9] %", " %", text)


def test_the_readme_holds_what_the_quickstart_writes(tmp_path: Path) -> None:
    from scripts import quickstart

    results = {
        name: {"before": SCORES, "after": SCORES}
        for name in ("no penalty", f"EWC, λ = {quickstart.EWC_LAMBDA}")
    }
    readme = tmp_path / "README.md"
    current = (ROOT / "README.md").read_text(encoding="utf-8")
    readme.write_text(current, encoding="utf-8")
    quickstart.write_readme(results, readme)
    written = readme.read_text(encoding="utf-8")
    assert "fine-tuned on B, no penalty     50.0 %   25.0 %" in written
    assert form(written) == form(current)
