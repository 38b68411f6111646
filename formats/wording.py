"""Names in messages: any text may be one, and there may be many."""

from collections.abc import Sequence


def printable(text: str, keep: str = "") -> str:
    """Escape what is not printable: names from files could steer a terminal, or turn a line."""
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def few(names: Sequence[str], most: int) -> str:
    """List the first names, and count the others."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
