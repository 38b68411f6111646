"""What a report shows of a result of `finetune`, checked: a search for λ, a comparison."""

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from formats.conversion import converted, strict_json
from formats.errors import InputError
from formats.fields import Natural, NotNegative, Number, Text
from formats.fisher_json import Ledger
from formats.wording import few, printable

_REMEDY = "give what `consolidate finetune --json` wrote"


class _Measured(TypedDict):
    score: Number


class _Scored(_Measured):
    accuracy: NotRequired[Number]


class _Trial(TypedDict):
    ewc_lambda: NotNegative
    steps: Natural
    metrics: dict[Text, _Measured] | None  # other metrics may be null, if they were not finite
    forgetting: Number | None
    penalty_per_lambda: Number | None
    divergence: Number | None
    mean: Number | None
    chosen: bool


class FoundSearch(TypedDict):
    """What a report reads of `consolidate.results.LambdaSearch`."""

    ewc_lambda: NotNegative
    new_task: Text
    old_tasks: list[Text]
    trials: list[_Trial]


class FoundNats(TypedDict):
    """What a report reads of the nats of old loss in `consolidate.results.FinetuneDone`."""

    predicted_nats: Number | None
    task_weights: dict[Text, NotNegative]
    measured_nats: dict[Text, Number]


class FoundComparison(TypedDict):
    """What a report reads of `consolidate.results.Comparison`."""

    new_task: Text
    old_tasks: list[Text]
    before: dict[Text, _Scored]
    with_penalty: dict[Text, _Scored]
    without_penalty: dict[Text, _Scored] | None
    nats: NotRequired[FoundNats]


def read_comparison(path: Path, ledger: Ledger, checkpoint: str) -> FoundComparison:
    """Read the comparison with no penalty in a result; refuse one of another checkpoint."""
    where, content = f"--comparison {path}", _read("--comparison", path)
    if "comparison" not in content:
        raise InputError(
            f"{where}: expected an object with `comparison`, found none; {_REMEDY} with "
            "--compare-none (one that was up to date reports no comparison)"
        )
    place = "$.comparison"
    found = converted(content["comparison"], FoundComparison, where, place)
    last = ledger.tasks[-1]
    after = converted(content.get("metrics"), dict[Text, Any], where, "$.metrics").get("after")
    if found["new_task"] != last.name or after != last.metrics.get("after"):
        raise InputError(
            f"{where}: this result is of the task {printable(found['new_task'])!r} with other "
            f"scores than {checkpoint} has of {last.name!r}; give the result of the finetune that "
            f"wrote {checkpoint}"
        )
    runs = [found["before"], found["with_penalty"], found["without_penalty"]]
    for run in filter(None, runs):
        if missing := sorted({*found["old_tasks"]} - run.keys()):
            raise InputError(f"{where}, {place}: expected a score on {missing[0]!r}, found none")
    found["nats"] = converted(content, FoundNats, where)
    return found


def _read(option: str, path: Path) -> dict[str, Any]:
    path = path.expanduser()
    try:
        content: Any = strict_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{option} {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{option} {path} is not valid JSON: {error}; {_REMEDY}") from error
    return content if isinstance(content, dict) else {}


def read_search(path: Path, ledger: Ledger, checkpoint: str) -> FoundSearch:
    """Read the search for λ in a result of `finetune`; refuse one that the ledger does not know."""
    content = _read("--search", path)
    if "lambda_search" not in content:
        raise InputError(
            f"--search {path}: expected an object with `lambda_search`, found none; {_REMEDY} "
            "that searched (one that was up to date reports no search)"
        )
    place = "$.lambda_search"
    search = converted(content["lambda_search"], FoundSearch, f"--search {path}", place)
    _check_whole(search, f"--search {path}, {place}")
    chosen, new = search["ewc_lambda"], search["new_task"]
    known = {task.name: task.ewc_lambda for task in ledger.tasks}
    if known.get(new) != chosen:
        found = f"has the tasks {few([*map(printable, known)], 8)}"
        if new in known:
            strength = known[new]
            found = f"learned it {'without a λ' if strength is None else f'with {strength:g}'}"
        raise InputError(
            f"--search {path}: this search selected λ = {chosen:g} for {new!r}, but {checkpoint} "
            f"{found}; give the result of the finetune that wrote {checkpoint}"
        )
    return search


def _check_whole(search: FoundSearch, place: str) -> None:
    """Refuse a search whose trials lack what a table or chart shows."""
    tasks = {*search["old_tasks"], search["new_task"]}
    for i, trial in enumerate(search["trials"]):
        if trial["metrics"] is None:
            continue
        if missing := sorted(tasks - trial["metrics"].keys()):
            raise InputError(f"{place}.trials[{i}]: expected a score on {missing[0]!r}, found none")
        if trial["penalty_per_lambda"] is None:
            raise InputError(f"{place}.trials[{i}]: expected a penalty per λ, found null")
    longest = max((trial["steps"] for trial in search["trials"]), default=0)
    chosen = [
        trial["ewc_lambda"]
        for trial in search["trials"]
        if trial["chosen"] and trial["metrics"] is not None and trial["steps"] == longest
    ]
    if chosen != [search["ewc_lambda"]]:
        raise InputError(
            f"{place}.trials: expected one run of full length that was chosen, with "
            f"λ = {search['ewc_lambda']:g}, found {len(chosen)}; {_REMEDY}"
        )
