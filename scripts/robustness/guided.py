"""Let a fuzzer that is guided by coverage (Atheris) search for faults of one reader.

It runs in a process of its own, with the readers instrumented. Half of the changes are those of
`mutations.py`, which know the structure; the rest are the fuzzer's. Anything but a ConsolidateError
is a fault, and ends the search.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from scripts.benchmarks.harness import ROOT, installed
from scripts.robustness.records import Record, add_record, read_records

TARGETS = ("safetensors headers", "rows", "TOML")
PROGRESS = re.compile(r"#(\d+)\s+\S+\s+cov: (\d+)")


def reader_of(target: str, folder: Path) -> tuple[Callable[[bytes], None], Any, list[bytes]]:
    """Give what reads a target's bytes, what damages them, and good ones.

    Rows begin with a byte that chooses among JSON Lines, JSON, CSV and TSV.
    """
    from consolidate.commands.run_options import OPTIONS, read_options
    from formats.data import open_data
    from formats.run_file import read_run_file
    from formats.task_file import read_task_file
    from scripts.robustness import file_kinds, mutations

    def headers(data: bytes) -> None:
        (folder / "model.safetensors").write_bytes(data)
        file_kinds.read_weights(folder)

    def rows(data: bytes) -> None:
        suffix = ("jsonl", "json", "csv", "tsv")[data[0] % 4] if data else "csv"
        path = folder / f"data.{suffix}"
        path.write_bytes(data[1:])
        file_kinds.read_rows(lambda _: open_data(path), folder)

    def toml(data: bytes) -> None:
        path = folder / "tasks.toml"
        path.write_bytes(data[1:])
        if data[:1] == b"t":
            read_task_file(path)
        else:
            run = read_run_file(path, tuple(OPTIONS))
            for options in (run.defaults, *(task.options for task in run.tasks)):
                read_options(options, folder)

    def after_first(mutate: Callable[[bytes, Random], bytes]) -> Callable[[bytes, Random], bytes]:
        return lambda data, random: data[:1] + mutate(data[1:], random)

    good, read = [], {TARGETS[0]: headers, TARGETS[1]: rows, TARGETS[2]: toml}[target]
    if target == TARGETS[0]:
        for path in sorted(file_kinds.GOLDEN.rglob("*.safetensors")):
            good.append(path.read_bytes())
        return read, mutations.mutated_safetensors, good
    for first, name in enumerate(
        ("jsonl", "json", "csv", "tsv") if target == "rows" else ("t", "r")
    ):
        work = Path(tempfile.mkdtemp(dir=folder))
        write = {"t": file_kinds.write_task, "r": file_kinds.write_run}.get(name)
        files = write(work) if write else file_kinds.write_rows(name, work)
        start = bytes([first]) if target == "rows" else name.encode()
        good.append(start + (work / files[0]).read_bytes())
    mutate = mutations.mutated_text if target == "rows" else mutations.mutated_toml
    return read, after_first(mutate), good


def fuzz(target: str, corpus: Path, seconds: int, seed: int) -> None:
    """Search with the fuzzer, in this process, which it ends."""
    import atheris

    with atheris.instrument_imports(include=["formats", "consolidate.commands.run_options"]):
        folder = Path(tempfile.mkdtemp(prefix="guided-"))
        read, mutate, good = reader_of(target, folder)
    from formats.errors import ConsolidateError

    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(good):
        (corpus / f"good-{number}").write_bytes(data)

    def once(data: bytes) -> None:
        with suppress(ConsolidateError):
            read(data)

    def change(data: bytes, most: int, number: int) -> bytes:
        random = Random(number)
        if random.random() < 0.5:
            with suppress(Exception):  # what is damaged already may have no structure
                return mutate(data, random)[:most]
        return atheris.Mutate(data, most)

    arguments = [sys.argv[0], str(corpus), f"-max_total_time={seconds}", f"-seed={seed}"]
    arguments += ["-max_len=20000", "-timeout=60", "-rss_limit_mb=4096", "-print_final_stats=1"]
    arguments += [f"-artifact_prefix={corpus.parent}/fault-"]
    atheris.Setup(arguments, once, custom_mutator=change)
    atheris.Fuzz()


def attack(path: Path, corpora: Path, minutes: float, seed: int) -> None:
    """Search each target for N minutes in all, what is recorded counted; report faults."""
    for target in TARGETS:
        done = [r for r in read_records(path) if r["target"] == target]
        seconds = round(60 * minutes - sum(record["seconds"] for record in done))
        if seconds < 5 or not installed("atheris"):
            continue
        corpus = corpora / target.replace(" ", "-")
        before = {f.name for f in corpora.glob("fault-*")}
        began, used = time.monotonic(), _computed()
        command = [sys.executable, "-m", "scripts.robustness.guided", target, str(corpus)]
        ran = subprocess.run(
            [*command, str(seconds), str(seed + len(done))],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        found = PROGRESS.findall(ran.stderr)
        new = sorted({f.name for f in corpora.glob("fault-*")} - before)
        executions, coverage = map(int, found[-1] if found else (0, 0))
        said = [
            line for line in ran.stderr.splitlines() if re.match(r"\s*(\w+Error|===|==\d)", line)
        ]
        record: Record = {
            "target": target,
            "seed": seed + len(done),
            "seconds": round(time.monotonic() - began),
            "cpu": round(_computed() - used),
            "executions": executions,
            "coverage": coverage,
            "faults": [f"{' '.join(new)}: {' | '.join(said)[:400]}"] if ran.returncode else [],
        }
        add_record(path, record)
        for fault in record["faults"]:
            print(f"{target}: {fault}", file=sys.stderr)


def _computed() -> float:
    """Give the seconds that the processes started here have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    """Search one target in this process; called by `attack`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("seconds", type=int)
    parser.add_argument("seed", type=int)
    options = parser.parse_args()
    fuzz(options.target, options.corpus, options.seconds, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
