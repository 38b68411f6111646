"""Confirm records of the trade-off that earlier code made, by repeating some with the new code.

    .venv/bin/python scripts/experiments/tasks/confirm_tradeoff.py --data-dir tradeoff-data

Of every method and setting whose records are of one earlier code, the quickest unit is done again.
If all its figures are the same to the last digit kept, the others get the digest of the present
code, and name the code that made them; if one differs, all stay as they are, and tradeoff.py does
them again. The machine must be that of the records. Records of other versions of packages or
another number of threads than those of now are left as they are, and named.

One unit stands for all seeds, rates and strengths of a method: a change of code that acts only in
others of them is not noticed.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from formats.atomic import write_file
from scripts.experiments.lib.records import (
    Figures,
    Record,
    Unit,
    append_record,
    line,
    read_records,
    rounded,
)
from scripts.experiments.lib.sittings import installed, timed
from scripts.experiments.tasks import tradeoff

Key = tuple[str, str]
"""A method, and the digest of the code that made its records."""


def now(unit: Unit) -> Unit:
    """Return the same unit of the present code."""
    code = tradeoff.code(unit.experiment, unit.method)
    return replace(unit, settings={**unit.settings, "code": code})


def outdated(name: str, records: Iterable[Record]) -> dict[Key, list[Record]]:
    """Sort the records of earlier code that the present one has not made: quickest first."""
    records = list(records)
    done = {record.unit.digest for record in records}
    found: dict[Key, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda one: one.seconds):
        unit = record.unit
        if unit.method in tradeoff.GRIDS[name] and now(unit).digest not in done:
            found[unit.method, unit.settings["code"]].append(record)
    return found


def repeated(name: str, key: Key, records: Sequence[Record]) -> tuple[Record, Record] | None:
    """Return a record of earlier code and the present one's, if both have done the same unit.

    The present code's has really been made by it, with the same versions of packages: no record
    of yet another code that was confirmed.
    """
    by_digest = {record.unit.digest: record for record in records}
    for record in records:
        unit = record.unit
        same = by_digest.get(now(unit).digest)
        if (unit.method, unit.settings["code"]) != key or same in (None, record):
            continue
        if same.made_by is None and same.versions == record.versions:
            return record, same
    return None


def compared(figures: Figures) -> Figures:
    """Return the figures as they are recorded, without times."""
    return {key: rounded(value) for key, value in figures.items() if key != "tuning_seconds"}


def carried(records: Sequence[Record], key: Key) -> list[Record]:
    """Give the records of this method and code the digest of the present code."""
    digests = {record.unit.digest for record in records}
    found = []
    for record in records:
        unit = record.unit
        if (unit.method, unit.settings["code"]) == key and now(unit).digest not in digests:
            record = replace(record, unit=now(unit), made_by=record.made_by or key[1])
        found.append(record)
    return found


def confirm(name: str, path: Path, raw: Path) -> None:
    """Confirm what can be confirmed of a setting.

    Args:
        name: Of the setting.
        path: Its file of records.
        raw: The folder of raw data.
    """
    versions = installed(tradeoff.KIND.packages)
    for key in outdated(name, read_records(path)):
        method, code = key
        others = outdated(name, read_records(path)).get(key)
        if not others:  # those of another code were confirmed for the same units
            continue
        if any(record.versions != versions for record in others):
            print(f"{name}: {method}: code {code} ran with other versions: to be done again")
            continue
        if repeated(name, key, read_records(path)) is None:
            unit = now(others[0].unit)
            measure = partial(tradeoff.measure, name, raw=raw)
            append_record(path, timed(measure, unit, tradeoff.KIND.packages))
        records = read_records(path)
        pair = repeated(name, key, records)
        assert pair is not None
        before, after = (compared(record.figures) for record in pair)
        if before != after:
            print(f"{name}: {method}: other figures than those of code {code}: to be done again")
            continue
        more = len(outdated(name, records).get(key, ()))
        write_file(path, b"".join(map(line, carried(records, key))))
        print(f"{name}: {method}: the same figures: {more} more records are confirmed")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help=tradeoff.KIND.data_help)
    parser.add_argument("--only", nargs="+", choices=tradeoff.SETTINGS, default=tradeoff.SETTINGS)
    options = parser.parse_args()
    for name in options.only:
        path = tradeoff.KIND.results / f"{name}.jsonl"
        if outdated(name, read_records(path)):
            confirm(name, path, options.data_dir.resolve())
        else:
            print(f"{name}: no records of earlier code", file=sys.stderr)


if __name__ == "__main__":
    main()
