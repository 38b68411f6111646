"""`finetune --dry-run` tells what a training would take, refuses what it would, writes nothing."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import consolidate
from consolidate.commands import finetune_cost
from formats.errors import InputError, UsageError
from support.command_line import run
from support.faults import Killed, break_off
from support.folders import contents
from support.json_schema import check_json
from support.networks import FAST, NETWORK

Write = Callable[..., Path]


@pytest.fixture
def learned(network_checkpoint: Path, write_task: Write) -> Path:
    consolidate.fisher(network_checkpoint, write_task("old"), **NETWORK)
    return network_checkpoint


def dry(start: Path, data: Path, **options: Any) -> Any:
    given = {"output_dir": start.parent / "out", "ewc_lambda": 2.0, "dry_run": True, **FAST}
    found = consolidate.finetune(start, data, **given | options)
    check_json("finetune", found)
    return found


def test_it_tells_what_the_training_does_and_writes_nothing(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    new = write_task("new", seed=1)
    before = contents(tmp_path)
    found = dry(learned, new, epochs=3, task="b", max_examples=50)
    assert contents(tmp_path) == before
    done = consolidate.finetune(
        learned, new, output_dir=tmp_path / "out", ewc_lambda=2.0, epochs=3, max_examples=50, **FAST
    )
    assert (found["status"], found["task"], found["old_tasks"]) == ("dry run", "b", ["old"])
    assert (found["penalty"], found["ewc_lambda"]) == ("ewc", 2.0)
    assert (found["examples"], found["steps"], found["parameters"]) == (50, done["steps"], 83)
    size = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*.safetensors"))
    assert size <= found["output_bytes"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ewc_lambda": [1.0, 2.0]}, (None, 83, 12 * 83)),
        ({"lora_rank": 1, "lora_targets": ["0"]}, (2.0, 14, 12 * (83 + 14))),
        ({"penalty": "none", "ewc_lambda": None, "freeze": ["2.*"]}, (None, 56, 4 * 83 + 8 * 56)),
        ({"no_fisher": True}, (2.0, 83, None)),
    ],
)
def test_what_is_trained_and_measured_and_how_it_is_held(
    learned: Path, write_task: Write, options: dict[str, Any], told: tuple[Any, ...]
) -> None:
    found = dry(learned, write_task("new", seed=1), **options)
    assert (found["ewc_lambda"], found["parameters"], found["fisher_memory"]) == told


def test_examples_that_choose_alpha_are_not_trained_on(learned: Path, write_task: Write) -> None:
    new = write_task("new", seed=1)
    held_out = dry(learned, new, interpolate="auto")
    assert held_out["examples"] < dry(learned, new)["examples"]


def test_few_steps_are_taken(
    learned: Path, write_task: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    whole = finetune_cost.descend

    def counted(*arguments: Any, **options: Any) -> Any:
        steps = whole(*arguments, **options)
        taken.append(len(steps))
        return steps

    monkeypatch.setattr(finetune_cost, "descend", counted)
    new = write_task("new", seed=1)
    assert [dry(learned, new, epochs=n)["steps"] for n in (30, 1)] == [120, 4]
    assert dry(learned, new, max_steps=1)["steps"] == 1
    assert taken == [4, 4, 1]


def test_what_training_would_refuse_is_refused(
    learned: Path, write_task: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "consolidate")
    new = write_task("new", seed=1)
    with pytest.raises(InputError, match="nowhere"):
        dry(learned, tmp_path / "nowhere.npz")
    with pytest.raises(UsageError, match="--fisher-mc-samples cannot be combined with"):
        dry(learned, new, fisher_mc_samples=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert dry(learned, new)["status"] == "dry run"
    assert "without --dry-run this would be refused, unless it is up to date: " in caplog.text


def test_data_to_measure_that_are_missing_are_refused(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    b, c, start = write_task("b", seed=1), write_task("c", seed=2), tmp_path / "b0"
    given: dict[str, Any] = {"ewc_lambda": 2.0, "no_fisher": True, **FAST}
    consolidate.finetune(learned, b, output_dir=start, **given)
    assert dry(start, c, measure={"b": b})["old_tasks"] == ["old", "b"]
    with pytest.raises(InputError, match="nowhere"):
        dry(start, c, measure={"b": tmp_path / "nowhere.npz"})


def test_saved_progress_of_another_run_is_reported(
    learned: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "consolidate")
    new = write_task("new", seed=1)
    given = {"output_dir": tmp_path / "out", "ewc_lambda": 2.0, **FAST}
    break_off(monkeypatch, 2)
    with pytest.raises(Killed):
        consolidate.finetune(learned, new, **given, save_every_minutes=0)
    before = contents(tmp_path)
    dry(learned, new)
    dry(learned, new, epochs=9, restart=True)
    assert "refused" not in caplog.text
    dry(learned, new, epochs=9)
    assert re.search(
        r"this would be refused, .*another run \(changed: epochs .* → 9\)", caplog.text
    )
    assert contents(tmp_path) == before


def test_the_command_line_prints_it(
    learned: Path, write_task: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", learned, "--data", write_task("new", seed=1), "--ewc-lambda", "auto"]
    words += ["--output-dir", tmp_path / "out", "--model", NETWORK["model"], "--dry-run"]
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert "examples     60 of 'new'\npenalty      ewc, λ to be chosen, for old\n" in out
    assert " in the first steps\nFisher       then takes at least 0.00 GB; --no-fisher " in out
    assert "nothing was written" in out
    assert not (tmp_path / "out").exists()
