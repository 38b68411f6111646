"""What a command's result looks like on stdout: as JSON, or as text."""

import json
import math
from collections.abc import Mapping
from typing import Any


def plain(text: str) -> str:
    """Escape what is not printable in a message: names from files could steer the terminal.

    Args:
        text: A message; its line breaks stay.
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def json_text(result: Mapping[str, Any]) -> str:
    """Give a result as JSON, as docs/json-schema.json tells; what is not printable is escaped.

    Args:
        result: What a command returned; numbers that are not finite, which JSON lacks, become null.
    """
    printed = json.dumps(_finite(result), ensure_ascii=False, indent=2, allow_nan=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in printed)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fisher_text(result: dict[str, Any]) -> str:
    """Say what was measured, or, of a dry run, what it would take.

    Args:
        result: What `fisher` returned.
    """
    if result.get("status") == "dry run":
        return _cost_text(result)
    errors = {
        name: layer["relative_error"]
        for name, layer in result["layers"].items()
        if layer["relative_error"] is not None
    }
    worst = max(errors, key=lambda name: errors[name], default=None)
    certainty = "" if worst is None else f" (at worst ± {errors[worst]:.1%}, of {worst})"
    return (
        f"{result['fisher']}: {result['estimator']} Fisher of {result['task']!r} over "
        f"{result['examples']:,} examples, {result['parameters']:,} parameters, "
        f"trace {result['trace']:.4g}{certainty}"
    )


def _cost_text(cost: dict[str, Any]) -> str:
    memory = f"{cost['peak_memory'] / 1e9:.2f} GB"
    if cost["peak_device_memory"] is not None:
        memory += f", and {cost['peak_device_memory'] / 1e9:.2f} GB on the device"
    each = cost["seconds_per_example"]
    files, kept = (
        ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in cost[which].items())
        for which in ("files", "kept")
    )
    return "\n".join(
        [
            f"parameters   {cost['parameters']:,}",
            f"examples     {cost['examples']:,}, {cost['estimator']}",
            f"time         {cost['seconds']:,.0f} s, {1000 * each:.3g} ms per example",
            f"memory       {memory} at most",
            f"files        {files}",
            f"in between   {kept}, where there is room for it as well",
            "Nothing was written: this was a dry run on a few batches.",
        ]
    )


def finetune_text(result: dict[str, Any]) -> str:
    """Say how a run ended: the search for λ, the metrics, loss and penalty, the Fisher.

    Args:
        result: What `finetune` returned.
    """
    lines = []
    if "lambda_search" in result:
        lines += [search_text(result["lambda_search"]), ""]
    if result["metrics"]:
        lines += [
            metrics_text(
                {
                    f"{task}, {when}": values
                    for when in ("before", "after")
                    for task, values in result["metrics"][when].items()
                }
            ),
            "",
        ]
    if result["status"] == "cached":
        lines.append(f"{result['checkpoint']}: it was there already, made from the same")
    else:
        lines.append(
            f"{result['checkpoint']}: {result['steps']} steps, loss {result['loss']:.4f}, "
            f"penalty {result['penalty_value']:.4g}; {result['share_moved']:.1%} of the weights "
            "moved"
        )
    lines.append(fisher_text({**result["fisher"], "fisher": result["fisher"]["folder"]}))
    return "\n".join(lines)


def merge_text(result: dict[str, Any]) -> str:
    """Say what was merged into what.

    Args:
        result: What `merge` returned.
    """
    models = ", ".join(result["models"])
    alone = len(result["models"]) == 1 and result["base"] is None
    done = f"a copy of {models}, as nothing was to be merged" if alone else f"merged from {models}"
    return (
        f"{result['checkpoint']}: {done}; tasks "
        f"{', '.join(result['tasks'])}; {result['parameters']:,} parameters, "
        f"trace {result['trace']:.4g}"
    )


def run_text(result: dict[str, Any]) -> str:
    """Say of each step whether it was done, and what was kept of each task.

    Args:
        result: What `run` returned.
    """
    from consolidate.views.summary import matrix_text

    lines = []
    for step in result["steps"]:
        reason = "" if step["reason"] is None else f": {step['reason']}"
        lines.append(f"{step['step']}  {step['status']}{reason}")
    if result["status"] == "dry run":
        return "\n".join([*lines, "Nothing was done: this was a dry run."])
    if result["accuracy_matrix"] is not None:
        lines += ["", matrix_text(result["accuracy_matrix"]), ""]
    return "\n".join([*lines, f"the last checkpoint: {result['checkpoint']}"])


def verify_text(summary: dict[str, Any]) -> str:
    """Say what was compared, and that it holds.

    Args:
        summary: What `verify` returned.
    """
    sets = {
        kind: summary[kind]
        for kind in ("weights", "fisher", "anchor", "factors")
        if summary.get(kind)
    }
    sets |= {f"head of {task}": head for task, head in summary["heads"].items()}
    lines = [
        f"{kind}: {found['tensors']:,} tensors, {found['bytes']:,} bytes, {found['digest']}"
        for kind, found in sets.items()
    ]
    if others := summary["other_files"]:
        rest = f" and {len(others) - 6} more" if len(others) > 6 else ""
        lines.append(f"no digest covers {', '.join(others[:6])}{rest}")
    other = summary["base_model"]
    if summary["base"] is not None and other is None:
        lines.append(f"it is an adapter; its base model {summary['base']} was not looked at")
    elif other is not None:
        what = "the weights are" if summary["base"] is None else "its base model is"
        lines.append(f"{what} in {other}: {summary['base'] or summary['weights']['digest']}")
    lines.append(f"{summary['checkpoint']} is intact")
    told = {"weights": "the digest of its weights", "tasks": "its tasks alone"}
    for found in summary.get("later", ()):
        lines += ["", verify_text(found)]
        lines.append(f"and descends from the one before, by {told[found['descends_by']]}")
    return "\n".join(lines)


def metrics_text(metrics: dict[str, dict[str, float]]) -> str:
    """Lay metrics out as a table, a row for each task.

    Args:
        metrics: By task: name and value.
    """
    columns = [
        c for c in ("loss", "accuracy", "perplexity") if any(c in m for m in metrics.values())
    ]
    width = max(len("task"), *map(len, metrics))
    lines = [f"{'task':<{width}}" + "".join(f"{column:>12}" for column in columns)]
    for task, values in metrics.items():
        cells = "".join(f"{values[c]:>12.4f}" if c in values else f"{'–':>12}" for c in columns)
        lines.append(f"{task:<{width}}{cells}")
    return "\n".join(lines)


def search_text(search: dict[str, Any]) -> str:
    """Write a search as a table, with what was chosen, by what, and what it cost.

    Args:
        search: As `search_lambda` returns it.

    Returns:
        Lines of text.
    """
    tasks = [*search["old_tasks"], search["new_task"]]
    figures = ("mean", "forgetting") if search["old_tasks"] else ("divergence",)
    figures = (*figures, "penalty_per_lambda")
    names = {"penalty_per_lambda": "penalty / λ", "divergence": "KL(old‖new)"}
    titles = [*tasks, *(names.get(figure, figure) for figure in figures)]
    widths = [max(11, len(title) + 2) for title in titles]
    lines = [
        f"{'λ':>12}{'steps':>8}"
        + "".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True))
    ]
    for trial in sorted(search["trials"], key=lambda t: (t["steps"], t["ewc_lambda"])):
        start = f"{trial['ewc_lambda']:>12g}{trial['steps']:>8}"
        if trial["metrics"] is None:
            lines.append(f"{start}  diverged")
            continue
        scores = [f"{trial['metrics'][task]['score']:.4f}" for task in tasks]
        cells = [*scores, *(f"{trial[name]:.4g}" for name in figures)]
        row = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(start + row + ("  chosen" if trial["chosen"] else ""))
    rule = {
        "mean": "the largest mean score",
        "least": f"the least whose forgetting stays under {search['max_forgetting']}",
        "most": f"the largest that keeps 95% of what {search['new_task']} gains",
    }[search["choose"]]
    cost = search["cost"]
    lines.append(f"λ = {search['ewc_lambda']:g}, by the rule {search['choose']}: {rule}")
    lines.append(f"Measured: {search['measured']}")
    lines.append(
        f"The search took {cost['runs']} runs, {cost['steps']:,} steps, {cost['seconds']:.0f} s: "
        f"{cost['full_runs']:.1f} times the run that follows, which is on all of the training data"
    )
    return "\n".join(lines)


def push_text(result: Mapping[str, Any]) -> str:
    """Lay out what `push` returns as plain text.

    Args:
        result: What `push` returned.

    Returns:
        Lines of text without a newline at the end.
    """
    lines = [
        f"{file['size']:>15,}  {file['change']:<12}  {file['path']}" for file in result["files"]
    ]
    lines += [f"{'':>15}  {'deleted':<12}  {path}" for path in result["deleted"]]
    total = sum(file["size"] for file in result["files"])
    missing = sum(file["size"] for file in result["files"] if file["change"] != "unchanged")
    if any(file["change"] == "not compared" for file in result["files"]):
        lines.append(f"{total:>15,}  bytes in all; what of them is there already is not known")
    else:
        lines.append(f"{total:>15,}  bytes in all, {missing:,} of them new")
    if result["code"]:
        lines.append(f"Code that an auto_map needs: {', '.join(result['code'])}")
    seen = "private" if result["private"] else "public"
    if result["status"] == "dry run":
        lines.append(f"Nothing was sent to {result['repository']} ({seen}): this was a dry run.")
    elif result["pull_request"] is not None:
        lines.append(f"{result['pull_request']}: commit {result['commit']}")
    else:
        same = ", which holds all of it already" if result["status"] == "unchanged" else ""
        named = f", tag {result['tag']}" if result["tag"] else ""
        lines.append(f"{result['url']} ({seen}): commit {result['commit']}{named}{same}")
    return "\n".join(lines)
