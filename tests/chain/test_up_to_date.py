"""The same command on an output that is there, whole and made from the same, does nothing."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import consolidate
from consolidate.commands import finetune as finetune_command
from consolidate.commands import finetune_output
from consolidate.commands import fisher as fisher_command
from consolidate.commands import merge as merge_command
from formats.errors import InputError, UsageError
from formats.fisher_folder import read_fisher
from support.checkpoints import Write
from support.command_line import run
from support.folders import contents, flip
from support.json_schema import check_json
from support.networks import FAST, NETWORK


@pytest.fixture
def nothing_written(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on nothing may be computed or put in place."""

    def forbid() -> None:
        def forbidden(*arguments: Any, **options: Any) -> None:
            raise AssertionError("something is done")

        for module in (fisher_command, finetune_command):
            monkeypatch.setattr(module, "measure_fisher", forbidden)
        for module in (fisher_command, finetune_output, merge_command):
            monkeypatch.setattr(module, "replace_folder", forbidden)
        monkeypatch.setattr(finetune_command, "train", forbidden)

    return forbid


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["beside the weights", "in a folder of its own", "added"])
def test_a_fisher_is_measured_once(
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
    nothing_written: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
    place: str,
) -> None:
    options: dict[str, Any] = {**NETWORK, "estimator": "mc", "max_examples": 40}
    if place == "in a folder of its own":
        options["output_dir"] = tmp_path / "out"
    elif place == "added":
        consolidate.fisher(network_checkpoint, write_task("first", seed=5), **NETWORK)
        options["add"] = True
    data = write_task("old")
    done = consolidate.fisher(network_checkpoint, data, **options)
    before = times(tmp_path)
    caplog.set_level("INFO", "consolidate")
    nothing_written()
    again = consolidate.fisher(network_checkpoint, data, **options)
    assert times(tmp_path) == before
    assert again["status"] == "cached"
    assert "is up to date: nothing to do" in caplog.text
    known = ("checkpoint", "fisher", "task", "weight", "merge_rule", "gamma", "estimator")
    known += ("examples", "units", "parameters")
    assert {name: again[name] for name in known} == {name: done[name] for name in known}
    assert again["trace"] == pytest.approx(done["trace"], rel=1e-6)
    check_json("fisher", again)


def test_another_fisher_is_refused_as_before(network_checkpoint: Path, write_task: Write) -> None:
    data = write_task("old")
    consolidate.fisher(network_checkpoint, data, **NETWORK)
    before = contents(network_checkpoint)
    for changed in ({"seed": 1}, {"task": "other"}, {"batch_size": 5}, {"freeze": ["0.*"]}):
        with pytest.raises(InputError, match="already exists: --overwrite replaces it"):
            consolidate.fisher(network_checkpoint, data, **NETWORK, **changed)
    write_task("old", seed=3)
    with pytest.raises(InputError, match="already exists"):
        consolidate.fisher(network_checkpoint, data, **NETWORK)
    assert contents(network_checkpoint) == before
    with pytest.raises(UsageError, match="--add cannot be combined with --overwrite"):
        consolidate.fisher(network_checkpoint, data, **NETWORK, add=True, overwrite=True)


def test_with_a_check_it_is_measured_again(network_checkpoint: Path, write_task: Write) -> None:
    data = write_task("old")
    consolidate.fisher(network_checkpoint, data, **NETWORK)
    with pytest.raises(InputError, match="already exists: --overwrite replaces it"):
        consolidate.fisher(network_checkpoint, data, **NETWORK, check=True)
    checked: dict[str, Any] = {**NETWORK, "check": True, "overwrite": True}
    assert consolidate.fisher(network_checkpoint, data, **checked)["status"] == "done"
    assert consolidate.fisher(network_checkpoint, data, **checked)["status"] == "cached"


def test_a_fine_tuning_is_done_once(
    network_checkpoint: Path, write_task: Write, tmp_path: Path, nothing_written: Callable[[], None]
) -> None:
    old, new, out = write_task("old"), write_task("new", seed=1), tmp_path / "out"
    consolidate.fisher(network_checkpoint, old, **NETWORK)
    options: dict[str, Any] = {**FAST, "output_dir": out, "ewc_lambda": 10.0}
    options |= {"evaluate": {"old": old, "new": new}}
    done = consolidate.finetune(network_checkpoint, new, **options)
    before = times(tmp_path)
    (network_checkpoint / "LICENSE").touch()
    with pytest.raises(InputError, match="is not empty"):
        consolidate.finetune(network_checkpoint, new, **options, epochs=2)
    shutil.rmtree(out)
    again = consolidate.finetune(network_checkpoint, new, **options, log_every=1)
    unlike = {name: again[name] for name in ("history", "seconds")}
    assert again == {**done, **unlike}
    assert times(out) != before
    before = times(tmp_path)
    nothing_written()
    for way in ({}, {"overwrite": True}, {"log_every": 3, "save_every_minutes": 0.0}):
        again = consolidate.finetune(network_checkpoint, new, **options, **way)
        assert again["status"] == "cached"
        for name in ("checkpoint", "penalty", "ewc_lambda", "metrics"):
            assert again[name] == done[name]
        check_json("finetune", again)
    assert times(tmp_path) == before


@pytest.mark.parametrize("what", ["fisher/fisher.safetensors", "model.safetensors"])
def test_a_damaged_output_is_not_taken_for_whole(
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    options: dict[str, Any] = {**FAST, "output_dir": tmp_path / "out", "penalty": "none"}
    new = write_task("new")
    consolidate.finetune(network_checkpoint, new, **options)
    whole = contents(tmp_path / "out")
    flip(tmp_path / "out" / what)
    caplog.set_level("INFO", "consolidate")
    with pytest.raises(InputError, match="is not empty"):
        consolidate.finetune(network_checkpoint, new, **options)
    assert "has the same inputs but is damaged, and is not reused: " in caplog.text
    assert consolidate.finetune(network_checkpoint, new, **options, overwrite=True)["status"] == (
        "done"
    )
    assert contents(tmp_path / "out") == whole


def test_what_was_kept_of_it_is_thrown_away(
    network_checkpoint: Path, write_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the process was killed between putting the output in place and that."""
    new, out = write_task("new"), tmp_path / "out"
    options: dict[str, Any] = {
        **FAST,
        "output_dir": out,
        "penalty": "none",
        "save_every_minutes": 0,
    }
    with monkeypatch.context() as patch:
        patch.setattr(consolidate.chain.resume, "remove_partial", lambda *where: None)
        consolidate.finetune(network_checkpoint, new, **options)
    assert list(tmp_path.glob(".out*"))
    assert consolidate.finetune(network_checkpoint, new, **options)["status"] == "cached"
    assert not list(tmp_path.glob(".out*"))


def test_without_the_datas_digest_nothing_is_cached(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    options: dict[str, Any] = {**FAST, "output_dir": tmp_path / "out", "penalty": "none"}
    new = write_task("new")
    consolidate.finetune(network_checkpoint, new, **options, data_digest=False)
    ledger = read_fisher(tmp_path / "out" / "fisher").ledger
    assert ledger.tasks[0].made_from is None
    with pytest.raises(InputError, match="is not empty"):
        consolidate.finetune(network_checkpoint, new, **options, data_digest=False)


def test_a_merge_is_done_once(network_checkpoint: Path, write_task: Write, tmp_path: Path) -> None:
    parts = []
    for seed, name in enumerate("ab"):
        parts.append(tmp_path / name)
        consolidate.finetune(
            network_checkpoint, write_task(name, seed=seed), output_dir=parts[-1], penalty="none",
            **FAST,
        )  # fmt: skip
    out = tmp_path / "out"
    done = consolidate.merge(parts, output_dir=out)
    before = times(out)
    again = consolidate.merge(parts, output_dir=out)
    assert times(out) == before
    assert again == {**done, "status": "cached", "trace": again["trace"]}
    assert again["trace"] == pytest.approx(done["trace"], rel=1e-6)
    check_json("merge", again)
    with pytest.raises(InputError, match="is not empty"):
        consolidate.merge(parts, output_dir=out, weights=[1.0, 2.0])
    with pytest.raises(InputError, match="is not empty"):
        consolidate.merge(parts[::-1], output_dir=out)
    whole = contents(out)
    assert consolidate.merge(parts, output_dir=out, overwrite=True)["status"] == "cached"
    assert times(out) == before
    shutil.rmtree(out)
    assert consolidate.merge(parts, output_dir=out)["status"] == "done"
    assert contents(out) == whole
    # The merge says what it was made from, not what its last task was.
    options: dict[str, Any] = {**FAST, "output_dir": out, "penalty": "none"}
    with pytest.raises(InputError, match="is not empty"):
        consolidate.finetune(network_checkpoint, tmp_path / "b.npz", **options)


def test_the_command_says_so(
    capsys: pytest.CaptureFixture[str], network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    words = ("finetune", network_checkpoint, "--data", write_task("new"), "--penalty", "none")
    words += ("--model", NETWORK["model"], "--output-dir", tmp_path / "out")
    metrics = tmp_path / "metrics.json"
    code, _, _ = run(capsys, *words)
    assert code == 0
    code, text, err = run(capsys, *words, "--metrics", metrics)
    assert code == 0
    assert f"{tmp_path / 'out'}: up to date, nothing to do\n" in text
    assert "exact Fisher of 'new' over 60 examples" in text
    assert "is up to date: nothing to do" in err
    assert metrics.exists()
    code, text, _ = run(capsys, *words, "--json")
    assert json.loads(text)["status"] == "cached"
    code, text, _ = run(capsys, *words, "--json", "--overwrite")
    assert json.loads(text)["status"] == "cached"
    assert os.listdir(tmp_path / "out")
