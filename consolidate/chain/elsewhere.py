"""A checkpoint that another program trained from one with a Fisher: the chain it continues."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from consolidate.chain.fitted_chain import FittedChain, pending_task, with_present_head
from consolidate.chain.heads import head_tensors, with_saved_head
from consolidate.chain.opening import check_base, find_fisher, stored_fisher, with_base
from consolidate.chain.tasks import Training
from consolidate.models.model import Model
from formats.checkpoint import Checkpoint, open_checkpoint
from formats.digest import set_digest
from formats.errors import InputError, UsageError
from formats.fisher_folder import StoredFisher
from formats.fisher_json import UNKNOWN, covered
from formats.hub import locate
from formats.tensors import Overlaid, shape_of
from formats.wording import few

LOG = logging.getLogger("consolidate")


@dataclass(frozen=True)
class Origin:
    """The checkpoint that another program's training began from, with its Fisher."""

    source: Checkpoint
    stored: StoredFisher

    def training(self) -> Training:
        """Give what the ledger records of a training that is known by its start alone."""
        return Training(penalty=UNKNOWN, parent=set_digest(self.stored.ledger.weights))

    def chain(self, model: Model) -> FittedChain:
        """Give its tasks in the shapes of the trained model; refuse a model of another shape.

        A head of another shape, or of other labels, is a new one: the old one is saved.
        """
        old, trained, stored = self.source.weights, model.checkpoint.weights, self.stored
        parameters = dict(model.module.named_parameters())
        used = [n for n in trained if any(p in parameters for p in model.layout.module_names(n))]
        others = {n: "is missing" for n in stored.fisher if n not in trained}
        others |= {n: f"is not in {self.source.path}" for n in used if n not in old}
        others |= {
            n: f"has shape {list(shape_of(trained, n))}, not {list(shape_of(old, n))}"
            for n in used
            if n in old and shape_of(trained, n) != shape_of(old, n)
        }
        try:
            head = head_tensors(model) if others or self._has_other_labels(model) else []
        except (InputError, UsageError):
            if not others:
                raise
            head = []  # so that the first of them is named
        if strange := [n for n in others if n not in head]:
            first = strange[0]
            ends = (n for n in trained if n.endswith(f".{first}") or first.endswith(f".{n}"))
            renamed = next((f" (it may be {n!r} there)" for n in ends if first not in trained), "")
            raise InputError(
                f"{model.checkpoint.path} does not have the tensors of {self.source.path}: "
                f"{first!r} {others[first]}{renamed}; only a head may be new: name the checkpoint "
                "that training began from"
            )
        rest = [name for name in old if name not in stored.fisher]
        anchor: Mapping[str, Tensor] = stored.anchor or Overlaid(old, without=rest)
        of_factors: Mapping[str, Tensor] | None = stored.factor_anchor
        if stored.factors is not None and of_factors is None:
            alone = set(old) - covered(stored.ledger.blocks or {})
            of_factors = Overlaid(old, without=alone)
        chain = FittedChain(
            stored.ledger, stored.fisher, anchor, stored.heads, stored.factors, of_factors
        )
        if (task := pending_task(stored)) is not None:
            LOG.info("%s has no Fisher and is not part of Λ", task.name)
        if saved := {name: old[name] for name in head if name in old}:
            users = ", ".join(task.name for task in with_present_head(stored))
            LOG.info(
                "new head (%s); the head of %s is saved in fisher/heads", ", ".join(head), users
            )
            return with_saved_head(chain, saved)
        return chain

    def _has_other_labels(self, model: Model) -> bool:
        users = with_present_head(self.stored)
        known = users[-1].labels if users else None
        if known is None or model.labels is None or known == model.labels:
            return False
        LOG.info("the labels are %s, and were %s", few(model.labels, 8), few(known, 8))
        return True


def open_origin(
    checkpoint: str | Path, trained: Checkpoint, base_model: str | Path | None
) -> Origin:
    """Open the checkpoint that a training began from; refuse one that cannot be its start."""
    folder = locate(checkpoint)
    source = open_checkpoint(folder)
    if (source.adapter is None) != (trained.adapter is None):
        kinds = ("a whole model", "an adapter")
        raise UsageError(
            f"--after {checkpoint}: expected {kinds[trained.adapter is not None]} like "
            f"{trained.path}, found {kinds[source.adapter is not None]}: merge the adapter into "
            "its base model first"
        )
    source = with_base(source, base_model)
    if (stored_at := find_fisher(folder, None)) is None:
        raise InputError(
            f"--after {checkpoint}: found no Fisher there: run `consolidate fisher` on it first, "
            "or leave --after out"
        )
    stored = stored_fisher(stored_at, source)
    check_base(stored.ledger, stored.folder, trained)
    return Origin(source, stored)


def refuse_untrained(origin: Origin, records: Mapping[str, object], trained: Path) -> None:
    """Refuse weights that are those of the start."""
    if records == origin.stored.ledger.weights:
        raise InputError(
            f"{trained} has the weights of {origin.source.path}: to measure another task there, "
            "use --add without --after"
        )
