"""Measure the peak memory of each process of a sharded model: writes docs/results/shards.md.

A model like Llama with random bfloat16 weights is made, and `torchrun` starts the commands in one,
two and four processes, whose memory is read from /proc while they run.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.benchmarks import harness
from scripts.benchmarks.harness import (
    EMPTY,
    INTERVAL,
    Size,
    make_checkpoint,
    results_folder,
    watch,
    write_page,
    write_texts,
)
from scripts.experiments.lib.common import markdown

TEXT = """
# Memory of sharded models

A model like Llama with random bfloat16 weights: {parameters:,} parameters, {layers} layers of
{block:,} parameters and {outside:,} outside of them (a vocabulary of {vocabulary:,}). Each command
runs in {processes} processes on the CPU, connected by gloo, on {sequences} sequences of {tokens}
tokens. Anonymous plus shared memory (`RssAnon` + `RssShmem`) is read every {interval:.0f} ms,
without pages of mapped files. A single process has the whole model, without `--shard`: its weights,
Λ and μ stay in the mapped files.{quick}

{table}

- *Largest*: the process with the highest peak. *Above*: this less the memory with an empty model
  ({base} GB). *Bytes × processes*: that times the number of processes, over the parameters. *Of the
  others*: the same without the first process, which also gathers what is stored.
- *Theory*: the bytes per parameter over all processes together; after the +, what each process has
  unsharded at a time: one layer and its gradients, counted once per process.

{theory}

On the CPU, device and host memory are the same. So beside its shards a process has what stays in
host memory with a GPU: the first one the stored weights, F and the merged Λ, all unsharded, and
each one the buffers of gloo. On a GPU torch's allocator keeps freed memory, and NCCL has its own
buffers; neither was measured.

{commands}
"""


class Theory(NamedTuple):
    """Bytes a parameter that a part has to hold, and of what."""

    whole: int  # in one process, where files are mapped
    shards: int
    gathered: int  # of each parameter of a layer
    why: str


THEORY = {
    "fisher": Theory(
        8,
        10,
        4,
        "weights in bfloat16 (2, unsharded: mapped), sums of squares (4), compensation (4)",
    ),
    "finetune, SGD: training": Theory(
        8, 14, 8, "float32 weights (4), gradients (4), Λ (4) and μ (2; both mapped if unsharded)"
    ),
    "finetune, SGD: then its Fisher": Theory(
        12, 18, 8, "float32 weights (4), sums (8), Λ (4) and μ (2; both mapped if unsharded)"
    ),
    "finetune, AdamW: training": Theory(16, 22, 8, "as SGD, and two moments (8)"),
    "finetune, AdamW: then its Fisher": Theory(12, 18, 8, "as after SGD"),
}
COMMANDS = list(dict.fromkeys(part.partition(":")[0] for part in THEORY))
PROCESSES = (1, 2, 4)
MODEL = Size(768, 2048, 12, 12, 4)
VOCABULARY, SEQUENCES, TOKENS, STEPS = 1000, 4, 16, 2
LAST_STEP = f"step {STEPS} of {STEPS}: "


class Run(NamedTuple):
    """What was seen of one command."""

    empty: bool  # whether the model has nothing in it
    name: str
    processes: int
    peaks: dict[str, list[int]]  # bytes of each process, by part
    seconds: float
    line: str


def measure(folder: Path, empty: bool, done: Sequence[Run]) -> Iterator[Run]:
    """Run commands on a model; yield what was seen of each of them.

    Args:
        folder: For the checkpoints.
        empty: Whether the model is empty. Then only the memory of a process without a model is of
            interest, by the command that does most.
        done: What was measured before. Only the Fisher that the others need is measured again.
    """
    size, vocabulary = (EMPTY, 100) if empty else (MODEL, VOCABULARY)
    counted = make_checkpoint(folder / "old", size, vocabulary)
    assert counted == parameters_of(size, vocabulary)[0]
    for seed, data in enumerate(("old", "new")):
        write_texts(folder / f"{data}.jsonl", seed, SEQUENCES, TOKENS)
    old, new = str(folder / "old"), str(folder / "new")
    training = ["finetune", old, "--data", f"{new}.jsonl", "--task", "new", "--output-dir", new]
    training += ["--ewc-lambda", "10", "--max-steps", str(STEPS)]
    arguments = {
        "fisher": ["fisher", old, "--data", f"{old}.jsonl", "--task", "old"],
        "finetune, SGD": [*training, "--optimizer", "sgd", "--learning-rate", "0.1"],
        "finetune, AdamW": training,
    }
    known = {run[:3] for run in done if (run.name, run.processes) != ("fisher", 1)}
    chosen = [(name, count) for count in PROCESSES for name in COMMANDS]
    if empty:
        chosen = [("finetune, SGD", count) for count in PROCESSES]
    for name, count in dict.fromkeys([("fisher", 1), *chosen]):
        if (empty, name, count) in known:
            continue
        parts = [part for part in THEORY if part.partition(":")[0] == name]
        words = ["-m", "consolidate", *arguments[name], "--batch-size", "1", "--overwrite"]
        words.append("--no-data-digest")  # with one, what is up to date would not be made again
        program, shown = [sys.executable], "python"
        if count > 1:
            words = [f"--nproc-per-node={count}", *words, "--shard"]
            program, shown = [*program, "-m", "torch.distributed.run", "--standalone"], "torchrun"
        seen = watch([*program, *words, "--json"], parts, LAST_STEP, count)
        peaks = {part: [of[i].own for i in range(count)] for part, of in seen.peaks.items()}
        line = shlex.join([shown, *words]).replace(f"{folder}/", "")
        print(f"{name}, {count}: {peaks}, {seen.seconds:.0f} s", file=sys.stderr)
        yield Run(empty, name, count, peaks, seen.seconds, line)


def parameters_of(size: Size, vocabulary: int) -> tuple[int, int, int]:
    """Return the parameters of a model, of one of its layers, and of what is outside of them."""
    keys = size.hidden * size.groups // size.heads
    layer = 2 * size.hidden * (size.hidden + keys)
    layer += 3 * size.hidden * size.intermediate + 2 * size.hidden
    outside = 2 * vocabulary * size.hidden + size.hidden
    return size.layers * layer + outside, layer, outside


def base_of(runs: Sequence[Run], processes: int) -> int:
    """Return the most memory that one of N processes has with an empty model."""
    empty = [run for run in runs if run.empty and run.processes == processes]
    return max(own for run in empty for peaks in run.peaks.values() for own in peaks)


def page(runs: Sequence[Run], quick: bool) -> str:
    """Write the page's text.

    Args:
        runs: All that was measured, the empty model too.
        quick: Whether that is the only one.
    """
    size, vocabulary = (EMPTY, 100) if quick else (MODEL, VOCABULARY)
    parameters, layer, outside = parameters_of(size, vocabulary)
    shown = [run for run in runs if run.empty == quick]
    rows = []
    for part, theory in THEORY.items():
        for run in shown:
            if part not in run.peaks:
                continue
            base, each = base_of(runs, run.processes), run.processes / parameters
            largest, others = max(run.peaks[part]), run.peaks[part][1:]
            gathered = theory.gathered * layer * each
            rows.append(
                [
                    part,
                    str(run.processes),
                    f"{largest / 1e9:.2f}",
                    f"{(largest - base) / 1e9:.2f}",
                    f"{(largest - base) * each:.1f}",
                    f"{(max(others) - base) * each:.1f}" if others else "–",
                    f"{theory.shards} + {gathered:.1f}" if others else str(theory.whole),
                ]
            )
    counts = sorted({run.processes for run in shown})
    header = ["", "processes", "largest, GB", "above, GB", "bytes × processes", "of the others"]
    lines = [run.line for run in shown if run.processes == counts[-1]]
    bases = [base_of(runs, count) / 1e9 for count in counts]
    return TEXT.format(
        parameters=parameters,
        layers=size.layers,
        block=layer,
        outside=outside,
        vocabulary=vocabulary,
        processes=", ".join(map(str, counts)),
        sequences=SEQUENCES,
        tokens=TOKENS,
        interval=1000 * INTERVAL,
        quick=" **A quick run of an empty model: its figures mean nothing.**" * quick,
        table=markdown([*header, "theory"], rows),
        base=f"{min(bases):.2f} to {max(bases):.2f}",
        theory="What theory counts, for one process and for shards:\n\n"
        + "\n".join(f"- {part}: {t.whole}, {t.shards}. {t.why}." for part, t in THEORY.items()),
        commands=f"The commands, in {counts[-1]} processes:\n\n```text\n"
        + "\n".join(lines)
        + "\n```",
    )


def main() -> None:
    """Measure what was not measured yet, and write the page of all of it."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__.splitlines()[0]} Finished parts are saved in "
        "experiments-output/; the same command resumes from them."
    )
    parser.add_argument(
        "--quick", action="store_true", help="an empty model alone; writes into experiments-output/"
    )
    quick = parser.parse_args().quick
    kept = results_folder(quick=True) / "shards.json"
    runs: list[Run] = []
    if kept.is_file() and not quick:
        runs = [Run(**run) for run in json.loads(kept.read_text())]
    harness.STARTED -= sum(run.seconds for run in runs)
    for empty in (True,) if quick else (True, False):
        with tempfile.TemporaryDirectory() as place:
            for run in measure(Path(place), empty, runs):
                runs = [other for other in runs if other[:3] != run[:3]] + [run]
                if not quick:
                    kept.write_text(json.dumps([one._asdict() for one in runs]))
    write_page("shards", page(runs, quick), quick=quick, packages=["transformers", "safetensors"])
    if not quick:
        kept.unlink()


if __name__ == "__main__":
    main()
