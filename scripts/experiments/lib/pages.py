"""Pages of the trade-off: curves, tables and text, of the records alone."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scripts.experiments.lib.common import markdown
from scripts.experiments.lib.curves import (
    Curve,
    Estimate,
    best_learned,
    difference,
    estimate,
    unpacked,
)
from scripts.experiments.lib.grids import (
    CANDIDATES,
    FASTER,
    GRIDS,
    MAIN,
    OTHERS,
    REFERENCES,
    left_out,
    seeds,
)
from scripts.experiments.lib.page_texts import (
    ALIKE,
    CANDIDATE_TEXT,
    OVERVIEW,
    PAGES,
    TEXT,
    TITLES,
    TRIAL,
    UNTRIED,
    Scale,
)
from scripts.experiments.lib.pictures import COLOURS, panels, save_picture, write_csv
from scripts.experiments.lib.records import Record, mean, signed

OURS = (
    *("ewc", "inputs", "ewc_interpolated", "inputs_interpolated", "lora_ewc"),
    *("ewc_generated", "inputs_generated", "ewc_many", "inputs_many"),
    *("ewc_prompted", "inputs_prompted", "ewc_opened", "inputs_opened"),
)
EVERYWHERE = {"ewc": COLOURS[6], "inputs": COLOURS[5]}
"""In every panel, in the same colours."""
ENDLESS = ("lora", "lora_convolutions", "lora_ewc", "free", "freeze", "joint")
"""Methods whose limit is no training of all weights without a penalty, at the same rate."""
PANELS = (
    ("lora", "lora_convolutions", "interpolation", "free", "l2"),
    ("l2_growing", "fewer_steps", "freeze", "distill"),
    ("ewc_interpolated", "inputs_interpolated", "lora_ewc", "replay", "joint"),
    (*FASTER, *CANDIDATES),
    ("ewc_generated", "ewc_many", "ewc_data_many", "inputs_data_many", "replay_generated"),
    ("inputs_generated", "inputs_many", "inputs_random_many"),
    ("ewc_prompted", "inputs_prompted", "ewc_opened", "inputs_opened"),
    ("ewc_mails", "ewc_random", "ewc_random_many"),
)
COLOUR = EVERYWHERE | {
    name: colour for names in PANELS for name, colour in zip(names, COLOURS, strict=False)
}


class Setting(NamedTuple):
    """The records of a setting, sorted out."""

    name: str
    curves: dict[str, dict[int, Curve]]  # by method and seed, those that are whole
    records: dict[str, dict[int, list[Record]]]  # of the curves, in order of strength


Units = Callable[[str, int], Sequence[str]]
"""From a method and a seed to the digests of the units of its curve, in order."""


def sorted_out(name: str, records: Sequence[Record], units: Units) -> Setting:
    """Put the records of a setting into curves."""
    by_digest = {record.unit.digest: record for record in records}
    numbers = sorted({record.unit.seed for record in records})
    found: dict[str, dict[int, list[Record]]] = {}
    for method in MAIN + OTHERS:
        found[method] = {}
        for seed in numbers:
            digests = units(method, seed) if method in GRIDS[name] else ()
            if digests and all(digest in by_digest for digest in digests):
                found[method][seed] = [by_digest[digest] for digest in digests]
    rows = PAGES[name].rows
    curves: dict[str, dict[int, Curve]] = {method: {} for method in TITLES}
    for method, by_seed in found.items():
        for seed, some in by_seed.items():
            if len(some) == 1 and len(some[0].unit.settings["alphas"]) > 1:  # one training
                points = [(some[0], alpha) for alpha in sorted(some[0].unit.settings["alphas"])]
            else:
                points = [(record, 1.0) for record in some]
            rate = some[0].unit.settings["rate"]
            lasts = not (method in ENDLESS or by_seed.keys() - found["free"].keys())
            free = found["free"][seed] if lasts else []
            ends = [(one, 1.0) for one in free if one.unit.settings["rate"] == rate]
            curves[method][seed] = _curve([*points, *ends], rows)._replace(ended=bool(ends))
    for method in EVERYWHERE:
        share = chosen_share(found[method])
        for seed, some in found[method].items():
            if share is not None:
                points = [(one, share) for one in some]
                curves[f"{method}_interpolated"][seed] = _curve(points, rows)
    return Setting(name, _levelled(curves) if PAGES[name].own_best else curves, found)


def _whole(curves: Mapping[str, Mapping[int, Curve]]) -> list[Mapping[int, Curve]]:
    """Return the curves of the methods that have the most seeds."""
    most = max(map(len, curves.values()))
    return [by_seed for by_seed in curves.values() if len(by_seed) == most > 0]


def _levelled(curves: Mapping[str, Mapping[int, Curve]]) -> dict[str, dict[int, Curve]]:
    """Take from each seed's new scores those of its best point, row by row, and add their mean.

    So every seed has the same best, and a draw of test rows counts from the best on these rows.
    """
    whole = _whole(curves)
    best = {
        seed: max((one[seed] for one in whole if seed in one), key=lambda c: c.means()[0].max())
        for seed in {seed for one in whole for seed in one}
    }
    rows = {seed: one.learned[one.means()[0].argmax()] for seed, one in best.items()}
    common = float(np.mean([one.mean() for one in rows.values()])) if rows else 0.0
    return {
        method: {
            seed: one._replace(learned=one.learned - rows[seed] + common)
            for seed, one in by_seed.items()
            if seed in rows
        }
        for method, by_seed in curves.items()
    }


def chosen_share(records: Mapping[int, Sequence[Record]]) -> float | None:
    """Return the share of the way with the best mean validation score, less than all of it."""
    some = [record for by_seed in records.values() for record in by_seed]
    if not some:
        return None
    shares = [alpha for alpha in sorted(some[0].unit.settings["alphas"]) if alpha < 1]
    return max(
        shares,
        key=lambda alpha: sum(sum(_point(record, alpha)["validation"]) for record in some),
        default=None,
    )


def _point(record: Record, alpha: float) -> dict[str, Any]:
    return record.figures["points"][f"{alpha:g}"]


def _curve(points: Sequence[tuple[Record, float]], rows: tuple[int, int]) -> Curve:
    outcomes = [_point(record, alpha)["outcomes"] for record, alpha in points]
    kept, learned = (
        np.array([unpacked(one[task], rows[task] if rows else 0) for one in outcomes])
        for task in (0, 1)
    )
    return Curve(learned, kept)


def levels(setting: Setting) -> list[float]:
    """Return the new scores at which curves are read; none while there is no curve."""
    whole = _whole(setting.curves)
    if not whole:
        return []
    page = PAGES[setting.name]
    best = best_learned(whole)
    if page.own_best:  # of any seed, as all have the same
        best = max(float(one.means()[0].max()) for by_seed in whole for one in by_seed.values())
    return [best - below / page.scale.factor for below in page.scale.below]


def written(found: Estimate, scale: Scale, *, sign: bool = False) -> str:
    """Write an estimate in the setting's unit."""
    if math.isnan(found.value):
        return "not reached" if found.of else "–"
    value, error = scale.factor * found.value, scale.factor * found.error
    text = signed(value, scale.digits) if sign else f"{value:.{scale.digits}f}"
    spread = "" if math.isnan(error) else f" ± {error:.{scale.digits}f}"
    return f"{found.bound}{' ' * bool(found.bound)}{text}{spread} ({found.seeds}/{found.of})"


def level_table(setting: Setting, level: float) -> str:
    """Write what each method keeps at a new score, and how much more ours keep."""
    scale = PAGES[setting.name].scale
    ours = [name for name in OURS if setting.curves[name]]
    header = ["", "old score", *(f"{TITLES[name]}: gains" for name in ours)]
    rows = []
    for method, title in TITLES.items():
        curves = setting.curves[method]
        if not curves:
            continue
        mark = " (sees old data)" if method in REFERENCES else ""
        cells = [
            "–"
            if name == method
            else written(difference(setting.curves[name], curves, level), scale, sign=True)
            for name in ours
        ]
        rows.append([title + mark, written(estimate(curves, level), scale), *cells])
    return markdown(header, rows)


def kinds_table(setting: Setting, level: float) -> str:
    """Write the perplexity of each kind of old text at a new score."""
    kinds = PAGES[setting.name].kinds
    rows = []
    for method, title in TITLES.items():
        curves = setting.curves[method]
        if not curves:
            continue
        cells = []
        for at in range(len(kinds)):
            some = {
                seed: Curve(one.learned, np.split(one.kept, len(kinds), axis=1)[at])
                for seed, one in curves.items()
            }
            found = estimate(some, level)
            if math.isnan(found.value):
                cells.append("not reached")
                continue
            value = math.exp(-found.value)
            bound = "≤ " * (found.bound == "≥")  # a larger score is a smaller perplexity
            error = "" if math.isnan(found.error) else f" ± {value * found.error:.1f}"
            cells.append(f"{bound}{value:.1f}{error} ({found.seeds}/{found.of})")
        rows.append([title, *cells])
    return markdown(["", *kinds], rows)


def search_table(searches: Mapping[str, Sequence[Record]]) -> str:
    """Write the validation scores by which rates were chosen."""
    rows = []
    for method, records in searches.items():
        for record in records:
            figures = record.figures
            first = _point(record, record.unit.settings["alphas"][0])["validation"]
            rows.append(
                [
                    TITLES[method],
                    f"{record.unit.settings['rate']:g}",
                    *(f"{value:.4f}" for value in (*first, figures["validation"])),
                ]
            )
    return markdown(["", "rate", "old, validation", "new, validation", "mean"], rows)


def tried_table(setting: Setting) -> str:
    """Write the mean scores of every point, in the setting's unit."""
    scale = PAGES[setting.name].scale
    rows = []
    for method, by_seed in setting.records.items():
        if not by_seed:
            continue
        for at, record in enumerate(next(iter(by_seed.values()))):
            given = record.unit.settings
            for alpha in sorted(given["alphas"], reverse=True):
                points = [_point(some[at], alpha) for some in by_seed.values()]
                means = np.mean([[*p["validation"], *p["test"]] for p in points], axis=0)
                seconds = np.mean([some[at].figures["tuning_seconds"] for some in by_seed.values()])
                rows.append(
                    [
                        TITLES[method],
                        f"{given['rate']:g}",
                        _strength(setting.name, record),
                        f"{alpha:g}",
                        *(f"{scale.factor * value:.{scale.digits}f}" for value in means),
                        f"{record.figures['steps']}",
                        f"{seconds:.0f}",
                        f"{len(by_seed)}",
                    ]
                )
    header = ["", "rate", "strength", "share", "old, validation", "new, validation"]
    return markdown([*header, "old, test", "new, test", "steps", "seconds", "seeds"], rows)


def _strength(setting: str, record: Record) -> str:
    """Write a record's strength, where its method has one."""
    unit = record.unit
    return f"{unit.settings['strength']:g}" if GRIDS[setting][unit.method].strengths else "–"


def forgotten(setting: Setting) -> str:
    """Say how much training without a penalty forgets: where it is nothing, nothing is shown."""
    by_seed = setting.records["free"]
    if not by_seed:
        return "Training without a penalty is not complete yet."
    scale = PAGES[setting.name].scale
    records = list(by_seed.values())
    if "forgetting" in records[0][0].figures:
        return forgotten_in_chains(setting)
    starts = np.mean([some[0].figures["start"]["test"] for some in records], axis=0)
    lines = [
        ["at the start", *(f"{scale.factor * one:.{scale.digits}f}" for one in starts), "–"],
    ]
    for at in range(len(records[0])):
        scores = np.mean([_point(some[at], 1.0)["test"] for some in records], axis=0)
        lines.append(
            [
                f"after, rate {records[0][at].unit.settings['rate']:g}",
                *(f"{scale.factor * one:.{scale.digits}f}" for one in scores),
                signed(scale.factor * (scores[0] - starts[0]), scale.digits),
            ]
        )
    table = markdown(["no penalty", "old task", "new task", "old task, change"], lines)
    return (
        f"Where training without a penalty forgets nothing, no method can show anything. Mean "
        f"test scores over {len(records)} seed{'s' * (len(records) > 1)}:\n\n{table}"
    )


def forgotten_by_rate(setting: Setting | None) -> list[str] | None:
    """Write what training without a penalty forgets at each rate; None while that is not known."""
    by_seed = setting.records["free"] if setting is not None else {}
    if setting is None or not by_seed:
        return None
    scale = PAGES[setting.name].scale
    records = list(by_seed.values())
    cells = []
    for at, record in enumerate(records[0]):
        lost = [
            some[at].figures["forgetting"]
            if "forgetting" in some[at].figures
            else some[at].figures["start"]["test"][0] - _point(some[at], 1.0)["test"][0]
            for some in records
        ]
        value = signed(scale.factor * float(np.mean(lost)), scale.digits).removeprefix("+")
        cells.append(f"{value} at {record.unit.settings['rate']:g}")
    return [setting.name, scale.unit, ", ".join(cells), str(len(records))]


def forgotten_in_chains(setting: Setting) -> str:
    """Write how much is lost of the old tasks since each was learned, by method and strength."""
    scale = PAGES[setting.name].scale
    rows = []
    for method, by_seed in setting.records.items():
        for at in range(len(next(iter(by_seed.values()), []))):
            some = [records[at] for records in by_seed.values()]
            given = some[0].unit.settings
            lost = mean([scale.factor * record.figures["forgetting"] for record in some])
            strength = _strength(setting.name, some[0])
            error = "" if math.isnan(lost.error) else f" ± {lost.error:.{scale.digits}f}"
            value = f"{lost.value:.{scale.digits}f}{error} ({lost.seeds})"
            rows.append([TITLES[method], f"{given['rate']:g}", strength, value])
    table = markdown(["", "rate", "strength", "forgetting (seeds)"], rows)
    return (
        "Where training without a penalty forgets nothing, no method can show anything. Forgetting "
        "is the mean over all tasks but the last of the score right after the task was learned, "
        f"less the score at the end, in {scale.unit} (as in "
        "[arXiv 2603.27707](https://arxiv.org/abs/2603.27707)), with the standard error over "
        f"seeds:\n\n{table}"
    )


def draw(setting: Setting, folder: Path) -> None:
    """Draw every curve that is whole, with a band over seeds."""
    page = PAGES[setting.name]
    factor = page.scale.factor
    shown = [names for names in PANELS if any(setting.curves[one] for one in names)]
    across = 4 if len(shown) < 5 else 3
    figure, axes = panels(
        max(1, len(shown)), width=4.6, height=4.2, across=across, sharex=True, sharey=True
    )
    for axis, methods in zip(axes, shown, strict=False):
        for method in (*methods, *EVERYWHERE):
            curves = setting.curves[method]
            if not curves:
                continue
            means = np.array([curve.means() for curve in curves.values()]) * factor
            if all(one.ended for one in curves.values()) and means[..., -1].mean(0)[0] < (
                means[..., :-1].mean(0)[0].max()
            ):
                means = means[..., :-1]  # trained without a penalty, some seeds failed
            learned, kept = means.mean(0)
            order = np.argsort(learned, kind="stable")
            count = len(means)
            error = means[:, 1].std(0, ddof=1) / count**0.5 if count > 1 else np.zeros(len(order))
            colour = COLOUR[method]
            axis.plot(
                learned[order], kept[order], marker="o", markersize=4, color=colour,
                label=f"{TITLES[method]} ({count})",
            )  # fmt: skip
            axis.fill_between(
                learned[order], (kept - error)[order], (kept + error)[order],
                color=colour, alpha=0.15, linewidth=0,
            )  # fmt: skip
        for level in levels(setting):
            axis.axvline(factor * level, color="grey", linestyle=":", linewidth=1)
        axis.set_xlabel(f"{page.score} on the new task")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="x-small", loc="lower left")
    axes[0].set_ylabel(f"{page.score} on the old task")
    save_picture(figure, folder, setting.name)


def page_text(setting: Setting, searches: Mapping[str, Sequence[Record]]) -> str:
    """Write a setting's page without its heading and its records."""
    page = PAGES[setting.name]
    at = levels(setting)
    tables = [
        f"At a new score of {page.scale.factor * level:.{page.scale.digits}f}, which is the best "
        f"of any method less {below:g} {page.scale.unit}:\n\n{level_table(setting, level)}"
        for level, below in zip(at, page.scale.below, strict=False)
    ]
    if page.kinds:
        tables += [
            f"Perplexity of each kind of old text at a new score of {level:.{page.scale.digits}f}:"
            f"\n\n{kinds_table(setting, level)}"
            for level in at
        ]
    counts = [
        f"{TITLES[method]}: {len(curves)}"
        for method, curves in setting.curves.items()
        if curves or method in GRIDS[setting.name]
    ]
    shares = "".join(
        f" `{TITLES[f'{method}_interpolated']}` is the curve at {share:g} of the way from the "
        "start, the share with the best mean validation score."
        for method in EVERYWHERE
        if (share := chosen_share(setting.records[method])) is not None
    )
    return TEXT.format(
        setting=page.text.strip(),
        name=setting.name,
        done="Seeds with a complete curve, the only ones shown: "
        + "; ".join(counts)
        + "."
        + shares,
        candidates="".join(CANDIDATE_TEXT[name] for name in CANDIDATES if setting.curves[name]),
        unit=page.scale.unit,
        forgotten=forgotten(setting),
        alike=ALIKE.strip() if page.own_best else "",
        levels="\n\n".join(tables) or "No curve is complete yet.",
        limits=page.limits.strip().replace("{growing}", _growing(setting))
        + "\n\n" * bool(page.limits),
        search=search_table(searches) if any(searches.values()) else "Not begun.",
        tried=tried_table(setting),
        untried=f"Here: {_left_out(setting.name)}\n\nIn no setting: {UNTRIED.strip()}",
    )


def _growing(setting: Setting) -> str:
    """Say what EWC gains over L2, and over L2 that grows as EWC's penalty does."""
    curves = setting.curves
    if not curves["l2_growing"] or not curves["ewc"]:
        return TRIAL.strip()
    scale = PAGES[setting.name].scale
    gains = [
        " and ".join(
            written(difference(curves["ewc"], curves[name], level), scale, sign=True)
            for level in levels(setting)
        )
        for name in ("l2", "l2_growing")
    ]
    return (
        f"EWC gains {gains[1]} {scale.unit} over it at the two levels, and {gains[0]} over L2 with "
        "one λ."
    )


def _left_out(name: str) -> str:
    """Name the methods that other settings have and this one has not, and how many seeds it has."""
    words = f"{seeds(name)} seeds"
    if fewer := {seeds(name, method) for method in GRIDS[name]} - {seeds(name)}:
        words += f" ({min(fewer)} of the two changes of EWC)"
    if missing := left_out(name):
        words += "; to limit the cost, without these: " + "; ".join(TITLES[one] for one in missing)
    return words + "."


def write_figures(setting: Setting, folder: Path) -> None:
    """Write NAME.csv: every point of every curve that is whole."""
    rows = []
    for method, by_seed in setting.records.items():
        for seed, records in by_seed.items():
            for record in records:
                for alpha in record.unit.settings["alphas"]:
                    point = _point(record, alpha)
                    given = record.unit.settings
                    place = (method, seed, given["rate"], given["strength"], alpha)
                    rows.append((*place, *point["validation"], *point["test"]))
    names = ["old validation", "new validation", "old test", "new test"]
    header = ["method", "seed", "rate", "strength", "share", *names]
    write_csv(folder, setting.name, header, rows)


def overview(settings: Mapping[str, Setting | None], quick: bool) -> str:
    """Write the page over all settings.

    Args:
        settings: By name; None where nothing is recorded.
        quick: Whether the page says that its figures mean nothing.
    """
    header, columns = [""], []
    for name, setting in settings.items():
        scale = PAGES[name].scale
        at = levels(setting) if setting is not None else []
        for level, below in zip(at, scale.below, strict=False):
            assert setting is not None
            header.append(f"{name}, best − {below:g} {scale.unit}")
            columns.append(
                [
                    written(estimate(setting.curves[method], level), scale)
                    if setting.curves[method]
                    else "–"
                    for method in TITLES
                ]
            )
    rows = [
        [title + " (sees old data)" * (method in REFERENCES), *(column[at] for column in columns)]
        for at, (method, title) in enumerate(TITLES.items())
    ]
    links = [
        f"- {PAGES[name].title}: not run yet"
        if setting is None
        else f"- [{PAGES[name].title}](tradeoff/{name}.md)"
        for name, setting in settings.items()
    ]
    lost = [line for setting in settings.values() if (line := forgotten_by_rate(setting))]
    return OVERVIEW.format(
        forgotten=markdown(["", "unit", "forgotten, at each learning rate", "seeds"], lost)
        if lost
        else "Nothing is measured yet.",
        untried="\n".join(_filled(f"- {name}: {_left_out(name)}") for name in settings)
        + "\n\n"
        + _filled(f"In no setting: {' '.join(UNTRIED.split())}"),
        quick=" **A quick run at tiny sizes: its figures mean nothing.**" * quick,
        table=markdown(header, rows) if columns else "No curve is complete yet.",
        pages="\n".join(links),
    )


def _filled(text: str) -> str:
    """Break a paragraph, or an item of a list, into lines."""
    indent = "  " * text.startswith("- ")
    return textwrap.fill(text, 99, break_on_hyphens=False, subsequent_indent=indent)
