"""Seeded damage for `fuzz.py`: bytes, text, JSON and the headers of safetensors files."""

import copy
import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

NUMBERS: tuple[str, ...] = (
    "-1",
    "0",
    "1e999",
    "-1e308",
    "NaN",
    "Infinity",
    "-0.0",
    "0.5",
    "1e-320",
    "true",
    "null",
)
NUMBERS += (str(2**31), str(2**60), str(2**63), str(-(2**63)), "9" * 400, '"7"', "[3]", "{}")
TEXTS: tuple[str, ...] = (
    "",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "~nobody-of-this-name/x",
    "a/b/c",
    "x" * 5000,
)
TEXTS += ("\x1b[2J\x1b]0;title\x07", "\u202e\u2028\x9b", "\x00", "\ud800", "\ufeff", "é\u0301ß🙂")
TEXTS += ("<script>alert(1)</script>", "__metadata__", "__class__", "%s{0}", "NaN", "con\r\nnul")
VALUES: tuple[Any, ...] = (None, True, False, 0, -1, 0.5, float("nan"), float("inf"), 1e308, {}, [])
VALUES += (2**31, 2**60, 2**63, 10**400, [[[[[]]]]], {"a": {"b": [None]}}, [2**60, 2**60], *TEXTS)
DEPTHS = (50, 2_000, 200_000)


def flipped(data: bytes, random: Random) -> bytes:
    """Flip one to eight bits."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 8) if data else 0):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def truncated(data: bytes, random: Random) -> bytes:
    """Cut the end off."""
    return data[: random.randrange(len(data) + 1)]


def spliced(data: bytes, random: Random) -> bytes:
    """Remove, repeat or move a piece."""
    at, to = sorted(random.randrange(len(data) + 1) for _ in range(2))
    piece = data[at:to]
    where = random.randrange(len(data) + 1)
    return random.choice(
        (data[:at] + data[to:], data[:to] + piece + data[to:], data[:where] + piece + data[where:])
    )


def overwritten(data: bytes, random: Random) -> bytes:
    """Put other bytes over a piece: zeros, ones or random ones."""
    at = random.randrange(len(data) + 1)
    length = random.choice((1, 2, 4, 8, 64))
    piece = random.choice((b"\0" * length, b"\xff" * length, random.randbytes(length)))
    return data[:at] + piece + data[at + length :]


def number_replaced(data: bytes, random: Random) -> bytes:
    """Write another number in place of one."""
    places = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    if not places:
        return flipped(data, random)
    place = random.choice(places)
    return data[: place.start()] + random.choice(NUMBERS).encode() + data[place.end() :]


def text_inserted(data: bytes, random: Random) -> bytes:
    """Insert a control sequence, a path or an odd character."""
    at = random.randrange(len(data) + 1)
    text = random.choice((*TEXTS, *'{}[]",:=\n\\', "\\ud800", "\\u0000"))
    return data[:at] + text.encode("utf-8", "surrogatepass") + data[at:]


def nested(data: bytes, random: Random) -> bytes:
    """Put in brackets, many deep."""
    depth = random.choice(DEPTHS)
    at = random.randrange(len(data) + 1)
    closing = b"]" * depth if random.random() < 0.5 else b""
    return data[:at] + b"[" * depth + closing + data[at:]


BYTES = (flipped, truncated, spliced, overwritten)
TEXT = (*BYTES, number_replaced, text_inserted, nested)


def mutated_bytes(data: bytes, random: Random) -> bytes:
    """Damage bytes that are no text."""
    return _several(data, random, BYTES)


def mutated_text(data: bytes, random: Random) -> bytes:
    """Damage text."""
    return _several(data, random, TEXT)


def mutated_json(data: bytes, random: Random, repair: Callable[[Any], None] | None = None) -> bytes:
    """Damage JSON, mostly so that it is JSON still, with wrong content.

    Args:
        data: JSON.
        random: Decides.
        repair: Makes what depends on the content fit again, such as digests; used half the time.
    """
    if random.random() < 0.3:
        return mutated_text(data, random)
    content = json.loads(data)
    for _ in range(random.randint(1, 3)):
        places = list(_places(content))
        if not places:
            break
        holder, key = random.choice(places)
        _change(holder, key, random)
    if repair is not None and random.random() < 0.5:
        repair(content)
    text = json.dumps(content, ensure_ascii=random.random() < 0.5, indent=random.choice((None, 2)))
    if random.random() < 0.1:  # a key that stands there twice
        text = re.sub(r'("[^"\n]*": *[^,{}\[\]\n]+)', r"\1, \1", text, count=random.randint(1, 9))
    return text.encode("utf-8", "surrogatepass")


def mutated_safetensors(data: bytes, random: Random) -> bytes:
    """Damage a safetensors file: its header as JSON, the length of that, or any bytes."""
    length = int.from_bytes(data[:8], "little")
    header, values = data[8 : 8 + length], data[8 + length :]
    chance = random.random()
    if chance < 0.25:
        return mutated_bytes(data, random)
    if chance < 0.35:
        claim = random.choice((0, 1, length - 1, length + 1, 10**8, 2**31, 2**60, 2**64 - 1))
        return claim.to_bytes(8, "little") + header + values
    header = mutated_json(header, random)
    if random.random() < 0.2:
        values = mutated_bytes(values, random)
    return len(header).to_bytes(8, "little") + header + values


def _several(
    data: bytes, random: Random, ways: tuple[Callable[[bytes, Random], bytes], ...]
) -> bytes:
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        data = random.choice(ways)(data, random)
    return data


def _places(content: Any) -> Any:
    """Give every member and element as the object that holds it and its key."""
    keys = content if isinstance(content, dict) else range(len(content))
    for key in list(keys):
        yield content, key
        if isinstance(content[key], dict | list):
            yield from _places(content[key])


def _change(holder: Any, key: Any, random: Random) -> None:
    """Replace a value, remove it, give it another key, or wrap it."""
    value = holder[key]
    if isinstance(value, dict | list) and value and random.random() < 0.3:
        return _change(
            value, random.choice(list(value) if isinstance(value, dict) else [0]), random
        )
    match random.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[random.choice(TEXTS)] = holder.pop(key)
        case 2:
            holder[key] = [value] if random.random() < 0.5 else {str(key): value}
        case 3 if isinstance(value, int | float):
            holder[key] = random.choice((-value, value + 1, value * 10**9, value / 3, str(value)))
        case _:
            holder[key] = copy.deepcopy(random.choice(VALUES))
    return None
