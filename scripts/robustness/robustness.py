"""Attack the program in four ways, and write docs/results/robustness.md from what is recorded."""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scripts.benchmarks.harness import ROOT, installed, processor
from scripts.experiments.lib.common import markdown
from scripts.robustness.records import Record, read_records

TEXT = """# Robustness

`scripts/robustness/all` kills commands, reads damaged files, searches for faults guided by
coverage, and serves a Hub that lies. It wrote this page from its records in `robustness/`, to which
a run that is started again adds.

| | asked for | done | differences or faults |
| --- | ---: | ---: | ---: |
| kills | {kills_wanted:,} | {kills:,} | {differences} |
| damaged files | {inputs_wanted:,} | {inputs:,} | {faults} |
| minutes of the guided search, each of three targets | {minutes_wanted} | {minutes} | {found} |
| cases of a lying Hub | {cases} | {cases} | {wrong} |

{short}

## Killed and restarted

Each command ran once undisturbed. Then it was killed at random moments and started again with the
same arguments until it was done. Three of four moments were uniform over the time from the first
saved progress to the end, the rest over the whole run; every fifth signal was SIGTERM, the others
SIGKILL. Of two processes both were killed, or one, and the other then got SIGTERM, as `torchrun`
sends it; of two commands at once likewise.

- **At the end** every file of the folder was compared byte for byte with that of the undisturbed
  run: weights, Fisher, ledger, all others, and files left over. A push was compared by the Hub's
  digests.
- **After every kill** each output had to be the old one or the new one as a whole, the saved
  progress readable, the exit code as documented, and the branch on the Hub old or new.

*Saved* counts kills with saved progress on disk at that moment. `merge`, `remap`, `report` and
`push` save none: they are short, or nothing of them shows until they end.

{kill_table}

Where the kills fell: {phases}.

A perceptron with dropout on the handwritten digits of scikit-learn, and a tiny BERT. Progress is
saved as often as possible (`--save-every-minutes 0`), and the sums of a Fisher are rounded every 4
batches instead of 16, so that a short pass has progress to resume from. The processes are forks of
one that has imported torch. A round ends when a command is done before its next kill.
Not killed: the machine, GPUs, `evaluate`, `show` and `verify`, which write nothing.

## Damaged files

Small real files, each with seeded damage to its structure (another shape, type, number or name, a
key twice, a row of another form, an instruction in a pickle, a chunk with its checksum) or to its
bytes. The functions that the commands use read each one, under an audit hook. *Refused* is a plain
error; *read* means that the damage was harmless or cannot be detected. *Past the parser*: a plain
parser of the format (`json`, `tomllib`, `csv`, `zipfile`, pyarrow, Pillow, jinja2; of safetensors
the header) takes the file. Faults are

- any other exception, {seconds} s of computing, {memory} GiB more than before, a process that dies;
- an import or code from the file's folder, another process, a socket, a class of a pickle, a file
  written or removed outside, a file that reading changed;
- a message or a line of `show` with control characters, a script in the report or the model card.

{input_table}

Known, and not mended:

- A chat template may run 2,097,152 lines; what one line computes has no bound. Templates with
  endless loops are not among the files.
- A `dataset_path` of a benchmark's YAML that names a folder is read as a whole, also `/`.

## Search guided by coverage

[Atheris](https://github.com/google/atheris) changes files and keeps those that reach new lines of
`formats/`; half of its changes are those above.

{guided_table}

## A Hub that lies

Each case is one route of a Hub on the loopback address that fails, hangs or answers something else,
and one command. The exit code and the message had to be as listed in
`scripts/robustness/lying_hub.py`, and checkpoint, output and repository unchanged. 75 means that it
may be tried again, 3 that it may not.

{hub_table}

Not mended here: the Hub's client names a file in its cache after the server's ETag, so a hostile
*server* (`HF_ENDPOINT`, a proxy) can make it write outside the cache.

## Faults that were found and mended

Files among which one of these faults was found were read again, 500 at a time, with the mended
program; the first records of them are not kept. The four parts were started one by one.

{mended}

## Conditions

```text
scripts/robustness/all
```

{machine}. {kill_minutes:.0f} minutes of computing for the kills (by the clock {kill_clock:.0f}, on
a shared machine), {input_minutes:.0f} for the files. Seed {seed}.
"""
MENDED = """- A process of two that waited for the other, killed while it joined, did not end on
  SIGTERM: joining waits in code of torch, where no handler of Python runs. `torchrun` sends SIGKILL
  after 30 s. While a process joins, signals now end it at once; nothing is saved then. Found in one
  of 737 rounds.
- `fisher` killed after it had written its result and before it removed its saved progress left
  that file for ever: the next start found the result up to date. It now removes it.
- A process of a sharded model whose peer was killed reported that the model does not accept its
  inputs, with exit code 3; it is now reported as what it is, with 1.
- A command killed while it wrote a file, such as the record of a step of `run`, left
  `.NAME.….consolidate-tmp` beside it for ever; the next write of that file removes it.
- A tokenizer that lacks the token for unknown words raised a plain `Exception`, reported as an
  internal error; it is refused with the folder's name.
- An integer too large for a float, as a number in `tasks.toml` or a length in
  `tokenizer_config.json`, ended in an internal error; it is refused, or no limit.
- `preprocessor_config.json` and the image settings in `config.json`: a `rescale_factor` of another
  type, brackets nested 200,000 deep, and sizes beyond 16,384 pixels ended in an internal error;
  they are refused.
- Damaged offsets in a dataset saved by `datasets` ended the process with a segmentation fault, in
  native code; the whole table is validated first.
- Half a surrogate pair in a text of a `.jsonl` file ended in an internal error; it is refused.
- In a benchmark's YAML a pattern with `**` from `/` walked the whole disk, one of 20,000 characters
  took more than 20 s to read, and a path that is too long ended in an internal error.
- A PNG whose chunk has a damaged length let Pillow allocate that length; images are decoded from
  memory, where it reads no more than there is.
- `output-dir = "~NAME/…"` in `tasks.toml`, of a user who does not exist, ended in an internal
  error; it is refused. So did a NUL in an `include` of a benchmark's YAML."""


def kill_part(records: Sequence[Record]) -> dict[str, object]:
    """Fill in what was killed."""
    from scripts.robustness.kills import COMMANDS, NOTHING

    rows: list[list[Any]] = []
    phases = Counter[str]()
    for command in COMMANDS:
        own = [record for record in records if record["command"] == command.name]
        kills = [kill for record in own for kill in record["kills"]]
        signals = Counter(name for name, _ in kills)
        phases.update(where for _, where in kills)
        one = sum(n for name, n in signals.items() if "one of" in name)
        saved = sum(1 for _, where in kills if where not in (NOTHING, "done", "writing"))
        counts = [len(kills), signals["SIGKILL"], signals["SIGTERM"], one, saved, len(own)]
        rows.append([command.name, *counts, sum(len(r["differences"]) for r in own)])
    total = [sum(row[i] for row in rows) for i in range(1, 8)]
    rows.append(["**all**", *total])
    header = ["", "kills", "SIGKILL", "SIGTERM", "one of two", "saved", "rounds", "differences"]
    table = markdown(header, [[str(cell) for cell in row] for row in rows])
    return {
        "kill_table": table,
        "kills": total[0],
        "saved": total[4],
        "differences": total[6],
        "phases": ", ".join(f"{where} {count}" for where, count in phases.most_common()),
        "kill_minutes": sum(record["cpu"] for record in records) / 60,
        "kill_clock": sum(record["seconds"] for record in records) / 60,
    }


def input_part(records: Sequence[Record]) -> dict[str, object]:
    """Fill in which files were read."""
    from scripts.robustness.inputs import CPU_SECONDS, MEMORY

    counts: dict[str, list[int]] = {}
    for record in records:
        row = counts.setdefault(record["kind"], [0] * 5)
        keys = ("cases", "refused", "read", "past")
        for i, value in enumerate([*(record[key] for key in keys), len(record["faults"])]):
            row[i] += value
    total = [sum(row[i] for row in counts.values()) for i in range(5)]
    rows = [
        [name, *(f"{n:,}" for n in row[:3]), f"{row[3] / max(row[0], 1):.0%}", str(row[4])]
        for name, row in [*counts.items(), ("**all**", total)]
    ]
    header = ["", "files", "refused", "read", "past the parser", "faults"]
    return {
        "input_table": markdown(header, rows),
        "inputs": total[0],
        "faults": total[4],
        "least": min((row[0] for row in counts.values()), default=0),
        "kinds": len(counts),
        "shallow": sorted(name for name, row in counts.items() if row[3] < 0.2 * row[0]),
        "seconds": CPU_SECONDS,
        "memory": MEMORY // 2**30,
        "input_minutes": sum(record["cpu"] for record in records) / 60,
    }


def guided_part(records: Sequence[Record]) -> dict[str, object]:
    """Fill in how long was searched."""
    from scripts.robustness.guided import TARGETS

    rows, minutes = [], []
    for target in TARGETS:
        own = [record for record in records if record["target"] == target]
        minutes.append(sum(record["seconds"] for record in own) / 60)
        last = max((record["coverage"] for record in own), default=0)
        executions = sum(record["executions"] for record in own)
        faults = sum(len(record["faults"]) for record in own)
        computed = f"{sum(record['cpu'] for record in own) / 60:.1f}"
        cells = [f"{minutes[-1]:.1f}", computed, f"{executions:,}", str(last), str(faults)]
        rows.append([target, *cells])
    header = ["", "minutes", "of computing", "files", "edges covered", "faults"]
    table = markdown(header, rows) if records else "It was not run: Atheris is not installed."
    return {
        "guided_table": table,
        "minutes": " to ".join(sorted({f"{m:.0f}" for m in (min(minutes), max(minutes))})),
        "least_minutes": min(minutes),
        "found": sum(len(record["faults"]) for record in records),
    }


def hub_part(records: Sequence[Record]) -> dict[str, object]:
    """Fill in what the Hub did."""
    wrong = [record for record in records if not record["right"] or record["changed"]]
    by_command: dict[str, Counter[str]] = {}
    for record in records:
        by_command.setdefault(record["command"], Counter())[str(record["exit"])] += 1
    rows = [
        [f"`{command}`", str(codes.total()), str(codes["3"]), str(codes["75"])]
        for command, codes in by_command.items()
    ]
    table = markdown(["", "cases", "exit code 3", "exit code 75"], rows)
    return {"hub_table": table, "cases": len(records), "wrong": len(wrong)}


def shortfalls(found: dict[str, object], options: argparse.Namespace) -> str:
    """Say which of the numbers that were asked for were not reached."""
    lines = []
    kills, saved = int(str(found["kills"])), int(str(found["saved"]))
    share = saved / max(kills, 1)
    lines.append(f"{share:.0%} of the kills fell on saved work; asked for were 60 %.")
    kinds, least = found["kinds"], int(str(found["least"]))
    lines.append(f"Of {kinds} kinds of files each was read {least:,} times or more; asked: 3,000.")
    if shallow := found["shallow"]:
        lines.append(f"Less than 20 % past the parser: {str(shallow)[1:-1]}.")
    behind = [
        name
        for name, done, wanted in (
            ("kills", kills, options.kills),
            ("files", int(str(found["inputs"])), options.inputs),
            ("guided search", float(str(found["least_minutes"])), options.search_minutes - 0.5),
        )
        if done < wanted
    ]
    if behind:
        lines.append(
            f"Short of what was asked for: {', '.join(behind)}. Each ran as long as there was time "
            "on a machine that some twenty other processes shared; the same command continues."
        )
    return " ".join(lines)


def write_page(folder: Path, page: Path, options: argparse.Namespace) -> bool:
    """Write the page; returns whether anything was wrong, or a part has no record."""
    names = ("kills", "inputs", "guided", "hub")
    parts = (kill_part, input_part, guided_part, hub_part)
    found: dict[str, object] = {}
    for name, part in zip(names, parts, strict=True):
        found |= part(read_records(folder / f"{name}.jsonl"))
    packages = ("torch", "transformers", "numpy", "pyarrow", "Pillow", "datasets", "peft")
    versions = ", ".join(f"{name} {installed(name)}" for name in packages if installed(name))
    machine = f"{processor()}, {platform.system()}, Python {platform.python_version()}, {versions}"
    text = TEXT.format(
        **found,
        kills_wanted=options.kills,
        inputs_wanted=options.inputs,
        minutes_wanted=options.search_minutes,
        short="\n".join(_wrapped(shortfalls(found, options))),
        mended=MENDED,
        machine=machine,
        seed=options.seed,
    )
    lines = [line for part in text.split("\n") for line in _wrapped(part)]
    page.write_text("\n".join(lines), encoding="utf-8")
    print(page)
    wrong = any(found[key] for key in ("differences", "faults", "found", "wrong"))
    return wrong or not all(found[key] for key in ("kills", "inputs", "cases"))


def _wrapped(line: str) -> list[str]:
    """Break a line of prose at 100 columns; tables stay."""
    import textwrap

    if len(line) <= 100 or line.startswith("|"):
        return [line]
    return textwrap.wrap(line, 100, break_long_words=False, break_on_hyphens=False)


def main() -> int:
    """Run what is not done yet, each part in a process of its own, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="only write the page")
    parser.add_argument("--minutes", type=float, default=180, help="in all, of this run")
    parser.add_argument("--kills", type=int, default=1_000)
    parser.add_argument("--inputs", type=int, default=120_000)
    parser.add_argument("--search-minutes", type=float, default=30, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "results" / "robustness")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if not options.report:
        attack(folder, options)
    torch.set_num_threads(1)
    return write_page(folder, folder.with_suffix(".md"), options)


def attack(folder: Path, options: argparse.Namespace) -> None:
    """Run the four parts one after the other."""
    from scripts.robustness import guided

    end = time.monotonic() + 60 * options.minutes

    def run(script: str, *arguments: str) -> None:
        left = max(0, (end - time.monotonic()) / 60)
        words = [f"scripts.robustness.{script}", str(folder / f"{records[script]}.jsonl")]
        if arguments:
            words += [*arguments, "--seed", str(options.seed), "--minutes", str(left)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=environment, check=False)

    records = {"kills": "kills", "inputs": "inputs", "lying_hub": "hub"}
    run("lying_hub")
    run("kills", "--kills", str(options.kills))
    run("inputs", "--count", str(options.inputs))
    left = max(0, (end - time.monotonic()) / 60 / len(guided.TARGETS))
    minutes = min(options.search_minutes, left)
    guided.attack(folder / "guided.jsonl", ROOT / "experiments-output", minutes, options.seed)


if __name__ == "__main__":
    sys.exit(main())
