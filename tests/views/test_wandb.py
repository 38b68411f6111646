"""Runs of the real client of Weights & Biases, offline, read back from the file that it writes."""

import builtins
import json
import os
import signal
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from formats.digest import set_digest
from formats.fisher_json import read_ledger
from support.checkpoints import Write
from support.command_line import MODEL, run

wandb = pytest.importorskip("wandb", reason="wandb is not installed")

BLOCK = 32768  # bytes of the log format, which is that of LevelDB


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs in a folder of the test; the client keeps its settings until it is torn down."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_PROJECT", "forgetting")
    for name in ("WANDB_RUN_ID", "WANDB_API_KEY", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()
    yield
    wandb.teardown()


def records(folder: Path) -> Iterator[Any]:
    """The records of the one run in a folder, as its client would send them."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, whole = path.read_bytes(), 7, b""  # the first bytes name the format
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # no room for a header
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # all of a record, or its last part
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def found(folder: Path) -> tuple[dict[str, dict[int, float]], dict[str, Any], dict[str, Any], int]:
    """Give metrics by step, config, summary, and the exit code of the one run."""
    wandb.teardown()  # as at the end of a process: all is on disk after it
    metrics: dict[str, dict[int, float]] = {}
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    code = -1
    for record in records(folder):
        row = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
        for name, value in row.items():
            if name != "step" and not name.startswith("_"):
                metrics.setdefault(name, {})[row["step"]] = value
        for item in record.config.update:
            config[item.key or item.nested_key[0]] = json.loads(item.value_json)
        for item in record.summary.update:
            summary[item.key or item.nested_key[0]] = json.loads(item.value_json)
        if record.WhichOneof("record_type") == "exit":
            code = record.exit.exit_code
    return metrics, config, summary, code


def test_a_fine_tuning_is_a_run_with_its_curves_and_digests(
    capsys: pytest.CaptureFixture[str], network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    old, new, out = write_task("old"), write_task("new", seed=1), tmp_path / "out"
    run(capsys, "fisher", network_checkpoint, "--data", old, *MODEL)
    leave, streams = sys.exit, (sys.stdout, sys.stderr, sys.excepthook, builtins.print)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    code, text, err = run(
        capsys, "finetune", network_checkpoint, "--data", new, "--output-dir", out, *MODEL,
        "--ewc-lambda", 10, "--epochs", 2, "--evaluate-every", 3, "--evaluate", f"old={old}",
        "--evaluate", f"new={new}", "--json", "--wandb", "--log-every", 100,
    )  # fmt: skip
    assert code == 0, err
    assert err.count("W&B") == err.count("wandb:") + 1 == 1  # nothing of the client itself
    assert f"W&B: offline run in {tmp_path}/wandb/offline-run-" in err
    assert (sys.stdout, sys.stderr, sys.excepthook, builtins.print) == streams
    assert sys.exit is leave
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    result = json.loads(text)
    metrics, config, summary, ended = found(tmp_path)
    assert ended == 0
    for name in ("loss", "penalty", "learning_rate"):
        expected = {step["step"]: step[name] for step in result["history"]}
        if name == "loss":
            assert metrics[name] == expected
        assert metrics[name].items() >= expected.items()
    assert "gradient_norm" not in metrics
    times = {"before": 0, "step 3": 3, "step 6": 6, "step 8": 8}
    for name in ("old", "new"):
        expected = {at: result["metrics"][when][name]["accuracy"] for when, at in times.items()}
        assert metrics[f"{name}.accuracy"] == expected
    assert metrics["forgetting"] == {8: metrics["old.forgetting"][8]}
    assert config["finetune.ewc_lambda"] == 10.0
    assert config["finetune.evaluate"] == [f"old={old}", f"new={new}"]
    ledger = read_ledger(out / "fisher" / "fisher.json")
    assert summary["finetune.checkpoint"] == out.as_uri()
    assert summary["finetune.weights"] == set_digest(ledger.weights)
    assert summary["finetune.fisher"] == set_digest(ledger.fisher)
    assert summary["finetune.data_digest"] == ledger.tasks[-1].data_digest
    project = {record.run.project for record in records(tmp_path) if record.HasField("run")}
    assert project == {"forgetting"}


def test_a_command_that_fails_is_a_run_that_failed(
    capsys: pytest.CaptureFixture[str], network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    code, _, err = run(
        capsys, "evaluate", network_checkpoint, "--data", write_task("old"), "--wandb"
    )
    assert code == 3, err  # no --model
    assert found(tmp_path)[3] == 1, err


def test_a_client_that_fails_costs_a_note(
    capsys: pytest.CaptureFixture[str],
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: object, data: object) -> None:
        raise BrokenPipeError("the service is gone")

    monkeypatch.setattr("consolidate.views.tracking.SECONDS_BETWEEN_SENDS", 0.0)
    monkeypatch.setattr(wandb.Run, "log", broken)
    out = tmp_path / "out"
    code, _, err = run(
        capsys, "finetune", network_checkpoint, "--data", write_task("new"), "--output-dir", out,
        *MODEL, "--penalty", "none", "--wandb",
    )  # fmt: skip
    assert code == 0, err
    assert "W&B did not accept the metrics: the service is gone; the command continues" in err
    assert (out / "fisher" / "fisher.json").is_file()


def test_both_stores_at_once(
    capsys: pytest.CaptureFixture[str],
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    words = ("evaluate", network_checkpoint, "--data", write_task("old"), *MODEL, "--json")
    code, text, err = run(capsys, *words, "--wandb", "--mlflow")
    assert code == 0, err
    assert "MLflow: started run " in err
    assert "W&B: offline run in " in err
    assert found(tmp_path)[0]["old.loss"] == {0: json.loads(text)["old"]["loss"]}


@pytest.mark.parametrize(
    ("variables", "code", "message"),
    [
        ({"WANDB_MODE": "sometimes"}, 2, "--wandb: mode: Input should be 'online'"),
        ({"WANDB_MODE": "online", "NETRC": os.devnull}, 2, "there is no API key"),
    ],
)
def test_what_cannot_start_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str],
    network_checkpoint: Path,
    write_task: Write,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    code: int,
    message: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    words = ("fisher", network_checkpoint, "--data", write_task("old"), *MODEL, "--wandb")
    found, _, err = run(capsys, *words)
    assert (found, message in err, err.count("\n")) == (code, True, 1), err
    assert not (network_checkpoint / "fisher").exists()


def test_the_client_is_an_extra(
    capsys: pytest.CaptureFixture[str],
    network_checkpoint: Path,
    write_task: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = ("evaluate", network_checkpoint, "--data", write_task("old"), *MODEL, "--wandb")
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "--wandb needs wandb: pip install 'consolidate-ewc[wandb]'" in err
