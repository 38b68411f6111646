"""Types of the fields of files, with their constraints; msgspec converts to them."""

import sys
from typing import Annotated

from msgspec import Meta

PATTERNS: dict[str, str] = {}
"""The words that replace msgspec's description of a pattern in a message."""

_MOST = sys.float_info.max


def whole(pattern: str, words: str) -> Meta:
    """Constrain a string to match all of a pattern, which `words` describe in a message."""
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
