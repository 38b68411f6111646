import json
from pathlib import Path

import pytest

import consolidate.commands.finetune
from consolidate.api import finetune, verify
from consolidate.chain.output import failed_folder
from consolidate.commands import finetune_plan
from consolidate.commands.finetune_plan import plan_finetune
from consolidate.fields import gather
from consolidate.options import FinetuneOptions
from consolidate.training.forgetting import beyond, forgetting
from formats.atomic import replace_folder
from formats.errors import BusyError, ForgettingError, InputError, UsageError
from support.checkpoints import Write, first_task, write_clusters
from support.command_line import run

FAST = {
    "model": "support.networks:make_network",
    "optimizer": "adam",
    "learning_rate": 0.01,
    "epochs": 20,
}


@pytest.fixture(scope="module")
def learned_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    return first_task(folder, write_clusters(folder, "a"), **FAST)


def test_forgetting_is_the_score_that_old_tasks_lost() -> None:
    before = {"a": {"score": 0.9}, "b": {"score": -2.0}, "new": {"score": 0.5}}
    after = {"a": {"score": 0.87}, "b": {"score": -1.5}, "new": {"score": 0.1}}
    lost = forgetting(before, after, ["a", "b", "not measured"])
    assert lost == pytest.approx({"a": 0.03, "b": -0.5})
    assert beyond(lost, 0.03) == {}  # although 0.9 − 0.87 > 0.03 in floating point
    assert set(beyond(lost, 0.029)) == {"a"}


@pytest.mark.parametrize(
    ("target", "expected"),
    [("x/out", "x/out.failed-forgetting"), ("out/", "out.failed-forgetting")],
)
def test_the_name_says_what_failed(target: str, expected: str) -> None:
    assert failed_folder(Path(target)) == Path(expected)


def test_the_folder_in_use_has_a_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert failed_folder(Path()) == tmp_path.with_name(f"{tmp_path.name}.failed-forgetting")


def test_what_forgot_too_much_is_kept_aside(
    learned: Path, write_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, failed = tmp_path / "out", tmp_path / "out.failed-forgetting"
    a, b = write_task("a"), write_task("b", seed=1)
    common = {"penalty": "none", "evaluate": {"a": a, "b": b}, **FAST}
    with pytest.raises(ForgettingError, match=r"a lost 0\.\d+ in score.* 0\.03") as caught:
        finetune(learned, b, output_dir=out, max_forgetting=0.03, **common)
    assert str(failed) in str(caught.value)
    assert not out.exists()
    assert verify(failed)["tasks"] == ["a", "b"]
    result = caught.value.result
    assert result["status"] == "forgot too much"
    assert result["checkpoint"] == str(failed)
    lost = result["metrics"]["before"]["a"]["score"] - result["metrics"]["after"]["a"]["score"]
    assert lost > 0.03

    with monkeypatch.context() as patch:  # the same command again: the same answer, at once
        patch.setattr(consolidate.commands.finetune, "train", None)
        with pytest.raises(ForgettingError) as again:
            finetune(learned, b, output_dir=out, max_forgetting=0.03, **common)
        assert str(again.value) == str(caught.value)
        assert again.value.result["status"] == "cached"
        assert again.value.result["checkpoint"] == str(failed)
        assert again.value.result["metrics"] == result["metrics"]
        with pytest.raises(InputError, match=r"out\.failed-forgetting"):  # before the work
            finetune(learned, b, output_dir=out, max_forgetting=0.02, **common)
    assert finetune(learned, b, output_dir=out, **common)["status"] == "done"  # without a gate
    kept = finetune(learned, b, output_dir=out, max_forgetting=lost, overwrite=True, **common)
    assert (kept["status"], kept["checkpoint"]) == ("done", str(out))
    with pytest.raises(ForgettingError):
        finetune(learned, b, output_dir=out, max_forgetting=0.03, overwrite=True, **common)
    assert verify(out)["tasks"] == ["a", "b"]  # the good one was not replaced


def test_without_a_digest_of_the_data_the_failed_output_is_in_the_way(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    a, b = write_task("a"), write_task("b", seed=1)
    given = {"penalty": "none", "evaluate": {"a": a}, "max_forgetting": 0.03, **FAST}
    for error in (ForgettingError, InputError):
        with pytest.raises(error, match=r"out\.failed-forgetting"):
            finetune(learned, b, output_dir=tmp_path / "out", data_digest=False, **given)


def test_a_failed_output_that_is_being_written_may_be_free_later(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    given = {"penalty": "none", "evaluate": {"a": write_task("a")}, "max_forgetting": 0.03, **FAST}
    out, data = tmp_path / "out", write_task("b", seed=1)
    with replace_folder(failed_folder(out)), pytest.raises(BusyError, match="cannot save a failed"):
        finetune(learned, data, output_dir=out, **given)


def test_a_gate_needs_an_old_task_to_measure(
    network_checkpoint: Path, learned: Path, write_task: Write, tmp_path: Path
) -> None:
    b, out = write_task("b", seed=1), tmp_path / "out"
    common = {"output_dir": out, "penalty": "none", **FAST}
    with pytest.raises(UsageError, match=r"NAME is one of a$"):
        finetune(learned, b, max_forgetting=0.1, evaluate={"b": b}, **common)
    with pytest.raises(UsageError, match="no ledger"):
        finetune(network_checkpoint, b, max_forgetting=0.1, **common)
    with pytest.raises(UsageError, match="expected a finite number from 0"):
        finetune(learned, b, max_forgetting=-1.0, evaluate={"a": b}, **common)
    assert not out.exists()


def test_the_command_leaves_with_5_and_prints_what_it_did(
    capsys: pytest.CaptureFixture[str], learned: Path, write_task: Write, tmp_path: Path
) -> None:
    a, b = write_task("a"), write_task("b", seed=1)
    for status in ("forgot too much", "cached"):
        code, out, err = run(
            capsys, "finetune", learned, "--data", b, "--output-dir", tmp_path / "out",
            "--model", FAST["model"], "--optimizer", "adam", "--learning-rate", 0.01,
            "--epochs", 20, "--penalty", "none", "--evaluate", f"a={a}", "--max-forgetting", 0.03,
            "--json",
        )  # fmt: skip
        assert code == 5
        told = json.loads(out)  # one object
        assert (told["status"], told["exit_code"]) == (status, 5)
        assert f"error: {told['error']}" in err
        assert told["error"].startswith("forgot too much: a lost")
        assert "Traceback" not in err


def test_a_benchmark_is_measured_beside_the_old_task_and_not_in_its_place(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    (tmp_path / "bench.yaml").write_text("task: bench\n")
    given = {"checkpoint": learned, "data": write_task("b", seed=1), "output_dir": tmp_path / "out"}
    given |= {"ewc_lambda": "auto", "max_forgetting": 0.1, **FAST}
    given |= {"validation": {"a": write_task("held")}}
    given |= {"evaluate": {"bench": f"lm-eval:{tmp_path / 'bench.yaml'}"}}
    assert plan_finetune(gather(FinetuneOptions, given)).evaluate.keys() == {"a", "bench"}


def test_a_mount_point_has_no_place_for_a_failed_run(
    learned: Path, write_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(finetune_plan, "is_mount", lambda path: path == out)
    options = {**FAST, "ewc_lambda": 1.0, "evaluate": {"a": tmp_path / "a.npz"}}
    with pytest.raises(InputError, match=f"{out} is a mount point, and --max-forgetting"):
        finetune(learned, write_task("b", seed=1), output_dir=out, max_forgetting=0.5, **options)
