"""The tasks so far, as they are stored or in the shapes of the model that is trained next."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from formats.fisher_folder import StoredFisher
from formats.fisher_json import Ledger, TaskRecord


@dataclass(frozen=True)
class FittedChain:
    """The tasks so far in the shapes of the model to be trained; used like `StoredFisher`."""

    ledger: Ledger
    fisher: Mapping[str, Tensor]
    anchor: Mapping[str, Tensor] | None
    heads: Mapping[str, Mapping[str, Tensor]]
    factors: Mapping[str, Tensor] | None = None
    factor_anchor: Mapping[str, Tensor] | None = None


Chain = StoredFisher | FittedChain


def pending_task(chain: Chain | None, name: str | None = None) -> TaskRecord | None:
    """Give the last task of a chain if it was trained and not measured, and has this name."""
    if chain is None:
        return None
    last = chain.ledger.tasks[-1]
    return None if last.measured or name not in (None, last.name) else last


def with_present_head(chain: Chain) -> list[TaskRecord]:
    """Give the tasks whose head is the one in the weights: none of their own is saved."""
    return [task for task in chain.ledger.tasks if task.name not in chain.heads]
