"""The page of a report: one HTML file that needs nothing else, neither a network nor a script."""

from collections.abc import Sequence

from consolidate.results import ShowResult
from consolidate.views.drawing import MARK, escaped, plain, style_sheet, svg
from consolidate.views.figures import LISTED, TASKS, Figure
from consolidate.views.markdown import shown
from consolidate.views.matrix import means, partly
from consolidate.views.summary import by_reason, estimator_text, learned_text
from formats.wording import few

_MEANINGS = {
    "ACC": "mean score on all tasks, now",
    "BWT": "mean gain on earlier tasks since each was learned; below 0 they were forgotten",
    "forgetting": "mean loss on earlier tasks since each was at its best",
}
# A page that is opened from a stranger's checkpoint loads and runs nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root{color-scheme:light dark}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.25rem 1rem 3rem;max-width:66rem;background:var(--page);
color:var(--ink);font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.2rem;line-height:1.3;margin:0 0 .4rem}
h3{font-size:1rem;margin:0 0 .3rem}
p{margin:.4rem 0;max-width:44rem}
a{color:var(--link)}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
.skip{position:absolute;left:-99rem}
.skip:focus{position:static}
.muted,figcaption,caption,dt{color:var(--muted)}
nav ul{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;padding:0;margin:.8rem 0 1.4rem;list-style:none}
nav a{display:inline-block;padding:.2rem 0}
section{margin:0 0 2rem;min-width:0}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.8rem;
margin:1rem 0}
.facts div,.chain li{background:var(--card);border:1px solid var(--grid);border-radius:.5rem;
padding:.7rem .9rem}
.facts dd{margin:0;font-size:1.5rem;font-weight:600;line-height:1.3}
.facts dd+dd{font-size:.85rem;font-weight:400;color:var(--muted)}
.chain{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:.8rem;padding:0;
margin:.8rem 0;list-style:none;counter-reset:task}
.chain li{counter-increment:task}
.chain h3::before{content:counter(task) ". "}
.chain dl,.pairs{display:grid;grid-template-columns:auto 1fr;gap:.1rem .8rem;margin:0;
font-size:.9rem}
.pairs{grid-template-columns:fit-content(40%) 1fr}
.chain dd,.pairs dd{margin:0;min-width:0}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(25rem,100%),1fr));
gap:0 2rem}
.charts .wide{grid-column:1/-1}
figure{margin:.6rem 0}
figcaption{font-size:.9rem;margin:0 0 .6rem}
svg{max-width:100%;height:auto;display:block}
.scroll{overflow-x:auto}
.scroll svg{max-width:none}
summary{cursor:pointer;padding:.3rem 0;color:var(--link)}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.2rem 0}
th,td{text-align:left;vertical-align:top;padding:.25rem .9rem .25rem 0;
border-bottom:1px solid var(--grid);overflow-wrap:normal}
th{font-weight:600}
tbody th{font-weight:400}
.numbers td,.numbers thead th+th{text-align:right}
code{font-size:.85rem}
@page{margin:16mm}
@media print{
body{max-width:none;padding:0;font-size:10pt}
nav,.skip,details{display:none}
figure,.facts div,.chain li,tr{break-inside:avoid}
h2,h3{break-after:avoid}
.scroll{overflow:visible}
.scroll svg{max-width:100%}
}
"""


def report_page(name: str, summary: ShowResult, drawn: Sequence[Figure]) -> str:
    """Write the page; everything that a ledger says is escaped."""
    sections = [
        ("chain", "The chain of tasks", _chain(summary)),
        *((figure.name, figure.heading, _figure(figure)) for figure in drawn),
        ("settings", "Settings", _settings(summary)),
        ("provenance", "Provenance", _provenance(summary)),
    ]
    contents = "".join(f'<li><a href="#{key}">{heading}</a></li>' for key, heading, _ in sections)
    wide = {figure.name: ' class="wide"' for figure in drawn if _is_wide(figure)}
    body = [
        f'<section id="{key}" aria-labelledby="{key}-heading"{wide.get(key, "")}>'
        f'<h2 id="{key}-heading">{heading}</h2>\n{content}</section>\n'
        for key, heading, content in sections
    ]
    return (
        f'<!doctype html>\n<!-- {MARK} -->\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escaped(name)} – consolidate report</title>\n"
        f'<meta name="generator" content="{MARK}">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<style>{style_sheet()}{_STYLE}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#content">Skip to the content</a>\n'
        f"<header>\n<h1>{escaped(name)}</h1>\n<p>{_lead(summary)}</p>\n"
        f"{_facts(summary)}</header>\n"
        f'<nav aria-label="Sections"><ul>{contents}</ul></nav>\n'
        f'<main id="content">\n{body[0]}'
        f'<div class="charts">\n{"".join(body[1:-2])}</div>\n'
        f"{''.join(body[-2:])}</main>\n</body>\n</html>\n"
    )


def _lead(summary: ShowResult) -> str:
    fisher, count = summary["fisher"], len(summary["tasks"])
    return (
        f"{_count(count, 'task')}; {_count(fisher['values'], 'weight')} in "
        f"{_count(fisher['tensors'], 'tensor')} protected by a Fisher of trace "
        f"{fisher['trace']:.4g}. Merged {escaped(_rule(summary))}."
    )


def _rule(summary: ShowResult) -> str:
    return summary["merge_rule"] + (
        f", γ = {summary['gamma']:g}" if summary["merge_rule"] == "online" else ""
    )


def _facts(summary: ShowResult) -> str:
    matrix = summary["accuracy_matrix"]
    if matrix is None:
        return (
            '<p class="muted">No scores were taken on the tasks: name their test data when they '
            "are learned (<code>consolidate finetune --evaluate TASK=DATA</code>).</p>\n"
        )
    boxes = []
    for title, mean in means(matrix).items():
        value = shown(mean["value"], ".4f").replace("-", "−")
        meaning = f"{_MEANINGS[title]}{partly(mean)}"
        boxes.append(f"<div><dt>{title}</dt><dd>{value}</dd><dd>{meaning}</dd></div>")
    return f'<dl class="facts">{"".join(boxes)}</dl>\n'


def _chain(summary: ShowResult) -> str:
    matrix = summary["accuracy_matrix"]
    first = max(len(summary["tasks"]) - TASKS, 0)
    items = []
    for i, task in enumerate(summary["tasks"][first:], first):
        pairs = [
            ("learned from", task["data"] or "–"),
            (f"{task['unit']}s", f"{task['units'] or 0:,}"),
            ("learned with", learned_text(task)),
        ]
        if matrix is not None:
            then, now = matrix["scores"][i][i], matrix["scores"][-1][i]
            if then is not None or now is not None:
                pairs += [("score then", shown(then, ".3f")), ("score now", shown(now, ".3f"))]
        items.append(f"<li><h3>{escaped(task['name'])}</h3>{_pairs(pairs)}</li>")
    earlier = f"<p>The {first:,} tasks before these are left out here.</p>\n" if first else ""
    start = f' style="counter-reset:task {first}"' if first else ""
    return f'{earlier}<ol class="chain"{start}>{"".join(items)}</ol>\n'


def _figure(figure: Figure) -> str:
    picture = svg(figure.drawing, figure.name)
    if _is_wide(figure):
        picture = _scrolled(picture, f"{figure.heading}, chart")
    table = _table(figure.heading, figure.header, figure.rows, figure.left_out, numbers=True)
    return (
        f"<figure><figcaption>{figure.caption}</figcaption>\n{picture}</figure>\n"
        f"<details><summary>The numbers of “{figure.heading}”</summary>\n{table}</details>\n"
    )


def _is_wide(figure: Figure) -> bool:
    return figure.drawing.width > 480


def _settings(summary: ShowResult) -> str:
    header = ["task", "objective", "likelihood", "examples", "units", "estimator", "seed"]
    header += ["weight", "penalty", "labels"]
    rows = [
        [
            task["name"],
            task["objective"],
            task["likelihood"],
            f"{task['examples'] or 0:,}",
            _count(task["units"] or 0, task["unit"]),
            estimator_text(task["estimator"], task["mc_samples"]),
            str(task["seed"]),
            f"{task['weight']:g}",
            learned_text(task),
            _some(task["labels"]),
        ]
        for task in summary["tasks"][-LISTED:]
    ]
    left_out = len(summary["tasks"]) - len(rows)
    return _table("How each task was measured and learned", header, rows, left_out)


def _provenance(summary: ShowResult) -> str:
    fisher, weights = summary["fisher"], summary["weights"]
    offset = f"{summary['penalty_offset']:.6g}" if summary["penalty_offset"] else "0"
    pairs = [
        ("merge rule", f"{_rule(summary)}; penalty offset {offset}"),
        ("anchor", summary["anchor"]),
        ("output layers kept", ", ".join(sorted(summary["heads"])[:TASKS]) or "none"),
        ("weights", f"{_count(weights['tensors'], 'tensor')}, {weights['digest']}"),
        (
            "Fisher",
            f"{_count(fisher['tensors'], 'tensor')} of {fisher['dtype']}, {fisher['digest']}",
        ),
        ("format", f"{summary['format']}, version {summary['version']}"),
        *(list(summary["versions"].items())[:LISTED]),
    ]
    reasons = by_reason(summary["unprotected"])
    digests = [
        [task["name"], task["data_digest"] or "not kept", task["parent"] or "–"]
        for task in summary["tasks"][-LISTED:]
    ]
    header = ["task", "data", "weights it began from"]
    left_out = len(summary["tasks"]) - len(digests)
    origins = _table("Digests of each task", header, digests, left_out)
    parts = [_pairs(pairs, "pairs"), origins]
    if reasons:
        rows = [[reason, _some(names)] for reason, names in list(reasons.items())[:LISTED]]
        parts.append(_table("Not protected", ["reason", "tensors"], rows, len(reasons) - len(rows)))
    check = "<p>Digests are SHA-256; <code>consolidate verify</code> compares them all.</p>\n"
    return "".join([check, *parts])


def _table(
    caption: str, header: list[str], rows: list[list[str]], left_out: int, *, numbers: bool = False
) -> str:
    heads = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in header)
    lines = "".join(
        f'<tr><th scope="row">{escaped(first)}</th>'
        + "".join(f"<td>{escaped(cell, 400)}</td>" for cell in rest)
        + "</tr>\n"
        for first, *rest in rows
    )
    more = f"<p>And {left_out:,} more.</p>\n" if left_out else ""
    kind = ' class="numbers"' if numbers else ""
    table = (
        f"<table{kind}><caption>{caption}</caption>\n<thead><tr>{heads}</tr></thead>\n"
        f"<tbody>\n{lines}</tbody></table>"
    )
    return _scrolled(table, f"{caption}, table") + more


def _scrolled(content: str, label: str) -> str:
    """Let what is wide scroll by itself, with the keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{content}</div>\n'


def _pairs(pairs: Sequence[tuple[str, str]], kind: str = "") -> str:
    lines = "".join(f"<dt>{escaped(k)}</dt><dd>{escaped(v, 400)}</dd>" for k, v in pairs)
    return f'<dl class="{kind}">{lines}</dl>\n' if kind else f"<dl>{lines}</dl>"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _some(names: Sequence[str] | None, most: int = 12) -> str:
    if names is None:
        return "–"
    return few([plain(name, 60) for name in names], most)
