import fcntl
import json
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import click
import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file, save_file

from consolidate.cli import cli, main
from consolidate.commands import show as show_command
from consolidate.options import FinetuneOptions
from consolidate.views import metrics as metrics_view
from formats.errors import InputError
from support import loopback_hub, tiny_models
from support.checkpoints import Write
from support.command_line import MODEL, finished, launched, run
from support.json_schema import SCHEMA

FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


def test_fisher_finetune_evaluate_show_verify(
    capsys: pytest.CaptureFixture[str], network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    old, new, out = write_task("old"), write_task("new", seed=1), tmp_path / "out"
    code, text, err = run(capsys, "fisher", network_checkpoint, "--data", old, *MODEL)
    assert (code, err) == (0, "")
    assert "exact Fisher of 'old' over 60 examples, 83 parameters" in text
    code, text, err = run(
        capsys, "finetune", network_checkpoint, "--data", new, "--output-dir", out, *MODEL,
        "--ewc-lambda", 10, "--max-steps", 5, "--log-every", 1, "--evaluate", f"old={old}",
        "--optimizer", "sgd", "--momentum", 0.9, "--lr-scheduler", "cosine", "--json",
        "--penalty-step", "proximal", "--penalty-dtype", "bfloat16", "--penalty-device", "cpu",
    )  # fmt: skip
    assert code == 0
    result = json.loads(text)
    assert result["steps"] == 5
    assert result["seconds"].keys() == {"training", "evaluation", "fisher"}
    assert min(result["seconds"].values()) > 0
    assert "seconds" not in (out / "fisher" / "fisher.json").read_text()
    assert "step 3 of 5: loss" in err
    assert "penalty" in err
    code, text, _ = run(capsys, "evaluate", out, "--data", f"old={old}", "--data", new, *MODEL)
    assert code == 0
    assert [line.split()[0] for line in text.splitlines()] == ["task", "old", "new"]
    code, text, _ = run(capsys, "show", out, "--overlap", out, "--json")
    assert code == 0
    assert [task["name"] for task in json.loads(text)["tasks"]] == ["old", "new"]
    layers = json.loads(text)["overlap"]["layers"]
    assert [layer["overlap"] for layer in layers] == pytest.approx([1.0] * len(layers))
    code, _, err = run(capsys, "show", out, "--overlap", out, "--markdown")
    assert code == 2
    assert "it prints the accuracy matrix alone" in err
    code, text, _ = run(capsys, "show", out)
    assert code == 0
    code, text, _ = run(capsys, "verify", out)
    assert code == 0
    assert "is intact" in text


@pytest.mark.parametrize("command", ["finetune", "run"])
def test_numbers_below_the_normal_ones_are_taken_for_0_in_training(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
    command: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_task("a")
    (tmp_path / "tasks.toml").write_text(
        'start = "start"\noutput-dir = "chain"\n[[task]]\nname = "a"\ndata = "a.npz"\n'
        f'model = "{__name__}:small_number"\npenalty = "none"\n'
    )
    finetune = ("start", "--data", "a.npz", "--output-dir", "out", "--penalty", "none")
    words = {"finetune": (*finetune, "--model", f"{__name__}:small_number"), "run": ("tasks.toml",)}
    code, _, err = run(capsys, command, *words[command])
    assert (code, "error: 0.0 is enough" in err) == (InputError.exit_code, True), err
    assert torch.tensor(1e-39) * 1 > 0


def small_number(config: dict[str, Any]) -> NoReturn:
    """A factory that tells what becomes of a number below the normal ones."""
    raise InputError(f"{float(torch.tensor(1e-39) * 1)} is enough")


def test_a_dry_run_and_a_tolerance(
    capsys: pytest.CaptureFixture[str], network_checkpoint: Path, write_task: Write
) -> None:
    words = ("fisher", network_checkpoint, "--data", write_task("old", count=300), *MODEL)
    code, text, _ = run(capsys, *words, "--dry-run")
    assert code == 0
    assert "parameters   83\nexamples     300, exact\n" in text
    assert "files        fisher.safetensors 0.0 MB\n" in text
    assert "progress     .fisher.consolidate-partial 0.0 MB, if there is room" in text
    assert not (network_checkpoint / "fisher").exists()
    code, text, _ = run(capsys, *words, "--tolerance", "0.2", "--accumulate-dtype", "float64")
    assert code == 0
    assert re.search(r"trace [\d.]+ \(at worst ± [\d.]+%, of \d\.(weight|bias)\)", text)
    code, text, err = run(capsys, *words, "--overwrite", "--tolerance", "1e-9", "--json")
    assert code == 0
    assert "--tolerance 1e-09 was not reached: with all 300 examples" in err
    result = json.loads(text)
    assert result["examples"] == 300
    assert 0 < result["layers"]["0.weight"]["relative_error"] < 1


def test_a_dry_run_beside_a_fisher_says_so_and_goes_on(
    capsys: pytest.CaptureFixture[str], network_checkpoint: Path, write_task: Write
) -> None:
    words = ("fisher", network_checkpoint, "--data", write_task("old"), *MODEL)
    assert run(capsys, *words)[0] == 0
    before = (network_checkpoint / "fisher" / "fisher.json").read_bytes()
    code, text, err = run(capsys, *words, "--dry-run")
    assert code == 0
    assert "parameters   83\n" in text
    told = (
        f"without --dry-run this would be refused: {network_checkpoint / 'fisher'} already exists"
    )
    assert told in err
    code, _, err = run(capsys, *words, "--dry-run", "--overwrite")
    assert (code, "refused" in err) == (0, False)
    assert (network_checkpoint / "fisher" / "fisher.json").read_bytes() == before


def test_what_every_command_writes_as_json_is_as_its_schema_tells(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
    hub: loopback_hub.Hub,
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        write_task(name, seed=seed)
    (tmp_path / "tasks.toml").write_text(
        'start = "start"\noutput-dir = "chain"\n[evaluate]\na = "a.npz"\n'
        '[[task]]\nname = "b"\ndata = "b.npz"\newc-lambda = 1\nmax-steps = 2\n'
        'model = "support.networks:make_network"\n'
    )
    finetune = ("--data", "b.npz", "--evaluate", "a=a.npz", *MODEL, "--max-steps", 2)
    for arguments in (
        ("fisher", "start", "--data", "a.npz", *MODEL, "--dry-run"),
        ("fisher", "start", "--data", "a.npz", *MODEL),
        ("finetune", "start", *finetune, "--ewc-lambda", 1, "--output-dir", "2"),
        ("finetune", "start", *finetune, "--ewc-lambda", "1,2", "--task", "c", "--output-dir", "3"),
        ("evaluate", "2", "--data", "a.npz", *MODEL),
        ("merge", "2", "3", "--base", "start", "--output-dir", "m"),
        ("run", "tasks.toml", "--dry-run"),
        ("run", "tasks.toml"),
        ("show", "2"),
        ("verify", "start", "2"),
        ("report", "2"),
    ):
        code, out, err = run(capsys, *arguments, "--json")
        assert code == 0, err
        assert out
    assert SCHEMA["$defs"].keys() >= cli.commands.keys()
    variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": loopback_hub.TOKEN}
    code, out, err = loopback_hub.run(tmp_path, "push", "2", "user/model", "--json", **variables)
    assert code == 0, err
    assert json.loads(out)["status"] == "done"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("show", "./nowhere", "--json"), 3),
        (("fisher", "./nowhere", "--json"), 2),
        (("fisher", "./nowhere", "--no-such-option", "--json"), 2),
        (("show", "./nowhere", "--top", "none", "--json"), 2),
    ],
)
def test_a_failing_command_says_so_in_json_too(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int
) -> None:
    found, out, err = run(capsys, *arguments)
    told = json.loads(out)
    assert (found, told["status"], told["exit_code"]) == (code, "failed", code)
    assert err == f"error: {told['error']}\n"


@pytest.mark.parametrize(
    ("shell", "words", "code", "err"),
    [
        ('"$@" >&-', ["show", "no such", "--json"], 3, "error: no such: no such file or folder\n"),
        ('"$@" >&-', ["--version"], 0, ""),
        ('"$@" 2>&-', ["show", "no such"], 3, ""),
        pytest.param(
            *('"$@" >/dev/full', ["--version"], 3, "error: output: no space left\n"), marks=FULL
        ),
        pytest.param('"$@" 2>/dev/full', ["show", "no such"], 3, "", marks=FULL),
        ('trap "" PIPE; { "$@"; echo $? >&2; } | true', ["fisher", "--help"], 0, "141\n"),
        (
            *('trap "" PIPE; { "$@"; echo $? >&2; } | true', ["show", "no such", "--json"], 0),
            "error: no such: no such file or folder\n3\n",
        ),
    ],
)
def test_what_is_closed_is_not_written_to(
    tmp_path: Path, shell: str, words: list[str], code: int, err: str
) -> None:
    command = ["sh", "-c", shell, "sh", sys.executable, "-m", "consolidate", *words]
    # What is buffered is written, and fails, once more when the interpreter ends.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (code, err)


def test_windows_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    code, _, err = run(capsys, "--help")
    assert (code, err) == (2, "error: consolidate does not run on Windows itself; use WSL\n")


def test_alone_it_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys)
    assert (code, out) == (2, "")
    assert err.startswith("Usage: consolidate [OPTIONS] COMMAND")
    assert "see consolidate --help" not in err


def test_numbers_that_are_not_finite_leave_with_4(
    capsys: pytest.CaptureFixture[str], network_checkpoint: Path, write_task: Write
) -> None:
    file = network_checkpoint / "model.safetensors"
    weights = load_file(file)
    weights["0.bias"][3] = torch.nan
    save_file(weights, file, {"format": "pt"})
    words = ("evaluate", network_checkpoint, "--data", write_task("a"), *MODEL, "--json")
    code, out, err = run(capsys, *words)
    assert (code, json.loads(out)["exit_code"]) == (4, 4)
    assert "0.bias" in err


def test_a_fault_of_ours_leaves_with_1_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def show(*arguments: object, **options: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(show_command, "show", show)
    code, out, err = run(capsys, "show", "a", "--json")
    assert (code, json.loads(out)["exit_code"]) == (1, 1)
    assert err.startswith(
        "error: IndexError: list index out of range (internal error, please report it"
    )


def test_a_process_of_a_pipeline_sees_plain_lines_and_is_asked_nothing(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    words = ["finetune", "start", "--data", write_task("a"), *MODEL, "--penalty", "none"]
    words += ["--log-every", "1"]
    process = launched(
        *(*words, "--output-dir", "deep/out"),
        cwd=tmp_path,
        variables={"FORCE_COLOR": "1"},
        stdin=subprocess.PIPE,  # open, and nothing comes
        text=False,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    out, err = process.stdout.read(), process.stderr.read()
    process.communicate()
    assert process.returncode == 0, err
    assert out.startswith(b"deep/out: 4 steps, ")  # the path as it was given
    assert err.startswith(b"step 1 of 4: ")
    assert not re.search(rb"[\x1b\r\b]", out + err)


def test_merge(
    capsys: pytest.CaptureFixture[str], network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    for seed, name in enumerate("ab"):
        code, _, err = run(
            capsys, "finetune", network_checkpoint, "--data", write_task(name, seed=seed),
            "--output-dir", tmp_path / name, *MODEL, "--penalty", "none", "--max-steps", 2,
            "--merge-rule", "separate", "--task-weight", "units",
        )  # fmt: skip
        assert code == 0, err
    together = ("merge", tmp_path / "a", tmp_path / "b")
    code, text, _ = run(capsys, *together, "--output-dir", tmp_path / "ab")
    assert code == 0
    assert f"merged from {tmp_path / 'a'}, {tmp_path / 'b'}; tasks a, b; 83 parameters" in text
    out = tmp_path / "weighed"
    code, text, _ = run(capsys, *together, "--output-dir", out, "--weights", "2,0.5", "--json")
    assert code == 0
    assert json.loads(text)["weights"] == [2, 0.5]
    code, _, err = run(capsys, "merge", tmp_path / "a", "--output-dir", tmp_path / "copy")
    assert code == 2
    assert "merge needs at least two checkpoints, found 1" in err
    out = tmp_path / "weighed"
    assert run(capsys, "verify", out)[0] == run(capsys, "show", out)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("fisher", "./nowhere", "--data", "x.npz"), 3, "nowhere"),
        (("fisher", "start", "--data", "typo.npz", *MODEL), 3, "typo.npz"),
        (
            ("fisher", "start", "--data", "old.npz", "--model", "support.networks:no_such"),
            2,
            "no_such",
        ),
        (("fisher", "start", "--data", "old.npz"), 3, "config.json"),
        (("fisher", "start", "--data", "empty.jsonl", *MODEL), 3, "empty.jsonl"),
        (("fisher", "start", "--data", "old.npz", *MODEL, "--label-column", "lable"), 3, "lable"),
        (("fisher", "start", "--data", "old.npz", *MODEL, "--max-length", "5"), 2, "--max-length"),
        (("fisher", "start", "--data", "old.npz", *MODEL, "--freeze", "none.*"), 2, "none.*"),
        (("fisher", "start", "--data", "old.npz", *MODEL, "--task", "a b"), 3, "a b"),
        (("fisher", "start", "--data", "range.npz", *MODEL), 3, "label"),
        (("fisher", "start", "--data", "wide.npz", *MODEL), 3, "inputs"),
        (("fisher", "cut", "--data", "old.npz", *MODEL), 3, "model.safetensors"),
        (("fisher", "quantized", "--data", "old.npz", *MODEL), 3, "quantized"),
        (("fisher", "code.pt", "--data", "old.npz", "--output-dir", "o", *MODEL), 3, "code.pt"),
        (("fisher", "data-only", "--data", "old.npz", *MODEL), 3, "data-only"),
        (
            ("finetune", "start", "--data", "old.npz", "--output-dir", "o", *MODEL),
            2,
            "--ewc-lambda",
        ),
        (("evaluate", "start", "--data", "=old.npz", *MODEL), 2, "NAME=DATA"),
        (("finetune", "start", "--data", "old.npz"), 2, "--output-dir"),
        (("show", "start"), 3, "fisher"),
        (("verify", "start"), 3, "fisher"),
        (("merge", "start", "start", "--output-dir", "o"), 3, "fisher"),
        (("merge", "start", "--output-dir", "o", "--weights", "1;2"), 2, "--weights"),
        (("merge", "--output-dir", "o"), 2, "CHECKPOINT"),
        (
            ("fisher", "start", "--data", "old.npz", *MODEL, "--task-weight", "heavy"),
            2,
            "--task-weight",
        ),
        (("fisher", "start", "--dtaa", "old.npz"), 2, "--data"),
        (("fisher", "start", "--data", "old.npz", *MODEL, "--tolerance", "0"), 2, "--tolerance"),
    ],
)
def test_what_is_wrong_is_said_in_two_lines_and_nothing_is_harmed(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = load_file(network_checkpoint / "model.safetensors")
    data = {key: torch.from_numpy(values) for key, values in _arrays(write_task("old")).items()}
    _write_npz(tmp_path / "range.npz", data["inputs"], data["labels"] + 1)
    _write_npz(tmp_path / "wide.npz", data["inputs"].repeat(1, 2), data["labels"])
    (tmp_path / "empty.jsonl").write_text("")
    for folder in ("cut", "quantized", "data-only"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text('{"sizes": [6, 8, 3]}')
    whole = (network_checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:-8])
    save_file(weights, tmp_path / "quantized" / "model.safetensors", {"format": "pt"})
    (tmp_path / "quantized" / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    torch.save({"state_dict": weights, "run": _Code()}, tmp_path / "code.pt")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    found, out, err = run(capsys, *arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
    if err.startswith("error: "):
        assert len(err.strip().splitlines()) <= 2
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert after == before


class _Code:
    """Would make a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("harmed",)


def _arrays(path: Path) -> dict[str, object]:
    import numpy as np

    with np.load(path) as arrays:
        return dict(arrays)


def _write_npz(path: Path, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    import numpy as np

    np.savez(path, inputs=inputs.numpy(), labels=labels.numpy())


def test_flags_win_over_variables_and_variables_over_the_file(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
) -> None:
    config = tmp_path / "options.toml"
    config.write_text(
        'data = "old.npz"\nmax-examples = 5\nmodel = "support.networks:make_network"\n'
    )
    write_task("old")
    monkeypatch.chdir(tmp_path)

    def examples(*arguments: str) -> int:
        code, out, err = run(
            capsys, "fisher", "start", "--config", config, "--overwrite", "--json", *arguments
        )
        assert code == 0, err
        return int(json.loads(out)["examples"])

    assert examples() == 5
    monkeypatch.setenv("CONSOLIDATE_FISHER_MAX_EXAMPLES", "6")
    assert examples() == 6
    assert examples("--max-examples", "7") == 7
    config.write_text("max-exampels = 5\n")
    code, _, err = run(capsys, "fisher", "start", "--config", config, "--data", "old.npz")
    assert code == 2
    assert "max-examples" in err


def test_misspelt_variables_are_told_without_their_values(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, network_checkpoint: Path
) -> None:
    monkeypatch.setenv("CONSOLIDATE_FINETUNE_EWC_LAMDA", "secret")
    monkeypatch.setenv("CONSOLIDATE_QUXQUUX", "secret")
    monkeypatch.setenv("CONSOLIDATE_VERSION", "secret")
    monkeypatch.setenv("CONSOLIDATE_FISHER_MAX_EXAMPLES", "6")
    code, _, err = run(capsys, "verify", network_checkpoint)
    assert code == 3
    near, none = err.splitlines()[:2]
    assert near.startswith(
        "the environment variable CONSOLIDATE_FINETUNE_EWC_LAMDA sets no option; did you mean "
    )
    assert near.endswith(" CONSOLIDATE_FINETUNE_EWC_LAMBDA?")
    assert none == "the environment variable CONSOLIDATE_QUXQUUX sets no option"
    assert "MAX_EXAMPLES" not in err
    assert "secret" not in err


def test_a_signal_ends_the_run_and_leaves_what_it_goes_on_from(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    data = write_task("big", count=20_000)
    before = sorted(tmp_path.rglob("*"))
    process = launched(
        *("finetune", "start", "--data", data, *MODEL, "--output-dir", "out"),
        *("--penalty", "none", "--log-every", "1", "--epochs", "100"),
        cwd=tmp_path,
        variables={"OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    assert "step 1 of" in process.stderr.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    code, _, err = finished(process)
    assert code == 143
    assert "Traceback" not in err
    assert "\nstopping at the next point to resume from" in err
    stopped, ended = [line for line in err.splitlines() if line][-2:]
    assert re.fullmatch(
        r"stopped after step \d+ of \d+: the same command resumes from there", stopped
    )
    assert ended == "terminated"
    assert sorted({*tmp_path.rglob("*")} - {*before}) == [tmp_path / ".out.consolidate-partial"]


@pytest.mark.parametrize(
    ("sent", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_signal_before_anything_was_done_leaves_nothing(
    network_checkpoint: Path, write_task: Write, tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, time\n"
        "from support.networks import make_network\n"
        "def network(config):\n"
        f"    os.kill(os.getpid(), {sent.value})\n"
        "    time.sleep(20)\n"
    )
    write_task("new")
    before = sorted(tmp_path.rglob("*"))
    process = launched(
        *("finetune", "start", "--data", "new.npz", "--model", "slow:network"),
        *("--output-dir", "out", "--penalty", "none"),
        cwd=tmp_path,
        variables={"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert finished(process)[0] == code
    assert sorted(tmp_path.rglob("*")) == before


def test_a_second_ctrl_c_leaves_at_once(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\n"
        "from support.networks import make_network\n"
        "def twice(module, inputs):\n"
        "    if not module.training: return\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('waits', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(20)\n"
        "def network(config):\n"
        "    module = make_network(config)\n"
        "    module.register_forward_pre_hook(twice)\n"
        "    return module\n"
    )
    write_task("new")
    process = launched(
        *("finetune", "start", "--data", "new.npz", "--model", "slow:network"),
        *("--output-dir", "out", "--penalty", "none", "--fisher-estimator", "mc"),
        cwd=tmp_path,
    )
    code, out, err = finished(process)
    assert (code, out) == (130, "waits\n")
    assert err.endswith("interrupted\n")
    assert not list(tmp_path.glob(".out*"))


@FULL
def test_a_full_log_ends_no_training_and_loses_no_progress(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    (tmp_path / "stops.py").write_text(
        "import os, signal\n"
        "from support.networks import make_network\n"
        "steps = []\n"
        "def stop(module, inputs):\n"
        "    steps.append(module.training)\n"
        "    if sum(steps) == 3: os.kill(os.getpid(), signal.SIGINT)\n"
        "def network(config):\n"
        "    module = make_network(config)\n"
        "    module.register_forward_pre_hook(stop)\n"
        "    return module\n"
    )
    write_task("new")
    with open("/dev/full", "w") as full:
        process = launched(
            *("finetune", "start", "--data", "new.npz", "--model", "stops:network"),
            *("--output-dir", "out", "--penalty", "none", "--log-every", "1"),
            cwd=tmp_path,
            stderr=full,
        )
        assert finished(process)[0] == 130
    assert (tmp_path / ".out.consolidate-partial").exists()


def test_debug_shows_where_and_keeps_the_code(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = run(capsys, "show", tmp_path / "nowhere", "--debug")
    assert code == 3
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_not_lost_while_torch_is_imported(
    network_checkpoint: Path, sent: signal.Signals
) -> None:
    script = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == 'torch': os.kill(os.getpid(), {sent.value})\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from consolidate.cli import main\n"
        f"main(['verify', {str(network_checkpoint)!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 128 + sent
    assert done.stderr in ("interrupted\n", "terminated\n")


def test_letters_that_the_terminal_lacks_end_no_command() -> None:
    variables = {"PYTHONIOENCODING": "latin-1"}
    code, out, err = finished(launched("finetune", "--help", variables=variables, text=False))
    assert (code, err) == (0, b"")
    assert b"\\u03bb" in out
    words = ("show", "λ, é", "--json")
    code, out, _ = finished(launched(*words, variables=variables, text=False))
    assert code == 3
    assert "λ, é" in json.loads(out.decode("ascii"))["error"]


def test_the_home_folder_in_every_path(
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    start, data = f"~/{network_checkpoint.name}", f"~/{write_task('old').name}"
    words = ("fisher", start, "--data", data, *MODEL, "--output-dir=~/out", "--metrics=~/m.json")
    code, _, err = run(capsys, *words)
    assert code == 0, err
    assert (tmp_path / "out/fisher/fisher.json").exists()
    assert (tmp_path / "m.json").exists()
    code, _, err = run(capsys, "show", "~nobody-of-that-name/out")
    assert (code, "not a valid path" in err) == (3, True)


def test_a_result_whose_metrics_cannot_be_written_is_printed(
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*arguments: Any) -> None:
        raise InputError("m.json: the disk or the quota is full")

    monkeypatch.setattr(metrics_view, "write_metrics", full)
    words = ("fisher", network_checkpoint, "--data", write_task("old"), *MODEL, "--json")
    code, out, err = run(capsys, *words, "--metrics", tmp_path / "m.json")
    assert code == 3
    assert "m.json: the disk or the quota is full" in err
    assert json.loads(out)["status"] == "done"
    assert (network_checkpoint / "fisher" / "fisher.json").exists()


@FULL
def test_what_cannot_be_printed_is_said(network_checkpoint: Path, write_task: Write) -> None:
    with open("/dev/full", "w") as full:
        words = ("fisher", network_checkpoint, "--data", write_task("old"), *MODEL)
        code, _, err = finished(launched(*words, stdout=full))
    assert code in (3, 141)
    assert "Traceback" not in err
    assert "nothing was changed" not in err


def test_a_signal_is_not_lost_in_a_finalizer(network_checkpoint: Path) -> None:
    script = (
        "import os, signal, time\n"
        "from consolidate import cli; from consolidate.commands import verify as verification\n"
        "class Bar:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.01)\n"
        "def verify(options):\n"
        "    Bar()\n"
        "    time.sleep(20)\n"
        "verification.verify = verify\n"
        f"cli.main(['verify', {str(network_checkpoint)!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "terminated\n")


@pytest.mark.slow
def test_a_file_beyond_the_limit_of_the_system_is_told_as_a_full_disk_is(
    network_checkpoint: Path, write_task: Write
) -> None:
    process = launched(
        *("fisher", network_checkpoint, "--data", write_task("a"), *MODEL),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400)),
    )
    code, _, err = finished(process)
    assert code == InputError.exit_code, err
    file = network_checkpoint / "fisher" / "fisher.safetensors"
    assert f"{file}: the file exceeds the size limit (ulimit -f)" in err
    assert not (network_checkpoint / "fisher").exists()


@pytest.mark.parametrize("columns", ["80", "100"])
def test_the_options_that_everybody_uses_are_on_the_first_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    code, out, _ = run(capsys, "finetune", "--help")
    first = out.splitlines()[:24]
    shown = [line.split()[0] for line in first if line.startswith("  --")]
    assert code == 0
    assert "Common options:" in first
    assert shown == [f"--{name.replace('_', '-')}" for name in FinetuneOptions.COMMON]
    assert len(shown) == 10
    assert max(map(len, out.splitlines())) < int(columns)


def test_help_lists_every_option_once_under_its_heading(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in cli.commands.items():
        code, out, _ = run(capsys, name, "--help")
        assert code == 0
        assert out.startswith(f"Usage: consolidate {name}")
        sections = [part.splitlines() for part in re.split(r"\n\n(?=\S)", out)[1:]]
        headings = [lines[0] for lines in sections]
        assert len(headings) == len(set(headings))
        assert headings[-1] == "Other options:"
        shown = (line for lines in sections for line in lines if line.startswith("  --"))
        listed = [line.split()[0] for line in shown if "--help" not in line]
        flags = [o.opts[0] for o in command.params if isinstance(o, click.Option)]
        assert sorted(listed) == sorted(flags)


def test_the_commands_are_listed_in_sections(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, "--help")
    sections = dict(re.findall(r"^(\S.*):\n((?:  .*\n)+)", out, re.MULTILINE))
    named = {
        title: [line.split()[0] for line in text.splitlines() if line[2] != " "]
        for title, text in sections.items()
    }
    assert named["Main commands"] == ["fisher", "finetune", "evaluate", "run"]
    assert named["Inspect"] == ["show", "report", "verify"]
    assert named["Combine and publish"] == ["merge", "remap", "push"]
    assert "..." not in "".join(out.splitlines()[1:])  # no sentence is cut


def test_the_shell_completes_without_torch() -> None:
    completions = {
        "consolidate fine": ["plain,finetune"],
        "consolidate finetune --evaluate-": ["plain,--evaluate-every"],
        "consolidate finetune my-model --penalty ": ["plain,ewc", "plain,l2", "plain,none"],
        "consolidate finetune my-model --data dat": ["file,dat"],
        "consolidate verify my-mo": ["file,my-mo"],
        "consolidate show --config ": ["file,"],
        "consolidate finetune my-model --evaluate old = pypro": ["file,"],
        "consolidate finetune my-model --evaluate = old = ./pypro": ["file,"],
    }
    script = (
        "import os, sys\n"
        "from consolidate.cli import main\n"
        "for words in sys.argv[1:]:\n"
        "    os.environ |= {'COMP_WORDS': words, 'COMP_CWORD': str(words.count(' '))}\n"
        "    try:\n"
        "        main([])\n"
        "    except SystemExit as end:\n"
        "        print(words, end.code)\n"
        "print(sorted({'torch', 'numpy', 'huggingface_hub'} & {*sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *completions],
        env={**os.environ, "_CONSOLIDATE_COMPLETE": "bash_complete"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    expected = [line for words, found in completions.items() for line in (*found, f"{words} 0")]
    assert done.stdout.splitlines() == [*expected, "[]"]


def test_zsh_and_fish_complete_the_file_of_a_named_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "more").mkdir(parents=True)
    for name in ("data/a.jsonl", "data/b.csv", "data/.hidden"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for begun, expected in {
        "old=": ["old=data/"],
        "old=da": ["old=data/"],
        "old=no-such": [],
        "old": [],
        "old=data/": ["old=data/a.jsonl", "old=data/b.csv", "old=data/more/"],
        f"old={tmp_path}/data/a": [f"old={tmp_path}/data/a.jsonl"],
    }.items():
        monkeypatch.setenv("_CONSOLIDATE_COMPLETE", "fish_complete")
        monkeypatch.setenv("COMP_WORDS", f"consolidate evaluate my-model --data {begun}")
        monkeypatch.setenv("COMP_CWORD", begun)
        with pytest.raises(SystemExit):
            main([])
        lines = capsys.readouterr().out.split()
        assert lines == [f"plain,{each}" for each in expected]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    monkeypatch.setenv("_CONSOLIDATE_COMPLETE", f"{shell}_source")
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    assert f"_CONSOLIDATE_COMPLETE={shell}_complete" in out


def test_quiet_prints_warnings_and_errors_only(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    network_checkpoint: Path,
    write_task: Write,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # so that it is as it was at the end
    words = ("finetune", network_checkpoint, "--data", write_task("new"), *MODEL)
    words += ("--penalty", "none", "--max-steps", 2, "--log-every", 1)
    code, loud, err = run(capsys, *words, "--output-dir", tmp_path / "a")
    assert (code, "step 1 of 2" in err) == (0, True)
    code, quiet, err = run(capsys, *words, "--output-dir", tmp_path / "b", "--quiet")
    assert (code, err) == (0, "")
    assert quiet == loud.replace(str(tmp_path / "a"), str(tmp_path / "b"))
    monkeypatch.setenv("CONSOLIDATE_FINETUNE_EWC_LAMDA", "1")
    code, out, err = run(capsys, *words, "--output-dir", tmp_path / "b", "--quiet", "--seed", 1)
    assert (code, out) == (InputError.exit_code, "")
    assert [line.split(":")[0] for line in err.splitlines()][-1] == "error"
    assert "CONSOLIDATE_FINETUNE_EWC_LAMDA sets no option" in err
    _, _, err = run(capsys, *words, "--output-dir", tmp_path / "c")
    assert "step 1 of 2" in err  # it is not quiet from then on


def on_a_terminal(folder: Path, *words: object) -> tuple[int, str]:
    """Run a command whose stderr is a terminal of 80 columns; give exit code and stderr."""
    above, below = pty.openpty()
    fcntl.ioctl(below, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = launched(
        *words,
        cwd=folder,
        variables={"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=below,
    )
    os.close(below)
    found = b""
    with suppress(OSError):  # the end
        while read := os.read(above, 65536):
            found += read
    os.close(above)
    return process.wait(), found.decode()


BARS = ["reading a.parquet", "evaluating", "training", "Fisher of a"]


@pytest.mark.slow
def test_a_terminal_gets_our_bars_and_none_of_a_library(tmp_path: Path) -> None:
    config = tiny_models.bert_config(num_labels=2)
    tokenizer = tiny_models.word_tokenizer()
    tiny_models.save(
        tmp_path / "start", transformers.BertForSequenceClassification, config, tokenizer
    )
    texts = tiny_models.CORPUS * 4
    Dataset.from_dict({"text": texts, "label": [0, 1] * 10}).to_parquet(tmp_path / "a.parquet")
    words = ("finetune", "start", "--data", "a.parquet", "--penalty", "none", "--output-dir")
    code, err = on_a_terminal(tmp_path, *words, "out", "--evaluate", "a=a.parquet")
    bars = re.findall(r"(?:^|[\r\n])(?:\x1b\[A)?([^\r\n]*?): +\d+%\|", err)
    assert (code, list(dict.fromkeys(bars))) == (0, BARS), err
    assert err.count("%|") == len(bars)
    assert on_a_terminal(tmp_path, *words, "quiet", "--quiet") == (0, "")


@pytest.mark.parametrize(
    "allocate",
    [lambda: bytearray(2**60), lambda: torch.empty(2**60)],
    ids=["of Python", "of torch"],
)
def test_too_little_memory_is_no_internal_error(
    allocate: Callable[[], Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consolidate.commands.show.show", lambda *_: allocate())
    code, _, err = run(capsys, "show", "x")
    assert code == InputError.exit_code
    assert err.startswith("error: not enough memory")
    assert "; raise the limit" in err
    assert err.count("\n") == 1
