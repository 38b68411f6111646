"""Summarize a checkpoint's Fisher folder."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from consolidate.chain.consistency import side_by_side
from consolidate.ewc.overlap import layer_overlaps
from consolidate.options import ShowOptions
from consolidate.results import (
    Factor,
    FisherDtype,
    Format,
    MatrixSummary,
    Overlap,
    Parameter,
    ShownFactors,
    ShowResult,
)
from consolidate.views.charts import check_picture, write_picture
from consolidate.views.figures import TASKS, score_figures
from consolidate.views.matrix import (
    is_matrix_csv,
    ledger_matrix,
    matrix_summary,
    means_text,
    write_matrix_csv,
)
from consolidate.views.summary import shown_task
from formats.atomic import check_own_file
from formats.digest import TensorRecord, differences, set_digest
from formats.errors import InputError, NetworkError
from formats.fisher_folder import LEDGER_NAME, StoredFisher, in_one_line, read_fisher
from formats.fisher_json import FORMAT, Ledger, covered, needed_version, read_ledger
from formats.hub import FISHER, commits_of, find_local, locate, remote_headers
from formats.hub_errors import AccessError

LOG = logging.getLogger("consolidate")
Measured = dict[str, tuple[float, float | None]]  # trace and largest value, by parameter


def show(options: ShowOptions) -> ShowResult:
    """Summarize the ledger and the Fisher of a checkpoint, without checking the weights.

    From a repository on the Hub only the ledger and the headers of the Fisher are read. The traces
    are then those of the ledger, Σ_t γ^(T − t) w_t tr F_t, and the largest values are unknown.

    Returns:
        JSON-ready. A parameter's trace is Σ_i Λ_i, and ``factors`` are None where the Fisher is a
        diagonal alone; the ``accuracy_matrix`` is None if nothing was measured; ``overlap``, None
        unless requested, is that of `fisher_overlap` of the diagonals, over all parameters of a
        module.

    Raises:
        InputError: There is no Fisher folder, `read_fisher` refuses it, there are no scores for
            `csv` or `plot`, or these cannot be written; or the two Fishers share no parameter, or
            one with different shapes.
        UsageError: `plot` has an unknown suffix, or matplotlib is missing.
    """
    checkpoint, revision, top = options.checkpoint, options.revision, options.top
    if options.csv is not None:
        check_own_file(Path(options.csv), "an accuracy matrix", is_matrix_csv)
    if options.plot is not None:
        check_picture("--plot", Path(options.plot), (".png", ".svg"))
    folder, ledger, measured = _opened(checkpoint, revision)
    summary = _scores(options, ledger)
    total = sum(trace for trace, _ in measured.values())
    return {
        "checkpoint": str(checkpoint),
        "commits": commits_of(folder),
        "format": cast(Format, FORMAT),
        "version": needed_version(ledger),
        "merge_rule": ledger.merge_rule,
        "gamma": ledger.gamma,
        "penalty_offset": ledger.penalty_offset,
        "tasks": [shown_task(task) for task in ledger.tasks],
        "fisher": {
            "tensors": len(ledger.fisher),
            "values": sum(record.count for record in ledger.fisher.values()),
            "dtype": cast(FisherDtype, next(iter(ledger.fisher.values())).dtype),
            "trace": total,
            "digest": set_digest(ledger.fisher),
        },
        "factors": _factors(ledger, {n: trace for n, (trace, _) in measured.items()}, total),
        "weights": {"tensors": len(ledger.weights), "digest": set_digest(ledger.weights)},
        "base": ledger.base,
        "anchor": "the weights" if ledger.anchor is None else "fisher/anchor",
        "heads": sorted(ledger.heads),
        "parameters": _parameters(ledger, measured, total)[:top],
        "parameters_left_out": max(len(measured) - top, 0),
        "unprotected": dict(ledger.unprotected),
        "versions": dict(ledger.versions),
        "accuracy_matrix": summary,
        "side_by_side": side_by_side(ledger),
        "overlap": None if options.overlap is None else _overlap(options, options.overlap),
    }


def _opened(checkpoint: str | Path, revision: str | None) -> tuple[Path, Ledger, Measured]:
    """Read the ledger, and measure the Fisher where all of it is there."""
    if not find_local(checkpoint).exists():
        folder, ledger = _remote_ledger(checkpoint, revision)
        return folder, ledger, _recorded(ledger)
    folder = locate(checkpoint, revision)
    stored = read_fisher(folder / "fisher")
    return folder, stored.ledger, _measured(stored)


def _scores(options: ShowOptions, ledger: Ledger) -> MatrixSummary | None:
    """Give the accuracy matrix, written and plotted as asked; None if nothing was measured."""
    if (matrix := ledger_matrix(ledger)) is None:
        if options.csv is not None or options.plot is not None:
            raise InputError(
                f"{options.checkpoint}: the ledger has no scores on its tasks: name the test data "
                "after the tasks when these are trained (`consolidate finetune --evaluate "
                "TASK=DATA`)"
            )
        return None
    summary = matrix_summary(matrix)
    if options.csv is not None:
        write_matrix_csv(options.csv, matrix)
    if options.plot is not None:
        if len(summary["tasks"]) > TASKS:
            LOG.info("the plot shows the last %d of %d tasks", TASKS, len(summary["tasks"]))
        charts = [figure.chart for figure in score_figures(ledger, summary)]
        write_picture(Path(options.plot), charts, means_text(summary))
    return summary


def _overlap(options: ShowOptions, other: str | Path) -> Overlap:
    checkpoint = options.checkpoint
    one = read_fisher(locate(checkpoint, options.revision, only=FISHER) / "fisher").fisher
    two = read_fisher(locate(other, only=FISHER) / "fisher").fisher
    shared = [name for name in one if name in two]
    if not shared:
        raise InputError(
            f"{checkpoint} and {other}: the Fishers share no parameter ({next(iter(one))!r}, "
            f"{next(iter(two))!r}): --overlap needs a model of the same architecture"
        )
    for name in shared:
        shapes = [tuple(fisher[name].shape) for fisher in (one, two)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"the Fisher of {name!r} has shape {shapes[0]} in {checkpoint} and {shapes[1]} in "
                f"{other}: --overlap needs a model of the same architecture"
            )
    layers = layer_overlaps(one, two).items()
    return {
        "with": str(other),
        "layers": [{"name": name, "overlap": value} for name, value in layers],
        "left_out": [name for name in [*one, *two] if not (name in one and name in two)],
    }


def _measured(stored: StoredFisher) -> Measured:
    found: Measured = {}
    for name in stored.fisher:
        values = stored.fisher[name].double()
        found[name] = float(values.sum()), float(values.max()) if values.numel() else 0.0
    return found


def _recorded(ledger: Ledger) -> Measured:
    """Sum the traces of the tasks, except those of saved heads."""
    found: Measured = {}
    for name in ledger.fisher:
        trace = 0.0
        for task in ledger.tasks:
            if task.measured:
                trace *= ledger.gamma
            if name in task.layers and name not in ledger.heads.get(task.name, ()):
                trace += task.weight * task.layers[name].trace
        found[name] = trace, None
    return found


def _parameters(ledger: Ledger, measured: Measured, total: float) -> list[Parameter]:
    """Describe the parameters, in order of decreasing trace."""
    factors = {at: name for name, b in (ledger.blocks or {}).items() for at in b.parameters}
    found: list[Parameter] = [
        {
            "name": name,
            "shape": list(ledger.fisher[name].shape),
            "trace": trace,
            "mean": trace / ledger.fisher[name].count if ledger.fisher[name].count else 0.0,
            "max": largest,
            "share": trace / total if total > 0 else 0.0,
            "factor": factors.get(name),
        }
        for name, (trace, largest) in measured.items()
    ]
    return sorted(found, key=lambda parameter: -parameter["trace"])


def _factors(ledger: Ledger, traces: Mapping[str, float], total: float) -> ShownFactors | None:
    """Describe the matrices beside Λ: what each stands for, and how large they are."""
    if ledger.factors is None or ledger.blocks is None:
        return None
    matrices: list[Factor] = []
    for name, block in ledger.blocks.items():
        record = ledger.factors[name]
        own = sum(traces[at] for at in block.parameters)
        matrices.append(
            {
                "name": name,
                "matrix": block.matrix,
                "size": record.shape[0],
                "bytes": record.nbytes,
                "parameters": list(block.parameters),
                "share": own / total if total > 0 else 0.0,
            }
        )
    protected = covered(ledger.blocks)
    own = sum(traces[name] for name in protected)
    offset = ledger.factor_offset
    return {
        "tensors": len(matrices),
        "digest": set_digest(ledger.factors),
        "bytes": sum(matrix["bytes"] for matrix in matrices),
        "dtype": cast(FisherDtype, next(iter(ledger.factors.values())).dtype),
        "values": sum(ledger.fisher[name].count for name in protected),
        "share": min(own / total, 1.0) if total > 0 else 0.0,
        "anchor": "the weights" if ledger.factor_anchor is None else "fisher/factor_anchor",
        "offset": ledger.penalty_offset if offset is None else offset,
        "matrices": sorted(matrices, key=lambda matrix: -matrix["share"]),
    }


def _remote_ledger(checkpoint: str | Path, revision: str | None) -> tuple[Path, Ledger]:
    """Fetch the ledger of a repository, and check the headers of its Fisher against it."""
    folder = locate(checkpoint, revision, only=[f"fisher/{LEDGER_NAME}"])
    ledger = read_ledger(folder / "fisher" / LEDGER_NAME)
    ((name, commit),) = commits_of(folder).items()
    for kind, records in (("fisher", ledger.fisher), ("factors", ledger.factors or {})):
        if not records:
            continue
        try:
            headers = remote_headers(name, commit, f"fisher/{kind}")
        except (NetworkError, AccessError):
            LOG.info("%s: shown from the cache; the headers of the Fisher were not checked", name)
            return folder, ledger
        found = {
            tensor: TensorRecord(dtype, shape, records[tensor].sha256 if tensor in records else "")
            for tensor, (dtype, shape) in headers.items()
        }
        if lines := differences(records, found):
            raise InputError(
                f"{name}: fisher/{kind}*.safetensors is not what {LEDGER_NAME} lists: "
                f"{in_one_line(lines)}"
            )
    return folder, ledger
