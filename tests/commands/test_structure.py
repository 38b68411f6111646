"""`--structure` in fisher and finetune: measured, used, resumed, refused."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import consolidate
from consolidate.api import finetune, fisher
from consolidate.api import run as run_chain
from formats.errors import InputError, UsageError
from formats.fisher_folder import read_fisher
from support.checkpoints import Write, first_task, write_clusters
from support.command_line import MODEL, run
from support.factor_checkpoints import rewrite
from support.faults import break_off, kill_after, killed_and_resumed
from support.folders import contents
from support.networks import FAST, NETWORK
from support.together import ended, started

INPUTS: dict[str, Any] = {**NETWORK, "structure": "inputs"}
COMMON: dict[str, Any] = {**FAST, "epochs": 2, "ewc_lambda": 10.0}


@pytest.fixture(scope="module")
def learned_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that knows task a, with factors, which `learned` copies."""
    folder = tmp_path_factory.mktemp("learned")
    return first_task(folder, write_clusters(folder, "a"), structure="inputs", **FAST)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that can resume often."""
    monkeypatch.setattr(consolidate.estimation.compensated_sums, "FOLDED_BATCHES", 8)


def matrices(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "fisher" / "factors.safetensors")


@pytest.mark.usefixtures("often")
def test_a_pass_with_factors_resumes_to_the_same_bytes(
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = write_task("old", count=100)
    options: dict[str, Any] = {**INPUTS, "batch_size": 2, "save_every_minutes": 0}
    fisher(network_checkpoint, data, output_dir=tmp_path / "whole", **options)
    command = partial(fisher, network_checkpoint, data, output_dir=tmp_path / "killed", **options)
    kills = [partial(kill_after, monkeypatch, examples) for examples in (20, 60)]
    killed_and_resumed(command, tmp_path / "killed", caplog, *kills)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    again = command()
    assert (again["status"], again["structure"]) == ("cached", "inputs")
    assert again["factors"] == {"layers": 2, "bytes": 4 * (7 * 7 + 9 * 9)}


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("way", ["plain", "searched", "interpolated", "adapter"])
def test_a_training_with_factors_resumes_to_the_same_bytes(
    learned: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    way: str,
) -> None:
    options = {**COMMON, "save_every_minutes": 0, "fisher_batch_size": 2}
    options |= {
        "searched": {"ewc_lambda": (1.0, 10.0), "merge_rule": "separate"},
        "interpolated": {"interpolate": 0.5, "interpolation": "fisher"},
        "adapter": {"lora_rank": 2, "lora_targets": ["0"], "lora_train_head": False},
    }.get(way, {})
    data = write_task("b", seed=1, count=80)
    whole = finetune(learned, data, output_dir=tmp_path / "whole", **options)
    command = partial(finetune, learned, data, output_dir=tmp_path / "out", **options)
    kills = [partial(break_off, monkeypatch, 3), partial(kill_after, monkeypatch, 40)]
    if way == "searched":  # whose candidates are trained by the same function
        del kills[0]
    killed_and_resumed(command, tmp_path / "out", caplog, *kills)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert whole["fisher"]["structure"] == "inputs"
    assert list(matrices(tmp_path / "out")) == ["0.weight.R", "2.weight.R"]
    assert command()["status"] == "cached"


def test_the_penalty_of_factors_moves_the_weights_otherwise(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    data = write_task("b", seed=1)
    for adapter in ({}, {"lora_rank": 2, "lora_targets": ["0", "2"], "learning_rate": 0.05}):
        ends = []
        for structure in ("inputs", "diagonal"):
            out = tmp_path / f"{structure}-{len(adapter)}"
            options = {**COMMON, **adapter, "ewc_lambda": 1000.0}
            finetune(learned, data, output_dir=out, structure=structure, **options)
            ends.append(load_file(out / "model.safetensors")["0.weight"])
        assert not torch.equal(*ends)


def test_other_penalties_leave_the_factors_alone_and_merge_the_new_ones(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    data = write_task("b", seed=1)
    options = {**FAST, "penalty": "l2", "ewc_lambda": 1.0, "penalty_step": "proximal"}
    result = finetune(learned, data, output_dir=tmp_path / "l2", **options)
    assert result["fisher"]["structure"] == "inputs"
    before, after = matrices(learned), matrices(tmp_path / "l2")
    assert all((after[name].diagonal() >= m.diagonal()).all() for name, m in before.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty_step": "proximal"}, "--penalty-step proximal cannot be combined with --struct"),
        ({"fisher_estimator": "batched"}, "--fisher-estimator batched cannot be combined with"),
        ({"structure": "rows"}, "--structure rows: expected one of diagonal, inputs"),
    ],
)
def test_what_cannot_be_combined_is_refused(
    learned: Path, write_task: Write, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        finetune(learned, write_task("b"), output_dir=tmp_path / "out", **COMMON, **options)
    assert not (tmp_path / "out").exists()
    if "structure" not in options:
        options = {**COMMON, **options, "structure": "diagonal"}
        finetune(learned, write_task("b"), output_dir=tmp_path / "out", **options)


def test_a_measurement_that_has_no_single_examples_is_refused(
    network_checkpoint: Path, write_task: Write
) -> None:
    with pytest.raises(UsageError, match="--estimator batched cannot be combined with --structure"):
        fisher(network_checkpoint, write_task("a"), estimator="batched", **INPUTS)
    assert not (network_checkpoint / "fisher").exists()


def test_a_dry_run_counts_the_factors(network_checkpoint: Path, write_task: Write) -> None:
    found = fisher(network_checkpoint, write_task("a"), dry_run=True, **INPUTS)
    assert found["structure"] == "inputs"
    assert found["files"]["factors.safetensors"] == 4 * (7 * 7 + 9 * 9)
    assert list(found["kept"].values()) == [2 * 4 * (83 + 7 * 7 + 9 * 9)]


def test_a_note_says_which_weights_have_no_matrix(
    tmp_path: Path, network_checkpoint: Path, write_task: Write, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="consolidate")
    fisher(network_checkpoint, write_task("a"), **INPUTS)
    assert "2 layers are protected by matrices (130 values)" in caplog.messages


def test_a_run_file_sets_the_structure(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    for seed, name in enumerate("ab"):
        write_task(name, seed=seed)
    path = tmp_path / "tasks.toml"
    path.write_text(
        f'start = "{network_checkpoint}"\noutput-dir = "out"\n[defaults]\n'
        'model = "support.networks:make_network"\nstructure = "inputs"\newc-lambda = 1.0\n'
        '[[task]]\nname = "a"\ndata = "a.npz"\n[[task]]\nname = "b"\ndata = "b.npz"\n'
    )
    run_chain(path, output_dir=tmp_path / "out")
    stored = read_fisher(tmp_path / "out" / "02-b" / "fisher")
    assert list(stored.ledger.blocks or {}) == ["0.weight.R", "2.weight.R"]
    again = run_chain(path, output_dir=tmp_path / "out")
    assert {step["status"] for step in again["steps"]} == {"skipped"}


def test_two_processes_sum_the_factors(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    data = write_task("a", count=59)
    fisher(network_checkpoint, data, output_dir=tmp_path / "one", **INPUTS)
    words = ["fisher", str(network_checkpoint), "--data", str(data), "--structure", "inputs"]
    words += ["--model", NETWORK["model"], "--output-dir", str(tmp_path / "two")]
    assert ended(started(2, words, tmp_path / "log")) == [0, 0], (tmp_path / "log").read_text()
    one, two = matrices(tmp_path / "one"), matrices(tmp_path / "two")
    for name, matrix in one.items():
        torch.testing.assert_close(two[name], matrix, rtol=2e-6, atol=1e-10)
        assert torch.equal(two[name], two[name].T)


def test_the_command_line_reports_factors(
    network_checkpoint: Path, write_task: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fisher", network_checkpoint, "--data", write_task("a"), "--json", *MODEL]
    code, out, _ = run(capsys, *words, "--structure", "inputs")
    found = json.loads(out)
    assert code == 0
    assert (found["structure"], found["factors"]["layers"]) == ("inputs", 2)


def test_a_matrix_that_would_push_the_weights_away_is_refused_before_training(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    def with_a_negative_eigenvalue(tensors: dict[str, torch.Tensor]) -> None:
        matrix = tensors[min(tensors)]
        size = matrix.diagonal().mean()  # the trace and a diagonal of at least 0 stay
        matrix.copy_(torch.eye(len(matrix)) * size)
        matrix[0, 1] = matrix[1, 0] = -3 * size

    rewrite(learned, with_a_negative_eigenvalue, "factors")
    with pytest.raises(InputError, match="has an eigenvalue below"):
        finetune(learned, write_task("b"), output_dir=tmp_path / "out", **COMMON)
    assert not (tmp_path / "out").exists()
