"""Bounds on texts: how many tokens are kept, and how much of a text is tokenized for them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from formats.errors import InputError

T = TypeVar("T", str, list[str])

_UNITS = 64  # characters, or words, for each token that is kept
_LEAST = 1 << 16


def stated_length(tokenizer: Any, folder: Path) -> int | None:
    """Return the tokenizer's `model_max_length`; None for a number that means no limit."""
    found = tokenizer.model_max_length
    if isinstance(found, bool) or not isinstance(found, int | float) or not found >= 1:
        raise InputError(
            f"{folder / 'tokenizer_config.json'}: model_max_length: expected a number from 1, "
            f"found {found!r:.40}; correct it"
        )
    return int(found) if found < 10**9 else None


def begin(value: T, tokens: Callable[[T], int], most: int, *, last: bool = False) -> T:
    """Return as much of a long text, or list of words, as its first `most` tokens depend on.

    With `last` the end of the text, for its last tokens. A text of at most 65,536 characters or 64
    a token is returned whole. Of others the part grows until it has 2·`most` tokens, and ends at a
    space, if it has one. So the tokens that are kept are those of the whole text: always where the
    tokenizer splits at spaces first, and for others unless a token depends on text that is `most`
    tokens away, as only a unigram model's may, in repeated letters or spaces.
    """
    size = max(_LEAST, _UNITS * most)
    while len(value) > size:
        part = value[-size:] if last else value[:size]
        if isinstance(part, str):
            at = part.find(" ") if last else part.rfind(" ")
            inner = part[at:] if last else part[:at]
            part = inner if at >= 0 and len(inner) > size // 2 else part
        if tokens(part) >= 2 * most:
            return part
        size *= 4
    return value


def shortened(
    tokenizer: Any, value: T, most: int, *, last: bool, kinds: Sequence[str], **options: Any
) -> T:
    """Return the `begin` of a text, or of a list of words, for a tokenizer.

    `kinds` are the arguments that the text may become: ``text`` and ``text_target``. Of two texts
    of a pair that both exceed the bound, the odd token may go to the other one.
    """

    def tokens(part: T) -> int:
        given: list[dict[str, Any]] = [{kind: part} for kind in kinds]
        encoded = (tokenizer(**one, add_special_tokens=False, **options) for one in given)
        return min(len(one["input_ids"]) for one in encoded)

    return begin(value, tokens, most, last=last)
