"""Samples of scripts/robustness: kills and damaged files make no difference, and would be told."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from scripts.benchmarks import harness
from scripts.robustness import (
    device_suite,
    file_kinds,
    guided,
    inputs,
    kills,
    mutations,
    robustness,
)
from scripts.robustness.records import add_record, read_records
from support import in_process

SAMPLE = ("`fisher`, perceptron", "the same `finetune` twice at once", "`push` to a Hub")


# In a process of its own: the client of the Hub reads its environment when it is imported.
ATTACK = """
import sys, time
from pathlib import Path
from scripts.robustness import kills

commands = [command for command in kills.COMMANDS if command.name in sys.argv[2:]]
kills.attack(Path(sys.argv[1]), 4, 0, time.monotonic() + 900, commands)
"""


@pytest.mark.slow
def test_killed_commands_leave_the_bytes_of_the_undisturbed_run(tmp_path: Path) -> None:
    path, root = tmp_path / "kills.jsonl", Path(kills.__file__).parents[2]
    words = [sys.executable, "-c", ATTACK, str(path), *SAMPLE]
    variables = {**os.environ, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=root, env=variables)
    assert done.returncode == 0, done.stderr
    found = read_records(path)
    assert {record["command"] for record in found} == set(SAMPLE)
    assert sum(len(record["kills"]) for record in found) >= 4
    assert [record["differences"] for record in found] == [[]] * len(found)


def test_what_is_different_after_a_kill_is_told(tmp_path: Path) -> None:
    old = {"out/model.safetensors": b"old", "out/fisher/fisher.json": b"{}"}
    new = {"out/model.safetensors": b"new", "out/fisher/fisher.json": b"{ }"}
    whole = kills.Whole(1.0, 1.0, old, new)
    for files, expected in (
        (old, []),
        (new, []),
        ({**new, "out/.fisher.consolidate-partial": b"progress"}, []),
        ({**old, **dict([*new.items()][:1])}, ["out is neither old nor new"]),
        ({}, ["out is neither old nor new"]),
        ({**old, "more": b""}, ["more is neither old nor new"]),
    ):
        folder = tmp_path / str(time.monotonic_ns())
        folder.mkdir()
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        assert kills.broken(folder, whole) == expected


def test_damaged_files_of_every_kind_are_read_or_refused(tmp_path: Path) -> None:
    path, end = tmp_path / "inputs.jsonl", time.monotonic() + 900
    count = 4 * len(file_kinds.kinds())
    found = inputs.attack(path, count, 20, end)
    assert [record for record in found if record["faults"]] == []
    assert sum(record["cases"] for record in found) == count
    assert sum(record["past"] for record in found) > count / 3
    assert len(found) >= 30
    assert inputs.attack(path, count, 20, end) == found  # nothing is left to do


HARM: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another exception": (lambda f: json.loads((f / "a.json").read_bytes()), "JSONDecodeError at "),
    "a changed file": (lambda f: (f / "a.json").write_text("{}"), "reading changed a file"),
    "a file outside": (lambda f: Path("outside").write_text(""), "'outside' is written"),
    "a process": (lambda f: subprocess.run(["true"], check=False), "subprocess.Popen"),
    "a command": (lambda f: os.system("true"), "os.system"),
    "a socket": (lambda f: socket.socket(), "socket.__new__"),
    "code of the folder": (
        lambda f: exec(compile("1", str(f / "evil.py"), "exec")),
        "code of the case's folder",
    ),
    "a crash": (lambda f: os._exit(3) if f.name == "case" else None, "the process ended with 3"),
}


@pytest.mark.parametrize("what", HARM)
def test_a_fault_is_told(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    harmful, expected = HARM[what]

    def write(folder: Path) -> list[str]:
        (folder / "a.json").write_text('{"a": [1, 2]}')
        return ["a.json"]

    def cut(data: bytes, random: Random) -> bytes:
        return data[: random.randrange(1, len(data))]

    def read(folder: Path) -> None:
        if folder.name == "case":
            harmful(folder)

    kind = file_kinds.Kind(write, cut, (read,), json.loads)
    found = inputs.attack(tmp_path / "r.jsonl", 3, 0, time.monotonic() + 900, {what: kind})
    assert [case for case, _ in found[0]["faults"]] == [0, 1, 2]
    assert found[0]["faults"][0][1].startswith(expected), found[0]["faults"]
    assert not Path("outside").exists()


def test_damage_is_a_function_of_the_seed() -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    file = len(header).to_bytes(8, "little") + header + b"0000"
    for mutate, good in (
        (mutations.mutated_bytes, file),
        (mutations.mutated_text, header),
        (mutations.mutated_json, header),
        (mutations.mutated_safetensors, file),
        (mutations.mutated_toml, b'a = 1\nb = [1.5, "x"]\nc = {d = true}\n'),
        (mutations.mutated_yaml, b"a: 1\nb: [1.5, x]\n"),
        (mutations.mutated_table, b"text,label\na b,1\nc,2\n"),
        (mutations.mutated_lines, b'{"a": 1}\n{"a": [2]}\n'),
        (mutations.mutated_template, file_kinds.TEMPLATE.encode()),
    ):
        made = [mutate(good, Random(seed)) for seed in range(300)]
        assert made == [mutate(good, Random(seed)) for seed in range(300)]
        assert len(set(made)) > 150


@pytest.mark.parametrize("target", guided.TARGETS)
def test_the_targets_of_the_guided_search_read_good_files(target: str, tmp_path: Path) -> None:
    read, mutate, good = guided.reader_of(target, tmp_path)
    for data in good[:4]:
        if target != guided.TARGETS[0]:  # a file of a Fisher is no file of weights
            read(data)
        assert mutate(data, Random(1)) != data


def test_a_record_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "records" / "a.jsonl"
    add_record(path, {"a": "λ"})
    with path.open("a") as file:
        file.write('{"a": ')
    assert read_records(path) == [{"a": "λ"}]
    add_record(path, {"a": 2})
    assert read_records(path) == [{"a": "λ"}, {"a": 2}]


def test_the_page_is_that_of_the_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "robustness"
    record = {"command": kills.COMMANDS[0].name, "kills": [["SIGKILL", "Fisher"]]}
    record |= {"round": 0, "seed": 0, "differences": ["a"], "seconds": 1.0, "cpu": 1.0}
    add_record(folder / "kills.jsonl", record)
    monkeypatch.setattr("sys.argv", ["robustness.py", "--report", "--folder", str(folder)])
    assert robustness.main() == 1
    page = folder.with_suffix(".md").read_text(encoding="utf-8")
    assert "| `fisher`, perceptron | 1 | 1 | 0 | 0 | 1 | 1 | 1 |" in page
    assert "Short of what was asked for: kills, files, guided search." in page

    (folder / "kills.jsonl").unlink()
    add_record(folder / "kills.jsonl", record | {"differences": []})
    assert robustness.main() == 1  # nothing was wrong, but two parts did not run
    read = {"kind": "a", "cases": 1, "read": 1, "refused": 0, "past": 1, "faults": [], "cpu": 1.0}
    add_record(folder / "inputs.jsonl", read)
    answered = {"command": "show", "exit": 3, "right": True, "changed": []}
    add_record(folder / "hub.jsonl", answered)
    assert robustness.main() == 0


def on_device(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    for key, value in harness.STABLE.items():
        monkeypatch.setenv(key, value)  # else the process would start anew
    monkeypatch.setattr(sys, "argv", [str(Path(device_suite.__file__)), *arguments])
    return device_suite.main()


def test_without_an_accelerator_its_suite_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device_suite, "accelerator", lambda: None)
    assert on_device(monkeypatch) == 1
    assert capsys.readouterr().err == f"{device_suite.NONE}\n"


@pytest.mark.slow
def test_the_suite_of_a_device_writes_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "results_folder", lambda quick: tmp_path)
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k test_merging")  # one of the tests that it runs
    start = device_suite.run_command

    def run_command(arguments: Sequence[str]) -> Any:
        if arguments[0] == "verify":  # which imports no transformers
            return start(arguments)
        code, out, err = in_process.consolidate(tmp_path, *arguments, variables=os.environ)
        assert code == 0, err
        return json.loads(out)

    monkeypatch.setattr(device_suite, "run_command", run_command)
    assert on_device(monkeypatch, "--device", "cpu", "--quick") == 0
    page = (tmp_path / "device-cpu.md").read_text(encoding="utf-8")
    assert " passed" in page
    assert "\n| MLP 784-400-400-10, batch 256 | " in page
    assert "has the same bytes as the first" in page
