"""What a run forgets, and what it would forget without a penalty."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from consolidate.api import finetune, report
from consolidate.commands import finetune_run
from consolidate.views.text import comparison_text, finetune_text, points, score_text
from formats.errors import InputError, NonFiniteError, UsageError
from support.checkpoints import Write, first_task, write_clusters
from support.command_line import MODEL, run
from support.faults import Killed, break_off, kill_after
from support.folders import contents
from support.networks import FAST
from support.together import ended, started

COMMON = {"ewc_lambda": 100.0, "epochs": 3, **FAST}


@pytest.fixture(scope="module")
def learned_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    return first_task(folder, write_clusters(folder, "a"), epochs=20, **FAST)


def compared(learned: Path, out: Path, write_task: Write, **options: Any) -> Any:
    a, b = write_task("a"), write_task("b", seed=1)
    settings = {**COMMON, "evaluate": {"a": a, "b": b}, "compare_none": True, **options}
    return finetune(learned, b, output_dir=out, **settings)


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cut short": {"max_steps": 5, "epochs": None},
    "an adapter": {"lora_rank": 2, "lora_targets": ["0"], "learning_rate": 0.05},
    "a limit": {"max_forgetting": 1.0},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_run_without_a_penalty_is_that_of_penalty_none(
    learned: Path, write_task: Write, tmp_path: Path, way: str
) -> None:
    result = compared(learned, tmp_path / "both", write_task, **WAYS[way])
    alone = compared(learned, tmp_path / "alone", write_task, compare_none=False, **WAYS[way])
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")
    free = {"penalty": "none", "ewc_lambda": None, "compare_none": False}
    without = compared(learned, tmp_path / "free", write_task, **WAYS[way], **free)
    comparison = result["comparison"]
    for task, values in without["metrics"]["after"].items():
        assert comparison["without_penalty"][task] == pytest.approx(values, rel=1e-5)
    assert comparison["with_penalty"] == alone["metrics"]["after"]
    assert comparison["before"] == alone["metrics"]["before"]
    assert (comparison["new_task"], comparison["old_tasks"]) == ("b", ["a"])
    assert "comparison" not in alone
    after = alone["metrics"]["after"]["a"]["score"]
    assert result["forgotten"] == alone["forgotten"]
    assert result["forgotten"]["a"]["after"] == after
    if way == "plain":
        kept, free = (comparison[f"{run_}_penalty"]["a"] for run_ in ("with", "without"))
        assert kept["loss"] < free["loss"]


def test_what_is_printed(learned: Path, write_task: Write, tmp_path: Path) -> None:
    result = compared(learned, tmp_path / "out", write_task)
    *_, lost, without, saved = finetune_text(result).splitlines()
    shape = r"a \d+\.\d → \d+\.\d \([+−]?\d+\.\d points\)"
    assert re.fullmatch(f"old tasks: {shape}", lost)
    assert re.fullmatch(f"without a penalty: {shape}", without)
    assert re.fullmatch(r"the penalty saved \d+\.\d points of a", saved)
    again = compared(learned, tmp_path / "out", write_task)
    assert again["status"] == "cached"
    assert finetune_text(again).splitlines()[-1] == lost
    result["comparison"]["without_penalty"] = None
    assert comparison_text(result["comparison"]) == ["without a penalty: training diverged"]


def test_scores_that_are_no_accuracy_are_not_in_points() -> None:
    assert score_text(-2.25, {"loss": 2.25}) == "−2.250"
    assert points(-0.5, {"loss": 2.25}, sign=True) == "−0.500"
    assert points(0.0421, {"accuracy": 0.5}, sign=True) == "+4.2 points"


def test_a_score_that_is_minus_the_loss_is_printed_as_the_loss() -> None:
    def on(loss: float) -> dict[str, Any]:
        return {"lm": {"loss": loss, "score": -loss}, "bench": {"score": 0.5}}

    comparison: Any = {
        "old_tasks": ["lm", "bench"],
        "measured": "--evaluate",
        "before": on(1.374),
        "with_penalty": on(1.333),
        "without_penalty": on(1.5),
    }
    without, saved = comparison_text(comparison)
    unchanged = "bench 0.500 → 0.500 (0.000)"
    assert without == f"without a penalty: loss of lm 1.374 → 1.500 (+0.126), {unchanged}"
    assert saved == "the penalty saved 0.167 in the loss of lm, 0.000 of bench"


def test_nothing_is_said_without_data_of_an_old_task(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    b = write_task("b", seed=1)
    result = finetune(learned, b, output_dir=tmp_path / "out", evaluate={"b": b}, **COMMON)
    assert result["forgotten"] == {}
    assert "old tasks" not in finetune_text(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"evaluate": {"b": "b.npz"}},
            "--compare-none needs test data of an old task: .* one of a",
        ),
        ({"evaluate": None}, "--compare-none needs test data of an old task"),
        ({"penalty": "none", "ewc_lambda": None}, "--compare-none cannot be combined with --pen"),
        ({"interpolate": 0.5}, "--compare-none cannot be combined with --interpolate"),
        ({"shard": True}, "--compare-none cannot be combined with --shard"),
    ],
)
def test_wrong_use_is_refused(
    learned: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        compared(learned, tmp_path / "out", write_task, **options)
    assert not (tmp_path / "out").exists()


def test_without_a_ledger_the_way_on_is_named(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"no ledger: run `consolidate fisher` on it first$"):
        compared(network_checkpoint, tmp_path / "out", write_task, penalty="l2")


def test_a_run_that_has_begun_without_the_comparison_keeps_its_progress(
    learned: Path, write_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = tmp_path / "out", {"save_every_minutes": 0}
    break_off(monkeypatch, 5)
    with pytest.raises(Killed):
        compared(learned, out, write_task, compare_none=False, **options)
    saved = (tmp_path / ".out.consolidate-partial").read_bytes()
    with pytest.raises(InputError, match="without --compare-none: leave it out to resume"):
        compared(learned, out, write_task, **options)
    assert (tmp_path / ".out.consolidate-partial").read_bytes() == saved
    assert "comparison" in compared(learned, out, write_task, restart=True)


@pytest.mark.parametrize("restarts", ["with the comparison", "without it"])
def test_killed_in_either_training_it_resumes_to_the_same_bytes(
    learned: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
    restarts: str,
) -> None:
    out, options = tmp_path / "killed", {"save_every_minutes": 0, "fisher_batch_size": 2}
    whole = compared(learned, tmp_path / "whole2", write_task, fisher_batch_size=2)
    caplog.set_level("INFO", "consolidate")
    break_off(monkeypatch, 5)
    with pytest.raises(Killed):
        compared(learned, out, write_task, **options)
    if restarts == "without it":
        result = compared(learned, out, write_task, compare_none=False, **options)
        assert "comparison" not in result
        assert not [m for m in caplog.messages if m.startswith("resuming")]
    else:
        caplog.clear()
        whole_run = finetune_run.training_steps
        trained: list[int] = []

        def counted(*arguments: Any, **settings: Any) -> Any:
            for step in whole_run(*arguments, **settings):
                trained.append(step.step)
                yield step
                if len(trained) == 12:  # 7 left of the first training, 5 of the second
                    raise Killed

        monkeypatch.setattr(finetune_run, "training_steps", counted)
        with pytest.raises(Killed):
            compared(learned, out, write_task, **options)
        assert trained == [*range(6, 13), *range(1, 6)]
        monkeypatch.setattr(finetune_run, "training_steps", whole_run)
        kill_after(monkeypatch, 40)
        with pytest.raises(Killed):
            compared(learned, out, write_task, **options)
        resumed = [m for m in caplog.messages if m.startswith("resuming from")]
        assert resumed == ["resuming from step 5 of 12"] * 2
        caplog.clear()
        result = compared(learned, out, write_task, **options)
        assert "training without a penalty, for comparison" not in caplog.messages
        assert result["comparison"] == whole["comparison"]
    assert contents(out) == contents(tmp_path / "whole2")
    assert result["metrics"] == whole["metrics"]
    assert not list(tmp_path.glob(".killed*"))


def test_one_that_diverges_is_reported(
    learned: Path, write_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finetune_run.training_steps

    def broken(*arguments: Any, penalty: Any, **settings: Any) -> Any:
        if penalty is None:
            raise NonFiniteError("the loss is nan")
        return whole(*arguments, penalty=penalty, **settings)

    monkeypatch.setattr(finetune_run, "training_steps", broken)
    result = compared(learned, tmp_path / "out", write_task)
    assert result["comparison"]["without_penalty"] is None
    compared(learned, tmp_path / "alone", write_task, compare_none=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result))
    report(tmp_path / "out", output=tmp_path / "r.html", comparison=file)
    assert "<td>diverged</td>" in (tmp_path / "r.html").read_text()


def test_beside_a_search_the_whole_run_is_compared(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    held = {"a": write_task("held", count=40)}
    options = {"ewc_lambda": (0.0, 100.0), "validation": held}
    result = compared(learned, tmp_path / "out", write_task, **options)
    alone = compared(learned, tmp_path / "alone", write_task, ewc_lambda=result["ewc_lambda"])
    assert result["comparison"] == alone["comparison"]


def test_the_report_shows_both(
    learned: Path, write_task: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, out = write_task("a"), write_task("b", seed=1), tmp_path / "out"
    code, printed, err = run(
        capsys, "finetune", learned, "--data", b, "--output-dir", out, *MODEL,
        "--optimizer", "adam", "--learning-rate", "0.01", "--epochs", 3, "--ewc-lambda", 100,
        "--evaluate", f"a={a}", "--evaluate", f"b={b}", "--compare-none", "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(printed)
    file, page = tmp_path / "result.json", tmp_path / "r.html"
    file.write_text(printed)
    report(out, output=page, comparison=file)
    html = page.read_text()
    assert '<section id="comparison"' in html
    kept = result["comparison"]["with_penalty"]["a"]["score"]
    free = result["comparison"]["without_penalty"]["a"]["score"]
    assert f"<td>{100 * kept:.1f}</td><td>{100 * free:.1f}</td>" in html
    nats = (
        f"predicted {result['predicted_nats']:+.3g}; measured {result['measured_nats']['a']:+.3g}"
    )
    assert f"<p>With the penalty: old loss, mean nats: {nats} of a.</p>".replace("-", "−") in html
    report(out, output=page)
    assert '<section id="comparison"' not in page.read_text()
    for change, message in (
        (lambda r: r.pop("comparison"), "expected an object with `comparison`"),
        (lambda r: r["comparison"].update(new_task="c"), "is of the task 'c'"),
        (lambda r: r["metrics"]["after"]["a"].update(score=0.5), "with other scores"),
        (lambda r: r["comparison"]["before"].pop("a"), "expected a score on 'a'"),
        (lambda r: r.update(predicted_nats="much"), "predicted_nats"),
    ):
        changed = json.loads(printed)
        change(changed)
        file.write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            report(out, output=page, comparison=file)


def test_several_processes(learned: Path, write_task: Write, tmp_path: Path) -> None:
    a, b = write_task("a"), write_task("b", seed=1)
    words = [
        "finetune", str(learned), "--data", str(b), *MODEL, "--ewc-lambda", "100",
        "--optimizer", "adam", "--learning-rate", "0.01", "--device", "cpu", "--epochs", "3",
        "--batch-size", "8", "--evaluate", f"a={a}", "--json",
    ]  # fmt: skip
    for name, more in (("both", ["--compare-none"]), ("alone", [])):
        log, out = tmp_path / f"{name}.log", ["--output-dir", str(tmp_path / name)]

        def printed(place: Path = tmp_path / f"{name}.json") -> None:
            sys.stdout = place.open("a")

        codes = ended(started(2, [*words, *out, *more], log, printed))
        assert codes == [0, 0], log.read_text()
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")
    result = json.loads((tmp_path / "both.json").read_text())
    alone = compared(learned, tmp_path / "one", write_task)
    for run_ in ("with_penalty", "without_penalty"):
        expected = alone["comparison"][run_]["a"]["loss"]
        assert result["comparison"][run_]["a"]["loss"] == pytest.approx(expected, rel=1e-3)
