"""JSON and TOML from files, read strictly and converted to the types of their fields by msgspec."""

import json
import math
import re
import threading
from typing import Any, TypeVar

import msgspec

from formats.errors import InputError, NonFiniteError
from formats.fields import PATTERNS
from formats.wording import shown

T = TypeVar("T")

_WORDS = {
    " | null`": "`",
    "`str` of length >= 1": "a string that is not empty",
    "`str`": "a string",
    "`int`": "an integer",
    "`float`": "a number",
    "`bool`": "true or false",
    "`array`": "a list",
    "`object`": "an object",
    "`Path`": "a path",
}
_MESSAGE = re.compile(
    r"(?P<what>Object (?:contains unknown|(?P<missing>missing required)) field"
    r" `(?P<field>.*?)`|.*?)"
    r"(?: - at (?P<key>`key` in )?`\$(?P<path>[^`]*)`)?",
    re.DOTALL,
)
_STEP = re.compile(r"\.([^.`\[]+)|\[(\d+|\.\.\.)\]")
# msgspec 0.20 to 0.22 examine a type at its first use, and a second thread that uses it meanwhile
# crashes the process.
_ALONE = threading.Lock()


def strict_json(data: bytes) -> Any:
    """Read JSON in UTF-8; a duplicate key, NaN or a lone surrogate raises a `ValueError`."""

    def no_constant(token: str) -> None:
        raise ValueError(f"{token} is not a JSON number")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members: dict[str, Any] = {}
        for name, value in pairs:
            if name in members:
                raise ValueError(f"the key {shown(name)} appears twice in one object")
            members[name] = value
        return members

    content = json.loads(
        data.decode("utf-8"), parse_constant=no_constant, object_pairs_hook=no_duplicates
    )
    if b"\\u" in data:
        json_bytes(content)
    return content


def json_bytes(content: Any) -> bytes:
    """Write JSON in UTF-8 with an indent of two; a lone surrogate is a `ValueError`."""
    try:
        return json.dumps(content, ensure_ascii=False, indent=2).encode()
    except UnicodeEncodeError as error:
        found = error.object[max(0, error.start - 20) : error.end]
        raise ValueError(f"expected valid Unicode (no lone surrogate), found {found!r}") from None


def converted(content: Any, kind: type[T], source: str, place: str = "$") -> T:
    """Convert parsed content to `kind`, whose field types state all that is allowed.

    Raises InputError, or NonFiniteError for a number that is not finite; both name the file
    `source`, the place in it (`$.tasks[0].name`), what was expected and what was found.
    """
    try:
        with _ALONE:
            return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        text = str(error)
    match = _MESSAGE.fullmatch(text)
    assert match is not None
    path, found = _found(content, kind, match)
    where = at(source, place + path)
    if match["field"] is not None:
        what = "is missing" if match["missing"] else "is unknown"
        raise InputError(f"{where}: the field {shown(match['field'])} {what}")
    expected = match["what"].removeprefix("Expected ").partition(", got ")[0]
    if expected == "Number out of range" or (isinstance(found, float) and not math.isfinite(found)):
        raise NonFiniteError(f"{where}: expected a finite number, found {shown(found)}")
    for theirs, ours in (PATTERNS | _WORDS).items():
        expected = expected.replace(theirs, ours)
    raise InputError(f"{where}: expected {expected}, found {shown(found)}")


def at(source: str, place: str) -> str:
    """Name a place in a file; `$`, all of it, is the file itself."""
    return source if place == "$" else f"{source}, {place}"


def _found(content: Any, kind: Any, match: re.Match[str]) -> tuple[str, Any]:
    """Return the place that msgspec's message names, and the value found there."""
    path, value = "", content
    try:
        for name, index in _STEP.findall(match["path"] or ""):
            key = name or (
                _culprit(content, kind, match[0], value) if index == "..." else int(index)
            )
            path += f".{name}" if name else f"[{shown(key)}]"
            value = value[key]
    except (LookupError, TypeError, AttributeError):
        return "", content  # the name of an unknown field can look like a place
    if match["key"]:
        return f"{path}, a name", _culprit(content, kind, match[0], value)
    return path, value


def _culprit(content: Any, kind: Any, text: str, members: dict[str, Any]) -> str:
    """Find by bisection the member that msgspec refuses, whose name it gives only as [...]."""
    # `members` is a part of `content`, so removing half of them changes what msgspec converts
    items = list(members.items())
    while len(items) > 1:
        half = items[: len(items) // 2]
        members.clear()
        members.update(half)
        try:
            msgspec.convert(content, kind)
            refused = False
        except msgspec.ValidationError as error:
            refused = str(error) == text
        items = half if refused else items[len(half) :]
    members.clear()
    members.update(items)
    return items[0][0]
