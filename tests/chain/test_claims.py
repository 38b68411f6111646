"""Two commands on one checkpoint: the second is refused, and the first ends as if alone."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import consolidate
from consolidate.api import verify
from formats.atomic import claimed, claimed_in_place
from formats.errors import InputError
from support.checkpoints import Write
from support.command_line import run as run_cli
from support.folders import flip
from support.networks import SIZES, make_network
from support.together import ended, started

MODEL = "support.networks:make_network"
# A factory that waits, in the middle of its command, until somebody writes into a pipe.
HELD = """
from pathlib import Path
from support.networks import make_network

def held(config):
    Path("begun").touch()
    Path("pipe").read_bytes()
    return make_network(config)
"""


@pytest.fixture
def place(
    network_checkpoint: Path, write_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with the checkpoints `it` and `other`, and data for both."""
    for name, seed in (("a", 0), ("b", 1), ("c", 2)):
        write_task(name, seed=seed)
    shutil.copytree(network_checkpoint, tmp_path / "it")
    consolidate.fisher(tmp_path / "it", tmp_path / "a.npz", model=MODEL)
    shutil.copytree(network_checkpoint, tmp_path / "other")
    consolidate.fisher(tmp_path / "other", tmp_path / "b.npz", model=MODEL)
    (tmp_path / "waiting.py").write_text(HELD)
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Held:
    """A command that is held in its middle until it is released."""

    def __init__(self, *words: str) -> None:
        self.log = Path(f"log-{time.monotonic_ns()}")
        (self.pid,) = started(1, [*words, "--model", "waiting:held"], self.log)
        end = time.monotonic() + 120
        while not Path("begun").exists():
            assert time.monotonic() < end, self.log.read_text()
            assert os.waitpid(self.pid, os.WNOHANG) == (0, 0), self.log.read_text()
            time.sleep(0.02)

    def release(self) -> tuple[int, str]:
        Path("begun").unlink()
        Path("pipe").write_bytes(b"go on")
        (code,) = ended([self.pid])
        return code, self.log.read_text()


@pytest.fixture
def hold(place: Path) -> Iterator["Hold"]:
    """Start commands that wait; those that a test leaves waiting are killed."""
    holding: list[Held] = []

    def start(*words: str) -> Held:
        holding.append(Held(*words))
        return holding[-1]

    yield start
    for held in holding:
        with suppress(ChildProcessError):  # it was released, and has ended
            if os.waitpid(held.pid, os.WNOHANG) == (0, 0):
                os.kill(held.pid, signal.SIGKILL)
                ended([held.pid])


Hold = Callable[..., Held]
FISHER = ("fisher", "it", "--data", "c.npz", "--overwrite")
ADD = ("fisher", "it", "--data", "c.npz", "--add")
FINETUNE = ("finetune", "it", "--data", "c.npz", "--ewc-lambda", "1", "--max-steps", "3")
FINETUNE += ("--output-dir", "it", "--overwrite")
MERGE = ("merge", "it", "other", "--output-dir", "it", "--overwrite")


@pytest.mark.parametrize(
    ("first", "tasks"), [(FISHER, ["c"]), (ADD, ["a", "c"]), (FINETUNE, ["a", "c"])]
)
def test_the_second_of_two_is_refused(
    hold: Hold, first: tuple[str, ...], tasks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    held = hold(*first)
    model = ("--model", MODEL)
    for second in ((*FISHER, *model), (*ADD, *model), (*FINETUNE, *model), MERGE):
        code, _, err = run_cli(capsys, *second)
        assert code == 75
        assert f"is in use by process {held.pid}" in err
    code, err = held.release()
    assert code == 0, err
    assert verify("it")["tasks"] == tasks
    assert not [name for name in os.listdir() if "consolidate-claim" in name]
    assert not [name for name in os.listdir("it") if "consolidate-claim" in name]


def replace(weights: Path) -> None:
    save_file(load_file("other/model.safetensors"), "new", {"format": "pt"})
    flip(Path("new"))
    os.replace("new", weights)


def rewrite(weights: Path) -> None:
    """Change one bit in place; size, inode and time of change are what they were."""
    before = weights.stat()
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [replace, rewrite])
@pytest.mark.parametrize("words", [FISHER, (*FISHER, "--no-data-digest"), ADD])
def test_weights_that_another_tool_changes(
    hold: Hold, words: tuple[str, ...], change: Callable[[Path], None]
) -> None:
    ledger = Path("it/fisher/fisher.json").read_bytes()
    held = hold(*words)
    change(Path("it/model.safetensors"))
    code, err = held.release()
    assert code == 3
    assert "it: the weights changed while their Fisher was measured" in err
    assert Path("it/fisher/fisher.json").read_bytes() == ledger


def test_a_whole_checkpoint_of_weights_that_change_is_not_written(hold: Hold) -> None:
    held = hold("fisher", "it", "--data", "c.npz", "--output-dir", "out")
    rewrite(Path("it/model.safetensors"))
    code, err = held.release()
    assert code == 3
    assert "it: the weights changed while their Fisher was measured" in err
    assert not Path("out").exists()


def test_of_several_processes_the_first_claims(place: Path) -> None:
    words = [*FISHER, "--model", MODEL]
    with claimed(place / "it"):
        assert ended(started(2, words, place / "log")) == [75, 75]
    assert (place / "log").read_text().count("is in use by process") == 1
    assert ended(started(2, words, place / "log")) == [0, 0]
    assert verify("it")["tasks"] == ["c"]


def test_of_several_processes_the_first_removes_what_was_left(place: Path) -> None:
    (place / "it" / ".fisher.consolidate-old").mkdir()
    remove = shutil.rmtree

    def slowly(*arguments: Any, **options: Any) -> None:
        time.sleep(1.5)  # as of a large folder
        remove(*arguments, **options)

    def prepare() -> None:
        shutil.rmtree = slowly

    ends = ended(started(2, [*FISHER, "--model", MODEL], place / "log", prepare))
    assert ends == [0, 0], (place / "log").read_text()
    assert os.listdir("it/fisher")
    assert not [name for name in os.listdir("it") if "consolidate" in name]


def test_what_writes_from_python_claims_too(place: Path) -> None:
    network = make_network({"sizes": SIZES})
    network.load_state_dict(load_file(place / "it" / "model.safetensors"))
    rows = torch.randn(8, SIZES[0]), torch.zeros(8, dtype=torch.long)
    diagonal = consolidate.fisher_diagonal(network, [rows], "softmax")

    def store() -> None:
        consolidate.store_fisher(
            network, place / "it", diagonal, task="t", objective="classification", overwrite=True
        )

    with claimed(place / "it"), pytest.raises(InputError, match="is in use by process"):
        store()
    store()
    assert verify("it")["tasks"] == ["t"]


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that all may read and only its owner may write, with one in it for all."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        (Path(name) / "it").mkdir()
        os.chmod(Path(name) / "it", 0o777)
        yield Path(name)


@pytest.mark.skipif(os.getuid() != 0, reason="needs another user")
def test_a_folder_of_which_only_the_inside_can_be_written(shared: Path) -> None:
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.setuid(65534)
            with claimed_in_place(shared / "it", "fisher"):
                code = 10 * (os.listdir(shared / "it") == [".fisher.consolidate-claim"])
        finally:
            os._exit(code)
    assert ended([child]) == [10]
    with claimed_in_place(shared / "it", "fisher"):
        assert sorted(os.listdir(shared)) == [".it.consolidate-claim", "it"]
