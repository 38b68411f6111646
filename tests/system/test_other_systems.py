"""What macOS does otherwise, forced here: no `renameat2`, no /proc, few open files, other units."""

import ctypes
import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from torch import nn

import consolidate
from consolidate.commands import pass_cost
from consolidate.runtime import torchrun
from formats import atomic
from formats.atomic import replace_folder
from support.networks import NETWORK, make_network

FEW_OPEN_FILES = 256  # the limit of a shell of macOS
SHARDS = 300


def replaced(folder: Path) -> None:
    """Replace a folder with content, and look at all that is there afterwards."""
    target = folder / "out"
    target.mkdir(parents=True)
    (target / "old").write_text("old")
    with replace_folder(target, overwrite=True) as staging:
        (staging / "new").write_text("new")
    found = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))]
    assert found == ["out", "out/new"]


def test_a_library_without_renameat2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As the C library of macOS, it answers with an AttributeError.
    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: SimpleNamespace())
    assert not atomic._exchange(tmp_path, tmp_path)
    replaced(tmp_path / "work")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_exchange(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def renameat2(*_: object) -> int:
        calls.append(ctypes.set_errno(number))
        return -1

    library = SimpleNamespace(renameat2=renameat2)
    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: library)
    replaced(tmp_path / "work")
    assert len(calls) == 1


def test_another_failure_of_the_exchange_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def renameat2(*_: object) -> int:
        ctypes.set_errno(errno.EIO)
        return -1

    library = SimpleNamespace(renameat2=renameat2)
    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: library)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        replaced(tmp_path)
    assert (tmp_path / "out" / "old").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_system_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    read_bytes = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.is_relative_to("/proc"):
            asked.append(path)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    replaced(tmp_path)
    assert asked


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("linux", 1024)])
def test_the_peak_of_memory_is_in_bytes_whatever_unit_the_system_has(
    platform: str,
    unit: int,
    network_checkpoint: Path,
    write_task: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = SimpleNamespace(ru_maxrss=12_345)
    fake = SimpleNamespace(getrusage=lambda _: usage, RUSAGE_SELF=resource.RUSAGE_SELF)
    monkeypatch.setattr(pass_cost, "resource", fake)
    monkeypatch.setattr(pass_cost, "sys", SimpleNamespace(platform=platform))
    cost = consolidate.fisher(network_checkpoint, write_task("old"), **NETWORK, dry_run=True)
    assert cost["peak_memory"] == 12_345 * unit


@pytest.mark.parametrize(("platform", "asks"), [("darwin", 0), ("linux", 1)])
def test_only_linux_is_asked_to_end_a_process_with_torchrun(
    platform: str, asks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []
    library = SimpleNamespace(prctl=lambda *numbers: asked.append(numbers))
    monkeypatch.setattr(torchrun, "ctypes", SimpleNamespace(CDLL=lambda _: library))
    monkeypatch.setattr(torchrun, "sys", SimpleNamespace(platform=platform))
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    torchrun.stop_with_torchrun()
    assert len(asked) == asks


@pytest.fixture
def few_open_files() -> Iterator[None]:
    """The limit that a shell of macOS has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW_OPEN_FILES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_shards_than_files_may_be_open(
    tmp_path: Path, write_task: Callable[..., Path], few_open_files: None
) -> None:
    start, target = tmp_path / "deep", tmp_path / "next"
    start.mkdir()
    sizes = [6] * (SHARDS // 2) + [3]
    network = make_network({"sizes": sizes})
    for parameter in network.parameters():
        if parameter.ndim == 2:
            nn.init.eye_(parameter)  # so that its gradients do not vanish
    state = network.state_dict()
    names = {name: f"model-{n:05}-of-{SHARDS:05}.safetensors" for n, name in enumerate(state, 1)}
    assert len(names) == SHARDS
    for name, file in names.items():
        save_file({name: state[name]}, start / file)
    index = {"metadata": {"total_size": sum(v.nbytes for v in state.values())}, "weight_map": names}
    (start / "model.safetensors.index.json").write_text(json.dumps(index))
    (start / "config.json").write_text(json.dumps({"sizes": sizes}))
    consolidate.fisher(start, write_task("a", count=8), **NETWORK)
    consolidate.finetune(
        start, write_task("b", count=8), output_dir=target, ewc_lambda=1.0, max_steps=1, **NETWORK
    )
    assert consolidate.verify(target)["tasks"] == ["a", "b"]
    assert load_file(target / "fisher" / "fisher.safetensors").keys() == state.keys()
