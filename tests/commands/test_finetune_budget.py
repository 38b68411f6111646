"""`finetune --budget`: λ follows what held-out rows of earlier tasks lose."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consolidate.api import evaluate, finetune, fisher, show
from consolidate.commands import finetune_budget
from consolidate.commands.finetune_interpolation import Interpolator
from consolidate.runtime import signals
from formats.errors import ForgettingError, NonFiniteError, UsageError
from support.checkpoints import Write, first_task, normed
from support.command_line import run
from support.faults import break_off, kill_after, killed_and_resumed
from support.folders import contents
from support.json_schema import check_json
from support.networks import FAST, NETWORK, SIZES

COMMON: dict[str, Any] = {**FAST, "epochs": 12}


def write_turned(folder: Path, name: str, seed: int = 0, count: int = 60) -> Path:
    """Write rows of a, or of b, in which the same three clusters have other labels."""
    centres = np.random.default_rng(0).normal(size=(3, SIZES[0])) * 2
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    inputs = centres[labels] + random.normal(size=(count, SIZES[0]))
    path = folder / f"{name}.npz"
    turned = (labels + name.startswith("b")) % 3
    np.savez(path, inputs=inputs.astype(np.float32), labels=turned)
    return path


@pytest.fixture
def write_task(tmp_path: Path) -> Write:
    return partial(write_turned, tmp_path)


@pytest.fixture(scope="module")
def learned_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    return first_task(folder, write_turned(folder, "a", count=120), epochs=20, **FAST)


@pytest.fixture
def held(write_task: Write) -> Path:
    return write_task("a-held", seed=3, count=200)


def lost(before: Path, after: Path, data: Path) -> float:
    """What another command measures of the weights as they are stored."""
    start, end = (
        evaluate(folder, {"a": data}, **NETWORK)["a"]["loss"] for folder in (before, after)
    )
    return float(end) - float(start)


@pytest.mark.parametrize("budget", [0.02, 0.2])
def test_the_stored_weights_keep_the_budget(
    learned: Path, held: Path, write_task: Write, tmp_path: Path, budget: float
) -> None:
    b, out = write_task("b", seed=1, count=120), tmp_path / "out"
    free = finetune(learned, b, output_dir=tmp_path / "free", penalty="none", **COMMON)
    assert lost(learned, tmp_path / "free", held) > 2 * budget  # there is something to keep
    options = {**COMMON, "budget": budget, "validation": {"a": held}}
    found = finetune(learned, b, output_dir=out, **options)
    check_json("finetune", found)
    measured = lost(learned, out, held)
    assert 0.4 * budget < measured <= budget
    assert found["budget"] == {"nats": budget, "lost": {"a": pytest.approx(measured, rel=1e-4)}}
    path = found["budget_path"]
    assert path[0]["lost"] > budget
    assert path[0]["ewc_lambda"] > 0
    assert path[-1]["ewc_lambda"] == found["ewc_lambda"]
    assert [point["step"] for point in path] == sorted({point["step"] for point in path})
    penalties = [step["penalty"] for step in found["history"]]
    assert not any(penalties[: path[0]["step"]])
    assert all(penalties[path[0]["step"] :])
    record = show(out)["tasks"][-1]
    assert record["budget"] == found["budget"]
    assert record["ewc_lambda"] == found["ewc_lambda"]
    assert json.loads((out / "fisher" / "fisher.json").read_text())["version"] == 2
    again = finetune(learned, b, output_dir=out, **options)
    check_json("finetune", again)
    assert (again["status"], again["budget"]) == ("cached", found["budget"])
    assert finetune(learned, b, output_dir=tmp_path / "once", **options)["steps"] == free["steps"]
    assert contents(tmp_path / "once") == contents(out)


def test_what_never_costs_so_much_is_trained_without_a_penalty(
    learned: Path, held: Path, write_task: Write, tmp_path: Path
) -> None:
    b = write_task("b", seed=1)
    finetune(learned, b, output_dir=tmp_path / "free", ewc_lambda=0.0, **COMMON)
    options = {**COMMON, "budget": 100.0, "validation": {"a": held}}
    found = finetune(learned, b, output_dir=tmp_path / "out", **options)
    assert (found["ewc_lambda"], found["budget_path"]) == (0.0, [])
    assert found["interpolation"] is None
    weights = [tmp_path / name / "model.safetensors" for name in ("free", "out")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_no_lambda_holds_ends_between_start_and_end(
    learned: Path, held: Path, write_task: Write, tmp_path: Path
) -> None:
    """The steps are too large for any λ, so that the α at the end has to keep the budget."""
    b = write_task("b", seed=1, count=120)
    options = {**COMMON, "penalty": "l2", "freeze": ["2.*"], "validation": {"a": held}}
    options |= {"learning_rate": 0.3, "lr_scheduler": "constant"}
    found = finetune(learned, b, output_dir=tmp_path / "out", budget=0.001, **options)
    assert found["interpolation"]["alpha"] < 1
    assert found["interpolation"]["method"] == "plain"
    tried = [point["alpha"] for point in found["interpolation"]["curve"]]
    assert tried == sorted(tried)
    assert {0.0, found["interpolation"]["alpha"], 1.0} <= {*tried}
    assert lost(learned, tmp_path / "out", held) <= 0.001
    assert "alpha_search" not in found


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "l2": {"penalty": "l2"},
    "proximal": {"penalty_step": "proximal", "optimizer": "sgd", "learning_rate": 0.1},
    "an adapter": {"lora_rank": 2, "lora_targets": ["last"]},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_is_killed_anywhere_resumes_to_the_same_bytes(
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    way: str,
) -> None:
    old, new = write_task("old"), write_task("b", seed=1, count=120)
    held = write_task("held", seed=3, count=150)
    start = normed(tmp_path / "normed", old)
    options = {**FAST, "model": "support.networks:Network", "epochs": 3, "save_every_minutes": 0}
    options |= {"budget": 0.004, "validation": {"old": held}, "evaluate": {"test": new}}
    options |= WAYS[way]
    whole = finetune(start, new, output_dir=tmp_path / "whole", **options)
    assert whole["budget_path"]
    measure = finetune_budget.Controller._lost

    def stop_measuring() -> None:
        """Stop at the second measurement."""
        calls: list[int] = []

        def broken(self: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                monkeypatch.setattr(finetune_budget.Controller, "_lost", measure)
                raise signals.Terminated
            return measure(self)

        monkeypatch.setattr(finetune_budget.Controller, "_lost", broken)

    kills = [partial(break_off, monkeypatch, 1), stop_measuring]
    kills += [partial(break_off, monkeypatch, 5), stop_measuring]
    kills += [partial(kill_after, monkeypatch, 32)]
    command = partial(finetune, start, new, output_dir=tmp_path / "killed", **options)
    resumed = killed_and_resumed(command, tmp_path / "killed", caplog, *kills)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    for key in ("budget", "budget_path", "ewc_lambda", "interpolation"):
        assert resumed[key] == whole[key]
    assert not list(tmp_path.glob(".killed*"))


def test_matrices_are_followed_too(
    learned: Path, held: Path, write_task: Write, tmp_path: Path
) -> None:
    fisher(
        learned, write_task("a", count=120), task="a", structure="inputs", overwrite=True, **NETWORK
    )
    b = write_task("b", seed=1, count=120)
    options = {**COMMON, "budget": 0.05, "validation": {"a": held}, "structure": "inputs"}
    found = finetune(learned, b, output_dir=tmp_path / "out", **options)
    assert found["budget_path"]
    assert lost(learned, tmp_path / "out", held) <= 0.05


def over_budget(held: Path, **options: Any) -> dict[str, Any]:
    """Options with steps so large that nothing on the way keeps the budget."""
    given = {**COMMON, "penalty": "l2", "validation": {"a": held}, "learning_rate": 0.3}
    return {**given, "budget": 1e-6, **options}


def test_where_only_the_start_keeps_the_budget_nothing_is_written(
    learned: Path,
    held: Path,
    write_task: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    b = write_task("b", seed=1, count=120)
    before = contents(tmp_path)
    message = r"b cannot be learned within --budget 1e-06: even with α = 0\.0078125 .* a \+.* nats"
    with pytest.raises(ForgettingError, match=message) as caught:
        finetune(learned, b, output_dir=tmp_path / "out", **over_budget(held))
    assert caught.value.result is None
    assert contents(tmp_path) == before
    words = ["finetune", learned, "--data", b, "--output-dir", tmp_path / "out", "--json"]
    words += ["--model", NETWORK["model"], "--budget", "1e-6", "--penalty", "l2"]
    words += ["--validation", f"a={held}", "--learning-rate", "0.3", "--optimizer", "adam"]
    words += ["--epochs", "12", "--metrics", tmp_path / "metrics.json"]
    code, out, err = run(capsys, *words)
    assert code == 5
    assert "error: b cannot be learned within --budget 1e-06" in err
    assert json.loads(out)["exit_code"] == 5
    assert contents(tmp_path) == before


def test_a_new_head_is_learned_even_where_only_the_start_keeps_the_budget(
    learned: Path,
    held: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    b, out = write_task("b", seed=1, count=120), tmp_path / "out"
    keep_at_most(monkeypatch, 0.0)
    found = finetune(learned, b, output_dir=out, **over_budget(held, head="new"))
    assert found["interpolation"]["alpha"] == 0
    assert found["budget"]["lost"] == {"a": 0.0}
    assert [point["alpha"] for point in found["interpolation"]["curve"]][:2] == [0, 1 / 128]
    assert evaluate(out, {"b": b}, **NETWORK)["b"]["accuracy"] > 0.4


def test_new_outputs_that_old_tasks_share_can_exceed_a_budget_at_the_start(
    learned: Path,
    held: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    b, out = write_task("b", seed=1, count=120), tmp_path / "out"
    keep_at_most(monkeypatch, -1.0)  # what was measured at α = 0 counts too
    with pytest.raises(ForgettingError, match="even with α = 0 of the way"):
        finetune(learned, b, output_dir=out, **over_budget(held, head="new"))
    assert not out.exists()


def keep_at_most(monkeypatch: pytest.MonkeyPatch, most: float) -> None:
    """Let no larger α keep the budget."""
    tried = Interpolator._tried

    def kept(self: Interpolator) -> list[tuple[float, bool]]:
        return [(alpha, keeps and alpha <= most) for alpha, keeps in tried(self)]

    monkeypatch.setattr(Interpolator, "_tried", kept)


def test_another_budget_or_other_rows_are_another_result(
    learned: Path, held: Path, write_task: Write, tmp_path: Path
) -> None:
    b, out = write_task("b", seed=1), tmp_path / "out"
    options = {**COMMON, "output_dir": out, "overwrite": True}
    finetune(learned, b, budget=0.1, validation={"a": held}, **options)
    assert finetune(learned, b, budget=0.2, validation={"a": held}, **options)["status"] == "done"
    other = write_task("a-other", seed=5)
    assert finetune(learned, b, budget=0.2, validation={"a": other}, **options)["status"] == "done"


def test_the_smallest_budget_is_kept_and_what_is_lost_is_told_in_nats(
    learned: Path,
    held: Path,
    write_task: Write,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "consolidate")
    options = {**COMMON, "budget": 1e-320, "validation": {"a": held}}
    found = finetune(learned, write_task("b", seed=1), output_dir=tmp_path / "out", **options)
    assert found["budget"]["lost"]["a"] <= 0
    [told] = re.findall(r"α = 1: a ([-+].*) nats", caplog.text)
    assert (float(told) <= 0) == (found["interpolation"] is None)


def test_training_that_diverges_within_a_budget_says_so(
    learned: Path, held: Path, write_task: Write, tmp_path: Path
) -> None:
    options = {**COMMON, "budget": 0.02, "validation": {"a": held}, "learning_rate": 1e38}
    options |= {"optimizer": "sgd"}
    message = r"step \d+.*lower --learning-rate"
    with pytest.raises(NonFiniteError, match=message):
        finetune(learned, write_task("b", seed=1), output_dir=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("budget", [0, -0.1, float("nan"), float("inf")])
def test_a_budget_is_above_0(learned: Path, tmp_path: Path, budget: float) -> None:
    with pytest.raises(UsageError, match=r"--budget .*: expected a finite number above 0"):
        finetune(learned, "b", output_dir=tmp_path / "out", budget=budget, **COMMON)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ewc_lambda": 10.0}, "--budget cannot be combined with --ewc-lambda"),
        ({"ewc_lambda": "auto"}, "--budget cannot be combined with --ewc-lambda"),
        ({"penalty": "none"}, "--budget cannot be combined with --penalty none"),
        ({"interpolate": 0.5}, "--budget cannot be combined with --interpolate"),
        ({"interpolate": "auto"}, "--budget cannot be combined with --interpolate"),
        ({"norm_statistics": "update"}, "--budget cannot be combined with --norm-statistics"),
        ({"shard": True}, "--budget cannot be combined with --shard"),
        ({"select": "largest"}, "--budget cannot be combined with --select or --search-plot"),
        ({"compare_none": True}, "--budget cannot be combined with --compare-none"),
        ({"interpolation": "fisher"}, "--interpolation fisher needs --interpolate"),
        ({"validation": None}, r"needs held-out rows of an earlier task: .* one of a$"),
        ({"validation": "new"}, r"needs held-out rows of an earlier task: .* one of a$"),
        ({"validation": "both"}, "--validation b: --budget measures earlier tasks only"),
        ({"evaluate": "same"}, "cannot be chosen on training or --evaluate data"),
    ],
)
def test_wrong_use_is_refused(
    learned: Path,
    held: Path,
    write_task: Write,
    tmp_path: Path,
    options: dict[str, Any],
    message: str,
) -> None:
    b, b_held = write_task("b", seed=1), write_task("b-held", seed=2)
    named = {
        "new": {"b": b_held},
        "both": {"a": held, "b": b_held},
        "same": {"a": held},
        None: None,
    }
    given: dict[str, Any] = {"validation": {"a": held}} | options
    for key in ("validation", "evaluate"):
        if not isinstance(given.get(key), dict):
            given[key] = named[given.get(key)]
    with pytest.raises(UsageError, match=message):
        finetune(learned, b, output_dir=tmp_path / "out", budget=0.1, **COMMON, **given)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_checkpoint_without_earlier_tasks_is_refused(
    network_checkpoint: Path, held: Path, write_task: Write, tmp_path: Path
) -> None:
    options = {**COMMON, "penalty": "l2", "budget": 0.1}
    with pytest.raises(UsageError, match="--budget needs earlier tasks, and the checkpoint has no"):
        finetune(network_checkpoint, write_task("b"), output_dir=tmp_path / "out", **options)


def test_the_command_line_prints_what_was_lost_of_the_budget(
    learned: Path,
    held: Path,
    write_task: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["finetune", learned, "--data", write_task("b", seed=1, count=120)]
    words += ["--output-dir", tmp_path / "out", "--model", NETWORK["model"], "--budget", "0.05"]
    words += ["--validation", f"a={held}", "--learning-rate", "0.01", "--epochs", "12"]
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert "old loss on held-out rows, mean nats: +0.0" in out
    assert "of a budget of 0.05" in out
    assert "not measured" not in out
    code, out, _ = run(capsys, "show", tmp_path / "out")
    assert "at the end, for a budget of 0.05 nats" in out
