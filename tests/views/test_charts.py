"""Charts put the numbers where they belong, whatever the numbers and the names are."""

import io
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from consolidate.views.charts import (
    COLORS,
    FULL,
    HALF,
    MARK,
    SERIES,
    Bars,
    Chart,
    Curve,
    HeatMap,
    Lines,
    check_picture,
    decades,
    even_steps,
    image,
    ink_on,
    limits,
    plain,
    shortened,
    write_picture,
)
from formats.errors import InputError, UsageError

HOSTILE = '<script>alert(\'"1&")</script>\x1b[31m\u202e\n$x^$ $\\frac$ _ 漢 שלום'
SVG = "{http://www.w3.org/2000/svg}"
CHARTS: list[Chart] = [
    HeatMap("title", "said", [HOSTILE, "_b"], ["$x$", HOSTILE], [[0.0, None], [0.5, 1.0]], str),
    Bars("title", "said", [HOSTILE, "_b"], [1.0, 0.0], str),
    Lines(
        "title", "said", [Curve(HOSTILE, [(0.0, 0.0), (1.0, 1.0)]), Curve("_b", [(0.5, 0.25)])],
        [(0.5, HOSTILE)], str, ("$x", "$y"), [0, 1],
    ),
]  # fmt: skip


def words(chart: Chart, **options: Any) -> list[str]:
    root = ElementTree.fromstring(image([chart], "svg", **options))
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def inside(chart: Chart) -> bool:
    """Whether nothing touches the edge of the picture, but lines that end at the last stage."""
    with Image.open(io.BytesIO(image([chart], "png"))) as picture:
        assert picture.width == 2 * (FULL if chart.crowded else HALF)
        pixels = picture.convert("RGB")
    sides = [(0, 0, pixels.width, 2), (0, pixels.height - 2, pixels.width, pixels.height)]
    sides += [(0, 0, 2, pixels.height), (pixels.width - 2, 0, pixels.width, pixels.height)]
    return all(pixels.crop(side).getextrema() == ((255, 255),) * 3 for side in sides)


def square(count: int, name: str = "model.layers.{}.self_attn.q_proj.weight") -> HeatMap:
    names = [name.format(i) for i in range(count)]
    return HeatMap("title", "", names, names, [[0.5] * count] * count, "{:.2f}".format)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, from 1 to 21 (WCAG 2)."""

    def luminance(color: str) -> float:
        parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_guidelines() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("ground", ["page", "card"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_colour_can_be_read_on_every_ground(ground: str, dark: bool) -> None:
    named = [COLORS[name][dark] for name in ("ink", "muted", "link")]
    for color in (*named, *SERIES[dark]):
        assert contrast(color, COLORS[ground][dark]) >= 4.5
    assert contrast(COLORS["ink"][dark], COLORS["grid"][dark]) >= 4.5


def test_ink_can_be_read_on_every_colour_of_a_heat_map() -> None:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    shades = [share / 1000 for share in range(1001)]
    viridis = colormaps["viridis"]
    assert min(contrast(to_hex(viridis(shade)), ink_on(shade)) for shade in shades) >= 4.5
    assert ink_on(-1.0) == ink_on(float("nan")) == ""


@pytest.mark.parametrize("kind", ["svg", "png", "pdf"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_same_charts_give_the_same_bytes(kind: str, dark: bool) -> None:
    data = image(CHARTS, kind, dark=dark, heading="heading")
    assert data == image(CHARTS, kind, dark=dark, heading="heading")
    assert kind == "pdf" or MARK.encode() in data[:1024]


def test_a_users_own_settings_change_nothing_and_are_kept() -> None:
    import matplotlib

    before = image(CHARTS, "svg")
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path"}):
        own = dict(matplotlib.rcParams)
        assert image(CHARTS, "svg") == before
        assert dict(matplotlib.rcParams) == own


def test_names_are_only_shown() -> None:
    for chart in CHARTS:
        texts = words(chart)
        assert "_b" in texts
        assert any(text.startswith("<script>") for text in texts)
        assert not any("frac" in text and "$" not in text for text in texts)
    assert "$x$" in words(CHARTS[0])
    assert {"$x", "$y"} <= set(words(CHARTS[2]))


def test_an_svg_says_what_it_shows() -> None:
    root = ElementTree.fromstring(image([CHARTS[1]], "svg"))
    assert root[0].tag == f"{SVG}title"
    assert root[0].text == f"{MARK}: title"
    (said,) = root.iter("{http://purl.org/dc/elements/1.1/}description")
    assert said.text == "said"


def test_colours_are_those_of_the_values() -> None:
    values = [[0.0, None, 1.0], [0.5, 0.25, 0.75]]
    chart = HeatMap("", "", ["a", "b"], ["x", "y", "z"], values, lambda value: "")
    data = image([chart], "png", dark=True)
    with Image.open(io.BytesIO(data)) as picture:
        found = {color for _, color in picture.convert("RGB").getcolors(2**24) or []}
    assert {(0x44, 1, 0x54), (0xFD, 0xE7, 0x25), (0x14, 0x17, 0x1A)} <= found
    assert image([chart], "png") != data


def test_a_heat_map_writes_what_is_known() -> None:
    values = [[0.0, None], [0.5, 1.0]]
    texts = words(HeatMap("", "", ["a", "b"], ["x", "y"], values, "{:.2f}".format))
    assert [text for text in texts if text in ("0.50", "–")] == ["–", "0.50"]
    assert {"a", "b", "x", "y"} <= set(texts)


def test_a_heat_map_on_a_log_scale_leaves_zero_grey() -> None:
    chart = HeatMap("", "", ["a"], ["x", "y", "z"], [[0.0, 0.002, 10.0]], str, log=True)
    assert {"0.0", "0.002", "10.0", "1e-3", "1e1"} <= set(words(chart))
    with Image.open(io.BytesIO(image([chart], "png"))) as picture:
        colors = picture.convert("RGB").getcolors(2**24) or []
    assert max(count for count, color in colors if color == (0xD5, 0xDA, 0xDE)) > 1000


@pytest.mark.parametrize("count", [1, 5, 12, 13, 40])
def test_heat_maps_of_any_size_stay_on_their_page(count: int) -> None:
    chart = square(count)
    assert inside(chart)
    assert words(chart).count("0.50") == (count**2 if count <= 16 else 0)


def test_bars_grow_with_the_logarithm() -> None:
    chart = Bars("title", "", ["a", "b", "c"], [1.0, 100.0, 0.0], "{:g}".format)
    assert {"1e0", "1e1", "1e2", "0", "1", "100", "a", "b", "c"} <= set(words(chart))
    root = ElementTree.fromstring(image([chart], "svg"))
    blue = [p.attrib["d"] for p in root.iter(f"{SVG}path") if SERIES[0][0] in p.get("style", "")]
    edges = [[float(word) for word in path.split()[1::3]] for path in blue]
    widths = [max(edge) - min(edge) for edge in edges]
    assert widths[0] == pytest.approx(0.006 * widths[1], rel=0.01)
    assert widths[2:] in ([], [0.0])
    assert inside(chart)


@pytest.mark.parametrize(
    "values", [[0.0], [5e-324], [sys.float_info.max], [5e-324, sys.float_info.max], [1e-9, 2e-9]]
)
def test_bars_and_cells_of_any_number(values: list[float]) -> None:
    names = [f"layer{i}" for i in range(len(values))]
    assert inside(Bars("title", "", names, values, "{:.3g}".format))
    rows = [[value] for value in values]
    assert inside(HeatMap("title", "", names, ["a"], rows, "{:.3g}".format, log=True))


def test_the_ends_of_scales() -> None:
    assert decades([0.02, 3.0, 0.0]) == (-2, 1)
    assert decades([1.0]) == (0, 1)
    assert decades([0.0]) == (-1, 0)
    assert limits([0.2, 0.4]) == (0.0, 1.0)
    assert limits([-3.0, 0.4]) == (-3.0, 0.4)


def test_steps_of_a_scale_are_round() -> None:
    assert even_steps(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert even_steps(0.768, 0.981) == [0.7, 0.8, 0.9, 1.0]
    assert even_steps(-12.5, -0.5) == [-15.0, -10.0, -5.0, 0.0]
    assert even_steps(2.0, 2.0) == [2.0]
    for low, high in ((-1e308, 1e308), (0.0, 5e-324), (1e9, 1e9 + 1e-6)):
        steps = even_steps(low, high)
        assert (steps[0], steps[-1], len(steps)) == (low, high, 5)


def test_axes_have_names() -> None:
    labels = ("trained on", "score on")
    heat = HeatMap("", "", ["a"], ["b"], [[0.5]], str, False, labels, "score")
    assert {*labels, "score"} <= set(words(heat))
    assert "trace" in words(Bars("", "", ["a"], [1.0], str, "trace"))
    lines = Lines("", "", [Curve("a", [(0.0, 0.0), (1.0, 1.0)])], (), str, labels)
    assert set(labels) <= set(words(lines))


def test_a_legend_is_in_one_row_where_it_fits() -> None:
    def chart(names: list[str]) -> Lines:
        lines = [Curve(name, [(0.0, 0.0), (1.0, 1.0)]) for name in names]
        return Lines("", "", lines, (), str, ("x", "y"))

    def rows(names: list[str]) -> int:
        root = ElementTree.fromstring(image([chart(names)], "svg"))
        found = [text for text in root.iter(f"{SVG}text") if text.text in names]
        assert len(found) == len(names)
        return len({text.attrib["y"] for text in found})

    assert rows(["task a", "task b", "task c"]) == 1
    assert rows([f"a task named {i}" for i in range(5)]) == 3
    assert inside(chart([f"a task whose name is long: {i}" for i in range(5)]))


def test_curves_go_through_their_points() -> None:
    lines = [Curve("a", [(0.0, 0.0), (1.0, 1.0), (2.0, 0.5)]), Curve("b", [(1.5, 0.25)])]
    stages = [(0.5, "first"), (1.5, "second")]
    chart = Lines("", "", lines, stages, "{:.2f}".format, ("while learning", ""), range(3))
    wanted = {"a", "b", "0.00", "0.50", "1.00", "while learning", "first", "second"}
    assert wanted <= set(words(chart))
    root = ElementTree.fromstring(image([chart], "svg"))
    paths = [p.attrib for p in root.iter(f"{SVG}path") if SERIES[0][0] in p.get("style", "")]
    line, _in_the_legend = [path["d"] for path in paths if path["d"].count("L") == 2]
    points = re.findall(r"[ML] (\S+) (\S+)", line)
    (x0, y0), (x1, y1), (x2, y2) = [(float(x), float(y)) for x, y in points]
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 - y1 == pytest.approx(2 * (y2 - y1))


def test_many_tasks_and_points_stay_readable() -> None:
    points = [(i / 250, i / 10_000) for i in range(10_001)]
    lines = [Curve(f"task-{i}", points) for i in range(16)]
    stages = [(i + 0.5, f"task-{i}") for i in range(40)]
    chart = Lines("", "", lines, stages, "{:.2f}".format, ("", ""), range(41))
    data = image([chart], "svg")
    assert len(data) < 100_000  # points on one line are left out
    styles = [path.get("style", "") for path in ElementTree.fromstring(data).iter(f"{SVG}path")]
    drawn = {style for style in styles if any(color in style for color in SERIES[0])}
    assert len(drawn) >= 16
    assert set(words(chart)) >= {f"task-{i}" for i in range(40)}


def test_scores_that_do_not_differ_and_that_overflow() -> None:
    for low, high in ((-2.0, -2.0), (-1e308, 1e308)):
        curve = Curve("a", [(0.0, low), (1.0, high)])
        assert words(Lines("", "", [curve], [(0.5, "a")], "{:.4g}".format, ("", ""), [0, 1]))
        assert words(HeatMap("", "", ["a"], ["b", "c"], [[low, high]], "{:.4g}".format))


def test_charts_stand_beside_each_other_under_a_heading() -> None:
    chart = square(2, "t{}")
    with Image.open(io.BytesIO(image([chart, chart], "png", heading="$heading"))) as picture:
        assert picture.width == 4 * HALF
    assert "$heading" in words(chart, heading="$heading")
    assert image([], "svg", heading="nothing is known")


def test_names_lose_what_all_begin_with() -> None:
    assert shortened(["bert.a.weight", "bert.a.bias", "bert.b"]) == ["a.weight", "a.bias", "b"]
    assert shortened(["model.layers.0", "model.layers.1"]) == ["layers.0", "layers.1"]
    assert shortened(["a.weight"]) == ["a.weight"]
    assert shortened(["a", "a.b"]) == ["a", "a.b"]
    (name,) = shortened(["x" * 60 + ".weight"])
    assert len(name) == 26
    assert name.endswith(".weight")


def test_names_are_shown_on_one_line() -> None:
    assert plain("a\x1b[1m\nb\u202e") == r"a\x1b[1m\nb\u202e"
    cut = plain("begin" + "x" * 10**6 + "end", 20)
    assert len(cut) == 20
    assert cut.startswith("begin")
    assert cut.endswith("xxx") or "…" in cut
    assert plain("é漢", 5) == "é漢"


def test_what_cannot_be_drawn_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endings = (".png", ".svg", ".pdf")
    with pytest.raises(UsageError, match=r"curve\.txt: the name must end in \.png, \.svg or \.pdf"):
        check_picture("--search-plot", tmp_path / "curve.txt", endings)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is not a writable folder"):
        check_picture("--search-plot", tmp_path / "file" / "curve.png", endings)
    made = tmp_path / "to be made" / "curve.PNG"
    check_picture("--search-plot", made, endings)
    write_picture(made, CHARTS[:1])
    assert made.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("consolidate.views.charts.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--search-plot needs .* 'consolidate-ewc\[plot\]'"):
        check_picture("--search-plot", tmp_path / "curve.png", endings)
