"""`tasks.toml`: a chain of tasks that one command trains in sequence."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from formats.conversion import converted
from formats.errors import InputError
from formats.fields import Text
from formats.fisher_json import TaskName
from formats.task_file import expanded, read_toml, refuse_unknown, resolve


class RunTask(Struct, frozen=True):
    """One `[[task]]` of a run file; local data and test data are relative to the file."""

    name: TaskName
    data: Text
    evaluate: Text | None = None
    train: bool = True  # else only its Fisher is measured
    options: dict[str, Any] = field(default_factory=dict)  # by their spelling in the file


class RunFile(Struct, frozen=True, rename={"tasks": "task", "output_dir": "output-dir"}):
    """The content of a run file, None for what it leaves out; local paths are relative to it."""

    path: Path
    tasks: list[RunTask]
    start: Text | None = None
    revision: Text | None = None
    fisher: Text | None = None
    output_dir: Path | None = None
    evaluate: dict[str, Text] = field(default_factory=dict)
    config: dict[str, Any] | None = None  # of a first checkpoint with new weights
    defaults: dict[str, Any] = field(default_factory=dict)  # options of every task


_TASK = ("name", "data", "evaluate", "train")
_RUN = [name for name in RunFile.__struct_encode_fields__ if name != "path"]


def read_run_file(
    path: Path, options: Collection[str], of_command: Collection[str] = ()
) -> RunFile:
    """Read a run file strictly.

    Args:
        path: The file.
        options: The names that an option of a task may have.
        of_command: Names of options that only the command line has.
    """
    content = read_toml(path)
    folder = path.parent
    refuse_unknown(str(path), content, _RUN)
    tasks = content.get("task")
    if not isinstance(tasks, list) or not tasks or not all(isinstance(t, dict) for t in tasks):
        raise InputError(
            f"{path}: expected at least one table [[task]] with name and data, found none"
        )
    content["task"] = [
        _task(task, f"{path}, task {number}", folder, options, of_command)
        for number, task in enumerate(tasks, 1)
    ]
    if (output := content.get("output-dir")) and isinstance(output, str):
        content["output-dir"] = folder / expanded(output, f"{path}: output-dir: ")
    run = converted({"path": path, **content}, RunFile, str(path))
    _refuse_others(f"{path}, [defaults]", run.defaults, options, of_command)
    if run.start is not None and run.config is not None:
        raise InputError(f"{path}: config cannot be combined with start; leave one of them out")
    try:
        json.dumps(run.config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: config cannot be stored as JSON: {error}") from None
    named = dict.fromkeys(run.evaluate, "a line of [evaluate]")
    for number, task in enumerate(run.tasks, 1):
        if other := named.get(task.name):
            raise InputError(
                f"{path}: task {number} and {other} are both named {task.name!r}; rename one of "
                "them"
            )
        named[task.name] = f"task {number}"
    return replace(
        run,
        start=_resolved(run.start, folder, revision=True),
        fisher=_resolved(run.fisher, folder, revision=True),
        evaluate={name: resolve(data, folder) for name, data in run.evaluate.items()},
    )


def _task(
    content: dict[str, Any],
    where: str,
    folder: Path,
    options: Collection[str],
    of_command: Collection[str],
) -> RunTask:
    _refuse_others(where, content, [*_TASK, *options], of_command)
    own = {key: content[key] for key in _TASK if key in content}
    others = {key: value for key, value in content.items() if key not in _TASK}
    task = converted({**own, "options": others}, RunTask, where)
    return replace(task, data=resolve(task.data, folder), evaluate=_resolved(task.evaluate, folder))


def _refuse_others(
    where: str, found: Collection[str], known: Collection[str], of_command: Collection[str]
) -> None:
    """Refuse keys that a run file cannot have."""
    here = {*known, *_TASK, *_RUN}
    if elsewhere := [key for key in found if key in of_command and key not in here]:
        raise InputError(
            f"{where}: {elsewhere[0]!r} is an option of `consolidate finetune` alone: leave it "
            "out, or train the task with that command"
        )
    refuse_unknown(where, found, known)


def _resolved(data: str | None, folder: Path, *, revision: bool = False) -> str | None:
    return None if data is None else resolve(data, folder, revision=revision)
