"""Tables in Markdown, as a model card and the summary of a CI job show them."""

import re
from collections.abc import Sequence

_SPECIAL = re.compile(r"([\\`*_\[\]#|<>~$:@])")


def escaped(text: str) -> str:
    """Escape a name of the ledger, so that Markdown and HTML show it as it is."""
    line = "".join(c if c.isprintable() else "�" for c in text)[:200]
    marked = _SPECIAL.sub(r"\\\1", line.strip().replace("&", "\0"))
    return marked.replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\0", "&amp;")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Write rows as a table."""
    header, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([header, f"|{' --- |' * len(rows[0])}", *body])
