"""How near a language model's Fisher of other texts is to that of the old task's text.

    .venv/bin/python scripts/experiments/tasks/without_data.py --data-dir tradeoff-data

tradeoff.py says at its top how the raw data are prepared; it fine-tunes with these Fishers.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from consolidate.ewc.overlap import fisher_overlap
from scripts.experiments.lib import sittings
from scripts.experiments.lib.common import markdown
from scripts.experiments.lib.digests import code_digest
from scripts.experiments.lib.pictures import write_csv
from scripts.experiments.lib.records import Experiment, Figures, Findings, Record, Unit, mean
from scripts.experiments.lib.text_sources import (
    DATA,
    GENERATED,
    MAILS,
    OPENED,
    OTHER_DATA,
    PROMPTED,
    RANDOM,
    source_fisher,
)
from scripts.experiments.lib.tuning import Job, start_of
from scripts.experiments.settings import language_model, small_language_model
from scripts.experiments.tasks.tradeoff import bound, setting_file, setting_of

NAME = "without-data"
SETTINGS: dict[str, ModuleType] = {one.NAME: one for one in (small_language_model, language_model)}
MODELS = {language_model.NAME: "SmolLM2-135M", small_language_model.NAME: "The small model"}
REFERENCE = {language_model.NAME: 132, small_language_model.NAME: 2112}
"""Rows of the old task's text whose Fisher the others are compared with."""
COUNTS: dict[str, dict[str, tuple[int, ...]]] = {
    language_model.NAME: dict.fromkeys(
        (OTHER_DATA, GENERATED, PROMPTED, OPENED, MAILS, RANDOM), (64,)
    ),
    small_language_model.NAME: dict.fromkeys(
        (OTHER_DATA, GENERATED, PROMPTED, MAILS, RANDOM), (64, 256, 1024)
    ),
}
MANY = {language_model.NAME: (256,), small_language_model.NAME: ()}
"""Numbers of generated texts for seed 0 alone."""
SEEDS = 3
SECONDS = {language_model.NAME: 2.5, small_language_model.NAME: 0.03}
"""Of a text, generated and measured."""
FIGURES = ("overlap", "correlation", "trace")
TITLES = {
    OTHER_DATA: "other rows of the same text",
    GENERATED: "generated texts",
    PROMPTED: "generated answers to prompts",
    OPENED: "generated turns of a user",
    MAILS: "mails",
    RANDOM: "random tokens",
}
TEXT = """
`fisher --generate` measures the Fisher on texts that the model writes itself. This page compares it
with the Fisher of the old task's text, and both with that of other text. What the Fishers are worth
in fine-tuning is on the pages of the trade-off: [SmolLM2-135M](tradeoff/language_model.md), whose
training text is not known, so that edited prose stands in for it, and [a small
model](tradeoff/small_language_model.md) that was trained on that prose alone.

The reference is the Fisher of {reference}. *Other rows of the same text* share none with it: what
they miss is chance. Overlap: Σ √(â b̂), â and b̂ scaled to unit trace (Kirkpatrick et al. 2017).
Correlation: Pearson's, over all weights. Trace: divided by the reference's. Layers: the median
overlap, and the least, over the embeddings and the layers. One sampled text of labels a row;
generated texts count with their own. Prompts of the small model are the first 8 tokens of mails.
Means over seeds with standard errors.

**A Fisher that is more alike need not protect more**: with 64 texts the small model kept most with
random tokens, whose overlap is the least.

SmolLM2 is tuned for chats. Some of the texts that it writes from its end-of-text token have far
larger gradients, in few layers, and dominate the trace. Answers to prompts do not; nor do turns of
a user, which begin with what the chat template writes before them, as those of `fisher --generate`
do without prompts.

{tables}
"""
PAGE = """# {title}

{quick}{text}

## Records

[Every figure]({name}.csv) and [what was run]({name}.jsonl): {done} of {units} units,
{minutes:.1f} minutes by the clock over all units, one thread each{busy}; {versions}.{others}

The first command runs what {name}.jsonl lacks:

```sh
.venv/bin/python scripts/experiments/tasks/without_data.py --data-dir tradeoff-data
.venv/bin/python scripts/experiments/tasks/without_data.py --report   # the page, from the records
```
"""
FISHER_FILE = "scripts/experiments/lib/text_sources.py"


def code(setting: str) -> str:
    """Return the digest of all code that makes a record."""
    return code_digest(setting_file(setting), FISHER_FILE)


def plan(records: Sequence[Record], quick: bool) -> list[Unit]:
    """List every seed, source and number of texts."""
    units = []
    for name, module in SETTINGS.items():
        for seed in range(2 if quick else SEEDS):
            for source, counts in COUNTS[name].items():
                more = MANY[name] if source == GENERATED and seed == 0 else ()
                units += [
                    Unit(
                        NAME,
                        source,
                        seed,
                        {
                            "setting": name,
                            "texts": count,
                            "code": code(name),
                            "data": "quick" if quick else module.DATA,
                        },
                    )
                    for count in ((4,) if quick else (*counts, *more))
                ]
    return units


def cost(unit: Unit) -> float:
    """Return about how long a unit takes on one core, where the reference is there."""
    return SECONDS[unit.settings["setting"]] * unit.settings["texts"]


def measure(unit: Unit, *, raw: Path | None) -> Figures:
    """Measure one Fisher, and compare it.

    Args:
        unit: What is done.
        raw: The folder of raw data; None in a quick run.
    """
    name = unit.settings["setting"]
    quick = unit.settings["data"] == "quick"
    setting = setting_of(name, unit, raw)
    start, fisher = (
        f"{code_digest(*files)}-{unit.settings['data']}"
        for files in ((setting_file(name),), (setting_file(name), FISHER_FILE))
    )
    weights, _ = start_of(setting, start)

    def at_start() -> Any:
        model = setting.fresh()
        model.load_state_dict(weights, strict=False)
        return model

    job = Job(setting, at_start(), 0.0, 0.0, at_start, f"{name}-{unit.seed}-{fisher}-fisher")
    reference = source_fisher(job, DATA, 4 if quick else REFERENCE[name])
    found = source_fisher(job, unit.method, unit.settings["texts"])
    return compared(found, reference, setting.layers())


def compared(
    found: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    layers: Sequence[tuple[str, ...]],
) -> Figures:
    """Compare two Fishers over all weights, and layer by layer.

    Args:
        found: One of them, by name.
        reference: The other.
        layers: What the names of each layer begin with.

    Returns:
        `overlap`, `correlation` and `trace`, divided by the reference's; `layers`: the overlap of
        each.
    """

    def flat(fisher: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> Tensor:
        some = [fisher[name].flatten() for name in sorted(fisher) if name.startswith(prefixes)]
        return torch.cat(some)

    a, b = flat(found, ("",)), flat(reference, ("",))
    return {
        "overlap": fisher_overlap(a, b),
        "correlation": torch.corrcoef(torch.stack([a, b]))[0, 1].item(),
        "trace": (a.sum(dtype=torch.float64) / b.sum(dtype=torch.float64)).item(),
        "layers": [
            fisher_overlap(flat(found, prefixes), flat(reference, prefixes)) for prefixes in layers
        ],
    }


def report(records: Sequence[Record], folder: Path) -> Findings:
    """Say how near each Fisher is to that of the text."""
    if not records:
        return Findings("", [])
    header = ["setting", "texts of", "number", "seed", *FIGURES]
    rows = [
        [
            *(one.unit.settings["setting"], one.unit.method, one.unit.settings["texts"]),
            *(one.unit.seed, *(one.figures[key] for key in FIGURES)),
        ]
        for one in records
    ]
    write_csv(folder, NAME, header, rows)
    reference = " and ".join(
        f"{count:,} rows ({MODELS[name]})" for name, count in reversed(REFERENCE.items())
    )
    tables = [
        f"## {MODELS[name]}\n\n"
        + _table([one for one in records if one.unit.settings["setting"] == name])
        for name in SETTINGS
    ]
    return Findings(TEXT.format(reference=reference, tables="\n\n".join(tables)).strip(), [])


def _table(records: Sequence[Record]) -> str:
    """Write a line for each source and number of texts."""
    rows = []
    for source, title in TITLES.items():
        for count in sorted({one.unit.settings["texts"] for one in records}):
            some = [
                one.figures
                for one in records
                if (one.unit.method, one.unit.settings["texts"]) == (source, count)
            ]
            if some:
                layers = torch.tensor([one["layers"] for one in some]).mean(0)
                cells = [_written([one[key] for one in some]) for key in FIGURES]
                around = f"{layers.median():.3f}, {layers.min():.3f}"
                rows.append([title, f"{count}", *cells, around, f"{len(some)}"])
    if not rows:
        return "Not run yet."
    return markdown(["Fisher of", "texts", *FIGURES, "layers", "seeds"], rows)


def _written(values: Sequence[float]) -> str:
    found = mean(values)
    error = "" if found.seeds < 2 else f" ± {found.error:.3f}"
    return f"{found.value:.3f}{error}"


EXPERIMENT = Experiment(
    NAME, "A Fisher without data", cost, plan, partial(measure, raw=None), report
)


KIND = sittings.Kind(
    what="the comparisons of Fishers with and without data",
    results=sittings.ROOT / "docs" / "results",
    quick=sittings.ROOT / "experiments-output" / "without-data-quick",
    page=PAGE,
    data_help="the folder of the raw data",
    bound=partial(bound, needs=language_model.NEEDS),  # the small model needs less
    packages=("consolidate-ewc", "torch", "transformers", "tokenizers"),
)

if __name__ == "__main__":
    sittings.main(EXPERIMENT, kind=KIND)
