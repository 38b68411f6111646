"""Confirm records that earlier code made, by repeating some with the new code.

    .venv/bin/python scripts/experiments/tasks/confirm_records.py --data-dir tradeoff-data

They are those of the trade-off, and of the Fishers without data. Of every method and setting, or
setting and number of texts, whose records are of one earlier code the quickest unit is done again.
If all its figures are the same to the last digit kept, the others get the digest of the present
code, and name the code that made them; if one differs, all stay as they are, and their experiment
does them again. The machine must be that of the records. Records of other versions of packages or
another number of threads than those of now are left as they are, and named.

One unit stands for all seeds, rates and strengths of a method, or all seeds and sources of texts: a
change of code that acts only in others of them is not noticed.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
from scripts.experiments.tasks import tradeoff, without_data

Key = tuple[str, str]
"""What a unit stands for, and the digest of the code that made the records of such units."""


class Recorded(NamedTuple):
    """A file of records: how the present code makes one, and what one stands for."""

    path: Path
    code: Callable[[Unit], str]  # the digest of the present code for a unit
    measure: Callable[..., Figures]  # does a unit, with the folder of raw data as `raw`
    stands_for: Callable[[Unit], str]
    packages: tuple[str, ...]

    def now(self, unit: Unit) -> Unit:
        """Return the same unit of the present code."""
        return replace(unit, settings={**unit.settings, "code": self.code(unit)})

    def key(self, unit: Unit) -> Key:
        """Return what a unit stands for, and its code."""
        return self.stands_for(unit), unit.settings["code"]


def of_tradeoff(name: str, path: Path) -> Recorded:
    """Describe the records of a setting of the trade-off."""

    def code(unit: Unit) -> str:
        tried = unit.method in tradeoff.GRIDS[name]
        return tradeoff.code(name, unit.method) if tried else str(unit.settings["code"])

    return Recorded(
        path,
        code=code,
        measure=partial(tradeoff.measure, name),
        stands_for=lambda unit: unit.method,
        packages=tradeoff.KIND.packages,
    )


def of_fishers(path: Path) -> Recorded:
    """Describe the records of Fishers without data."""
    return Recorded(
        path,
        code=lambda unit: without_data.code(unit.settings["setting"]),
        measure=without_data.measure,
        stands_for=lambda unit: f"{unit.settings['setting']}, {unit.settings['texts']} texts",
        packages=without_data.KIND.packages,
    )


def outdated(of: Recorded, records: Iterable[Record]) -> dict[Key, list[Record]]:
    """Sort the records of earlier code that the present one has not made: quickest first."""
    records = list(records)
    done = {record.unit.digest for record in records}
    found: dict[Key, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda one: one.seconds):
        if of.now(record.unit).digest not in done:
            found[of.key(record.unit)].append(record)
    return found


def repeated(of: Recorded, key: Key, records: Sequence[Record]) -> tuple[Record, Record] | None:
    """Return a record of earlier code and the present one's, if both have done the same unit.

    The present code's has really been made by it, with the same versions of packages: no record
    of yet another code that was confirmed.
    """
    by_digest = {record.unit.digest: record for record in records}
    for record in records:
        same = by_digest.get(of.now(record.unit).digest)
        if of.key(record.unit) != key or same in (None, record):
            continue
        if same.made_by is None and same.versions == record.versions:
            return record, same
    return None


def compared(figures: Figures) -> Figures:
    """Return the figures as they are recorded, without times."""
    return {key: rounded(value) for key, value in figures.items() if key != "tuning_seconds"}


def carried(of: Recorded, records: Sequence[Record], key: Key) -> list[Record]:
    """Give the records of this method and code the digest of the present code."""
    digests = {record.unit.digest for record in records}
    found = []
    for record in records:
        unit = of.now(record.unit)
        if of.key(record.unit) == key and unit.digest not in digests:
            record = replace(record, unit=unit, made_by=record.made_by or key[1])
        found.append(record)
    return found


def confirm(of: Recorded, raw: Path) -> None:
    """Confirm what can be confirmed in a file of records, with the folder of raw data."""
    versions, path = installed(of.packages), of.path
    for key in outdated(of, read_records(path)):
        what, code = f"{path.stem}: {key[0]}", key[1]
        others = outdated(of, read_records(path)).get(key)
        if not others:  # those of another code were confirmed for the same units
            continue
        if any(record.versions != versions for record in others):
            print(f"{what}: code {code} ran with other versions: to be done again")
            continue
        if repeated(of, key, read_records(path)) is None:
            unit = of.now(others[0].unit)
            append_record(path, timed(partial(of.measure, raw=raw), unit, of.packages))
        records = read_records(path)
        pair = repeated(of, key, records)
        assert pair is not None
        before, after = (compared(record.figures) for record in pair)
        if before != after:
            print(f"{what}: other figures than those of code {code}: to be done again")
            continue
        more = len(outdated(of, records).get(key, ()))
        write_file(path, b"".join(map(line, carried(of, records, key))))
        print(f"{what}: the same figures: {more} more records are confirmed")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help=tradeoff.KIND.data_help)
    every = {
        name: of_tradeoff(name, tradeoff.KIND.results / f"{name}.jsonl")
        for name in tradeoff.SETTINGS
    }
    every[without_data.NAME] = of_fishers(without_data.KIND.results / f"{without_data.NAME}.jsonl")
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    options = parser.parse_args()
    for name in options.only:
        if outdated(every[name], read_records(every[name].path)):
            confirm(every[name], options.data_dir.resolve())
        else:
            print(f"{name}: no records of earlier code", file=sys.stderr)


if __name__ == "__main__":
    main()
