"""Runs in a real MLflow: its client, and stores on disk."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from consolidate.training.loop import Step
from consolidate.views.mlflow import open_run
from consolidate.views.tracking import tracked
from formats.digest import set_digest
from formats.fisher_json import read_ledger
from support.checkpoints import Write
from support.command_line import MODEL, run

mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
pytest.importorskip("alembic", reason="MLflow keeps no SQLite store without alembic")

# MLflow's own use of SQLAlchemy, and the connections that it keeps open.
pytestmark = [
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without runs; to make its tables takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def store(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of its own for each test, and no run to join."""
    shutil.copy(empty_store, tmp_path / "runs.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)


def runs() -> list[Any]:
    """All runs of the store, the first begun first."""
    client = mlflow.MlflowClient()
    return client.search_runs(["0"], order_by=["attributes.start_time"])


def points(run_id: str, name: str) -> list[tuple[int, float]]:
    history = mlflow.MlflowClient().get_metric_history(run_id, name)
    return [(point.step, point.value) for point in history]


def test_a_fine_tuning_is_a_run_with_its_curves_and_digests(
    capsys: pytest.CaptureFixture[str], network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    old, new, out = write_task("old"), write_task("new", seed=1), tmp_path / "out"
    code, _, err = run(capsys, "fisher", network_checkpoint, "--data", old, *MODEL, "--mlflow")
    assert code == 0, err
    words = (
        "finetune", network_checkpoint, "--data", new, "--output-dir", out, *MODEL,
        "--ewc-lambda", 10, "--epochs", 2, "--evaluate-every", 3, "--evaluate", f"old={old}",
        "--evaluate", f"new={new}", "--max-grad-norm", 5, "--json", "--mlflow",
    )  # fmt: skip
    code, text, err = run(capsys, *words)
    assert code == 0, err
    result = json.loads(text)
    measured, trained = runs()
    assert f"MLflow: started run {trained.info.run_id}\n" in err
    assert (measured.info.run_name, measured.info.status) == ("consolidate fisher", "FINISHED")
    assert measured.data.params["fisher.data"] == str(old)
    assert measured.data.metrics["trace"] > 0
    assert (trained.info.run_name, trained.info.status) == ("consolidate finetune", "FINISHED")
    assert trained.data.params["finetune.ewc_lambda"] == "10.0"
    assert json.loads(trained.data.params["finetune.evaluate"]) == [f"old={old}", f"new={new}"]
    assert "finetune.validation" not in trained.data.params
    for name in ("loss", "penalty", "learning_rate", "gradient_norm"):
        expected = {step["step"]: step[name] for step in result["history"]}
        assert dict(points(trained.info.run_id, name)) == expected
    steps, _ = zip(*points(trained.info.run_id, "old.accuracy"), strict=True)
    assert set(steps) == {0, 3, 6, 8}
    after = result["metrics"]["after"]
    assert trained.data.metrics["new.loss"] == after["new"]["loss"]
    assert trained.data.metrics["forgetting"] == trained.data.metrics["old.forgetting"]
    ledger = read_ledger(out / "fisher" / "fisher.json")
    tags = trained.data.tags
    assert tags["finetune.checkpoint"] == out.as_uri()
    assert tags["finetune.weights"] == set_digest(ledger.weights)
    assert tags["finetune.fisher"] == set_digest(ledger.fisher)
    assert tags["finetune.trained_from"] == measured.data.tags["fisher.weights"]
    assert tags["finetune.data_digest"] == ledger.tasks[-1].data_digest
    assert not mlflow.MlflowClient().list_artifacts(trained.info.run_id)
    code, text, _ = run(capsys, *words)
    assert (code, json.loads(text)["status"]) == (0, "cached")
    again = runs()[-1].data.metrics  # the last of its points, not the one before training
    assert {name: again[name] for name in ("old.loss", "new.loss")} == {
        f"{name}.loss": after[name]["loss"] for name in ("old", "new")
    }


def test_a_dry_run_is_no_run_of_the_store(
    capsys: pytest.CaptureFixture[str], network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    words = ["--data", write_task("new"), *MODEL, "--mlflow", "--dry-run"]
    for command in (
        ["fisher", network_checkpoint],
        ["finetune", network_checkpoint, "--output-dir", tmp_path / "out", "--penalty", "none"],
    ):
        code, _, err = run(capsys, *command, *words)
        assert code == 0, err
        assert "no run is started by --mlflow: a dry run measures nothing" in err
    assert runs() == []


def test_a_run_that_was_begun_is_joined_and_left_open(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    network_checkpoint: Path,
    write_task: Write,
) -> None:
    client = mlflow.MlflowClient()
    run_id = client.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    old, other = write_task("old"), write_task("other", seed=1)
    words = ("evaluate", network_checkpoint, *MODEL, "--mlflow", "--json", "--data")
    code, text, err = run(capsys, *words, old)
    assert code == 0
    assert f"MLflow: joined run {run_id}\n" in err
    code, _, err = run(capsys, *words, other)
    assert code == 0
    assert "MLflow refused" in err  # parameters cannot change, and the metrics are taken
    code, _, err = run(capsys, "fisher", network_checkpoint, *MODEL, "--data", old, "--mlflow")
    assert code == 0
    (found,) = runs()
    assert found.info.status == "RUNNING"
    assert found.data.metrics["old.loss"] == json.loads(text)["old"]["loss"]
    assert {"old.accuracy", "other.accuracy", "trace"} <= found.data.metrics.keys()
    assert {"evaluate.checkpoint", "fisher.checkpoint"} <= found.data.params.keys()
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    code, _, err = run(capsys, *words, old)
    assert code == 3
    assert "MLFLOW_RUN_ID" in err


def test_a_gate_that_fails_and_a_command_that_fails(
    capsys: pytest.CaptureFixture[str], network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    old, new = write_task("old"), write_task("new", seed=1)
    run(capsys, "fisher", network_checkpoint, "--data", old, *MODEL)
    code, _, _ = run(
        capsys, "finetune", network_checkpoint, "--data", new, "--output-dir", tmp_path / "out",
        *MODEL, "--ewc-lambda", 0, "--batch-size", 60, "--max-steps", 2, "--learning-rate", 0.3,
        "--max-forgetting", 0, "--evaluate", f"old={old}", "--mlflow",
    )  # fmt: skip
    assert code == 5
    (failed,) = runs()
    assert failed.info.status == "FAILED"
    assert failed.data.tags["finetune.status"] == "forgot too much"
    assert failed.data.tags["finetune.checkpoint"].endswith("out.failed-forgetting")
    assert failed.data.metrics["forgetting"] > 0
    code, _, _ = run(capsys, "evaluate", network_checkpoint, "--data", old, "--mlflow")
    assert code == 3  # no --model
    run_file = tmp_path / "tasks.toml"
    run_file.write_text(
        'start = "start"\n[defaults]\nmodel = "support.networks:make_network"\n'
        "ewc-lambda = 0\n"
        "batch-size = 60\nmax-steps = 2\nlearning-rate = 0.3\nmax-forgetting = 0\n"
        '[evaluate]\nold = "old.npz"\n[[task]]\nname = "new"\ndata = "new.npz"\n'
    )
    words = ("run", run_file, "--output-dir", tmp_path / "chain", "--mlflow")
    code, _, err = run(capsys, *words, "--metrics", tmp_path / "m.json")
    assert code == 5, err
    assert [found.info.status for found in runs()] == ["FAILED"] * 3
    assert [step for step, _ in points(runs()[-1].info.run_id, "forgetting")] == [2]
    for found in (runs()[-1].data.metrics, json.loads((tmp_path / "m.json").read_text())):
        assert found["forgetting"] > 0
        assert not {"loss", "steps", "penalty_value"} & {*found}


def test_a_chain_is_one_run(
    capsys: pytest.CaptureFixture[str], network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    run_file = tmp_path / "tasks.toml"
    write_task("a"), write_task("b", seed=1)
    run_file.write_text(
        'start = "start"\noutput-dir = "chain"\n[defaults]\n'
        'model = "support.networks:make_network"\n'
        'ewc-lambda = 10\n[[task]]\nname = "a"\ndata = "a.npz"\nevaluate = "a.npz"\n'
        '[[task]]\nname = "b"\ndata = "b.npz"\nevaluate = "b.npz"\n'
    )
    code, text, err = run(
        capsys, "run", run_file, "--output-dir", tmp_path / "chain", "--mlflow", "--json"
    )
    assert code == 0, err
    (found,) = runs()
    matrix = json.loads(text)["accuracy_matrix"]
    column = [matrix["start"][0], *(row[0] for row in matrix["scores"])]
    assert dict(points(found.info.run_id, "a.score")) == dict(enumerate(column))
    assert found.data.metrics["acc"] == matrix["acc"]["value"]
    assert found.data.params["run.task.2.name"] == "b"
    assert found.data.params["run.defaults.ewc-lambda"] == "10"
    assert found.data.tags["run.checkpoint"] == (tmp_path / "chain" / "02-b").as_uri()


def test_steps_are_sent_while_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consolidate.views.tracking.SECONDS_BETWEEN_SENDS", 0.0)
    taken = [Step(number, 1 / number, 0.5, 0.1, None) for number in range(1, 6)]
    with tracked("finetune", {}, open_run) as tracker:
        (begun,) = runs()
        for step in taken[2:4]:  # as after a stop: the first two were taken by an earlier command
            tracker.on_step(step)
        first = taken[2]  # which the second waits for
        assert points(begun.info.run_id, "loss")[0] == (first.step, first.loss)
        tracker.history([vars(step) for step in taken])
    assert sorted(points(begun.info.run_id, "loss")) == [(s.step, s.loss) for s in taken]
    assert [step for step, _ in points(begun.info.run_id, "loss")][:2] == [3, 4]
    assert len(points(begun.info.run_id, "penalty")) == 5
    assert not points(begun.info.run_id, "gradient_norm")


def test_long_values_are_cut_and_odd_names_replaced() -> None:
    long = "x" * 10_000
    with tracked("fisher", {"one": long, "other": long + "y", "none": ()}, open_run) as tracker:
        tracker.metric("ümlaut?", 1.5)
        for step in range(2500):
            tracker.metric("many", step, step)
    (found,) = runs()
    one, other = found.data.params["fisher.one"], found.data.params["fisher.other"]
    assert len(one) == len(other) == 500
    assert one[:400] == other[:400] == "x" * 400
    assert "10000 characters" in one
    assert one != other
    assert found.data.metrics["ümlaut_"] == 1.5
    assert len(points(found.info.run_id, "many")) == 2500


def test_a_store_that_goes_away_costs_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    caplog.set_level("INFO", "consolidate")
    with tracked("fisher", {}, open_run) as tracker:
        shutil.rmtree(tmp_path / "runs")
        tracker.metric("loss", 1.0)
    assert "MLflow did not accept the metrics" in caplog.text
    assert "MLflow could not end the run" in caplog.text


def test_what_a_store_did_not_take_is_sent_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr("consolidate.views.tracking.SECONDS_BETWEEN_SENDS", 0.0)
    caplog.set_level("INFO", "consolidate")
    taken = [Step(number, 1 / number, 0.5, 0.1, None) for number in range(1, 6)]
    with tracked("finetune", {}, open_run) as tracker:
        tracker.on_step(taken[0])
        tracker.on_step(taken[1])
        (tmp_path / "runs").rename(tmp_path / "away")
        for step in taken[2:4]:
            tracker.on_step(step)
        (tmp_path / "away").rename(tmp_path / "runs")
        tracker.history([vars(step) for step in taken])
    assert "MLflow did not accept the metrics" in caplog.text
    (found,) = runs()
    assert found.info.status == "FINISHED"
    steps = {step for step, _ in points(found.info.run_id, "loss")}
    assert steps == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("uri", "code", "message"),
    [
        ("http://name:secret@127.0.0.1:9", 75, "http://127.0.0.1:9"),
        ("ftp://nowhere", 3, "ftp://nowhere"),
    ],
)
def test_a_store_that_is_not_there_is_told_before_the_work(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    network_checkpoint: Path,
    write_task: Write,
    uri: str,
    code: int,
    message: str,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    words = ("fisher", network_checkpoint, "--data", write_task("old"), *MODEL, "--mlflow")
    found, _, err = run(capsys, *words)
    assert found == code
    assert message in err
    assert "secret" not in err
    assert not (network_checkpoint / "fisher").exists()
