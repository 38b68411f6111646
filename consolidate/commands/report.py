"""The report of a checkpoint: one HTML page, and its plots as files."""

import logging
import re
import sys
from pathlib import Path

from consolidate.commands.report_search import FoundComparison, read_comparison, read_search
from consolidate.commands.show import show
from consolidate.options import ReportOptions, ShowOptions
from consolidate.results import ReportResult
from consolidate.views.charts import INSTALL, MARK, can_draw, image, plain
from consolidate.views.figures import figures
from consolidate.views.page import report_page
from consolidate.views.search_figures import search_figures
from consolidate.views.summary import protected_by
from formats.atomic import check_file, write_file
from formats.errors import InputError, UsageError
from formats.fisher_folder import LEDGER_NAME
from formats.fisher_json import read_ledger
from formats.hub import FISHER, commits_of, locate

LOG = logging.getLogger("consolidate")
PICTURES = (
    *("matrix", "curves", "tradeoff", "between", "search", "search-tradeoff"),
    *("protection", "added", "overlap"),
)


def report(options: ReportOptions) -> ReportResult:
    """Write an HTML report of a checkpoint's ledger and Fisher, one page that needs no network.

    Files of an earlier report are replaced, others only with `overwrite`.

    Returns:
        JSON-ready: ``checkpoint``, ``report`` (the page), ``plots`` (the files), ``tasks``.

    Raises:
        UsageError: `plots` without matplotlib, or a revision with a local path.
        InputError: There is no checkpoint or no Fisher in it, `read_fisher` refuses it, or a file
            already exists or cannot be written, or `search` or `comparison` is not of this
            checkpoint.
        NetworkError: The Hub cannot be reached.
    """
    checkpoint, plots = options.checkpoint, options.plots
    if plots is not None and not can_draw():
        raise UsageError(f"--plots needs matplotlib: {INSTALL}")
    folder = locate(checkpoint, options.revision, only=FISHER)
    name = folder.resolve().name if Path(checkpoint).expanduser().exists() else str(checkpoint)
    page = Path(
        options.output or re.sub(r"[^\w.-]", "-", plain(name)) + "-report.html"
    ).expanduser()
    pictures = _pictures(plots)
    for path in (page, *pictures):
        _check_free(path, overwrite=options.overwrite)
    if page.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--output {page}: the name must end in .html, as the report is HTML")

    summary = show(ShowOptions(folder, top=sys.maxsize))
    ledger = read_ledger(folder / "fisher" / LEDGER_NAME)
    search = None if options.search is None else read_search(Path(options.search), ledger, name)
    compared: FoundComparison | None = None
    if options.comparison is not None:
        compared = read_comparison(Path(options.comparison), ledger, name)
    searched = [] if search is None else search_figures(search)
    drawn = figures(
        ledger,
        summary["parameters"],
        summary["accuracy_matrix"],
        searched,
        protected_by(summary["factors"]),
    )
    content: dict[Path, str | bytes] = {page: report_page(name, summary, drawn, compared)}
    for figure in drawn:
        for path in pictures:
            if path.stem == figure.name:
                content[path] = image(
                    [figure.chart], path.suffix[1:], wide=figure.wide, height=figure.height
                )
    for path, data in content.items():
        write_file(path, data)
    for path in pictures:
        if path not in content and path.exists() and _is_ours(path):  # of an earlier report
            path.unlink()
    if not can_draw():
        LOG.warning("%s has no plots, which need matplotlib: %s", page, INSTALL)
    return {
        "checkpoint": str(checkpoint),
        "commits": commits_of(folder),
        "report": str(page),
        "plots": [str(path) for path in content if path != page],
        "tasks": [task.name for task in ledger.tasks],
    }


def _pictures(plots: str | Path | None) -> list[Path]:
    """Name the files that may be written to `plots`."""
    if plots is None:
        return []
    folder = Path(plots).expanduser()
    return [folder / f"{name}{suffix}" for name in PICTURES for suffix in (".svg", ".png")]


def _check_free(path: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, a file that cannot or must not be written."""
    check_file(path)
    if path.exists() and not overwrite and not _is_ours(path):
        raise InputError(
            f"{path} already exists and is not a report by consolidate: choose another name, or "
            "replace it with --overwrite"
        )


def _is_ours(path: Path) -> bool:
    """Return whether a file bears the mark of a report or of its plots."""
    with path.open("rb") as file:
        return MARK.encode() in file.read(1024)
