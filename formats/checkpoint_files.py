"""The files of a checkpoint: the links among them, their JSON, and the index of the shards."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from formats.errors import InputError

MAX_JSON_BYTES = 128 * 2**20


def inside(folder: Path, name: str) -> Path:
    """Give the path of a file that a folder names, if it lies in that folder, not resolved."""
    # What is not printable, such as NUL or half a surrogate pair, can fail in any way.
    plain = name.isprintable() and len(name.encode()) <= 255
    if not plain or Path(name).name != name or name in ("", ".."):
        raise InputError(f"{folder}: {name!r} is not the name of a file in this folder")
    path = folder / name
    return check_link(folder, path)


def check_link(folder: Path, path: Path) -> Path:
    """Give a path, but refuse a link out of a checkpoint folder, whose author may be a stranger."""
    root, real = folder.resolve(), path.resolve()
    # MODEL/snapshots/COMMIT/… is how the Hub's cache shows what lies in MODEL/blobs.
    blobs = [above.parent / "blobs" for above in root.parents if above.name == "snapshots"]
    if not any(real.is_relative_to(allowed) for allowed in (root, *blobs[:1])):
        raise InputError(
            f"{path} is a link to {real}, outside the checkpoint; "
            "put a copy of the file in its place if you trust it"
        )
    return path


def read_index(path: Path) -> dict[str, str]:
    """Read which file holds which tensor from ``NAME.index.json``, unless it leaves out NAME."""
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: 'weight_map' is missing or empty; it names each tensor's file")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str):
            raise InputError(f"{path}: 'weight_map' gives {file_name!r} as the file of {name!r}")
    single = path.with_name(path.name.removesuffix(".index.json"))
    if single.exists() and single.name not in weight_map.values():
        raise InputError(
            f"{path.parent} holds both {single.name} and {path.name}, which does not name it; "
            "remove the one that does not belong to the checkpoint"
        )
    return weight_map


def check_index(index: Path, weight_map: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Hold an index against what its files contain: tensor name to file name, both."""
    for name, file_name in weight_map.items():
        if name not in found:
            raise InputError(f"{index}: tensor {name!r} is not in {file_name}, nor in another file")
        if found[name] != file_name:
            raise InputError(
                f"{index}: tensor {name!r} should be in {file_name}, but is in {found[name]}"
            )
    for name, file_name in found.items():
        if name not in weight_map:
            raise InputError(f"{index}: tensor {name!r} of {file_name} is not in the index")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise InputError(f"{path} is no plain file")
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise InputError(f"{path} is larger than the {MAX_JSON_BYTES // 2**20} MiB it may have")
        content = json.loads(data.decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def broken(file: Path, kind: str, reason: str) -> InputError:
    """Say that a file is not of the kind that its name says, and what to do."""
    with open(file, "rb") as content:
        start = content.read(40)
    if start.startswith(b"version https://git-lfs"):
        return InputError(f"{file} is a pointer of Git LFS; run `git lfs pull` to fetch the file")
    if not start:
        return InputError(f"{file} is empty; fetch or save it again")
    return InputError(f"{file} is cut short or not {kind} ({reason}); fetch or save it again")
