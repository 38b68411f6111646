"""The columns of task data by role, such as text and label."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace

from consolidate.options import Columns
from formats.errors import InputError
from formats.rows import Rows
from formats.wording import did_you_mean


def columns_of(given: Columns, named: Mapping[str, str]) -> Columns:
    """Return the columns that the options name, and else those of the task file."""
    options = {role: name for role, name in asdict(given).items() if name is not None}
    return Columns(**{**named, **options})


def of_rows(given: Columns, rows: Rows, known: Collection[str]) -> Columns:
    """Leave out names of known columns, those of other data, that the rows lack."""
    lacking = {role for role, name in asdict(given).items() if name in {*known} - {*rows.columns}}
    if lacking & {"prompt", "completion"}:  # either alone is nothing to read
        lacking |= {"prompt", "completion"}
    return replace(given, **dict.fromkeys(lacking))


INPUT_COLUMNS = ("inputs", "input", "x")
"""The usual names of the input tensor."""
_USUAL_LABELS = ("label", "labels")
LABEL_COLUMNS = {
    "token-classification": ("labels", "ner_tags", "tags", "label"),
    "multi-label": ("labels", "label"),
    "regression": ("label", "labels", "score"),
}


def label_column(rows: Rows, columns: Columns, objective: str) -> str:
    """Find the column of the labels."""
    return find_column(rows, columns, "label", *LABEL_COLUMNS.get(objective, _USUAL_LABELS))


def lacks_labels(rows: Rows, columns: Columns, objective: str) -> bool:
    """Return whether there is no column of labels, and none was named."""
    usual = LABEL_COLUMNS.get(objective, _USUAL_LABELS)
    return columns.label is None and not set(usual) & set(rows.columns)


def kind_of_rows(rows: Rows, columns: Columns) -> str:
    """Return what a causal language model reads: chats, completions (of prompts) or texts."""
    has, named = frozenset(rows.columns), columns.text is not None
    given = columns.prompt is not None or columns.completion is not None
    if columns.messages is not None or (not named and not given and "messages" in has):
        return "chats"
    if given or (not named and {"prompt", "completion"} <= has):
        return "completions"
    return "texts"


def default_loss(rows: Rows, columns: Columns) -> str:
    """Return what the loss of a causal language model is on by default."""
    return "completion" if kind_of_rows(rows, columns) == "completions" else "all"


def can_have_loss(rows: Rows, columns: Columns, loss_on: str) -> bool:
    """Return whether the first row has what the loss is to be on; the others may differ."""
    match kind_of_rows(rows, columns):
        case "chats":
            return loss_on != "completion"
        case "completions":
            prompt = find_column(rows, columns, "prompt")
            return loss_on != "assistant" or isinstance(rows[0].get(prompt), list)
    return loss_on == "all"


def find_column(rows: Rows, columns: Columns, role: str, *usual: str) -> str:
    """Find the column of a role: the given name, else the first usual one that exists."""
    given = getattr(columns, role)
    names = [given] if given is not None else usual or (role,)
    for name in names:
        if name in rows.columns:
            return name
    near = did_you_mean(given or "", rows.columns)
    raise InputError(
        f"{rows.name}: expected a column {' or '.join(map(repr, names))}, found "
        f"{', '.join(map(repr, rows.columns))}; {near + ' ' * bool(near)}name the column with "
        f"--{role.replace('_', '-')}-column"
        + ", or that of images with --image-column"
        * (role == "inputs")
    )
