"""Pages of the trade-off: curves, tables and text, of the records alone."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from scripts.experiments.lib.grids import GRIDS, MAIN, OTHERS, REFERENCES
from scripts.experiments.lib.pictures import COLOURS, panels, save_picture, write_csv
from scripts.experiments.lib.records import Record, mean, signed

TITLES = {
    "lora": "LoRA, rank 8",
    "interpolation": "interpolation with the start",
    "free": "no penalty, over the rate",
    "l2": "L2 around the start",
    "ewc": "EWC",
    "fewer_steps": "no penalty, fewer steps",
    "freeze": "embeddings and lower layers frozen",
    "distill": "distillation from the start, new texts",
    "lora_ewc": "LoRA, rank 8, with EWC",
    "replay": "replay of 1 % of the old rows",
    "joint": "both tasks at once, all old rows",
    "ewc_interpolated": "EWC, then interpolation",
}
OURS = ("ewc", "ewc_interpolated", "lora_ewc")
PANELS = (
    ("lora", "interpolation", "free", "l2", "ewc"),
    ("fewer_steps", "freeze", "distill", "ewc"),
    ("ewc", "ewc_interpolated", "lora_ewc", "replay", "joint"),
)
COLOUR = {"ewc": COLOURS[6]} | {
    name: colour
    for names in PANELS
    for name, colour in zip([one for one in names if one != "ewc"], COLOURS, strict=False)
}


class Scale(NamedTuple):
    """How scores of a setting are written."""

    factor: float  # from a score to the unit
    unit: str
    below: tuple[float, ...]  # levels: the best new score less these, in the unit
    digits: int


POINTS = Scale(100.0, "points", (2.0, 5.0), 1)
NATS = Scale(1.0, "nats", (0.02, 0.05), 3)


@dataclass(frozen=True)
class Page:
    """What a page says of its setting."""

    title: str
    text: str
    rows: tuple[int, int]  # test rows of the old and of the new task
    score: str  # on the axes
    scale: Scale = POINTS


PAGES = {
    "newsgroups": Page(
        title="20 Newsgroups: the same four labels, other groups",
        rows=(1000, 1000),
        score="accuracy",
        text="""
The encoder MiniLM (22.7 million weights) with one head learns to tell the top-level names comp,
rec, sci and talk of 20 Newsgroups apart on nine of the groups (the old task), 1,600 texts in two
epochs with AdamW at a rate of 1e-4 that falls linearly to zero. It then learns the same four labels
on the other eight (the new task): 1,600 texts in batches of 16, one epoch, that is 100 steps. Texts
are cut after 64 tokens. 300 texts of each task choose, 1,000 are scored; with each seed they are
others. The Fisher is exact, of 400 training texts of the old task. Products are in bfloat16, of all
methods alike; weights, Fisher and penalty in float32.
""",
    ),
    "language_model": Page(
        title="A language model, from edited prose to Usenet",
        rows=(120, 120),
        score="log-likelihood a token",
        scale=NATS,
        text="""
SmolLM2-135M-Instruct (its weights were published with 4 bits each) as it comes is the start. It
learns messages of rec.sport.hockey, all lower case and without punctuation (the new task): 60 steps
of 4 rows of 128 tokens. What is kept is measured on edited prose (the old task), of three kinds
alike: news and science of the Brown corpus, and addresses on the State of the Union. The score is
the mean log-likelihood of a token, in nats. 36 rows of each task choose, 120 are scored; with each
seed they are of other documents. The Fisher (`mc`, one sampled text) is of 60 rows of the old
task's training part. The new task can teach some of the old one: the start is no model of running
prose first of all. Products are in bfloat16, of all methods alike; weights, Fisher and penalty in
float32.
""",
    ),
    "text_chain": Page(
        title="Reuters, then spam, then 20 Newsgroups: a head for each",
        rows=(2000, 2000),
        score="accuracy",
        text="""
The encoder MiniLM (22.7 million weights), with a head for each task, learns the eight topics of
Reuters R8 in two epochs, the same for every method (AdamW, a rate of 1e-4 that falls linearly to
zero); then, by each method, to tell spam from other mail in one epoch, and the twenty groups of 20
Newsgroups in three: 1,500 texts a task, cut after 48 tokens, batches of 16. The old score is the
mean accuracy on Reuters and on spam at the end, the new score that on spam and on 20 Newsgroups,
each when it was learned. 300 texts a task choose, 1,000 are scored; with each seed they are others.
The Fishers are exact, of 1,000 training texts, each with the first one's trace, and hold the
weights where they are before a task; heads of other tasks have a Fisher of zero. Products are in
bfloat16, of all methods alike; weights, Fisher and penalty in float32. What interpolates goes back
after each task.
""",
    ),
    "permutations": Page(
        title="Ten permutations of MNIST: a small network",
        rows=(4500, 4500),
        score="accuracy",
        text="""
A network of 784–256–256–10 units learns MNIST, the same for every method, in 200 steps of 64 images
with AdamW at a rate of 1e-3 that falls linearly to zero; then, by each method, nine permutations of
the pixels, 200 steps each, with the same ten outputs. The old score is the mean accuracy on the
first nine tasks at the end, the new score that on the last nine, each when it was learned. 300
images a task choose, 500 are scored; with each seed images and permutations are others. The Fishers
are exact, of 1,000 training images, each with the first one's trace, and hold the weights where
they are before a task. What interpolates goes back after each task. This network is not
pre-trained: it shows what the other pages' methods do in the setting that papers on forgetting use.
""",
    ),
    "tagging": Page(
        title="Parts of speech in the Brown corpus: another genre",
        rows=(1000, 1000),
        score="accuracy a word",
        text="""
The encoder MiniLM (22.7 million weights) with one head learns to tag the words of the Brown
corpus's news with 40 parts of speech and one label for all others: 1,600 sentences in two epochs
with AdamW at a rate of 3e-4 that falls linearly to zero. It then learns the same tags on romances:
1,600 sentences in batches of 16, one epoch, that is 100 steps. Sentences are cut after 64 tokens;
those of training, choice and test are of different files. 300 sentences of each task choose, 1,000
are scored, each by the share of its words that are tagged right; with each seed they are of others.
The Fisher (`mc`, one sampled tag a word) is of 400 training sentences of the old task. Products are
in bfloat16, of all methods alike; weights, Fisher and penalty in float32.
""",
    ),
}

TEXT = """{setting}

Each method's rate is sought first: three rates at the third of its strengths (interpolation: half
of the way), seed 0, by the mean of the two validation scores, the smallest of equal ones. Then come
its strengths with every seed. Where the curve is over the rate, nothing is sought. Nothing is
chosen by test rows.

{done}

## What is forgotten

{forgotten}

## The curves

![What is kept of the old task against what is learned of the new one]({name}.png)

Means over seeds on test rows; the band is one standard error of the old score over seeds. Replay
and training on both tasks at once have rows of the old task, which the others do not: they are no
rivals, they show what is possible.

## At equal new score

{levels}

A curve is read in a straight line between neighbouring points of its upper envelope, for each seed,
and never beyond its ends: "not reached" where no point learns so much; "≥" where, in some seed,
every point learns more, and the old score at the lowest of them stands for it. In brackets, in how
many seeds of those that are done the level is reached; differences are paired by seed and test row.
Errors are of draws of seeds and of test rows.

## The search for the rate

{search}

## What was tried

{tried}

## What was not tried

{untried}
"""
UNTRIED = """
Other ranks and targets of LoRA, the adapter on attention alone; OSFT and other projections;
replay of text that the model writes; an optimizer other than AdamW; EWC by proximal steps; other
numbers of steps on the new task than the one stated, but for `fewer steps`; larger models.
"""


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
    seeds = sorted({record.unit.seed for record in records})
    found: dict[str, dict[int, list[Record]]] = {}
    for method in MAIN + OTHERS:
        found[method] = {}
        for seed in seeds:
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
            curves[method][seed] = _curve(points, rows)
    share = chosen_share(found["ewc"])
    for seed, some in found["ewc"].items():
        if share is not None:
            curves["ewc_interpolated"][seed] = _curve([(one, share) for one in some], rows)
    return Setting(name, curves, found)


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
    whole = [curves for curves in setting.curves.values() if curves]
    if not whole:
        return []
    most = max(map(len, whole))
    best = best_learned([curves for curves in whole if len(curves) == most])
    scale = PAGES[setting.name].scale
    return [best - below / scale.factor for below in scale.below]


def written(found: Estimate, scale: Scale, *, sign: bool = False) -> str:
    """Write an estimate in the setting's unit."""
    if math.isnan(found.value):
        return "not reached" if found.of else "–"
    value, error = scale.factor * found.value, scale.factor * found.error
    text = signed(value, scale.digits) if sign else f"{value:.{scale.digits}f}"
    spread = "" if math.isnan(error) else f" ± {error:.{scale.digits}f}"
    return f"{'≥ ' * found.bound}{text}{spread} ({found.seeds}/{found.of})"


def level_table(setting: Setting, level: float) -> str:
    """Write what each method keeps at a new score, and how much more ours keep."""
    scale = PAGES[setting.name].scale
    ours = [name for name in OURS if setting.curves[name]]
    header = ["", "old score", *(f"{TITLES[name]}: more by" for name in ours)]
    rows = []
    for method, title in TITLES.items():
        curves = setting.curves[method]
        if not curves:
            continue
        mark = " (has old rows)" if method in REFERENCES else ""
        cells = [
            "–"
            if name == method
            else written(difference(setting.curves[name], curves, level), scale, sign=True)
            for name in ours
        ]
        rows.append([title + mark, written(estimate(curves, level), scale), *cells])
    return markdown(header, rows)


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
        seeds = len(by_seed)
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
                        f"{given['strength']:g}" if given["strength"] != given["rate"] else "–",
                        f"{alpha:g}",
                        *(f"{scale.factor * value:.{scale.digits}f}" for value in means),
                        f"{record.figures['steps']}",
                        f"{seconds:.0f}",
                        f"{seeds}",
                    ]
                )
    header = ["", "rate", "strength", "share of the way", "old, validation", "new, validation"]
    return markdown([*header, "old, test", "new, test", "steps", "seconds", "seeds"], rows)


def forgotten(setting: Setting) -> str:
    """Say how much training without a penalty forgets: where it is nothing, nothing is shown."""
    by_seed = setting.records["free"]
    if not by_seed:
        return "Training without a penalty is not done yet."
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
        f"Where training without a penalty forgets nothing, nothing can be shown. Mean test "
        f"scores over {len(records)} seed{'s' * (len(records) > 1)}:\n\n{table}"
    )


def forgotten_in_chains(setting: Setting) -> str:
    """Write how much is lost of the old tasks since each was learned, by method and strength."""
    scale = PAGES[setting.name].scale
    rows = []
    for method, by_seed in setting.records.items():
        for at in range(len(next(iter(by_seed.values()), []))):
            some = [records[at] for records in by_seed.values()]
            given = some[0].unit.settings
            lost = mean([scale.factor * record.figures["forgetting"] for record in some])
            strength = f"{given['strength']:g}" if given["strength"] != given["rate"] else "–"
            error = "" if math.isnan(lost.error) else f" ± {lost.error:.{scale.digits}f}"
            value = f"{lost.value:.{scale.digits}f}{error} ({lost.seeds})"
            rows.append([TITLES[method], f"{given['rate']:g}", strength, value])
    table = markdown(["", "rate", "strength", "forgetting (seeds)"], rows)
    return (
        "Where training without a penalty forgets nothing, nothing can be shown. Forgetting is the "
        "mean over the tasks but the last of the score when the task was learned less that at the "
        f"end, in {scale.unit} (as in [arXiv 2603.27707](https://arxiv.org/abs/2603.27707)), with "
        f"the standard error over seeds:\n\n{table}"
    )


def draw(setting: Setting, folder: Path) -> None:
    """Draw every curve that is whole, with a band over seeds."""
    page = PAGES[setting.name]
    factor = page.scale.factor
    figure, axes = panels(len(PANELS), width=4.6, height=4.2, sharex=True, sharey=True)
    for axis, methods in zip(axes, PANELS, strict=True):
        for method in methods:
            curves = setting.curves[method]
            if not curves:
                continue
            means = np.array([curve.means() for curve in curves.values()]) * factor
            learned, kept = means.mean(0)
            order = np.argsort(learned, kind="stable")
            seeds = len(means)
            error = means[:, 1].std(0, ddof=1) / seeds**0.5 if seeds > 1 else np.zeros(len(order))
            colour = COLOUR[method]
            axis.plot(
                learned[order], kept[order], marker="o", markersize=4, color=colour,
                label=f"{TITLES[method]} ({seeds})",
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
        f"At a new score of {page.scale.factor * level:.{page.scale.digits}f}, the best of any "
        f"method less {below:g} {page.scale.unit}:\n\n{level_table(setting, level)}"
        for level, below in zip(at, page.scale.below, strict=False)
    ]
    counts = [f"{TITLES[method]}: {len(curves)}" for method, curves in setting.curves.items()]
    share = chosen_share(setting.records["ewc"])
    shares = (
        f" EWC's models are scored at shares of the way back as well; that of {share:g} has the "
        "best mean validation score, and is the curve of EWC, then interpolation."
        if share is not None
        else ""
    )
    return TEXT.format(
        setting=page.text.strip(),
        name=setting.name,
        done="Seeds whose curve is whole, which alone are shown: "
        + "; ".join(counts)
        + "."
        + shares,
        forgotten=forgotten(setting),
        levels="\n\n".join(tables) or "No curve is whole yet.",
        search=search_table(searches) if any(searches.values()) else "Not begun.",
        tried=tried_table(setting),
        untried=UNTRIED.strip(),
    )


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
    header = ["method", "seed", "rate", "strength", "share of the way", *names]
    write_csv(folder, setting.name, header, rows)


OVERVIEW = """# What is kept against what is learned

A tuned model forgets some of what it could do, and what keeps it from forgetting keeps it from
learning. Each page below measures both, of EWC and of what a user would pick in its place, on one
setting: whole curves, each method with a search of its own for the rate. One command makes all of
it, and goes on where it was ended:

```sh
.venv/bin/python scripts/experiments/tasks/tradeoff.py --plan     # how long it takes
.venv/bin/python scripts/experiments/tasks/tradeoff.py --data-dir tradeoff-data
```

The old score at equal new score, that is the best of any method less a little; in brackets, in how
many seeds it is reached of those that are done. How it is read, and the errors of differences, the
pages say.{quick}

{table}

{pages}
"""


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
        [title + " (has old rows)" * (method in REFERENCES), *(column[at] for column in columns)]
        for at, (method, title) in enumerate(TITLES.items())
    ]
    links = [
        f"- {PAGES[name].title}: not run yet"
        if setting is None
        else f"- [{PAGES[name].title}](tradeoff/{name}.md)"
        for name, setting in settings.items()
    ]
    return OVERVIEW.format(
        quick=" **A quick run at tiny sizes: its figures mean nothing.**" * quick,
        table=markdown(header, rows) if columns else "No curve is whole yet.",
        pages="\n".join(links),
    )
