"""Elastic Weight Consolidation for checkpoints: measure the Fisher, store it, train with it.

Names are imported when they are first used, so that `consolidate --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consolidate.chain import load_penalty as load_penalty
    from consolidate.chain import store_fisher as store_fisher
    from consolidate.commands import fisher as fisher
    from consolidate.estimators import FisherDiagonal as FisherDiagonal
    from consolidate.estimators import fisher_diagonal as fisher_diagonal
    from consolidate.evaluating import evaluate as evaluate
    from consolidate.examples import Columns as Columns
    from consolidate.finetuning import finetune as finetune
    from consolidate.inspection import show as show
    from consolidate.merging import ModelTensor as ModelTensor
    from consolidate.merging import merge_models as merge_models
    from consolidate.merging import merge_online as merge_online
    from consolidate.merging import merge_separate as merge_separate
    from consolidate.model_merging import merge as merge
    from consolidate.overlap import fisher_overlap as fisher_overlap
    from consolidate.penalty import Penalty as Penalty
    from consolidate.publishing import push as push
    from consolidate.reporting import report as report
    from consolidate.running import run as run
    from consolidate.trainer import penalty_callback as penalty_callback
    from consolidate.verification import verify as verify
    from formats.fisher_folder import read_fisher as read_fisher

_HOMES = {
    "Columns": "consolidate.examples",
    "FisherDiagonal": "consolidate.estimators",
    "Penalty": "consolidate.penalty",
    "evaluate": "consolidate.evaluating",
    "finetune": "consolidate.finetuning",
    "fisher": "consolidate.commands",
    "fisher_diagonal": "consolidate.estimators",
    "fisher_overlap": "consolidate.overlap",
    "load_penalty": "consolidate.chain",
    "ModelTensor": "consolidate.merging",
    "merge": "consolidate.model_merging",
    "merge_models": "consolidate.merging",
    "merge_online": "consolidate.merging",
    "merge_separate": "consolidate.merging",
    "penalty_callback": "consolidate.trainer",
    "push": "consolidate.publishing",
    "read_fisher": "formats.fisher_folder",
    "report": "consolidate.reporting",
    "run": "consolidate.running",
    "show": "consolidate.inspection",
    "store_fisher": "consolidate.chain",
    "verify": "consolidate.verification",
}
__all__ = sorted(_HOMES)

try:
    import formats.errors  # noqa: F401
except ImportError:
    raise ImportError(
        "the package 'formats' that Python finds is not the one of consolidate-ewc: another "
        "package or a file formats.py on sys.path hides it; rename that one, or start elsewhere"
    ) from None


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'consolidate' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
