"""Sphinx: README.md and docs/ as a site, for `scripts/site`.

The pages are written for GitHub and can be read there as they are. This file adds what Sphinx wants
beyond that: a table of contents, of the pages that can be reached from docs/README.md (Sphinx warns
of others), and the files that HTML inside a page refers to.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments.lexers.data import JsonLexer
from pygments.lexers.special import TextLexer
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging

LOG = logging.getLogger(__name__)
INDEX = "docs/README"
FOLDERS = {
    "how-to": "How-to guides",
    "reference": "Reference",
    "explanation": "Explanation",
    "results": "Results",
}

project = "consolidate"
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**.md"]
highlight_language = "text"
myst_disable_syntax = ["myst_block_break", "myst_line_comment", "myst_role", "myst_target"]
myst_heading_anchors = 6
smartquotes = False  # it makes one dash of the two before an option
html_theme = "furo"
html_title = project
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
linkcheck_allow_unauthorized = True  # a page that asks for a login exists
linkcheck_timeout = 20


def reachable(root: Path) -> list[str]:
    """List the pages that links lead to from the index, the nearest first, without suffix."""
    found, link = [INDEX], re.compile(r"\]\(([^)\s#:]+\.md)(?:#[^)]*)?\)")
    for name in found:  # grows meanwhile
        page = root / f"{name}.md"
        for path in link.findall(page.read_text(encoding="utf-8")):
            target = (page.parent / path).resolve()
            if not target.is_file() or not target.is_relative_to(root):
                continue  # Sphinx warns of it
            other = target.relative_to(root).with_suffix("").as_posix()
            if other not in found:
                found.append(other)
    return found


def add_contents(app: Sphinx, document: nodes.document) -> None:
    """Add to the first page a hidden table of contents, which the theme shows at the side."""
    if app.env.docname != root_doc:
        return
    groups: dict[str, list[str]] = {}
    for page in reachable(app.srcdir):
        if page != root_doc:
            folder = page.removeprefix("docs/").split("/")[0]
            groups.setdefault(FOLDERS.get(folder, ""), []).append(page)
    for caption, pages in groups.items():
        tree = addnodes.toctree(
            entries=[(None, page) for page in pages],
            includefiles=pages,
            caption=caption or None,
            rawcaption=caption,
            parent=root_doc,
            maxdepth=1,
            hidden=True,
            titlesonly=True,
            glob=False,
        )
        document[0].append(nodes.compound("", tree, classes=["toctree-wrapper"]))


def copy_files(app: Sphinx, error: Exception | None) -> None:
    """Copy the files that HTML inside a page refers to, and the first page to index.html."""
    if error is not None or app.builder.format != "html":
        return
    for name in app.env.found_docs:
        page = app.env.doc2path(name)
        text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
        for link in re.findall(r'<(?:img|source)\b[^>]*?\bsrc(?:set)?="([^"]+)"', text):
            file = (page.parent / link).resolve()
            if not file.is_file() or not file.is_relative_to(app.srcdir):
                LOG.warning("%s refers to %s, which does not exist", page, link)
                continue
            target = app.outdir / file.relative_to(app.srcdir)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    shutil.copyfile(app.outdir / f"{root_doc}.html", app.outdir / "index.html")


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the functions above to Sphinx."""
    app.add_lexer("csv", TextLexer)
    app.add_lexer("jsonl", JsonLexer)
    app.connect("doctree-read", add_contents, priority=0)  # before Sphinx collects such tables
    app.connect("build-finished", copy_files)
    return {"parallel_read_safe": True}
