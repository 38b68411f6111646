"""What is reported and recorded of a Fisher that was measured."""

import logging
import math
from collections import Counter
from collections.abc import Sequence

from torch import nn

from consolidate.chain.tasks import Encoded
from consolidate.chain.up_to_date import recorded_fisher
from consolidate.data.columns import default_loss
from consolidate.data.examples import Examples
from consolidate.estimation.estimates import FisherDiagonal
from consolidate.models.adapters import notes_on_zero_factors
from consolidate.models.model import Model
from consolidate.options import Columns, Encoding
from consolidate.results import EncodedAs, MeasuredFisher
from formats.fisher_json import Ledger, covered
from formats.rows import Rows
from formats.wording import few

LOG = logging.getLogger("consolidate")

_ALIKE = 1e-6
"""Relative standard error of a trace below which examples differ by rounding alone."""


def fisher_summary(ledger: Ledger, diagonal: FisherDiagonal) -> MeasuredFisher:
    """Summarize the Fisher that was measured for a ledger's last task."""
    traces = diagonal.trace()
    # Examples that are all alike, such as texts of a single token, show no spread to judge by.
    errors = {n: e for n, e in diagonal.relative_errors.items() if _ALIKE < e < math.inf}
    recorded = recorded_fisher(ledger)
    assert recorded is not None  # it was measured by now
    return {
        **recorded,
        "parameters": sum(values.numel() for values in diagonal.values()),
        "trace": sum(traces.values()),
        "layers": {
            layer: {"trace": trace, "relative_error": errors.get(layer)}
            for layer, trace in traces.items()
        },
        "methods": dict(Counter(diagonal.methods.values())),
    }


def encoding_record(encoding: Encoding, rows: Rows, columns: Columns) -> Encoded:
    """Give what the ledger records of how rows became examples."""
    usual = encoding.loss_on == default_loss(rows, columns)
    return Encoded(None if usual else encoding.loss_on, encoding.max_length)


def encoded_as(ledger: Ledger, rows: Rows, columns: Columns) -> EncodedAs:
    """Report how the rows of a ledger's last task became examples, now or earlier."""
    task = ledger.tasks[-1]
    if (generated := task.generated) is not None:
        loss_on = "all" if generated.prompts is None else "completion"
        return {"loss_on": loss_on, "max_length": generated.max_length}
    usual = default_loss(rows, columns) if task.objective == "causal-lm" else None
    return {"loss_on": task.loss_on or usual, "max_length": task.max_length}


def log_notes(
    model: Model, examples: Examples, diagonal: FisherDiagonal, used: Sequence[int]
) -> None:
    """Log notes on a model, the examples used and the Fisher measured on them."""
    factors = [] if model.checkpoint.base is None else notes_on_zero_factors(model, diagonal)
    for note in [*model.notes, *examples.notes_on(used), *factors]:
        LOG.info("%s", note)
    if diagonal.blocks:
        LOG.info("%s", _coverage(model.module, diagonal))
    slow = [name for name, method in diagonal.methods.items() if method == "loop"]
    if slow and diagonal.examples > 1:
        LOG.info(
            "measured one example at a time, which is slow: %d of %d parameters: %s",
            len(slow),
            len(diagonal.methods),
            few(slow, 3),
        )
    if unreached := diagonal.unreached:
        LOG.info(
            "the Fisher of %d parameters is zero, since the loss does not depend on them: %s",
            len(unreached),
            few(unreached, 3),
        )


def _coverage(module: nn.Module, diagonal: FisherDiagonal) -> str:
    """Report how many layers have a matrix, and which large weights have the diagonal alone."""
    size = sum(matrix.numel() for matrix in diagonal.factors.values())
    text = f"{len(diagonal.blocks)} layers are protected by matrices ({size:,} values)"
    have = covered(diagonal.blocks)
    others = [n for n, values in diagonal.items() if values.ndim > 1 and n not in have]
    others.sort(key=lambda name: -diagonal[name].numel())
    if not others:
        return text
    reasons = [f"{name} ({_why_diagonal(module, name)})" for name in others]
    return f"{text}, by the diagonal alone {few(reasons, 3)}"


def _why_diagonal(module: nn.Module, name: str) -> str:
    """Say in few words why a weight has no matrix of its layer's inputs."""
    weight = module.get_parameter(name)
    users = [m for m in module.modules() if any(p is weight for p in m._parameters.values())]
    kind = type(users[0]).__name__
    if sum(p is weight for m in users for p in m._parameters.values()) > 1:
        return "tied"
    if getattr(users[0], "groups", 1) != 1:
        return "a grouped convolution"
    many = kind in ("Linear", "Conv1D") or kind.startswith("Conv")
    return "more than 4 times as many inputs as outputs" if many else f"in {kind}"
