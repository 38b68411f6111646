"""Tables and lines, in plain text and in Markdown, for model cards and summaries of CI jobs."""

import re
from collections.abc import Mapping, Sequence

from consolidate.results import Benchmark

_SPECIAL = re.compile(r"([\\`*_\[\]#|<>~$:@])")


def escaped(text: str) -> str:
    """Escape a name from the ledger, so that Markdown and HTML show it unchanged."""
    line = "".join(c if c.isprintable() else "�" for c in text)[:200]
    marked = _SPECIAL.sub(r"\\\1", line.strip().replace("&", "\0"))
    return marked.replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\0", "&amp;")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as a Markdown table."""
    header, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([header, f"|{' --- |' * len(rows[0])}", *body])


def aligned(
    rows: Sequence[Sequence[str]], *, right_from: int | None = None, least: Sequence[int] = ()
) -> list[str]:
    """Align columns to a minimum width; those from `right_from` on to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[: len(least)] = map(max, widths, least)
    left = len(widths) if right_from is None else right_from
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def shown(value: float | None, form: str) -> str:
    """Format a number; a dash if it is not known."""
    return "–" if value is None else format(value, form)


def benchmarks_text(benchmarks: Mapping[str, Benchmark]) -> list[str]:
    """Say what the score on each benchmark is, a line each."""
    return [
        f"{name}: the score is {found['metric']} of {found['task']}"
        + (f", version {found['version']}" if found["version"] is not None else "")
        + f", on {found['examples']:,} examples (lm-eval {found['harness']})"
        for name, found in benchmarks.items()
    ]
