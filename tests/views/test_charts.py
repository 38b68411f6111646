"""Charts put the numbers where they belong, whatever the numbers are."""

import sys

import pytest

from consolidate.views.charts import Curve, curves, decades, heat_map, log_bars, shortened
from consolidate.views.drawing import Drawing, Line, Rectangle, Text, heat_color, text_width


def boxes(drawing: Drawing) -> list[Rectangle]:
    return [shape for shape in drawing.shapes if isinstance(shape, Rectangle) and shape.tip]


def words(drawing: Drawing) -> list[str]:
    return [shape.text for shape in drawing.shapes if isinstance(shape, Text)]


def inside(drawing: Drawing) -> bool:
    """Whether every shape, and every text that is not turned, is on the page."""
    for shape in drawing.shapes:
        if isinstance(shape, Rectangle):
            ends = [(shape.x, shape.y), (shape.x + shape.width, shape.y + shape.height)]
        elif isinstance(shape, Line):
            ends = list(shape.points)
        elif isinstance(shape, Text):
            width = text_width(shape.text, shape.size)
            back = {"start": 0.0, "middle": 0.5, "end": 1.0}[shape.anchor]
            ends = [(shape.x - back * width, shape.y)]
            if not shape.turn:
                ends.append((shape.x + (1 - back) * width, shape.y))
        else:
            ends = [(shape.x, shape.y)]
        if not all(-1 <= x <= drawing.width + 1 and 0 <= y <= drawing.height for x, y in ends):
            return False
    return True


def test_a_heat_map_colours_what_is_known() -> None:
    drawing = heat_map(
        "title", "description", ["a", "b"], ["x", "y"], [[0.0, None], [0.5, 1.0]],
        limits=(0.0, 1.0), write=lambda value: f"{value:.2f}",
    )  # fmt: skip
    assert [box.color for box in boxes(drawing)] == [heat_color(s) for s in (0.0, 0.5, 1.0)]
    assert [box.tip for box in boxes(drawing)] == ["a, x: 0.00", "b, x: 0.50", "b, y: 1.00"]
    assert [text for text in words(drawing) if text in ("–", "0.50")] == ["–", "0.50"]
    assert inside(drawing)


def test_a_heat_map_on_a_log_scale_leaves_zero_grey() -> None:
    drawing = heat_map(
        "title", "description", ["a"], ["x", "y", "z"], [[0.0, 0.1, 10.0]],
        limits=(0.001, 10.0), write=str, log=True,
    )  # fmt: skip
    assert [box.color for box in boxes(drawing)] == ["grid", heat_color(0.5), heat_color(1)]


@pytest.mark.parametrize("count", [1, 5, 12, 13, 40])
def test_heat_maps_of_any_size_stay_on_their_page(count: int) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(count)]
    drawing = heat_map(
        "title", "description", names, names, [[0.5] * count] * count,
        limits=(0.0, 1.0), write=lambda value: f"{value:.2f}",
    )  # fmt: skip
    assert inside(drawing)
    assert len(boxes(drawing)) == count**2
    assert ("0.50" in words(drawing)) == (count <= 12)
    assert drawing.width < 1200


def test_bars_grow_with_the_logarithm() -> None:
    drawing = log_bars("title", "", ["a", "b", "c"], [1.0, 100.0, 0.0], write=lambda v: f"{v:g}")
    lengths = [box.width for box in boxes(drawing)]
    assert lengths == [2, pytest.approx(drawing.width - 62 - boxes(drawing)[0].x)]
    assert {"1e0", "1e1", "1e2", "0", "100"} <= set(words(drawing))
    assert inside(drawing)


@pytest.mark.parametrize(
    "values", [[0.0], [5e-324], [sys.float_info.max], [5e-324, sys.float_info.max], [1e-9, 2e-9]]
)
def test_bars_of_any_number(values: list[float]) -> None:
    names = [f"layer{i}" for i in range(len(values))]
    assert inside(log_bars("title", "", names, values, write=lambda value: f"{value:.3g}"))


def test_decades_enclose() -> None:
    assert decades([0.02, 3.0, 0.0]) == (0.01, 10.0)
    assert decades([1.0]) == (1.0, 10.0)
    assert decades([0.0]) == (0.1, 1.0)


def test_curves_go_through_their_points() -> None:
    lines = [Curve("a", [(0.0, 0.0), (1.0, 1.0), (2.0, 0.5)]), Curve("b", [(1.5, 0.25)])]
    drawing = curves("title", "", ["a", "b"], lines, limits=(0.0, 1.0), write=lambda v: f"{v:.2f}")
    (line,) = [shape for shape in drawing.shapes if isinstance(shape, Line) and shape.tip == "a"]
    (x0, y0), (x1, y1), (x2, y2) = line.points
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 - y1 == pytest.approx(2 * (y2 - y1))
    assert inside(drawing)
    assert {"a", "b", "0.00", "0.50", "1.00", "while learning"} <= set(words(drawing))


def test_many_tasks_and_points_stay_readable() -> None:
    points = [(i / 1000, i / 10_000) for i in range(10_001)]
    lines = [Curve(f"task-{i}", points) for i in range(16)]
    drawing = curves(
        "title", "", [f"task-{i}" for i in range(40)], lines, limits=(0.0, 1.0),
        write=lambda value: f"{value:.2f}",
    )  # fmt: skip
    drawn = [shape for shape in drawing.shapes if isinstance(shape, Line) and shape.tip]
    assert max(len(line.points) for line in drawn) <= 402
    assert len({(line.color, line.dash) for line in drawn}) == 16
    assert inside(drawing)


def test_scores_that_do_not_differ_and_that_overflow() -> None:
    for low, high in ((-2.0, -2.0), (-1e308, 1e308)):
        lines = [Curve("a", [(0.0, low), (1.0, high)])]
        drawing = curves("", "", ["a"], lines, limits=(low, high), write=lambda v: f"{v:.4g}")
        assert inside(drawing)


def test_names_lose_what_all_begin_with() -> None:
    assert shortened(["bert.a.weight", "bert.a.bias", "bert.b"]) == ["a.weight", "a.bias", "b"]
    assert shortened(["model.layers.0", "model.layers.1"]) == ["layers.0", "layers.1"]
    assert shortened(["a.weight"]) == ["a.weight"]
    assert shortened(["a", "a.b"]) == ["a", "a.b"]
    (name,) = shortened(["x" * 60 + ".weight"])
    assert len(name) == 26
    assert name.endswith(".weight")
