"""The charts of a report: a heat map, bars on a log scale, and curves over the training."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from consolidate.views.drawing import (
    DASHES,
    SERIES,
    Dot,
    Drawing,
    Line,
    Rectangle,
    Text,
    heat_color,
    ink_on,
    plain,
    text_width,
)

WIDTH = 400.0  # of a chart that a phone shows without shrinking much

_ROW = 20.0
_LOW_ROW = 15.0  # of many
_NAME = 26  # letters of a name beside a row
_HEAD = 18  # letters of a name above a column
_SMALL = 11.0
_POINTS = 400  # of a curve: more could not be told apart
_CELL = (14.0, 46.0, 64.0)  # the least width of a cell, that of one with a number in it, the most


@dataclass(frozen=True)
class Curve:
    """The scores on one task; x counts the tasks that were learned, with fractions between."""

    name: str
    points: Sequence[tuple[float, float]]


def heat_map(
    title: str,
    description: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    limits: tuple[float, float],
    write: Callable[[float], str],
    log: bool = False,
) -> Drawing:
    """Draw a table of numbers as coloured cells, with the numbers in them where there is room.

    A cell has no colour where its value is None or, on a log scale, zero.
    """
    names = shortened(rows)
    left = max(text_width(name) for name in names) + 10
    least, numbered, most = _CELL
    cell = min(max((WIDTH - left) / len(columns), least), most)
    if cell < numbered and len(columns) <= 12:
        cell = numbered
    heads = [plain(column, _HEAD) for column in columns]
    flat = all(text_width(head) + 4 <= cell for head in heads)
    slope = max(text_width(head) for head in heads) * math.sqrt(0.5)
    top = 40 + (_ROW if flat else slope + 12)
    height = _row_height(len(rows), 28.0)
    width = max(left + cell * len(columns) + (0 if flat else slope), left + 180)
    drawing = Drawing(title, description, width + 4, top + height * len(rows) + 4)
    drawing.shapes += _color_bar(left, limits, write)
    for j, head in enumerate(heads):
        x = left + cell * (j + 0.5)
        drawing.shapes.append(
            Text(x, top - 12, head, anchor="middle", tip=columns[j])
            if flat
            else Text(x, top - 8, head, turn=-45, tip=columns[j])
        )
    for i, (name, row) in enumerate(zip(names, values, strict=True)):
        y = top + height * (i + 0.5)
        drawing.shapes.append(Text(left - 8, y, name, anchor="end", tip=rows[i]))
        for j, value in enumerate(row):
            x = left + cell * j
            if value is None:
                if cell >= numbered:
                    drawing.shapes.append(Text(x + cell / 2, y, "–", "muted", "middle"))
                continue
            color = "grid"
            if not log or value > 0:
                color = heat_color(_share(value, *limits, log=log))
            tip = f"{rows[i]}, {columns[j]}: {write(value)}"
            box = (x + 0.5, y - height / 2 + 0.5, cell - 1, height - 1)
            drawing.shapes.append(Rectangle(*box, color, tip))
            if cell >= numbered:
                ink = ink_on(color) if color != "grid" else "ink"
                drawing.shapes.append(Text(x + cell / 2, y, write(value), ink, "middle", tip=tip))
    return drawing


def log_bars(
    title: str,
    description: str,
    rows: Sequence[str],
    values: Sequence[float],
    *,
    write: Callable[[float], str],
) -> Drawing:
    """Draw a bar for each row on a log scale; a zero has none."""
    names = shortened(rows)
    left = max(text_width(name) for name in names) + 10
    right, top = 62.0, 26.0
    width = max(WIDTH, left + right + 140)
    low, high = decades(values)
    height = _row_height(len(rows), _ROW)
    drawing = Drawing(title, description, width, top + height * len(rows) + 6)

    def place(value: float) -> float:
        return left + (width - left - right) * _share(value, low, high, log=True)

    first, last = round(math.log10(low)), round(math.log10(high))
    for exponent in range(first, last + 1, max(1, -(-(last - first) // 5))):
        x = place(_power(exponent))
        drawing.shapes += [
            Line([(x, top - 6), (x, drawing.height - 4)], "grid"),
            Text(x, 10, f"1e{exponent}", "muted", "middle", _SMALL),
        ]
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        y = top + height * (i + 0.5)
        drawing.shapes.append(Text(left - 8, y, name, anchor="end", tip=rows[i]))
        end = left
        if value > 0:
            end = max(place(value), left + 2)
            tip = f"{rows[i]}: {write(value)}"
            drawing.shapes.append(Rectangle(left, y - 6, end - left, 12, "series0", tip))
        drawing.shapes.append(Text(end + 6, y, write(value), "muted", size=_SMALL))
    return drawing


def curves(
    title: str,
    description: str,
    stages: Sequence[str],
    lines: Sequence[Curve],
    *,
    limits: tuple[float, float],
    write: Callable[[float], str],
) -> Drawing:
    """Draw the scores over the training, a stage after the other, each of them as wide."""
    per_row = 2
    low, high = limits
    marks = [low * (1 - step / 4) + high * (step / 4) for step in range(5)]
    left = max(text_width(write(mark), _SMALL) for mark in marks) + 12
    top, right, bottom = 14.0, 12.0, 190.0
    legend = 22.0 * -(-len(lines) // per_row)
    drawing = Drawing(title, description, WIDTH, bottom + 42 + legend)

    def place(x: float, value: float) -> tuple[float, float]:
        across = left + (WIDTH - left - right) * x / len(stages)
        return across, bottom - (bottom - top) * _share(value, low, high)

    for mark in marks:
        y = place(0, mark)[1]
        drawing.shapes += [
            Line([(left, y), (WIDTH - right, y)], "grid"),
            Text(left - 6, y, write(mark), "muted", "end", _SMALL),
        ]
    room = (WIDTH - left - right) / len(stages)
    letters = int(room / (_SMALL * 0.6))
    for stage, name in enumerate(stages):
        x = place(stage, low)[0]
        drawing.shapes.append(Line([(x, top), (x, bottom + 6)], "grid"))
        if letters >= 3:
            label = Text(x + room / 2, bottom + 14, plain(name, letters), "muted", "middle", _SMALL)
            drawing.shapes.append(label)
    middle = left + (WIDTH - left - right) / 2
    drawing.shapes.append(Text(middle, bottom + 31, "while learning", "muted", "middle", _SMALL))
    dotted = all(len(line.points) <= 12 * len(stages) for line in lines)
    for i, line in enumerate(lines):
        color, dash = f"series{i % SERIES}", DASHES[i // SERIES % len(DASHES)]
        thinned = [*line.points[: -1 : len(line.points) // _POINTS + 1], *line.points[-1:]]
        points = [place(x, value) for x, value in thinned]
        if len(points) > 1:
            drawing.shapes.append(Line(points, color, 2, dash, tip=line.name))
        if dotted:
            drawing.shapes += [
                Dot(*at, 3, color, f"{line.name}: {write(value)}")
                for at, (_, value) in zip(points, thinned, strict=True)
            ]
        x = left + (WIDTH - left) / per_row * (i % per_row)
        y = bottom + 56 + 22 * (i // per_row)
        drawing.shapes += [
            Line([(x, y), (x + 22, y)], color, 2, dash),
            Text(x + 28, y, plain(line.name, 18), tip=line.name),
        ]
    return drawing


def decades(values: Sequence[float]) -> tuple[float, float]:
    """Give the powers of ten around the values that are above zero; 0.1 and 1 where none is."""
    positive = [math.log10(value) for value in values if value > 0]
    if not positive:
        return 0.1, 1.0
    low = math.floor(min(positive))
    return _power(low), _power(max(math.ceil(max(positive)), low + 1))


def shortened(names: Sequence[str]) -> list[str]:
    """Cut names of parameters to what fits beside a row: what all begin with goes first."""
    parts = [name.split(".") for name in names]
    common = 0
    while len(names) > 1 and all(
        len(own) > common + 1 and own[common] == parts[0][common] for own in parts
    ):
        common += 1
    if common and any(own[common].isdigit() for own in parts):
        common -= 1  # a number alone says little
    return [plain(".".join(own[common:]), _NAME) for own in parts]


def _row_height(rows: int, most: float) -> float:
    return most if rows <= 12 else _ROW if rows <= 48 else _LOW_ROW


def _color_bar(
    left: float, limits: tuple[float, float], write: Callable[[float], str]
) -> list[Rectangle | Text]:
    """Draw which colour stands for what, above the cells."""
    low, high = (write(limit) for limit in limits)
    start = left + text_width(low, _SMALL) + 8
    pieces = 24
    shapes: list[Rectangle | Text] = [
        Rectangle(start + 3 * i, 6, 3.5, 10, heat_color(i / (pieces - 1))) for i in range(pieces)
    ]
    return [
        Text(left, 11, low, "muted", size=_SMALL),
        *shapes,
        Text(start + 3 * pieces + 6, 11, high, "muted", size=_SMALL),
    ]


def _share(value: float, low: float, high: float, *, log: bool = False) -> float:
    """Say where a value is between two others, from 0 to 1; halves, so that nothing overflows."""
    if log:
        value, low, high = math.log10(value), math.log10(low), math.log10(high)
    if high <= low:
        return 0.5
    return min(max((value / 2 - low / 2) / (high / 2 - low / 2), 0.0), 1.0)


def _power(exponent: int) -> float:
    """Give a power of ten, or the end of what a float can hold."""
    if exponent > sys.float_info.max_10_exp:
        return sys.float_info.max
    return 10.0**exponent if exponent > -324 else 5e-324
