import json
import math
from pathlib import Path
from typing import Any

import pytest

from consolidate.views.metrics import (
    evaluate_metrics,
    finetune_metrics,
    fisher_metrics,
    write_metrics,
)
from formats.errors import InputError
from support.checkpoints import Write
from support.command_line import MODEL, run

FAST = ("--optimizer", "adam", "--learning-rate", 0.01, "--epochs", 20)


def read(path: Path) -> dict[str, Any]:
    """The numbers of a file, after it was seen to be flat, sorted and of numbers only."""
    numbers = json.loads(path.read_text())
    assert list(numbers) == sorted(numbers)
    assert all(type(v) in (int, float) and math.isfinite(v) for v in numbers.values())
    return numbers


def test_the_numbers_of_a_chain_and_of_the_run_that_fails_the_gate(
    capsys: pytest.CaptureFixture[str], network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    a, b, out = write_task("a"), write_task("b", seed=1), tmp_path / "out"
    first, file = tmp_path / "first", tmp_path / "made" / "metrics.json"
    tests = ("--evaluate", f"a={a}", "--evaluate", f"b={b}", "--evaluate", f"v1.0={b}")
    common = (*MODEL, *FAST, *tests, "--penalty", "none", "--metrics", file)
    words = ("finetune", network_checkpoint, "--data", a, "--output-dir", first, *common)
    code, _, err = run(capsys, *words)
    assert code == 0, err
    assert "not in the ledger" not in err
    alone = read(file)
    assert alone["acc"] == alone["a.accuracy"] == alone["a.score"]
    assert not any("forgetting" in name or name == "bwt" for name in alone)

    words = ("finetune", first, "--data", b, "--output-dir", out, *common)
    code, text, err = run(capsys, *words, "--max-forgetting", 0.03, "--json")
    assert code == 5
    assert "--evaluate: v1.0: not in the ledger (a): name test data by their task, as in a=" in err
    result, numbers = json.loads(text), read(file)
    lost = alone["a.accuracy"] - numbers["a.accuracy"]
    assert lost > 0.03
    assert numbers["forgetting"] == numbers["a.forgetting"] == -numbers["bwt"] == lost
    assert numbers["acc"] == (numbers["a.accuracy"] + numbers["b.accuracy"]) / 2
    assert numbers["v1.0.loss"] == numbers["b.loss"]
    assert numbers["loss"] == result["loss"]
    assert numbers["steps"] == result["steps"] == 80
    assert numbers == finetune_metrics(result)
    assert "ewc_lambda" not in numbers
    assert not out.exists()


def test_the_numbers_of_fisher_evaluate_and_run(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_task("a")
    write_task("b", seed=1)
    file = tmp_path / "m.json"
    words = ("fisher", network_checkpoint, "--data", "a.npz", *MODEL, "--metrics", "m.json")
    code, _, err = run(capsys, *words, "--dry-run")
    assert code == 0
    assert "m.json was not written: a dry run measures nothing" in err
    assert not file.exists()
    assert run(capsys, *words)[0] == 0
    numbers = read(file)
    assert numbers.keys() == {"examples", "parameters", "relative_error", "trace", "units"}
    assert (numbers["examples"], numbers["parameters"]) == (60, 83)

    words = ("evaluate", network_checkpoint, "--data", "a.npz", "--data", "b.npz", *MODEL)
    code, text, _ = run(capsys, *words, "--metrics", file, "--json")
    assert code == 0
    assert read(file)["b.loss"] == json.loads(text)["b"]["loss"]

    (tmp_path / "tasks.toml").write_text(
        'start = "start"\noutput-dir = "chain"\n[evaluate]\na = "a.npz"\n'
        '[defaults]\nmodel = "support.networks:make_network"\newc-lambda = 1\n'
        "max-forgetting = 2.0\n"
        '[[task]]\nname = "b"\ndata = "b.npz"\nevaluate = "b.npz"\nlearning-rate = 0.01\n'
    )
    words = ("run", "tasks.toml", "--metrics", file, "--json")
    code, text, err = run(capsys, *words)
    assert code == 0, err
    numbers, matrix = read(file), json.loads(text)["accuracy_matrix"]
    assert numbers["acc"] == matrix["acc"]["value"]
    assert numbers["a.forgetting"] == numbers["forgetting"] == matrix["forgetting"]["value"]
    file.unlink()
    assert run(capsys, *words)[0] == 0  # nothing is left to do, and the numbers are the same
    assert read(file) == numbers

    tasks = (tmp_path / "tasks.toml").read_text()
    (tmp_path / "tasks.toml").write_text(tasks.replace("2.0", "0.05"))
    file.unlink()
    assert run(capsys, *words)[0] == 5
    assert read(file)["a.forgetting"] == numbers["a.forgetting"] > 0.05


def test_what_is_not_finite_or_not_known_is_left_out() -> None:
    values = {"loss": math.nan, "perplexity": math.inf, "accuracy": 0.5}
    assert evaluate_metrics({"a": values}) == {"a.accuracy": 0.5}
    counts = {"examples": 3, "units": 3, "parameters": 6}
    assert fisher_metrics({"trace": math.inf, "layers": {}, **counts}) == counts


def test_the_same_numbers_are_the_same_bytes(tmp_path: Path) -> None:
    write_metrics(tmp_path / "m", {"b": 0.1, "a": 1, "ü": -2.5})
    assert (tmp_path / "m").read_text() == '{\n  "a": 1,\n  "b": 0.1,\n  "ü": -2.5\n}\n'


def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str], network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    no_model = ("finetune", network_checkpoint, "--data", write_task("a"), "--output-dir", "out")
    code, _, err = run(capsys, *no_model, "--metrics", tmp_path)
    assert (code, err) == (InputError.exit_code, f"error: {tmp_path} is a folder; name a file\n")


@pytest.mark.parametrize(
    "text", ['{"text": "good", "label": "bad"}\n{"text": "x"}\n', "[1]", "\xff"]
)
def test_a_file_of_another_kind_is_not_replaced(
    capsys: pytest.CaptureFixture[str],
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
    text: str,
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(text, encoding="latin-1")
    words = ("evaluate", network_checkpoint, "--data", f"a={write_task('a')}", *MODEL)
    code, _, err = run(capsys, *words, "--metrics", rows)
    expected = (
        "already exists and is not a file of metrics: choose another name, or remove it first"
    )
    assert (code, err) == (InputError.exit_code, f"error: {rows} {expected}\n")
    assert rows.read_text(encoding="latin-1") == text
    write_metrics(rows, {"a": 1})
    assert run(capsys, *words, "--metrics", rows)[0] == 0
    assert "a.accuracy" in read(rows)
