"""The trade-off of old and new tasks: curves, digests of code, plans, and a quick run."""

import argparse
import dataclasses
import json
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consolidate.estimation.fisher_diagonal import fisher_diagonal
from scripts.experiments.lib import pages, tempered_fisher
from scripts.experiments.lib.block_fisher import block_fisher, block_of
from scripts.experiments.lib.curves import (
    Curve,
    best_learned,
    difference,
    estimate,
    kept_at,
    unpacked,
)
from scripts.experiments.lib.digests import code_digest, meaning
from scripts.experiments.lib.grids import CANDIDATES, FIRST, GRIDS, left_out
from scripts.experiments.lib.records import (
    Record,
    RecordsError,
    Unit,
    append_record,
    read_records,
    rounded,
)
from scripts.experiments.lib.tuning import Done, Job, fit, packed
from scripts.experiments.methods import by_ewc_floor, by_inputs, by_l2, by_l2_growing
from scripts.experiments.tasks import confirm_records, structures, tradeoff, without_data

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = tradeoff.sittings.installed(tradeoff.KIND.packages)


def slow_kept_at(points: list[tuple[float, float]], level: float) -> float:
    """Take the points that no other beats in both, and the straight line over the level."""
    front = sorted(
        {
            one
            for one in points
            if not any(
                other != one and other[0] >= one[0] and other[1] >= one[1] for other in points
            )
        }
    )
    if level > front[-1][0]:
        return math.nan
    if level <= front[0][0]:
        return front[0][1]
    for (x0, y0), (x1, y1) in pairwise(front):
        if x0 < level <= x1:
            return y0 + (level - x0) / (x1 - x0) * (y1 - y0)
    raise AssertionError


@pytest.mark.parametrize("seed", range(30))
def test_a_curve_is_read_as_its_upper_envelope_is(seed: int) -> None:
    chance = random.Random(seed)
    digits = 1 if seed % 3 else 9  # few digits: points that are equal in one or in both
    points = [
        (round(chance.random(), digits), round(chance.random(), digits))
        for _ in range(chance.randint(1, 8))
    ]
    learned, kept = np.array(points).T
    for level in (*np.linspace(-0.1, 1.1, 25), *learned):
        found = float(kept_at(learned, kept, float(level)))
        assert found == pytest.approx(slow_kept_at(points, float(level)), nan_ok=True, abs=1e-12)


def test_many_curves_are_read_at_once_as_each_alone() -> None:
    chance = np.random.default_rng(0)
    learned, kept = chance.random((2, 3, 50, 4))
    found = kept_at(learned, kept, 0.6)
    for at in np.ndindex(3, 50):
        alone = kept_at(learned[at], kept[at], 0.6)
        np.testing.assert_equal(found[at], alone)


OURS = ("ewc", "inputs", "ewc_floor", "ewc_tempered")


def curves(*, gain: float, seeds: int, rows: int = 400) -> dict[int, Curve]:
    """Make two points a seed; the old score is higher by `gain` of the same rows."""
    found = {}
    for seed in range(seeds):
        chance = np.random.default_rng(seed)
        new, old = chance.random((2, rows))
        learned = np.array([new < 0.6, new < 0.9], dtype=float)
        kept = np.array([old < 0.8 + gain, old < 0.5 + gain], dtype=float)
        found[seed] = Curve(learned, kept)
    return found


def test_a_difference_is_paired_by_seed_and_row() -> None:
    ours, theirs = curves(gain=0.05, seeds=4), curves(gain=0.0, seeds=3)
    found = difference(ours, theirs, 0.75)
    apart = [
        slow_kept_at(list(zip(*ours[seed].means(), strict=True)), 0.75)
        - slow_kept_at(list(zip(*theirs[seed].means(), strict=True)), 0.75)
        for seed in range(3)
    ]
    assert found.value == pytest.approx(np.mean(apart), abs=1e-12)
    assert (found.seeds, found.of) == (3, 3)
    assert found.error < estimate(theirs, 0.75).error  # what both share falls out
    assert difference(ours, ours, 0.75)[:2] == (0.0, 0.0)


def test_the_error_of_seeds_that_are_alike_is_that_of_their_rows() -> None:
    [curve] = curves(gain=0.0, seeds=1, rows=2000).values()
    # At the lower end, which is one point: the error of a share.
    level = float(curve.means()[0][1])
    assert math.isnan(estimate({0: curve}, level - 1e-9).error)
    found = estimate({0: curve, 1: curve}, level - 1e-9, draws=2000)
    # The level is fixed while the rows are drawn, so the new score's error adds to the old one's.
    share = curve.means()[1][1]
    assert math.sqrt(share * (1 - share) / 2000 / 2) * 0.9 < found.error < 0.05


def test_the_error_of_few_seeds_is_no_smaller_than_theirs() -> None:
    ones = np.ones((1, 500))
    some = {seed: Curve(ones, value * ones) for seed, value in enumerate((0.1, 0.4, 0.7))}
    # Rows that are all alike: what is left is s/√n of the three.
    assert estimate(some, 0.5, draws=4000).error == pytest.approx(0.3 / math.sqrt(3), rel=0.03)


def test_a_training_without_a_penalty_that_failed_is_no_lower_end() -> None:
    learned, kept = np.full((2, 50), 0.8), np.full((2, 50), 0.6)
    learned[1] = kept[1] = 0.05
    curve = Curve(learned, kept)
    assert estimate({0: curve}, 0.5).bound == ""
    assert estimate({0: curve._replace(ended=True)}, 0.5).bound == "≥"


def test_curves_end_at_training_without_a_penalty_at_their_rate() -> None:
    rows = tradeoff.pages.PAGES["vision"].rows

    def record(method: str, rate: float, strength: float, seed: int) -> Record:
        point = {
            "outcomes": [np.packbits(np.ones(n, bool)).tobytes().hex() for n in rows],
            "validation": [0.5, 0.5],
        }
        settings = {"rate": rate, "strength": strength, "alphas": [1.0]}
        unit = Unit("vision", method, seed, settings)
        return Record(unit, {"points": {"1": point}}, 1.0, {})

    records = [
        record(method, rate, strength, seed)
        for method, rate, strength in (
            *(("free", rate, rate) for rate in (0.001, 0.003)),
            *(("l2", 0.003, strength) for strength in (0.1, 1.0)),
            ("ewc", 0.01, 30.0),
            ("lora_convolutions", 0.003, 0.003),
        )
        for seed in range(2)
    ]

    def units(method: str, seed: int) -> list[str]:
        return [r.unit.digest for r in records if (r.unit.method, r.unit.seed) == (method, seed)]

    curves = tradeoff.pages.sorted_out("vision", records, units).curves
    found = {
        method: [(len(one.learned), one.ended) for one in curves[method].values()]
        for method in ("free", "l2", "ewc", "lora_convolutions")
    }
    assert found == {
        "free": [(2, False)] * 2,
        "l2": [(3, True)] * 2,
        "ewc": [(1, False)] * 2,  # nothing was trained without a penalty at that rate
        "lora_convolutions": [(1, False)] * 2,
    }


def test_a_level_that_is_not_learned_is_not_reached() -> None:
    some = curves(gain=0.0, seeds=2)
    best = best_learned([some])
    assert best == pytest.approx(np.mean([one.means()[0][1] for one in some.values()]))
    found = estimate(some, 0.99)
    assert math.isnan(found.value)
    assert (found.seeds, found.of) == (0, 2)
    assert [estimate(some, level).bound for level in (0.2, 0.75)] == ["≥", ""]
    low = {seed: Curve(curve.learned - 0.5, curve.kept) for seed, curve in some.items()}
    assert difference(some, low, 0.3).bound == "≥"
    assert difference(low, some, 0.3).bound == "≤"
    assert difference(some, some, 0.3).bound == "~"


def test_seeds_of_unlike_rows_are_read_as_if_their_best_were_equal() -> None:
    generator = np.random.default_rng(0)
    easier = np.array([0.0, 3.0, -1.0])  # of each seed's rows
    learned = generator.normal(size=(3, 4, 50)) + np.arange(4)[:, None]  # seeds, points, rows
    kept = -np.arange(4.0)[:, None] + generator.normal(size=(3, 4, 50)) / 10

    def curves(shifts: np.ndarray) -> dict[str, dict[int, Curve]]:
        return {
            "a": {s: Curve(learned[s] + shifts[s], kept[s]) for s in (0, 1)},
            "b": {s: Curve(learned[s] - 1 + shifts[s], kept[s]) for s in (1, 2)},
            "c": {0: Curve(learned[0] - 2 + shifts[0], kept[0])},
        }

    found, alike = (pages._levelled(curves(shifts)) for shifts in (easier, np.zeros(3)))
    for method, by_seed in found.items():
        for seed, curve in by_seed.items():
            moved = curve.learned.mean(1) - alike[method][seed].learned.mean(1)
            np.testing.assert_allclose(moved, moved[0])
            np.testing.assert_allclose(moved, [2 / 3] * 4)  # the mean of what is easier
    best = [max(one[s].means()[0].max() for one in found.values() if s in one) for s in range(3)]
    np.testing.assert_allclose(best, best[0])


def test_perplexities_of_each_kind_of_text_are_those_of_its_rows() -> None:
    perplexity = np.repeat([10.0, 20.0, 40.0], 20)
    some = Curve(np.full((1, 60), -2.0), -np.log(perplexity)[None])
    curves = {method: {} for method in pages.TITLES} | {"free": {0: some, 1: some}}
    text = pages.kinds_table(pages.Setting("language_model", curves, {}), -2.0)
    [row] = [line for line in text.splitlines() if line.startswith("| no penalty")]
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells == ["10.0 ± 0.0 (2/2)", "20.0 ± 0.0 (2/2)", "40.0 ± 0.0 (2/2)"]
    later = pages.kinds_table(pages.Setting("language_model", curves, {}), -1.0)
    assert later.count("not reached") == 3


@pytest.mark.parametrize("count", [1, 8, 13])
def test_outcomes_are_written_and_read_again(count: int) -> None:
    bits = [float(i % 3 == 0) for i in range(count)]
    np.testing.assert_array_equal(unpacked(packed(bits), count), bits)
    losses = [1 / 3 + i for i in range(count)]
    np.testing.assert_allclose(unpacked(packed(losses), count), losses, rtol=5e-5)


SOURCE = '''"""A module."""
from consolidate.ewc.penalty import Penalty

LIMIT = 3

def double(value: float, note=print) -> float:
    """Return twice the value."""
    twice = 2 * value
    if value > LIMIT:
        raise ValueError(f"{value} is too large")  # says so
    note("doubled")
    self.tell(f"doubled {value} once")
    return twice
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("A module.", "Another text."),
        ("Return twice the value.", "Double it."),
        ('f"{value} is too large"', '"More than " + str(LIMIT)'),
        ('"doubled"', '"done"'),
        ("doubled {value} once", "twice {value} is made"),
        ("  # says so", ""),
        ("value: float, note=print", "value, note=print"),
        (") -> float:", "):"),
        ("twice", "doubled"),
        ("    twice =", "    twice: float ="),
    ],
)
def test_the_digest_does_not_depend_on_words(old: str, new: str) -> None:
    assert old in SOURCE
    assert meaning(SOURCE.replace(old, new)) == meaning(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2 * value", "3 * value"),
        ("return twice", "return value"),
        ("value > LIMIT", "value >= LIMIT"),
        ("= 3", "= 4"),
        ("ValueError", "TypeError"),
    ],
)
def test_the_digest_depends_on_code(old: str, new: str) -> None:
    assert old in SOURCE
    assert meaning(SOURCE.replace(old, new)) != meaning(SOURCE)


def test_the_digest_is_of_what_a_method_uses_and_of_nothing_else(tmp_path: Path) -> None:
    files = {
        "scripts/experiments/lib/loop.py": "STEPS = 3\n",
        "scripts/experiments/methods/one.py": "from scripts.experiments.lib import loop\n",
        "scripts/experiments/methods/two.py": "from consolidate.ewc.penalty import Penalty\n",
        "scripts/experiments/methods/three.py": "from consolidate.estimation import fisher\n",
        "consolidate/ewc/penalty.py": "from consolidate.ewc import other\nPenalty = 1\n",
        "consolidate/ewc/other.py": "OTHER = 1\n",
        "consolidate/estimation/likelihoods.py": "LOG = 1\n",
        "consolidate/estimation/fisher.py": "FISHER = 1\n",
        "consolidate/cli.py": "CLI = 1\n",
    }

    def digests(**changes: str) -> list[str]:
        for name, text in (files | changes).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        code_digest.cache_clear()
        names = ("one", "two", "three")
        return [
            code_digest(f"scripts/experiments/methods/{name}.py", root=tmp_path) for name in names
        ]

    try:
        before = digests()
        assert digests(**{"scripts/experiments/methods/four.py": "FOUR = 4\n"}) == before
        assert digests(**{"consolidate/cli.py": "CLI = 2\n"}) == before
        loop = digests(**{"scripts/experiments/lib/loop.py": "STEPS = 4\n"})
        assert [a == b for a, b in zip(loop, before, strict=True)] == [False, True, True]
        other = digests(**{"consolidate/ewc/other.py": "OTHER = 2\n"})
        assert [a == b for a, b in zip(other, before, strict=True)] == [True, False, True]
        assert digests(**{"consolidate/estimation/fisher.py": "FISHER = 2\n"}) == before
        defined = digests(**{"consolidate/estimation/likelihoods.py": "LOG = 2\n"})
        assert [a == b for a, b in zip(defined, before, strict=True)] == [True, True, False]
    finally:
        code_digest.cache_clear()


def test_only_methods_with_a_penalty_depend_on_the_packages_of_the_penalty() -> None:
    from scripts.experiments.lib.digests import _files

    for setting, grids in GRIDS.items():
        for method in grids:
            names = tradeoff.setting_file(setting), tradeoff.method_file(method)
            files = _files(names, ROOT)
            assert "scripts/experiments/lib/tuning.py" in files
            penalized = method.startswith(("ewc", "inputs", "l2", "lora_ewc"))
            if method == "replay_generated":  # shares its texts with methods that have a penalty
                continue
            assert ("consolidate/ewc/penalty.py" in files) == penalized, method
            assert not files & {
                "scripts/experiments/lib/pages.py",
                "scripts/experiments/lib/grids.py",
                "scripts/experiments/lib/curves.py",
                "scripts/experiments/tasks/tradeoff.py",
            }


def fake(unit: tradeoff.Unit, validation: float = 0.5) -> Record:
    return Record(unit, {"validation": validation}, 1.0, {})


def test_the_rate_is_that_of_the_best_validation_score_and_the_smallest_of_equal_ones() -> None:
    search = tradeoff.searched("newsgroups", "l2", False)
    assert tradeoff.curve("newsgroups", "l2", 1, [fake(one) for one in search[:2]], False) == []
    for scores, best in (((0.5, 0.7, 0.7), 1), ((0.7, 0.1, 0.2), 0), ((0.1, 0.2, 0.3), 2)):
        records = [fake(*pair) for pair in zip(search, scores, strict=True)]
        units = tradeoff.curve("newsgroups", "l2", 1, records[::-1], False)
        assert {one.settings["rate"] for one in units} == {search[best].settings["rate"]}
        assert [one.settings["strength"] for one in units] == list(
            GRIDS["newsgroups"]["l2"].strengths
        )


def test_early_units_compare_the_main_methods() -> None:
    records: list[Record] = []
    for _ in range(2):
        done = {record.unit.digest for record in records}
        records += [fake(u) for u in tradeoff.plan("newsgroups", records, False)
                    if u.digest not in done]  # fmt: skip
    units = tradeoff.plan("newsgroups", records, False)
    assert len({one.digest for one in units}) == len(units)
    methods = [one.method for one in units]
    first = max(methods.index(name) for name in tradeoff.MAIN if name in methods)
    assert not {*methods[: first + 1]} - {*tradeoff.MAIN}
    assert [one.seed for one in units] == sorted(
        [one.seed for one in units], key=lambda seed: seed > 2
    )


def test_each_round_begins_with_lora_and_interpolation() -> None:
    records: list[Record] = []
    while new := [
        fake(u)
        for u in tradeoff.plan("newsgroups", records, False)
        if u.digest not in {record.unit.digest for record in records}
    ]:
        records += new
    methods = [
        [one.method for one in tradeoff.plan("newsgroups", records, False) if one.seed in part]
        for part in (range(3), range(3, 5))
    ]
    for some in methods:
        places = [at for at, name in enumerate(some) if name in FIRST]
        assert places == list(range(len(places)))


@pytest.mark.parametrize(("setting", "count"), [("newsgroups", 5), ("language_model", 3)])
def test_a_setting_has_as_many_seeds_as_it_can_afford(setting: str, count: int) -> None:
    [experiment] = [one for one in tradeoff.EXPERIMENTS if one.name == setting]
    units = tradeoff.sittings.all_units(experiment, [], False)
    for method in GRIDS[setting]:
        numbers = {unit.seed for unit in units if unit.method == method}
        assert numbers == set(range(3 if method in CANDIDATES else count)), method
    assert {unit.method for unit in units} == GRIDS[setting].keys()


def test_records_of_other_code_are_left_off_the_page_and_done_again(tmp_path: Path) -> None:
    experiment = tradeoff.EXPERIMENTS[0]
    [unit, *_] = experiment.plan([], False)
    other = tradeoff.Unit(
        unit.experiment, unit.method, unit.seed, {**unit.settings, "code": "0" * 16}
    )
    append_record(tmp_path / "newsgroups.jsonl", fake(other))
    seen: list[Record] = []

    def report(records: list[Record], folder: Path) -> tradeoff.Findings:
        seen.extend(records)
        return tradeoff.Findings("Nothing.", [])

    tradeoff.sittings.write_page(experiment._replace(report=report), tmp_path)
    assert seen == []
    assert "1 more, of settings tried before" in (tmp_path / "newsgroups.md").read_text()
    assert unit in tradeoff.sittings.undone(experiment, tmp_path, False)


@pytest.mark.parametrize("same", [True, False])
def test_records_of_earlier_code_are_confirmed_by_a_repeated_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    units = [tradeoff.unit("newsgroups", "free", rate, rate, 0, False) for rate in (1e-4, 3e-5)]
    path = tmp_path / "newsgroups.jsonl"
    for seconds, unit in enumerate(units):
        earlier = dataclasses.replace(unit, settings={**unit.settings, "code": "0" * 16})
        figures = {"validation": 0.5, "tuning_seconds": float(seconds)}
        append_record(path, Record(earlier, figures, 10.0 - seconds, INSTALLED))
    measured = []

    def measure(name: str, unit: tradeoff.Unit, *, raw: Path) -> dict[str, float]:
        measured.append(unit)
        return {"validation": 0.5 if same else 0.25, "tuning_seconds": 7.0}

    monkeypatch.setattr(tradeoff, "measure", measure)
    for _ in range(2):  # the second time nothing is left to repeat
        confirm_records.confirm(confirm_records.of_tradeoff("newsgroups", path), tmp_path)
    assert measured == [units[1]]  # the quickest
    records = {record.unit.digest: record for record in read_records(path)}
    assert (units[0].digest in records) == same
    assert records[units[1].digest].made_by is None
    assert len(records) == 3
    if same:
        assert records[units[0].digest].made_by == "0" * 16
        assert "1 of them were made by earlier code (0000000000000000)" in _page_text(records)


def test_a_confirmed_record_does_not_confirm_those_of_another_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = (1e-4, 3e-5, 1e-5)
    first, second, third = (
        tradeoff.unit("newsgroups", "free", rate, rate, 0, False) for rate in rates
    )
    path = tmp_path / "newsgroups.jsonl"
    made = [("1", first, 2.0), ("1", second, 1.0), ("0", first, 3.0), ("0", third, 4.0)]
    for code, unit, seconds in made:
        earlier = dataclasses.replace(unit, settings={**unit.settings, "code": code * 16})
        append_record(path, Record(earlier, {"validation": 0.5}, seconds, INSTALLED))
    measured = []

    def measure(name: str, unit: tradeoff.Unit, *, raw: Path) -> dict[str, float]:
        measured.append(unit)
        return {"validation": 0.25 if unit == third else 0.5}

    monkeypatch.setattr(tradeoff, "measure", measure)
    confirm_records.confirm(confirm_records.of_tradeoff("newsgroups", path), tmp_path)
    # Of code 1 the second is repeated, the first confirmed; code 0 needs a unit of its own.
    assert measured == [second, third]
    records = {record.unit.digest: record for record in read_records(path)}
    assert records[first.digest].made_by == "1" * 16
    assert records[third.digest].made_by is None
    assert records[third.digest].figures == {"validation": 0.25}


def test_records_of_other_versions_are_not_confirmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "newsgroups.jsonl"
    for rate, versions in ((1e-4, INSTALLED), (3e-5, {**INSTALLED, "torch": "1.0"})):
        unit = tradeoff.unit("newsgroups", "free", rate, rate, 0, False)
        earlier = dataclasses.replace(unit, settings={**unit.settings, "code": "0" * 16})
        append_record(path, Record(earlier, {"validation": 0.5}, 1.0, versions))
    before = path.read_bytes()
    monkeypatch.setattr(tradeoff, "measure", lambda *_, **__: pytest.fail("it was measured"))
    confirm_records.confirm(confirm_records.of_tradeoff("newsgroups", path), tmp_path)
    assert "code 0000000000000000 ran with other versions" in capsys.readouterr().out
    assert path.read_bytes() == before


def _page_text(records: dict[str, Record]) -> str:
    return tradeoff.sittings._earlier(list(records.values()))


def test_training_ends_where_the_loss_is_not_finite() -> None:
    model = torch.nn.Linear(1, 1)
    before = model.weight.item()
    seen = []

    def loss(model: torch.nn.Module, batch: float) -> torch.Tensor:
        seen.append(batch)
        return model(torch.ones(1, 1)).sum() * batch

    done = fit(model, iter([1.0, math.nan, 1.0]), loss, rate=0.5, steps=3)
    assert isinstance(done, Done)
    assert (done.steps, len(seen)) == (1, 2)
    # One step of Adam is one rate.
    assert model.weight.item() == pytest.approx(before - 0.5, abs=1e-6)


def test_missing_data_are_named(tmp_path: Path) -> None:
    words = argparse.Namespace(quick=False, report=False, plan=False, data_dir=None)
    experiment = tradeoff.EXPERIMENTS[0]
    with pytest.raises(SystemExit, match="--data-dir is missing"):
        tradeoff.bound(experiment, words)
    words.data_dir = tmp_path
    with pytest.raises(SystemExit, match=r"20newsgroups-train.tab.* is not there.*--only"):
        tradeoff.bound(experiment, words)
    for other in (structures, without_data):
        with pytest.raises(SystemExit, match=r"20newsgroups-train.tab(?!.*--only)"):
            other.KIND.bound(other.EXPERIMENT, words)
    words.plan = True
    assert tradeoff.bound(experiment, words) == experiment


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which starts and Fishers are kept."""
    from scripts.experiments.lib import chain_tuning, kept

    for module in (kept, chain_tuning):
        monkeypatch.setattr(module, "FOLDER", tmp_path / "kept")
    inner = tmp_path / "records"
    inner.mkdir()
    return inner


def figures(setting: str, method: str, strength: float, **settings: object) -> dict[str, Any]:
    """Measure a quick unit at one rate."""
    unit = tradeoff.unit(setting, method, 1e-3, strength, 0, True)
    changed = dataclasses.replace(unit, settings={**unit.settings, **settings})
    return tradeoff.measure(setting, changed, raw=None)


def points(setting: str, method: str, strength: float, **settings: object) -> dict[str, object]:
    return figures(setting, method, strength, **settings)["points"]


@pytest.mark.parametrize("setting", tradeoff.SETTINGS)
def test_methods_agree_where_they_are_the_same(setting: str, folder: Path) -> None:
    tried = GRIDS[setting]
    measured = figures(setting, "free", 1e-3)
    free = measured["points"]
    for method in tried.keys() & {"l2", "l2_growing", "distill", *OURS}:
        assert points(setting, method, 0.0, alphas=[1.0]) == free, method
    if "fewer_steps" in tried:
        assert points(setting, "fewer_steps", 1.0) == free
    if "lora_ewc" in tried:
        assert points(setting, "lora", 1e-3) == points(setting, "lora_ewc", 0.0)
    adapted = "lora" if "lora" in tried else "lora_convolutions"
    assert points(setting, adapted, 1e-3) != free
    if tradeoff.is_chain(setting):
        assert points(setting, "interpolation", 1.0) == free
        assert points(setting, "interpolation", 0.5) != free
    else:
        mixed = points(setting, "interpolation", 1.0, alphas=[1.0, 0.0])
        assert mixed["1"] == free["1"]
        start = measured["start"]
        assert {part: mixed["0"][part] for part in start} == start


def quick_job(setting: str, strength: float = 0.0, number: int = 2) -> Job:
    """Make a job with a model of its own, in a chain at the task of this number."""
    module = tradeoff.SETTINGS[setting]
    quick = module.Quick(Path(), 0)
    stage = quick.stage(number) if tradeoff.is_chain(setting) else quick
    return Job(stage, quick.fresh(), 1e-2, strength, quick.fresh, "")


@pytest.mark.parametrize("setting", tradeoff.SETTINGS)
def test_matrices_that_were_kept_are_of_the_parameters_that_the_library_names(setting: str) -> None:
    job = quick_job(setting)
    found = fisher_diagonal(
        job.model,
        job.setting.fisher_batches(),
        job.setting.likelihood,
        estimator=job.setting.estimator,
        structure="inputs",
    )
    assert found.blocks
    blocks = {name: block_of(name, matrix, job.model) for name, matrix in found.factors.items()}
    assert blocks == found.blocks


def test_the_matrices_of_a_chain_are_summed_with_the_trace_of_the_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, measured = [], []
    tune, measure = by_inputs.tune, tradeoff.task_block_fisher

    def watched(job: Job) -> Done:
        seen.append(block_fisher(job))
        return tune(job)

    def noted(job: Job, number: int) -> dict[str, torch.Tensor]:
        measured.append(dict(measure(job, number)))
        return measured[-1]

    monkeypatch.setattr(by_inputs, "tune", watched)
    monkeypatch.setattr(tradeoff, "task_block_fisher", noted)
    points("permutations", "inputs", 30.0)
    assert len(seen) == len(measured) == 2
    traces = [sum(one[name].sum() for name in seen[0].diagonal) for one in measured]
    for name, matrix in seen[1].factors.items():
        expected = measured[0][name] + measured[1][name] * (traces[0] / traces[1])
        torch.testing.assert_close(matrix, expected, msg=name)


@pytest.mark.parametrize("number", [1, 2])
def test_the_growing_penalty_is_that_of_lambda_times_the_tasks_before(number: int) -> None:
    jobs = [quick_job("permutations", strength, number) for strength in (0.5, 0.5 * number)]
    for job, method in zip(jobs, (by_l2_growing, by_l2), strict=True):
        method.tune(job)
    first, second = (job.model.state_dict() for job in jobs)
    start = jobs[0].start().state_dict()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        assert not torch.equal(first[name], start[name])


def test_the_floor_is_a_tenth_of_the_mean_for_every_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    job = quick_job("tagging")
    generator = torch.Generator().manual_seed(0)
    found = {
        name: torch.rand(p.shape, generator=generator) for name, p in job.model.named_parameters()
    }
    mean = torch.cat([one.flatten() for one in found.values()]).mean()
    seen = []

    class Watched(by_ewc_floor.Penalty):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            seen.append(arguments[1])
            super().__init__(*arguments, **options)

    monkeypatch.setattr(by_ewc_floor, "Penalty", Watched)
    monkeypatch.setattr(by_ewc_floor, "fisher", lambda _: found)
    by_ewc_floor.tune(job)
    for name, one in found.items():
        torch.testing.assert_close(seen[0][name], one + 0.1 * mean)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_tempered_fisher_is_that_of_softened_outputs(temperature: float) -> None:
    job = quick_job("newsgroups")
    job.setting.fisher_rows = 3
    found = tempered_fisher.measured(job, temperature)
    model = job.start().eval()
    parameters = dict(model.named_parameters())
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    [(inputs, _)] = job.setting.fisher_batches()
    for i in range(3):
        one = {key: value[i : i + 1] for key, value in inputs.items()}
        log_p = (model(**one).logits[0] / temperature).log_softmax(0)
        for outcome in log_p:
            gradients = torch.autograd.grad(
                outcome, parameters.values(), retain_graph=True, materialize_grads=True
            )
            for name, gradient in zip(parameters, gradients, strict=True):
                expected[name] += temperature**2 * outcome.detach().exp() * gradient**2 / 3
    for name, one in found.items():
        torch.testing.assert_close(one, expected[name], rtol=1e-3, atol=1e-9, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", tradeoff.SETTINGS)
def test_a_quick_run_makes_every_curve_and_its_page(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.experiments.lib import sittings

    def ends(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(dict.fromkeys((*values[:1], *values[-1:])))

    several = name in ("tagging", "text_chain")  # the quickest, one of them a chain
    few = {
        method: grid._replace(
            rates=ends(grid.rates) if several else grid.rates[:1], strengths=ends(grid.strengths)
        )
        for method, grid in GRIDS[name].items()
    }
    monkeypatch.setitem(GRIDS, name, few)
    if not several:
        monkeypatch.setattr(tradeoff, "seeds", lambda *_: 1)
    experiments = [one for one in tradeoff.EXPERIMENTS if one.name == name]
    sittings.run(experiments, folder, quick=True)
    records = read_records(folder / f"{name}.jsonl")
    # Again, with what is kept: the same figures but for times.
    unit = next(record for record in records if record.unit.method == "ewc").unit
    again = tradeoff.measure(name, unit, raw=None)
    [first] = [record.figures for record in records if record.unit == unit]
    assert rounded(again["points"]) == first["points"]
    sittings.write_pages(
        experiments, folder, quick=True, table=tradeoff.write_table, page=tradeoff.PAGE
    )
    assert f"{name}, best − " in (folder.parent / "tradeoff.md").read_text(encoding="utf-8")
    page = (folder / f"{name}.md").read_text(encoding="utf-8")
    assert (folder / f"{name}.png").exists()
    assert "its figures mean nothing" in page
    for method, title in tradeoff.pages.TITLES.items():
        base = method.removesuffix("_interpolated")
        interpolated = base != method and len(GRIDS[name][base].alphas) > 1
        shown = method in GRIDS[name] or interpolated
        assert (f"\n| {title} |" in page or f"\n| {title} (sees" in page) == shown, method
    _, _, untried = page.partition("## What was not tried")
    for method in left_out(name):
        assert tradeoff.pages.TITLES[method] in untried.replace("\n", " "), method


def test_figures_that_were_changed_by_hand_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    figures = {"old": 0.123456789, "curve": [[1, -0.0], [2, 3e-20]], "by_step": {10: 0.5}}
    append_record(file, Record(Unit("x", "ewc", 0, {}), figures, 1.0, {}))
    (record,) = read_records(file)
    assert record.figures["old"] == 0.123457
    text = file.read_text()
    file.write_text(text.replace("0.123457", "0.223457"))
    with pytest.raises(RecordsError, match="line 1: the digest of the figures is not that"):
        read_records(file)
    line = json.loads(text)
    del line["figures_digest"]  # as lines were written before
    file.write_text(json.dumps(line) + "\n")
    assert read_records(file) == [record]
