"""Fishers of language models without data: the texts, the comparison, and a quick run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.experiments.lib import kept, sittings
from scripts.experiments.lib.records import Record, append_record, read_records
from scripts.experiments.lib.running_text import packed_rows
from scripts.experiments.lib.text_sources import (
    DATA,
    GENERATED,
    OPENED,
    OTHER_DATA,
    OWN,
    PROMPTED,
    SOURCES,
    Row,
    batches_of,
    rows_of,
    source_fisher,
)
from scripts.experiments.lib.tuning import Job
from scripts.experiments.settings import language_model, small_language_model
from scripts.experiments.tasks import confirm_records, without_data


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr(kept, "FOLDER", tmp_path / "kept")
    setting = small_language_model.Quick(Path(), 3)
    return Job(setting, setting.fresh(), 0.0, 0.0, setting.fresh, "quick")


def test_rows_are_cut_without_a_rest() -> None:
    assert packed_rows([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4]]
    assert packed_rows([1, 2, 3, 4], 2) == [[1, 2], [3, 4]]
    assert packed_rows([1], 2) == []


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_has_texts_that_the_model_can_read(job: Job, source: str) -> None:
    setting: Any = job.setting
    rows = rows_of(job, source, 5)
    assert len(rows) == 5
    assert rows == rows_of(job, source, 5)
    for row in rows:
        assert row.given < len(row.tokens)
        assert all(0 <= token < setting.vocabulary for token in row.tokens)
    if source in OWN:
        starts = {
            GENERATED: [[setting.first]],
            PROMPTED: setting.prompts,
            OPENED: [setting.opening],
        }[source]
        for i, row in enumerate(rows):
            prompt = starts[i % len(starts)]
            assert row.tokens[: row.given] == prompt
            written = row.tokens[row.given :]
            assert not setting.ends & set(written[:-1])
            assert len(written) == len(setting.other[0]) - 1 or written[-1] in setting.ends


def test_other_rows_of_the_data_are_not_those_of_the_reference() -> None:
    for module in (small_language_model, language_model):
        size = module.SIZE
        setting = module.Setting.__new__(module.Setting)
        rows = [[number] for number in range(3 * size.old["train"])]
        setting.old = type(module.Quick(Path(), 0).old)(rows, [], [])
        reference = setting.spread(without_data.REFERENCE[module.NAME])
        assert len(reference) == without_data.REFERENCE[module.NAME]
        for count in without_data.COUNTS[module.NAME][OTHER_DATA]:
            others = setting.spread(count, skip=1)
            assert len(others) == count
            assert not {one[0] for one in others} & {one[0] for one in reference}


def test_padding_and_given_tokens_do_not_count(job: Job) -> None:
    rows = [Row([0, 5, 7, 9]), Row([0, 8], 1), Row([3, 4, 6, 2, 9, 9], 4)]
    [(inputs, labels)] = batches_of(rows)
    model = job.start().double().eval()
    together = model(**inputs).logits[:, :-1]
    assert (labels >= 0).sum(1).tolist() == [3, 1, 2]
    for i, row in enumerate(rows):
        alone = model(input_ids=torch.tensor([row.tokens])).logits[0, row.given - 1 : -1]
        scored = labels[i, 1:] >= 0
        torch.testing.assert_close(together[i][scored], alone)
        assert labels[i, 1:][scored].tolist() == row.tokens[row.given :]


def test_generated_texts_count_with_their_own_labels(job: Job) -> None:
    rows = rows_of(job, GENERATED, 3)
    model = job.start().double().eval()
    found = source_fisher(job, GENERATED, 3)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    tokens = 0
    for row in rows:
        ids = torch.tensor([row.tokens])
        log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        model.zero_grad()
        log_p.gather(1, ids[0, 1:, None])[row.given - 1 :].sum().backward()
        tokens += len(row.tokens) - row.given
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            expected[name] += parameter.grad**2
    assert found.keys() == expected.keys()
    for name, fisher in found.items():
        torch.testing.assert_close(fisher.double(), expected[name] / tokens, rtol=1e-4, atol=1e-9)


def test_two_fishers_are_compared() -> None:
    reference = {"a.x": torch.tensor([1.0, 0.0, 3.0]), "b.x": torch.tensor([2.0])}
    same = without_data.compared(
        {name: 2 * one for name, one in reference.items()}, reference, [("a.",), ("b.",)]
    )
    assert same["overlap"] == pytest.approx(1)
    assert same["correlation"] == pytest.approx(1)
    assert same["trace"] == pytest.approx(2)
    assert same["layers"] == pytest.approx([1, 1])
    other = {"a.x": torch.tensor([0.0, 4.0, 0.0]), "b.x": torch.tensor([2.0])}
    apart = without_data.compared(other, reference, [("a.",), ("b.",)])
    assert apart["overlap"] == pytest.approx(2 / 6)  # √(2·2) of the one, traces 6 and 6
    assert apart["layers"] == pytest.approx([0, 1])
    assert apart["correlation"] == pytest.approx(-5 / 55**0.5)


def test_a_quick_run_makes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "FOLDER", tmp_path / "kept")
    experiment, folder = without_data.EXPERIMENT, tmp_path / "records"
    sittings.run([experiment], folder, quick=True)
    sittings.write_pages([experiment], folder, quick=True, table=None, page=without_data.PAGE)
    records = read_records(folder / "without-data.jsonl")
    sources = set(SOURCES) - {DATA}
    assert {record.unit.method for record in records} == sources
    page = (folder / "without-data.md").read_text(encoding="utf-8")
    for source, title in without_data.TITLES.items():
        with_it = [counts for counts in without_data.COUNTS.values() if source in counts]
        assert page.count(f"\n| {title} |") == len(with_it) > 0
    assert sittings.undone(experiment, folder, True) == []


@pytest.mark.parametrize("same", [True, False])
def test_a_repeated_unit_confirms_those_of_as_many_texts_of_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    small = [
        unit
        for unit in without_data.plan([], quick=False)
        if unit.settings["setting"] == small_language_model.NAME and unit.settings["texts"] <= 256
    ]
    path = tmp_path / "without-data.jsonl"
    installed = sittings.installed(without_data.KIND.packages)
    for number, unit in enumerate(small):
        earlier = replace(unit, settings={**unit.settings, "code": "0" * 16})
        append_record(path, Record(earlier, {"overlap": 0.5}, 100.0 - number, installed))
    done = []

    def measure(unit: Any, *, raw: Path) -> dict[str, float]:
        done.append(unit)
        return {"overlap": 0.5 if same else 0.25}

    monkeypatch.setattr(without_data, "measure", measure)
    confirm_records.confirm(confirm_records.of_fishers(path), tmp_path)
    assert sorted(unit.settings["texts"] for unit in done) == [64, 256]
    records = {record.unit.digest: record for record in read_records(path)}
    assert {unit.digest for unit in (small if same else done)} <= records.keys()
    assert len(records.keys() & {unit.digest for unit in small}) == (len(small) if same else 2)
