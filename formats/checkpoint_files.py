"""The files of a checkpoint: the links among them, their JSON, and the index of the shards."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from formats.errors import InputError

_SHARED = ".huggingface-shared-blobs"  # what marks them
MAX_JSON_BYTES = 128 * 2**20


def inside(folder: Path, name: str) -> Path:
    """Return the unresolved path of a named file, and refuse a name outside the folder."""
    # Unprintable characters, such as NUL or half a surrogate pair, can fail in any way.
    plain = name.isprintable() and len(name.encode()) <= 255
    if not plain or Path(name).name != name or name in ("", ".."):
        raise InputError(
            f"{folder}: expected the name of a file in this folder, found {name!r}; fetch or save "
            "the checkpoint again"
        )
    path = folder / name
    return check_link(folder, path)


def check_link(folder: Path, path: Path) -> Path:
    """Return the path, and refuse a link out of a checkpoint folder, which may be untrusted."""
    root, real = real_path(folder), real_path(path)
    if not any(real.is_relative_to(allowed) for allowed in (root, *_blobs_of(root))):
        raise InputError(
            f"{path} is a link to {real}, outside the checkpoint; "
            "replace it by a copy of the file if you trust it"
        )
    return path


def _blobs_of(root: Path) -> list[Path]:
    """Give the folders that links of MODEL/snapshots/COMMIT lead to in the Hub's cache.

    They are MODEL/blobs, and for files that several models share the blobs beside the models.
    """
    model = next((above.parent for above in root.parents if above.name == "snapshots"), None)
    if model is None:
        return []
    shared = model.parent / "blobs"
    is_cache = model.name.startswith("models--") and (shared / _SHARED).is_file()
    return [model / "blobs", *([shared] if is_cache else [])]


def real_path(path: Path) -> Path:
    """Return the path without links; one that leads to itself is refused."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(
                f"{path} is a link that leads to itself; replace it by what it should be"
            ) from None
    return Path(os.path.realpath(path))


def read_index(path: Path) -> dict[str, str]:
    """Read which file contains which tensor from ``NAME.index.json``; refuse an unlisted NAME."""
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            f"{path}: expected a 'weight_map' with the file of each tensor, found none or an empty "
            "one; fetch or save the index again"
        )
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str):
            raise InputError(
                f"{path}: 'weight_map': expected a file name for tensor {name!r}, found "
                f"{file_name!r}; fetch or save the index again"
            )
    single = path.with_name(path.name.removesuffix(".index.json"))
    if single.exists() and single.name not in weight_map.values():
        raise InputError(
            f"{path.parent} contains both {single.name} and {path.name}, which does not list it; "
            "remove the one that does not belong to the checkpoint"
        )
    return weight_map


def check_index(index: Path, weight_map: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Check an index against its files; both map tensor names to file names."""
    remedy = "fetch or save the checkpoint again"
    for name, file_name in weight_map.items():
        if name not in found:
            raise InputError(
                f"{index}: tensor {name!r} is missing: expected in {file_name}, found in no file; "
                f"{remedy}"
            )
        if found[name] != file_name:
            raise InputError(
                f"{index}: tensor {name!r} is misplaced: expected in {file_name}, found in "
                f"{found[name]}; {remedy}"
            )
    for name, file_name in found.items():
        if name not in weight_map:
            raise InputError(
                f"{index}: tensor {name!r} of {file_name} is not listed in the index; {remedy}"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block
            raise InputError(f"{path} is not a regular file; replace it by one")
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            most = MAX_JSON_BYTES // 2**20
            raise InputError(f"{path} is too large: expected at most {most} MiB")
        content = json.loads(data.decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def broken(file: Path, kind: str, reason: str) -> InputError:
    """Return the error for a file that is not of the kind that its name says."""
    with open(file, "rb") as content:
        start = content.read(40)
    if start.startswith(b"version https://git-lfs"):
        return InputError(f"{file} is a Git LFS pointer; run `git lfs pull` to fetch the file")
    if not start:
        return InputError(f"{file} is empty; fetch or save it again")
    return InputError(f"{file} is truncated or not {kind} ({reason}); fetch or save it again")
