"""What a benchmark is made from: the version of the harness, and the files of a local task."""

import glob
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from formats.benchmark import benchmark_task, is_task_file
from formats.errors import InputError, UsageError, install
from formats.rows import file_digest, listing_digest
from formats.wording import first_line, neighbours, suggestion

LONGEST_PATH = 4096
"""Characters that a path or pattern may have: the time to read a pattern grows as their square."""

_LOADERS = ("json", "csv", "parquet", "arrow", "text")
"""Dataset paths that stand for files of a kind, which `data_files` names."""


class _Function(str):
    """What a task file names by ``!function``: a function of a Python file beside it."""


class _Loader(yaml.SafeLoader):
    """Reads a task file without importing its functions."""


_Loader.add_constructor("!function", lambda loader, node: _Function(loader.construct_scalar(node)))


def harness_version(data: str | Path) -> str:
    """Return the version of the installed harness, which `data` needs."""
    try:
        return version("lm_eval")
    except PackageNotFoundError:
        raise UsageError(f"{data} needs lm_eval: {install('lm-eval')}") from None


def benchmark_content(data: str | Path) -> dict[str, Any]:
    """Describe a benchmark by content: harness, and the task's name or the digest of its files."""
    harness, task = harness_version(data), str(benchmark_task(data))
    if not is_task_file(task):
        return {"harness": harness, "task": task}
    return {"harness": harness, "digest": task_file_digest(task_path(data))}


def task_path(data: str | Path) -> Path:
    """Return the path of a benchmark's task file, which must exist."""
    path = Path(str(benchmark_task(data))).expanduser()
    if not path.is_file():
        hint = suggestion(neighbours(path)) or "; check the path"
        raise InputError(f"{data}: {path} does not exist{hint}")
    return path


def task_file_digest(path: Path) -> str:
    """Return the SHA-256 over a task file, the files that it includes, its functions and data."""
    config, files = _read(path, set())
    files += _data(config, path)
    return listing_digest((file.name, file_digest(file)) for file in files)


def task_config(path: Path) -> dict[str, Any]:
    """Return the content of a task file and of those that it includes, functions by name."""
    return _read(path, set())[0]


def local_data_files(config: Mapping[str, Any], path: Path) -> Any:
    """Return a task's ``data_files`` with absolute paths; None where it reads no local files.

    A path is relative to the current folder, as for the harness, else to the task file's folder.
    """
    return _located(_data_files(config), path)


def _read(path: Path, seen: set[Path]) -> tuple[dict[str, Any], list[Path]]:
    """Read a task file with those that it includes; list them, and the files of functions."""
    if "\0" in str(path):
        raise InputError(f"{path.parent}: include: expected the name of a file, found a NUL in it")
    if path.resolve() in seen:
        raise InputError(f"{path} includes itself")
    seen.add(path.resolve())
    try:
        content = yaml.load(path.read_bytes(), _Loader)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or first_line(error)
        raise InputError(f"{path}{line} is not valid YAML: {problem}") from None
    keys = {"task", "group", "include"} if len(seen) == 1 else set()  # what is included lacks them
    if not isinstance(content, dict) or (keys and not keys & content.keys()):
        raise InputError(f"{path} is not a task of lm-eval: expected the key task")
    files = [path]
    included = content.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        inner, more = _read(path.parent / str(name), seen)
        merged |= inner
        files += more
    for function in _functions(content):
        module = path.parent / f"{function.rpartition('.')[0].replace('.', '/')}.py"
        if module.is_file() and module not in files:
            files.append(module)
    return merged | content, files


def _functions(value: Any) -> Iterator[_Function]:
    if isinstance(value, _Function):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _functions(inner)


def _data_files(config: Mapping[str, Any]) -> Any:
    """Give the data files of a task that reads local files; None for data of the Hub."""
    options = config.get("dataset_kwargs")
    if config.get("dataset_path") not in _LOADERS or not isinstance(options, Mapping):
        return None
    return options.get("data_files")


def _located(value: Any, path: Path) -> Any:
    if isinstance(value, Mapping):
        return {name: _located(inner, path) for name, inner in value.items()}
    if isinstance(value, list):
        return [_located(inner, path) for inner in value]
    if not isinstance(value, str) or "://" in value:
        return value
    if "**" in value and (Path(value).is_absolute() or ".." in Path(value).parts):
        raise InputError(
            f"{path}: data_files: {value} searches folders outside its own: expected a pattern "
            "with ** below the folder, without .. in it; name the folders, or move the task file"
        )
    folders = (Path.cwd(), path.absolute().parent) if len(value) <= LONGEST_PATH else ()
    for folder in folders:
        if glob.glob(str(folder / value), recursive=True):
            return str(folder / value)
    raise InputError(f"{path}: data_files: {value[:200]} does not exist")


def _data(config: Mapping[str, Any], path: Path) -> list[Path]:
    """List the local files of a task's data."""

    def files(value: Any) -> Iterator[Path]:
        if isinstance(value, Mapping | list):
            for inner in value.values() if isinstance(value, Mapping) else value:
                yield from files(inner)
        elif isinstance(value, str) and "://" not in value:
            found = (Path(name) for name in sorted(glob.glob(value, recursive=True)))
            yield from (file for file in found if file.is_file())

    found = list(files(local_data_files(config, path)))
    options = config.get("dataset_kwargs")
    folders = [config.get("dataset_path")]
    folders += [options.get("data_dir")] if isinstance(options, Mapping) else []
    for name in folders:
        if isinstance(name, str) and name not in _LOADERS and os.path.exists(name):
            place = Path(name)
            inside = [place] if place.is_file() else sorted(place.rglob("*"))
            found += [file for file in inside if file.is_file()]
    return found
