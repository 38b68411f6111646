"""Elastic Weight Consolidation for checkpoints: measure the Fisher, store it, train with it.

Names are imported when they are first used, so that `consolidate --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consolidate.chain.modules import load_penalty as load_penalty
    from consolidate.chain.modules import store_fisher as store_fisher
    from consolidate.commands.evaluate import evaluate as evaluate
    from consolidate.commands.finetune import finetune as finetune
    from consolidate.commands.fisher import fisher as fisher
    from consolidate.commands.merge import merge as merge
    from consolidate.commands.push import push as push
    from consolidate.commands.report import report as report
    from consolidate.commands.run import run as run
    from consolidate.commands.show import show as show
    from consolidate.commands.verify import verify as verify
    from consolidate.data.columns import Columns as Columns
    from consolidate.estimation.diagonal import FisherDiagonal as FisherDiagonal
    from consolidate.estimation.estimators import fisher_diagonal as fisher_diagonal
    from consolidate.ewc.merging import ModelTensor as ModelTensor
    from consolidate.ewc.merging import merge_models as merge_models
    from consolidate.ewc.merging import merge_online as merge_online
    from consolidate.ewc.merging import merge_separate as merge_separate
    from consolidate.ewc.overlap import fisher_overlap as fisher_overlap
    from consolidate.ewc.penalty import Penalty as Penalty
    from consolidate.training.trainer_callback import penalty_callback as penalty_callback
    from formats.fisher_folder import read_fisher as read_fisher

_HOMES = {
    "Columns": "consolidate.data.columns",
    "FisherDiagonal": "consolidate.estimation.diagonal",
    "Penalty": "consolidate.ewc.penalty",
    "evaluate": "consolidate.commands.evaluate",
    "finetune": "consolidate.commands.finetune",
    "fisher": "consolidate.commands.fisher",
    "fisher_diagonal": "consolidate.estimation.estimators",
    "fisher_overlap": "consolidate.ewc.overlap",
    "load_penalty": "consolidate.chain.modules",
    "ModelTensor": "consolidate.ewc.merging",
    "merge": "consolidate.commands.merge",
    "merge_models": "consolidate.ewc.merging",
    "merge_online": "consolidate.ewc.merging",
    "merge_separate": "consolidate.ewc.merging",
    "penalty_callback": "consolidate.training.trainer_callback",
    "push": "consolidate.commands.push",
    "read_fisher": "formats.fisher_folder",
    "report": "consolidate.commands.report",
    "run": "consolidate.commands.run",
    "show": "consolidate.commands.show",
    "store_fisher": "consolidate.chain.modules",
    "verify": "consolidate.commands.verify",
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
