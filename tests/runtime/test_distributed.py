import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import consolidate
from consolidate import cli
from consolidate.api import finetune, fisher
from consolidate.estimation.batches import model_outputs
from consolidate.models.model import Model, outputs_of_first
from consolidate.runtime.distributed import (
    dealt,
    from_first,
    in_step,
    place_in,
    process_group,
    sum_,
)
from consolidate.runtime.torchrun import rank
from formats.errors import UsageError
from support import together
from support.checkpoints import Write
from support.distributed_cases import FISHERS, SHARDED, TRAININGS, statistics, told, write_found
from support.networks import NETWORK

TESTS = Path(__file__).parent.parent
Found = dict[str, Any]
THREE = pytest.param(3, id="three", marks=pytest.mark.slow)


def run(count: int, *words: str | Path) -> tuple[list[int], str, str]:
    """Run a command in so many processes; their exit codes, and what they wrote to both streams."""
    return run_call(count, lambda: cli.main([str(word) for word in words]))


def run_call(count: int, call: Callable[[], object]) -> tuple[list[int], str, str]:
    with TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        codes = together.ended(together.forked(count, call, out, err))
        return codes, out.read_text(), err.read_text()


@pytest.fixture(scope="module", params=[pytest.param(2, id="two"), THREE])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What so many processes found in the cases."""
    folder = tmp_path_factory.mktemp("found")
    codes, _, errors = run_call(request.param, lambda: write_found(folder))
    assert codes == [0] * request.param, errors
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the test, as the current one and one to import from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", FISHERS)
def test_the_fisher_of_several_processes_is_that_of_one(found: Found, name: str) -> None:
    alone, together = told(FISHERS[name](None)), found[name]
    for key, values in alone["tensors"].items():
        torch.testing.assert_close(together["tensors"][key], values, rtol=1e-12, atol=1e-17)
    assert together.pop("tensors").keys() == alone.pop("tensors").keys()
    errors = together.pop("relative_errors")
    assert errors == pytest.approx(alone.pop("relative_errors"), rel=1e-9)
    assert together == alone


def test_running_statistics_count_the_rows_of_each_process(found: Any) -> None:
    torch.testing.assert_close(found["statistics"], statistics(None))


@pytest.mark.parametrize("name", TRAININGS)
def test_what_several_processes_train_is_what_one_does(found: Found, name: str) -> None:
    alone, together = TRAININGS[name](None), found[name]
    assert len(alone["steps"]) > 3
    torch.testing.assert_close(together["tensors"], alone["tensors"], rtol=1e-9, atol=1e-11)
    for step, expected in zip(together["steps"], alone["steps"], strict=True):
        numbers, others = ([v or 0.0 for v in one.values()] for one in (step, expected))
        assert numbers == pytest.approx(others, rel=1e-9)
    assert alone["penalty"] > 0
    assert together["penalty"] == pytest.approx(alone["penalty"], rel=1e-9)
    assert together["metrics"] == pytest.approx(alone["metrics"], rel=1e-9)


@pytest.mark.parametrize("name", SHARDED)
def test_the_fisher_of_a_model_in_shards_is_that_of_one_process(found: Found, name: str) -> None:
    alone, together = told(SHARDED[name](None)), found[name]
    for key, values in alone["tensors"].items():
        torch.testing.assert_close(together["tensors"][key], values, rtol=1e-12, atol=1e-17)
    for of in (alone, together):
        del of["tensors"], of["methods"]
    errors = together.pop("relative_errors")
    assert errors == pytest.approx(alone.pop("relative_errors"), rel=1e-9)
    assert together == alone


def test_a_tolerance_ends_all_processes_at_once(found: Found) -> None:
    counts = found["settled"]
    assert len(set(counts)) == 1
    assert 64 <= counts[0] < 400
    assert counts[0] % (4 * len(counts)) == 0


def test_each_process_goes_on_from_what_it_kept(found: Found) -> None:
    assert found["going on"]


def test_one_process_alone_has_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (None, "1"):
        for name, value in (("WORLD_SIZE", size), ("RANK", "0"), ("MASTER_ADDR", "localhost")):
            if value is not None:
                monkeypatch.setenv(name, value)
        with process_group() as group:
            assert group is None
            assert place_in(group) == (0, 1)
            assert dealt([3, 1, 2], 2, group) == [3, 1, 2]
            assert list(in_step([5, 6], group)) == [5, 6]
            assert from_first({"a": 1}, group) == {"a": 1}
            tensor = torch.ones(2)
            sum_([tensor], group)
            assert tensor.tolist() == [1, 1]


FISHER = ("fisher", "start", "--data", "a.npz", "--model")


@pytest.mark.slow
def test_torchrun_measures_and_only_the_first_speaks(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    write_task("a", count=59)
    fisher(network_checkpoint, tmp_path / "a.npz", output_dir=tmp_path / "one", **NETWORK)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    words = ("-m", "consolidate", *FISHER, NETWORK["model"], "--output-dir", "two")
    done = subprocess.run(
        [sys.executable, *torchrun, *words],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Fisher of 'a' over 59 examples") == 1
    alone, together = (
        load_file(tmp_path / name / "fisher" / "fisher.safetensors") for name in ("one", "two")
    )
    for name, values in alone.items():
        torch.testing.assert_close(together[name], values, rtol=2e-6, atol=1e-10)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".two")]


@pytest.mark.slow
def test_shards_are_trained_measured_and_written_as_one_process_does(
    network_checkpoint: Path, write_task: Write, tmp_path: Path, here: Path
) -> None:
    weights = load_file(network_checkpoint / "model.safetensors")
    narrow = {name: values.bfloat16() for name, values in weights.items()}
    save_file(narrow, network_checkpoint / "model.safetensors", {"format": "pt"})
    fisher(network_checkpoint, write_task("a"), **NETWORK)
    new = write_task("b", seed=7, count=50)
    result = finetune(
        network_checkpoint,
        new,
        output_dir=tmp_path / "one",
        ewc_lambda=10.0,
        batch_size=6,
        optimizer="sgd",
        learning_rate=0.1,
        merge_rule="separate",
        evaluate={"a": tmp_path / "a.npz"},
        **NETWORK,
    )
    words = "finetune start --data b.npz --output-dir three --ewc-lambda 10 --shard"
    more = "--optimizer sgd --learning-rate 0.1 --batch-size 2 --merge-rule separate --json"
    model = ("--model", NETWORK["model"], "--device", "cpu", "--evaluate", "a=a.npz")
    codes, printed, errors = run(3, *words.split(), *more.split(), *model)
    assert codes == [0, 0, 0], errors
    together = json.loads(printed)
    for name in ("loss", "penalty_value", "share_moved", "steps"):
        assert together[name] == pytest.approx(result[name], rel=1e-5)
    assert together["predicted_nats"] == pytest.approx(result["predicted_nats"], rel=1e-2)
    assert together["metrics"]["after"]["a"] == pytest.approx(result["metrics"]["after"]["a"])
    for name in ("model", "fisher/fisher", "fisher/anchor"):
        one, three = (load_file(tmp_path / at / f"{name}.safetensors") for at in ("one", "three"))
        assert one.keys() == three.keys()
        assert [v.dtype for v in one.values()] == [v.dtype for v in three.values()]
        torch.testing.assert_close(three, one, rtol=1e-2, atol=1e-3)  # of bfloat16
    assert consolidate.verify(tmp_path / "three")["tasks"] == ["a", "b"]


def test_shards_need_several_processes_and_whole_models(
    network_checkpoint: Path, write_task: Write, tmp_path: Path
) -> None:
    data, common = write_task("a"), {"shard": True, **NETWORK}
    with pytest.raises(UsageError, match="start them with torchrun"):
        fisher(network_checkpoint, data, **common)
    with pytest.raises(UsageError, match="start them with torchrun"):
        finetune(network_checkpoint, data, output_dir=tmp_path / "out", penalty="none", **common)


@pytest.mark.slow
def test_what_fails_in_one_process_ends_all_with_one_message(
    network_checkpoint: Path, write_task: Write, here: Path
) -> None:
    write_task("a")
    (here / "failing.py").write_text(
        "import os\n"
        "from support.networks import make_network\n"
        "def make(config):\n"
        "    calls = []\n"
        "    def fail(module, args):\n"
        "        calls.append(len(args[0]))\n"
        "        if os.environ['RANK'] == '1' and len(calls) > 3:\n"
        "            raise ValueError('no rows today')\n"
        "    model = make_network(config)\n"
        "    model.register_forward_pre_hook(fail)\n"
        "    return model\n"
    )
    codes, printed, errors = run(2, *FISHER, "failing:make", "--output-dir", "out")
    assert codes == [3, 3], errors
    assert printed == ""
    assert errors.count("error:") == 1
    assert "no rows today" in errors
    assert not (here / "out").exists()


@pytest.mark.slow
def test_an_option_that_is_refused_is_told_once(
    network_checkpoint: Path, write_task: Write, here: Path
) -> None:
    write_task("a")
    for more, message in (
        (("--modl", "x"), "No such option"),
        (("--objective", "regression", "--device", "cuda:0"), "each process needs its own"),
        (("--batch-size", "0", "--json"), "--batch-size 0: expected"),
    ):
        codes, printed, errors = run(2, *FISHER, NETWORK["model"], *more)
        assert codes == [2, 2], errors
        assert printed.count("exit_code") == ("--json" in more)
        assert errors.count("error:") == 1
        assert message in errors
    for command in (("show", "start"), ("run", "chain.toml")):
        codes, _, errors = run(2, *command)
        assert codes == [2, 2]
        message = f"{command[0]} runs in one process: start it without torchrun"
        assert errors.count(message) == 1


def test_a_process_that_is_killed_ends_the_others(
    network_checkpoint: Path, write_task: Write, here: Path
) -> None:
    write_task("a")
    (here / "dying.py").write_text(
        "import os, signal\n"
        "from support.networks import make_network\n"
        "def make(config):\n"
        "    def die(module, args):\n"
        "        if os.environ['RANK'] == '1' and len(args[0]) > 1:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "    model = make_network(config)\n"
        "    model.register_forward_pre_hook(die)\n"
        "    return model\n"
    )
    codes, _, errors = run(2, *FISHER, "dying:make", "--output-dir", "out")
    assert codes == [1, -signal.SIGKILL]
    assert "another process of this run ended" in errors
    assert errors.count("error:") == 1


def test_sigterm_ends_a_process_that_waits_for_one_that_never_joins() -> None:
    def wait_for_the_other() -> None:
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, lambda *_: print("never called"))
        threading.Timer(1, signal.raise_signal, [signal.SIGTERM]).start()
        with process_group():
            pass

    codes, printed, _ = run_call(2, wait_for_the_other)
    assert (codes, printed) == ([-signal.SIGTERM, -signal.SIGKILL], "")


def test_a_killed_process_of_a_sharded_model_is_not_reported_as_wrong_inputs() -> None:
    class Lost(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset")

    inputs = torch.ones(1, 2)
    model = Model.__new__(Model)
    model.module = Lost()
    with pytest.raises(RuntimeError, match="Connection reset"):
        outputs_of_first(model, inputs, "a.npz, row 1")
    with pytest.raises(RuntimeError, match="Connection reset"):
        model_outputs(model.module, inputs, torch.zeros(1))
