"""What several messages say alike."""

import json
from collections.abc import Collection, Mapping
from difflib import get_close_matches


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
    """Offer the known names nearest to one that is not known; nothing where none is near."""
    near = get_close_matches(name, known)
    return f"Did you mean {' or '.join(near)}?" if near else ""
