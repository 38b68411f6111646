"""Run correctness, benchmarks and a fine-tuning on the accelerator that is there: device-TYPE.md.

    .venv/bin/python scripts/robustness/device_suite.py

Without an accelerator it says so and does nothing else. `--device cpu --quick` only shows that the
program itself works.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import consolidate
from scripts.benchmarks.harness import (
    EMPTY,
    ROOT,
    WORKLOADS,
    Size,
    forward_backward,
    make_checkpoint,
    start,
    write_page,
    write_texts,
)
from scripts.experiments.lib.common import markdown

TEXT = """
# On an accelerator: {name}

`scripts/robustness/device_suite.py` ran on the device `{device}`.{quick}

## Correctness

`tests/system/test_devices.py` with this device: the Fisher of every estimator, penalties, merging,
training steps and evaluation, compared with the CPU; and the Fisher with `--kernel`.

{tests}

## Time

Milliseconds of one batch in the middle of a pass, median of {rounds}: forward and backward; the
Fisher, without and with `--kernel`; a step with AdamW, and the same with the penalty's gradient.

{times}

## A fine-tuning run

`fisher`, `finetune`, `evaluate` and `verify` of a model like Llama with {parameters:,} parameters,
stored in bfloat16, {steps} steps, on `{device}` and on the CPU.

{runs}

The output of the second run on `{device}` has {same} bytes as the first.
"""

NONE = "no accelerator is here (torch.accelerator finds none): nothing was run; --device names one"
NAMES = ("mlp", "resnet32", "bert", "gpt2")
LLAMA = Size(512, 1408, 8, 8, 2)
FEW, MANY = 2, 10  # batches of a short and of a long pass; the first batch has its checks


class Tests(NamedTuple):
    """What pytest said, and whether all passed."""

    passed: bool
    said: str


class Tuned(NamedTuple):
    """What a fine-tuning run gave."""

    trace: float  # of the Fisher before it
    loss: float  # of the last step
    old_loss: float  # on the first data afterwards
    seconds: float
    weights: bytes


def accelerator() -> str | None:
    """Return the type of the accelerator that is here; None where there is none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type


def name_of(device: torch.device) -> str:
    """Return what a device is called."""
    module = getattr(torch, device.type)
    return (
        str(module.get_device_name(device)) if hasattr(module, "get_device_name") else device.type
    )


def run_tests(device: str) -> Tests:
    """Run the tests that take a device."""
    words = ["pytest", "-p", "no:cacheprovider", "-n", "0", "tests/system/test_devices.py"]
    words.append("tests/estimation/test_squares_kernel.py::test_another_device")
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env={**os.environ, "CONSOLIDATE_TEST_DEVICE": device, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return Tests(done.returncode == 0, "\n".join([*failed, *lines[-1:]]) or done.stderr)


def seconds(work: Callable[[], object]) -> float:
    """Return how long work takes until the device has done it."""
    _wait()
    began = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def time_workload(name: str, device: torch.device, quick: bool, rounds: int) -> list[str]:
    """Return the row of one model: its title, and milliseconds of a batch by kind of work."""
    workload = WORKLOADS[name]
    torch.manual_seed(0)
    model: nn.Module = workload.make(quick).to(device)
    inputs, labels = (tensor.to(device) for tensor in workload.batch(quick))

    def fisher(batches: int, kernel: bool) -> None:
        consolidate.fisher_diagonal(
            model.eval(),
            [(inputs, labels)] * batches,
            workload.likelihood,
            estimator="empirical",
            kernel=kernel,
        )

    def batch_of_fisher(kernel: bool) -> float:
        many = seconds(lambda: fisher(MANY, kernel))
        return (many - seconds(lambda: fisher(FEW, kernel))) / (MANY - FEW)

    measured = fisher_of(model)
    penalty = consolidate.Penalty(model, measured, ewc_lambda=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step(with_penalty: bool) -> None:
        forward_backward(model, inputs, labels, workload.likelihood)
        if with_penalty:
            penalty.add_gradient_()
        optimizer.step()

    works: list[tuple[Callable[[], object], float]] = [
        (lambda: forward_backward(model, inputs, labels, workload.likelihood), 1.0),
        (lambda: step(False), 1.0),
        (lambda: step(True), 1.0),
    ]
    for work, _ in works:
        work()
    for kernel in (False, True):
        fisher(FEW, kernel)
    plain, stepped, penalized = (
        1000 * statistics.median(seconds(work) for _ in range(rounds)) for work, _ in works
    )
    turns = [[batch_of_fisher(kernel) for kernel in (False, True)] for _ in range(rounds)]
    squares, by_kernel = (1000 * statistics.median(times) for times in zip(*turns, strict=True))
    row = (
        *(plain, squares, squares / plain, by_kernel, by_kernel / plain),
        *(stepped, penalized, penalized / stepped),
    )
    return [workload.title, *(f"{value:.2f}" for value in row)]


def fisher_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return noise in the place of a Fisher."""
    return {name: torch.rand_like(p) for name, p in model.named_parameters()}


def tune(folder: Path, device: str, steps: int) -> Tuned:
    """Measure, fine-tune, evaluate and verify with the commands, on one device."""
    began = time.monotonic()
    out = Path(tempfile.mkdtemp(dir=folder))
    on = ["--device", device, "--json"]
    data, new = str(folder / "old.jsonl"), str(folder / "new.jsonl")
    measured, tuned = str(out / "measured"), str(out / "tuned")
    measuring = ["fisher", str(folder / "model"), "--data", data, "--task", "old"]
    fisher = run_command([*measuring, "--output-dir", measured, *on])
    training = ["finetune", measured, "--data", new, "--task", "new", "--output-dir", tuned]
    training += ["--ewc-lambda", "10", "--max-steps", str(steps), "--batch-size", "4"]
    done = run_command([*training, *on])
    scores = run_command(["evaluate", tuned, "--data", f"old={data}", *on])
    run_command(["verify", tuned, "--json"])
    return Tuned(
        float(fisher["trace"]),
        float(done["loss"]),
        float(scores["old"]["loss"]),
        time.monotonic() - began,
        (out / "tuned" / "model.safetensors").read_bytes(),
    )


def run_command(arguments: Sequence[str]) -> Any:
    """Run a command, and return what it writes as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "consolidate", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"consolidate {' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def tune_everywhere(device: str, quick: bool) -> tuple[str, int, int, bool]:
    """Return a table, the parameters, the steps, and whether two runs give the same bytes."""
    steps = 2 if quick else 20
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        size, vocabulary = (EMPTY, 100) if quick else (LLAMA, 8000)
        parameters = make_checkpoint(folder / "model", size, vocabulary)
        for seed, name in enumerate(("old", "new")):
            write_texts(folder / f"{name}.jsonl", seed, sequences=8, tokens=16 if quick else 64)
        runs = {"cpu": tune(folder, "cpu", steps), device: tune(folder, device, steps)}
        again = tune(folder, device, steps)
    rows = [
        [
            name,
            *(f"{value:.6g}" for value in (run.trace, run.loss, run.old_loss)),
            f"{run.seconds:.0f}",
        ]
        for name, run in runs.items()
    ]
    header = ["", "trace of the Fisher", "loss after", "loss on the old data", "seconds"]
    return markdown(header, rows), parameters, steps, again.weights == runs[device].weights


def main() -> int:
    """Run everything on the device, write the page, and return 1 if a test failed or none ran."""
    parser = start(__doc__.splitlines()[0])
    parser.add_argument("--device", help="such as cuda, xpu or mps; the accelerator unless given")
    options = parser.parse_args()
    chosen = options.device or accelerator()
    if chosen is None:
        print(NONE, file=sys.stderr)
        return 1
    device = torch.device(chosen)
    rounds = 1 if options.quick else 5
    tests = run_tests(chosen)
    names = NAMES[:1] if options.quick else NAMES
    rows = [time_workload(name, device, options.quick, rounds) for name in names]
    table, parameters, steps, same = tune_everywhere(chosen, options.quick)
    header = ["", "forward + backward", "Fisher", "ratio", "with `--kernel`", "ratio"]
    header += ["step", "with the penalty", "ratio"]
    text = TEXT.format(
        name=name_of(device),
        device=chosen,
        quick=" **A quick run at tiny sizes: its figures mean nothing.**" * options.quick,
        tests=f"```text\n{tests.said}\n```",
        rounds=rounds,
        times=markdown(header, rows),
        parameters=parameters,
        steps=steps,
        runs=table,
        same="the same" if same else "other",
    )
    write_page(f"device-{device.type}", text, quick=options.quick, packages=["transformers"])
    return 0 if tests.passed else 1


if __name__ == "__main__":
    sys.exit(main())
