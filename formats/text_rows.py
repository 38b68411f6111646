"""Rows of text files: JSON Lines, CSV and TSV, kept in memory as offsets; JSON arrays."""

import array
import csv
import io
import json
import os
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from formats.errors import InputError
from formats.rows import Rows

_BOM = b"\xef\xbb\xbf"
_BUFFER = 1 << 20
_ROWS_LOOKED_AT_FOR_COLUMNS = 100
MAX_JSON_ARRAY_BYTES = 256 * 2**20


def _stamp(file: Any) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> InputError:
    return InputError(
        f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8. "
        "Save the file with the encoding UTF-8."
    )


class _LineRows(Rows):
    """Rows of a text file by the byte and the line, counted from 1, at which each begins.

    The file is opened anew for each read: no handle to leak, to share after a fork or to move under
    another thread. A file that has changed since is noticed.
    """

    def __init__(self, path: Path) -> None:
        self.name, self.path = path.name, path
        self._starts = array.array("q")  # and where the last row ends
        self._lines = array.array("I")
        with path.open("rb", buffering=_BUFFER) as file:
            self._stamp = _stamp(file)
            self._starts.append(self._scan(file))

    @abstractmethod
    def _scan(self, file: IO[bytes]) -> int:
        """Find where the rows begin; return where the last one ends."""

    def _add(self, start: int, line: int) -> None:
        self._starts.append(start)
        self._lines.append(line)

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, i: int, column: str | None = None) -> str:
        """Return file, row, line and column in words."""
        place = f"{self.name}, row {i + 1} (line {self._lines[i]})"
        return place if column is None else f"{place}, column {column!r}"

    def _text(self, i: int) -> str:
        """Return row `i`, with what separates it from the next."""
        start, end = self._starts[i : i + 2]
        with self.path.open("rb", buffering=0) as file:
            if _stamp(file) != self._stamp:
                raise InputError(f"{self.path} was changed while it was being read. Start again.")
            file.seek(start)
            record = file.read(end - start)
        try:
            return record.decode()
        except UnicodeDecodeError as error:
            line = self._lines[i] + record.count(b"\n", 0, error.start)
            raise _not_utf8(self.path, line, error) from None


class JsonLinesRows(_LineRows):
    """One JSON object a line; blank lines are passed over but counted.

    The columns are the keys of the first 100 rows, in the order they are met; a row that lacks one
    of them has None there, and keys first met later are kept in their rows.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if not len(self):
            raise InputError(f"{path} is empty: expected one JSON object a line.")
        self.columns = []
        first = [self._parse(i) for i in range(min(len(self), _ROWS_LOOKED_AT_FOR_COLUMNS))]
        self.columns = list(dict.fromkeys(key for row in first for key in row))
        if not self.columns:
            raise InputError(f"{path}: the rows have no columns; they are empty objects.")

    def _scan(self, file: IO[bytes]) -> int:
        position = 0
        for number, line in enumerate(file, start=1):
            bom = len(_BOM) if position == 0 and line.startswith(_BOM) else 0
            if line[bom:].strip():
                self._add(position + bom, number)
            position += len(line)
        return position

    def _parse(self, i: int) -> dict[str, Any]:
        # what the scan took for blank lines may follow the row; JSON knows fewer blanks than ASCII
        text = self._text(i).rstrip(" \t\n\r\v\f")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            at, why = f"line {self._lines[i]}", str(error)
            if isinstance(error, json.JSONDecodeError):
                at, why = f"{at}, character {error.colno}", error.msg
            raise InputError(
                f"{self.path}, {at}: not valid JSON ({why}). Expected one JSON object a line."
            ) from None
        if not isinstance(value, dict):
            raise InputError(
                f"{self.path}, line {self._lines[i]}: expected a JSON object "
                f'such as {{"text": "…", "label": 0}}, found {_json_kind(value)}.'
            )
        return value

    def read_row(self, i: int) -> dict[str, Any]:
        """Return row `i`."""
        return _with_all_columns(self._parse(i), self.columns)


class JsonArrayRows(Rows):
    """A small JSON file that is one array of objects, held in memory."""

    def __init__(self, path: Path) -> None:
        self.name, self.path = path.name, path
        size = path.stat().st_size
        if size > MAX_JSON_ARRAY_BYTES:
            raise InputError(
                f"{path} is one JSON array of {size / 2**20:.0f} MiB, which has to be read at once."
                " Write it as JSON Lines (.jsonl), one object a line, which is read row by row."
            )
        content = path.read_bytes()
        try:
            rows = json.loads(content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            # the codec counts from behind the byte order mark, the file does not
            bom = len(_BOM) if content.startswith(_BOM) else 0
            line = content.count(b"\n", 0, bom + error.start) + 1
            raise _not_utf8(path, line, error) from None
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {error.lineno}, character {error.colno}: not valid JSON "
                f"({error.msg})."
            ) from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not valid JSON ({error}).") from None
        for i, row in enumerate(rows):
            if not isinstance(row, dict):
                raise InputError(
                    f"{path}, row {i + 1}: expected an object, found {_json_kind(row)}."
                )
        self.columns = list(dict.fromkeys(key for row in rows for key in row))
        if not self.columns:
            raise InputError(f"{path} is empty: expected an array of objects with columns.")
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def read_row(self, i: int) -> dict[str, Any]:
        """Return a copy of row `i`."""
        return _with_all_columns(self._rows[i], self.columns)


class CsvRows(_LineRows):
    """Comma- or tab-separated values with a header line; every value is a string.

    Fields may be of any length, and may be quoted with `"` to hold delimiters, line ends and
    doubled quotes. Empty lines are passed over but counted. All rows are checked at the opening.
    """

    def __init__(self, path: Path, delimiter: str) -> None:
        # the limit is the process's; the default of 128 KiB is less than one long document
        csv.field_size_limit(2**31 - 1)
        self._delimiter = delimiter
        self.columns = []
        super().__init__(path)
        if not self.columns:
            raise InputError(
                f"{path} is empty: expected a header line with the names of the columns."
            )
        if not len(self):
            raise InputError(f"{path} has a header ({', '.join(self.columns)}) but no rows.")

    def _scan(self, file: IO[bytes]) -> int:
        lines = _Lines(self.path, file)
        reader = csv.reader(lines, delimiter=self._delimiter, strict=True)
        while True:
            start, line = lines.position, lines.number + 1
            try:
                record = next(reader, None)
            except csv.Error as error:
                why = _explain(error, lines.number)
                raise InputError(f"{self.path}, line {line}: {why}.") from None
            if record is None:
                return lines.position
            if record and not self.columns:
                self.columns = self._check_header(record, line)
            elif record and len(record) != len(self.columns):
                raise InputError(
                    f"{self.path}, line {line}: {len(record)} fields, but the header has "
                    f"{len(self.columns)} ({', '.join(self.columns)}). "
                    "Quote fields that hold the delimiter or a line end."
                )
            elif record:
                self._add(start, line)

    def _check_header(self, header: list[str], line: int) -> list[str]:
        twice = [name for name in dict.fromkeys(header) if header.count(name) > 1]
        if twice:
            raise InputError(
                f"{self.path}, line {line}: the header names column {twice[0]!r} "
                f"{header.count(twice[0])} times. Give each column a name of its own."
            )
        return header

    def read_row(self, i: int) -> dict[str, Any]:
        """Return row `i`, every value a string."""
        # newline="\n" splits where the scan split, and leaves other line ends inside fields alone
        lines = io.StringIO(self._text(i), newline="\n")
        record = next(csv.reader(lines, delimiter=self._delimiter, strict=True))
        return dict(zip(self.columns, record, strict=True))


class _Lines(Iterator[str]):
    """Lines of a binary file as text; knows the byte position and number of the last line given."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path = path
        self._file = file
        self.position = 0
        self.number = 0

    def __next__(self) -> str:
        line: bytes = next(self._file)
        bom = len(_BOM) if self.position == 0 and line.startswith(_BOM) else 0
        self.position += len(line)
        self.number += 1
        try:
            return line[bom:].decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(self.path, self.number, error) from None


def _explain(error: csv.Error, last_line: int) -> str:
    message = str(error)
    if "unexpected end of data" in message:
        return (
            f"a quoted field begins in this row and is never closed (read up to line {last_line})"
        )
    if "new-line character" in message:
        return "a carriage return stands alone; save the file with the line ends of Unix or Windows"
    return f"{message}; a quote inside a quoted field is written twice"


def _with_all_columns(row: dict[str, Any], columns: list[str]) -> dict[str, Any]:
    return {**dict.fromkeys(columns), **row}


def _json_kind(value: Any) -> str:
    kinds = {list: "an array", dict: "an object", str: "a string", bool: "a truth value"}
    return "null" if value is None else kinds.get(type(value), "a number")


def open_json(path: Path) -> Rows:
    """Open a `.json` file: an array of objects, or JSON Lines under another name."""
    with path.open("rb") as file:
        first = b""
        for line in file:
            first = line.removeprefix(_BOM).strip()[:1]
            if first:
                break
    return JsonArrayRows(path) if first == b"[" else JsonLinesRows(path)
