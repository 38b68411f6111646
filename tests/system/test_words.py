"""All texts are in the words of the glossary: its table of words is read, and holds everywhere."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from consolidate.cli import cli
from scripts.write_docs import help_texts

ROOT = Path(__file__).resolve().parents[2]
GLOSSARY = ROOT / "docs" / "reference" / "glossary.md"
DOCS = [p for p in sorted(ROOT.glob("docs/**/*.md")) if p != GLOSSARY and "results" not in p.parts]
MEASURED = ("fisher*", "memory", "penalty", "shards", "robustness")  # by the scripts below
DOCS += [page for name in MEASURED for page in sorted(ROOT.glob(f"docs/results/{name}.md"))]
PAGES = [
    ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
] + DOCS
TEMPLATES = [p for p in sorted(ROOT.glob("consolidate/**/*.*")) if p.suffix in (".jinja", ".md")]
FOLDERS = ("consolidate/**", "formats/**", "scripts", "scripts/benchmarks", "scripts/robustness")
SOURCES = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py"))
HELP = dict(help_texts(cli, "consolidate"))


def table() -> dict[str, str]:
    """What is not to be written -> what to write instead."""
    _, _, text = GLOSSARY.read_text(encoding="utf-8").partition("| we write | not |")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {
        phrase.strip(): better.strip()
        for better, phrases in rows
        if "---" not in better
        for phrase in phrases.split(";")
    }


def pattern(phrase: str) -> re.Pattern[str]:
    words = [r"\S+(?:\s+\S+){0,2}?" if word == "…" else re.escape(word) for word in phrase.split()]
    return re.compile(r"(?<![\w-])" + r"\s+".join(words) + r"(?![\w-])", re.IGNORECASE)


BANNED = {phrase: pattern(phrase) for phrase in table()}


def places(text: str, first: int = 1) -> Iterator[str]:
    """Yield where a text breaks the rule: the line, the phrase, and what to write."""
    for phrase, banned in BANNED.items():
        for found in banned.finditer(text):
            line = first + text.count("\n", 0, found.start())
            yield f"line {line}: {' '.join(found[0].split())!r}, write: {table()[phrase]}"


def is_private(node: ast.AST) -> bool:
    return getattr(node, "name", "").startswith("_")


def strings(tree: ast.AST, private: bool = False) -> Iterator[tuple[int, str]]:
    """Yield the literals of a module with their lines, but no docstrings of private names."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.iter_child_nodes(tree):
        inner = private or (isinstance(node, documented) and is_private(node))
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if docstring and isinstance(tree, documented) and private:
            continue
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "{}" for p in node.values]
            yield node.lineno, "".join(map(str, parts))
            for part in node.values:
                if isinstance(part, ast.FormattedValue):
                    yield from strings(part, inner)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        else:
            yield from strings(node, inner)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_table_of_words_is_read() -> None:
    assert len(BANNED) > 40
    assert BANNED["anew"].search("made\nAnew.")
    assert not BANNED["so many"].search("also many, so manyfold")
    assert BANNED["put … aside"].search("it puts, and put the old layer aside")
    assert not BANNED["put … aside"].search("put one two three four aside")
    (found,) = places("one\nis said\n")
    assert found == "line 2: 'is said', write: is reported, is printed"
    code = 'def f():\n  """Anew."""\n  return f"a {x} anew"\ndef _g():\n  """Anew."""\n  "no"'
    assert [line for line, text in strings(ast.parse(code)) if list(places(text))] == [2, 3]


@pytest.mark.parametrize("command", HELP)
def test_help_is_in_the_words_of_the_glossary(command: str) -> None:
    assert list(places(HELP[command])) == []


@pytest.mark.parametrize("source", SOURCES, ids=relative)
def test_messages_and_docstrings_are_in_the_words_of_the_glossary(source: Path) -> None:
    tree = ast.parse(source.read_text(encoding="utf-8"))
    found = [place for line, text in strings(tree) for place in places(text, line)]
    assert found == []


@pytest.mark.parametrize("page", [*PAGES, *TEMPLATES], ids=relative)
def test_pages_are_in_the_words_of_the_glossary(page: Path) -> None:
    assert list(places(page.read_text(encoding="utf-8"))) == []
