"""The results of commands: as JSON, or as text."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from consolidate.results import (
    AlphaSearch,
    Benchmark,
    Comparison,
    EvaluateResult,
    FinetuneDryRun,
    FinetuneResult,
    FisherDryRun,
    FisherResult,
    LambdaSearch,
    MeasuredFisher,
    MergeResult,
    PeakMemory,
    PushResult,
    RemapResult,
    RunResult,
    VerifyResult,
)
from consolidate.views.markdown import aligned, benchmarks_text, shown
from formats.wording import few, printable


def plain(text: str) -> str:
    """Escape what is not printable in a message, except line breaks."""
    return printable(text, keep="\n")


def json_text(result: Mapping[str, Any], *, ascii_only: bool = False) -> str:
    """Give a result as JSON; what is not printable is escaped, what is not finite is null."""
    printed = json.dumps(_finite(result), ensure_ascii=ascii_only, indent=2, allow_nan=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in printed)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fisher_text(result: FisherResult) -> str:
    """Summarize what was measured, or what a dry run estimated."""
    if result["status"] == "dry run":
        return _cost_text(result)
    return _measured_text(result["fisher"], result)


def _measured_text(folder: str, fisher: MeasuredFisher) -> str:
    errors = [
        (layer["relative_error"], name)
        for name, layer in fisher["layers"].items()
        if layer["relative_error"] is not None
    ]
    worst, where = max(errors, key=lambda error: error[0], default=(0.0, ""))
    certainty = f" (at worst ± {worst:.1%}, of {where})" if errors else ""
    return (
        f"{folder}: {fisher['estimator']} Fisher of {fisher['task']!r} over "
        f"{fisher['examples']:,} examples, {fisher['parameters']:,} parameters, "
        f"trace {fisher['trace']:.4g}{certainty}"
    )


def _memory(cost: PeakMemory) -> str:
    memory = f"{cost['peak_memory'] / 1e9:.2f} GB"
    if cost["peak_device_memory"] is not None:
        memory += f", and {cost['peak_device_memory'] / 1e9:.2f} GB on the device"
    return memory


def _cost_text(cost: FisherDryRun) -> str:
    each = cost["seconds_per_example"]
    files, saved = (
        ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in sizes.items())
        for sizes in (cost["files"], cost["kept"])
    )
    generation = []
    if "generation_seconds" in cost:
        changed = (
            f"another batch size changes at most about {100 * cost['generation_changed']:.3g}%"
        )
        seconds = f"{cost['generation_seconds']:,.0f} s, before the pass"
        generation = [f"generation   {seconds}; {changed}"]
    return "\n".join(
        [
            f"parameters   {cost['parameters']:,}",
            f"examples     {cost['examples']:,}, {cost['estimator']}",
            *generation,
            f"time         {cost['seconds']:,.0f} s, {1000 * each:.3g} ms per example",
            f"memory       at most {_memory(cost)}",
            f"files        {files}",
            f"progress     {saved}, if there is room for it as well",
            "Dry run on a few batches: nothing was written.",
        ]
    )


def finetune_text(result: FinetuneResult) -> str:
    """Summarize a fine-tuning run: the search for λ, the metrics, loss and penalty, the Fisher.

    Or what a dry run estimated.
    """
    if result["status"] == "dry run":
        return _training_text(result)
    lines = []
    if result["status"] != "cached" and "lambda_search" in result:
        lines += [search_text(result["lambda_search"]), ""]
    if result["status"] != "cached" and "alpha_search" in result:
        lines += [alpha_text(result["alpha_search"]), ""]
    if metrics := result["metrics"]:
        measured = {
            f"{task}, {when}": values
            for when in ("before", "after")
            for task, values in metrics[when].items()
        }
        lines += [metrics_text(measured), *benchmarks_text(result["benchmarks"]), ""]
    if result["status"] == "cached":
        lines.append(f"{result['checkpoint']}: up to date, nothing to do")
    else:
        lines.append(
            f"{result['checkpoint']}: {result['steps']} steps, loss {result['loss']:.4f}, "
            f"penalty {result['penalty_value']:.4g}; {result['share_moved']:.1%} of the weights "
            "moved"
        )
    if (between := result["interpolation"]) is not None:
        lines.append(f"Weights and Fisher are at α = {between['alpha']:g} from the start")
    if (budget := result["budget"]) is not None:
        each = ", ".join(f"{_nats(lost)} of {name}" for name, lost in budget["lost"].items())
        lines.append(
            f"λ = {result['ewc_lambda']:.3g} at the end; old loss on held-out rows, mean nats: "
            f"{each}, of a budget of {budget['nats']:g}"
        )
    if (replayed := result["replayed"]) is not None:
        lines.append(f"{100 * replayed['share']:g}% of the rows were replayed: {replayed['data']}")
    if (fisher := result["fisher"]) is not None:
        lines.append(_measured_text(fisher["folder"], fisher))
    else:
        lines.append("The Fisher of the new task was not measured")
    lines += nats_text(result)
    if forgotten := result["forgotten"]:
        lines.append(f"old tasks: {_lost(forgotten, result['metrics']['after'])}")
    if result["status"] != "cached" and "comparison" in result:
        lines += comparison_text(result["comparison"])
    return "\n".join(lines)


def _training_text(cost: FinetuneDryRun) -> str:
    penalty = cost["penalty"]
    if penalty != "none":
        given = cost["ewc_lambda"]
        penalty += ", λ to be chosen" if given is None else f", λ = {given:g}"
    if penalty.startswith("ewc"):
        penalty += f", for {few(cost['old_tasks'], 4) or 'the base model'}"
    each, after = cost["seconds_per_step"], []
    if (memory := cost["fisher_memory"]) is not None:
        after = [
            f"Fisher       then takes at least {memory / 1e9:.2f} GB; --no-fisher leaves it out"
        ]
    return "\n".join(
        [
            f"parameters   {cost['parameters']:,} trained",
            f"examples     {cost['examples']:,} of {cost['task']!r}",
            f"penalty      {penalty}",
            f"steps        {cost['steps']:,}",
            f"time         {cost['seconds']:,.0f} s, {1000 * each:.3g} ms per step",
            f"memory       {_memory(cost)} in the first steps",
            *after,
            f"output       at most {cost['output_bytes'] / 1e6:,.1f} MB",
            "Dry run of a few steps, without evaluation, search and Fishers: nothing was written.",
        ]
    )


def nats_text(result: Mapping[str, Any]) -> list[str]:
    """Write how much loss the old tasks gained, as predicted and as measured, on at most a line."""
    found = []
    if result.get("predicted_nats") is not None:
        weights = result["task_weights"]
        found.append(f"predicted {_nats(result['predicted_nats'])}")
        if [*weights.values()] != [1.0]:
            terms = [f"{weight:.3g} × {name}" for name, weight in weights.items()]
            found[0] += f" in all, of {few(terms, 4)}"
    if measured := result["measured_nats"]:
        each = ", ".join(f"{_nats(lost)} of {name}" for name, lost in measured.items())
        found.append(f"measured {each}")
    elif found and not result.get("budget"):  # which is measured on rows of its own
        found.append("not measured")
    return [f"old loss, mean nats: {'; '.join(found)}"] if found else []


def _nats(lost: float) -> str:
    return f"{lost:+.3g}".replace("-", "−")


def comparison_text(comparison: Comparison) -> list[str]:
    """Write what the old tasks lose without a penalty, and what the penalty saved of each."""
    before, kept = comparison["before"], comparison["with_penalty"]
    if (free := comparison["without_penalty"]) is None:
        return ["without a penalty: training diverged"]
    old = comparison["old_tasks"]
    lost = {n: {"before": before[n]["score"], "after": free[n]["score"]} for n in old}
    saved = ", ".join(
        f"{points(kept[n]['score'] - free[n]['score'], kept[n])} "
        f"{'in the loss ' * _is_loss(kept[n])}of {n}"
        for n in old
    )
    return [f"without a penalty: {_lost(lost, free)}", f"the penalty saved {saved}"]


def comparison_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """List the scores with and without the penalty, a row for each task, old ones first."""
    runs = [comparison[run] for run in ("before", "with_penalty", "without_penalty")]
    rows = []
    for name in (*comparison["old_tasks"], comparison["new_task"]):
        if any(run is not None and name not in run for run in runs):
            continue  # the new task may not have been evaluated
        cells = ["diverged" if r is None else score_text(r[name]["score"], r[name]) for r in runs]
        kept, free = runs[1][name], runs[2]
        saved = "–"
        if free is not None:
            saved = points(kept["score"] - free[name]["score"], kept, sign=True)
        rows.append([name, *cells, saved])
    return rows


def _lost(scores: Mapping[str, Any], metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Write the scores of tasks before and after; where a score is minus the loss, the loss."""
    written = []
    for name, on in scores.items():
        values, loss = metrics[name], _is_loss(metrics[name])
        before, after = (-on[at] if loss else on[at] for at in ("before", "after"))
        written.append(
            f"{'loss of ' * loss}{name} {score_text(before, values)} → "
            f"{score_text(after, values)} ({points(after - before, values, sign=True)})"
        )
    return ", ".join(written)


def _is_loss(metrics: Mapping[str, float]) -> bool:
    return "loss" in metrics and "accuracy" not in metrics  # and a benchmark has its own score


def score_text(score: float, metrics: Mapping[str, float]) -> str:
    """Write a score: an accuracy in percent, else minus the loss."""
    return f"{100 * score:.1f}" if "accuracy" in metrics else f"{score:.3f}".replace("-", "−")


def points(difference: float, metrics: Mapping[str, float], *, sign: bool = False) -> str:
    """Write a difference of scores: of accuracies in percentage points."""
    accurate = "accuracy" in metrics
    value = round(100 * difference, 1) if accurate else round(difference, 3)
    text = f"{value or 0.0:{'+' if sign and value else ''}.{1 if accurate else 3}f}"
    return text.replace("-", "−") + (" points" if accurate else "")


def merge_text(result: MergeResult) -> str:
    """Summarize a merge: models, tasks, parameters, layers with factors."""
    layers = (
        "" if result["factors"] is None else f", factors of {result['factors']['layers']} layers"
    )
    return (
        f"{result['checkpoint']}: merged from {', '.join(result['models'])}; tasks "
        f"{', '.join(result['tasks'])}; {result['parameters']:,} parameters, "
        f"trace {result['trace']:.4g}{layers}"
    )


def remap_text(result: RemapResult) -> str:
    """Summarize a remap: how many names changed, and what only one of the checkpoints has."""
    names = result["names"]
    other = [f"{old} is now {new}" for old, new in names.items() if old != new]
    of, tasks = result["fisher_of"], ", ".join(result["tasks"])
    count = f"{len(other):,} of {len(names):,} tensors have another name"
    lines = [
        f"{result['checkpoint']}: {of} for the weights of {result['renamed']}; tasks {tasks}",
        f"{count}: {few(other, 2)}" if other else count,
    ]
    if left_out := result["left_out"]:
        lines.append(f"left out, without a Fisher and not in the weights: {few(left_out, 4)}")
    if extra := result["not_covered"]:
        lines.append(f"not covered by the Fisher: {few(extra, 4)}")
    return "\n".join(lines)


def run_text(result: RunResult) -> str:
    """List the status of each step, then the accuracy matrix."""
    from consolidate.views.summary import matrix_text

    lines = []
    for step in result["steps"]:
        reason = "" if step["reason"] is None else f": {step['reason']}"
        lines.append(f"{step['step']}  {step['status']}{reason}")
    if result["status"] == "dry run":
        return "\n".join([*lines, "Dry run: nothing was done."])
    if result["accuracy_matrix"] is not None:
        lines += ["", matrix_text(result["accuracy_matrix"]), ""]
    lines.append(f"last checkpoint: {result['checkpoint']}")
    if all(step["status"] == "skipped" for step in result["steps"]):
        count = len(result["steps"])
        lines.append(
            f"Nothing to do: {f'all {count} steps are' if count > 1 else 'the only step is'} up to "
            f"date. To repeat a step, delete its folder in {result['output_dir']}."
        )
    return "\n".join(lines)


def verify_text(summary: VerifyResult) -> str:
    """List what was compared, and state that it is intact."""
    parts = cast(Mapping[str, Any], summary)
    kinds = ("weights", "fisher", "anchor", "factors", "factor_anchor")
    sets = {kind.replace("_", " "): parts[kind] for kind in kinds if kind in parts}
    sets |= {f"head of {task}": head for task, head in summary["heads"].items()}
    lines = [
        f"{kind}: {found['tensors']:,} tensors, {found['bytes']:,} bytes, {found['digest']}"
        for kind, found in sets.items()
    ]
    if others := summary["other_files"]:
        lines.append(f"not covered by a digest: {few(others, 6)}")
    other = summary["base_model"]
    if summary["base"] is not None and other is None:
        lines.append(f"it is an adapter; its base model {summary['base']} was not checked")
    elif other is not None:
        what = "the weights are" if summary["base"] is None else "its base model is"
        lines.append(f"{what} in {other}: {summary['base'] or summary['weights']['digest']}")
    if generated := summary["generated"]:
        lines.append(f"measured on texts that the model generated: {few(generated, 6)}")
    lines.append(f"{summary['checkpoint']} is intact")
    by = {"weights": "the digest of its weights", "tasks": "its tasks alone"}
    for found in summary.get("later", ()):
        lines += ["", verify_text(found)]
        lines.append(f"and descends from the previous checkpoint, by {by[found['descends_by']]}")
    return "\n".join(lines)


def evaluate_text(result: EvaluateResult) -> str:
    """Format the metrics of each dataset, and say what the score on a benchmark is."""
    benchmarks = {name: m["benchmark"] for name, m in result.items() if "benchmark" in m}
    lines = benchmarks_text(cast(Mapping[str, Benchmark], benchmarks))
    return "\n".join([metrics_text(result), *lines])


def metrics_text(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Format metrics as a table, a row for each task; of a benchmark the score alone."""
    own = ("loss", "accuracy", "perplexity")
    columns = [c for c in own if any(c in m for m in metrics.values())]
    if any("loss" not in m for m in metrics.values()):
        columns.append("score")
        metrics = {t: m if "loss" in m else {"score": m["score"]} for t, m in metrics.items()}
    rows = [["task", *columns]]
    for task, values in metrics.items():
        rows.append([task, *(f"{values[c]:.4f}" if c in values else "–" for c in columns)])
    return "\n".join(aligned(rows, right_from=1, least=[0, *(10 for _ in columns)]))


def search_text(search: LambdaSearch) -> str:
    """Format a search for λ as a table, with the λ selected, the rule and the cost."""
    lines = _with_outcomes(search_rows(search), 12, 6)
    rule = {
        "best-mean": "the largest mean score, and of equal ones the larger λ",
        "smallest": f"the smallest whose forgetting stays under {search['max_forgetting']}",
        "largest": f"the largest that keeps 95% of what {search['new_task']} gains",
    }[search["select"]]
    cost = search["cost"]
    lines.append(f"λ = {search['ewc_lambda']:g}, selected by {search['select']}: {rule}")
    lines.append(f"Measured: {search['measured']}")
    lines.append(
        f"The search took {cost['runs']} runs, {cost['steps']:,} steps, {cost['seconds']:.0f} s: "
        f"{cost['full_runs']:.1f} times the final run, which trains on all of the data"
    )
    return "\n".join(lines)


def search_rows(search: Mapping[str, Any]) -> list[list[str]]:
    """List the trials of a search below a header; the last cell is the outcome of each."""
    tasks = [*search["old_tasks"], search["new_task"]]
    titles = {"mean": "mean", "forgetting": "forgetting"}
    if not search["old_tasks"]:
        titles = {"divergence": "KL(old‖new)"}
    titles["penalty_per_lambda"] = "penalty / λ"
    rows = [["λ", "steps", *tasks, *titles.values(), "outcome"]]
    for trial in sorted(search["trials"], key=lambda t: (t["steps"], t["ewc_lambda"])):
        cells = _scores(trial, tasks, titles, ".4g")
        chosen = "selected" if trial["chosen"] else ""
        outcome = "diverged" if trial["metrics"] is None else chosen
        rows.append([f"{trial['ewc_lambda']:g}", str(trial["steps"]), *cells, outcome])
    return rows


def alpha_text(search: AlphaSearch) -> str:
    """Write the scores over α as a table, with what was chosen and by what."""
    tasks = [*search["old_tasks"], search["new_task"]]
    titles = ("mean", "forgetting") if search["old_tasks"] else ()
    start = _scores({"metrics": search["before"]}, tasks, (), "")
    rows = [["α", *tasks, *titles, ""], ["start", *start, *("" for _ in titles), ""]]
    for trial in search["trials"]:
        chosen = "chosen" if trial["chosen"] else ""
        outcome = "loss not finite" if trial["metrics"] is None else chosen
        rows.append([f"{trial['alpha']:g}", *_scores(trial, tasks, titles, ".4f"), outcome])
    lines = _with_outcomes(rows, 12)
    kept = f"the smallest that keeps 95% of what {search['new_task']} gains"
    rule = "the best mean score" if search["rule"] == "best-mean" else kept
    lines.append(f"α = {search['alpha']:g}: {rule}")
    lines.append(f"Measured: {search['measured']}")
    return "\n".join(lines)


def _scores(
    trial: Mapping[str, Any], tasks: Sequence[str], titles: Collection[str], form: str
) -> list[str]:
    """Write a trial's scores, and what it has under titles; blanks if its loss was not finite."""
    if (metrics := trial["metrics"]) is None:
        return [""] * (len(tasks) + len(titles))
    scores = [f"{metrics[task]['score']:.4f}" for task in tasks]
    return scores + [shown(trial[name], form) for name in titles]


def _with_outcomes(rows: Sequence[Sequence[str]], *least: int) -> list[str]:
    """Align a table, and write the last cell of each row below the header behind it."""
    widths = [*least, *(9 for _ in rows[0][len(least) + 1 :])]
    lines = aligned([row[:-1] for row in rows], right_from=0, least=widths)
    notes = ["", *(f"  {row[-1]}".rstrip() for row in rows[1:])]
    return [line + note for line, note in zip(lines, notes, strict=True)]


def push_text(result: PushResult) -> str:
    """List the files with size and change, then where they are."""
    files = result["files"]
    lines = [f"{file['size']:>15,}  {file['change']:<12}  {file['path']}" for file in files]
    lines += [f"{'':>15}  {'deleted':<12}  {path}" for path in result["deleted"]]
    total = sum(file["size"] for file in files)
    missing = sum(file["size"] for file in files if file["change"] != "unchanged")
    summary = f"bytes in total, {missing:,} of them new or changed"
    if any(file["change"] == "not compared" for file in files):
        summary = "bytes in total; not compared with the Hub"
    lines.append(f"{total:>15,}  {summary}")
    if result["code"]:
        lines.append(f"Code needed by an auto_map: {', '.join(result['code'])}")
    seen = "private" if result["private"] else "public"
    if result["status"] == "dry run":
        lines.append(f"Dry run: nothing was sent to {result['repository']} ({seen}).")
    elif result["pull_request"] is not None:
        lines.append(f"{result['pull_request']}: commit {result['commit']}")
    else:
        same = ", up to date" if result["status"] == "unchanged" else ""
        named = f", tag {result['tag']}" if result["tag"] else ""
        lines.append(f"{result['url']} ({seen}): commit {result['commit']}{named}{same}")
    return "\n".join(lines)
