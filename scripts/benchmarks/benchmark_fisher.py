"""Compare time, memory and error of the Fisher diagonal with other tools: docs/results/fisher.md.

The other tools are optional; the page lists those that are missing or fail, with their message:

    pip install backpack-for-pytorch nngeometry opacus asdfghjkl laplace-torch

curvlinops comes with laplace-torch. Each tool takes turns with a plain pass in a process of its
own, so that a slow period of the machine affects both, and no tool slows down another. Memory is
measured in another process, which returns freed memory to the system.
"""

import argparse
import copy
import ctypes
import gc
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import consolidate
from consolidate.data.examples import Examples
from consolidate.data.text_examples import Ragged, TextExamples
from scripts.benchmarks.competitors import REPEATS, SHORT, TOOLS, WARM, Case, Timed, Tool
from scripts.benchmarks.harness import (
    WORKLOADS,
    Double,
    Workload,
    double,
    forward_backward,
    installed,
    quick_size,
    relative_errors,
    squares_one_by_one,
    start,
    write_page,
)
from scripts.experiments.lib.common import markdown

PACKAGES = [
    *("transformers", "backpack-for-pytorch", "nngeometry", "opacus", "asdfghjkl"),
    *("laplace-torch", "curvlinops-for-pytorch"),
]
RETURNED = {
    "MALLOC_MMAP_MAX_": "65536",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "MALLOC_TOP_PAD_": "0",
}
"""Where memory is measured: every large tensor has pages of its own and returns them when freed."""

AT_MOST = {"mlp": 1.15, "resnet64": 1.5, "resnet32": 1.5, "bert": 1.05, "gpt2": 1.05, "exact": 2.5}
AIMS = {"mlp": 1.05, "resnet64": 1.2, "resnet32": 1.2, "bert": 0.95, "gpt2": 0.95, "exact": 2.3}

KINDS = {
    "products": r"aten::(mm|bmm|addmm_?|baddbmm)",
    "convolutions": r"aten::.*conv.*",
    "attention": r"aten::.*scaled_dot_product.*",
    "squaring and adding": r"aten::(addcmul_|pow_?|dot|add_|sum)",
}
"""What is timed together, by the names of operations."""

BRIEF = 1.0  # seconds of a turn, below which a tool has more of them
FEW = 4  # examples that errors are measured on
TEXTS = 128  # of unlike lengths
UNIT = "training"
TOGETHER = (UNIT, "forward", "inputs", "ours", "kernel", "blocks", "alone")
"""What shares a process; each other tool has one with the unit."""
WRONG = 1e-6  # error in float64 above which it is another quantity
ABSENT = {"is not installed": "missing", "has no exact Fisher": "none"}

TEXT = """
# The Fisher diagonal beside a training pass

Exact per-example Fisher diagonals of one batch: with the data's labels (`empirical`), and in the
last workload over all ten classes (`exact`). A ratio is wall time over a plain forward and backward
pass of the same model and batch in the same process, with which it takes turns; medians of at least
{rounds} rounds. Each of the other tools has a process of its own. *Forward + input gradients* is
the lower bound: a training pass without gradients of weights.{quick}

{summary}

*At most* and *aim* are the goals of this project, for two cores; some are missed. *Wrong*: with
everything in float64, the result of N parameters differs by more than {wrong:g} from a batch-of-one
loop, so it is another quantity. *In part*: some parameters are missing. *Fails*: see
[below](#what-fails). *None*: the tool has no such function.

consolidate is timed in the middle of a pass. *With `--kernel`*, squares are computed by a kernel
that is compiled for the processor; *at most* is for plain torch, *aim* with the kernel. *Structure
`inputs`* also measures a matrix over the inputs of every layer that is covered, beside the
diagonal. The first batch of every pass is verified against single examples; *a pass of one batch*
includes this cost, which occurs once per pass.

## Where the time goes

One batch of each under torch's profiler, which slows down code with many calls. Milliseconds by
kind of operation; *plain* is the forward and backward pass. *Between* is wall time outside of all
operations: Python.

{profiles}

Where plain torch loses, and what the kernel changes:

- **Products.** A plain pass computes the weight gradient of a layer in one product over all rows of
  the batch. Here each example has its own product, T rows deep, which runs at a lower rate, and
  squaring and adding it reads a matrix of the layer's size once more for each example. The kernel
  squares a product while it is in registers.
- **Convolutions.** The same, more strongly: at 4 × 4 positions, one example's gradient of a
  256 × 256 kernel has 16 terms for each of 590,000 elements and is bound by memory, and what the
  layer sees at each position is copied for the product; with 256 positions and more, torch's
  convolution computes it. The kernel gathers what a layer sees tile by tile.
- **Calls.** A batch of the MLP takes {mlp} in a plain pass, in about fifty operations. Squaring the
  inputs and output gradients of three layers and summing them are forty more. They are little
  arithmetic, and the cost of the calls does not grow with the batch: at 1,024 examples the ratio is
  lower.

{details}

## Texts of unlike lengths

A whole pass (`empirical`, checks included) over {texts} random texts of 8 to 512 tokens in batches
of 16, by a BERT of random weights: in the order of the data, where each batch is padded to its
longest text, and by length, as `consolidate fisher` reads them. The two take turns; medians of
{rounds} rounds of processor time.

{lengths}

## What fails

{failures}

## How it was measured

- **Time**: a pass in the middle of others. A pass of less than {warm:g} s runs twice in a row, and
  up to {repeats} times within {short} s; the first is not counted. Tools whose turn takes less than
  {brief:g} s take turns for another {seconds:g} s.
- **Error**: the largest over parameters of max |F − F₀| / max |F₀| against a batch-of-one loop in
  float64, on {few} examples; once in float32, as timed, and once with everything in float64, also
  where the model's code asks for float32 by name (blank if a tool fails at this). In float32 some
  inputs of a ReLU or a max-pool change sign or rank, so only the second column separates a wrong
  formula from rounding.
- **Memory**: the growth of the process's peak resident memory during the pass, results included
  (Linux only), in a separate process that returns freed memory to the system ({returned} instead of
  the values below).
- Threads wait for one another by spinning, the default. With `OMP_WAIT_POLICY=PASSIVE` they sleep,
  each parallel operation costs tens of microseconds more, and tools with many operations become
  slower, consolidate too.
- Models of transformers are wrapped to take one tensor, as other tools expect. All models are in
  eval mode with random weights; the inputs are noise.
- BackPACK's converter is used if its plain form refuses a model. laplace and vmap take 8 examples
  at once, and 32 for the MLP's empirical Fisher. curvlinops 3.0.1 itself has no exact diagonal,
  only random estimates of one; its main branch has an exact one of the GGN, not timed here.
"""


@dataclass
class Row:
    """What was found of one tool on one workload."""

    tool: Tool
    run: Timed = lambda: (0.0, {})
    seconds: list[float] = field(default_factory=list)
    unit: float = 0.0  # the median time of a plain pass in the same process
    turn: float = 0.0  # how long the last turn took in all
    errors: dict[torch.dtype, float] = field(default_factory=dict)
    parameters: int = 0
    wrong: int = 0  # of them
    missing: int = 0  # of them
    memory: float | None = None
    failure: str = ""

    def ratio(self) -> str:
        """Write the ratio of its median time, or what is wrong with it."""
        if self.failure:
            return ABSENT.get(self.failure, "fails")
        number = f"{statistics.median(self.seconds) / self.unit:.2f}"
        if self.wrong:
            return f"{number}, {self.wrong} of {self.parameters} wrong"
        return f"{number}, in part" if self.missing else number


def prepare(
    tool: Tool, workload: Workload, model: nn.Module, inputs: Tensor, labels: Tensor
) -> Timed:
    """Give a tool a model of its own and the batch."""
    model = copy.deepcopy(model).eval()
    kinds = (workload.likelihood, workload.estimator)
    return tool.prepare(Case(model, inputs, labels, *kinds, workload.chunk))


def attempt(row: Row, action: Callable[..., Any], *arguments: Any) -> Any:
    """Do it unless the row has failed; an exception becomes the row's failure."""
    if row.failure:
        return None
    try:
        return action(*arguments)
    except Exception as error:  # Whatever another library raises is the result.
        message = " ".join(str(error).split())
        row.failure = f"{type(error).__name__}: {message[:300]}"
        return None


def measure(
    name: str, tools: dict[str, Tool], quick: bool, rounds: int, seconds: float
) -> dict[str, Row]:
    """Measure the tools on one workload.

    Args:
        name: Of the workload.
        tools: By name.
        quick: At tiny sizes.
        rounds: How often each tool is timed.
        seconds: How long fast tools take further turns.

    Returns:
        What was found, by the tools' names.
    """
    workload = WORKLOADS[name]
    torch.manual_seed(0)
    model = workload.make(quick).eval()
    inputs, labels = workload.batch(quick)
    rows = {key: Row(tool) for key, tool in tools.items()}
    for row in rows.values():
        if not installed(row.tool.distribution):
            row.failure = "is not installed"
        elif workload.estimator == "exact" and not row.tool.exact:
            row.failure = "has no exact Fisher"
    check(rows, workload, model, inputs[:FEW], labels[:FEW])
    works = [key for key, row in rows.items() if not row.failure]
    for group in [[key for key in works if key in TOGETHER], *([k] for k in works)]:
        if not rows[group[0]].seconds:
            times = ["--rounds", str(rounds), "--seconds", str(seconds)]
            found = in_process("time", name, group, quick, *times)
            for key in group:
                rows[key].seconds, rows[key].failure = found[key]
                rows[key].unit = statistics.median(found[UNIT][0])
    if Path("/proc/self/clear_refs").exists():
        works = [key for key, row in rows.items() if not row.failure]
        for key, growth in in_process("memory", name, works, quick, environment=RETURNED).items():
            rows[key].memory = growth
    return rows


def in_process(
    part: str,
    name: str,
    keys: Iterable[str],
    quick: bool,
    *others: str,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Let this script do a part of the work on some tools in another process."""
    words = [sys.executable, sys.argv[0], "--part", part, "--workload", name, *["--quick"] * quick]
    words += [word for key in keys for word in ("--tool", key)]
    done = subprocess.run(
        [*words, *others], env={**os.environ, **(environment or {})}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def times_of(
    workload: Workload, tools: dict[str, Tool], quick: bool, rounds: int, seconds: float
) -> dict[str, tuple[list[float], str]]:
    """Return the seconds of each tool's turns, and why it failed."""
    torch.manual_seed(0)
    model = workload.make(quick).eval()
    batch = workload.batch(quick)
    rows = {key: Row(tool) for key, tool in tools.items()}
    for row in rows.values():
        row.run = attempt(row, prepare, row.tool, workload, model, *batch)
        attempt(row, row.run)  # Once for what is made at the first call.
    for _ in range(rounds):
        take_turns(rows.values())
    brief = [row for row in rows.values() if not row.failure and row.turn < BRIEF]
    began = time.monotonic()
    while brief and time.monotonic() - began < seconds:
        take_turns(brief)
    return {key: (row.seconds, row.failure) for key, row in rows.items()}


def take_turns(rows: Iterable[Row]) -> None:
    """Time each of the tools once."""
    for row in rows:
        gc.collect()
        began = time.perf_counter()
        if (result := attempt(row, row.run)) is not None:
            row.seconds.append(result[0])
        row.turn = time.perf_counter() - began


def check(
    rows: dict[str, Row], workload: Workload, model: nn.Module, inputs: Tensor, labels: Tensor
) -> None:
    """Compare every tool's squares on a few examples with the float64 loop's."""
    exact_model, exact_inputs = double(model, inputs)
    kinds = (workload.likelihood, workload.estimator)
    with Double():
        expected = squares_one_by_one(exact_model, exact_inputs, labels, *kinds)
    for row in rows.values():
        for wide in (False, True):
            if not row.tool.fisher:
                continue
            pair = (exact_model, exact_inputs) if wide else (model, inputs)
            trial = Row(row.tool, failure=row.failure)
            with Double() if wide else nullcontext():
                run = attempt(trial, prepare, row.tool, workload, *pair, labels)
                result = attempt(trial, run)
            if result:
                found = result[1]
                errors = relative_errors(found, expected)
                row.errors[torch.float64 if wide else torch.float32] = max(errors.values())
                row.parameters, row.missing = len(expected), len(expected) - len(found)
                # Once more for float64, which overrides; some tools know float32 only.
                row.wrong = sum(e > (WRONG if wide else 1e-2) for e in errors.values())
            elif not wide:
                row.failure = trial.failure


def memory_of(workload: Workload, tools: dict[str, Tool], quick: bool) -> dict[str, float | None]:
    """Return by how many bytes resident memory grows in a pass of each tool."""
    torch.manual_seed(0)
    model = workload.make(quick).eval()
    batch = workload.batch(quick)
    growths: dict[str, float | None] = {}
    for key, tool in tools.items():
        row = Row(tool)
        attempt(row, attempt(row, prepare, tool, workload, model, *batch))
        run = attempt(row, prepare, tool, workload, model, *batch)  # Nothing is left of the first.
        before = resident("VmRSS")
        attempt(row, run)
        growths[key] = None if row.failure else resident("VmHWM") - before
        del run
    return growths


def resident(field_name: str) -> float:
    """Return the process's VmRSS, the peak being reset, or its peak VmHWM, in bytes."""
    status = Path("/proc/self/status")
    if field_name == "VmRSS":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith(field_name))
    return float(line.split()[1]) * 1024


def summary(tables: dict[str, dict[str, Row]]) -> str:
    """Write the ratios of all workloads side by side."""
    short = [WORKLOADS[name].title for name in tables]
    rows = []
    for key in next(iter(tables.values())):
        tool = TOOLS[key]
        rows.append([tool.title, *(table[key].ratio() for table in tables.values())])
    for title, goals in (("at most", AT_MOST), ("aim", AIMS)):
        rows.append([f"*{title}*", *(f"*{goals[n]:.2f}*" if n in goals else "" for n in tables)])
    return markdown(["", *short], rows)


def profile_table(names: Iterable[str], quick: bool) -> str:
    """Write where the time of one batch goes, in a plain pass and in consolidate's."""
    rows = []
    names = list(names)
    for name in names[:1]:
        profiles(WORKLOADS[name], quick)  # the first of a process is slower by milliseconds
    for name in names:
        for title, times in profiles(WORKLOADS[name], quick).items():
            cells = [f"{1000 * times[kind]:.1f}" for kind in [*KINDS, "others", "between"]]
            rows.append([f"{WORKLOADS[name].title}, {title}", *cells])
    return markdown(["", *KINDS, "others", "between"], rows)


def profiles(workload: Workload, quick: bool) -> dict[str, dict[str, float]]:
    """Return the seconds of one batch by kind of operation, of both passes."""
    torch.manual_seed(0)
    model = workload.make(quick).eval()
    inputs, labels = workload.batch(quick)
    found = {}

    def batches(title: str) -> Iterator[tuple[Tensor, Tensor]]:
        yield inputs, labels
        yield inputs, labels
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        with profiler:
            began = time.perf_counter()
            yield inputs, labels
            seconds = time.perf_counter() - began
        found[title] = by_kind(profiler, seconds)

    for x, y in batches("plain"):
        forward_backward(model, x, y, workload.likelihood)
    model.zero_grad()
    consolidate.fisher_diagonal(
        model, batches("consolidate"), workload.likelihood, estimator=workload.estimator
    )
    return found


def by_kind(profiler: torch.profiler.profile, seconds: float) -> dict[str, float]:
    """Add up the seconds of a profile's operations by kind, and what is left between them."""
    times = dict.fromkeys([*KINDS, "others"], 0.0)
    for event in profiler.key_averages():
        if not event.key.startswith("aten::"):
            continue
        kind = next((k for k, words in KINDS.items() if re.fullmatch(words, event.key)), "others")
        times[kind] += event.self_cpu_time_total / 1e6
    return {**times, "between": max(0.0, seconds - sum(times.values()))}


def detail(name: str, rows: dict[str, Row]) -> str:
    """Write everything about one workload."""
    lines = []
    for row in rows.values():
        if row.failure:
            continue
        middle, low = statistics.median(row.seconds), min(row.seconds)
        lines.append(
            [
                row.tool.title,
                f"{1000 * middle:.1f}",
                f"{1000 * low:.1f}",
                row.ratio(),
                "" if row.memory is None else f"{row.memory / 1e6:.0f}",
                *(
                    f"{row.errors[dtype]:.0e}" if dtype in row.errors else ""
                    for dtype in (torch.float32, torch.float64)
                ),
                str(row.wrong or ""),
                str(row.missing or ""),
            ]
        )
    header = ["", "median, ms", "least, ms", "ratio", "memory, MB", "error"]
    table = markdown([*header, "error, float64", "wrong", "left out"], lines)
    turns = len(rows[UNIT].seconds)
    return f"### {WORKLOADS[name].title}\n\n{turns} turns of a plain pass.\n\n{table}"


def texts_of_unlike_lengths(count: int) -> TextExamples:
    """Make texts of random tokens with two labels, in lengths like those of messages."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randn(count, generator=generator).exp().mul(160).long().clamp(8, 512)
    ids = Ragged()
    for length in lengths.tolist():
        ids.append(torch.randint(1000, 30000, (length,), generator=generator).tolist())
    labels = torch.arange(count) % 2
    return TextExamples({"input_ids": ids}, labels, {"input_ids": 0})


def by_length(model: nn.Module, examples: Examples, rounds: int) -> dict[str, list[float]]:
    """Return the processor time of each round's whole pass, by the order of reading."""
    orders = {"as given": range(len(examples)), "by length": examples.longest_first()}
    times: dict[str, list[float]] = {title: [] for title in orders}
    for _ in range(rounds):
        for title, order in orders.items():
            began = time.process_time()
            batches = examples.batches(16, order=order)
            consolidate.fisher_diagonal(model, batches, "softmax", estimator="empirical")
            times[title].append(time.process_time() - began)
    return times


def lengths_table(quick: bool, rounds: int) -> str:
    """Write the processor time of a pass over texts of unlike lengths, in both orders."""
    import transformers

    width = quick_size(384, 16, quick)
    config = transformers.BertConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=quick_size(6, 1, quick),
        num_attention_heads=quick_size(12, 2, quick),
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    times = by_length(model, texts_of_unlike_lengths(quick_size(TEXTS, 40, quick)), rounds)
    seconds = {title: statistics.median(every) for title, every in times.items()}
    rows = [[t, f"{s:.2f}", f"{s / seconds['as given']:.2f}"] for t, s in seconds.items()]
    return markdown(["order", "processor time, s", "ratio"], rows)


def failures(tables: dict[str, dict[str, Row]]) -> str:
    """List who fails on what, with the message."""
    lines = [
        f"- {row.tool.title}, {WORKLOADS[name].title}: `{row.failure.replace('`', chr(39))}`"
        for key in next(iter(tables.values()))
        for name, table in tables.items()
        if (row := table[key]).failure not in ("", "has no exact Fisher")
    ]
    return "\n".join(lines) or "Nothing."


def duration(rows: dict[str, Row] | None) -> str:
    """Write how long a plain pass takes."""
    if rows is None:
        return "little"
    return f"{1000 * rows[UNIT].unit:.1f} ms"


def quiet() -> None:
    """Keep other libraries' warnings out of the way."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main() -> None:
    """Measure all workloads and write the page."""
    parser = start(__doc__.splitlines()[0])
    some = "may be repeated; with it the page goes to experiments-output/"
    parser.add_argument("--workload", action="append", choices=WORKLOADS, help=some)
    parser.add_argument("--tool", action="append", choices=TOOLS, help=some)
    parser.add_argument("--seconds", type=float, help="further turns of fast tools")
    parser.add_argument("--rounds", type=int, help="turns of each tool")
    parser.add_argument("--part", choices=["time", "memory"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    rounds = options.rounds or (2 if options.quick else 5)
    seconds = options.seconds if options.seconds is not None else (0 if options.quick else 20)
    names = options.workload or list(WORKLOADS)
    chosen = dict.fromkeys([UNIT, *(options.tool or TOOLS)])
    tools = {name: TOOLS[name] for name in chosen}
    if options.part is not None:
        given = (WORKLOADS[names[0]], tools, options.quick)
        timed = options.part == "time"
        print(json.dumps(times_of(*given, rounds, seconds) if timed else memory_of(*given)))
        return
    tables = {}
    for name in names:
        began = time.monotonic()
        try:
            tables[name] = measure(name, tools, options.quick, rounds, seconds)
        except ModuleNotFoundError as error:
            print(f"left out: {WORKLOADS[name].title}: {error}", file=sys.stderr)
            continue
        print(f"{time.monotonic() - began:5.0f} s  {WORKLOADS[name].title}", file=sys.stderr)
    write_page(
        "fisher",
        TEXT.format(
            rounds=rounds,
            quick=" **A quick run at tiny sizes: its figures mean nothing.**" * options.quick,
            summary=summary(tables),
            profiles=profile_table(tables, options.quick),
            mlp=duration(tables.get("mlp")),
            wrong=WRONG,
            details="\n\n".join(detail(name, rows) for name, rows in tables.items()),
            failures=failures(tables),
            texts=quick_size(TEXTS, 40, options.quick),
            lengths=lengths_table(options.quick, rounds),
            few=FEW,
            warm=WARM,
            short=SHORT,
            repeats=REPEATS,
            brief=BRIEF,
            seconds=seconds,
            returned=" ".join(f"`{key}={value}`" for key, value in RETURNED.items()),
        ),
        quick=bool(options.quick or options.workload or options.tool),
        packages=PACKAGES,
    )


if __name__ == "__main__":
    main()
