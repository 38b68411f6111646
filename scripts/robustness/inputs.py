"""Feed damaged files to every reader, under an audit hook, and record what comes of it.

Each case is a copy of small real files with one of them damaged, read in a fork of this process. A
reader may succeed or raise a ConsolidateError whose message is plain. All else is a fault: another
exception, too much time or memory, a process that dies, a file that reading changed, an import from
the case's folder, another process, a socket, a file written outside.
"""

import argparse
import faulthandler
import importlib
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch

from formats.errors import ConsolidateError
from scripts.benchmarks.harness import ROOT, installed
from scripts.robustness.file_kinds import HarmError, Kind, kinds
from scripts.robustness.records import Record, add_record, read_records

sys.path.append(str(ROOT / "tests"))
from support.folders import contents

INPUTS = 120_000
CHUNK = 500
CPU_SECONDS, MEMORY = 20, 2 * 2**30


class TooLongError(BaseException):
    """A reader that computes for longer than it may."""


class Watch:
    """An audit hook that refuses, during a case, what no reader of a file may do.

    Refused are imports and code from the case's folder, other processes, sockets, classes of a
    pickle, and files written or removed outside `folder`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.found, self.on = os.path.realpath(folder), "", False
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Look at an event; the interpreter calls this."""
        if not self.on or not (refused := self.refused(event, arguments)):
            return
        self.found = self.found or refused
        raise HarmError(refused)

    def refused(self, event: str, arguments: tuple[Any, ...]) -> str:
        """Say what is wrong with an event; empty where nothing is."""
        start = event.partition(".")[0]
        if start in ("socket", "subprocess", "pty", "ftplib", "urllib", "webbrowser"):
            return f"{event}{arguments!r:.100}"
        if event in PROCESSES or event == "pickle.find_class":
            return f"{event}{arguments!r:.100}"
        if event == "exec" and self.inside(getattr(arguments[0], "co_filename", "")):
            return f"code of the case's folder: {arguments[0].co_filename}"
        if event == "import" and len(arguments) > 1 and self.inside(arguments[1] or ""):
            return f"import of {arguments[1]}"
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            if writes and not isinstance(path, int) and not self.inside(path):
                return f"{path!r} is written"
        if event in CHANGES and not all(map(self.inside, arguments[: CHANGES[event]])):
            return f"{event}{arguments!r:.100}"
        return ""

    def inside(self, path: Any) -> bool:
        """Whether a path is in the folder, or the null device."""
        if isinstance(path, int) or path == os.devnull:
            return True
        real = os.path.realpath(os.fsdecode(path)) if path else ""
        return real == self.folder or real.startswith(self.folder + os.sep)


PROCESSES = {"os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn"}
CHANGES = {"os.remove": 1, "os.rename": 2, "os.mkdir": 1, "os.rmdir": 1, "os.link": 2}
CHANGES |= {"os.symlink": 2, "os.truncate": 1, "os.chmod": 1, "os.chown": 1, "os.utime": 1}
CHANGES |= {"shutil.rmtree": 1, "shutil.move": 2, "os.listxattr": 0, "os.setxattr": 1}


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


def run_case(
    kind: Kind, work: Path, name: str, random: Random, watch: Watch | None = None
) -> tuple[str, bool, str]:
    """Damage one file of a folder and read it.

    Returns:
        Read, refused or fault; whether a plain parser takes the file; what the fault was.
    """
    data = kind.mutate((work / name).read_bytes(), random)
    (work / name).write_bytes(data)
    before = stamps(work)
    outcome, past = "read", parses(kind, data)
    for reader in kind.readers:
        harm = ""
        try:
            with limited(), watched(watch):
                reader(work)
        except ConsolidateError as error:
            outcome = "refused"
            try:
                check_message(error)
            except HarmError as unplain:
                harm = str(unplain)
        except (Exception, TooLongError, HarmError) as error:
            harm = _short(error)
        if watch is not None and watch.found:  # even if the reader went on
            harm, watch.found = watch.found, ""
        if not harm and stamps(work) != before:
            harm = "reading changed a file"
        if harm:
            return "fault", past, harm
    return outcome, past, ""


def stamps(folder: Path) -> list[tuple[str, int, int, int]]:
    """List all files with what a change of them changes: number, size and time."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            status = os.lstat(path := os.path.join(parent, name))
            found.append((path, status.st_ino, status.st_size, status.st_mtime_ns))
    return sorted(found)


def parses(kind: Kind, data: bytes) -> bool:
    """Whether the format's plain parser takes the bytes."""
    try:
        kind.parse(data)
    except (Exception, RecursionError):
        return False
    return True


@contextmanager
def watched(watch: Watch | None) -> Iterator[None]:
    """Watch the block."""
    if watch is None:
        yield
        return
    watch.on = True
    try:
        yield
    finally:
        watch.on = False


def _short(error: BaseException) -> str:
    """Say where an exception came from: the last line of ours, and the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if str(ROOT) in f.filename and "scripts" not in f.filename] or frames
    places = " → ".join(f"{Path(f.filename).name}:{f.lineno}" for f in (ours[-1], frames[-1]))
    return f"{type(error).__name__} at {places}: {' '.join(str(error).split())[:150]}"


def run_cases(kind: Kind, key: str, cases: Sequence[int], send: Callable[[Any], None]) -> None:
    """Run cases in a fork, whose memory is bounded, and send what comes of each."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="inputs-") as temporary:
        tempfile.tempdir = temporary
        original, work = Path(temporary, "original"), Path(temporary, "case")
        original.mkdir()
        files = kind.write(original)
        (original / "evil.py").write_text("raise SystemExit('code of the folder ran')\n")
        good = contents(original)
        for reader in kind.readers:
            reader(original)  # what is not damaged is read
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        watch = Watch(Path(temporary))
        shutil.copytree(original, work)
        for case in cases:
            random = Random(f"{key} {case}")
            name = random.choice(files)
            found = run_case(kind, work, name, random, watch)
            send(found)
            if found[0] == "fault":
                shutil.rmtree(work)
                shutil.copytree(original, work)
            else:  # nothing else was changed
                shutil.copyfile(original / name, work / name)
        if contents(original) != good:
            send(("fault", False, "the original was changed"))
        tempfile.tempdir = None


def in_fork(
    kind: Kind, key: str, cases: Sequence[int]
) -> tuple[list[tuple[str, bool, str]], float]:
    """Run cases in forks of this process; the case at which one dies has a fault.

    Returns:
        What `run_case` returned of each; the seconds of computing that they took.
    """
    found: list[tuple[str, bool, str]] = []
    cpu = 0.0
    while len(found) < len(cases):
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            os.close(reading)
            with open(writing, "w", encoding="utf-8", errors="replace") as pipe:

                def send(outcome: Any, pipe: Any = pipe) -> None:
                    pipe.write(json.dumps(outcome) + "\n")
                    pipe.flush()

                try:
                    run_cases(kind, key, cases[len(found) :], send)
                    os._exit(0)
                except BaseException as error:
                    traceback.print_exception(error)
                finally:
                    os._exit(1)
        os.close(writing)
        with open(reading, encoding="utf-8") as pipe:
            before = len(found)
            found += [tuple(json.loads(line)) for line in pipe]
        _, status, used = os.wait4(child, 0)
        code, cpu = os.waitstatus_to_exitcode(status), cpu + used.ru_utime + used.ru_stime
        if code and len(found) < len(cases):
            found.append(("fault", False, f"the process ended with {code}"))
            if len(found) == before + 1 and before == 0 and code == 1:
                raise RuntimeError(f"{key}: the undamaged files cannot be read")
    return found, cpu


def attack(
    path: Path,
    count: int,
    seed: int,
    deadline: float,
    chosen: Mapping[str, Kind] | None = None,
    chunk: int = CHUNK,
) -> list[Record]:
    """Read N damaged files, evenly over the kinds, unless the time is over; add to the records.

    A case depends on the seed, its kind and its number only.
    """
    if chosen is None:
        import_all()
    torch.set_num_threads(1)
    records, found = read_records(path), kinds() if chosen is None else chosen
    each = -(-count // len(found))
    done: dict[str, dict[int, int]] = {name: {} for name in found}  # the first case: how many
    for record in records:
        if record["seed"] == seed:
            done.setdefault(record["kind"], {})[record["first"]] = record["cases"]
    while time.monotonic() < deadline:
        name = min(found, key=lambda kind: sum(done[kind].values()))
        first = 0
        while first in done[name]:
            first += done[name][first]
        if first >= each:
            break
        cases = range(first, min(each, first + chunk))
        outcomes, cpu = in_fork(found[name], f"{seed} {name}", cases)
        counts = Counter(outcome for outcome, _, _ in outcomes)
        record = {
            "kind": name,
            "seed": seed,
            "first": first,
            "cases": len(cases),
            "read": counts["read"],
            "refused": counts["refused"],
            "past": sum(past for _, past, _ in outcomes),
            "faults": [
                [first + case, what]
                for case, (outcome, _, what) in enumerate(outcomes)
                if outcome == "fault"
            ],
            "cpu": round(cpu, 2),
        }
        for case, what in record["faults"]:
            print(f"{name}, case {case}: {what}", file=sys.stderr)
        done[name][first] = len(cases)
        records.append(record)
        add_record(path, record)
    return records


def import_all() -> None:
    """Import what the readers import late, so that no case does."""
    names = ["matplotlib.backends.backend_agg", "PIL.Image", "pyarrow.parquet", "datasets", "peft"]
    names += ["transformers.models.bert.modeling_bert", "transformers.models.gpt2.modeling_gpt2"]
    for name in names:
        if installed(name.partition(".")[0].replace("PIL", "Pillow")):
            importlib.import_module(name)
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.disable_progress_bar()


def main() -> int:
    """Read damaged files, and print the faults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path)
    parser.add_argument("--count", type=int, default=INPUTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=180)
    parser.add_argument("--kind", action="append", help="only this kind of file")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    import_all()
    chosen = {k: v for k, v in kinds().items() if k in options.kind} if options.kind else None
    records = attack(options.records, options.count, options.seed, deadline, chosen)
    return any(record["faults"] for record in records)


if __name__ == "__main__":
    sys.exit(main())
