"""Kill commands at random moments, start them again until they are done, and compare every byte.

Needs the packages of the tests (scikit-learn, transformers). Usage: see --help.
"""

import argparse
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import torch

from consolidate import cli
from consolidate.estimation import compensated_sums
from formats.errors import InputError
from formats.partial_work import read_partial
from scripts.benchmarks.harness import ROOT, markdown, write_page

TEXT = """
# Killed and restarted

Each command ran once without interruption. Then it was killed at random moments (by SIGKILL, every
fifth time by SIGTERM) and started again with the same arguments until it was done. With two
processes under `torchrun`, SIGKILL ends both and `torchrun`, or equally often one of the two alone;
SIGTERM is sent to `torchrun`. The output is compared byte for byte with that of the uninterrupted
run: weights, Fisher, ledger and all other files. *Differences* counts files that differ, are
missing or are left over, and processes with an unexpected exit code.

The networks are a perceptron with dropout on the handwritten digits of scikit-learn, and a tiny
BERT. Progress is saved as often as possible (`--save-every-minutes 0`), and the sums of a Fisher
are rounded every {folded} batches instead of 16, so that a short pass has progress to resume from.
The processes are forks of one that has imported torch, so that the kills fall into the work.
`torchrun` starts two new processes, with 16 batches; there the moments are counted from the first
forward pass.

{table}

Where the kills fell, by the saved progress on disk:

{phases}

Seed {seed}. {done} times a command was done before it was killed; these are not counted.
"""
MODULE = """
from pathlib import Path

from torch import nn

def perceptron(config):
    module = nn.Sequential(
        nn.Linear(64, 48), nn.ReLU(), nn.Dropout(0.2), nn.Linear(48, 10)
    )
    module.register_forward_pre_hook(lambda *_: Path("begun").touch())
    return module
"""
FOLDED_BATCHES = 4
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
SIGNALS = ("SIGKILL", "SIGKILL of one", "SIGTERM")
MLP = "--model perceptron_of_digits:perceptron --device cpu --save-every-minutes 0"
CHAIN = """
output-dir = "{output}"

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


@dataclass
class Command:
    """One command that is killed.

    Attributes:
        name: What the table calls it.
        line: What is typed; OUT stands for the output folder.
        share: How many kills of it, where there are as many in all as these make.
        processes: How many `torchrun` starts; one is started without it.
    """

    name: str
    line: str
    share: int
    processes: int = 1

    def words(self, output: str) -> list[str]:
        """Give the words with another output folder."""
        return [output if word == "OUT" else word for word in self.line.split()]


@dataclass
class Log:
    """What happened to one command."""

    kills: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    early: int = 0
    differences: list[str] = field(default_factory=list)
    phases: Counter[str] = field(default_factory=Counter)


COMMANDS = [
    Command(
        "`fisher`, perceptron",
        f"fisher learned --data b.npz {MLP} --estimator mc --batch-size 8 --output-dir OUT",
        8,
    ),
    Command(
        "`fisher --tolerance`, BERT",
        "fisher bert --data texts.jsonl --save-every-minutes 0 --batch-size 2 --tolerance 0.02 "
        "--check --output-dir OUT",
        4,
    ),
    Command(
        "`finetune`, perceptron",
        f"finetune learned --data b.npz {MLP} --ewc-lambda 30 --epochs 3 --batch-size 64 "
        "--learning-rate 3e-3 --lr-scheduler cosine --evaluate a=a.npz --evaluate-every 20 "
        "--output-dir OUT",
        10,
    ),
    Command(
        "`finetune` with a long pass, perceptron",
        f"finetune learned --data b.npz {MLP} --ewc-lambda 30 --max-steps 5 --batch-size 64 "
        "--fisher-estimator mc --fisher-batch-size 2 --output-dir OUT",
        8,
    ),
    Command(
        "`finetune --penalty-step proximal`, BERT",
        "finetune bert-learned --data more.jsonl --save-every-minutes 0 --ewc-lambda 10 --epochs 3 "
        "--batch-size 4 --gradient-accumulation-steps 2 --penalty-step proximal --optimizer sgd "
        "--momentum 0.9 --output-dir OUT",
        5,
    ),
    Command(
        "`finetune --ewc-lambda 1,30,1000`, perceptron",
        f"finetune learned --data b.npz {MLP} --ewc-lambda 1,30,1000 --max-steps 40 "
        "--batch-size 64 --optimizer adam --output-dir OUT",
        5,
    ),
    Command("`run`, perceptron", "run chain.toml --output-dir OUT", 10),
    Command(
        "`fisher`, two processes",
        f"fisher learned --data b.npz {MLP} --estimator mc --batch-size 2 --output-dir OUT",
        5,
        processes=2,
    ),
    Command(
        "`finetune`, two processes",
        f"finetune learned --data b.npz {MLP} --ewc-lambda 30 --max-steps 30 --batch-size 8 "
        "--optimizer adam --fisher-estimator mc --fisher-batch-size 2 --output-dir OUT",
        5,
        processes=2,
    ),
    Command(
        "`finetune --shard`, two processes",
        f"finetune learned --data b.npz {MLP} --ewc-lambda 30 --max-steps 20 --batch-size 8 "
        "--optimizer adam --fisher-estimator mc --fisher-max-examples 130 --shard --output-dir OUT",
        5,
        processes=2,
    ),
]
KILLS = sum(command.share for command in COMMANDS)


def prepare(folder: Path) -> None:
    """Write models and data, and change into the folder."""
    sys.path.append(str(ROOT / "tests"))
    import transformers
    from sklearn.datasets import load_digits

    from support import tiny_models

    os.chdir(folder)
    sys.path.insert(0, str(folder))
    Path("perceptron_of_digits.py").write_text(MODULE)
    digits = load_digits()
    inputs = (digits.data / 16).astype(np.float32)
    chain = CHAIN.format(output="chain")
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
        text = "".join(json.dumps(row) + "\n" for row in rows)
        Path(f"{name}.jsonl").write_text(text)
    undisturbed(["run", "chain.toml"])
    shutil.copytree("chain/01-a", "learned")
    undisturbed(["fisher", "bert", "--data", "texts.jsonl", "--output-dir", "bert-learned"])


def undisturbed(words: Sequence[str], processes: int = 1) -> float:
    """Run a command to its end; returns the seconds that it took."""
    child = start(words, Path("log.txt"), processes)
    began = time.monotonic()
    if ended(child, 3600):
        raise SystemExit(f"{' '.join(words)}: {Path('log.txt').read_text()}")
    return time.monotonic() - began


def start(words: Sequence[str], log: Path, processes: int = 1) -> int:
    """Start a command in a fork of this process, or under torchrun; returns its number."""
    Path("begun").unlink(missing_ok=True)
    if (child := os.fork()) == 0:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                if processes > 1:
                    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
                    torchrun = [*TORCHRUN, str(processes), "-m", "consolidate", *words]
                    os.execv(sys.executable, [sys.executable, *torchrun])
                compensated_sums.FOLDED_BATCHES = FOLDED_BATCHES
                cli.main(words)
            except SystemExit as left:
                os._exit(int(left.code or 0))
            finally:
                os._exit(1)
    without_reaping = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while processes > 1 and not Path("begun").exists():
        if os.waitid(os.P_PID, child, without_reaping):
            break
        time.sleep(0.002)
    return child


def ended(child: int, seconds: float) -> int | None:
    """Wait so long for a process; returns its exit code, or None while it runs."""
    until = time.monotonic() + seconds
    while True:
        number, status = os.waitpid(child, os.WNOHANG)
        if number:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)


def phase(out: Path) -> str:
    """Say how far a command came, by what it has left on the disk."""
    steps = sorted(out.parent.glob(f"{out.name}/*.json")) if out.is_dir() else []
    target = steps[-1].with_suffix("") if steps else out
    if target.with_name(f".{target.name}.consolidate-new").exists():
        return "writing"
    try:
        kept = read_partial(target)
    except InputError as error:  # would be a fault: the next start refuses it
        return f"damaged: {error}"
    if kept is None:
        return "nothing saved yet"
    for key, words in (
        ("levels", "Fisher"),
        ("trained", "after training"),
        ("training", "training"),
        ("trials", "search for λ"),
    ):
        if key in kept.state:
            return words
    return "unknown"


def contents(out: Path) -> dict[str, bytes]:
    """Read all files of an output, and whatever is left beside it."""
    files = [file for file in out.rglob("*") if file.is_file()]
    files += out.parent.glob(f".{out.name}.*")
    return {str(file.relative_to(out.parent)): file.read_bytes() for file in files}


def send(number: signal.Signals, *processes: int) -> None:
    """Send a signal to those processes that are still there."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def workers_of(torchrun: int) -> list[int]:
    """List the processes that torchrun has started and that have not ended."""
    listed = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text()
    return [int(number) for number in listed.split()]


def strike(child: int, processes: int, random: Random) -> tuple[str, int | None, int]:
    """Send a command a signal, and wait until all its processes have ended.

    Args:
        child: The command, or the torchrun that has started it.
        processes: How many torchrun has started; 1 without it.
        random: Of the signal, and of who gets it.

    Returns:
        Which of SIGNALS, its exit code, and the usual one.
    """
    workers = workers_of(child) if processes > 1 else []
    if random.random() < 0.2:
        send(signal.SIGTERM, child)
        name, expected = SIGNALS[2], 1 if workers else 128 + signal.SIGTERM
    elif workers and random.random() < 0.5:
        send(signal.SIGKILL, random.choice(workers))
        name, expected = SIGNALS[1], 1
    else:
        send(signal.SIGKILL, child, *workers)
        name, expected = SIGNALS[0], -signal.SIGKILL
    left = ended(child, 60)
    for worker in workers:
        with suppress(ProcessLookupError):  # it has ended, and so it is no more
            select.select([os.pidfd_open(worker)], [], [], 60)
    return name, left, expected


def kill(command: Command, kills: int, random: Random, seconds: float, expected: Path) -> Log:
    """Kill a command N times, in rounds that each end with a comparison.

    Args:
        command: What is started again and again.
        kills: How many.
        random: Of the moments and the signals.
        seconds: What an undisturbed run takes.
        expected: What an undisturbed run left.

    Returns:
        What happened.
    """
    log, out = Log(), Path("out")
    words = command.words("out")
    while log.kills.total() < kills:
        log.rounds += 1
        code = None
        while code is None:
            child = start(words, Path("log.txt"), command.processes)
            if log.kills.total() >= kills:
                code = ended(child, 600)
                break
            code = ended(child, random.uniform(0, 0.8) * seconds)
            if code is None and command.processes > 1 and not workers_of(child):
                code = ended(child, 60)  # torchrun alone is left, and is leaving
            if code is not None:
                log.early += 1
                break
            name, left, usual = strike(child, command.processes, random)
            if left == 0:  # it was done before the signal had an effect
                code = 0
                continue
            if left != usual:
                log.differences.append(f"exited with {left} after {name}")
            log.kills[name] += 1
            log.phases[phase(out)] += 1
        if code != 0:
            log.differences.append(f"exited with {code}: {Path('log.txt').read_text()[-300:]}")
        found, wanted = contents(out), contents(expected)
        wanted = {f"out{name.removeprefix('expected')}": data for name, data in wanted.items()}
        names = sorted({*found, *wanted})
        log.differences += [name for name in names if found.get(name) != wanted.get(name)]
        for leaving in Path().glob(".out*"):
            leaving.unlink() if leaving.is_file() else shutil.rmtree(leaving)
        shutil.rmtree(out, ignore_errors=True)
        Path("log.txt").unlink(missing_ok=True)
    return log


def main() -> int:
    """Kill, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="few kills; the page goes to experiments-output/"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        try:
            prepare(Path(folder).resolve())
            logs = {}
            for number, command in enumerate(COMMANDS):
                kills = 2 if options.quick else round(command.share * options.kills / KILLS)
                seconds = undisturbed(command.words("expected"), command.processes)
                random = Random(f"{options.seed} {number}")
                logs[command.name] = kill(command, kills, random, seconds, Path("expected"))
                print(
                    f"{command.name}: {logs[command.name]}, {seconds:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
                shutil.rmtree("expected")
        finally:
            os.chdir(before)
    rows = [
        [
            name,
            *(str(log.kills[one]) for one in SIGNALS),
            str(log.rounds),
            str(len(log.differences)),
        ]
        for name, log in logs.items()
    ]
    totals = [sum(int(row[i]) for row in rows) for i in range(1, 6)]
    rows.append(["**all**", *map(str, totals)])
    phases = sorted({name for log in logs.values() for name in log.phases})
    text = TEXT.format(
        folded=FOLDED_BATCHES,
        table=markdown(["", *SIGNALS, "rounds", "differences"], rows),
        phases=markdown(
            ["", *phases],
            [[name, *(str(log.phases[one]) for one in phases)] for name, log in logs.items()],
        ),
        seed=options.seed,
        done=sum(log.early for log in logs.values()),
    )
    write_page("resume", text, quick=options.quick, packages=["transformers", "scikit-learn"])
    for name, log in logs.items():
        for difference in log.differences:
            print(f"{name}: {difference}", file=sys.stderr)
    return 1 if totals[-1] else 0


if __name__ == "__main__":
    sys.exit(main())
