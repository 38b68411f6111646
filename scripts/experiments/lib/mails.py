"""The mails of SpamAssassin."""

import json
import re
from pathlib import Path


def mails(folder: Path) -> list[tuple[str, str]]:
    """Read (label, subject and body), without tags and without mails that are there twice."""
    rows = {}
    for path in sorted(folder.glob("*-[12]/*.json")):
        header, _, body = json.loads(path.read_text(encoding="utf-8"))["text"].partition("\n\n")
        subject = re.search(r"^Subject:(.*)$", header, re.MULTILINE | re.IGNORECASE)
        text = re.sub(r"<[^>]*>", " ", f"{subject.group(1) if subject else ''} {body}")
        text = " ".join(text.split())
        if text:
            rows[text] = "spam" if path.parent.name.startswith("spam") else "other"
    return [(label, text) for text, label in rows.items()]
