"""The two ways to write a drawing, and colours that can be read."""

import io
from xml.etree import ElementTree

import pytest
from PIL import Image

from consolidate.views.drawing import (
    COLORS,
    MARK,
    Dot,
    Drawing,
    Line,
    Rectangle,
    Shape,
    Text,
    beside,
    contrast,
    escaped,
    heat_color,
    ink_on,
    plain,
    png,
    style_sheet,
    svg,
    svg_file,
)

HOSTILE = '<script>alert(\'"1&")</script>\x1b[31m\u202e\n$x$ \u6f22'
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def drawing() -> Drawing:
    shapes = [
        Rectangle(10, 10, 80, 20, "#440154", tip=HOSTILE),
        Line([(0, 60), (100, 60)], "series1", 4, "6 3", tip="line"),
        Dot(150, 40, 10, "series2"),
        Text(150, 20, HOSTILE, tip=HOSTILE),
        Text(20, 90, "turned", turn=-45, anchor="middle", size=11),
    ]
    return Drawing("A picture", "of " + HOSTILE, 200, 100, shapes)


def test_an_svg_file_is_well_formed_and_says_what_it_shows(drawing: Drawing) -> None:
    root = ElementTree.fromstring(svg_file(drawing))
    assert root.tag == f"{SVG}svg"
    assert root.attrib["viewBox"] == "0 0 200 100"
    title, description = root[0], root[1]
    assert (title.tag, description.tag) == (f"{SVG}title", f"{SVG}desc")
    assert root.attrib["aria-labelledby"] == f"{title.attrib['id']} {description.attrib['id']}"
    assert description.text == "of " + plain(HOSTILE)
    kinds = [child.tag.removeprefix(SVG) for child in root]
    assert kinds == [
        *("title", "desc", "style", "rect", "rect", "polyline", "circle", "text", "text")
    ]
    assert MARK in svg_file(drawing)[:1024]


def test_svg_in_a_page_has_no_name_space_and_its_own_names(drawing: Drawing) -> None:
    text = svg(drawing, "one")
    assert "http" not in text
    assert 'aria-labelledby="one-title one-description"' in text
    assert "<script" not in text


def test_a_png_is_the_same_picture_each_time(drawing: Drawing) -> None:
    data = png(drawing)
    assert data == png(drawing)
    assert MARK.encode() in data[:1024]
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (400, 200)
        pixels = image.convert("RGB")
        assert pixels.getpixel((100, 40)) == (0x44, 0x01, 0x54)
        assert pixels.getpixel((300, 80)) == (0x00, 0x69, 0x4F)
        assert pixels.getpixel((398, 198)) == (255, 255, 255)
        assert pixels.getpixel((4, 120)) == (0xA9, 0x41, 0x00)


def test_contrast_is_that_of_the_guidelines() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("name", sorted(COLORS.keys() - {"page", "card", "grid"}))
@pytest.mark.parametrize("ground", ["page", "card"])
@pytest.mark.parametrize("screen", [0, 1], ids=["light", "dark"])
def test_every_colour_can_be_read_on_every_ground(name: str, ground: str, screen: int) -> None:
    assert contrast(COLORS[name][screen], COLORS[ground][screen]) >= 4.5


def test_ink_can_be_read_on_every_colour_of_a_heat_map() -> None:
    colors = [heat_color(share / 100) for share in range(-10, 111)]
    assert colors[0] == colors[10] == "#440154"
    assert colors[-1] == colors[110] == "#fde725"
    assert min(contrast(color, ink_on(color)) for color in colors) >= 4.5
    assert contrast(COLORS["grid"][0], COLORS["ink"][0]) >= 4.5
    assert contrast(COLORS["grid"][1], COLORS["ink"][1]) >= 4.5


def test_paper_is_light_whatever_the_screen_is() -> None:
    css = style_sheet()
    assert css.index("@media (prefers-color-scheme:dark)") < css.index("@media print")
    assert css.split("@media print")[1].startswith("{:root{--page:#ffffff;")


def test_names_are_shown_on_one_line_and_escaped() -> None:
    assert plain("a\x1b[1m\nb\u202e") == r"a\x1b[1m\nb\u202e"
    assert escaped('<a href="x">\'&') == "&lt;a href=&quot;x&quot;&gt;&#x27;&amp;"
    cut = plain("begin" + "x" * 10**6 + "end", 20)
    assert len(cut) == 20
    assert cut.startswith("begin")
    assert cut.endswith("xxx") or "…" in cut
    assert plain("é漢", 5) == "é漢"


def test_drawings_beside_each_other_keep_their_shapes(drawing: Drawing) -> None:
    whole = beside("a heading", [drawing, drawing])
    assert whole.description == f"{drawing.description} {drawing.description}"
    heading, *shapes = whole.shapes
    assert isinstance(heading, Text)
    assert len(shapes) == 2 * len(drawing.shapes)
    assert whole.height == drawing.height + 30
    assert whole.width == 2 * drawing.width + 24
    for own, left, right in zip(
        drawing.shapes, shapes, shapes[len(drawing.shapes) :], strict=False
    ):
        (x, y), (x1, y1), (x2, y2) = map(corner, (own, left, right))
        assert (x1, y1, y2) == (x, y + 30, y + 30)
        assert x2 == x + drawing.width + 24


def corner(shape: Shape) -> tuple[float, float]:
    return shape.points[0] if isinstance(shape, Line) else (shape.x, shape.y)
