"""Units of work of the paper's experiments, and the records of those that are done.

A record is one JSON line: what was measured (experiment, method, seed, settings and the digest of
these four), what came of it, how long it took and with which versions. Files of records can be put
together line by line, so that the hours may be spread over many sittings and machines.
"""

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

Settings = dict[str, Any]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """One method of one experiment with one seed: what is done or not done as a whole."""

    experiment: str
    method: str
    seed: int
    settings: Settings

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of all four, the first 16 digits."""
        text = json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Record:
    """A unit that is done."""

    unit: Unit
    figures: Figures
    seconds: float  # by the clock
    versions: dict[str, str]
    processor_seconds: float | None = None
    made_by: str | None = None  # the digest of earlier code, whose figures were confirmed since


class RecordsError(Exception):
    """A file of records is not what it should be; the message says where and what to do."""


NOT_RUN = "not run yet"


class Row(NamedTuple):
    """A line of the table that sets figures beside the paper's."""

    figure: str
    published: str
    here: str = NOT_RUN
    difference: str = "–"
    reason: str = "–"


class Findings(NamedTuple):
    """What the records of one experiment say."""

    text: str  # Markdown, without the heading
    rows: list[Row]


class Experiment(NamedTuple):
    """One script's part: what to do, how one unit is done, and what the records say.

    Attributes:
        name: Of its records and its page.
        title: The heading of its page.
        seconds: About how long a unit takes on one core.
        plan: From the records so far, and whether it is a quick run, to the units known by now:
            those of the seeds are known once the search for a strength is done.
        measure: Does one unit.
        report: From the records to the findings; writes NAME.csv and .png into the folder.
        alone: Whether nothing else may be done at the same time, which its times would tell.
        packages: That it needs beside the others, and whose versions are recorded too.
    """

    name: str
    title: str
    seconds: Callable[[Unit], float]
    plan: Callable[[Sequence[Record], bool], list[Unit]]
    measure: Callable[[Unit], Figures]
    report: Callable[[Sequence[Record], Path], Findings]
    alone: bool = False
    packages: tuple[str, ...] = ()


def read_records(path: Path) -> list[Record]:
    """Read a file of records, a line that was not written to its end left out.

    Args:
        path: A `.jsonl` file; none is as good as an empty one.

    Returns:
        One record for each digest, the first in the file.

    Raises:
        RecordsError: A line is no record, or its digest is not that of its unit.
    """
    records: dict[str, Record] = {}
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n") and not _is_json(line):
            break
        try:
            found = json.loads(line)
            unit = Unit(*(found[key] for key in ("experiment", "method", "seed", "settings")))
            record = Record(
                unit,
                found["figures"],
                found["seconds"],
                found["versions"],
                found.get("processor_seconds"),
                found.get("made_by"),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise RecordsError(
                f"{path}, line {number}: not a record ({error}); take it out"
            ) from None
        if unit.digest != found.get("digest"):
            raise RecordsError(
                f"{path}, line {number}: the digest is {found.get('digest')}, that of the settings "
                f"is {unit.digest}: they were changed by hand; take the line out"
            )
        if found.get("figures_digest", figures_digest(record.figures)) != figures_digest(
            record.figures
        ):
            raise RecordsError(
                f"{path}, line {number}: the digest of the figures is not that of the line: they "
                "were changed by hand; take the line out"
            )
        records.setdefault(unit.digest, record)
    return list(records.values())


def figures_digest(figures: Figures) -> str:
    """SHA-256 of the canonical JSON of the figures of a line, the first 16 digits."""
    stored = json.loads(json.dumps(figures))  # numbers as keys become strings
    text = json.dumps(stored, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def line(record: Record) -> bytes:
    """Write a record as a line of a file of records."""
    figures = rounded(record.figures)
    found = {
        "digest": record.unit.digest,
        **asdict(record.unit),
        "figures": figures,
        "figures_digest": figures_digest(figures),  # lines from before have none
        "seconds": round(record.seconds, 1),
        "processor_seconds": rounded(record.processor_seconds),
        "versions": record.versions,
    }
    if record.made_by is not None:
        found["made_by"] = record.made_by
    return json.dumps(found, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def append_record(path: Path, record: Record) -> None:
    """Add a line to a file of records, in place of one that was not written to its end.

    Args:
        path: Created with its folder where it is missing.
        record: What is added.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = line(record)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        before, newline, last = file.read().rpartition(b"\n")
        if _is_json(last):  # the newline alone is missing
            text = b"\n" + text
        else:
            file.truncate(len(before) + len(newline))
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def rounded(value: Any) -> Any:
    """Round every float inside to six digits, which keeps the lines short."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def chosen(records: Iterable[Record], **settings: Any) -> list[Record]:
    """Return the records whose settings, or method, have these values, ordered by seed."""
    found = [
        record
        for record in records
        if all(
            (record.unit.method if key == "method" else record.unit.settings.get(key)) == value
            for key, value in settings.items()
        )
    ]
    return sorted(found, key=lambda record: record.unit.seed)


def best(records: Sequence[Record]) -> Record:
    """Return the record with the best score on validation data, the first where several have it."""
    return max(records, key=lambda record: record.figures["validation"])


class Mean(NamedTuple):
    """A mean over seeds, with the standard error of it; NaN of a single one."""

    value: float
    error: float
    seeds: int


def mean(values: Sequence[float]) -> Mean:
    """Return the mean of one value a seed, and s/√n, s the deviation with n − 1."""
    count = len(values)
    middle = math.fsum(values) / count
    if count < 2:
        return Mean(middle, math.nan, count)
    spread = math.fsum((value - middle) ** 2 for value in values) / (count - 1)
    return Mean(middle, math.sqrt(spread / count), count)


def in_percent(found: Mean, seeds: int) -> str:
    """Write a mean of shares as per cent, with its error and how many seeds of those are done."""
    error = "" if math.isnan(found.error) else f" ± {100 * found.error:.2f}"
    done = f"{found.seeds} seed{'s' * (found.seeds > 1)}"
    if found.seeds < seeds:
        done = f"{found.seeds} of {seeds} seeds"
    return f"{100 * found.value:.2f}{error} % ({done})"


def signed(difference: float, digits: int = 2) -> str:
    """Write a difference with its sign; one that rounds to 0 has a plus."""
    return f"{difference:+z.{digits}f}".replace("-", "−")


def accuracy_row(
    figure: str, published: str | None, values: Sequence[float], seeds: int, reason: str = "–"
) -> Row:
    """Set accuracies beside a published one.

    Args:
        figure: What it is.
        published: In per cent, with the digits that were printed; None where nothing was.
        values: Ours, one a seed.
        seeds: How many there are to be.
        reason: Of the difference.
    """
    theirs = "–" if published is None else f"{published} %"
    if not values:
        return Row(figure, theirs)
    found = mean(values)
    difference = "–"
    if published is not None:
        digits = len(published.partition(".")[2])
        difference = signed(100 * found.value - float(published), digits)
    return Row(figure, theirs, in_percent(found, seeds), difference, reason)
