"""Kill commands at random moments, start them again until they are done, and compare every byte.

Every command is a fork of this process, which has imported what it needs, so that the kills fall
into the work. A round starts one command again and again until it is done.
"""

import argparse
import importlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from consolidate import cli
from consolidate.estimation import compensated_sums
from formats.errors import InputError
from formats.partial_work import read_partial
from scripts.benchmarks.harness import ROOT
from scripts.robustness.records import Record, add_record, read_records

sys.path.append(str(ROOT / "tests"))
from support import loopback_hub, together
from support.folders import contents

MODULE = """
from torch import nn

def perceptron(config):
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Dropout(0.2), nn.Linear(48, 10))
"""
FOLDED_BATCHES = 4
KILLS = 1_000
NOTHING = "nothing saved"
REPOSITORY = "user/model"
MLP = "--model perceptron_of_digits:perceptron --device cpu --save-every-minutes 0"
CHAIN = """
output-dir = "out"

[config]
kind = "perceptron"

[defaults]
model = "perceptron_of_digits:perceptron"
device = "cpu"
save-every-minutes = 0
optimizer = "adam"
learning-rate = 0.003
ewc-lambda = 30
epochs = 2
batch-size = 64
evaluate-every = 10
"""


@dataclass(frozen=True)
class Command:
    """One command that is killed.

    Attributes:
        name: What the table calls it.
        line: What is typed, in a folder of its own beside the models and data.
        share: Of the kills, in proportion to the others.
        start: The checkpoint that is at `out` before.
        processes: How many work together, as if `torchrun` had started them.
        twice: Whether the command is started two times at once.
        hub: Whether it pushes to a Hub on the loopback address.
    """

    name: str
    line: str
    share: int
    start: str = ""
    processes: int = 1
    twice: bool = False
    hub: bool = False

    @property
    def words(self) -> list[str]:
        """Give what is typed, word by word."""
        return self.line.split()


@dataclass(frozen=True)
class Whole:
    """What an undisturbed run took and left.

    Attributes:
        seconds: From its start to its end.
        saved: From the first saved progress to its end; 0 where it saves none.
        before: The files in its folder before it.
        after: The files afterwards, and those on the Hub.
    """

    seconds: float
    saved: float
    before: dict[str, bytes]
    after: dict[str, bytes]


_LONG = (
    f"finetune ../learned --data ../b.npz {MLP} --ewc-lambda 30 --max-steps 5 --batch-size 64 "
    "--fisher-estimator mc --fisher-batch-size 2 --output-dir out"
)
_STEPS = (
    f"finetune ../learned --data ../b.npz {MLP} --ewc-lambda 30 --epochs 3 --batch-size 32 "
    "--learning-rate 3e-3 --lr-scheduler cosine --evaluate a=../a.npz --evaluate-every 20 "
    "--output-dir out"
)
_BERT = "--data ../more.parquet --save-every-minutes 0 --ewc-lambda 10 --epochs 3 --batch-size 4"
COMMANDS = [
    Command(
        "`fisher`, perceptron",
        f"fisher ../learned --data ../b.npz {MLP} --estimator mc --batch-size 4 --output-dir out",
        90,
    ),
    Command(
        "`fisher --overwrite` in place, perceptron",
        f"fisher out --data ../b.npz {MLP} --estimator mc --batch-size 4 --overwrite",
        70,
        start="learned",
    ),
    Command(
        "`fisher --tolerance`, BERT, Parquet",
        "fisher ../bert --data ../texts.parquet --save-every-minutes 0 --batch-size 2 "
        "--tolerance 0.02 --check --output-dir out",
        50,
    ),
    Command("`finetune`, perceptron", _STEPS, 110),
    Command("`finetune --overwrite`, perceptron", f"{_STEPS} --overwrite", 60, start="other"),
    Command("`finetune`, long pass for the Fisher, perceptron", _LONG, 120),
    Command(
        "`finetune --penalty-step proximal`, BERT, Parquet",
        f"finetune ../bert-learned {_BERT} --gradient-accumulation-steps 2 --penalty-step proximal "
        "--optimizer sgd --momentum 0.9 --output-dir out",
        60,
    ),
    Command(
        "`finetune --lora-rank 2`, BERT, Parquet",
        f"finetune ../bert-learned {_BERT} --lora-rank 2 --output-dir out",
        60,
    ),
    Command(
        "`finetune --ewc-lambda 1,30,1000`, perceptron",
        f"finetune ../learned --data ../b.npz {MLP} --ewc-lambda 1,30,1000 --max-steps 40 "
        "--batch-size 64 --optimizer adam --output-dir out",
        90,
    ),
    Command("`run`, perceptron", "run ../chain.toml --output-dir out", 100),
    Command(
        "`fisher`, two processes",
        f"fisher ../learned --data ../b.npz {MLP} --estimator mc --batch-size 2 --output-dir out",
        40,
        processes=2,
    ),
    Command(
        "`finetune`, two processes",
        f"finetune ../learned --data ../b.npz {MLP} --ewc-lambda 30 --max-steps 30 --batch-size 8 "
        "--optimizer adam --fisher-estimator mc --fisher-batch-size 2 --output-dir out",
        40,
        processes=2,
    ),
    Command(
        "`finetune --shard`, two processes",
        f"finetune ../learned --data ../b.npz {MLP} --ewc-lambda 30 --max-steps 20 --batch-size 8 "
        "--optimizer adam --fisher-estimator mc --fisher-max-examples 130 --shard --output-dir out",
        30,
        processes=2,
    ),
    Command("the same `finetune` twice at once", _LONG, 50, twice=True),
    Command("`merge`", "merge ../learned ../other --output-dir out", 40),
    Command("`remap`", "remap ../renamed --fisher-of ../learned --output-dir out", 20),
    Command("`report`", "report ../learned --output report.html", 20),
    Command("`push` to a Hub", f"push ../learned {REPOSITORY}", 50, hub=True),
]


def prepare(folder: Path) -> None:
    """Write models and data into a folder, and change into it."""
    import transformers
    from safetensors.torch import load_file, save_file
    from sklearn.datasets import load_digits

    from support import tiny_models

    os.chdir(folder)
    sys.path.insert(0, str(folder))
    Path("perceptron_of_digits.py").write_text(MODULE)
    importlib.invalidate_caches()
    importlib.import_module("perceptron_of_digits")
    os.environ |= {"HF_HOME": str(folder / "cache"), "HF_TOKEN": loopback_hub.TOKEN}
    os.environ |= {"HF_HUB_DISABLE_XET": "1", "TOKENIZERS_PARALLELISM": "false"}
    digits = load_digits()
    inputs = (digits.data / 16).astype(np.float32)
    chain = CHAIN
    for seed, name in enumerate("abc"):
        generator = np.random.default_rng(seed)
        columns = generator.permutation(64) if seed else np.arange(64)
        chosen = generator.permutation(len(inputs))[:600]
        np.savez(f"{name}.npz", inputs=inputs[chosen][:, columns], labels=digits.target[chosen])
        chain += f'\n[[task]]\nname = "{name}"\ndata = "{name}.npz"\nevaluate = "{name}.npz"\n'
    Path("chain.toml").write_text(chain)
    config = tiny_models.bert_config(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    architecture = transformers.BertForSequenceClassification
    tiny_models.save(folder / "bert", architecture, config, tiny_models.word_tokenizer())
    random = Random(0)
    for name in ("texts", "more"):
        rows = [
            {"text": " ".join(random.choices(" ".join(tiny_models.CORPUS).split(), k=8)),
             "label": random.choice(["no", "yes"])}
            for _ in range(90)
        ]  # fmt: skip
        apart(_write_parquet, rows, f"{name}.parquet")
    Path("made").mkdir()
    first = f"fisher learned --data c.npz {MLP} --task c --output-dir other"
    for where, line in (
        ("made", "run ../chain.toml --output-dir out"),
        (".", first),
        (".", "fisher bert --data texts.parquet --output-dir bert-learned"),
    ):
        if line == first:
            shutil.copytree("made/out/01-a", "learned")
        child = started(line.split(), Path(where))[0]
        if ended([child], 600) != [0]:
            raise SystemExit(f"{line}: {Path(where, '../log.txt').read_text()}")
    shutil.copytree("learned", "renamed", ignore=shutil.ignore_patterns("fisher"))
    weights = load_file("learned/model.safetensors")
    renamed = {f"body.{name}": values for name, values in weights.items()}
    save_file(renamed, "renamed/model.safetensors", {"format": "pt"})


def _write_parquet(rows: list[dict[str, str]], name: str) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), name)


def apart(function: Any, *arguments: Any) -> None:
    """Call a function in a fork, so that no thread that it starts is here."""
    if (child := os.fork()) == 0:
        try:
            function(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    if ended([child], 60) != [0]:
        raise RuntimeError(f"{function.__name__}{arguments} failed")


_CODES: dict[int, int] = {}
"""Of the processes of the last command that have ended."""
_CPU = [0.0]
"""Seconds of computing of all that have ended."""
_PORT = [0]
"""Of the Hub; 0 before the first one."""


def started(words: Sequence[str], folder: Path, processes: int = 1, hub: str = "") -> list[int]:
    """Start a command in a folder, in forks of this process; gives their numbers."""
    _CODES.clear()

    def begin() -> None:
        os.chdir(folder)
        compensated_sums.FOLDED_BATCHES = FOLDED_BATCHES
        if hub:
            import huggingface_hub.constants

            os.environ["HF_ENDPOINT"] = hub
            importlib.reload(huggingface_hub.constants)

    if processes > 1:
        return together.started(processes, words, Path("log.txt"), begin)
    if (child := os.fork()) == 0:
        code = 1
        try:
            with Path("log.txt").open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            begin()
            cli.main(list(words))
        except SystemExit as left:
            code = int(left.code or 0)
        finally:
            os._exit(code)
    return [child]


def ended(children: Sequence[int], seconds: float) -> list[int | None]:
    """Wait so long for processes; gives their exit codes, None for those that run on."""
    until = time.monotonic() + seconds
    while True:
        for child in children:
            if child not in _CODES:
                number, status, used = os.wait4(child, os.WNOHANG)
                if number:
                    _CODES[child] = os.waitstatus_to_exitcode(status)
                    _CPU[0] += used.ru_utime + used.ru_stime
        codes = [_CODES.get(child) for child in children]
        if None not in codes or time.monotonic() >= until:
            return codes
        time.sleep(0.002)


def has_saved(folder: Path) -> bool:
    """Look whether a command has saved progress in its folder."""
    return any(folder.glob(".*.consolidate-partial")) or any(
        folder.glob("out/.*.consolidate-partial")
    )


def phase(folder: Path, whole: Whole) -> str:
    """Say how far a command came, by what it has left on the disk."""
    saved = [*folder.glob(".*.consolidate-partial"), *folder.glob("out/.*.consolidate-partial")]
    for path in saved:
        target = path.with_name(path.name.removeprefix(".").removesuffix(".consolidate-partial"))
        try:
            kept = read_partial(target)
        except InputError as error:  # the next start would refuse it
            return f"damaged: {error}"
        for key, words in (
            ("levels", "Fisher"),
            ("trained", "after training"),
            ("training", "training"),
            ("trials", "search for λ"),
        ):
            if kept is not None and key in kept.state:
                return words
    local = {name: data for name, data in whole.after.items() if not name.startswith("hub:")}
    if contents(folder) == local != whole.before:
        return "done"
    if any('"made": null' not in step.read_text() for step in folder.glob("out/*.json")
           if step.name[:2].isdigit()):  # fmt: skip
        return "between two tasks"
    if [*folder.glob(".*.consolidate-new"), *folder.glob("out/.*.consolidate-new")]:
        return "writing"
    return NOTHING


def broken(folder: Path, whole: Whole) -> list[str]:
    """Name the outputs that are neither as before nor as afterwards, in the midst of a round."""
    units: dict[str, dict[str, bytes]] = {}
    for found in (contents(folder), whole.before, whole.after):
        chain = any(name.startswith("out/01-") for name in whole.after)
        for name in found:
            parts = Path(name).parts
            if not any(part.startswith(".") for part in parts) and not name.startswith("hub:"):
                depth = 2 if chain else 1
                if len(parts) > depth or not chain:
                    units.setdefault("/".join(parts[:depth]), {})
    for name, data in contents(folder).items():
        for unit, files in units.items():
            hidden = any(part.startswith(".") for part in Path(name).parts)
            if not hidden and (name == unit or name.startswith(f"{unit}/")):
                files[name] = data
    good = [
        {unit: {n: d for n, d in files.items() if n == unit or n.startswith(f"{unit}/")}
         for unit in units}
        for files in (whole.before, whole.after)
    ]  # fmt: skip
    return [
        f"{unit} is neither old nor new"
        for unit, files in units.items()
        if files not in (good[0][unit], good[1][unit])
    ]


@contextmanager
def pushed_to(command: Command) -> Iterator[str]:
    """Run a new Hub in a process of its own for the block, always at the same address, returned."""
    if not command.hub:
        yield ""
        return
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        with loopback_hub.running(_PORT[0]) as hub:
            hub.slow = 0.004  # so that uploads take some time
            os.write(writing, hub.address.encode())
            signal.pause()
        os._exit(0)
    os.close(writing)
    try:
        address = os.read(reading, 100).decode()
        _PORT[0] = int(address.rpartition(":")[2])  # the card names the address
        yield address
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def on_hub(hub: str) -> dict[str, bytes]:
    """List the files of the repository by their digests; those of a new one do not count."""
    if not hub:
        return {}
    address = f"{hub}/api/models/{REPOSITORY}/tree/main?recursive=true"
    asked = urllib.request.Request(
        address, headers={"Authorization": f"Bearer {loopback_hub.TOKEN}"}
    )
    try:
        with urllib.request.urlopen(asked) as answer:
            listed = json.load(answer)
    except urllib.error.HTTPError:  # not yet made
        return {}
    files = {f"hub:{entry['path']}": json.dumps(entry).encode() for entry in listed}
    return {} if list(files) == ["hub:.gitattributes"] else files


@contextmanager
def round_folder(name: str, command: Command) -> Iterator[Path]:
    """Make the folder of a round, which is removed afterwards."""
    folder = Path(name)
    folder.mkdir()
    if command.start:
        shutil.copytree(command.start, folder / "out")
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def undisturbed(command: Command) -> Whole:
    """Run a command once to its end."""
    with round_folder("expected", command) as folder, pushed_to(command) as hub:
        before = contents(folder)
        began, first = time.monotonic(), None
        children = started(command.words, folder, command.processes, hub)
        codes: list[int | None] = [None]
        while None in codes and time.monotonic() < began + 600:
            codes = ended(children, 0.002)
            if first is None and has_saved(folder):
                first = time.monotonic()
        end = time.monotonic()
        if set(codes) != {0}:
            raise SystemExit(f"{command.line}: {codes} {Path('log.txt').read_text()[-2000:]}")
        after = {**contents(folder), **on_hub(hub)}
        Path("log.txt").unlink(missing_ok=True)
        return Whole(end - began, 0 if first is None else end - first, before, after)


def wait_for_moment(
    children: Sequence[int], folder: Path, whole: Whole, random: Random, longer: float
) -> list[int | None]:
    """Wait until a random moment; gives the exit codes of those that ended before.

    Three of four moments count from when there is saved progress, the rest from the start; up to
    `longer` times what the undisturbed run took.
    """
    if whole.saved and random.random() < 0.75:
        until = time.monotonic() + 60
        while not has_saved(folder) and time.monotonic() < until:
            if None not in (codes := ended(children, 0)):
                return codes
            time.sleep(0.002)
        return ended(children, random.uniform(0, longer * whole.saved))
    return ended(children, random.uniform(0, longer * whole.seconds))


def strike(children: Sequence[int], command: Command, random: Random) -> tuple[str, list[str]]:
    """Send running processes a signal and wait until all have ended.

    Returns:
        What was sent, and what was wrong with their ends.
    """
    number = signal.SIGTERM if random.random() < 0.2 else signal.SIGKILL
    hit = list(children)
    if len(children) > 1 and random.random() < 0.5:
        hit = [random.choice(children)]
    for child in hit:
        with suppress(ProcessLookupError):
            os.kill(child, number)
    name = number.name + (" of one of two" if len(hit) < len(children) else "")
    if command.processes > 1 and len(hit) < len(children):  # as torchrun stops the others
        ended(children, 0.3)
        for child in set(children) - set(hit) - _CODES.keys():
            os.kill(child, signal.SIGTERM)
    codes = ended(children, 60)
    terminated = {128 + signal.SIGTERM, -signal.SIGTERM}  # the latter before a handler is set
    stopped = {-signal.SIGKILL} if number is signal.SIGKILL else terminated
    wrong = []
    for child, code in zip(children, codes, strict=True):
        # 1: the other process of the same run is gone; 75: another command has claimed the output.
        usual = {0, 75} if command.twice else {0, 1, *terminated} if command.processes > 1 else {0}
        if child in hit:
            usual |= stopped
        if code is None:
            os.kill(child, signal.SIGKILL)
            ended([child], 60)
            wrong.append(f"a process still ran 60 s after {name}")
        elif code not in usual:
            said = Path("log.txt").read_text()[-500:]
            wrong.append(f"exited with {code} after {name}: {said}")
    return name, wrong


def one_round(command: Command, number: int, seed: int, whole: Whole, pace: float = 1.0) -> Record:
    """Start a command until it is done, kill it at random moments before, and compare."""
    random = Random(f"{seed} {command.name} {number}")
    kills: list[list[str]] = []
    differences: list[str] = []
    began, _CPU[0] = time.monotonic(), 0.0
    with round_folder("round", command) as folder, pushed_to(command) as hub:
        code: int | None = None
        while code is None and len(kills) < 30 and not differences:
            children = started(command.words, folder, command.processes, hub)
            if command.twice:
                children += started(command.words, folder)
            longer = pace * (1 + len(kills) / 5)  # the machine may be slower by now
            codes = wait_for_moment(children, folder, whole, random, longer)
            running = [child for child, code in zip(children, codes, strict=True) if code is None]
            if not running:
                code = max(code or 0 for code in codes if code != 75 or not command.twice)
                break
            name, wrong = strike(running, command, random)
            differences += wrong
            where = phase(folder, whole)
            kills.append([name, where])
            differences += [where] if where.startswith("damaged") else broken(folder, whole)
            if (there := on_hub(hub)) and any(whole.after.get(n) != d for n, d in there.items()):
                differences.append("the branch is neither old nor new")
        if code is None and not differences:
            code = ended(started(command.words, folder, command.processes, hub), 600)[0]
        if code != 0 and not differences:
            differences.append(f"exited with {code}: {Path('log.txt').read_text()[-300:]}")
        found = {**contents(folder), **on_hub(hub)}
        names = sorted({*found, *whole.after})
        differences += [name for name in names if found.get(name) != whole.after.get(name)]
    Path("log.txt").unlink(missing_ok=True)
    return {
        "command": command.name,
        "round": number,
        "seed": seed,
        "kills": kills,
        "differences": differences,
        "seconds": round(time.monotonic() - began, 2),
        "cpu": round(_CPU[0], 2),
    }


def counted(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Count the kills of each command."""
    found = {command.name: 0 for command in COMMANDS}
    for record in records:
        if record["command"] in found:
            found[record["command"]] += len(record["kills"])
    return found


def attack(
    path: Path, kills: int, seed: int, deadline: float, commands: Sequence[Command] = COMMANDS
) -> list[Record]:
    """Kill until there are as many kills as asked for, or the time is over; add to the records.

    The command that lacks most of its share comes next, so that an interrupted run is even.
    """
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    records, before = read_records(path), Path.cwd()
    wholes: dict[str, Whole] = {}
    paces: dict[str, float] = {}  # how long a command takes by now, against its undisturbed run
    environment = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        try:
            prepare(Path(folder).resolve())
            shares = sum(command.share for command in commands)
            while time.monotonic() < deadline:
                done = counted([record for record in records if record["seed"] == seed])
                lacking = {c: 1 - done[c.name] * shares / (c.share * kills) for c in commands}
                command = max(lacking, key=lambda c: lacking[c])
                if lacking[command] <= 0:
                    break
                if command.name not in wholes:
                    wholes[command.name] = undisturbed(command)
                number = sum(r["command"] == command.name and r["seed"] == seed for r in records)
                pace = paces.get(command.name, 1.0)
                record = one_round(command, number, seed, wholes[command.name], pace)
                change = 0.7 if not record["kills"] else 1.2 if len(record["kills"]) > 3 else 1.0
                paces[command.name] = pace * change
                records.append(record)
                add_record(path, record)
                for difference in record["differences"]:
                    print(f"{command.name}, round {number}: {difference}", file=sys.stderr)
        finally:
            os.chdir(before)
            sys.path[:] = [entry for entry in sys.path if entry != str(Path(folder).resolve())]
            os.environ.clear()
            os.environ.update(environment)
    return records


def main() -> int:
    """Kill, and print what was different."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=180)
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    records = attack(options.records.resolve(), options.kills, options.seed, deadline)
    return any(record["differences"] for record in records)


if __name__ == "__main__":
    sys.exit(main())
