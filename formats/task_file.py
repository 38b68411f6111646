"""`task.toml`: where the data of a task are, and how they are read."""

import dataclasses
import difflib
import tomllib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.data import DATA_SUFFIXES, Rows, open_data
from formats.errors import InputError, UsageError
from formats.fisher_json import check_task_name
from formats.hub_dataset import is_hub_id, open_hub


@dataclass(frozen=True)
class TaskFile:
    """What a `task.toml` says; None where it is silent.

    Attributes:
        data: file, folder or Hub id; a local one relative to the toml file.
        name: the task's name in the ledger.
        split: which part of a folder or Hub data set.
        subset: which subset of a Hub data set.
        revision: branch, tag or commit of a Hub data set.
        objective: what the model is trained for on these data.
        text_column: and the others: the name of the column with this role.
    """

    data: str
    name: str | None = None
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    objective: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    tokens_column: str | None = None
    image_column: str | None = None
    inputs_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    messages_column: str | None = None
    target_column: str | None = None

    def columns(self) -> dict[str, str]:
        """Return the columns that are named, by role: {"text": "body", "label": "topic"}."""
        return {
            field.name.removesuffix("_column"): value
            for field in dataclasses.fields(self)
            if field.name.endswith("_column") and (value := getattr(self, field.name)) is not None
        }


def read_task_file(path: Path) -> TaskFile:
    """Read a `task.toml`.

    Returns:
        Its content; local `data` is joined to the folder of the toml file.

    Raises:
        InputError: missing, not TOML, an unknown key (near ones are offered), a value that is no
            string or is empty, no `data`, or a name that is not a task's.
    """
    content = read_toml(path)
    refuse_unknown(str(path), content, [field.name for field in dataclasses.fields(TaskFile)])
    for key, value in content.items():
        if not isinstance(value, str) or not value:
            raise InputError(f"{path}: {key} must be a string that is not empty, found {value!r}.")
    if "data" not in content:
        raise InputError(f'{path}: data is missing; name a file, a folder or a Hub id: data = "…".')
    if "name" in content:
        try:
            check_task_name(content["name"])
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    return TaskFile(**{**content, "data": resolve(content["data"], path.parent)})


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        InputError: missing, not UTF-8 or not TOML.
    """
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8. Save it with the encoding UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid TOML: {error}.") from None


def refuse_unknown(where: str, found: Iterable[str], known: Collection[str]) -> None:
    """Refuse a key that is not known, and offer near ones.

    Args:
        where: what the message calls the place.
        found: the keys that are there.
        known: those that may be.

    Raises:
        InputError: one is not known.
    """
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(key, known)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(known)}."
            raise InputError(f"{where}: unknown key {key!r}. {hint}")


def resolve(data: str, folder: Path) -> str:
    """Give what a file means by a path or Hub id: a path is relative to the file's folder.

    Args:
        data: as written.
        folder: where the file is.

    Raises:
        InputError: it cannot be the path of anything.
    """
    try:
        local = folder / Path(data).expanduser()
        if not local.exists() and _looks_like_hub_id(data):
            return data
    except (OSError, RuntimeError) as error:  # too long, or the home of somebody unknown
        raise InputError(f"{data[:80]!r} is not the path of a file: {error}") from None
    if "\0" in data:
        raise InputError(f"{data[:80]!r} is not the path of a file: it holds a NUL")
    return str(local)


def _looks_like_hub_id(data: str) -> bool:
    return is_hub_id(data) and Path(data).suffix.lower() not in DATA_SUFFIXES


def open_task(
    spec: str | Path,
    *,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
) -> tuple[TaskFile, Rows]:
    """Open what DATA names on the command line: data, or a `.toml` file that names them.

    Args:
        spec: as for `open_data`, or the path of a `.toml` file.
        split: wins over the file's own, as do the others.
        subset: which subset of a Hub data set.
        revision: branch, tag or commit of a Hub data set.

    Returns:
        What was said about the task, and its rows.

    Raises:
        InputError: as `read_task_file` and `open_data`.
        UsageError: as `open_data`.
        NetworkError: as `open_data`.
    """
    given = {"split": split, "subset": subset, "revision": revision}
    if Path(spec).suffix.lower() != ".toml":
        return TaskFile(data=str(spec), **given), open_data(spec, **given)
    path = Path(spec).expanduser()
    task = read_task_file(path)
    task = dataclasses.replace(task, **{key: value for key, value in given.items() if value})
    options = {"split": task.split, "subset": task.subset, "revision": task.revision}
    try:
        # a folder of the same name where the command was started is not what the file means
        if _looks_like_hub_id(task.data):
            return task, open_hub(task.data, **options)
        return task, open_data(Path(task.data), **options)
    except (InputError, UsageError) as error:
        raise type(error)(f"{path}: {error}") from error
