"""The charts of a report, drawn by matplotlib: heat maps, bars on a log scale, lines."""

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from formats.atomic import check_file, write_file
from formats.errors import UsageError, install
from formats.wording import printable

MARK = "consolidate report"  # in every file that is made here: such a file may be replaced
INSTALL = install("plot")
HALF, FULL = 440, 908  # CSS pixels: beside another picture, and across the page (8 / 9 of it)

# What a colour is for -> on a light page, on a dark one. Each can be read on `page` and `card`.
COLORS = {
    "page": ("#ffffff", "#14171a"),
    "card": ("#f4f6f8", "#1e2328"),
    "grid": ("#d5dade", "#3a4248"),
    "ink": ("#1b1f23", "#e9edf0"),
    "muted": ("#56606a", "#a7b1ba"),
    "link": ("#0b5cad", "#7ab8ff"),
}
SERIES = (
    ("#0b5cad", "#a94100", "#00694f", "#99256f", "#6a5600", "#5b3fb5", "#8c2f2f", "#3d5a6c"),
    ("#7ab8ff", "#ffa066", "#4fd1a5", "#f08ccb", "#dcc64e", "#bba6ff", "#ff9a9a", "#a9c4d6"),
)
_DASHES = ("-", (0, (4, 2)), (0, (1.2, 1.8)), (0, (5, 2, 1.2, 2)))
_LETTER = 7.2  # CSS pixels of a letter; all texts have one size
_NAME, _HEAD = 26, 18  # letters of a name beside a row, and above a column or in a legend
_NUMBERED, _NUMBERS = 42, 500  # the least width of a cell with a number in it; the most numbers
# What the files say of themselves: nothing of when, so that the same charts give the same bytes.
_METADATA: Mapping[str, dict[str, str | None]] = {
    "svg": {"Date": None, "Creator": MARK},
    "png": {"Software": MARK},
    "pdf": {"CreationDate": None, "Creator": MARK},
}
Colors = Mapping[str, str]
Write = Callable[[float], str]


@dataclass(frozen=True)
class HeatMap:
    """A table of numbers as coloured cells, with the numbers in cells that are wide enough.

    None has no colour; a zero on a log scale is grey.
    """

    title: str
    description: str  # what can be seen in it, for those who cannot
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    write: Write
    log: bool = False
    labels: tuple[str, str] = ("", "")  # of rows and columns
    scale: str = ""  # what the colours show

    @property
    def crowded(self) -> bool:
        """Whether it needs the width of a page."""
        return self._cell(HALF) < _NUMBERED

    def _cell(self, width: float) -> float:
        names = _LETTER * max(map(len, shortened(self.rows))) + 18 * bool(self.labels[0])
        return (width - 24 - names) / len(self.columns)

    def _height(self, width: float) -> float:
        rows, heads = len(self.rows), 150 if _turned(self.columns, self._cell(width)) else 80
        rows_height = rows * (15 if rows > 48 else 20 if rows > 12 else 28)
        return heads + 18 * bool(self.labels[1]) + rows_height

    def _draw(self, area: Any, width: float, colors: Colors, dark: bool) -> None:
        from matplotlib import colormaps

        known = [value for row in self.values for value in row if value is not None]
        low, high = decades(known) if self.log else limits(known)

        def shade(value: float | None) -> float:
            if value is None or (self.log and value <= 0):
                return math.nan if value is None else -1.0
            return _share(math.log10(value) if self.log else value, low, high)

        m, n, cell = len(self.rows), len(self.columns), self._cell(width)
        axes = area.add_subplot()
        shades = [[*map(shade, row)] for row in self.values]
        viridis = colormaps["viridis"].with_extremes(bad=colors["page"], under=colors["grid"])
        image = axes.imshow(shades, viridis, aspect="auto", interpolation="none", vmin=0, vmax=1)
        axes.vlines([j + 0.5 for j in range(n)], -0.5, m - 0.5, colors["page"])
        axes.hlines([i + 0.5 for i in range(m)], -0.5, n - 0.5, colors["page"])
        if cell >= _NUMBERED and m * n <= _NUMBERS:
            for i, row in enumerate(self.values):
                for j, value in enumerate(row):
                    text = "–" if value is None else self.write(value)
                    ink = ink_on(shades[i][j]) or colors["muted" if value is None else "ink"]
                    axes.text(j, i, text, color=ink, ha="center", va="center", in_layout=False)
        axes.xaxis.tick_top()
        axes.set_yticks(range(m), shortened(self.rows))
        _name_places(axes, range(n), self.columns, cell, "left")
        axes.xaxis.set_label_position("top")
        axes.set_ylabel(self.labels[0])
        axes.set_xlabel(self.labels[1], labelpad=6)
        shrink = min(200 / (cell * n), 0.6)
        place: dict[str, Any] = {"location": "bottom", "anchor": (0, 1), "pad": 0.02}
        bar = area.colorbar(image, ax=axes, shrink=shrink, aspect=14, **place)
        ends = [f"1e{end}" if self.log else self.write(end) for end in (low, high)]
        bar.set_ticks([0, 0.5, 1], labels=[ends[0], self.scale, ends[1]], color=colors["muted"])
        bar.outline.set_visible(False)


@dataclass(frozen=True)
class Bars:
    """A bar for each row on a log scale; a zero has none."""

    title: str
    description: str
    rows: Sequence[str]
    values: Sequence[float]
    write: Write
    label: str = ""  # of the values

    @property
    def crowded(self) -> bool:
        """Whether it needs the width of a page: it is higher than any other chart."""
        return len(self.rows) > 24

    def _height(self, width: float) -> float:
        return 40 + 18 * bool(self.label) + (15 if len(self.rows) > 48 else 20) * len(self.rows)

    def _draw(self, area: Any, width: float, colors: Colors, dark: bool) -> None:
        low, high = decades(self.values)
        lengths = [max(_share(math.log10(v), low, high), 0.006) if v else 0 for v in self.values]
        axes = area.add_subplot(xlim=(0, 1), ylim=(len(lengths) - 0.4, -0.6))
        drawn = axes.barh(range(len(lengths)), lengths, 0.66, color=SERIES[dark][0])
        axes.bar_label(drawn, map(self.write, self.values), color=colors["muted"], padding=4)
        powers = range(low, high + 1, max(1, -(-(high - low) // 5)))
        ticks = [_share(power, low, high) for power in powers]
        axes.set_xticks(ticks, [f"1e{power}" for power in powers], color=colors["muted"])
        axes.set_yticks(range(len(lengths)), shortened(self.rows))
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set_xlabel(self.label, labelpad=6)
        axes.grid(axis="x")


@dataclass(frozen=True)
class Curve:
    """Connected points, with or without a note at each; a guide is a line without dots."""

    name: str
    points: Sequence[tuple[float, float]]
    notes: Sequence[str] = ()
    guide: bool = False
    path: bool = False  # along which something moved: its end has a dot
    color: int | None = None  # which of the series; by default as it comes


@dataclass(frozen=True)
class Lines:
    """Curves over named or numbered places along x, with or without walls between them."""

    title: str
    description: str
    lines: Sequence[Curve]
    ticks: Sequence[tuple[float, str]]  # those of matplotlib where there are none
    write: Write
    labels: tuple[str, str]  # of x and y
    walls: Sequence[float] = ()
    zoomed: bool = False  # from the least to the largest value, even where they are shares

    @property
    def crowded(self) -> bool:
        """Whether it needs the width of a page."""
        return len(self.ticks) > 8

    def _room(self, width: float) -> float:
        return (width - 90) / max(len(self.ticks), 1)

    def _height(self, width: float) -> float:
        turned = _turned([name for _, name in self.ticks], self._room(width))
        return (290 if turned else 230) + 20 * self._legend_rows(width)

    def _legend_columns(self, width: float) -> int:
        longest = max((min(len(line.name), _HEAD) for line in self.lines), default=0)
        return max(int((width - 20) / (_LETTER * longest + 46)), 1)

    def _legend_rows(self, width: float) -> int:
        named = sum(1 for line in self.lines if line.name)
        return -(-named // self._legend_columns(width))

    def _draw(self, area: Any, width: float, colors: Colors, dark: bool) -> None:
        values = [value for line in self.lines for _, value in line.points]
        ends = (min(values), max(values)) if self.zoomed else limits(values)
        marks = even_steps(*ends)
        low, high = marks[0], marks[-1]
        axes = area.add_subplot(ylim=(-0.03, 1.03), xlabel=plain(self.labels[0], 50))
        places = [_share(mark, low, high) for mark in marks]
        axes.set_yticks(places, map(self.write, marks), color=colors["muted"])
        axes.set_ylabel(plain(self.labels[1], 40))
        axes.grid(axis="y")
        for wall in self.walls:
            axes.axvline(wall, color=colors["grid"], linewidth=0.8, zorder=0)
        if self.walls:
            axes.set_xlim(self.walls[0], self.walls[-1])
        if self.ticks:
            at, names = zip(*self.ticks, strict=True)
            _name_places(axes, at, names, self._room(width), "right")
        else:
            axes.grid(axis="x")
            axes.tick_params(axis="x", labelcolor=colors["muted"])
        few = all(len(line.points) <= 12 * max(len(self.ticks), 1) for line in self.lines)
        drawn = []
        for i, line in enumerate(self.lines):
            which = i if line.color is None else line.color
            own: dict[str, Any] = {"color": SERIES[dark][which % 8]}
            own["linestyle"] = _DASHES[which // 8 % 4]
            if line.guide:
                own = {"color": colors["muted"], "linestyle": ":"}
            elif few or line.path:
                own |= {"marker": "o", "markersize": 6 if line.path else 4, "clip_on": False}
            if line.path:
                own["markevery"] = [len(line.points) - 1]
            points = [(x, _share(value, low, high)) for x, value in line.points]
            drawn += axes.plot(*zip(*points, strict=True), **own)
            for place, note in zip(points, line.notes, strict=False):
                axes.annotate(note, place, (4, 5), textcoords="offset points")
        if self._legend_rows(width):
            blank = " " * len(drawn)  # a name that begins with _ would be left out
            columns = self._legend_columns(width)
            legend = area.legend(drawn, blank, loc="outside upper left", ncols=columns)
            for text, line in zip(legend.get_texts(), self.lines, strict=True):
                text.set_text(plain(line.name, _HEAD))


Chart = HeatMap | Bars | Lines


def check_picture(option: str, path: Path, endings: Sequence[str]) -> None:
    """Raise, before any work is done, if a picture cannot be drawn or written at its end."""
    if path.suffix.lower() not in endings:
        *most, last = endings
        raise UsageError(f"{option} {path}: the name must end in {', '.join(most)} or {last}")
    if not can_draw():
        raise UsageError(f"{option} needs matplotlib: {INSTALL}")
    check_file(path)


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def write_picture(path: Path, charts: Sequence[Chart], heading: str = "") -> None:
    """Draw charts side by side into a file; its suffix decides the format."""
    write_file(path, image(charts, path.suffix.lower()[1:], heading=heading))


def natural_height(chart: Chart) -> float:
    """Return the height of a chart by itself, in CSS pixels."""
    return chart._height(FULL if chart.crowded else HALF)


def image(
    charts: Sequence[Chart],
    kind: str,
    *,
    wide: bool = False,
    dark: bool = False,
    heading: str = "",
    height: float = 0.0,
) -> bytes:
    """Draw charts side by side, as svg, pdf or png (two pixels per CSS pixel).

    The picture has the height of the highest chart, and at least `height`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    colors = {name: pair[dark] for name, pair in COLORS.items()}
    widths = [FULL if wide or chart.crowded else HALF for chart in charts]
    heights = [chart._height(width) for chart, width in zip(charts, widths, strict=True)]
    size = (sum(widths) or HALF) / 96, (max([height, *heights]) + 30 * bool(heading)) / 96
    metadata = dict(_METADATA[kind])
    title = f"{MARK}: {', '.join(chart.title for chart in charts)}"
    if kind == "svg":
        metadata["Title"] = title
        metadata["Description"] = " ".join(plain(chart.description, 600) for chart in charts)
    data = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a letter that no font here has
        matplotlib.rcdefaults()  # whatever the user's own are
        matplotlib.rcParams.update(_style(colors, title))
        figure = Figure(size, layout="constrained")
        if heading:
            figure.suptitle(heading, x=0.01, ha="left", size=9)
        areas = figure.subfigures(1, len(charts) or 1, squeeze=False, width_ratios=widths or [1])
        for area, chart, width in zip(areas[0], charts, widths, strict=False):
            chart._draw(area, width, colors, dark)
        figure.savefig(data, format=kind, dpi=192, metadata=metadata)
    return data.getvalue()


def _style(colors: Colors, salt: str) -> Any:
    """Return the settings of matplotlib; no text is parsed as mathematics."""
    return {
        **dict.fromkeys(("text.color", "xtick.color", "ytick.color"), colors["ink"]),
        **dict.fromkeys(("axes.facecolor", "figure.facecolor"), colors["page"]),
        **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
        **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
        "axes.axisbelow": True,
        "axes.labelcolor": colors["muted"],
        "grid.color": colors["grid"],
        "legend.frameon": False,
        "font.sans-serif": ["DejaVu Sans", "Verdana"],
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,  # what the names of shapes are made from
        "text.parse_math": False,
    }


def decades(values: Sequence[float]) -> tuple[int, int]:
    """Return the exponents of the powers of ten around the values above zero."""
    exponents = [math.log10(value) for value in values if value > 0] or [-1.0]
    low = math.floor(min(exponents))
    return low, max(math.ceil(max(exponents)), low + 1)


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of a scale: 0 and 1 for values between them, else least and largest."""
    low, high = min(values), max(values)
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


def even_steps(low: float, high: float) -> list[float]:
    """Return about five round numbers in equal steps, from at most `low` to at least `high`."""
    extent = high - low
    if extent == 0:
        return [low]
    if not 1e-300 < extent < 1e300 or extent < 1e-9 * max(abs(low), abs(high)):
        return [low * (1 - at / 4) + high * (at / 4) for at in range(5)]
    unit = 10.0 ** math.floor(math.log10(extent / 4))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if extent / (unit * factor) <= 4.001)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def shortened(names: Sequence[str]) -> list[str]:
    """Shorten names of parameters to fit beside a row, first by their common beginning."""
    parts = [name.split(".") for name in names]
    common = 0
    while len(names) > 1 and all(
        len(own) > common + 1 and own[common] == parts[0][common] for own in parts
    ):
        common += 1
    if common and any(own[common].isdigit() for own in parts):
        common -= 1  # a number alone says little
    return [plain(".".join(own[common:]), _NAME) for own in parts]


def plain(text: str, limit: int = 200) -> str:
    """Escape characters that are not printable, which could control a terminal."""
    visible = printable(text[: 4 * limit])
    if len(visible) <= limit:
        return visible
    end = (limit - 1) // 2
    return f"{visible[: limit - 1 - end]}…{visible[-end:]}"


def ink_on(shade: float) -> str:
    """Return black or white, the readable one on a colour of viridis; "" off its scale."""
    return "" if not shade >= 0 else "#ffffff" if shade < 0.43 else "#000000"


def _name_places(
    axes: Any, places: Sequence[float], names: Sequence[str], room: float, anchor: str
) -> None:
    turn = {"rotation": 45, "rotation_mode": "anchor", "ha": anchor}
    shown = [plain(name, _HEAD) for name in names]
    axes.set_xticks(places, shown, **(turn if _turned(names, room) else {}))


def _turned(names: Sequence[str], room: float) -> bool:
    return any(_LETTER * min(len(name), _HEAD) + 6 > room for name in names)


def _share(value: float, low: float, high: float) -> float:
    """Return where a value is between two others, from 0 to 1; halved so that nothing overflows."""
    if high <= low:
        return 0.5
    return min(max((value / 2 - low / 2) / (high / 2 - low / 2), 0.0), 1.0)
