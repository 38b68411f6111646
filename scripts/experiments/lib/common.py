"""What the experiments share: running the command line, sweeping penalties, writing a report.

Each experiment prepares data files in a working folder, runs `consolidate` there by subprocess, and
writes docs/results/NAME.md. The strength of a penalty is chosen on validation rows, from a stated
grid, by the mean of the scores on tasks A and B; the tables are of test rows.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
NETWORKS = Path(__file__).resolve().with_name("networks.py")
Scores = dict[str, dict[str, float]]  # data's name -> metric -> value

REPORT = """{text}

## Commands

All of this again, from the root of the repository:

```text
{preparation}
```

What it runs in its working folder (of each penalty the strength that was chosen; the others differ
in the strength and the names of outputs alone):

```text
{commands}
```

Seed {seed}. Python {python}, {versions}. {minutes:.1f} minutes in all on {threads} CPU threads,
{processor:.1f} minutes of processor time.
"""


@dataclass
class Session:
    """A working folder, and the commands that were run in it."""

    name: str
    folder: Path
    report: Path
    seed: int
    quick: bool
    commands: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def consolidate(self, *arguments: object, quote: bool = True) -> dict[str, Any]:
        """Run `consolidate` in the working folder and return what its `--json` says.

        Args:
            *arguments: Of the command line, without `--json`.
            quote: List the command in the report.

        Returns:
            The command's result.

        Raises:
            SystemExit: The command failed; its own message has gone to stderr.
        """
        words = [str(argument) for argument in arguments]
        if quote:
            self.commands.append(shlex.join(["consolidate", *words]))
        began = time.monotonic()
        done = subprocess.run(
            [Path(sys.executable).with_name("consolidate"), *words, "--json"],
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.stderr.write(done.stderr)
            sys.exit(f"{shlex.join(['consolidate', *words])}: exit code {done.returncode}")
        print(f"  {time.monotonic() - began:5.0f} s  {shlex.join(words)[:110]}", file=sys.stderr)
        return json.loads(done.stdout)


@dataclass(frozen=True)
class Run:
    """One fine-tuning on task B."""

    penalty: str
    strength: float | None
    metrics: dict[str, Scores]  # "before", "epoch 1", …, "after" -> scores

    @property
    def title(self) -> str:
        """How tables and plots call it."""
        if self.penalty == "none":
            return "no penalty"
        return f"{ {'l2': 'l2', 'ewc': 'EWC'}[self.penalty] }, λ = {plain(self.strength)}"

    @property
    def folder(self) -> str:
        """The checkpoint it wrote, in the working folder."""
        return self.penalty if self.strength is None else f"{self.penalty}-{plain(self.strength)}"

    @property
    def flags(self) -> list[str]:
        """The options of the command line that say how it was held."""
        strength = [] if self.strength is None else ["--ewc-lambda", plain(self.strength)]
        return ["--penalty", self.penalty, *strength]

    @property
    def validation(self) -> float:
        """Mean validation score of the two tasks after fine-tuning."""
        after = self.metrics["after"]
        return (after["A-val"]["score"] + after["B-val"]["score"]) / 2


def plain(number: float | None) -> str:
    """Write a number without an exponent."""
    return "" if number is None else f"{number:.10f}".rstrip("0").rstrip(".")


def start_session(name: str, description: str, data_options: dict[str, str]) -> tuple[Session, Any]:
    """Read the command line of an experiment and make its working folder.

    Args:
        name: Of the experiment and its report.
        description: For `--help`.
        data_options: Options that name raw data, each with its help text; all are required.

    Returns:
        The session and the parsed options.
    """
    parser = argparse.ArgumentParser(description=description)
    for option, text in data_options.items():
        parser.add_argument(option, type=Path, required=True, help=text)
    parser.add_argument("--work-dir", type=Path, help="default: experiments-output/NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a small run that only shows that everything works; reports into the working folder",
    )
    options = parser.parse_args()
    for option in data_options:
        path = getattr(options, option.strip("-").replace("-", "_"))
        if not path.exists():
            parser.error(f"{option}: {path} does not exist")
    folder = options.work_dir or ROOT / "experiments-output" / (name + "-quick" * options.quick)
    folder.mkdir(parents=True, exist_ok=True)
    report = folder if options.quick else ROOT / "docs" / "results"
    report.mkdir(parents=True, exist_ok=True)
    return Session(name, folder.resolve(), report.resolve(), options.seed, options.quick), options


def fresh_folder(path: Path) -> Path:
    """Empty a folder that an earlier run of the same experiment has made.

    Args:
        path: Inside the working folder.

    Returns:
        The same path, now an empty folder.
    """
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def sweep(
    session: Session,
    start: str,
    data: str,
    grids: dict[str, Sequence[float | None]],
    evaluations: dict[str, str],
    options: Sequence[object],
) -> list[Run]:
    """Fine-tune on task B once for every penalty and strength.

    Args:
        session: Where; the commands of the best strengths are listed in its report.
        start: The checkpoint that knows task A and has its Fisher.
        data: Task B's training data.
        grids: Strengths to try for each penalty.
        evaluations: Data files by name: A, B (test) and A-val, B-val (to choose by).
        options: Further options of `consolidate finetune`.

    Returns:
        All runs, in the order of the grids.
    """
    runs, commands = [], []
    for penalty, strengths in grids.items():
        for strength in strengths:
            run = Run(penalty, strength, {})
            words: list[object] = ["finetune", start, "--data", data, "--task", "B"]
            words += ["--output-dir", run.folder, "--overwrite", *run.flags]
            words += [*options, "--seed", session.seed]
            for name, path in evaluations.items():
                words += ["--evaluate", f"{name}={path}"]
            result = session.consolidate(*words, quote=False)
            runs.append(replace(run, metrics=result["metrics"]))
            commands.append(shlex.join(["consolidate", *map(str, words)]))
    chosen = best_runs(runs)
    session.commands += [text for run, text in zip(runs, commands, strict=True) if run in chosen]
    return runs


def best_runs(runs: Sequence[Run]) -> list[Run]:
    """Choose the best strength of each penalty by the validation scores.

    Args:
        runs: Of all strengths.

    Returns:
        One run for each penalty, in order of appearance.
    """
    by_penalty: dict[str, list[Run]] = {}
    for run in runs:
        by_penalty.setdefault(run.penalty, []).append(run)
    return [max(group, key=lambda run: run.validation) for group in by_penalty.values()]


def in_words(scores: dict[str, float]) -> str:
    """Write one score as tables show it: accuracy in per cent, else perplexity."""
    if "accuracy" in scores:
        return f"{100 * scores['accuracy']:.2f} %"
    return f"{scores['perplexity']:.2f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table whose columns after the first are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def results_table(runs: Sequence[Run], metric: str) -> str:
    """Write the scores on A and B before, and after each penalty at its best strength."""
    before = runs[0].metrics["before"]
    rows = [["before fine-tuning on B", in_words(before["A"]), in_words(before["B"])]]
    for run in best_runs(runs):
        after = run.metrics["after"]
        rows.append([f"after, {run.title}", in_words(after["A"]), in_words(after["B"])])
    return markdown(["", f"{metric} on A", f"{metric} on B"], rows)


def grid_table(runs: Sequence[Run], metric: str) -> str:
    """Write the scores of every strength that was tried."""
    rows = []
    for run in runs:
        after = run.metrics["after"]
        values = [in_words(after[name]) for name in ("A-val", "B-val", "A", "B")]
        rows.append([run.title, *values])
    header = ["", *(f"{metric}, {name}" for name in ("A validation", "B validation", "A", "B"))]
    return markdown(header, rows)


def plot_epochs(session: Session, runs: Sequence[Run], metric: str, unit: str) -> str:
    """Draw both tasks' scores over the epochs, one line for each penalty at its best strength.

    Args:
        session: Whose report the picture belongs to.
        runs: Of all strengths.
        metric: `accuracy` or `perplexity`.
        unit: Its name on the axis.

    Returns:
        The Markdown line that shows the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True, constrained_layout=True)
    for axis, task in zip(axes, ("A", "B"), strict=True):
        for run in best_runs(runs):
            points = [run.metrics[when] for when in run.metrics if when != "after"]
            if len(points) == 1:
                points.append(run.metrics["after"])
            values = [scores[task][metric] for scores in points]
            axis.plot(range(len(values)), values, marker="o", label=run.title)
        axis.set_title(f"task {task}")
        axis.set_xlabel("epochs on task B")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(unit)
    axes[0].legend(fontsize="small")
    picture = session.report / f"{session.name}.png"
    figure.savefig(picture, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return f"![{unit} on both tasks over the epochs on task B]({picture.name})"


def write_report(session: Session, text: str, *, preparation: str, packages: Sequence[str]) -> None:
    """Write docs/results/NAME.md: text and tables, the exact commands, seeds and versions.

    Args:
        session: The commands that were run.
        text: The heading, paragraphs, tables and pictures, as Markdown.
        preparation: The commands that do all of it again.
        packages: Distributions whose versions are stated.
    """
    import torch

    report = REPORT.format(
        text=text.strip(),
        preparation=preparation,
        commands="\n\n".join(session.commands),
        seed=session.seed,
        python=platform.python_version(),
        versions=", ".join(f"{name} {version(name)}" for name in packages),
        minutes=(time.monotonic() - session.started) / 60,
        processor=sum(os.times()[:4]) / 60,
        threads=torch.get_num_threads(),
    )
    path = session.report / f"{session.name}.md"
    path.write_text(report, encoding="utf-8")
    print(path)
