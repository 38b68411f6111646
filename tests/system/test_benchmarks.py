import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"


def test_the_benchmark_of_the_penalty_writes_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.benchmarks import benchmark_penalty, harness

    for key, value in harness.STABLE.items():
        monkeypatch.setenv(key, value)  # else the process would start anew
    monkeypatch.setattr(harness, "results_folder", lambda quick: tmp_path)
    monkeypatch.setattr(benchmark_penalty, "NAMES", ("mlp",))
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / "benchmark_penalty.py"), "--quick"])
    benchmark_penalty.main()
    page = (tmp_path / "penalty.md").read_text(encoding="utf-8")
    forms = ("gradient", "gradient and value", "gradient, bfloat16", "proximal", "autograd")
    for form in (*forms, "blocks"):
        assert page.count(f"\n| {form} | ") == len(benchmark_penalty.OPTIMIZERS)
    assert "A quick run" in page


@pytest.mark.slow
def test_the_benchmark_of_memory_writes_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.benchmarks import benchmark_memory, harness

    for module in (harness, benchmark_memory):
        monkeypatch.setattr(module, "results_folder", lambda quick: tmp_path)
    words = ["--quick", "--command", "evaluate"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / "benchmark_memory.py"), *words])
    benchmark_memory.main()
    page = (tmp_path / "memory.md").read_text(encoding="utf-8")
    (row,) = [line.split(" | ") for line in page.splitlines() if "| empty, evaluate |" in line]
    own, mapped = float(row[1]), float(row[6])
    assert 0.05 < own < 2 > mapped > 0.05  # GB: torch and transformers, and their libraries
    assert "consolidate evaluate old --data old=old.jsonl" in page


@pytest.mark.slow
def test_the_benchmark_of_generated_texts_writes_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.benchmarks import benchmark_generation, harness

    for key, value in harness.STABLE.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(harness, "results_folder", lambda quick: tmp_path)
    words = ["--quick", "--texts", "4", "--max-length", "6", "--measured", "4"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / "benchmark_generation.py"), *words])
    benchmark_generation.main()
    page = (tmp_path / "generation.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    found = {row[0].strip("| "): row[1:] for row in rows}
    assert found["float32, batch size 1"][0] == found["bfloat16, batch size 1"][0] == "0 of 4"
    assert float(found["float32, batch size 2"][2].strip("%")) < 0.01
    largest = float(found["largest relative error of a value"][0].strip("%"))
    assert 0.3 < largest <= 0.4  # in percent: 1/2⁸, less for few values
    rounded, other, *_ = (float(x.strip("%| ")) for x in found["‖F̃ − F‖ / ‖F‖"])
    assert rounded < 0.3 < 10 < other


@pytest.mark.slow
def test_the_benchmark_of_the_commands_writes_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.benchmarks import commands, harness

    for key, value in harness.STABLE.items():
        monkeypatch.setenv(key, value)  # else the process would start anew
    monkeypatch.setattr(harness, "results_folder", lambda quick: tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / "commands.py"), "--quick"])
    commands.main()
    page = (tmp_path / "commands.md").read_text(encoding="utf-8")
    losses = []
    for form in commands.FORMS:
        steps, _ = [line.split(" | ") for line in page.splitlines() if f": {form} | " in line]
        losses.append(float(steps[5]))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)  # the same batches
    for name in ("`consolidate --help`", "writing a checkpoint"):
        assert f"\n| {name} | " in page


def test_a_step_is_set_beside_the_one_of_the_trainer() -> None:
    from scripts.benchmarks.commands import FORMS, Moment, Steps, steps_table

    spans = ([(1.0, 2.0), (9.0, 9.0), (1.0, 2.0)], [(0.5, 1.0)] * 3, [(1.1, 3.0)] * 3)
    found = {
        form: Steps([Moment(*moment) for moment in each], 0.25)
        for form, each in zip(FORMS, spans, strict=True)
    }
    rows = [line.split(" | ") for line in steps_table({"small": found}).splitlines()[2:]]
    assert [row[3:5] for row in rows] == [
        ["1.000", "1.000"],
        ["0.500", "0.500"],
        ["1.100", "1.500"],
    ]
    assert rows[2][:3] == ["| small: finetune, penalty", "1100", "3000"]


def test_what_was_measured_is_kept_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.benchmarks import benchmark_memory as memory

    runs = {"finetune": memory.Run({"finetune: training": memory.Peak(3, 4)}, 1.5, 0.5, "x")}
    measured = memory.Measured(7, runs)
    assert memory.measured_of(json.loads(json.dumps(memory.as_json(measured)))) == measured


LAUNCHER = """
import os, subprocess, sys
worker = "import sys, time; held = b'x' * int(1e7); time.sleep(1); print('step 1', file=sys.stderr)"
worker += "; time.sleep(0.5); more = b'x' * int(RANK) * int(4e7); time.sleep(1)"
started = [
    subprocess.Popen(
        [sys.executable, "-c", worker.replace("RANK", str(rank))],
        env={**os.environ, "RANK": str(rank)},
    )
    for rank in (1, 2)
]
assert not any(process.wait() for process in started)
print('{"done": true}')
"""


def test_the_processes_of_a_launcher_are_watched_part_by_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from scripts.benchmarks import harness

    seen = harness.watch([sys.executable, "-c", LAUNCHER], ["one", "two"], "step 1", 2)
    assert seen.result == {"done": True}
    one, two = ({rank: peak.own for rank, peak in seen.peaks[part].items()} for part in seen.peaks)
    assert sorted(one) == sorted(two) == [1, 2]
    assert 1e7 < one[1] < 5e7 > one[2]
    assert 4e7 < two[1] < 8e7 < two[2] < 12e7


def test_the_page_of_shards_sets_what_was_measured_beside_theory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from scripts.benchmarks import benchmark_shards as shards

    parameters, layer, outside = shards.parameters_of(shards.MODEL, shards.VOCABULARY)
    assert parameters == shards.MODEL.layers * layer + outside
    own = 10**8  # of the interpreter
    runs = [
        shards.Run(True, "fisher", 1, {"fisher": [own]}, 1.0, "x"),
        shards.Run(True, "fisher", 2, {"fisher": [own - 1, own]}, 1.0, "x"),
        shards.Run(False, "fisher", 1, {"fisher": [own + 8 * parameters]}, 1.0, "x"),
        shards.Run(
            False,
            "fisher",
            2,
            {"fisher": [own + 7 * parameters, own + 5 * parameters]},
            1.0,
            "torchrun it",
        ),
    ]
    text = shards.page(runs, quick=False)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| fisher | ")]
    assert [row[1] for row in rows] == ["1", "2"]
    assert [row[4:6] for row in rows] == [["8.0", "–"], ["14.0", "10.0"]]
    assert [row[6] for row in rows] == ["8 |", f"10 + {4 * layer * 2 / parameters:.1f} |"]
    assert "torchrun it" in text
