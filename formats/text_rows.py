"""Rows of text files: JSON Lines, CSV and TSV, indexed by offsets in memory; JSON arrays."""

import array
import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from formats.errors import InputError
from formats.rows import Rows, check_unchanged, stamp

_BOM = b"\xef\xbb\xbf"
_BUFFER = 1 << 20
_ROWS_LOOKED_AT_FOR_COLUMNS = 100
MAX_JSON_ARRAY_BYTES = 256 * 2**20


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> InputError:
    return InputError(
        f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; "
        "save the file with the encoding UTF-8"
    )


class _LineRows(Rows):
    """Rows of a text file, by the byte and the line, counted from 1, at which each begins.

    A file that changes after it was opened is refused; a byte order mark is skipped.
    """

    def __init__(self, path: Path) -> None:
        self.name, self.path = path.name, path
        self._starts = array.array("q")  # and the end of the last row
        self._lines = array.array("I")
        with path.open("rb", buffering=_BUFFER) as file:
            self._stamp = stamp(file.fileno())
            position = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
            file.seek(position)
            self._starts.append(self._scan(file, position))

    def _scan(self, file: IO[bytes], position: int) -> int:
        """Find the starts of the rows from a position on; return the end of the last one."""
        for number, line in enumerate(file, start=1):
            if line.strip():
                self._add(position, number)
            position += len(line)
        return position

    def _add(self, start: int, line: int) -> None:
        self._starts.append(start)
        self._lines.append(line)

    def __len__(self) -> int:
        return len(self._lines)

    def _place(self, i: int) -> str:
        return f"{super()._place(i)} (line {self._lines[i]})"

    def _text(self, i: int) -> str:
        """Return row `i`, with its separator."""
        start, end = self._starts[i : i + 2]
        with self.path.open("rb", buffering=0) as file:
            check_unchanged(self.path, self._stamp, stamp(file.fileno()))
            file.seek(start)
            record = file.read(end - start)
        try:
            return record.decode()
        except UnicodeDecodeError as error:
            line = self._lines[i] + record.count(b"\n", 0, error.start)
            raise _not_utf8(self.path, line, error) from None


class JsonLinesRows(_LineRows):
    """One JSON object per line; blank lines are skipped but counted.

    The columns are the keys of the first 100 rows in order of appearance; a row that lacks one of
    them has None there, and keys that first appear later stay in their rows.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if not len(self):
            raise InputError(f"{path} is empty: expected one JSON object per line")
        first = [self._parse(i) for i in range(min(len(self), _ROWS_LOOKED_AT_FOR_COLUMNS))]
        self.columns = list(dict.fromkeys(key for row in first for key in row))
        if not self.columns:
            raise InputError(f"{path}: expected rows with columns, found only empty objects")

    def _parse(self, i: int) -> dict[str, Any]:
        # lines that are blank to the scan may follow the row; JSON has less whitespace than ASCII
        value = _loads(self._text(i).rstrip(" \t\n\r\v\f"), self.path, self._lines[i])
        if not isinstance(value, dict):
            raise InputError(
                f"{self.path}, line {self._lines[i]}: expected a JSON object "
                f'such as {{"text": "…", "label": 0}}, found {_json_kind(value)}'
            )
        return value

    def read_row(self, i: int) -> dict[str, Any]:
        """Return row `i`."""
        return dict.fromkeys(self.columns) | self._parse(i)


class PromptRows(_LineRows):
    """One prompt per line, in the column `prompt`; blank lines are skipped but counted."""

    columns = ["prompt"]  # noqa: RUF012

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if not len(self):
            raise InputError(f"{path} is empty: expected one prompt per line")

    def read_row(self, i: int) -> dict[str, Any]:
        """Return row `i`."""
        return {"prompt": self._text(i).partition("\n")[0].rstrip("\r")}


class JsonArrayRows(Rows):
    """A small JSON file that is one array of objects, read into memory."""

    def __init__(self, path: Path) -> None:
        self.name, self.path = path.name, path
        size = path.stat().st_size
        if size > MAX_JSON_ARRAY_BYTES:
            raise InputError(
                f"{path} is one JSON array of {size / 2**20:.0f} MiB: expected at most "
                f"{MAX_JSON_ARRAY_BYTES // 2**20} MiB; save it as JSON Lines (.jsonl), one object "
                "per line, which is read row by row"
            )
        content = path.read_bytes()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            # the codec counts from after the byte order mark, the file from before it
            bom = len(_BOM) if content.startswith(_BOM) else 0
            line = content.count(b"\n", 0, bom + error.start) + 1
            raise _not_utf8(path, line, error) from None
        self._rows = _loads(text, path)
        for i, row in enumerate(self._rows):
            if not isinstance(row, dict):
                found = _json_kind(row)
                raise InputError(f"{path}, row {i + 1}: expected an object, found {found}")
        self.columns = list(dict.fromkeys(key for row in self._rows for key in row))
        if not self.columns:
            raise InputError(f"{path} is empty: expected an array of objects with columns")

    def __len__(self) -> int:
        return len(self._rows)

    def read_row(self, i: int) -> dict[str, Any]:
        """Return a copy of row `i`."""
        return dict.fromkeys(self.columns) | self._rows[i]


class CsvRows(_LineRows):
    """Comma- or tab-separated values with a header line; every value is a string.

    Fields may be quoted, and of any length. Empty lines are skipped but counted; all rows are
    checked on opening.
    """

    def __init__(self, path: Path, delimiter: str) -> None:
        # the limit is global; its default of 128 KiB is too small for a long document
        csv.field_size_limit(2**31 - 1)
        self._delimiter = delimiter
        self.columns = []
        super().__init__(path)
        if not self.columns:
            raise InputError(
                f"{path} is empty: expected a header line with the names of the columns"
            )
        if not len(self):
            raise InputError(f"{path} has a header ({', '.join(self.columns)}) but no rows")

    def _scan(self, file: IO[bytes], position: int) -> int:
        number = 0

        def decoded() -> Iterator[str]:
            nonlocal position, number
            for number, content in enumerate(file, start=1):
                position += len(content)
                try:
                    text = content.decode()
                except UnicodeDecodeError as error:
                    raise _not_utf8(self.path, number, error) from None
                yield text

        reader = csv.reader(decoded(), delimiter=self._delimiter, strict=True)
        while True:
            start, line = position, number + 1
            try:
                record = next(reader, None)
            except csv.Error as error:
                raise InputError(f"{self.path}, line {line}: {_explain(error, number)}") from None
            if record is None:
                return position
            if record and not self.columns:
                self.columns = record
                name, times = Counter(record).most_common(1)[0]
                if times > 1:
                    raise InputError(
                        f"{self.path}, line {line}: the header names column {name!r} "
                        f"{times} times; give each column a distinct name"
                    )
            elif record and len(record) != len(self.columns):
                raise InputError(
                    f"{self.path}, line {line}: expected {len(self.columns)} fields as in the "
                    f"header ({', '.join(self.columns)}), found {len(record)}; quote fields that "
                    "contain the delimiter or a line end"
                )
            elif record:
                self._add(start, line)

    def read_row(self, i: int) -> dict[str, Any]:
        """Return row `i`, every value a string."""
        # newline="\n" splits where the scan split, and keeps other line ends inside fields
        lines = io.StringIO(self._text(i), newline="\n")
        record = next(csv.reader(lines, delimiter=self._delimiter, strict=True))
        return dict(zip(self.columns, record, strict=True))


def _explain(error: csv.Error, last_line: int) -> str:
    message = str(error)
    if "unexpected end of data" in message:
        return (
            f"a quoted field begins in this row and is never closed (read up to line {last_line})"
        )
    if "new-line character" in message:
        return "found a lone carriage return; save the file with Unix or Windows line ends"
    return f"{message}; double each quote inside a quoted field"


def _loads(text: str, path: Path, line: int | None = None) -> Any:
    """Read the JSON of a line of a file, or of the whole file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        at, why = "" if line is None else f", line {line}", str(error)
        if isinstance(error, json.JSONDecodeError):
            at, why = f", line {line or error.lineno}, character {error.colno}", error.msg
        hint = "" if line is None else ": expected one JSON object per line"
        raise InputError(f"{path}{at}: not valid JSON ({why}){hint}") from None


def _json_kind(value: Any) -> str:
    kinds = {list: "an array", dict: "an object", str: "a string", bool: "a boolean"}
    return "null" if value is None else kinds.get(type(value), "a number")


def open_json(path: Path) -> Rows:
    """Open a `.json` file: an array of objects, or JSON Lines with another suffix."""
    with path.open("rb") as file:
        texts = (line.removeprefix(_BOM).strip() for line in file)
        first = next(filter(None, texts), b"")
    return JsonArrayRows(path) if first.startswith(b"[") else JsonLinesRows(path)
