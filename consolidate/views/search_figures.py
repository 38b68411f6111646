"""The figures of a search for λ, of `--search-plot` and of the report."""

import math
from collections.abc import Mapping
from typing import Any

from consolidate.views.charts import Curve, Lines, decades, limits
from consolidate.views.figures import Figure, listed, number, trade_off
from consolidate.views.text import search_rows


def search_figures(search: Mapping[str, Any]) -> list[Figure]:
    """Return the charts of a search as figures, with a table of all trials and one of the paths."""
    scores, stability = search_charts(search)
    header, *rows = search_rows(search)
    (path,), (x, y) = stability.lines, stability.labels
    points = [
        [note, number(new), number(kept)]
        for note, (new, kept) in zip(path.notes, path.points, strict=True)
    ]
    return [
        Figure("search", scores, header, *listed(rows)),
        Figure("search-tradeoff", stability, ["λ", x, y], *listed(points)),
    ]


def search_charts(search: Mapping[str, Any]) -> list[Lines]:
    """Chart the full runs of a search: scores over λ, and stability against plasticity."""
    whole = max(trial["steps"] for trial in search["trials"])
    trials = [t for t in search["trials"] if t["steps"] == whole and t["metrics"] is not None]
    trials.sort(key=lambda trial: trial["ewc_lambda"])
    new, old, chosen = search["new_task"], search["old_tasks"], search["ewc_lambda"]
    strengths = [trial["ewc_lambda"] for trial in trials]
    low, high = decades(strengths)
    places = [math.log10(strength) if strength > 0 else low - 1.0 for strength in strengths]
    ticks = [(float(power), f"1e{power}") for power in range(low, high + 1)]
    if 0 in strengths:
        ticks.insert(0, (low - 1.0, "0"))
    scores = {name: [t["metrics"][name]["score"] for t in trials] for name in (*old, new)}
    lines = [Curve(name, [*zip(places, own, strict=True)]) for name, own in scores.items()]
    at, known = places[strengths.index(chosen)], [score for own in scores.values() for score in own]
    lines.append(Curve(f"chosen: {chosen:g}", [(at, end) for end in limits(known)], guide=True))
    kept, stability = [trial["penalty_per_lambda"] for trial in trials], "½ Σ Λ (θ − μ)²"
    if old:
        stability = "mean score on old tasks"
        kept = [sum(own) / len(old) for own in zip(*(scores[name] for name in old), strict=True)]
    notes = [f"{strength:g}{' (chosen)' * (strength == chosen)}" for strength in strengths]
    path = Curve("", [*zip(scores[new], kept, strict=True)], notes)
    said = f"Of {len(trials)} λ, {chosen:g} was chosen."
    labels = ("λ", "score on held-out data")
    return [
        Lines("Scores over λ", said, lines, ticks, number, labels),
        trade_off(said, [path], (f"score on {new}", stability)),
    ]
