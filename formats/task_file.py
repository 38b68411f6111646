"""`task.toml`: the data of a task, and how to read them."""

import dataclasses
import tomllib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.benchmark import PREFIX, benchmark_task, is_task_file
from formats.conversion import converted
from formats.data import DATA_SUFFIXES, Rows, open_data
from formats.errors import InputError, UsageError
from formats.fields import Text
from formats.fisher_json import TaskName
from formats.hub_dataset import is_hub_id, open_hub
from formats.rows import check_regular
from formats.wording import did_you_mean


@dataclass(frozen=True)
class TaskFile:
    """The content of a `task.toml`, None for what it leaves out."""

    data: Text
    name: TaskName | None = None
    split: Text | None = None
    subset: Text | None = None
    revision: Text | None = None
    objective: Text | None = None
    text_column: Text | None = None
    text_pair_column: Text | None = None
    label_column: Text | None = None
    tokens_column: Text | None = None
    image_column: Text | None = None
    inputs_column: Text | None = None
    prompt_column: Text | None = None
    completion_column: Text | None = None
    messages_column: Text | None = None
    target_column: Text | None = None

    def columns(self) -> dict[str, str]:
        """Return the named columns by role: {"text": "body", "label": "topic"}."""
        return {
            field.name.removesuffix("_column"): value
            for field in dataclasses.fields(self)
            if field.name.endswith("_column") and (value := getattr(self, field.name)) is not None
        }


def read_task_file(path: Path) -> TaskFile:
    """Read a `task.toml` strictly; local `data` is joined to the absolute folder of the file.

    A relative path may have the form of a Hub id.
    """
    content = read_toml(path)
    refuse_unknown(str(path), content, [field.name for field in dataclasses.fields(TaskFile)])
    task = converted(content, TaskFile, str(path))
    return dataclasses.replace(task, data=resolve(task.data, path.absolute().parent))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; InputError where it is missing, not UTF-8 or not TOML."""
    try:
        return tomllib.loads(check_regular(path).read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8; save it with the encoding UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None


def refuse_unknown(where: str, found: Iterable[str], known: Collection[str]) -> None:
    """Refuse an unknown key, and suggest similar ones."""
    for key in found:
        if key not in known:
            hint = did_you_mean(key, known) or f"expected one of: {', '.join(known)}"
            raise InputError(f"{where}: unknown key {key!r}; {hint}")


def expanded(path: str, where: str = "") -> Path:
    """Return a path with the user's home folder in place of ~; InputError for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{where}{path[:80]!r} is not a valid path: {error}") from None


def resolve(data: str, folder: Path, *, revision: bool = False) -> str:
    """Resolve a path, Hub id or benchmark in a file; a path is relative to the file's folder.

    With `revision` an id may have one behind it: ``user/name@v1``.
    """
    if (task := benchmark_task(data)) is not None:
        return f"{PREFIX}{folder / expanded(task)}" if is_task_file(task) else data
    try:
        local = folder / expanded(data)
        if not local.exists() and looks_like_hub_id(data.partition("@")[0] if revision else data):
            if Path(data).exists():
                raise InputError(
                    f"{data!r} is not in {folder.absolute()}, and not looked for on the Hub, as "
                    "the working folder has one of that name: give the path from the file's "
                    "folder, or work in another folder"
                )
            return data
    except OSError as error:  # too long
        raise InputError(f"{data[:80]!r} is not a valid path: {error}") from None
    if "\0" in data:
        raise InputError(f"{data[:80]!r} is not a valid path: it contains a NUL")
    return str(local)


def looks_like_hub_id(data: str) -> bool:
    """Whether data may be the id of a dataset on the Hub."""
    return is_hub_id(data) and Path(data).suffix.lower() not in DATA_SUFFIXES


def _refuse_benchmark(data: str | Path) -> None:
    if benchmark_task(data) is not None:
        raise UsageError(
            f"{data} is a benchmark, which is only for evaluation: name it with --evaluate "
            "(--data of `evaluate`), and rows here"
        )


def open_task(spec: str | Path, *, split: str | None = None) -> tuple[TaskFile, Rows]:
    """Open data, or the data that a `.toml` file names; `split` overrides the file's."""
    _refuse_benchmark(spec)
    if Path(spec).suffix.lower() != ".toml":
        return TaskFile(data=str(spec), split=split), open_data(spec, split=split)
    path = Path(spec).expanduser()
    task = read_task_file(path)
    _refuse_benchmark(task.data)
    task = dataclasses.replace(task, split=split or task.split)
    options = {"split": task.split, "subset": task.subset, "revision": task.revision}
    try:
        # a folder of the same name in the current folder is not what the file refers to
        if looks_like_hub_id(task.data):
            return task, open_hub(task.data, **options)
        return task, open_data(Path(task.data), **options)
    except (InputError, UsageError) as error:
        raise type(error)(f"{path}: {error}") from error
