"""The report: a page that browsers and screen readers take, whatever the ledger says."""

import json
import os
import re
import subprocess
import sys
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from shutil import copytree
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

import consolidate
from consolidate.api import report
from consolidate.cli import main
from consolidate.commands.report import PICTURES
from consolidate.views.charts import MARK, natural_height
from consolidate.views.figures import figures
from formats.errors import InputError, UsageError
from formats.fisher_json import read_ledger
from scripts.screenshots import find_chromium, screenshot
from support import report_checkpoints as checkpoints

needs_chromium = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium on PATH or in the variable CHROMIUM"
)
VOID = {"meta", "link", "br", "img"}
EMBEDDED = "data:image/svg+xml;base64,"


class Page(HTMLParser):
    """Holds what a test asks of a page; refuses tags that are not closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.parents: list[tuple[str, ...]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.parents.append(tuple(self.open))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def pictures(self, kind: str) -> list[bytes]:
        return [
            b64decode(picture["src"].removeprefix(EMBEDDED))
            for picture in self.all("img")
            if picture["class"] == kind
        ]

    def all(self, *names: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.tags if tag in names]


def many_layers(folder: Path) -> Path:
    names = [
        f"model.layers.{i}.self_attn.{part}_proj.weight" for i in range(100) for part in "qkvo"
    ]
    tasks = [
        checkpoints.task(
            f"task-{i}", layers=checkpoints.layers(names, 10.0**-i, 0.5 if i else None)
        )
        for i in range(20)
    ]
    return checkpoints.write(folder, tasks, names)


def one_task(folder: Path) -> Path:
    only = checkpoints.task("only", layers=checkpoints.layers(["w"], 1.0))
    return checkpoints.write(folder, [only], ["w"])


CHECKPOINTS: dict[str, Any] = {
    "chain": checkpoints.chain,
    "hostile": checkpoints.hostile,
    "many layers": many_layers,
    "one task": one_task,
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the chain `model` and `search.json`, its report `r.html` and pictures `p`."""
    folder = tmp_path_factory.mktemp("chain")
    model = checkpoints.chain(folder / "model")
    search = folder / "search.json"
    search.write_text(json.dumps(checkpoints.SEARCH), encoding="utf-8")
    report(model, output=folder / "r.html", plots=folder / "p", search=search)
    return folder


@pytest.fixture(scope="module", params=CHECKPOINTS)
def page(
    request: pytest.FixtureRequest, chain: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if request.param == "chain":
        return chain / "r.html"
    folder = tmp_path_factory.mktemp("report")
    model = CHECKPOINTS[request.param](folder / "model")
    return Path(report(model, output=folder / "r.html")["report"])


def test_the_page_is_well_formed_and_needs_nothing_else(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    assert text.startswith("<!doctype html>")
    assert found.all("html") == [{"lang": "en"}]
    assert not found.all("script", "iframe", "object", "embed", "form", "base")
    for _, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert re.match(r"#|data:,$", attributes.get("href", "#"))
        assert attributes.get("src", EMBEDDED).startswith(EMBEDDED)
        assert not attributes.keys() & {"srcset", "action", "xlink:href"}
    for picture in found.pictures("light") + found.pictures("dark"):
        links = re.findall(rb'(?:href|src)="([^"]*)"', picture)
        assert all(re.match(rb"#|data:image/png;base64,", link) for link in links)
    assert "url(" not in text
    assert "@import" not in text
    policy = [meta for meta in found.all("meta") if "http-equiv" in meta]
    assert policy[0]["content"].startswith("default-src 'none'")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", text)


def test_the_page_can_be_heard_and_used_by_keyboard(page: Path) -> None:
    found = Page(page.read_text(encoding="utf-8"))
    names = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(names) == len(set(names))
    for link in found.all("a"):
        assert link["href"].removeprefix("#") in names
    figures = len(found.all("figure"))
    assert len(found.pictures("light")) == len(found.pictures("dark")) == figures > 0
    assert all(len(picture["alt"]) > 20 for picture in found.all("img"))
    assert len(found.all("caption")) == len(found.all("table")) >= figures
    assert {cell["scope"] for cell in found.all("th")} == {"col", "row"}
    assert len(found.all("main")) == len(found.all("h1")) == len(found.all("nav")) == 1
    for attributes in found.all("div"):
        if attributes.get("class") == "scroll":
            assert attributes["tabindex"] == "0"
            assert attributes["aria-label"]
    for (tag, _), parents in zip(found.tags, found.parents, strict=True):
        if tag == "table":
            assert "div" in parents  # it scrolls by itself, and the page does not


def test_what_a_ledger_says_is_only_shown(tmp_path: Path) -> None:
    folder = checkpoints.hostile(tmp_path / "m")
    page = Path(report(folder, output=tmp_path / "r.html", plots=tmp_path / "p")["report"])
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img src" not in text
    assert r"<script>alert('\"1&\")</script>\x1b[31m\u202e".replace('\\"', '"') in Page(text).text
    files = [path.read_bytes() for path in (tmp_path / "p").glob("*.svg")]
    for picture in [*files, *Page(text).pictures("light"), *Page(text).pictures("dark")]:
        root = ElementTree.fromstring(picture)
        assert not [element for element in root.iter() if element.tag.endswith("}script")]


def test_the_page_tells_the_chain(chain: Path) -> None:
    text = Page((chain / "r.html").read_text()).text
    for words in ("model", "3 tasks", "18 weights", "ewc, λ = 10", "no penalty", "0.950"):
        assert words in text
    assert r"\n" not in text
    assert "the task the score is on. Read a column downwards" in text
    for words in ("1.running_mean", "no gradient", "consolidate0.1.0", "online, γ = 1"):
        assert words in text


def test_without_scores_it_says_how_to_take_them(tmp_path: Path) -> None:
    page = report(one_task(tmp_path / "m"), output=tmp_path / "r.html")["report"]
    assert "--evaluate TASK=DATA" in Path(page).read_text()


def test_the_same_checkpoint_gives_the_same_bytes(chain: Path, tmp_path: Path) -> None:
    again = consolidate.report(
        chain / "model",
        output=tmp_path / "r.html",
        plots=tmp_path / "p",
        search=chain / "search.json",
    )
    assert again["tasks"] == ["a", "b", "c"]
    assert len(again["plots"]) == 2 * len(PICTURES)
    assert again["report"] == str(tmp_path / "r.html")
    for path in map(Path, [again["report"], *again["plots"]]):
        assert path.read_bytes() == (chain / path.relative_to(tmp_path)).read_bytes()


def test_another_process_gives_the_same_bytes(chain: Path, tmp_path: Path) -> None:
    model, search = str(chain / "model"), str(chain / "search.json")
    script = (
        "from consolidate import report\n"
        f"report({model!r}, output='{tmp_path}/r.html', plots='{tmp_path}/p', search={search!r})"
    )
    (tmp_path / "matplotlibrc").write_text("font.size: 12")
    settings = {"PYTHONHASHSEED": "1", "MPLCONFIGDIR": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (tmp_path / "r.html").read_bytes() == (chain / "r.html").read_bytes()
    first, second = (
        {p.name: p.read_bytes() for p in (at / "p").iterdir()} for at in (chain, tmp_path)
    )
    assert len(first) == 2 * len(PICTURES)
    assert first == second


def test_pictures_are_those_of_the_page(chain: Path) -> None:
    found = Page((chain / "r.html").read_text())
    assert len(found.pictures("light")) == len(PICTURES)
    for name, light, dark in zip(
        PICTURES, found.pictures("light"), found.pictures("dark"), strict=True
    ):
        assert (chain / "p" / f"{name}.svg").read_bytes() == light != dark
        with Image.open(chain / "p" / f"{name}.png") as image:
            width = float(ElementTree.fromstring(light).attrib["width"].removesuffix("pt"))
            assert image.width == pytest.approx(2 * width * 96 / 72, abs=1)


def test_no_half_of_a_row_is_empty(page: Path) -> None:
    columns = 0
    for section in Page(page.read_text()).all("section"):
        if section["id"] in PICTURES:
            assert section.get("class", "") in ("", "wide")
            wide = "class" in section
            assert not wide or columns % 2 == 0
            columns += 2 if wide else 1
    assert columns % 2 == 0


def test_pictures_beside_each_other_are_equally_high(chain: Path) -> None:
    found = Page((chain / "r.html").read_text())
    heights = [
        float(ElementTree.fromstring(picture).attrib["height"].removesuffix("pt"))
        for picture in found.pictures("light")
    ]
    assert heights[0] == heights[1]  # matrix and curves
    assert heights[-2] == heights[-1]  # added and overlap


def test_a_picture_is_not_drawn_out(tmp_path: Path) -> None:
    names = [f"layer{i}" for i in range(24)]
    metrics = {"before": checkpoints.on(a=0.9, b=0.1), "after": checkpoints.on(a=0.8, b=0.9)}
    tasks = [
        checkpoints.task("a", layers=checkpoints.layers(names, 1.0)),
        checkpoints.task("b", layers=checkpoints.layers(names, 1.0, 0.5), metrics=metrics),
    ]
    summary = consolidate.show(checkpoints.write(tmp_path / "m", tasks, names), top=sys.maxsize)
    ledger = read_ledger(tmp_path / "m" / "fisher" / "fisher.json")
    found = figures(ledger, summary["parameters"], summary["accuracy_matrix"])
    one, other = {f.name: f for f in found}["tradeoff"], {f.name: f for f in found}["protection"]
    assert one.height == pytest.approx(2 * natural_height(one.chart))
    assert one.height < other.height == natural_height(other.chart)


def test_without_matplotlib_the_page_has_its_tables_and_says_what_is_missing(
    chain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("consolidate.views.charts.find_spec", lambda name: None)
    without = tmp_path / "r.html"
    report(chain / "model", output=without, search=chain / "search.json")
    assert "pip install 'consolidate-ewc[plot]'" in caplog.text
    whole, found = (Page(page.read_text()) for page in (chain / "r.html", without))
    assert not found.all("img")
    assert "pip install 'consolidate-ewc[plot]'" in found.text
    assert found.all("details")
    assert all("open" in details for details in found.all("details"))
    assert len(found.all("td")) == len(whole.all("td"))
    assert "pip install" not in whole.text


def test_a_picture_that_is_no_report_s_is_not_removed(chain: Path, tmp_path: Path) -> None:
    plots = tmp_path / "plots"
    plots.mkdir()
    (plots / "search.png").write_bytes(b"mine")
    report(chain / "model", output=tmp_path / "r.html", plots=plots, overwrite=True)
    assert (plots / "search.png").read_bytes() == b"mine"


def test_an_earlier_report_is_replaced_and_nothing_else(chain: Path, tmp_path: Path) -> None:
    one, new = one_task(tmp_path / "one"), tmp_path / "new"
    output, plots = new / "r.html", new / "p"
    copytree(chain, new)
    report(one, output=output, plots=plots)
    assert "only" in output.read_text()
    left = {path.name for path in plots.iterdir()}
    assert left == {"added.png", "added.svg", "protection.png", "protection.svg"}
    (plots / "matrix.png").write_bytes(b"mine")
    with pytest.raises(
        InputError, match=r"matrix\.png already exists and is not a report .* --overwrite"
    ):
        report(chain / "model", output=tmp_path / "no.html", plots=plots)
    assert not (tmp_path / "no.html").exists()
    output.write_text("notes")
    with pytest.raises(InputError, match=r"r\.html already exists"):
        report(one, output=output)
    assert output.read_text() == "notes"
    report(one, output=output, overwrite=True)
    assert MARK in output.read_text()


def test_what_cannot_be_done_is_refused_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints.chain(tmp_path / "model")
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="the checkpoint has no Fisher"):
        report(tmp_path / "bare", output=tmp_path / "r.html")
    with pytest.raises(InputError, match="is a folder; name a file"):
        report(folder, output=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is not a writable folder"):
        report(folder, output=tmp_path / "file" / "r.html")
    for name in ("r.txt", "r"):
        with pytest.raises(UsageError, match=f"{name}: the name must end in .html"):
            report(folder, output=tmp_path / name)
    with pytest.raises(UsageError, match="--revision is for repositories"):
        report(folder, revision="main")
    monkeypatch.setattr("consolidate.views.charts.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'consolidate-ewc\[plot\]'"):
        report(folder, output=tmp_path / "r.html", plots=tmp_path / "p")
    assert not (tmp_path / "r.html").exists()
    assert not (tmp_path / "p").exists()


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one_task(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["report", "model/"])
    assert left.value.code == 0
    assert capsys.readouterr().out == "model-report.html\n"
    with pytest.raises(SystemExit):
        main(["report", "model", "--json", "--plots", "p", "--output", "r.html"])
    result = json.loads(capsys.readouterr().out)
    assert result["checkpoint"] == "model"
    assert result["report"] == "r.html"
    assert result["plots"][:2] == ["p/protection.svg", "p/protection.png"]


@needs_chromium
def test_a_browser_shows_it_without_complaint(page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    assert screenshot(page, picture, width=390, height=1200, dark=True) == []
    with Image.open(picture) as image:
        assert image.size == (390, 1200)
        assert image.convert("RGB").getpixel((2, 2)) == (0x14, 0x17, 0x1A)


@needs_chromium
def test_a_browser_loads_and_runs_nothing_that_a_page_might_hold(tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    report(one_task(tmp_path / "m"), output=page)
    strange = "<img src='http://127.0.0.1:9/x.png'><script>document.body.textContent = ''</script>"
    page.write_text(page.read_text().replace("</main>", f"{strange}</main>"))
    complaints = screenshot(page, tmp_path / "p.png", width=390, height=200)
    assert ["img-src" in line for line in complaints] == [True, False]
    assert "script-src" in complaints[1]


@needs_chromium
def test_the_page_does_not_scroll_sideways_on_a_phone(page: Path, tmp_path: Path) -> None:
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    probe = "<script>console.log('width', document.documentElement.scrollWidth)</script>"
    (tmp_path / "r.html").write_text(text.replace("</body>", f"{probe}</body>"))
    # Windows have a least width; frames have not.
    framed = tmp_path / "framed.html"
    framed.write_text('<iframe src="r.html" style="width:360px;height:700px"></iframe>')
    (line,) = screenshot(framed, tmp_path / "p.png", width=800, height=800)
    assert '"width 360"' in line
