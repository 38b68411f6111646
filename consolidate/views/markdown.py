"""Tables in Markdown, as a model card and the summary of a CI job show them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from consolidate.views.summary import matrix_rows, means_text, side_by_side_text

_SPECIAL = re.compile(r"([\\`*_\[\]#|<>~$:@])")


def escaped(text: str) -> str:
    """Escape a name of the ledger, so that Markdown and HTML show it as it is.

    Args:
        text: Any text.

    Returns:
        One line, of at most 200 of its characters.
    """
    line = "".join(c if c.isprintable() else "�" for c in text)[:200]
    marked = _SPECIAL.sub(r"\\\1", line.strip().replace("&", "\0"))
    return marked.replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\0", "&amp;")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Write rows as a table.

    Args:
        rows: The header first; of escaped text.

    Returns:
        Lines without a newline at the end.
    """
    header, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([header, f"|{' --- |' * len(rows[0])}", *body])


def matrix_table(summary: Mapping[str, Any]) -> str:
    """Write an accuracy matrix as a table, and ACC, BWT and forgetting beneath it.

    Args:
        summary: What `matrix_summary` returned.

    Returns:
        Lines without a newline at the end.
    """
    header, *rows = matrix_rows(summary)
    named = [[escaped(name), *scores] for name, *scores in rows]
    scores = table([["after ↓ on →", *map(escaped, header[1:])], *named])
    return f"{scores}\n\n{means_text(summary)}."


def show_markdown(summary: Mapping[str, Any]) -> str:
    """Write what `show` returns for the summary of a CI job: the matrix under a heading.

    Args:
        summary: What `show` returned.

    Returns:
        Lines without a newline at the end.
    """
    tasks = ", ".join(escaped(task["name"]) for task in summary["tasks"])
    matrix = summary["accuracy_matrix"]
    scores = "No scores on its tasks are known." if matrix is None else matrix_table(matrix)
    merged = side_by_side_text(summary["side_by_side"])
    return (
        f"### {escaped(summary['checkpoint'])}\n\nIt has learned {tasks}.\n\n{scores} {merged}"
    ).rstrip()
