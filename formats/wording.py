"""Shared parts of messages, safe for any name and any number of names."""

import json
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path


def shown(value: object, limit: int = 80) -> str:
    """Show a value from a file on one line: control characters escaped, long ones cut."""
    if isinstance(value, Mapping):
        return f"an object of {len(value)} members"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int) and abs(value) > 10**limit:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str) and len(value) > limit:
        return repr(value[:limit]) + "…"
    return repr(value)


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Suggest the known names that are similar to an unknown one, if there are any."""
    return suggestion(get_close_matches(name, known)).removeprefix("; ")


def suggestion(near: Sequence[str]) -> str:
    """Suggest names as the end of a message, if there are any."""
    return f"; did you mean {' or '.join(near)}?" if near else ""


def neighbours(path: Path) -> list[str]:
    """List the names in the folder of a missing path that are similar to its own."""
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return get_close_matches(path.name, [name for name in names if name != path.name])


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if it has none."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


def printable(text: str, keep: str = "") -> str:
    """Escape unprintable characters: names from files could control a terminal or break a line."""
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def few(names: Sequence[str], most: int) -> str:
    """List the first names, and count the others."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
