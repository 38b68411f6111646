"""A checkpoint from a stranger: every command refuses it in plain words, and soon.

The claims are big and the files small; every command runs with little memory and time to spare.
"""

import json
import os
import resource
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from consolidate.api import fisher
from formats.fisher_json import ledger_bytes, read_ledger
from support.checkpoints import random_network, write_clusters
from support.command_line import run
from support.folders import contents

MODEL = ("--objective", "classification", "--model", "support.networks:make_network")
READ_WEIGHTS = ("verify", "evaluate", "fisher", "finetune", "merge", "remap")
READ_FISHER = ("show", "verify", "finetune", "merge", "remap")
ALL = ("show", *READ_WEIGHTS)
EVIL = "w\x1b[2J\x1b]0;title\x07\r\u202e\x9b"


@pytest.fixture(scope="module")
def checkpoints_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two checkpoints and their data, which `checkpoint` copies."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, task in (("start", "old"), ("other", "other")):
        fisher(
            random_network(folder / name),
            write_clusters(folder, task),
            objective="classification",
            model="support.networks:make_network",
        )
    return folder


@pytest.fixture
def checkpoint(checkpoints_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints_once, tmp_path, dirs_exist_ok=True)) / "start"


@contextmanager
def bounded(seconds: int = 20, memory: int = 2**30) -> Iterator[None]:
    """Allow so much more memory than there is, and so much computing."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it computes for more than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    statm = Path("/proc/self/statm")  # of Linux
    used = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 2**40
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def arguments(command: str, checkpoint: Path, data: Path) -> list[object]:
    output = ("--output-dir", data.parent / "out")
    return {
        "show": ["show", checkpoint],
        "verify": ["verify", checkpoint],
        "evaluate": ["evaluate", checkpoint, "--data", data, *MODEL],
        "fisher": ["fisher", checkpoint, "--data", data, "--task", "next", *MODEL, "--add"],
        "finetune": [
            *("finetune", checkpoint, "--data", data, "--task", "next"),
            *(*MODEL, "--ewc-lambda", 1, *output),
        ],
        "merge": ["merge", checkpoint, checkpoint.with_name("other"), *output],
        "remap": ["remap", checkpoint, *output],
    }[command]


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def with_header(path: Path, header: bytes, values: bytes = b"", claim: int | None = None) -> None:
    path.unlink()
    length = len(header) if claim is None else claim
    path.write_bytes(length.to_bytes(8, "little") + header + values)


def index_that_climbs(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"0.weight": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_with_odd_names(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {EVIL: name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def fisher_index_that_climbs(folder: Path) -> None:
    (folder / "fisher" / "fisher.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"0.weight": "../model.safetensors"}}
    (folder / "fisher" / "fisher.safetensors.index.json").write_text(json.dumps(index))


def ledger_that_climbs(folder: Path, field: str) -> None:
    def change(ledger: Any) -> None:
        if field == "heads":
            ledger["heads"]["../../model"] = ledger["fisher"]
        else:
            ledger["tasks"][0][field] = "../../secret"

    edit(folder / "fisher" / "fisher.json", change)


def link(folder: Path, name: str) -> None:
    outside = folder.parent / f"outside-{Path(name).name}"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)


def link_that_goes_round(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")


def pipe(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def header_of_100_mb(folder: Path) -> None:
    path = folder / "model.safetensors"
    with_header(path, b"{", claim=10**8 + 1)
    with path.open("r+b") as file:
        file.truncate(2 * 10**8)


def header_of_many_tensors(folder: Path) -> None:
    """Lay out 300,000 empty tensors, as their header allows; none takes a byte of values."""
    entry = '"tensor number %06d of a great many":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    tensors = ",".join(entry % i for i in range(300_000))
    with_header(folder / "model.safetensors", f"{{{tensors}}}".encode())


def claimed_header(folder: Path) -> None:
    with_header(folder / "model.safetensors", b"{}", claim=2**63)


def claimed_shape(folder: Path, name: str) -> None:
    tensor = {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 4]}
    with_header(folder / name, json.dumps({"w": tensor}).encode(), b"0000")


def claimed_nothing(folder: Path) -> None:
    tensor = {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}
    with_header(folder / "model.safetensors", json.dumps({"w": tensor}).encode())


def ledger_shape(folder: Path) -> None:
    path = folder / "fisher" / "fisher.json"
    ledger = read_ledger(path)
    for records in (ledger.weights, ledger.fisher):
        name = next(iter(records))
        records[name] = msgspec.structs.replace(records[name], shape=(2**60,))
    path.write_bytes(ledger_bytes(ledger))


def as_pickle(folder: Path) -> Path:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(weights, path)
    return path


def zip_bomb(folder: Path) -> None:
    """Give the file of torch.save the same members, the values compressed a thousandfold."""
    path = as_pickle(folder)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in members.items():
            if "/data/" not in name:
                archive.writestr(name, data)
                continue
            with archive.open(name, "w") as file:
                for _ in range(64):
                    file.write(bytes(2**20))


def pickle_that_imports(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(folder / "harm"),)

    path = as_pickle(folder)
    torch.save({"w": torch.ones(2), "evil": Evil()}, path)


def many_tasks(folder: Path) -> None:
    """Make the ledger as large as one of half a million short tasks."""
    path = folder / "fisher" / "fisher.json"
    with path.open("r+b") as file:
        file.truncate(130 * 2**20)


def deep(folder: Path, name: str) -> None:
    (folder / name).write_text("[" * 10**6)


def huge_config(folder: Path) -> None:
    with (folder / "config.json").open("r+b") as file:
        file.truncate(130 * 2**20)


def evil_name(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[EVIL] = weights.pop("0.bias")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def evil_ledger(folder: Path) -> None:
    edit(folder / "fisher" / "fisher.json", lambda ledger: ledger.update({EVIL: 1}))


CASES: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "an index that climbs": (index_that_climbs, READ_WEIGHTS, "expected the name of a file"),
    "an index with a NUL": (
        lambda f: index_with_odd_names(f, "a\0b"),
        READ_WEIGHTS,
        "expected the name of a file",
    ),
    "an index with an endless name": (
        lambda f: index_with_odd_names(f, "a" * 5000),
        READ_WEIGHTS,
        "expected the name of a file",
    ),
    "an index of missing files": (
        lambda f: index_with_odd_names(f, "none.safetensors"),
        READ_WEIGHTS,
        "does not exist",
    ),
    "a Fisher's index that climbs": (
        fisher_index_that_climbs,
        READ_FISHER,
        "expected the name of a file",
    ),
    "a ledger whose head climbs": (
        lambda f: ledger_that_climbs(f, "heads"),
        READ_FISHER,
        "is not a task of this ledger",
    ),
    "a ledger whose task climbs": (
        lambda f: ledger_that_climbs(f, "name"),
        READ_FISHER,
        "a task name",
    ),
    "a ledger whose data climb": (lambda f: ledger_that_climbs(f, "data"), READ_FISHER, "no path"),
    "linked weights": (lambda f: link(f, "model.safetensors"), READ_WEIGHTS, "is a link to"),
    "a linked config": (lambda f: link(f, "config.json"), READ_WEIGHTS, "is a link to"),
    "a linked Fisher folder": (lambda f: link(f, "fisher"), READ_FISHER, "is a link to"),
    "a linked ledger": (lambda f: link(f, "fisher/fisher.json"), READ_FISHER, "is a link to"),
    "a linked Fisher": (lambda f: link(f, "fisher/fisher.safetensors"), READ_FISHER, "is a link"),
    "a linked licence": (lambda f: link(f, "LICENSE"), ("finetune", "merge"), "is a link to"),
    "a link that goes round": (link_that_goes_round, READ_WEIGHTS, "leads to itself"),
    "a pipe for weights": (lambda f: pipe(f, "model.safetensors"), READ_WEIGHTS, "not a file"),
    "a pipe for a config": (lambda f: pipe(f, "config.json"), READ_WEIGHTS, "not a regular file"),
    "a pipe for a ledger": (
        lambda f: pipe(f, "fisher/fisher.json"),
        READ_FISHER,
        "no regular file",
    ),
    "a header of 100 MB": (header_of_100_mb, READ_WEIGHTS, "header too large"),
    "a header of many tensors": (header_of_many_tensors, READ_WEIGHTS, "header too large"),
    "a header of 2^63": (claimed_header, READ_WEIGHTS, "header too large"),
    "a shape of 2^60": (lambda f: claimed_shape(f, "model.safetensors"), READ_WEIGHTS, "truncated"),
    "a shape of 2^124 times 0": (claimed_nothing, READ_WEIGHTS, "overflow"),
    "a Fisher's shape of 2^60": (
        lambda f: claimed_shape(f, "fisher/fisher.safetensors"),
        READ_FISHER,
        "truncated",
    ),
    "a ledger's shape of 2^60": (ledger_shape, READ_FISHER, "metadata: expected weights"),
    "a zip bomb": (zip_bomb, READ_WEIGHTS, "expected uncompressed"),
    "a pickle that imports": (pickle_that_imports, READ_WEIGHTS, "would import posix.mkdir"),
    "a ledger of a million tasks": (many_tasks, READ_FISHER, "at most 128 MiB"),
    "a deep ledger": (lambda f: deep(f, "fisher/fisher.json"), READ_FISHER, "too deeply"),
    "a deep config": (lambda f: deep(f, "config.json"), READ_WEIGHTS, "is not valid JSON"),
    "a huge config": (huge_config, READ_WEIGHTS, "at most 128 MiB"),
    "a tensor whose name steers": (evil_name, READ_WEIGHTS[:-1], r"\x1b[2J"),
    "a ledger whose field steers": (evil_ledger, READ_FISHER, r"\x1b[2J"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_plain_refusal(
    checkpoint: Path, write_task: Callable[..., Path], capsys: pytest.CaptureFixture[str], case: str
) -> None:
    harm, refused_by, message = CASES[case]
    data = write_task("next", seed=1)
    harm(checkpoint)
    before = contents(checkpoint.parent)
    for command in refused_by:
        with bounded():
            code, out, err = run(capsys, *arguments(command, checkpoint, data))
        assert (command, code, out) == (command, 3, ""), err
        lines = err.splitlines()
        assert lines[-1].startswith("error: ")
        assert message in lines[-1]
        assert len(lines[-1]) < 2500
        assert all(line.isprintable() for line in lines)
        assert "Traceback" not in err
        assert "internal error" not in err
    assert contents(checkpoint.parent) == before


def test_names_that_steer_are_escaped_where_they_are_shown(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / "fisher" / "fisher.json"
    ledger = read_ledger(path)
    ledger.tasks[0].labels = [EVIL, EVIL + "2", "c"]
    ledger.tasks[0].data = ledger.tasks[0].objective = ledger.versions[EVIL] = EVIL
    ledger.tasks[0].metrics = {"after": {EVIL: {"accuracy": 0.5, EVIL: 1.0}}}
    path.write_bytes(ledger_bytes(ledger))
    (checkpoint / EVIL).write_text("")
    for arguments in (("show",), ("show", "--json"), ("verify",), ("verify", "--json")):
        code, out, err = run(capsys, arguments[0], checkpoint, *arguments[1:])
        assert (code, err) == (0, "")
        assert all(line.isprintable() for line in out.split("\n"))
        assert r"\x1b[2J" in out or r"\u001b[2J" in out
        if "--json" in arguments:
            found = json.loads(out)
            assert EVIL in (found["versions"] if "versions" in found else found["other_files"])


def test_code_that_a_config_names_is_not_imported(
    checkpoint: Path, write_task: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "trap.py").write_text(f"open({str(checkpoint / 'harm')!r}, 'w')\n")
    config = {
        "sizes": [6, 8, 3],
        "model_type": "trap",
        "architectures": ["Trap"],
        "auto_map": {"AutoConfig": "trap.C", "AutoModelForSequenceClassification": "trap.Trap"},
        "model": "trap:make",
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    data = write_task("next", seed=1)
    for command in ("evaluate", "fisher", "finetune"):
        typed = [a for a in arguments(command, checkpoint, data) if a not in MODEL]
        typed += ["--objective", "sequence-classification"]
        code, _, err = run(capsys, *typed)
        assert code == 3
        assert "the code in its auto_map is never run" in err
        assert not (checkpoint / "harm").exists()
    code, _, _ = run(capsys, *arguments("evaluate", checkpoint, data))
    assert code == 0  # by the code that the user named
    assert not (checkpoint / "harm").exists()


@pytest.mark.parametrize("shape", [(2**60,), (2**31, 2**31), (-2, -3), (2**64,)])
def test_an_array_that_claims_more_than_it_holds(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shape: tuple[int, ...]
) -> None:
    data = tmp_path / "claims.npz"
    header = repr({"descr": "<f4", "fortran_order": False, "shape": shape}).encode() + b"\n"
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(
            "inputs.npy",
            b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header + b"0" * 24,
        )
    with bounded():
        code, _, err = run(capsys, *arguments("evaluate", checkpoint, data))
    assert code == 3, err
    assert "claims.npz is not a valid .npz file" in err


def test_arrays_whose_compression_is_damaged(tmp_path: Path) -> None:
    from formats.data import open_data
    from formats.errors import InputError

    data = tmp_path / "a.npz"
    np.savez_compressed(data, inputs=np.arange(4000.0).reshape(1000, 4))
    content = bytearray(data.read_bytes())
    for at in range(len(content) // 2, len(content) // 2 + 40):
        content[at] ^= 0xFF
    data.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.npz"):
        open_data(data)[0]
