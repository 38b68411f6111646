"""README and docs/ become a site without a warning, and are within a page's measure as they are."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted(ROOT.glob("docs/**/*.md"))
WRITTEN = [page for page in DOCS if "results" not in page.parts]
LONG = {"cli.md", "options.md", "python.md", "format.md"}  # written by a script, and the one spec
FENCE = re.compile(r"^(`{3,}).*?^\1$", re.DOTALL | re.MULTILINE)


def build(root: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """Do what scripts/site does."""
    words = ["-b", "html", "-c", "docs", "-W", "--keep-going", "-E", "-a", "-q", "-d"]
    command = [sys.executable, "-m", "sphinx", *words, output / ".doctrees", ".", output]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Yield lines with their numbers, without blocks of code and tables."""
    text = page.read_text(encoding="utf-8")
    without = FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)
    for number, line in enumerate(without.splitlines(), 1):
        if not line.startswith("|"):
            yield number, line


def test_the_site_builds_without_a_warning_and_has_its_pictures(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "index.html").read_bytes() == (tmp_path / "README.html").read_bytes()
    pictures = 0
    for source in [ROOT / "README.md", *DOCS]:
        page = (tmp_path / source.relative_to(ROOT)).with_suffix(".html")
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r'<(?:img|source)\b[^>]*?\bsrc(?:set)?="([^"]+)"', text):
            if not link.startswith("data:"):
                assert (page.parent / unquote(link)).is_file(), f"{page} refers to {link}"
                pictures += 1
    assert pictures > 4


def test_broken_links_lost_pages_and_lost_pictures_are_errors(tmp_path: Path) -> None:
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path)
    others = shutil.ignore_patterns("results", "how-to", "reference", "explanation")
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=others)
    (tmp_path / "docs" / "alone.md").write_text("# Alone\n")
    with (tmp_path / "docs" / "README.md").open("a", encoding="utf-8") as index:
        index.write(
            "\n[a](nothing.md) [b](../README.md#nothing)\n\n<img src='no'><img src=\"x.png\">\n"
        )
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    for words in (
        "alone.md: WARNING: document isn't included in any toctree",
        "cross-reference target not found: 'nothing.md'",
        "local id not found in doc 'README': 'nothing'",
        "refers to x.png, which does not exist",
    ):
        assert words in done.stderr


@pytest.mark.parametrize("page", DOCS, ids=relative)
def test_pages_have_no_syntax_that_a_forge_does_not_render(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"^(```|:::|~~~)\{", text, re.MULTILINE)  # directives
    text = re.sub(r"`[^`\n]+`", "`code`", FENCE.sub("", text))
    assert not re.search(r"\{[a-z:-]+\}`|^\([\w-]+\)=$", text, re.MULTILINE)  # roles, targets


@pytest.mark.parametrize("page", WRITTEN, ids=relative)
def test_pages_are_at_most_100_columns_wide_and_250_lines_long(page: Path) -> None:
    wide = [f"{relative(page)}:{number}" for number, line in prose(page) if len(line) > 100]
    assert not wide, "lines over 100 columns"
    assert page.name in LONG or page.read_text(encoding="utf-8").count("\n") <= 250
