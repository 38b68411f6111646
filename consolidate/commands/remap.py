"""Carry a Fisher over to the same weights under other names, tensor by tensor."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from torch import Tensor

from consolidate.chain.claims import claiming, refuse_changed
from consolidate.chain.fingerprint import checkpoint_content, versions
from consolidate.chain.opening import find_fisher
from consolidate.chain.output import check_output
from consolidate.chain.up_to_date import cached, find_output
from consolidate.models.layout import renamed_factors
from consolidate.options import RemapOptions
from consolidate.results import RemapResult
from consolidate.views.output_card import renew_card
from formats.atomic import replace_folder
from formats.checkpoint import (
    Checkpoint,
    check_finite,
    open_checkpoint,
    weight_records,
    write_checkpoint,
)
from formats.digest import TensorRecord, json_digest
from formats.errors import InputError
from formats.fisher_folder import (
    LEDGER_NAME,
    StoredFisher,
    check_fisher_values,
    check_intact,
    read_fisher,
    write_fisher,
)
from formats.fisher_json import SAME_AS, Block, Ledger
from formats.hub import commits_of, locate
from formats.renaming import Renaming, renamed, renaming
from formats.tensors import Renamed, dtype_of
from formats.versions import program_versions

NOT_COVERED = "not among the weights that the Fisher was measured at"
"""The reason of a tensor that only the renamed checkpoint has."""


def remap(options: RemapOptions) -> RemapResult:
    """Carry a Fisher with anchor, factors, heads and ledger over to the same weights, renamed.

    Tensors are paired by dtype, shape and bytes; several that are alike, such as norms of ones, by
    where the other tensors of their module went, then by the longest common suffix of their names.

    Returns:
        The folder, the tasks, and the new name of each tensor of the ledger; the tensors that only
        one of the two checkpoints has. If the output is up to date, nothing is done, and the
        ``status`` is ``cached``.

    Raises:
        InputError: There is no Fisher or it is damaged, values differ, a tensor with a Fisher is
            missing, or alike tensors cannot be told apart by their names.
        NonFiniteError: NaN or infinity in the Fisher.
    """
    with claiming(Path(options.output_dir)):
        target = Path(options.output_dir)
        source, stored = _opened(options)
        there = find_output(target, merged=True)
        if there is None:
            check_output(target, source, overwrite=options.overwrite, whole=True)
        plan = _planned(source, stored)
        if (done := cached(there, plan.made_from)) is not None:
            return _result(plan, target, "cached", done.ledger)
        if there is not None:
            check_output(target, source, overwrite=options.overwrite, whole=True)
        check_fisher_values(stored)
        check_intact(stored)
        ledger = _write(plan, target, overwrite=options.overwrite)
        return _result(plan, target, "done", ledger)


@dataclass(frozen=True)
class _Plan:
    """A checkpoint, the Fisher of its weights under other names, and how the names correspond."""

    source: Checkpoint
    records: dict[str, TensorRecord]  # of the checkpoint's weights
    stored: StoredFisher
    fit: Renaming

    def made_from(self) -> str:
        at = self.stored.folder / LEDGER_NAME
        content = checkpoint_content(self.source, at, self.records)
        return json_digest({"command": "remap", "versions": versions(), "checkpoint": content})

    @cached_property
    def by_new_name(self) -> dict[str, str]:
        """The ledger's names by those of the checkpoint, in the order of its weights."""
        names = {new: old for old, new in self.fit.names.items()}
        return {new: names[new] for new in self.source.weights if new in names}

    @cached_property
    def factors(self) -> tuple[dict[str, Tensor], dict[str, Block]]:
        """The matrices and what they are of, by new names, each named after a parameter."""
        blocks = self.stored.ledger.blocks or {}
        return renamed_factors(self.stored.factors or {}, blocks, self.fit.names)

    def ledger(self) -> Ledger:
        """Give the ledger by the checkpoint's names; the Fisher's records are still to come."""
        ledger = renamed(self.stored.ledger, self.fit.names)
        reasons = {n: why for n, why in ledger.unprotected.items() if n in self.by_new_name}
        return replace(
            ledger,
            unprotected=reasons | {name: self._why(name) for name in self.fit.extra},
            weights=self.records,
            blocks=self.factors[1] or None,
            versions=program_versions(),
            made_from=self.made_from(),
            description=None,
        )

    def _why(self, name: str) -> str:
        """Give the reason of a tensor without a Fisher: a tied tensor's second name, or none."""
        record = self.records[name]
        same = [new for new in self.by_new_name if self.records[new] == record]
        of_fisher = [new for new in same if self.by_new_name[new] in self.stored.fisher]
        tied = len(same) == len(of_fisher) == 1 and len(record.shape) > 1
        return SAME_AS + of_fisher[0] if tied else NOT_COVERED

    def of(self, tensors: Mapping[str, Tensor]) -> Renamed:
        """Give some of the ledger's tensors by the checkpoint's names."""
        return Renamed(tensors, {n: old for n, old in self.by_new_name.items() if old in tensors})


def _opened(options: RemapOptions) -> tuple[Checkpoint, StoredFisher]:
    """Open the checkpoint with the new names, and the Fisher with the old ones."""
    path = locate(options.checkpoint, options.revision)
    source = open_checkpoint(path)
    if source.adapter is not None:
        raise InputError(
            f"{path}: expected a whole model, found an adapter: measure the Fisher of its present "
            "names with `consolidate fisher`"
        )
    try:
        folder = find_fisher(path, options.fisher_of)
    except InputError as error:
        swapped = (path / "fisher").is_dir() and Path(str(options.fisher_of)).is_dir()
        hint = f"; {path} has one: swap the two" if swapped else ""
        raise InputError(f"--fisher-of {error}{hint}") from None
    if folder is None:
        raise InputError(
            f"{path} has no Fisher: name the checkpoint with the old names, which has one, with "
            "--fisher-of"
        )
    stored = read_fisher(folder)
    if stored.ledger.base is not None:
        raise InputError(
            f"{folder / LEDGER_NAME}: expected the Fisher of a whole model, found that of an "
            "adapter: measure the Fisher of these weights with `consolidate fisher`"
        )
    return source, stored


def _planned(source: Checkpoint, stored: StoredFisher) -> _Plan:
    """Pair the tensors, or refuse."""
    records = weight_records(source.weights)
    fit = renaming(stored.ledger, records)
    _check_pure(fit, source.path, stored)
    check_finite(source.weights, source.path)
    return _Plan(source, records, stored, fit)


def _check_pure(fit: Renaming, path: Path, stored: StoredFisher) -> None:
    """Refuse weights that differ in more than names from those of the Fisher, or unclear names."""
    ledger = stored.folder / LEDGER_NAME
    if not fit.is_pure:
        raise InputError(
            f"{path} differs in more than names from the weights of {ledger}: {fit.faults()}"
        )
    if fit.unclear:
        olds, news = fit.unclear[0]
        one = olds[0] if len(olds) == 1 else f"{olds[0]} or {olds[1]}"
        other = news[0] if len(news) == 1 else f"{news[0]} or {news[1]}"
        raise InputError(
            f"{path}: {one} in {ledger} may be {other} here, since their values are the same and "
            "their names end differently: rename one so that it ends as before"
        )


def _write(plan: _Plan, target: Path, *, overwrite: bool) -> Ledger:
    """Write the checkpoint with its Fisher, and give the ledger."""
    stored = plan.stored
    with replace_folder(target, overwrite=overwrite) as staging:
        write_checkpoint(staging, plan.source, plan.source.weights)
        ledger = write_fisher(
            staging / "fisher",
            plan.of(stored.fisher),
            plan.ledger(),
            anchor=None if stored.anchor is None else plan.of(stored.anchor),
            heads={task: plan.of(head) for task, head in stored.heads.items()},
            factors=plan.factors[0] or None,
            factor_anchor=None if stored.factor_anchor is None else plan.of(stored.factor_anchor),
            dtype=dtype_of(stored.fisher, next(iter(stored.fisher))),
        )
        renew_card(staging, ledger)
        refuse_changed(staging, plan.records, plan.source.path, meanwhile="they were copied")
    return ledger


def _result(
    plan: _Plan, target: Path, status: Literal["done", "cached"], ledger: Ledger
) -> RemapResult:
    return {
        "status": status,
        "checkpoint": str(target),
        "fisher": str(target / "fisher"),
        "commits": commits_of(plan.source.path, plan.stored.folder),
        "renamed": str(plan.source.path),
        "fisher_of": str(plan.stored.folder),
        "tasks": [task.name for task in ledger.tasks],
        "names": plan.fit.names,
        "left_out": plan.fit.left_out,
        "not_covered": plan.fit.extra,
    }
