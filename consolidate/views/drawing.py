"""A drawing of a few kinds of shapes, and the two ways to write it: SVG and PNG."""

import html
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from formats.wording import printable

MARK = "consolidate report"  # in every file that is made here: such a file may be replaced

# What a colour is for -> on a light page, on a dark one. Each can be read on `page` and `card`.
COLORS = {
    "page": ("#ffffff", "#14171a"),
    "card": ("#f4f6f8", "#1e2328"),
    "grid": ("#d5dade", "#3a4248"),
    "ink": ("#1b1f23", "#e9edf0"),
    "muted": ("#56606a", "#a7b1ba"),
    "link": ("#0b5cad", "#7ab8ff"),
    "series0": ("#0b5cad", "#7ab8ff"),
    "series1": ("#a94100", "#ffa066"),
    "series2": ("#00694f", "#4fd1a5"),
    "series3": ("#99256f", "#f08ccb"),
    "series4": ("#6a5600", "#dcc64e"),
    "series5": ("#5b3fb5", "#bba6ff"),
    "series6": ("#8c2f2f", "#ff9a9a"),
    "series7": ("#3d5a6c", "#a9c4d6"),
}
SERIES = 8
DASHES = ("", "6 3", "2 3", "8 3 2 3")

_FONT = 12.0
_LETTER = 0.6  # a letter's width over the size of the font, in the widest of the usual fonts


@dataclass(frozen=True)
class _Placed:
    x: float
    y: float


@dataclass(frozen=True)
class Rectangle(_Placed):
    """A filled rectangle; its color is a name of `COLORS` or ``#rrggbb``."""

    width: float
    height: float
    color: str
    tip: str = ""


@dataclass(frozen=True)
class Line:
    """A line through points."""

    points: Sequence[tuple[float, float]]
    color: str
    width: float = 1.0
    dash: str = ""
    tip: str = ""


@dataclass(frozen=True)
class Dot(_Placed):
    """A filled circle."""

    radius: float
    color: str
    tip: str = ""


@dataclass(frozen=True)
class Text(_Placed):
    """A line of text, centred on the height y; it is turned around (x, y) by degrees."""

    text: str
    color: str = "ink"
    anchor: Literal["start", "middle", "end"] = "start"
    size: float = _FONT
    turn: float = 0.0
    tip: str = ""


Shape = Rectangle | Line | Dot | Text


@dataclass
class Drawing:
    """Shapes on a page whose y grows downwards, in CSS pixels, and what they say in words."""

    title: str
    description: str  # what can be seen in it, for those who cannot
    width: float
    height: float
    shapes: list[Shape] = field(default_factory=list)  # in the order of painting


def text_width(text: str, size: float = _FONT) -> float:
    """Estimate, from above, how wide a text will be."""
    return len(text) * size * _LETTER


def beside(heading: str, drawings: Sequence[Drawing]) -> Drawing:
    """Put drawings beside each other, under a line of text."""
    top, gap, x = 30.0, 24.0, 0.0
    whole = Drawing(heading, " ".join(drawing.description for drawing in drawings), 0, 0)
    whole.shapes.append(Text(6, top / 2, heading))
    for drawing in drawings:
        whole.shapes += [_moved(shape, x, top) for shape in drawing.shapes]
        whole.width, x = x + drawing.width, x + drawing.width + gap
        whole.height = max(whole.height, top + drawing.height)
    whole.width = max(whole.width, 12 + text_width(heading))
    return whole


def _moved(shape: Shape, x: float, y: float) -> Shape:
    if isinstance(shape, Line):
        return replace(shape, points=[(at + x, height + y) for at, height in shape.points])
    return replace(shape, x=shape.x + x, y=shape.y + y)


def style_sheet() -> str:
    """Give the CSS of the colours: variables for a light and a dark screen, and classes."""
    light, dark = (
        "".join(f"--{name}:{pair[which]};" for name, pair in COLORS.items()) for which in (0, 1)
    )
    classes = "".join(
        f".f-{name}{{fill:var(--{name})}}.s-{name}{{stroke:var(--{name})}}" for name in COLORS
    )
    return (
        f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
        f"@media print{{:root{{{light}}}}}{classes}"
        f"svg text{{font:{_FONT:g}px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}}"
    )


def svg(drawing: Drawing, identifier: str) -> str:
    """Write a drawing as an SVG element for a page that has `style_sheet`."""
    names = f"{identifier}-title {identifier}-description"
    return (
        f'<svg role="img" aria-labelledby="{names}" width="{_n(drawing.width)}" '
        f'height="{_n(drawing.height)}" viewBox="0 0 {_n(drawing.width)} {_n(drawing.height)}">\n'
        f'<title id="{identifier}-title">{escaped(drawing.title)}</title>\n'
        f'<desc id="{identifier}-description">{escaped(drawing.description)}</desc>\n'
        + "".join(_svg_shape(shape) + "\n" for shape in drawing.shapes)
        + "</svg>"
    )


def svg_file(drawing: Drawing) -> str:
    """Write a drawing as an SVG file of its own, with a ground, light or dark as the screen is."""
    element = svg(drawing, "picture").replace(
        "<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1
    )
    ground = _svg_shape(Rectangle(0, 0, drawing.width, drawing.height, "page"))
    return f"<!-- {MARK} -->\n" + element.replace(
        "</desc>\n", f"</desc>\n<style>{style_sheet()}</style>\n{ground}\n", 1
    )


def png(drawing: Drawing) -> bytes:
    """Paint a drawing as PNG, in the light colours, two pixels to a CSS pixel; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((drawing.width / 100, drawing.height / 100), facecolor=COLORS["page"][0])
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, drawing.width), ylim=(drawing.height, 0))
    axes.set_axis_off()
    for order, shape in enumerate(drawing.shapes):
        _paint(axes, shape, order)
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a letter that no font here has
        figure.savefig(image, format="png", dpi=200, metadata={"Software": MARK})
    return image.getvalue()


def heat_color(share: float) -> str:
    """Give the colour of a value in a heat map: viridis, from its dark end to its light one."""
    anchors = ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725")
    place = min(max(share, 0.0), 1.0) * (len(anchors) - 1)
    below = min(int(place), len(anchors) - 2)
    mixed = (
        round(one + (other - one) * (place - below))
        for one, other in zip(_rgb(anchors[below]), _rgb(anchors[below + 1]), strict=True)
    )
    return "#" + "".join(f"{part:02x}" for part in mixed)


def contrast(one: str, other: str) -> float:
    """Give the contrast ratio of two colours, from 1 to 21 (WCAG 2)."""
    low, high = sorted(map(_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def ink_on(color: str) -> str:
    """Give black or white, whichever is easier to read on a colour."""
    return max("#000000", "#ffffff", key=lambda ink: contrast(ink, color))


def plain(text: str, limit: int = 200) -> str:
    """Make what is not printable visible, as it could steer a terminal or turn the line around."""
    visible = printable(text[: 4 * limit])
    if len(visible) <= limit:
        return visible
    end = (limit - 1) // 2
    return f"{visible[: limit - 1 - end]}…{visible[-end:]}"


def escaped(text: str, limit: int = 200) -> str:
    """Write any text for HTML and SVG, as content or as the value of an attribute."""
    return html.escape(plain(text, limit), quote=True)


def _svg_shape(shape: Shape) -> str:
    tip = f"<title>{escaped(shape.tip)}</title>" if shape.tip else ""
    match shape:
        case Rectangle():
            place = f'x="{_n(shape.x)}" y="{_n(shape.y)}"'
            size = f'width="{_n(shape.width)}" height="{_n(shape.height)}"'
            return f"<rect {place} {size} {_svg_color(shape.color)}>{tip}</rect>"
        case Line():
            points = " ".join(f"{_n(x)},{_n(y)}" for x, y in shape.points)
            dash = f' stroke-dasharray="{shape.dash}"' if shape.dash else ""
            return (
                f'<polyline points="{points}" class="s-{shape.color}" fill="none" '
                f'stroke-width="{_n(shape.width)}"{dash}>{tip}</polyline>'
            )
        case Dot():
            place = f'cx="{_n(shape.x)}" cy="{_n(shape.y)}" r="{_n(shape.radius)}"'
            return f"<circle {place} {_svg_color(shape.color)}>{tip}</circle>"
        case Text():
            # A third of the size below the middle is the line that letters stand on.
            base = f'x="{_n(shape.x)}" y="{_n(shape.y + shape.size * 0.35)}"'
            anchor = "" if shape.anchor == "start" else f' text-anchor="{shape.anchor}"'
            size = "" if shape.size == _FONT else f' style="font-size:{_n(shape.size)}px"'
            place = f"{_n(shape.turn)} {_n(shape.x)} {_n(shape.y)}"
            turn = f' transform="rotate({place})"' if shape.turn else ""
            return (
                f"<text {base} {_svg_color(shape.color)}{anchor}{size}{turn}>"
                f"{escaped(shape.text)}{tip}</text>"
            )


def _svg_color(color: str) -> str:
    return f'fill="{color}"' if color.startswith("#") else f'class="f-{color}"'


def _paint(axes: Any, shape: Shape, order: int) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle
    from matplotlib.patches import Rectangle as Patch

    points = 72 / 100  # of a CSS pixel
    color = shape.color if shape.color.startswith("#") else COLORS[shape.color][0]
    fill: dict[str, Any] = {"facecolor": color, "lw": 0, "zorder": order}
    match shape:
        case Rectangle():
            axes.add_patch(Patch((shape.x, shape.y), shape.width, shape.height, **fill))
        case Line():
            dashes = [float(length) / shape.width for length in shape.dash.split()]
            style: Any = (0, dashes) if dashes else "-"
            width = shape.width * points
            x, y = zip(*shape.points, strict=True)
            axes.add_line(Line2D(x, y, color=color, lw=width, linestyle=style, zorder=order))
        case Dot():
            axes.add_patch(Circle((shape.x, shape.y), shape.radius, **fill))
        case Text():
            axes.text(
                shape.x,
                shape.y,
                plain(shape.text),
                color=color,
                fontsize=shape.size * points,
                ha={"start": "left", "middle": "center", "end": "right"}[shape.anchor],
                va="center",
                rotation=-shape.turn,
                rotation_mode="anchor",
                parse_math=False,
                zorder=order,
            )


def _n(number: float) -> str:
    """Write a length: a tenth of a pixel is enough."""
    return f"{round(number, 1) + 0.0:g}" if abs(number) < 1e5 else f"{number:.0f}"


def _rgb(color: str) -> list[int]:
    return [int(color[start : start + 2], 16) for start in (1, 3, 5)]


def _luminance(color: str) -> float:
    def linear(part: float) -> float:
        return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(part / 255) for part in _rgb(color))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
