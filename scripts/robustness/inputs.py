"""Feed damaged files to every reader: writes fuzz.md, and fails on anything but a refusal.

Each case is a copy of small real files with one of them damaged, read in this process. A reader
may succeed or raise a ConsolidateError whose message is plain; another exception, a minute of
computing, more memory than is allowed and a file that reading changed are faults.
"""

import argparse
import csv
import faulthandler
import json
import logging
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.utils import yaml_dump
from torch import nn

from consolidate.api import report, show, verify
from consolidate.commands.run_options import OPTIONS, read_options
from consolidate.data.encoding import encode
from consolidate.models.loading import load_model
from consolidate.models.model import Model
from consolidate.views.card import Subject, model_card
from consolidate.views.summary import show_text
from formats.checkpoint import check_finite, open_checkpoint, weight_records
from formats.data import open_data
from formats.digest import TensorRecord, set_digest
from formats.errors import ConsolidateError
from formats.fisher_folder import read_fisher
from formats.hub_dataset import is_hub_id
from formats.partial_work import read_partial, write_partial
from formats.run_file import read_run_file
from formats.step_record import StepRecord, read_step_record, write_step_record
from formats.task_file import read_task_file
from formats.tensors import write_tensors
from scripts.benchmarks.harness import installed, markdown, write_page
from scripts.robustness.mutations import (
    mutated_bytes,
    mutated_json,
    mutated_safetensors,
    mutated_text,
)

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
CPU_SECONDS, MEMORY = 60, 6 * 2**30
TEXT = """
# Damaged files

{count:,} small real files, each with seeded damage: flipped bits, cut ends, moved pieces, huge,
negative or NaN numbers, repeated and removed keys, control characters, deep nesting. The functions
that the commands use read each one. *Refused* is a plain error; *read* means that the damage was
harmless or cannot be detected. A fault is any other exception, {seconds} s of computing, more than
{memory} GiB above the program's own memory, a line with control characters for a terminal, or a
file that reading changed.

{table}

Seed: {seed}.

## Faults

{faults}
"""
ROWS = [
    {"text": "the cat sat on the mat", "label": 0, "more": [1, 2.5, None]},
    {"text": "a dog ate my homework", "label": 1, "more": []},
    {"text": "été 🙂 again", "label": 0, "more": [3.0]},
]


class TooLongError(BaseException):
    """A reader that computes for longer than it may."""


class HarmError(BaseException):
    """A reader that changed a file, or a message that could steer a terminal."""


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        write: Writes good files into an empty folder and names those that may be damaged.
        mutate: Damages the bytes of one.
        readers: What reads the folder.
    """

    write: Callable[[Path], list[str]]
    mutate: Callable[[bytes, Random], bytes]
    readers: tuple[Callable[[Path], Any], ...]


class Fault(NamedTuple):
    """What should not have happened."""

    kind: str
    case: int
    what: str


def network(config: dict[str, Any]) -> nn.Module:
    """Make the network of `scripts.robustness.fuzz:network`, as a user's factory would."""
    return nn.Sequential(nn.Linear(int(config["inputs"]), 3), nn.ReLU(), nn.Linear(3, 2))


def golden(name: str, files: list[str], folder: Path) -> list[str]:
    """Copy a golden checkpoint."""
    shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
    return files


def write_card(folder: Path) -> list[str]:
    """Write a checkpoint with a model card, of which the last part is ours."""
    golden("anchor", [], folder)
    data = {"license": "mit", "tags": ["ewc", "mine"], "model-index": [{"name": "m"}]}
    data |= {"datasets": ["owner/zahlen"], "language": "de", "base_model": ["owner/base"]}
    body = "# A model\n\nWritten by a person.\n"
    ours = model_card(None, read_fisher(folder / "fisher").ledger, Subject("user/model"))
    end = ours.split("---\n", 2)[2]
    (folder / "README.md").write_text(f"---\n{yaml_dump(data)}---\n{body}\n{end}", encoding="utf-8")
    return ["README.md"]


def write_network(folder: Path) -> list[str]:
    """Write a network of one's own."""
    torch.manual_seed(0)
    weights = network({"inputs": 4}).state_dict()
    write_tensors(folder, weights, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"inputs": 4}))
    return ["config.json"]


def write_bert(folder: Path) -> list[str]:
    """Write a tiny model of transformers with a tokenizer."""
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "dog"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return ["config.json"]


def write_pickle(folder: Path) -> list[str]:
    """Write weights as torch does."""
    torch.save({"a.weight": torch.ones(3, 2), "a.bias": torch.zeros(3)}, folder / "model.pt")
    return ["model.pt"]


def write_pass(folder: Path) -> list[str]:
    """Write the saved progress of an interrupted pass."""
    write_partial(folder / "fisher", {"w": torch.ones(3)}, {"done": 3}, {"seed": 0})
    return [path.name for path in folder.iterdir()]


def write_rows(suffix: str, folder: Path) -> list[str]:
    """Write task data of one kind."""
    file = folder / f"data.{suffix}"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS]
    inputs, labels = np.arange(12, dtype=np.float32).reshape(3, 4), np.array([0, 1, 0])
    match suffix:
        case "jsonl":
            file.write_text("".join(lines))
        case "json":
            file.write_text(json.dumps(ROWS, ensure_ascii=False))
        case "csv" | "tsv":
            with file.open("w", newline="") as table:
                writer = csv.writer(table, delimiter="," if suffix == "csv" else "\t")
                writer.writerows([("text", "label"), *((r["text"], r["label"]) for r in ROWS)])
        case "parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
        case "npz":
            np.savez(file, inputs=inputs, labels=labels)
        case "npz, compressed":
            file = folder / "data.npz"
            np.savez_compressed(file, inputs=inputs, labels=labels)
        case "safetensors":
            tensors = {"inputs": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}
            write_tensors(folder, tensors, stem="data", metadata={})
        case "png":
            from PIL import Image

            for name in ("cat", "dog"):
                (folder / name).mkdir()
                Image.new("RGB", (6, 6), "red").save(folder / name / "1.png")
            return ["cat/1.png"]
    return [file.name]


def write_task(folder: Path) -> list[str]:
    """Write a task.toml and its data."""
    write_rows("jsonl", folder)
    (folder / "task.toml").write_text(
        'name = "news"\ndata = "data.jsonl"\nobjective = "sequence-classification"\n'
        'text_column = "text"\nlabel_column = "label"\n'
    )
    return ["task.toml"]


def write_run(folder: Path) -> list[str]:
    """Write a tasks.toml."""
    write_rows("jsonl", folder)
    (folder / "tasks.toml").write_text(
        'start = "model"\noutput-dir = "out"\n\n[evaluate]\n'
        'old = "data.jsonl"\n\n[defaults]\newc-lambda = 1e3\nepochs = 2\nfreeze = ["a.*", "b"]\n'
        'text-column = "text"\nlearning-rate = 1e-3\n\n[[task]]\nname = "one"\ndata = "data.jsonl"'
        '\nevaluate = "data.jsonl"\n\n[[task]]\nname = "two"\ndata = "data.jsonl"\ntrain = false\n'
        "seed = 7\n"
    )
    return ["tasks.toml"]


def write_step(folder: Path) -> list[str]:
    """Write the record of a step of a run."""
    record = StepRecord({"data": "0" * 64, "options": {"epochs": 2}}, {"weights": "1" * 64})
    write_step_record(folder / "01-one.json", record)
    return ["01-one.json"]


def read_weights(folder: Path) -> None:
    """Read a checkpoint's weights to the last byte."""
    source = open_checkpoint(folder)
    weight_records(source.weights)
    check_finite(source.weights, folder)


def read_shown(folder: Path) -> None:
    """Read what `consolidate show` reads, and look at what it prints."""
    printed = show_text(show(folder))
    if not all(line.isprintable() for line in printed.split("\n")):
        raise HarmError("a line of `show` could steer a terminal")


def read_reported(folder: Path) -> None:
    """Write the report, and look for a script in it."""
    page = folder.parent / "page.html"
    report(folder, output=page, overwrite=True)
    if "<script" in page.read_text(encoding="utf-8").lower():
        raise HarmError("the report holds a script")


def read_card(folder: Path) -> None:
    """Write a model card over the one that is there."""
    ledger = read_fisher(folder / "fisher").ledger
    existing = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    model_card(existing, ledger, Subject("user/model", open_checkpoint(folder).config))


def read_new_card(folder: Path) -> None:
    """Write a model card of a ledger, and look for a script in it."""
    ledger = read_fisher(folder / "fisher").ledger
    if "<script" in model_card(None, ledger, Subject("user/model")).lower():
        raise HarmError("the card holds a script")


def read_model(factory: str | None, folder: Path) -> None:
    """Load the model."""
    load_model(open_checkpoint(folder), factory=factory)


def read_rows(open_it: Callable[[Path], Any], folder: Path) -> None:
    """Read every row and column."""
    rows = open_it(folder)
    for i in range(min(len(rows), 100)):
        rows[i]
        rows.where(i, rows.columns[0])
    for column in rows.columns:
        rows.label_names(column)
        for _ in zip(range(100), rows.values(column), strict=False):
            pass
    rows.digest()


def read_examples(factory: str | None, open_it: Callable[[Path], Any], folder: Path) -> None:
    """Encode the data for a model and make batches."""
    examples = encode(open_it(folder), model(factory))
    for _ in examples.batches(2):
        pass


def read_task(folder: Path) -> None:
    """Read a task.toml and the data it names; a dataset on the Hub is not read."""
    task = read_task_file(folder / "task.toml")
    if Path(task.data).exists() or not is_hub_id(task.data):
        read_rows(open_data, Path(task.data))


def read_run(folder: Path) -> None:
    """Read a tasks.toml, options too."""
    run = read_run_file(folder / "tasks.toml", tuple(OPTIONS))
    for options in (run.defaults, *(task.options for task in run.tasks)):
        read_options(options, folder)


@cache
def model(factory: str | None) -> Model:
    """Give a good model to encode data for."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-model-"))
    try:
        (write_bert if factory is None else write_network)(folder)
        return load_model(open_checkpoint(folder), factory=factory)
    finally:
        shutil.rmtree(folder)


def repair_digests(ledger: Any) -> None:
    """Give a ledger the set digests of its records, so that what lies behind these is reached."""
    for name in ("weights", "fisher", "anchor"):
        try:
            found = ledger[name]
            found["digest"] = set_digest(
                {tensor: TensorRecord(**record) for tensor, record in found["tensors"].items()}
            )
        except (TypeError, KeyError, AttributeError, UnicodeEncodeError):
            continue


def kinds() -> dict[str, Kind]:
    """Give every kind of file, those whose reader is installed."""
    whole = (read_weights, read_shown, verify)
    told = (*whole, read_reported, read_new_card)
    ledger = partial(mutated_json, repair=repair_digests)
    one = "fisher/fisher.json"
    index = ["model.safetensors.index.json", "fisher/fisher.safetensors.index.json"]
    index += ["fisher/anchor.safetensors.index.json"]
    heads = ["fisher/heads/digits.safetensors", "fisher/fisher.safetensors"]
    heads += ["fisher/anchor.safetensors", "model.safetensors"]
    shards = ["model-00002-of-00003.safetensors", "fisher/anchor-00001-of-00002.safetensors"]
    found = {
        "header of weights and Fisher": Kind(
            partial(golden, "anchor", heads), mutated_safetensors, whole
        ),
        "header of a shard": Kind(partial(golden, "sharded", shards), mutated_safetensors, whole),
        "index": Kind(partial(golden, "sharded", index), mutated_json, whole),
        "ledger": Kind(partial(golden, "anchor", [one]), ledger, told),
        "ledger, bfloat16": Kind(partial(golden, "bfloat16", [one]), ledger, told),
        "model card": Kind(write_card, mutated_text, (read_card,)),
        "pickle": Kind(write_pickle, mutated_bytes, (read_weights,)),
        "config.json": Kind(
            write_network,
            mutated_json,
            (read_weights, partial(read_model, "scripts.robustness.fuzz:network")),
        ),
        "task.toml": Kind(write_task, mutated_text, (read_task,)),
        "tasks.toml": Kind(write_run, mutated_text, (read_run,)),
        "record of a step": Kind(
            write_step, mutated_json, (lambda folder: read_step_record(folder / "01-one.json"),)
        ),
        "broken-off pass": Kind(
            write_pass,
            mutated_safetensors,
            (lambda folder: read_partial(folder / "fisher"),),
        ),
    }
    texts = {"jsonl": mutated_text, "json": mutated_json, "csv": mutated_text, "tsv": mutated_text}
    tensors = {
        "npz": mutated_bytes,
        "npz, compressed": mutated_bytes,
        "safetensors": mutated_safetensors,
    }
    has_models = installed("transformers")
    if has_models:
        readers = (partial(read_model, None),)
        found["config.json of transformers"] = Kind(write_bert, mutated_json, readers)
    if installed("pyarrow"):
        texts["parquet"] = mutated_bytes
    for suffix, mutate in (texts | tensors).items():
        opened = partial(_open_rows, suffix.partition(",")[0])
        both: list[Callable[[Path], Any]] = [partial(read_rows, opened)]
        if suffix in tensors:
            both.append(partial(read_examples, "scripts.robustness.fuzz:network", opened))
        elif has_models:
            both.append(partial(read_examples, None, opened))
        found[suffix] = Kind(partial(write_rows, suffix), mutate, tuple(both))
    if installed("Pillow"):
        found["image"] = Kind(
            partial(write_rows, "png"), mutated_bytes, (partial(read_rows, open_data),)
        )
    return found


def _open_rows(suffix: str, folder: Path) -> Any:
    return open_data(folder / f"data.{suffix}")


def contents(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def limited() -> Iterator[None]:
    """Bound the time that is computed, not waited, for one case."""

    def stop(*_: Any) -> None:
        raise TooLongError(f"it computes for more than {CPU_SECONDS} s")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    faulthandler.dump_traceback_later(900, exit=True)  # for what hangs without computing
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()


def check_message(error: ConsolidateError) -> None:
    """Refuse a message that is no plain one, after what the command line escapes in it."""
    from consolidate.views.text import plain

    shown = plain(str(error)).split("\n")
    if not shown[0] or not all(line.isprintable() for line in shown):
        raise HarmError(f"a message that could steer a terminal: {str(error)!r}")


def run_case(kind: Kind, work: Path, name: str, random: Random) -> tuple[str, str]:
    """Damage one file of a folder and read it; returns read, refused or fault, and what it was."""
    (work / name).write_bytes(kind.mutate((work / name).read_bytes(), random))
    before = contents(work)
    outcome = "read"
    for reader in kind.readers:
        try:
            with limited():
                reader(work)
        except ConsolidateError as error:
            outcome = "refused"
            try:
                check_message(error)
            except HarmError as harm:
                return "fault", str(harm)
        except (Exception, TooLongError, HarmError) as error:
            return "fault", _short(error)
        if contents(work) != before:
            return "fault", "reading changed a file"
    return outcome, ""


def _short(error: BaseException) -> str:
    """Say where an exception came from: the last line of ours, and the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if str(ROOT) in f.filename and "scripts" not in f.filename] or frames
    places = " → ".join(f"{Path(f.filename).name}:{f.lineno}" for f in (ours[-1], frames[-1]))
    return f"{type(error).__name__} at {places}: {' '.join(str(error).split())[:150]}"


def fuzz(count: int, seed: int, keep: Path | None) -> tuple[dict[str, Counter[str]], list[Fault]]:
    """Run N cases, spread evenly over the kinds.

    Args:
        count: Cases in all.
        seed: Of the damage; a case depends on the seed, its kind and its number only.
        keep: Where the files of faults are copied.

    Returns:
        By kind how often each outcome came; and the faults.
    """
    outcomes: dict[str, Counter[str]] = {}
    faults: list[Fault] = []
    found = kinds()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        for k, (name, kind) in enumerate(found.items()):
            original = Path(temporary) / f"original-{k}"
            original.mkdir()
            files = kind.write(original)
            good = contents(original)
            for reader in kind.readers:
                reader(original)  # what is not damaged is read
            outcomes[name] = Counter()
            began = time.process_time()
            for case in range(count // len(found) + (k < count % len(found))):
                work = Path(temporary) / "case"
                shutil.copytree(original, work)
                random = Random(f"{seed} {name} {case}")
                outcome, what = run_case(kind, work, random.choice(files), random)
                outcomes[name][outcome] += 1
                if outcome == "fault":
                    faults.append(Fault(name, case, what))
                    if keep is not None:
                        shutil.copytree(work, keep / f"{k}-{case}", dirs_exist_ok=True)
                shutil.rmtree(work)
            if contents(original) != good:
                faults.append(Fault(name, -1, "the original was changed"))
            spent = time.process_time() - began
            if count:
                print(f"{name}: {dict(outcomes[name])}, {spent:.0f} s", file=sys.stderr)
    return outcomes, faults


def main() -> int:
    """Fuzz, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files of faults")
    parser.add_argument(
        "--quick", action="store_true", help="few cases; the page goes to experiments-output/"
    )
    options = parser.parse_args()
    count = 200 if options.quick else options.count
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    fuzz(0, options.seed, None)  # imports all that is needed
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    outcomes, faults = fuzz(count, options.seed, options.keep)
    for fault in faults:
        print(f"{fault.kind}, case {fault.case}: {fault.what}", file=sys.stderr)
    columns = ("refused", "read", "fault")
    rows = [[name, *(f"{n[column]:,}" for column in columns)] for name, n in outcomes.items()]
    total = Counter[str]()
    for counts in outcomes.values():
        total += counts
    rows.append(["**all**", *(f"{total[column]:,}" for column in columns)])
    table = markdown(["", "refused", "read", "faults"], rows)
    lines = [f"- {fault.kind}, case {fault.case}: `{fault.what}`" for fault in faults]
    text = TEXT.format(
        count=count,
        seed=options.seed,
        seconds=CPU_SECONDS,
        memory=MEMORY // 2**30,
        table=table,
        faults="\n".join(lines) or "None.",
    )
    packages = ["numpy", "pyarrow", "Pillow", "transformers"]
    write_page("fuzz", text, quick=options.quick, packages=packages)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
