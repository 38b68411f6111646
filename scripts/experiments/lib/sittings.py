"""Running the paper's experiments, one seed and method at a time, in as many sittings as it takes.

What is done stands in docs/results/paper/NAME.jsonl, a line for each unit; started again, the rest
is done. Pages, CSV and pictures are made of the records alone.
"""

import argparse
import math
import multiprocessing
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from scripts.experiments.lib import mnist_files
from scripts.experiments.lib.records import (
    Experiment,
    Figures,
    Findings,
    Record,
    RecordsError,
    Row,
    Unit,
    append_record,
    read_records,
)

PACKAGES = ("consolidate-ewc", "torch")
"""Whose versions are recorded."""
ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "docs" / "results" / "paper"
QUICK = ROOT / "experiments-output" / "paper-quick" / "paper"
QUICK_NOTE = "**A quick run at tiny sizes: its figures mean nothing.**\n\n"
PAGE = """# {title}

{quick}{text}

## Records

[Every figure]({name}.csv) and [what was run]({name}.jsonl): {done} of {units} units,
{minutes:.1f} minutes by the clock over all units, one thread each{busy}; {versions}.{others}

The first command runs what {name}.jsonl lacks: nothing, once all is done;
everything, once that file is moved away.

```sh
scripts/experiments/all --only {name}
scripts/experiments/all --report    # the pages alone, from the records
```
"""


Table = Callable[[Sequence[tuple[Experiment, list[Row]]], Path, bool], None]
"""Writes what stands beside all pages, from their rows, into a folder; from whether it is quick."""


class Kind(NamedTuple):
    """A family of experiments other than the paper's.

    Attributes:
        what: They are, in the help.
        results: The folder of records and pages.
        quick: That of quick runs.
        page: As PAGE.
        data_help: What `--data-dir` is.
        bound: Gives an experiment what the command line says, or exits.
        packages: Whose versions are recorded.
    """

    what: str
    results: Path
    quick: Path
    page: str
    data_help: str
    bound: Callable[[Experiment, argparse.Namespace], Experiment]
    packages: tuple[str, ...]


def main(*experiments: Experiment, table: Table | None = None, kind: Kind | None = None) -> None:
    """Read the command line of one experiment, or of all, and run what is not done yet.

    Args:
        *experiments: Whose units.
        table: Writes the table of all of them.
        kind: Which experiments they are; the paper's unless given.
    """
    kind = kind or _paper()
    parser = argparse.ArgumentParser(
        description=f"Run {kind.what} that are not done yet, and write their pages."
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, in seconds, to experiments-output/"
    )
    parser.add_argument("--report", action="store_true", help="only write the pages")
    parser.add_argument("--plan", action="store_true", help="only list what is not done yet")
    parser.add_argument("--data-dir", type=Path, help=kind.data_help)
    parser.add_argument(
        "--jobs", type=_positive, default=2, help="units at a time, each on one thread"
    )
    parser.add_argument("--minutes", type=_minutes, help="begin no unit after so many minutes")
    names = [one.name for one in experiments]
    if table is not None:
        parser.add_argument(
            "--only",
            nargs="+",
            metavar="NAME",
            choices=names,
            default=names,
            help="run some alone, of: " + ", ".join(names) + "; all pages are written",
        )
    options = parser.parse_args()
    some = [one for one in experiments if table is None or one.name in options.only]
    try:
        _obey(options, some, experiments, table, kind)
    except KeyboardInterrupt:
        print("stopped; what is done is kept: start again to go on", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # what read the plan had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (OSError, RecordsError) as error:
        sys.exit(f"{error}; what is done is kept")


def _obey(
    options: argparse.Namespace,
    some: Sequence[Experiment],
    experiments: Sequence[Experiment],
    table: Table | None,
    kind: Kind,
) -> None:
    folder = kind.quick if options.quick else kind.results
    if options.plan:
        print(outlook(some, folder, quick=options.quick, jobs=options.jobs), flush=True)
        return
    if not options.report:
        until = time.monotonic() + 60 * options.minutes if options.minutes is not None else None
        run(
            [kind.bound(one, options) for one in some],
            folder,
            quick=options.quick,
            jobs=options.jobs,
            until=until,
            fetch=lambda: mnist_files.fetch(options.data_dir),
            packages=kind.packages,
        )
        print(outlook(some, folder, quick=options.quick, jobs=options.jobs), file=sys.stderr)
    write_pages(
        experiments if table else some, folder, quick=options.quick, table=table, page=kind.page
    )


def _paper() -> Kind:
    return Kind(
        what="the paper's experiments",
        results=RESULTS,
        quick=QUICK,
        page=PAGE,
        data_help="a folder with the four IDX files of MNIST",
        bound=lambda experiment, _: experiment,
        packages=PACKAGES,
    )


def run(
    experiments: Sequence[Experiment],
    folder: Path,
    *,
    quick: bool = False,
    jobs: int = 1,
    until: float | None = None,
    fetch: Callable[[], object] = mnist_files.fetch,
    packages: Sequence[str] = PACKAGES,
) -> None:
    """Do every unit that has no record, and record it.

    Args:
        experiments: Whose units.
        folder: Of the records.
        quick: Whether the tiny units are meant.
        jobs: Units at a time, each in a process of its own; one is done in this process.
        until: No unit is begun after this time of `time.monotonic`.
        fetch: Sees that MNIST is there, or exits; called before the first unit that needs it.
        packages: Whose versions are recorded.

    Raises:
        PermissionError: The folder cannot be written; nothing is begun.
        SystemExit: A unit failed; all others that could be done are, and recorded. Or a unit's
            process was killed.
    """
    measured = partial(timed, packages=tuple(packages))
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written")
    if jobs > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, _begin_worker) as pool:
            try:
                _run(experiments, folder, quick, jobs, until, fetch, pool, measured)
            except BrokenProcessPool:
                raise SystemExit(
                    "a unit's process was ended from outside, perhaps for want of memory; what is "
                    "done is kept: start again to go on, with --jobs 1 where memory is short"
                ) from None
            except BaseException:  # else what the others do would be waited for
                for worker in multiprocessing.active_children():
                    worker.terminate()
                raise
    else:
        _run(experiments, folder, quick, 1, until, fetch, None, measured)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process once its parent has, were it killed: what it does would go nowhere."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not minutes > 0:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return minutes


def _run(
    experiments: Sequence[Experiment],
    folder: Path,
    quick: bool,
    jobs: int,
    until: float | None,
    fetch: Callable[[], object],
    pool: Executor | None,
    measured: Callable[..., Record] | None = None,
) -> None:
    measured = measured or timed
    running: dict[Future[Record], tuple[Experiment, Unit]] = {}
    failed: dict[str, str] = {}
    fetched = False
    while True:
        begun = [unit for _, unit in running.values()]
        waiting = [
            (experiment, unit)
            for experiment in experiments
            for unit in undone(experiment, folder, quick)
            if unit not in begun and unit.digest not in failed
        ]
        over = until is not None and time.monotonic() > until
        for experiment, unit in [] if over else waiting:
            busy = [one for one, _ in running.values()]
            if len(busy) == jobs or (busy and any(one.alone for one in (experiment, *busy))):
                break
            if missing := _missing(experiment):
                failed[experiment.name] = missing
                continue
            if unit.settings.get("data") == mnist_files.MNIST and not fetched:
                if mnist_files.MNIST in failed:
                    continue
                try:
                    fetch()
                except SystemExit as error:
                    failed[mnist_files.MNIST] = str(error)
                    continue
                fetched = True
            if pool is None:
                future: Future[Record] = Future()
                try:
                    future.set_result(measured(experiment.measure, unit, more=experiment.packages))
                except Exception as error:
                    future.set_exception(error)
            else:
                future = pool.submit(measured, experiment.measure, unit, more=experiment.packages)
            running[future] = experiment, unit
        if not running:
            break
        broken = None
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            _, unit = running.pop(future)
            name = f"{unit.experiment}: {unit.method}, seed {unit.seed}  {_few(unit)}"
            if isinstance(cause := future.exception(), BrokenProcessPool):
                broken = cause
            elif cause is not None:
                failed[unit.digest] = f"{name}: {type(cause).__name__}: {cause}"
                print("failed: " + failed[unit.digest], file=sys.stderr)
            else:
                record = future.result()
                append_record(folder / f"{unit.experiment}.jsonl", record)
                print(f"{record.seconds:6.0f} s  {name}", file=sys.stderr)
        if broken is not None:
            raise broken
    if failed:
        raise SystemExit("not done:\n" + "\n".join(failed.values()))


def _missing(experiment: Experiment) -> str | None:
    """Return what to do where a package that an experiment needs is not installed."""
    for package in experiment.packages:
        try:
            version(package)
        except PackageNotFoundError:
            return (
                f"{experiment.name}: the package {package} is not installed; in the root of the "
                "repository run scripts/environment dev"
            )
    return None


def undone(experiment: Experiment, folder: Path, quick: bool) -> list[Unit]:
    """List the units that are known by now and have no record."""
    records = read_records(folder / f"{experiment.name}.jsonl")
    done = {record.unit.digest for record in records}
    return [unit for unit in experiment.plan(records, quick) if unit.digest not in done]


def installed(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions that a record states: of the packages, and the number of threads."""
    return {name: version(name) for name in packages} | {"threads": "1"}


def timed(
    measure: Callable[[Unit], Figures],
    unit: Unit,
    packages: Sequence[str] = PACKAGES,
    more: Sequence[str] = (),
) -> Record:
    """Do one unit on one thread, with its times and the versions of packages."""
    versions = installed((*packages, *more))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Moments of rarely used weights decay to denormal numbers, at up to 80 times the time a step.
    torch.set_flush_denormal(True)
    try:
        began, busy = time.perf_counter(), time.process_time()
        figures = measure(unit)
        seconds, busy = time.perf_counter() - began, time.process_time() - busy
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
    return Record(unit, figures, seconds, versions, busy)


def all_units(experiment: Experiment, records: Sequence[Record], quick: bool) -> list[Unit]:
    """List all units, those that wait for the outcome of a search with any outcome of it."""
    known = list(records)
    done = {record.unit.digest for record in known}
    while new := [unit for unit in experiment.plan(known, quick) if unit.digest not in done]:
        known += [Record(unit, {"validation": 0.0}, 0.0, {}) for unit in new]
        done.update(unit.digest for unit in new)
    return experiment.plan(known, quick)


def outlook(experiments: Sequence[Experiment], folder: Path, *, quick: bool, jobs: int) -> str:
    """List what is not done yet, with about how long it takes.

    Args:
        experiments: Whose units.
        folder: Of the records.
        quick: Whether the tiny units are meant.
        jobs: Units at a time.

    Returns:
        Lines of text.
    """
    lines, whole = [], 0.0
    for experiment in experiments:
        records = read_records(folder / f"{experiment.name}.jsonl")
        done = {record.unit.digest for record in records}
        units = all_units(experiment, records, quick)
        left = [unit for unit in units if unit.digest not in done]
        seconds = sum(experiment.seconds(unit) for unit in left)
        whole += seconds
        if left:
            lines.append(
                f"{experiment.name}: {len(left)} of {len(units)} units to do, about "
                f"{seconds / 60:.0f} minutes on one core"
            )
    if not lines:
        return "nothing is left to do of " + ", ".join(one.name for one in experiments)
    lines.append(f"at least about {whole / jobs / 3600:.1f} hours, {jobs} at a time")
    return "\n".join(lines)


def write_pages(
    experiments: Sequence[Experiment],
    folder: Path,
    *,
    quick: bool,
    table: Table | None,
    page: str = PAGE,
) -> None:
    """Write the pages of experiments, and the table of all of them.

    Args:
        experiments: Whose.
        folder: Of the records.
        quick: Whether the pages say that their figures mean nothing.
        table: As of `main`.
        page: As PAGE.
    """
    rows = [(one, write_page(one, folder, quick=quick, template=page)) for one in experiments]
    if table is not None:
        table(rows, folder, quick)


def write_page(
    experiment: Experiment, folder: Path, *, quick: bool = False, template: str = PAGE
) -> list[Row]:
    """Write an experiment's page, CSV and pictures from its records.

    Args:
        experiment: Whose.
        folder: Of the records and of what is written.
        quick: Whether the page says that its figures mean nothing.
        template: As PAGE.

    Returns:
        The experiment's part of the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = read_records(folder / f"{experiment.name}.jsonl")
    units = all_units(experiment, records, quick)
    planned = {unit.digest for unit in units}
    # Records of settings that are not planned any more are kept, and left out.
    known = [record for record in records if record.unit.digest in planned]
    findings = experiment.report(known, folder)
    if findings.text:  # else there are searches only, and no figures to link
        page = folder / f"{experiment.name}.md"
        others = len(records) - len(known)
        text = _page(experiment, known, others, len(units), findings, quick, template)
        page.write_text(text, encoding="utf-8")
        print(page)
    return findings.rows


def _page(
    experiment: Experiment,
    records: Sequence[Record],
    others: int,
    units: int,
    findings: Findings,
    quick: bool,
    template: str,
) -> str:
    versions = {
        f"{name} {number}"
        for record in records
        for name, number in record.versions.items()
        if name != "threads"
    }
    return template.format(
        title=experiment.title,
        name=experiment.name,
        quick=QUICK_NOTE * quick,
        text=_wrapped(findings.text),
        done=len(records),
        units=units,
        minutes=sum(record.seconds for record in records) / 60,
        busy=_busy(records),
        others=_earlier(records)
        + (f" {others} more, of settings tried before, are not shown." if others else ""),
        versions=", ".join(sorted(versions)),
    )


def _earlier(records: Sequence[Record]) -> str:
    made = [record.made_by for record in records if record.made_by is not None]
    if not made:
        return ""
    return (
        f" {len(made)} of them were made by earlier code ({', '.join(sorted(set(made)))}), whose "
        "figures a repeated unit of each method confirmed."
    )


def _wrapped(text: str) -> str:
    """Fill the paragraphs anew, once there are figures in them."""
    blocks = [
        block
        if block.startswith(("|", "- ", "#", "![", "```"))
        else textwrap.fill(" ".join(block.split()), 99, break_on_hyphens=False)
        for block in text.split("\n\n")
    ]
    return "\n\n".join(blocks)


def _busy(records: Sequence[Record]) -> str:
    known = [record.processor_seconds for record in records if record.processor_seconds is not None]
    if len(known) < len(records):
        return ", of a machine that was shared"
    return f", {sum(known) / 60:.1f} minutes of processor time"


def _few(unit: Unit) -> str:
    keys = (
        "rate",
        "strength",
        "merge_rule",
        "task_weight",
        "estimator",
        "fisher_batch",
        "ewc_lambda",
        "against",
    )
    return ", ".join(
        str(unit.settings[k]) for k in ("setting", "view", *keys) if k in unit.settings
    )
