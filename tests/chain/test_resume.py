"""A fine-tuning that was broken off goes on to the same bytes, or is refused with what differs."""

import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import consolidate
from consolidate.chain import resume
from consolidate.commands import finetune as finetune_command
from consolidate.commands import finetune_output, finetune_run, finetune_search, measurement
from consolidate.commands.finetune_interpolation import Interpolator
from consolidate.estimation.passes import PartialPass
from consolidate.runtime import signals
from formats.errors import InputError, NonFiniteError
from support import in_process
from support.checkpoints import Write, normed, random_network, write_clusters
from support.faults import Killed, break_off, kill_after
from support.folders import contents
from support.networks import FAST, NETWORK
from support.together import ended, started

COMMON: dict[str, Any] = {**FAST, "save_every_minutes": 0, "log_every": 1, "ewc_lambda": 10.0}


@pytest.fixture(scope="module")
def learned_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, the Fisher of its task and the data, which `learned` copies."""
    folder = tmp_path_factory.mktemp("learned")
    old = write_clusters(folder, "old")
    consolidate.fisher(random_network(folder / "start"), old, **NETWORK)
    return folder


@pytest.fixture
def learned(learned_once: Path, tmp_path: Path) -> Path:
    """A checkpoint that holds the Fisher of its task."""
    return shutil.copytree(learned_once, tmp_path, dirs_exist_ok=True) / "start"


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two results are the same but for the place and the time."""

    def bare(result: dict[str, Any]) -> dict[str, Any]:
        fisher = {**result["fisher"], "folder": None}
        return {**result, "checkpoint": None, "seconds": None, "fisher": fisher}

    return bare(one) == bare(other)


WAYS: dict[str, dict[str, Any]] = {
    "adamw": {
        "optimizer": "adamw", "lr_scheduler": "cosine", "warmup_steps": 3, "max_grad_norm": 0.5,
        "weight_decay": 0.01, "max_steps": 7,
    },
    "proximal": {"optimizer": "sgd", "momentum": 0.9, "penalty_step": "proximal"},
    "accumulated": {"gradient_accumulation_steps": 3, "norm_statistics": "update"},
    "frozen": {"freeze": ["first.*"], "max_examples": 50, "mixed_precision": "bf16"},
    "scaled": {"mixed_precision": "fp16", "lr_scheduler": "linear"},
    "sgd": {"optimizer": "sgd", "lr_scheduler": "linear"},
    "adapter": {"lora_rank": 2, "lora_targets": ["last"], "max_grad_norm": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_training_goes_on_to_the_same_bytes(
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    way: str,
) -> None:
    old, new = write_task("old"), write_task("new", seed=1, count=70)
    start = normed(tmp_path / "normed", old)
    options = {**COMMON, "model": "support.networks:Network", "epochs": 3, **WAYS[way]}
    options |= {"evaluate": {"old": old}, "evaluate_every": 4}
    whole = consolidate.finetune(start, new, output_dir=tmp_path / "whole", **options)
    caplog.set_level("INFO", "consolidate")
    caplog.clear()
    steps = [step for step in (1, 4, 5, whole["steps"]) if step <= whole["steps"]]
    for step in steps:
        break_off(monkeypatch, step)
        with pytest.raises(Killed):
            consolidate.finetune(start, new, output_dir=tmp_path / "killed", **options)
        assert not (tmp_path / "killed").exists()
        assert (tmp_path / ".killed.consolidate-partial").exists()
    resumed = consolidate.finetune(start, new, output_dir=tmp_path / "killed", **options)
    assert [f"resuming from step {step} of {whole['steps']}" in caplog.text for step in steps] == [
        True
    ] * len(steps)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert alike(resumed, whole)
    assert not list(tmp_path.glob(".killed*"))


def test_it_goes_on_from_where_it_was_kept_last(
    learned: Path, write_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = write_task("new", seed=1)
    options = {**COMMON, "epochs": 3, "save_every_minutes": 1}
    consolidate.finetune(learned, new, output_dir=tmp_path / "whole", **options)
    times = iter([0.0, 1.0, 60.0])  # seconds: at the start and after two steps
    timed = partial(resume.KeptWork, clock=lambda: next(times, 62.0))
    break_off(monkeypatch, 4)
    with monkeypatch.context() as patch:
        patch.setattr(measurement, "KeptWork", timed)
        with pytest.raises(Killed):
            consolidate.finetune(learned, new, output_dir=tmp_path / "out", **options)
    steps: list[int] = []
    train = finetune_run.training_steps

    def counted(*arguments: Any, **settings: Any) -> Any:
        steps.append(settings["first_step"])
        return train(*arguments, **settings)

    monkeypatch.setattr(finetune_run, "training_steps", counted)
    consolidate.finetune(learned, new, output_dir=tmp_path / "out", **options)
    assert steps == [2, 4, 8]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_pass_for_the_fisher_goes_on_without_training_again(
    learned: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(consolidate.estimation.compensated_sums, "FOLDED_BATCHES", 8)
    new = write_task("new", seed=1, count=100)
    options = {**COMMON, "epochs": 2, "fisher_batch_size": 2, "evaluate": {"new": new}}
    whole = consolidate.finetune(learned, new, output_dir=tmp_path / "whole", **options)
    for examples in (40, 70):
        kill_after(monkeypatch, examples)
        with pytest.raises(Killed):
            consolidate.finetune(learned, new, output_dir=tmp_path / "out", **options)
    caplog.set_level("INFO", "consolidate")
    caplog.clear()
    resumed = consolidate.finetune(learned, new, output_dir=tmp_path / "out", **options)
    assert caplog.messages == [
        "resuming after the last of 14 steps",
        "resuming after 64 of 100 examples",
    ]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert alike(resumed, whole)


@pytest.mark.parametrize("during", ["set_digest", "measure_fisher", "write_checkpoint"])
def test_what_was_learned_is_kept_when_the_rest_is_interrupted(
    learned: Path, write_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise signals.Terminated

    new = write_task("new", seed=1)
    options = {**COMMON, "save_every_minutes": 10**6}
    consolidate.finetune(learned, new, output_dir=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        module = finetune_output if during == "write_checkpoint" else finetune_command
        patch.setattr(module, during, interrupted)
        with pytest.raises(signals.Terminated):
            consolidate.finetune(learned, new, output_dir=tmp_path / "out", **options)
    monkeypatch.delattr(finetune_run, "training_steps")
    consolidate.finetune(learned, new, output_dir=tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("during", ["_merge_adapter", "_take_finite_values", "apply", "end"])
def test_what_was_learned_is_kept_at_a_stop_before_it_is_rounded(
    learned: Path, write_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    place: Any = {"apply": Interpolator, "end": resume.KeptTraining}.get(during, finetune_run)
    whole = getattr(place, during)

    def stopped(*arguments: Any, **options: Any) -> None:
        if during == "end":
            whole(*arguments, **options)
        if not signals.ask(signals.Terminated):
            raise signals.Terminated
        if during != "end":
            whole(*arguments, **options)

    new = write_task("new", seed=1)
    options = {**COMMON, "save_every_minutes": 10**6}
    options |= {"interpolate": 0.5} if during == "apply" else {}
    options |= {"lora_rank": 2, "lora_targets": ["0"]} if during == "_merge_adapter" else {}
    consolidate.finetune(learned, new, output_dir=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(place, during, stopped)
        with pytest.raises(signals.Terminated):
            consolidate.finetune(learned, new, output_dir=tmp_path / "out", **options)
    monkeypatch.delattr(finetune_run, "training_steps")
    consolidate.finetune(learned, new, output_dir=tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_pass_that_is_stopped_is_kept_as_far_as_it_came(
    learned: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(consolidate.estimation.compensated_sums, "FOLDED_BATCHES", 8)
    keep = resume.KeptPass.keep

    def keep_and_stop(kept: resume.KeptPass, partial: PartialPass) -> None:
        if partial.examples == 32:
            assert signals.ask(signals.Terminated)
        keep(kept, partial)

    new = write_task("new", seed=1, count=100)
    options = {**COMMON, "fisher_batch_size": 2, "save_every_minutes": 10**6}
    consolidate.finetune(learned, new, output_dir=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(resume.KeptPass, "keep", keep_and_stop)
        with pytest.raises(signals.Terminated):
            consolidate.finetune(learned, new, output_dir=tmp_path / "out", **options)
    caplog.set_level("INFO", "consolidate")
    caplog.clear()
    consolidate.finetune(learned, new, output_dir=tmp_path / "out", **options)
    assert "resuming after 32 of 100 examples" in caplog.messages
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("strengths", [[1.0, 10.0, 100.0], "auto"])
def test_a_search_keeps_its_candidates(
    learned: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strengths: Any,
) -> None:
    new = write_task("new", seed=1)
    options = {**COMMON, "max_steps": 4, "ewc_lambda": strengths}
    whole = consolidate.finetune(learned, new, output_dir=tmp_path / "whole", **options)
    descend, runs = finetune_search.descend, []

    def broken(*arguments: Any) -> Any:
        runs.append(1)
        if len(runs) == 3:
            raise Killed
        return descend(*arguments)

    monkeypatch.setattr(finetune_search, "descend", broken)
    with pytest.raises(Killed):
        consolidate.finetune(learned, new, output_dir=tmp_path / "out", **options)
    break_off(monkeypatch, 3)
    with pytest.raises(Killed):  # in the next candidate
        consolidate.finetune(learned, new, output_dir=tmp_path / "out", **options)
    resumed = consolidate.finetune(learned, new, output_dir=tmp_path / "out", **options)
    assert len(runs) == whole["lambda_search"]["cost"]["runs"] + 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    for result in (whole, resumed):
        result["lambda_search"]["cost"].pop("seconds")
        for trial in result["lambda_search"]["trials"]:
            trial.pop("seconds")
    assert alike(resumed, whole)
    assert resumed["lambda_search"] == whole["lambda_search"]


def test_the_choice_of_a_search_is_kept_with_the_training(
    learned: Path, write_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = write_task("new", seed=1)
    options = {**COMMON, "epochs": 2, "ewc_lambda": [1.0, 1000.0]}
    consolidate.finetune(learned, new, output_dir=tmp_path / "whole", **options)
    train = finetune_command.train

    def broken(*arguments: Any, **settings: Any) -> Any:
        break_off(monkeypatch, 3)
        return train(*arguments, **settings)

    monkeypatch.setattr(finetune_command, "train", broken)
    with pytest.raises(Killed):
        consolidate.finetune(learned, new, output_dir=tmp_path / "out", **options)
    monkeypatch.setattr(finetune_command, "train", train)
    monkeypatch.delattr(finetune_search, "search_lambda")
    consolidate.finetune(learned, new, output_dir=tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_has_changed_is_said(
    learned: Path, write_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old.npz", write_task("new", seed=1)
    options = {**COMMON, "output_dir": tmp_path / "out", "evaluate": {"old": old}}
    break_off(monkeypatch, 2)
    with pytest.raises(Killed):
        consolidate.finetune(learned, new, **options)
    kept = (tmp_path / ".out.consolidate-partial").read_bytes()
    for changed, message in (
        ({"learning_rate": 0.1}, r"another run \(changed: learning-rate 0.01 → 0.1\): start "),
        ({"epochs": 7, "seed": 1}, r"\(changed: epochs default → 7; seed 0 → 1\)"),
        ({"evaluate": {}}, r"\(changed: test data of old removed\)"),
    ):
        with pytest.raises(InputError, match=message + ".*--restart"):
            consolidate.finetune(learned, new, **{**options, **changed})
    write_task("new", seed=2)
    with pytest.raises(InputError, match=r"another run \(changed: data\)"):
        consolidate.finetune(learned, new, **options)
    write_task("new", seed=1)
    consolidate.fisher(learned, old, **NETWORK, estimator="mc", overwrite=True)
    with pytest.raises(InputError, match=r"\(changed: checkpoint it starts from\)"):
        consolidate.finetune(learned, new, **options)
    assert (tmp_path / ".out.consolidate-partial").read_bytes() == kept
    result = consolidate.finetune(learned, new, **options, restart=True)
    assert result["status"] == "done"
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("moment", ["before", "step 2", "epoch 1", "after"])
def test_a_measurement_that_is_interrupted_is_made_again(
    learned: Path, write_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setattr(finetune_run, "_stored_as_trained", lambda model: False)
    new = write_task("new", seed=1)
    options = {**COMMON, "save_every_minutes": 10**6, "epochs": 2, "evaluate": {"new": new}}
    options |= {"evaluate_every": 2}
    whole = consolidate.finetune(learned, new, output_dir=tmp_path / "whole", **options)
    measure, count = finetune_run.evaluate_all, list(whole["metrics"]).index(moment)
    count -= moment == "epoch 1" or 2 * (moment == "after")  # taken from a step's

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        nonlocal count
        count -= 1
        if count < 0:
            raise signals.Terminated
        return measure(*arguments, **settings)

    options["output_dir"] = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(finetune_run, "evaluate_all", interrupted)
        with pytest.raises(signals.Terminated):
            consolidate.finetune(learned, new, **options)
    assert (tmp_path / ".out.consolidate-partial").exists() == (moment != "before")
    consolidate.finetune(learned, new, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(("dtype", "times"), [(torch.float32, 2), (torch.bfloat16, 3)])
def test_what_is_stored_is_measured_again_only_if_it_was_rounded(
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    times: int,
) -> None:
    weights = network_checkpoint / "model.safetensors"
    narrow = {name: values.to(dtype) for name, values in load_file(weights).items()}
    save_file(narrow, weights, {"format": "pt"})
    measure, measured = finetune_run.evaluate_all, []

    def counted(*arguments: Any, **settings: Any) -> Any:
        measured.append(measure(*arguments, **settings))
        return measured[-1]

    monkeypatch.setattr(finetune_run, "evaluate_all", counted)
    new = write_task("new", seed=1)
    options = {**FAST, "penalty": "none", "epochs": 1, "evaluate": {"new": new}}
    found = consolidate.finetune(network_checkpoint, new, output_dir=tmp_path / "out", **options)
    assert len(measured) == times
    assert found["metrics"]["after"] == measured[-1]


def test_a_training_goes_on_where_it_cannot_be_kept(
    learned: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*arguments: Any) -> None:
        raise InputError("the disk is full")

    monkeypatch.setattr(consolidate.chain.resume, "write_partial", full)
    caplog.set_level("INFO", "consolidate")
    result = consolidate.finetune(
        learned, write_task("new", seed=1), output_dir=tmp_path / "out", **COMMON
    )
    assert result["steps"] == 4
    assert caplog.text.count("cannot be saved, and the training continues: the disk is full") == 1


def test_saving_takes_at_most_a_tenth_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def slow(*arguments: Any) -> None:
        now[0] += 40.0

    monkeypatch.setattr(resume, "write_partial", slow)
    work = resume.KeptWork(tmp_path / "out", dict, every=60, result_bytes=0, clock=lambda: now[0])
    due = []
    for moment in (59.0, 60.0, 100.0 + 359.0, 100.0 + 360.0):
        now[0] = moment
        work.settle()
        due.append(work.due)
        if due == [False, True]:
            assert work.keep({}, {}, "training")
    assert due == [False, True, False, True]


def test_saving_is_tried_again_after_it_has_failed(
    learned: Path, write_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, tried = consolidate.chain.resume.write_partial, []

    def full_at_first(*arguments: Any) -> None:
        tried.append(len(list(tmp_path.glob(".out.consolidate-partial"))))
        if len(tried) < 3:
            raise InputError("the disk is full")
        write(*arguments)

    monkeypatch.setattr(consolidate.chain.resume, "write_partial", full_at_first)
    monkeypatch.setattr(consolidate.chain.resume, "RETRY_SECONDS", 0.0)
    consolidate.finetune(learned, write_task("new", seed=1), output_dir=tmp_path / "out", **COMMON)
    assert tried[:4] == [0, 0, 0, 1]


def test_a_training_that_diverges_is_not_kept(
    learned: Path, write_task: Write, tmp_path: Path
) -> None:
    options = {**COMMON, "ewc_lambda": 1e9, "optimizer": "sgd", "learning_rate": 1.0, "epochs": 30}
    with pytest.raises(NonFiniteError):
        consolidate.finetune(
            learned, write_task("new", seed=1), output_dir=tmp_path / "out", **options
        )
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


STOPPED = """
import os, signal
from pathlib import Path
from support.networks import make_network

def network(config):
    module = make_network(config)
    steps = []

    def count(module, inputs):
        steps.append(module.training)
        if sum(steps) == 6 and Path("stop").exists():
            Path("stop").unlink()
            os.kill(os.getpid(), signal.{signal})

    module.register_forward_pre_hook(count)
    return module
"""


@pytest.mark.parametrize(
    ("sent", "code", "kept"),
    [
        ("SIGKILL", -signal.SIGKILL, 5),
        ("SIGINT", 130, 6),
        pytest.param("SIGTERM", 143, 6, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_stopped_goes_on(
    learned: Path, write_task: Write, tmp_path: Path, sent: str, code: int, kept: int
) -> None:
    write_task("new", seed=1)
    module = f"stopped_by_{sent.lower()}"
    (tmp_path / f"{module}.py").write_text(STOPPED.format(signal=sent))
    words = ["finetune", "start", "--data", "new.npz", "--model", f"{module}:network"]
    words += ["--ewc-lambda", "10", "--epochs", "3", "--optimizer", "adam"]
    # A signal that can be handled keeps what was done; against SIGKILL it has to be kept before.
    words += ["--save-every-minutes", "0" if sent == "SIGKILL" else "60"]

    def run_here(out: str) -> tuple[int, str, str]:
        here = (tmp_path, *words, "--output-dir", out)
        return in_process.consolidate(*here, variables=os.environ)

    assert run_here("whole")[0] == 0
    (tmp_path / "stop").touch()
    log = tmp_path / "log"
    process = started(1, [*words, "--output-dir", "out"], log, lambda: os.chdir(tmp_path))
    assert ended(process) == [code]
    assert not (tmp_path / "out").exists()
    if code > 0:
        assert [line for line in log.read_text().splitlines() if line][-2:] == [
            "stopped after step 6 of 12: the same command resumes from there",
            {"SIGINT": "interrupted", "SIGTERM": "terminated"}[sent],
        ]
    resumed, _, err = run_here("out")
    assert resumed == 0
    assert f"resuming from step {kept} of 12\n" in err
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))
