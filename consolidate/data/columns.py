"""The columns of task data: which holds the text, which the label."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from consolidate.options import Columns
from formats.errors import InputError
from formats.rows import Rows


def columns_of(given: Columns | None, named: Mapping[str, str]) -> Columns:
    """Take the columns from the options, and from the task file where the options name none.

    Args:
        given: The options.
        named: What the task file says, by role.

    Returns:
        Where the inputs and labels are.
    """
    options = {} if given is None else {k: v for k, v in asdict(given).items() if v is not None}
    return Columns(**{**named, **options})


LABEL_COLUMNS = {
    "token-classification": ("labels", "ner_tags", "tags", "label"),
    "multi-label": ("labels", "label"),
    "regression": ("label", "labels", "score"),
}


def label_column(rows: Rows, columns: Columns, objective: str) -> str:
    """Find the column of the labels."""
    defaults = LABEL_COLUMNS.get(objective, ("label", "labels"))
    return find_column(rows, columns.label, defaults, "label")


def find_column(rows: Rows, given: str | None, defaults: Sequence[str], role: str) -> str:
    """Find the column with a role.

    Args:
        rows: The data.
        given: The name the user gave.
        defaults: The usual names, the likeliest first.
        role: Of the option ``--ROLE-column``.

    Returns:
        A name in `rows.columns`.

    Raises:
        InputError: There is none such.
    """
    for name in [given] if given is not None else defaults:
        if name in rows.columns:
            return name
    option = f"--{role.replace('_', '-')}-column"
    wanted = repr(given) if given is not None else " or ".join(map(repr, defaults))
    raise InputError(
        f"{rows.name} has no column {wanted}; it has {', '.join(map(repr, rows.columns))}. "
        f"Name the right one with {option}"
    )
