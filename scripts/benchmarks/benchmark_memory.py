"""Compare peak memory of the commands with theory: writes docs/results/memory.md.

A model like Llama with random bfloat16 weights is made, and each command runs on it in its own
process, whose memory is read from /proc.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts.benchmarks import harness
from scripts.benchmarks.harness import (
    EMPTY,
    INTERVAL,
    Peak,
    Size,
    make_checkpoint,
    results_folder,
    watch,
    write_page,
    write_texts,
)
from scripts.experiments.lib.common import markdown

TEXT = """
# Peak memory

Models like Llama with random bfloat16 weights: {sizes}; a vocabulary of 32,000, untied embedding
and output layer. Each command runs in its own process on {sequences} sequences of {tokens} tokens.
Its memory is read from `/proc/PID/status` every {interval:.0f} ms: *peak* is the maximum of
anonymous plus shared memory (`RssAnon` + `RssShmem`). Pages of mapped files (`RssFile`: weights, Λ
and μ, which the system reclaims when it needs memory) are listed separately; a page mapped twice
counts twice there.{quick}

*Theory* is the bytes per parameter that the algorithm needs, times the parameters. *Above it* are
the interpreter with torch and transformers ({base:.2f} GB, measured with an empty model), temporary
copies of the largest tensor, activations, and freed memory that the allocator keeps. *The rest* is
all after the last step, at first with AdamW's moments still there.

{table}

Bytes per parameter, less {base:.2f} GB: {each}.

{theory}

{moved}

{commands}
"""

THEORY = {
    "fisher": (8, "sums of squares (4) and their compensation (4); the weights are mapped"),
    "fisher, checkpointed": (8, "as `fisher`; activations of one layer at a time"),
    "evaluate": (0, "the weights are mapped"),
    "verify": (0, "one tensor at a time, from the maps"),
    "finetune: training": (8, "float32 weights (4) and their gradients (4); Λ and μ are mapped"),
    "finetune: the rest": (12, "float32 weights (4), and as `fisher` (8)"),
    "finetune, checkpointed: training": (8, "as `finetune`"),
    "finetune, checkpointed: the rest": (12, "as `finetune`"),
    "finetune, AdamW: training": (16, "as SGD, and two moments (8)"),
    "finetune, AdamW: the rest": (12, "as `finetune`"),
    "merge": (0, "one tensor of each model at a time"),
}
"""Bytes a parameter that each part has to hold, and of what."""

GRADIENTS = """\
If the gradients are autograd's own (estimator `batched`, or examples measured one at a time), they
add to a Fisher pass, in the dtype of the weights."""

COMMANDS = list(dict.fromkeys(part.partition(":")[0] for part in THEORY))
SEQUENCES, TOKENS, STEPS = 3, 16, 2
LAST_STEP = f"step {STEPS} of {STEPS}: "


SIZES = {"60M": Size(512, 1408, 10, 8, 2), "1B": Size(2048, 5632, 22, 32, 4)}


class Run(NamedTuple):
    """What was seen of one command."""

    peaks: dict[str, Peak]  # by part
    seconds: float
    moved: float | None  # the share of weights that are others now, where some were trained
    command: str


class Measured(NamedTuple):
    """What was seen of one model."""

    parameters: int
    runs: dict[str, Run]  # by name


def run(arguments: Sequence[str], parts: Sequence[str]) -> Run:
    """Run a command and watch its memory.

    Args:
        arguments: Of ``consolidate``.
        parts: What the run is called; if two, the second begins after the last step of training.

    Raises:
        RuntimeError: The command fails.
    """
    done = watch([sys.executable, "-m", "consolidate", *arguments, "--json"], parts, LAST_STEP)
    peaks = {part: of[0] for part, of in done.peaks.items()}
    moved = done.result.get("share_moved")
    return Run(peaks, done.seconds, moved, shlex.join(["consolidate", *arguments]))


def measure(name: str, folder: Path, chosen: Sequence[str]) -> Iterator[Measured]:
    """Run commands on a model; yield all that was seen after each of them.

    Args:
        name: A key of SIZES, or any other for an empty model.
        folder: For the checkpoints.
        chosen: The names of the commands; all unless given.
    """
    vocabulary = 32000 if name in SIZES else 100
    parameters = make_checkpoint(folder / "old", SIZES.get(name, EMPTY), vocabulary)
    for seed, data in enumerate(("old", "new")):
        write_texts(folder / f"{data}.jsonl", seed, SEQUENCES, TOKENS)
    old, new = str(folder / "old"), str(folder / "new")
    old_data, new_data = str(folder / "old.jsonl"), str(folder / "new.jsonl")
    measuring = ["fisher", old, "--data", old_data, "--task", "old", "--overwrite"]
    training = ["finetune", old, "--data", new_data, "--task", "new", "--output-dir", new]
    training += ["--ewc-lambda", "10", "--max-steps", str(STEPS), "--overwrite"]
    sgd = ["--optimizer", "sgd", "--learning-rate", "0.1"]
    merging = ["merge", old, new, "--base", old, "--output-dir", str(folder / "merged")]
    runs: dict[str, Run] = {}
    for called, arguments in (
        ("fisher, checkpointed", [*measuring, "--gradient-checkpointing"]),
        ("fisher", measuring),
        ("evaluate", ["evaluate", old, "--data", f"old={old_data}"]),
        ("verify", ["verify", old]),
        ("finetune, AdamW", training),
        ("finetune, checkpointed", [*training, *sgd, "--gradient-checkpointing"]),
        ("finetune", [*training, *sgd]),
        ("merge", merging),
    ):
        if called in (chosen or COMMANDS):
            parts = [called]
            if called.startswith("finetune"):
                parts = [f"{called}: training", f"{called}: the rest"]
            done = run(arguments, parts)
            runs[called] = done._replace(command=done.command.replace(f"{folder}/", ""))
            print(f"{name}, {called}: {done.peaks}, {done.seconds:.0f} s", file=sys.stderr)
            yield Measured(parameters, runs)


def rows_of(name: str, measured: Measured, base: int) -> list[list[str]]:
    """Write the table's rows of one model.

    Args:
        name: What it is called.
        measured: What was seen of it.
        base: Bytes of a process whose model is empty.
    """
    rows = []
    for done in measured.runs.values():
        for part, peak in done.peaks.items():
            count = THEORY[part][0]
            theory = count * measured.parameters
            gigabytes = (peak.own, theory, peak.own - theory, peak.mapped)
            own, asked, above, mapped = (f"{size / 1e9:.2f}" for size in gigabytes)
            each = f"{(peak.own - base) / measured.parameters:.1f}"
            seconds = f"{done.seconds:.0f}"
            rows.append([f"{name}, {part}", own, asked, above, each, str(count), mapped, seconds])
    return rows


def page(found: Mapping[str, Measured], quick: bool) -> str:
    """Write the page's text.

    Args:
        found: By name of the model, the empty one first.
        quick: Whether there is no other.
    """
    base = max(peak.own for done in found["empty"].runs.values() for peak in done.peaks.values())
    table: list[list[str]] = []
    each: list[str] = []
    moved: list[str] = []
    for name, measured in found.items():
        if name == "empty" and not quick:
            continue
        table += rows_of(name, measured, base)
        parts = {part: peak for r in measured.runs.values() for part, peak in r.peaks.items()}
        each.append(
            f"{name}: "
            + ", ".join(
                f"{(parts[part].own - base) / measured.parameters:.1f} {what}"
                for part, what in (
                    ("fisher", "for `fisher`"),
                    ("finetune: training", "to train with SGD"),
                    ("finetune: the rest", "for what comes after"),
                    ("finetune, AdamW: training", "to train with AdamW"),
                )
                if part in parts
            )
        )
        if (done := measured.runs.get("finetune")) is not None and done.moved is not None:
            moved.append(f"{100 * done.moved:.1f} % ({name})")
    longest = max(found.values(), key=lambda measured: len(measured.runs))
    return TEXT.format(
        sizes=", ".join(
            f"{name} with {m.parameters:,} parameters"
            for name, m in found.items()
            if quick or name != "empty"
        ),
        sequences=SEQUENCES,
        tokens=TOKENS,
        interval=1000 * INTERVAL,
        quick=" **A quick run of an empty model: its figures mean nothing.**" * quick,
        base=base / 1e9,
        table=markdown(
            [
                "",
                "peak, GB",
                "theory, GB",
                "above it, GB",
                "bytes per parameter",
                "theory",
                "mapped, GB",
                "seconds",
            ],
            table,
        ),
        each="; ".join(each),
        theory="What theory counts, in bytes per parameter:\n\n"
        + "\n".join(f"- {part}: {count}. {why}." for part, (count, why) in THEORY.items())
        + f"\n\n{GRADIENTS}",
        moved=f"Of the weights, as stored in bfloat16, {STEPS} steps of SGD with a learning rate "
        f"of 0.1 moved {', '.join(moved)}.",
        commands="The commands:\n\n```text\n"
        + "\n".join(done.command for done in longest.runs.values())
        + "\n```",
    )


def main() -> None:
    """Measure what was not measured yet, or what is asked for, and write the page.

    A page that lacks a command of a model goes to experiments-output/.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--size",
        action="append",
        choices=SIZES,
        help="measure this model, even if it was measured before",
    )
    parser.add_argument(
        "--command", action="append", choices=COMMANDS, help="run only these, and keep nothing"
    )
    parser.add_argument(
        "--quick", action="store_true", help="an empty model alone; writes into experiments-output/"
    )
    options = parser.parse_args()
    kept, keeps = results_folder(quick=True) / "memory.json", not (options.quick or options.command)
    found: dict[str, Measured] = {}
    if kept.is_file() and keeps:
        found = {
            name: measured_of(content) for name, content in json.loads(kept.read_text()).items()
        }
    before = sum(done.seconds for measured in found.values() for done in measured.runs.values())
    harness.STARTED -= before  # what went on in earlier runs of this script
    for name in ["empty", *([] if options.quick else options.size or SIZES)]:
        done = name in found and found[name].runs.keys() >= set(COMMANDS)
        if done and name not in (options.size or ()):
            continue
        with tempfile.TemporaryDirectory() as place:
            for measured in measure(name, Path(place), options.command):
                found[name] = measured
                if keeps:
                    kept.write_text(json.dumps({n: as_json(m) for n, m in found.items()}))
    order = ["empty", *SIZES]
    found = {name: found[name] for name in order if name in found}
    whole = all(name in found and found[name].runs.keys() >= set(COMMANDS) for name in order)
    write_page(
        "memory",
        page(found, options.quick),
        quick=not whole,
        packages=["transformers", "safetensors"],
    )
    if whole and keeps:
        kept.unlink()


def as_json(measured: Measured) -> Any:
    """Write what was seen of a model as JSON has it."""
    runs = {}
    for name, done in measured.runs.items():
        peaks = {part: [*peak] for part, peak in done.peaks.items()}
        runs[name] = {**done._asdict(), "peaks": peaks}
    return {"parameters": measured.parameters, "runs": runs}


def measured_of(content: Any) -> Measured:
    """Read what `as_json` wrote."""
    runs = {
        name: Run(**{**done, "peaks": {part: Peak(*peak) for part, peak in done["peaks"].items()}})
        for name, done in content["runs"].items()
    }
    return Measured(content["parameters"], runs)


if __name__ == "__main__":
    main()
