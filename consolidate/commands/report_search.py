"""The search for λ that a report shows: read from a result of `finetune`, and checked."""

from pathlib import Path
from typing import Any, TypedDict

from formats.conversion import converted, strict_json
from formats.errors import InputError
from formats.fields import Natural, NotNegative, Number, Text
from formats.fisher_json import Ledger
from formats.wording import few, printable

_REMEDY = "give what `consolidate finetune --json` wrote"


class _Measured(TypedDict):
    score: Number


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


def read_search(path: Path, ledger: Ledger, checkpoint: str) -> FoundSearch:
    """Read the search for λ in a result of `finetune`; refuse one that the ledger does not know."""
    path = path.expanduser()
    try:
        content: Any = strict_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"--search {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"--search {path} is not valid JSON: {error}; {_REMEDY}") from error
    if not isinstance(content, dict) or "lambda_search" not in content:
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
