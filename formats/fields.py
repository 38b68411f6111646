"""Types of the fields of files, with what they may be; msgspec converts to them."""

import sys
from typing import Annotated

from msgspec import Meta

PATTERNS: dict[str, str] = {}
"""What a message says in place of msgspec's words for a pattern."""

_MOST = sys.float_info.max


def whole(pattern: str, words: str) -> Meta:
    """Constrain a string to match a pattern from end to end, which `words` tell in a message."""
    meta = Meta(pattern=rf"\A(?:{pattern})\Z")
    PATTERNS[f"`str` matching regex {meta.pattern!r}"] = words
    return meta


Text = Annotated[str, Meta(min_length=1)]
Hex = Annotated[str, whole("[0-9a-f]{64}", "a SHA-256 of 64 lower-case hexadecimal digits")]
Number = Annotated[float, Meta(ge=-_MOST, le=_MOST)]
NotNegative = Annotated[float, Meta(ge=0, le=_MOST)]
Share = Annotated[float, Meta(ge=0, le=1)]
Natural = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Count = Annotated[int, Meta(ge=1, le=2**63 - 1)]
