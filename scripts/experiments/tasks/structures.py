"""Which structure of the Fisher forgets less at the same new score, on 20 Newsgroups.

    .venv/bin/python scripts/experiments/tasks/structures.py --data-dir tradeoff-data

tradeoff.py says at its top how the raw data are prepared.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scripts.experiments.lib import sittings
from scripts.experiments.lib.common import markdown
from scripts.experiments.lib.curves import Curve, best_learned, difference, estimate, unpacked
from scripts.experiments.lib.digests import code_digest
from scripts.experiments.lib.page_texts import PAGES
from scripts.experiments.lib.pages import written
from scripts.experiments.lib.pictures import write_csv
from scripts.experiments.lib.records import Experiment, Figures, Findings, Record, Unit, chosen
from scripts.experiments.lib.structured import STRUCTURES, tune
from scripts.experiments.lib.tuning import measure_two_tasks
from scripts.experiments.settings import newsgroups
from scripts.experiments.tasks.tradeoff import bound, setting_of

NAME = "structures"
SEEDS = 3
RATE = 1e-4
USUAL = (3e4, 1e5, 4e5)
STRENGTHS = {name: (1e3, 3e3, 1e4, *USUAL) if name == "a_g" else USUAL for name in STRUCTURES}
"""Of each structure; K-FAC's first three were added later, as the page says."""
SETTING_FILE = "scripts/experiments/settings/newsgroups.py"
CODE_FILE = "scripts/experiments/lib/structured.py"
TEXT = """
The Fisher's block of a layer, of which EWC keeps the diagonal, as a product of a matrix over the
inputs and one over the outputs, in place of the diagonal. Everything else is that of [the trade-off
on 20 Newsgroups](tradeoff/newsgroups.md): the model, the two tasks, 100 steps on the new one. The
learning rate is {rate:g} for all, λ one of {strengths}; {seeds} seeds. For K-FAC smaller λ
were added when all of these had learned too little on the validation rows.

- R ⊗ I: R = (1/texts) Σ E[JᵀJ], J the gradient of a layer for one text, as `--structure inputs`;
- A: the mean of a aᵀ over positions, a the layer's inputs and a 1 for the bias;
- G: (1/texts) Σ E[Σ g gᵀ], g the gradient for the layer's outputs at a position; A ⊗ G is the
  K-FAC approximation for layers that are used at many positions (`expand`);
- rows: the sums of the diagonal's rows, one for each output.

Every block is scaled to the trace of the diagonal. The layers are those that `inputs` covers; the
others have the diagonal in all cases. A and G are computed text by text with plain hooks, without
the library.

{levels}

Each seed's curve is its upper envelope, interpolated linearly between neighbouring points and never
extrapolated; "≥", "≤" and "~" are as on the page of the trade-off. Errors are standard errors from
a bootstrap over seeds and test rows.

All points, means over seeds, in points; seconds are processor time of training on one core:

{tried}
"""
PAGE = """# {title}

{quick}{text}

## Records

[Every figure]({name}.csv) and [what was run]({name}.jsonl): {done} of {units} units,
{minutes:.1f} minutes by the clock over all units, one thread each{busy}; {versions}.{others}

The first command runs what {name}.jsonl lacks:

```sh
.venv/bin/python scripts/experiments/tasks/structures.py --data-dir tradeoff-data
.venv/bin/python scripts/experiments/tasks/structures.py --report   # the page, from the records
```
"""


def plan(records: Sequence[Record], quick: bool) -> list[Unit]:
    """List every seed, λ and structure."""
    return [
        Unit(
            NAME,
            structure,
            seed,
            {
                "rate": RATE,
                "strength": strength,
                "alphas": [1.0],
                "code": code_digest(SETTING_FILE, CODE_FILE),
                "data": "quick" if quick else newsgroups.DATA,
            },
        )
        for seed in range(2 if quick else SEEDS)
        for structure in STRUCTURES
        for strength in STRENGTHS[structure]
    ]


def cost(unit: Unit) -> float:
    """Return about how long a unit takes on one core, the first of a seed apart."""
    return 95.0 if unit.method == "diagonal" else 130.0


def measure(unit: Unit, *, raw: Path | None) -> Figures:
    """Do one unit.

    Args:
        unit: What is done.
        raw: The folder of raw data; None in a quick run.
    """
    setting = setting_of(newsgroups.NAME, unit, raw)
    start, fisher = (
        f"{code_digest(*files)}-{unit.settings['data']}"
        for files in ((SETTING_FILE,), (SETTING_FILE, CODE_FILE))
    )
    method = partial(tune, structure=unit.method)
    return measure_two_tasks(setting, method, unit.settings, start, fisher)


def report(records: Sequence[Record], folder: Path) -> Findings:
    """Say what each structure keeps at equal new scores, and what it gains over the diagonal."""
    if not records:
        return Findings("", [])
    header = ["structure", "seed", "lambda", "old validation", "new validation"]
    rows = []
    for record in records:
        unit, point = record.unit, _point(record)
        place = (unit.method, unit.seed, unit.settings["strength"])
        rows.append([*place, *point["validation"], *point["test"]])
    write_csv(folder, NAME, [*header, "old test", "new test"], rows)
    text = TEXT.format(
        rate=RATE,
        strengths=", ".join(f"{one:g}" for one in USUAL),
        seeds=len({record.unit.seed for record in records}),
        levels=_levels(_curves(records)),
        tried=_tried(records),
    )
    return Findings(text.strip(), [])


def _point(record: Record) -> Mapping[str, Any]:
    point: Mapping[str, Any] = record.figures["points"]["1"]
    return point


def _curves(records: Sequence[Record]) -> dict[str, dict[int, Curve]]:
    """Put the records into curves, by structure and seed: those with every λ."""
    found: dict[str, dict[int, Curve]] = {}
    for structure in STRUCTURES:
        for seed in sorted({record.unit.seed for record in records}):
            some = [r for r in chosen(records, method=structure) if r.unit.seed == seed]
            if len(some) == len(STRENGTHS[structure]):
                kept, learned = (
                    np.array(
                        [
                            unpacked(_point(one)["outcomes"][task], PAGES["newsgroups"].rows[task])
                            for one in some
                        ]
                    )
                    for task in (0, 1)
                )
                found.setdefault(structure, {})[seed] = Curve(learned, kept)
    return found


def _levels(curves: Mapping[str, Mapping[int, Curve]]) -> str:
    if not curves:
        return "No curve is complete yet."
    scale = PAGES["newsgroups"].scale
    best = best_learned(list(curves.values()))
    tables = []
    for below in scale.below:
        level = best - below / scale.factor
        rows = [
            [
                STRUCTURES[structure],
                written(estimate(some, level), scale),
                "–"
                if structure == "diagonal" or "diagonal" not in curves
                else written(difference(some, curves["diagonal"], level), scale, sign=True),
            ]
            for structure, some in curves.items()
        ]
        table = markdown(["", "old score", "gain over the diagonal"], rows)
        tables.append(
            f"At a new score of {scale.factor * level:.{scale.digits}f}, the best of any structure "
            f"less {below:g} {scale.unit}:\n\n{table}"
        )
    return "\n\n".join(tables)


def _tried(records: Sequence[Record]) -> str:
    rows = []
    for structure, title in STRUCTURES.items():
        for strength in STRENGTHS[structure]:
            some = chosen(records, method=structure, strength=strength)
            if some:
                means = np.mean([[*_point(r)["validation"], *_point(r)["test"]] for r in some], 0)
                seconds = np.mean([record.figures["tuning_seconds"] for record in some])
                cells = [f"{100 * value:.1f}" for value in means]
                rows.append([title, f"{strength:g}", *cells, f"{seconds:.0f}", f"{len(some)}"])
    header = ["", "λ", "old, validation", "new, validation", "old, test", "new, test"]
    return markdown([*header, "seconds", "seeds"], rows)


EXPERIMENT = Experiment(
    NAME, "Structures of the Fisher", cost, plan, partial(measure, raw=None), report
)


KIND = sittings.Kind(
    what="the fine-tunings with other structures of the Fisher",
    results=sittings.ROOT / "docs" / "results",
    quick=sittings.ROOT / "experiments-output" / "structures-quick",
    page=PAGE,
    data_help="the folder of the raw data",
    bound=partial(bound, needs=newsgroups.NEEDS),
    packages=("consolidate-ewc", "torch", "transformers", "tokenizers"),
)

if __name__ == "__main__":
    sittings.main(EXPERIMENT, kind=KIND)
