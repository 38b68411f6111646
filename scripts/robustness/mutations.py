"""Seeded damage that knows the structure of files, so that much of it gets past the parser."""

import ast
import copy
import csv
import io
import json
import re
import struct
import tomllib
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import yaml

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
        claim = random.choice(
            (0, 1, max(length, 1) - 1, length + 1, 10**8, 2**31, 2**60, 2**64 - 1)
        )
        return claim.to_bytes(8, "little") + header + values
    header = mutated_json(header, random)
    if random.random() < 0.2:
        values = mutated_bytes(values, random)
    return len(header).to_bytes(8, "little") + header + values


def mutated_toml(data: bytes, random: Random) -> bytes:
    """Damage TOML, mostly so that it is TOML still, with wrong content."""
    if random.random() < 0.4:
        return mutated_text(data, random)
    content = tomllib.loads(data.decode())
    for _ in range(random.randint(1, 3)):
        if places := list(_places(content)):
            holder, key = random.choice(places)
            _change(holder, key, random)
    return "".join(f"{_quoted(k)} = {_toml(v)}\n" for k, v in content.items()).encode()


def _toml(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return str(value)
        case dict():
            return "{" + ", ".join(f"{_quoted(k)} = {_toml(v)}" for k, v in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(_toml, value)) + "]"
    return _quoted("" if value is None else str(value))


def _quoted(text: Any) -> str:
    return json.dumps(str(text).encode("utf-8", "replace").decode()).replace("\x7f", "\\u007F")


def mutated_yaml(data: bytes, random: Random) -> bytes:
    """Damage YAML, mostly so that it is YAML still, with wrong content."""
    if random.random() < 0.4:
        return mutated_text(data, random)
    content = {"content": yaml.safe_load(data)}
    for _ in range(random.randint(1, 3)):
        if places := list(_places(content)):
            holder, key = random.choice(places)
            _change(holder, key, random)
    text = yaml.safe_dump(content.get("content"), allow_unicode=True)
    return re.sub(": '(.*)'", random.choice((r": \1", r": '\1'")), text).encode("utf-8", "replace")


def mutated_template(data: bytes, random: Random) -> bytes:
    """Damage a template of jinja: mostly by an expression or a statement somewhere in it."""
    if random.random() < 0.3:
        return mutated_text(data, random)
    pieces = re.split(rb"({[{%].*?[%}]})", data)
    at = random.randrange(len(pieces))
    if random.random() < 0.3:
        pieces[at] = b""
    pieces.insert(at, random.choice(EXPRESSIONS).encode())
    return b"".join(pieces)


# None that computes without end: nothing bounds the time of a template.
EXPRESSIONS: tuple[str, ...] = (
    "{% for a in range(300) %}{% for b in range(300) %}x{% endfor %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ range(10**9) | list }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id') }}",
    "{% include 'config.json' %}",
    "{% import 'evil.py' as evil %}",
    "{{ raise_exception('no') }}",
    "{{ messages[10]['content'] }}",
    "{{ none.x.y }}",
    "{{ 1 / 0 }}",
    "{{ messages | tojson }}",
    "{{ '%s' % messages }}",
    "{{ '\\x1b[2J\u202e' }}",
    "{% set ns = namespace(x=0) %}",
    "{% generation %}x{% endgeneration %}",
    "{{ strftime_now('%Y') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages.append(1) }}",
)


def mutated_lines(data: bytes, random: Random) -> bytes:
    """Damage JSON Lines: mostly one line, as JSON."""
    lines = data.splitlines(keepends=True)
    if random.random() < 0.3 or not lines:
        return mutated_text(data, random)
    at = random.randrange(len(lines))
    lines[at] = mutated_json(lines[at], random).replace(b"\n", b" ") + b"\n"
    return b"".join(lines)


def mutated_table(data: bytes, random: Random) -> bytes:
    """Damage CSV or TSV: mostly one cell, column or row."""
    if random.random() < 0.3:
        return mutated_text(data, random)
    delimiter = "\t" if b"\t" in data else ","
    rows = list(csv.reader(io.StringIO(data.decode(), newline=""), delimiter=delimiter))
    for _ in range(random.randint(1, 3)):
        row = random.choice(rows)
        cell = random.choice((*TEXTS, *NUMBERS, *map(str, VALUES[:5]), "x" * 200_000))
        match random.randrange(5):
            case 0:
                row.append(cell)
            case 1 if row:
                row.pop(random.randrange(len(row)))
            case 2:
                rows.insert(random.randrange(len(rows)), [cell] * random.randrange(4))
            case _ if row:
                row[random.randrange(len(row))] = cell
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, quoting=random.choice((0, 0, 1)))
    writer.writerows(rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


def mutated_zip(data: bytes, random: Random) -> bytes:
    """Damage one member of an archive, and write the archive whole again, or damage its bytes."""
    if random.random() < 0.3:
        return mutated_bytes(data, random)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        kind = archive.infolist()[0].compress_type
        members = {name: archive.read(name) for name in archive.namelist()}
    name = random.choice([*members, *(name for name in members if name.endswith("data.pkl"))])
    chance = random.random()
    if chance < 0.1:
        del members[name]
    elif chance < 0.2:
        members[random.choice(("../x.npy", "/x", "a/b.npy", "inputs", "x" * 300))] = members[name]
    elif members[name].startswith(b"\x93NUMPY"):
        members[name] = _mutated_npy(members[name], random)
    else:
        members[name] = random.choice((mutated_bytes, _with_opcode))(members[name], random)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def _mutated_npy(data: bytes, random: Random) -> bytes:
    """Damage the header of an array: its type, its shape, its order, or any number in it."""
    length = int.from_bytes(data[8:10], "little")
    header, values = data[10 : 10 + length], data[10 + length :]
    fields = ast.literal_eval(header.decode())
    match random.randrange(6):
        case 0:
            kinds = ("|O", "<U3", "|S4", "<M8[s]", "<c16", ">f8", "|b1", "<u8", "<f2", "|V8", "x")
            fields["descr"] = random.choice(kinds)
        case 1:
            sizes = (0, 1, 3, -1, 2**31, 2**62, 2**64)
            fields["shape"] = tuple(random.choices(sizes, k=random.choice((0, 1, 2, 40))))
        case 2:
            fields[random.choice(tuple(fields))] = copy.deepcopy(random.choice(VALUES))
        case 3:
            fields["descr"] = [("a", "<f4"), ("b", random.choice(("|O", "<i8")))]
        case 4:
            return data[: 10 + length] + mutated_bytes(values, random)
        case _:
            return data[:10] + mutated_text(header, random)[:length].ljust(length) + values
    text = (repr(fields) + "\n").encode("utf-8", "replace")[: 2**16 - 1]
    return data[:8] + len(text).to_bytes(2, "little") + text + values


def _with_opcode(data: bytes, random: Random) -> bytes:
    """Put an instruction into a pickle: names of functions, calls, sizes."""
    codes: tuple[bytes, ...] = (
        b"cos\nsystem\n",
        b"cbuiltins\neval\n",
        b"ctorch\nload\n",
        b"R",
        b"b",
        b"(",
        b"t",
    )
    codes += (b"\x8a\xff" + b"\xff" * 255, b"B\xff\xff\xff\x7f", b"h\xfe", b"Q", b"0", b"2", b".")
    at = random.randrange(len(data) + 1)
    return data[:at] + random.choice(codes) + data[at:]


def mutated_png(data: bytes, random: Random) -> bytes:
    """Damage the content of a chunk and make its checksum fit, or damage any bytes."""
    if random.random() < 0.3:
        return mutated_bytes(data, random)
    chunks, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    place = random.randrange(len(chunks))
    kind, content = chunks[place]
    match random.randrange(5):
        case 0:
            chunks.insert(place, random.choice(chunks))
        case 1:
            new = (b"tEXt", b"zTXt", b"iCCP", b"eXIf", b"acTL", b"fdAT", b"tRNS", b"PLTE")
            chunks.insert(place, (random.choice(new), random.randbytes(random.choice((0, 5, 40)))))
        case 2 if kind == b"IHDR":
            sides = [random.choice((0, 1, 6, 2**14, 2**31 - 1)) for _ in range(2)]
            rest = bytes(random.choice(range(8)) for _ in range(5))
            chunks[place] = kind, struct.pack(">II", *sides) + rest
        case _:
            chunks[place] = kind, mutated_bytes(content, random)
    return data[:8] + b"".join(
        len(content).to_bytes(4, "big") + kind + content
        + zlib.crc32(kind + content).to_bytes(4, "big")
        for kind, content in chunks
    )  # fmt: skip


def mutated_middle(data: bytes, random: Random) -> bytes:
    """Damage bytes, two times of three away from both ends, where the parser's own fields are."""
    if random.random() < 0.33 or len(data) < 64:
        return mutated_bytes(data, random)
    end = int.from_bytes(data[-8:-4], "little") + 8 if data.endswith(b"PAR1") else len(data) // 4
    start, end = min(32, len(data) // 4), max(len(data) // 4, len(data) - end)
    middle = data[start:end]
    length = len(middle)
    changed = random.choice((flipped, overwritten))(middle, random)
    return data[:start] + changed[:length] + data[end:]


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
            holder[key] = random.choice((-value, value + 1, value * 10**9, value // 3, str(value)))
        case _:
            holder[key] = copy.deepcopy(random.choice(VALUES))
    return None
