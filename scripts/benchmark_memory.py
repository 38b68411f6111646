"""Peak memory of the commands against what theory asks for: writes docs/results/memory.md.

A model like Llama with random bfloat16 weights is made and the commands are run on it, each as a
process of its own, whose memory is read from /proc while it runs.
"""

import argparse
import json
import random
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import markdown, write_page

TEXT = """
# Peak memory

Models like Llama with random bfloat16 weights: {sizes}; a vocabulary of 32,000, embedding and
output layer apart. Each command runs as a process of its own on {sequences} sequences of {tokens}
tokens. Its memory is read from `/proc/PID/status` every {interval:.0f} ms: *peak* is the most that
anonymous and shared memory (`RssAnon` + `RssShmem`) come to. Pages of mapped files (`RssFile`:
weights, Λ and μ, which the system takes back when it needs room) are listed apart.{quick}

*Theory* is the bytes that the algorithm has to hold, times the parameters. *Above it* are the
interpreter with torch and transformers ({base:.2f} GB, of a model with nothing in it), what is made
of the largest tensor for a moment, activations, and freed memory that the allocator keeps.

{table}

Bytes a parameter, after {base:.2f} GB are taken off: {each}.

{theory}

{moved}

{commands}
"""

THEORY = {
    "fisher": (8, "Σ of squares (4) and what rounding took of them (4); the weights are mapped"),
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

SEQUENCES, TOKENS, STEPS = 4, 24, 2
INTERVAL = 0.005  # seconds
LAST_STEP = f"step {STEPS} of {STEPS}: "


class Size(NamedTuple):
    """The shape of a model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int  # of keys and values


SIZES = {
    "60M": Size(512, 1408, 10, 8, 2),
    "150M": Size(768, 2048, 16, 12, 4),
    "1B": Size(2048, 5632, 22, 32, 4),
}
EMPTY = Size(8, 8, 1, 1, 1)


class Peak(NamedTuple):
    """The most memory that a part of a run had, in bytes."""

    own: int  # anonymous and shared
    mapped: int


class Run(NamedTuple):
    """What was seen of one command."""

    peaks: dict[str, Peak]  # by part
    seconds: float
    result: dict[str, Any]  # what it wrote as JSON
    command: list[str]


def make_checkpoint(folder: Path, size: Size, seed: int, vocabulary: int = 32000) -> int:
    """Write a checkpoint with random weights, in a process of its own; return its parameters.

    Args:
        folder: Where to.
        size: The model's.
        seed: Of the weights.
        vocabulary: The tokens that it tells apart.
    """
    script = f"""
import torch, transformers
from tokenizers import Tokenizer, models, pre_tokenizers

words = Tokenizer(models.WordLevel({{f"w{{i}}": i for i in range(100)}}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1")
config = transformers.LlamaConfig(
    vocab_size={vocabulary},
    hidden_size={size.hidden},
    intermediate_size={size.intermediate},
    num_hidden_layers={size.layers},
    num_attention_heads={size.heads},
    num_key_value_heads={size.groups},
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)
torch.manual_seed({seed})
torch.set_default_dtype(torch.bfloat16)
model = transformers.LlamaForCausalLM(config)
model.save_pretrained({str(folder)!r})
tokenizer.save_pretrained({str(folder)!r})
print(sum(p.numel() for p in model.parameters()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


def write_data(path: Path, seed: int) -> None:
    """Write texts of TOKENS random tokens each, the end of text included."""
    draw = random.Random(seed)
    texts = [
        " ".join(f"w{draw.randrange(2, 100)}" for _ in range(TOKENS - 1)) for _ in range(SEQUENCES)
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def run(arguments: Sequence[str], parts: Sequence[str]) -> Run:
    """Run a command and watch its memory.

    Args:
        arguments: Of ``consolidate``.
        parts: What the run is called; if two, the second begins after the last step of training.

    Raises:
        RuntimeError: The command fails.
    """
    command = [sys.executable, "-m", "consolidate", *arguments, "--json"]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    said: list[str] = []
    trained = threading.Event()

    def listen() -> None:
        for line in process.stderr or ():
            said.append(line)
            if line.startswith(LAST_STEP):
                trained.set()

    written: list[str] = []
    readers = [
        threading.Thread(target=listen),
        threading.Thread(target=lambda: written.append((process.stdout or sys.stdin).read())),
    ]
    for reader in readers:
        reader.start()
    peaks = dict.fromkeys(parts, Peak(0, 0))
    while process.poll() is None:
        part = parts[-1] if trained.is_set() else parts[0]
        now = memory_of(process.pid)
        peaks[part] = Peak(max(peaks[part].own, now.own), max(peaks[part].mapped, now.mapped))
        time.sleep(INTERVAL)
    for reader in readers:
        reader.join()
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{''.join(said)}")
    return Run(peaks, time.monotonic() - began, json.loads(written[0]), list(arguments))


def memory_of(process: int) -> Peak:
    """Return what a process has in memory now; nothing once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return Peak(0, 0)
    sizes = {
        key: 1024 * int(value.split()[0])
        for key, _, value in (line.partition(":") for line in lines)
        if key.startswith("Rss")
    }
    if not sizes:
        return Peak(0, 0)
    return Peak(sizes["RssAnon"] + sizes["RssShmem"], sizes["RssFile"])


def runs_on(folder: Path, *, with_adam: bool) -> Iterator[tuple[str, Run]]:
    """Run every command on the checkpoint ``old`` of a folder; yield what each is called.

    Args:
        folder: With ``old``, ``old.jsonl`` and ``new.jsonl``.
        with_adam: Whether AdamW is tried too, which needs more memory than the rest.
    """
    old, new = str(folder / "old"), str(folder / "new")
    old_data, new_data = str(folder / "old.jsonl"), str(folder / "new.jsonl")
    measuring = ["fisher", old, "--data", old_data, "--task", "old", "--overwrite"]
    training = ["finetune", old, "--data", new_data, "--task", "new", "--output-dir", new]
    training += ["--ewc-lambda", "10", "--max-steps", str(STEPS), "--overwrite"]
    sgd = ["--optimizer", "sgd", "--learning-rate", "0.1"]
    two = ("training", "the rest")
    for name, arguments, parts in (
        ("fisher, checkpointed", [*measuring, "--gradient-checkpointing"], None),
        ("fisher", measuring, None),
        ("evaluate", ["evaluate", old, "--data", f"old={old_data}"], None),
        ("verify", ["verify", old], None),
        ("finetune, checkpointed", [*training, *sgd, "--gradient-checkpointing"], two),
        ("finetune", [*training, *sgd], two),
        *([("finetune, AdamW", training, two)] if with_adam else []),
        ("merge", ["merge", old, new, "--base", old, "--output-dir", str(folder / "merged")], None),
    ):
        yield name, run(arguments, [name] if parts is None else [f"{name}: {p}" for p in parts])


def rows_of(size: str, parameters: int, runs: Mapping[str, Run], base: int) -> list[list[str]]:
    """Write the table's rows of one model.

    Args:
        size: What it is called.
        parameters: How many it has.
        runs: By name.
        base: Bytes of a process whose model is empty.
    """
    rows = []
    for done in runs.values():
        for part, peak in done.peaks.items():
            theory = THEORY[part][0] * parameters
            rows.append(
                [
                    f"{size}, {part}",
                    f"{peak.own / 1e9:.2f}",
                    f"{theory / 1e9:.2f}",
                    f"{(peak.own - theory) / 1e9:.2f}",
                    f"{(peak.own - base) / parameters:.1f}",
                    f"{THEORY[part][0]}",
                    f"{peak.mapped / 1e9:.2f}",
                    f"{done.seconds:.0f}",
                ]
            )
    return rows


def main() -> None:
    """Measure all sizes that were asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", action="append", choices=SIZES, help="all of them unless given")
    parser.add_argument(
        "--folder", type=Path, help="for the checkpoints; a temporary one by default"
    )
    parser.add_argument(
        "--quick", action="store_true", help="an empty model alone; writes into experiments-output/"
    )
    options = parser.parse_args()
    names = [] if options.quick else options.size or list(SIZES)
    table: list[list[str]] = []
    each: list[str] = []
    moved: list[str] = []
    counts: dict[str, int] = {}
    runs: dict[str, Run] = {}
    base = 0
    for name in ["empty", *names]:
        with tempfile.TemporaryDirectory(dir=options.folder) as place:
            folder = Path(place)
            size = SIZES.get(name, EMPTY)
            vocabulary = 32000 if name in SIZES else 100
            counts[name] = make_checkpoint(folder / "old", size, 0, vocabulary)
            for seed, data in enumerate(("old", "new")):
                write_data(folder / f"{data}.jsonl", seed)
            runs = {}
            for called, done in runs_on(folder, with_adam=counts[name] < 10**9):
                runs[called] = done
                print(f"{name}, {called}: {done.peaks}, {done.seconds:.0f} s", file=sys.stderr)
            commands = [shlex.join(["consolidate", *done.command]) for done in runs.values()]
            shown = "\n".join(commands).replace(f"{folder}/", "")
        if name == "empty":
            base = max(peak.own for done in runs.values() for peak in done.peaks.values())
        if name in names or options.quick:
            table += rows_of(name, counts[name], runs, base)
            fisher, finetune = runs["fisher"].peaks, runs["finetune"].peaks
            found = [*fisher.values(), *finetune.values()]
            measured = [f"{(peak.own - base) / counts[name]:.1f}" for peak in found]
            each.append(
                f"{name} {measured[0]} for `fisher`, {measured[1]} to train, {measured[2]} after"
            )
            moved.append(f"{100 * runs['finetune'].result['share_moved']:.1f} % ({name})")
    write_page(
        "memory",
        TEXT.format(
            sizes=", ".join(f"{name} with {counts[name]:,} parameters" for name in counts),
            sequences=SEQUENCES,
            tokens=TOKENS,
            interval=1000 * INTERVAL,
            quick=" **A quick run of an empty model: its figures mean nothing.**" * options.quick,
            base=base / 1e9,
            table=markdown(
                [
                    "",
                    "peak, GB",
                    "theory, GB",
                    "above it, GB",
                    "bytes a parameter",
                    "theory",
                    "mapped, GB",
                    "seconds",
                ],
                table,
            ),
            each="; ".join(each),
            theory="What theory counts:\n\n"
            + "\n".join(
                f"- {part}: {count} bytes. {why}." for part, (count, why) in THEORY.items()
            ),
            moved=f"Of the weights, as stored in bfloat16, {STEPS} steps of SGD with a learning "
            f"rate of 0.1 moved {', '.join(moved)}.",
            commands=f"The commands:\n\n```text\n{shown}\n```",
        ),
        quick=options.quick,
        packages=["transformers", "safetensors"],
    )


if __name__ == "__main__":
    main()
