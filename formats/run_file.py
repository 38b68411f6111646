"""`tasks.toml`: a chain of tasks that one command trains, one after the other."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.errors import InputError
from formats.fisher_json import check_task_name
from formats.task_file import read_toml, refuse_unknown, resolve

_RUN = (
    *("start", "revision", "fisher", "output-dir", "evaluate-ahead", "evaluate", "config"),
    *("defaults", "task"),
)
_TASK = ("name", "data", "evaluate", "train")


@dataclass(frozen=True)
class RunTask:
    """One `[[task]]` of a run file; None where it is silent.

    Attributes:
        name: the task's name in the ledger.
        data: file, folder, Hub id or task.toml; a local one joined to the folder of the run file.
        evaluate: the task's test data, likewise.
        train: false where its Fisher is measured only.
        options: the others, as they are written and spelled.
    """

    name: str
    data: str
    evaluate: str | None
    train: bool
    options: dict[str, Any]


@dataclass(frozen=True)
class RunFile:
    """What a run file says; None where it is silent.

    Attributes:
        path: the file.
        tasks: in their order; at least one.
        start: the checkpoint that the first task starts from: a path or a Hub id.
        revision: of a start on the Hub.
        fisher: where the start's Fisher is, if not beside its weights.
        output_dir: the folder of all checkpoints.
        evaluate_ahead: whether tasks are evaluated before they are learned, too.
        evaluate: data that are evaluated after every task, by name.
        config: contents of config.json for a first checkpoint that is made afresh.
        defaults: options of every task, as they are written and spelled.
    """

    path: Path
    tasks: list[RunTask]
    start: str | None
    revision: str | None
    fisher: str | None
    output_dir: Path | None
    evaluate_ahead: bool
    evaluate: dict[str, str]
    config: dict[str, Any] | None
    defaults: dict[str, Any]


def read_run_file(path: Path, options: Collection[str]) -> RunFile:
    """Read a run file, strictly.

    Args:
        path: the TOML file.
        options: the names that an option of a task may have, spelled as on the command line.

    Returns:
        Its content; local paths are joined to the folder of the file, the options' not.

    Raises:
        InputError: missing, not TOML, an unknown key (near ones are offered), a value of another
            type, no task, a task without name or data, or a name that is not a task's or twice.
    """
    content = read_toml(path)
    refuse_unknown(str(path), content, _RUN)
    defaults = _typed(content, "defaults", dict, str(path)) or {}
    refuse_unknown(f"{path}, [defaults]", defaults, options)
    start, fisher, output_dir = (
        _text(content, key, str(path)) for key in ("start", "fisher", "output-dir")
    )
    evaluate = _typed(content, "evaluate", dict, str(path)) or {}
    for name in evaluate:
        _text(evaluate, name, f"{path}, [evaluate]")
    config = _typed(content, "config", dict, str(path))
    if start is not None and config is not None:
        raise InputError(f"{path}: config has no meaning where there is a start: leave one out.")
    try:
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: config cannot be kept as JSON: {error}.") from None
    tasks = content.get("task")
    if not isinstance(tasks, list) or not tasks or not all(isinstance(t, dict) for t in tasks):
        raise InputError(f"{path}: there is no task; each is a table [[task]] with name and data.")
    run = RunFile(
        path=path,
        tasks=[_task(task, i, path, options) for i, task in enumerate(tasks, 1)],
        start=None if start is None else resolve(start, path.parent),
        revision=_text(content, "revision", str(path)),
        fisher=None if fisher is None else resolve(fisher, path.parent),
        output_dir=None if output_dir is None else path.parent / Path(output_dir).expanduser(),
        evaluate_ahead=_typed(content, "evaluate-ahead", bool, str(path)) or False,
        evaluate={name: resolve(data, path.parent) for name, data in evaluate.items()},
        config=config,
        defaults=defaults,
    )
    numbers: dict[str, int] = {}
    for number, name in enumerate((task.name for task in run.tasks), 1):
        other = "a line of [evaluate]" if name in evaluate else f"task {numbers.get(name)}"
        if name in evaluate or name in numbers:
            raise InputError(
                f"{path}: task {number} and {other} are both named {name!r}: give one of them "
                "another name."
            )
        numbers[name] = number
    return run


def _task(task: dict[str, Any], number: int, path: Path, options: Collection[str]) -> RunTask:
    where = f"{path}, task {number}"
    refuse_unknown(where, task, [*_TASK, *options])
    name, data = _text(task, "name", where), _text(task, "data", where)
    for key, value in (("name", name), ("data", data)):
        if value is None:
            raise InputError(f'{where}: {key} is missing: {key} = "…".')
    assert name is not None
    assert data is not None
    try:
        check_task_name(name)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    evaluate = _text(task, "evaluate", where)
    train = _typed(task, "train", bool, where)
    return RunTask(
        name=name,
        data=resolve(data, path.parent),
        evaluate=None if evaluate is None else resolve(evaluate, path.parent),
        train=True if train is None else train,
        options={key: value for key, value in task.items() if key not in _TASK},
    )


def _text(content: dict[str, Any], key: str, where: str) -> str | None:
    value = _typed(content, key, str, where)
    if value == "":
        raise InputError(f"{where}: {key} must not be empty.")
    return value


def _typed(content: dict[str, Any], key: str, kind: type, where: str) -> Any:
    value = content.get(key)
    if value is not None and not isinstance(value, kind):
        words = {str: "a string", bool: "true or false", dict: "a table"}
        raise InputError(f"{where}: {key} must be {words[kind]}, found {value!r}.")
    return value
