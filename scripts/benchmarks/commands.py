"""Compare the commands with transformers' Trainer, torch's import and the disk: commands.md.

The raw data are those of scripts/experiments/tasks/newsgroups.py and language_model.py: the `.tab`
files of 20 Newsgroups, the MiniLM encoder, and SmolLM2-135M as convert_gguf.py writes it.
"""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scripts.benchmarks.harness import EMPTY, ROOT, make_checkpoint, start, write_page, write_texts
from scripts.experiments.lib.common import markdown

TEXT = """
# The commands from end to end

{models}. Load of the machine at the start: {load}.{quick}

## A step, beside the Trainer's

Each form of a job runs in a process of its own: transformers' `Trainer`, `consolidate finetune`
without a penalty and with one. They train on the same batches with the same optimizer, and take
turns step by step in a random order, while the others wait. The first step is not counted. Ratios
of medians.

{steps}

## What else a run takes

The same jobs of {alone_steps} steps, in {alone_rounds} rounds. *Before* is from the start of the
process to the first step (imports, opening, checking, loading, tokenizing), *after* from the last
step to the end (rounding, checking, writing). `finetune` runs with `--no-fisher`; it compares every
byte of weights and Fisher with the ledger before, and writes weights, Fisher and ledger with their
digests to the disk (`fsync`) after. The `Trainer` writes the weights.

{alone}

## Start

{startup}

## Rates

{size:.2f} GB of float32 weights, one thread; *GB/s* of that size. *Of the disk* is plain reading
and writing of a file, with `fsync`.

{rates}
"""

FORMS = ("Trainer", "finetune", "finetune, penalty")
RATE = 1e-5
CHILD = "import sys; from scripts.benchmarks.commands import run_form; run_form(*sys.argv[1:])"


@dataclass(frozen=True)
class Job:
    """What all forms of a fine-tuning run do."""

    title: str
    start: str  # a checkpoint with its Fisher
    data: str  # of texts, as JSONL
    classes: bool  # whether the texts have labels; else the next token is predicted
    batch: int
    length: int  # tokens of a text, at most
    steps: int


class Moment(NamedTuple):
    """When something was, in seconds."""

    wall: float  # since any moment, the same in all processes
    cpu: float  # of the process


class Mark(NamedTuple):
    """When a step began and ended, and its loss, if that was asked for."""

    began: Moment
    ended: Moment


def now() -> Moment:
    """Return the present moment."""
    return Moment(time.monotonic(), time.process_time())


class Turns:
    """The end of this process's steps: told to the parent, which says when to continue."""

    def __init__(self, steps: int, waits: bool):
        """Take stdout for marks; what else is printed goes to stderr.

        Args:
            steps: Of the run.
            waits: Whether the parent says when to continue.
        """
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._left, self._waits = steps, waits
        self._began = now()

    def step(self) -> None:
        """Tell that a step has ended, and wait for the next turn."""
        self.tell("step")
        self._left -= 1
        if self._waits and self._left:
            sys.stdin.readline()
        self._began = now()

    def tell(self, what: str, content: Any = None) -> None:
        """Write what happened, and from when to when."""
        line = {"what": what, "began": self._began, "ended": now(), "content": content}
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()


def run_form(form: str, asked: str, folder: str, waits: str) -> None:
    """Run one form of a job in this process.

    Args:
        form: One of FORMS.
        asked: The job as JSON.
        folder: Where the output goes.
        waits: `yes` if the parent gives the turns.
    """
    job = Job(**json.loads(asked))
    turns = Turns(job.steps, waits == "yes")
    loss = (
        run_trainer(job, folder, turns) if form == FORMS[0] else run_ours(form, job, folder, turns)
    )
    turns.tell("end", loss)


def run_ours(form: str, job: Job, folder: str, turns: Turns) -> float:
    """Fine-tune with consolidate, and return the first loss."""
    import consolidate

    losses: list[float] = []

    def on_step(step: Any) -> None:
        losses.append(step.loss)
        turns.step()

    penalty: dict[str, Any] = {"penalty": "none"} if form == FORMS[1] else {"ewc_lambda": 10.0}
    consolidate.finetune(
        job.start,
        data=job.data,
        task="new",
        output_dir=f"{folder}/out",
        no_fisher=True,
        batch_size=job.batch,
        max_length=job.length,
        max_steps=job.steps,
        learning_rate=RATE,
        on_step=on_step,
        **penalty,
    )
    return losses[0]


def run_trainer(job: Job, folder: str, turns: Turns) -> float:
    """Do the same with transformers' Trainer, and return the first loss."""
    import transformers

    kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification)
    model = kinds[job.classes].from_pretrained(job.start, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.start)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with open(job.data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=job.length)
    examples = [
        dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)
    ]
    collate: Any = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    numbers: Any = model.config.label2id
    if job.classes:
        collate = transformers.DataCollatorWithPadding(tokenizer)
        for example, row in zip(examples, rows, strict=True):
            example["labels"] = numbers[row["label"]]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    chosen: Any = [examples[i] for i in order]

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(chosen)

    class Told(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.step()

    settings = transformers.TrainingArguments(
        folder,
        max_steps=job.steps,
        per_device_train_batch_size=job.batch,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        seed=0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = InOrder(
        model, settings, train_dataset=chosen, data_collator=collate, callbacks=[Told()]
    )
    trainer.train()
    trainer.save_model(f"{folder}/out")
    return float(trainer.state.log_history[0]["loss"])


class Run:
    """A form of a job in a process of its own."""

    def __init__(self, form: str, job: Job, threads: int, folder: Path, waits: bool):
        """Start it.

        Args:
            form: One of FORMS.
            job: What it does.
            threads: Of torch.
            folder: For its output, which is not kept.
            waits: Whether it waits for `go` after each step but the last.
        """
        self.form, self.folder = form, Path(tempfile.mkdtemp(dir=folder))
        self.started = time.monotonic()
        words = (form, json.dumps(asdict(job)), str(self.folder), "yes" if waits else "no")
        pipe = subprocess.PIPE
        self.errors = open(self.folder / "stderr", "w+", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *words],
            stdin=pipe,
            stdout=pipe,
            stderr=self.errors,
            text=True,
            env=environment(threads),
        )

    def go(self) -> None:
        """Let it take the next step."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def next(self) -> tuple[Mark, Any]:
        """Return when its next step was, or its end, and what it says of it.

        Raises:
            RuntimeError: It failed.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"{self.form} failed:\n{self.errors.read()}")
        said = json.loads(line)
        return Mark(Moment(*said["began"]), Moment(*said["ended"])), said["content"]

    def end(self) -> None:
        """Wait until it has ended, and remove its output."""
        self.process.communicate()
        self.errors.close()
        shutil.rmtree(self.folder)


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a process with that many threads, and the code beside this."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}


class Steps(NamedTuple):
    """What was seen of the steps of one form."""

    spans: list[Moment]
    loss: float  # of the first step


def take_turns(job: Job, threads: int, folder: Path) -> dict[str, Steps]:
    """Return what each form's steps took but the first, by form.

    Args:
        job: What they do.
        threads: Of torch.
        folder: For their output.
    """
    runs = {}
    for form in FORMS:
        runs[form] = Run(form, job, threads, folder, waits=True)
        runs[form].next()  # nothing else runs meanwhile
    spans: dict[str, list[Moment]] = {form: [] for form in FORMS}
    order = random.Random(0)
    for _ in range(job.steps - 1):
        for form in order.sample(FORMS, len(FORMS)):
            runs[form].go()
            spans[form].append(span(*runs[form].next()[0]))
    found = {}
    for form, run in runs.items():
        found[form] = Steps(spans[form], run.next()[1])
        run.end()
    return found


def span(began: Moment, ended: Moment) -> Moment:
    """Return how long something took."""
    return Moment(*(b - a for a, b in zip(began, ended, strict=True)))


class Beside(NamedTuple):
    """What a run took beside its steps."""

    before: Moment
    after: Moment


def run_alone(job: Job, rounds: int, folder: Path) -> dict[str, list[Beside]]:
    """Return what runs of each form took beside their steps, with one thread."""
    found: dict[str, list[Beside]] = {form: [] for form in FORMS}
    order = random.Random(0)
    for _ in range(rounds):
        for form in order.sample(FORMS, len(FORMS)):
            run = Run(form, job, 1, folder, waits=False)
            steps = [run.next()[0] for _ in range(job.steps)]
            ended = run.next()[0].ended
            run.end()
            first = span(*steps[1])  # the first one ends where this one begins
            before = span(Moment(run.started, 0.0), steps[0].ended)
            beside = Moment(*(a - b for a, b in zip(before, first, strict=True)))
            found[form].append(Beside(beside, span(steps[-1].ended, ended)))
    return found


def run_commands(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[Moment]]:
    """Return what each of some commands of Python's took, by name."""
    found: dict[str, list[Moment]] = {name: [] for name in commands}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(commands), len(commands)):
            before = time.monotonic()
            with subprocess.Popen(
                [sys.executable, *commands[name]], stdout=subprocess.DEVNULL, env=environment(1)
            ) as process:
                _, status, used = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise RuntimeError(f"{commands[name]} failed")
            found[name].append(Moment(time.monotonic() - before, used.ru_utime + used.ru_stime))
    return found


def measure_rates(checkpoint: Path, folder: Path, rounds: int) -> dict[str, list[Moment]]:
    """Return how long it takes to read, hash, check, load and write a checkpoint's weights.

    Args:
        checkpoint: A folder with one file of weights.
        folder: On the disk that is written to.
        rounds: How often each is timed.
    """
    import transformers

    from consolidate.models.loading import load_model
    from formats.atomic import replace_folder
    from formats.checkpoint import check_finite, open_checkpoint, weight_records, write_checkpoint

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    file = checkpoint / "model.safetensors"
    content = file.read_bytes()

    def read() -> None:
        buffer = bytearray(2**24)
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass

    def read_from_disk() -> None:
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        read()

    def write() -> None:
        with open(folder / "plain", "wb", buffering=0) as opened:
            opened.write(content)
            os.fsync(opened.fileno())

    def write_ours() -> None:
        source = open_checkpoint(checkpoint)
        with replace_folder(folder / "ours", overwrite=True) as staging:
            write_checkpoint(staging, source, source.weights)

    work: dict[str, Callable[[], object]] = {
        "of the disk: reading": read_from_disk,
        "reading again, from memory": read,
        "comparing digests": lambda: weight_records(open_checkpoint(checkpoint).weights),
        "checking for NaN and infinity": lambda: check_finite(
            open_checkpoint(checkpoint).weights, checkpoint
        ),
        "transformers' `from_pretrained`": lambda: (
            transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
        ),
        "loading, with a comparison of all values": lambda: load_model(open_checkpoint(checkpoint)),
        "of the disk: writing": write,
        "writing a checkpoint": write_ours,
    }
    found: dict[str, list[Moment]] = {name: [] for name in work}
    order = random.Random(0)
    load_model(open_checkpoint(checkpoint))  # imports
    for _ in range(rounds):
        for name in order.sample(list(work), len(work)):
            before = now()
            work[name]()
            found[name].append(span(before, now()))
    torch.set_num_threads(threads)
    return found


def prepare(options: Any, folder: Path) -> dict[str, Job]:
    """Write the data and the checkpoints with their Fishers, and return the jobs by name."""
    if options.quick:
        make_checkpoint(folder / "model", EMPTY, vocabulary=100)
        write_texts(folder / "texts.jsonl", 0, sequences=8, tokens=16)
        job = Job("Llama, empty", "model", "texts.jsonl", False, batch=2, length=16, steps=3)
        jobs = {"language model": job}
    else:
        from scripts.experiments.lib.tokenized import read_table

        messages = read_table(options.data_dir / "20newsgroups-train.tab")
        random.Random(0).shuffle(messages)
        rows = [{"text": text, "label": group.split(".")[0]} for group, text in messages]
        for name, chosen in (
            ("labels", rows[:400]),
            ("texts", [{"text": r["text"][:2000]} for r in rows if len(r["text"]) > 2000][:100]),
        ):
            lines = "".join(json.dumps(row) + "\n" for row in chosen)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        shutil.copytree(options.model, folder / "model")
        consolidate(
            *("finetune", str(options.encoder.resolve()), "--objective", "sequence-classification"),
            *("--data", "labels.jsonl", "--task", "old", "--penalty", "none", "--output-dir"),
            *("classifier", "--max-steps", "1", "--fisher-max-examples", "4"),
            *("--fisher-estimator", "mc", "--max-length", "64"),
            folder=folder,
        )
        jobs = {
            "classifier": Job(
                "MiniLM, 7 classes, 16 × 64 tokens", "classifier", "labels.jsonl", True, 16, 64, 11
            ),
            "language model": Job(
                "SmolLM2-135M, 2 × 64 tokens", "model", "texts.jsonl", False, 2, 64, 7
            ),
        }
    consolidate(
        *("fisher", "model", "--data", "texts.jsonl", "--task", "old", "--estimator", "mc"),
        *("--max-examples", "2", "--batch-size", "2", "--max-length", "64"),
        folder=folder,
    )
    return {
        name: replace(job, start=str(folder / job.start), data=str(folder / job.data))
        for name, job in jobs.items()
    }


def consolidate(*arguments: str, folder: Path) -> None:
    """Run a command in a folder."""
    command = [sys.executable, "-m", "consolidate", *arguments, "--json"]
    subprocess.run(command, check=True, cwd=folder, env=environment(2), stdout=subprocess.DEVNULL)


def median(moments: Sequence[Moment]) -> Moment:
    """Return the medians of wall time and of CPU time."""
    return Moment(*(statistics.median(values) for values in zip(*moments, strict=True)))


def steps_table(found: Mapping[str, Mapping[str, Steps]]) -> str:
    """Write what steps took, by job and number of threads and then by form."""
    rows = []
    for setting, forms in found.items():
        plain = median(forms[FORMS[0]].spans)
        for form, steps in forms.items():
            each = median(steps.spans)
            pairs = zip(each, plain, strict=True)
            ratios = [f"{mine / theirs:.3f}" for mine, theirs in pairs]
            milliseconds = [f"{1000 * value:.0f}" for value in each]
            times = f"{len(steps.spans)}"
            rows.append([f"{setting}: {form}", *milliseconds, *ratios, f"{steps.loss:.4f}", times])
    header = ["", "wall, ms", "CPU, ms", "ratio, wall", "ratio, CPU", "first loss", "steps"]
    return markdown(header, rows)


def alone_table(found: Mapping[str, Mapping[str, Sequence[Beside]]]) -> str:
    """Write what runs took beside their steps, by job and then by form."""
    rows = []
    for title, forms in found.items():
        for form, runs in forms.items():
            before, after = (median([run[i] for run in runs]) for i in range(2))
            rows.append([f"{title}: {form}", *(f"{value:.2f}" for value in (*before, *after))])
    header = ["", "before, wall s", "before, CPU s", "after, wall s", "after, CPU s"]
    return markdown(header, rows)


def seconds_table(found: Mapping[str, Sequence[Moment]]) -> str:
    """Write what commands took."""
    rows = [[name, *(f"{value:.2f}" for value in median(runs))] for name, runs in found.items()]
    return markdown(["", "wall, s", "CPU, s"], rows)


def rates_table(found: Mapping[str, Sequence[Moment]], size: int) -> str:
    """Write how fast a file of that many bytes is worked on."""
    rows = []
    for name, runs in found.items():
        each = median(runs)
        rows.append([name, f"{size / each.wall / 1e9:.2f}", f"{each.wall:.2f}", f"{each.cpu:.2f}"])
    return markdown(["", "GB/s", "wall, s", "CPU, s"], rows)


def main() -> None:
    """Measure everything and write the page."""
    parser = start(__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="the folder of the .tab files")
    parser.add_argument("--encoder", type=Path, help="MiniLM's folder")
    parser.add_argument("--model", type=Path, help="SmolLM2's folder")
    options = parser.parse_args()
    if not options.quick and None in (options.data_dir, options.encoder, options.model):
        parser.error("--data-dir, --encoder and --model are needed, or --quick")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    rounds, threads = (1, (1,)) if options.quick else (5, (1, 2))
    shown: dict[str, dict[str, Steps]] = {}
    alone: dict[str, dict[str, list[Beside]]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        jobs = prepare(options, folder)
        for job in jobs.values():
            for count in threads:
                shown[f"{job.title}, threads: {count}"] = take_turns(job, count, folder)
            alone[job.title] = run_alone(replace(job, steps=2), rounds, folder)
        last = list(jobs.values())[-1].start
        commands = {
            "`import torch`": ["-c", "import torch"],
            "`import torch, transformers`": ["-c", "import torch, transformers"],
            "`consolidate --help`": ["-m", "consolidate", "--help"],
            "`consolidate finetune --help`": ["-m", "consolidate", "finetune", "--help"],
            "`consolidate show`": ["-m", "consolidate", "show", last],
        }
        startup = run_commands(commands, rounds)
        size = (Path(last) / "model.safetensors").stat().st_size
        rates = measure_rates(Path(last), folder, rounds)
    text = TEXT.format(
        models=" and ".join(job.title for job in jobs.values()),
        load=load,
        quick=" **A quick run at tiny sizes: its figures mean nothing.**" * options.quick,
        steps=steps_table(shown),
        alone_steps=2,
        alone_rounds=rounds,
        alone=alone_table(alone),
        startup=seconds_table(startup),
        size=size / 1e9,
        rates=rates_table(rates, size),
    )
    write_page("commands", text, quick=options.quick, packages=["transformers", "accelerate"])


if __name__ == "__main__":
    main()
