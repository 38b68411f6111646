"""The Brown corpus, in its tagged form."""

import re


def plain_text(tagged: str) -> str:
    """Turn Brown's `word/TAG` into running text, a line for each paragraph."""
    lines = []
    for line in tagged.splitlines():
        words = [word.rpartition("/")[0] for word in line.split()]
        text = " ".join(words).replace("`` ", '"').replace(" ''", '"')
        if text:
            lines.append(re.sub(r" ([.,;:?!)])", r"\1", text).replace("( ", "("))
    return "\n".join(lines)
