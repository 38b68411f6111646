"""The plot of a search for λ: what the new task gains against what old tasks keep."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from formats.atomic import check_file, write_file
from formats.errors import UsageError

UNDATED: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}
"""What is left out, by kind of file, so that the same search gives the same bytes."""


def check_plot(path: Path) -> None:
    """Refuse, before the work, a plot that could not be written."""
    if path.suffix.lower().strip(".") not in UNDATED:
        raise UsageError(f"--search-plot {path}: expected a name that ends with .png, .svg or .pdf")
    check_file(path)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "--search-plot needs matplotlib: pip install 'consolidate-ewc[plot]'"
        ) from None


def plot_search(search: Mapping[str, Any], path: Path) -> None:
    """Draw the whole runs of a search: scores over λ, and the new task's against the old tasks'.

    Without old data the second panel has the penalty over λ in place of the old tasks' score.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    whole = max(trial["steps"] for trial in search["trials"])
    trials = [t for t in search["trials"] if t["steps"] == whole and t["metrics"] is not None]
    trials.sort(key=lambda trial: trial["ewc_lambda"])
    strengths = [trial["ewc_lambda"] for trial in trials]
    new, old = search["new_task"], search["old_tasks"]
    gained = [trial["metrics"][new]["score"] for trial in trials]

    figure = Figure(figsize=(9, 3.6), constrained_layout=True)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name in (*old, new):
        left.plot(strengths, [t["metrics"][name]["score"] for t in trials], "o-", label=name)
    left.set_xscale("symlog", linthresh=min((s for s in strengths if s > 0), default=1.0))
    left.axvline(search["ewc_lambda"], color="grey", linestyle=":", label="chosen")
    left.set_xlabel("λ")
    left.set_ylabel("score on held-out data")
    left.legend()

    if old:
        kept = [sum(t["metrics"][name]["score"] for name in old) / len(old) for t in trials]
        right.set_ylabel("stability: mean score on old tasks")
    else:
        kept = [trial["penalty_per_lambda"] for trial in trials]
        right.set_ylabel("½ Σ Λ (θ − μ)²")
    right.plot(gained, kept, "o-", color="grey")
    for strength, x, y in zip(strengths, gained, kept, strict=True):
        weight = "bold" if strength == search["ewc_lambda"] else "normal"
        right.annotate(f"{strength:g}", (x, y), (4, 4), textcoords="offset points", weight=weight)
    right.set_xlabel(f"plasticity: score on {new}")
    kind = path.suffix.lower().strip(".")
    drawn = BytesIO()
    figure.savefig(drawn, format=kind, dpi=130, metadata=UNDATED[kind])
    write_file(path, drawn.getvalue())
