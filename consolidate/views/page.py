"""The page of a report: one HTML file that needs nothing else, neither a network nor a script."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

from consolidate.results import ShowResult
from consolidate.views.charts import COLORS, INSTALL, MARK, can_draw, image, plain
from consolidate.views.figures import LISTED, TASKS, Figure
from consolidate.views.markdown import shown
from consolidate.views.matrix import means, partly
from consolidate.views.summary import (
    by_reason,
    encoding_text,
    estimator_text,
    factors_text,
    learned_text,
)
from consolidate.views.text import comparison_rows, nats_text
from formats.wording import few


def report_page(
    name: str,
    summary: ShowResult,
    figures: Sequence[Figure],
    comparison: Mapping[str, Any] | None = None,
) -> str:
    """Return the page, without pictures if matplotlib is missing; all text is escaped.

    The template is report.html.jinja, beside this module.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def picture(figure: Figure, dark: bool) -> Markup:
        drawn = image([figure.chart], "svg", wide=figure.wide, dark=dark, height=figure.height)
        return Markup(f"data:image/svg+xml;base64,{b64encode(drawn).decode()}")

    def written(value: Any) -> Any:
        return value if isinstance(value, Markup) else plain(str(value), 800)

    environment = Environment(
        loader=PackageLoader("consolidate", "views"),
        autoescape=True,
        finalize=written,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    used = (_count, _some, encoding_text, estimator_text, means, partly, learned_text, shown)
    environment.globals |= {function.__name__.strip("_"): function for function in used}
    return environment.get_template("report.html.jinja").render(
        name=plain(name),
        summary=summary,
        figures=figures,
        compared=[] if comparison is None else comparison_rows(comparison),
        nats=[] if comparison is None else nats_text(comparison["nats"]),
        pictures={
            figure.name: [picture(figure, dark) for dark in (False, True)]
            for figure in figures
            if can_draw()
        },
        first=max(len(summary["tasks"]) - TASKS, 0),
        factors=factors_text(summary["factors"]),
        reasons=by_reason(summary["unprotected"]).items(),
        listed=LISTED,
        most=TASKS,
        colors=COLORS,
        mark=MARK,
        install=INSTALL,
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _some(names: Sequence[str] | None) -> str:
    return "–" if names is None else few([plain(name, 60) for name in names], 12)
