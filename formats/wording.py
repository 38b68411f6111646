"""Names in messages: there may be many."""

from collections.abc import Sequence


def few(names: Sequence[str], most: int) -> str:
    """List the first names, and count the others."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
