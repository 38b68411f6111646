import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from consolidate.api import evaluate, finetune
from formats.errors import ForgettingError, InputError, NonFiniteError, UsageError
from formats.fisher_folder import read_fisher
from support.checkpoints import Write, first_task, write_clusters
from support.command_line import run

NETWORK = {"model": "support.networks:make_network"}
FAST: dict[str, Any] = {
    **NETWORK,
    "optimizer": "adam",
    "learning_rate": 0.01,
    "epochs": 6,
    "lr_scheduler": "linear",
    "warmup_steps": 4,
}


def noisy(config: dict[str, Any]) -> nn.Sequential:
    """A network that draws random numbers and keeps statistics while it trains."""
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def learned_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    return first_task(folder, write_clusters(folder, "a", count=120), **FAST | {"epochs": 20})


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_winner_is_what_its_lambda_gives_outright(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    b, held = write_task("b", seed=1, count=120), write_task("a-held", count=120)
    found = finetune(
        learned, b, output_dir=tmp_path / "found", ewc_lambda="auto", validation={"a": held}, **FAST
    )
    search = found["lambda_search"]
    (chosen,) = [trial for trial in search["trials"] if trial["chosen"]]
    assert chosen["ewc_lambda"] == search["ewc_lambda"] == found["ewc_lambda"]
    assert search["select"] == "best-mean"
    means = [t["mean"] for t in search["trials"] if t["steps"] == chosen["steps"]]
    assert chosen["mean"] == max(means)
    for trial in search["trials"]:
        scores = [values["score"] for values in trial["metrics"].values()]
        assert set(trial["metrics"]) == {"a", "b"}
        assert trial["mean"] == pytest.approx(sum(scores) / 2)
        lost = search["before"]["a"]["score"] - trial["metrics"]["a"]["score"]
        assert trial["forgetting"] == pytest.approx(lost)
    cost = search["cost"]
    assert cost["runs"] == len(search["trials"])
    assert cost["steps"] == sum(trial["steps"] for trial in search["trials"])
    assert cost["full_runs"] == pytest.approx(cost["steps"] / found["steps"])
    outright = finetune(
        learned, b, output_dir=tmp_path / "outright", ewc_lambda=found["ewc_lambda"], **FAST
    )
    assert weights(tmp_path / "found") == weights(tmp_path / "outright")
    assert found["history"] == outright["history"]
    ledger = read_fisher(tmp_path / "found" / "fisher").ledger
    assert ledger.tasks[-1].ewc_lambda == found["ewc_lambda"]
    assert ledger.tasks[-1].units == 120  # all of the data, what was held out included


def test_every_candidate_starts_from_the_same_state(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    module = noisy({})
    from safetensors.torch import save_file

    save_file(module.state_dict(), network_checkpoint / "model.safetensors", {"format": "pt"})
    factory = {**FAST, "model": f"{__name__}:noisy", "norm_statistics": "update"}
    a, b = write_task("a"), write_task("b", seed=1)
    held = write_task("held", seed=1)
    first = tmp_path / "first"
    finetune(network_checkpoint, a, output_dir=first, penalty="none", **factory)
    together, alone = (
        finetune(
            first,
            b,
            output_dir=tmp_path / f"{len(strengths)}",
            ewc_lambda=strengths,
            select="largest",
            validation={"b": held},
            **factory,
        )
        for strengths in ([100.0, 1.0, 10.0], [10.0])
    )
    trials = {trial["ewc_lambda"]: trial for trial in together["lambda_search"]["trials"]}
    (lone,) = alone["lambda_search"]["trials"]
    for measured in ("metrics", "penalty_per_lambda", "divergence", "steps"):
        assert trials[10.0][measured] == lone[measured]
    assert trials[1.0]["metrics"] != lone["metrics"]
    outright = finetune(
        first, b, output_dir=tmp_path / "outright", ewc_lambda=together["ewc_lambda"], **factory
    )
    assert weights(tmp_path / "3") == weights(tmp_path / "outright")
    assert outright["history"] == together["history"]
    # With held-out data of the new task nothing is split off: its trial is the run itself.
    last = evaluate(tmp_path / "outright", {"b": held}, model=factory["model"])
    assert trials[together["ewc_lambda"]]["metrics"] == last


def test_without_old_data_penalty_and_outputs_are_measured(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    b = write_task("b", seed=1, count=120)
    found = finetune(learned, b, output_dir=tmp_path / "out", ewc_lambda=[0, 1, 1e6], **FAST)
    search = found["lambda_search"]
    assert search["select"] == "largest"
    assert "b on 50 examples held out of the training data; no old data" in search["measured"]
    free, mild, stiff = search["trials"]
    assert free["forgetting"] is None
    assert free["divergence"] > mild["divergence"] > stiff["divergence"] >= 0
    assert free["penalty_per_lambda"] > mild["penalty_per_lambda"] > stiff["penalty_per_lambda"]


def test_the_least_lambda_passes_the_gate_and_a_hopeless_one_does_not(
    learned: Path, write_task: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    b, held = write_task("b", seed=1, count=120), write_task("a-held", count=120)
    new = write_task("b-held", seed=1, count=120)
    common: dict[str, Any] = {"validation": {"a": held, "b": new}, "penalty_step": "proximal"}
    common |= {**FAST, "penalty": "l2"}
    found = finetune(
        learned, b, output_dir=tmp_path / "out", ewc_lambda=[0, 1e7], max_forgetting=0.05, **common
    )
    assert found["lambda_search"]["select"] == "smallest"
    assert found["ewc_lambda"] == 1e7
    assert set(found["metrics"]["after"]) == {"a"}  # what the gate was held against
    with caplog.at_level(logging.INFO, "consolidate"), pytest.raises(ForgettingError) as caught:
        finetune(
            learned,
            b,
            output_dir=tmp_path / "no",
            ewc_lambda=[0, 1e-5],
            max_forgetting=0.0,
            **common,
        )
    assert "no λ that was tried keeps forgetting within 0" in caplog.text
    assert caught.value.result["lambda_search"]["ewc_lambda"] == 1e-5
    assert (tmp_path / "no.failed-forgetting").is_dir()


def test_what_diverges_is_passed_over(learned: Path, write_task: Write, tmp_path: Path) -> None:
    b = write_task("b", seed=1)
    sgd = {**FAST, "optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9}
    found = finetune(learned, b, output_dir=tmp_path / "out", ewc_lambda=[1.0, 1e30], **sgd)
    mild, wild = found["lambda_search"]["trials"]
    assert found["ewc_lambda"] == 1.0
    assert mild["metrics"] is not None
    assert wild["metrics"] is wild["mean"] is None
    with pytest.raises(NonFiniteError, match="every λ that was tried"):
        finetune(learned, b, output_dir=tmp_path / "no", ewc_lambda=[1e30], **sgd)
    assert not list(tmp_path.glob("*no*"))  # nor progress, which another rate could not resume


def test_data_are_not_used_twice_and_names_are_known(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    b, held = write_task("b", seed=1), write_task("held")
    common: dict[str, Any] = {"output_dir": tmp_path / "out", "ewc_lambda": [1, 10], **FAST}
    with pytest.raises(UsageError, match="cannot be chosen on training or --evaluate data"):
        finetune(learned, b, validation={"b": str(b)}, **common)
    (tmp_path / "b.toml").write_text('data = "b.npz"\n')
    with pytest.raises(UsageError, match="cannot be chosen on training or --evaluate data"):
        finetune(learned, tmp_path / "b.toml", task="b", validation={"b": b}, **common)
    with pytest.raises(UsageError, match="cannot be chosen on training or --evaluate data"):
        finetune(learned, b, validation={"a": held}, evaluate={"test": held}, **common)
    with pytest.raises(UsageError, match=r"expected the new task, b, or a task of the ledger: a$"):
        finetune(learned, b, validation={"c": held}, **common)
    with pytest.raises(UsageError, match="--validation needs a search"):
        finetune(learned, b, validation={"a": held}, **common | {"ewc_lambda": 1.0})
    with pytest.raises(UsageError, match="cannot be combined with --penalty none"):
        finetune(learned, b, penalty="none", **common)
    one = write_task("one", count=1)
    with pytest.raises(InputError, match=r"at least two examples to split off .*, found 1"):
        finetune(learned, one, **common)
    assert not (tmp_path / "out").exists()


def test_l2_is_searched_too(network_checkpoint: Path, write_task: Write, tmp_path: Path) -> None:
    found = finetune(
        network_checkpoint,
        write_task("b", seed=1),
        output_dir=tmp_path / "out",
        penalty="l2",
        ewc_lambda=[0.001, 1000.0],
        **FAST,
    )
    start = load_file(network_checkpoint / "model.safetensors")
    free, stiff = found["lambda_search"]["trials"]
    assert free["penalty_per_lambda"] > stiff["penalty_per_lambda"]
    moved = load_file(tmp_path / "out" / "model.safetensors")
    assert found["ewc_lambda"] == 1000.0
    assert all(torch.allclose(start[name], moved[name], rtol=0, atol=0.02) for name in start)


def test_the_command_prints_the_curve_and_draws_it(
    capsys: pytest.CaptureFixture[str], learned: Path, write_task: Write, tmp_path: Path
) -> None:
    b, held = write_task("b", seed=1), write_task("held", count=120)
    words = (
        "finetune", learned, "--data", b, *("--model", NETWORK["model"]), "--max-steps", 8,
        "--ewc-lambda", "1,100", "--output-dir", tmp_path / "out", "--overwrite",
        "--search-plot", tmp_path / "curve.png",
    )  # fmt: skip
    code, out, err = run(capsys, *words, "--validation", f"a={held}")
    assert code == 0, err
    assert "          λ   steps          a          b       mean  forgetting" in out
    assert out.count("  selected\n") == 1
    assert "Measured: a on --validation, b on 30 examples held out of the training data" in out
    assert "The search took 2 runs, 16 steps" in out
    assert "λ = 100, 8 steps: a" in err
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "curve.png").unlink()
    code, out, err = run(capsys, *words, "--validation", f"a={held}", "--json")
    assert (code, json.loads(out)["status"]) == (0, "cached")
    assert "--search-plot: nothing is searched, as" in err
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    assert json.loads(out)["lambda_search"]["select"] == "largest"
    code, out, _ = run(capsys, *words, "--seed", 1)
    assert code == 0
    assert "KL(old‖new)" in out


def test_a_table_in_a_file_of_options(
    capsys: pytest.CaptureFixture[str], learned: Path, write_task: Write, tmp_path: Path
) -> None:
    (tmp_path / "options.toml").write_text("ewc-lambda = [1, 10]\nmax-steps = 3\n")
    code, out, err = run(
        capsys, "finetune", learned, "--data", write_task("b", seed=1), "--json",
        "--output-dir", tmp_path / "out", "--config", tmp_path / "options.toml",
        "--model", NETWORK["model"],
    )  # fmt: skip
    assert code == 0, err
    assert [t["ewc_lambda"] for t in json.loads(out)["lambda_search"]["trials"]] == [1, 10]


def test_held_out_examples_are_not_trained_on(
    learned: Path, tmp_path: Path, write_task: Write
) -> None:
    """Labels are random and inputs of many dimensions fit: only what was trained on is known."""
    random = np.random.default_rng(0)
    path = tmp_path / "b.npz"
    np.savez(
        path,
        inputs=random.normal(size=(100, 6)).astype(np.float32) * 5,
        labels=random.integers(0, 3, 100),
    )
    found = finetune(
        learned, path, output_dir=tmp_path / "out", ewc_lambda=[0.0], **FAST | {"epochs": 200}
    )
    (trial,) = found["lambda_search"]["trials"]
    trained = evaluate(tmp_path / "out", {"b": path}, **NETWORK)["b"]["accuracy"]
    assert trained > 0.6
    assert trial["metrics"]["b"]["accuracy"] < 0.5
