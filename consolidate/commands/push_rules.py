"""What `push` leaves out of a checkpoint's files: local paths, and unused code."""

import ast
import json
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from consolidate.views.card import is_repository
from formats.checkpoint_files import check_link, read_json
from formats.errors import InputError
from formats.wording import few

LOG = logging.getLogger("consolidate")
_WITH_AUTO_MAP = ("config.json", "tokenizer_config.json", "*processor_config.json")
_SOURCE = re.compile(r".*name_or_path")
_FILE = re.compile(r"(.*_)?(file|path|dir|folder|directory)")
_ABSOLUTE = re.compile(r"[/\\~]|[A-Za-z]:[/\\]|file:")
_CHECKPOINT = re.compile(r"checkpoint-\d+")


def without_local_paths(path: Path) -> Path | bytes:
    """Give a configuration file without local paths; the file itself is not changed.

    transformers writes where a model, a tokenizer or their parts were loaded from: the name of a
    repository, which is kept, or a path on the author's machine. Returns the path if the file has
    no local paths, else the bytes to send instead.
    """
    content = read_json(path)
    emptied = list(dict.fromkeys(_empty(content)))
    if not emptied:
        return path
    LOG.info("%s is sent without the local paths in %s", path, ", ".join(emptied))
    return (json.dumps(content, indent=2) + "\n").encode()


def _empty(value: Any, above: str = "") -> Iterator[str]:
    """Remove the local paths in place, and yield their keys; entries of a list have its key."""
    places: list[tuple[Any, str]] = []
    if isinstance(value, list):
        places = [(place, above) for place in reversed(range(len(value)))]
    elif isinstance(value, dict):
        places = [(key, key) for key in value]
    for place, key in places:
        inner = value[place]
        if not isinstance(inner, str):
            yield from _empty(inner, key)
        elif _SOURCE.fullmatch(key) and inner and not _is_elsewhere(inner):
            value[place] = ""
            yield key
        elif _FILE.fullmatch(key) and _ABSOLUTE.match(inner):
            del value[place]  # loaders then take the file beside it; an empty name would fail
            yield key


def _is_elsewhere(name: str) -> bool:
    """Whether a name is that of a repository, not of a local folder or a Trainer checkpoint."""
    of_a_training = _CHECKPOINT.fullmatch(name.rpartition("/")[2])
    return is_repository(name) and not of_a_training and not Path(name).exists()


def named_code(folder: Path) -> set[str]:
    """Find the code that the `auto_map` of a checkpoint names, and what that imports relatively.

    The code is parsed and never run.
    """
    configs = [path for pattern in _WITH_AUTO_MAP for path in folder.glob(pattern)]
    named = {f"{name}.py" for path in configs for name in _named(read_json(path))}
    waiting = sorted(name for name in named if "/" not in name and "\\" not in name)
    found, missing = set[str](), []
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        if not (folder / name).is_file():
            missing.append(name)
            continue
        found.add(name)
        check_link(folder, folder / name)
        waiting += _imported(folder, name)
    if missing:
        LOG.info(
            "code needed by an auto_map is missing in %s: %s",
            folder,
            few(sorted({repr(name) for name in missing}), 5),
        )
    return found


def _named(value: Any) -> Iterator[str]:
    """Yield the modules in every `auto_map`; `REPO--MODULE.CLASS` is code in another repository."""
    for inner in value if isinstance(value, list) else ():
        yield from _named(inner)
    for key, inner in value.items() if isinstance(value, dict) else ():
        if key != "auto_map":
            yield from _named(inner)
            continue
        for entry in inner.values() if isinstance(inner, dict) else [inner]:
            for name in entry if isinstance(entry, list) else [entry]:
                if isinstance(name, str) and "--" not in name and "." in name:
                    yield name.partition(".")[0]


def _imported(folder: Path, name: str) -> Iterator[str]:
    """Yield the paths of what a file in the folder imports relatively."""
    path = folder / name
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(
            f"{path}: an auto_map names this code, but it cannot be parsed for imports ({error}): "
            "correct it, or remove it from auto_map"
        ) from None
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        for base in Path(name).parents[node.level - 1 : node.level]:  # none above the folder
            module = base.joinpath(*(node.module or "").split("."))
            known = list(_files_of(folder, module))
            if node.module and not known:
                yield f"{module.as_posix()}.py"  # reported as missing
            yield from known
            for alias in node.names:  # maybe modules too
                yield from _files_of(folder, module / alias.name)


def _files_of(folder: Path, module: Path) -> Iterator[str]:
    """Yield the existing files of a module: its own, and those of packages above it."""
    packages = [above / "__init__.py" for above in (module, *module.parents) if above.name]
    for file in (*packages, module.with_name(f"{module.name}.py") if module.name else module):
        if (folder / file).is_file():
            yield file.as_posix()
