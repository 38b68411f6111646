"""What a merge is made of: checkpoints opened, compared and found to fit together."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consolidate.chain.factors import Factors, factors_of
from consolidate.chain.fingerprint import checkpoint_content, plain, versions
from consolidate.chain.fitted_chain import pending_task
from consolidate.chain.opening import stored_fisher
from consolidate.commands.merge_blocks import BlockSource, shared_blocks
from consolidate.models.layout import renamed_factors
from formats.atomic import unreplaced
from formats.checkpoint import Checkpoint, check_finite, open_checkpoint
from formats.digest import json_digest
from formats.errors import InputError, UsageError
from formats.fisher_folder import LEDGER_NAME, StoredFisher
from formats.fisher_json import Block, TaskRecord, copies
from formats.hub import commits_of, locate
from formats.tensors import Renamed, TensorFiles, dtype_of, shape_of

LOG = logging.getLogger("consolidate")

COUNTER = "num_batches_tracked"
"""End of the name of a batch norm's count, of which the largest is taken."""

_ALIKE = "only checkpoints of one architecture can be merged"


@dataclass(frozen=True)
class OpenModel:
    """A checkpoint to merge, with its Fisher and its coefficient.

    `weights`, `fisher` and `anchor` have a tensor that the file has under several names only once,
    under the name that is used for it in all models.
    """

    path: Path
    source: Checkpoint
    stored: StoredFisher
    coefficient: float
    names: Mapping[str, str]  # in the file, by common name
    same: Mapping[str, str]  # the common name of each tensor with several names

    def common(self, name: str) -> str:
        """Give the name that all models use for a tensor of this one's file."""
        return self.same.get(name, name)

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        """The weights by common names."""
        return self._renamed_tensors(self.source.weights)

    @cached_property
    def fisher(self) -> Mapping[str, Tensor]:
        """Λ by common names."""
        return self._renamed_tensors(self.stored.fisher)

    @cached_property
    def anchor(self) -> Mapping[str, Tensor] | None:
        """The anchor μ by common names; None where it is the weights."""
        anchor = self.stored.anchor
        return None if anchor is None else self._renamed_tensors(anchor)

    def _renamed_tensors(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return Renamed(tensors, {at: name for at, name in self.names.items() if name in tensors})

    @cached_property
    def factors(self) -> Factors:
        """The matrices R by common names; none where they are of another kind."""
        found = factors_of(self.stored) or Factors({}, {})
        return Factors(*renamed_factors(*found, {at: self.common(at) for at in found.covered}))

    def block_source(self) -> BlockSource:
        """Give what its layers are merged from."""
        mu = self.stored.factor_anchor
        anchor = None if mu is None else Renamed(mu, {self.common(at): at for at in mu})
        return BlockSource(
            self.path, self.coefficient, self.factors, self.fisher, self.weights, anchor
        )

    @property
    def tasks(self) -> dict[str, TaskRecord]:
        """The tasks by name, their layers by common names."""
        return {task.name: _renamed(task, self.same) for task in self.stored.ledger.tasks}

    def content(self) -> dict[str, Any]:
        """Describe this checkpoint by content, JSON-ready."""
        ledger = self.stored.ledger
        return checkpoint_content(self.source, self.stored.folder / LEDGER_NAME, ledger.weights)


@dataclass(frozen=True)
class Plan:
    """What is merged: compatible models, their base, and the tasks of all."""

    models: list[OpenModel]
    base: OpenModel | None
    tasks: list[TaskRecord]
    heads: dict[str, TensorFiles]
    blocks: dict[str, Block]  # of layers that all have a matrix R of, by common names
    without_factors: list[str]  # weights of layers that some of the models have a block of

    @property
    def everything(self) -> list[OpenModel]:
        """The models, and the base behind them."""
        return self.models if self.base is None else [*self.models, self.base]

    def made_from(self) -> str:
        """Give the digest of everything that the result depends on."""
        return json_digest(
            {
                "command": "merge",
                "versions": versions(),
                "models": [model.content() for model in self.models],
                "coefficients": plain([model.coefficient for model in self.models]),
                "base": None if self.base is None else self.base.content(),
            }
        )


def plan_merge(
    checkpoints: Sequence[str | Path], coefficients: Sequence[float], base: str | Path | None
) -> Plan:
    """Open all checkpoints, and refuse those that cannot be merged."""
    opened = [_open(*pair) for pair in zip(checkpoints, coefficients, strict=True)]
    if base is not None:
        opened.append(_open(base, 1.0 - sum(coefficients)))
    _refuse_unmeasured(opened)
    same = _same_tensors(opened)
    everything = [_once(model, same) for model in opened]
    models, shared = everything[: len(checkpoints)], None if base is None else everything[-1]
    for model in models[1:]:
        _check_alike(models[0], model)
        _check_configs(models[0], model)
    if shared is not None:
        _check_base(models, shared)
    blocks = shared_blocks([model.block_source() for model in everything])
    return Plan(models, shared, *_joined(models, shared), *blocks)


def _refuse_unmeasured(opened: Sequence[OpenModel]) -> None:
    """Refuse models whose last task has no Fisher yet: it can only be measured at their weights."""
    for model in opened:
        if (task := pending_task(model.stored)) is not None:
            # In the Hub's cache nothing is to be written.
            fetched = next(iter(commits_of(model.path).items()), None)
            of = str(model.path) if fetched is None else f"{'@'.join(fetched)} --output-dir DIR"
            raise InputError(
                f"{model.path}: the Fisher of {task.name!r} was not measured, so merging would not "
                f"protect it: run `consolidate fisher {of} --data DATA --task {task.name}`"
            )


def checked_coefficients(weights: Sequence[float] | None, count: int) -> list[float]:
    """Give a coefficient for each of the checkpoints; refuse one that is not above 0."""
    if count < 2:
        raise UsageError(
            f"merge needs at least two checkpoints, found {count}; to copy one, copy its folder"
        )
    coefficients = [1.0] * count if weights is None else [float(c) for c in weights]
    if len(coefficients) != count:
        gives = f"--weights: expected {count} numbers, one per checkpoint"
        raise UsageError(f"{gives}, found {len(coefficients)}")
    for coefficient in coefficients:
        if not (math.isfinite(coefficient) and coefficient > 0):
            raise UsageError(
                f"--weights: expected numbers above 0, found {coefficient}: leave that "
                "checkpoint out"
            )
    return coefficients


def _open(checkpoint: str | Path, coefficient: float) -> OpenModel:
    """Open a checkpoint and its Fisher, and check their digests and values."""
    path = locate(checkpoint)
    return unreplaced(path, lambda: _open_folder(path, coefficient))


def _open_folder(path: Path, coefficient: float) -> OpenModel:
    source = open_checkpoint(path)
    if source.adapter is not None:
        raise InputError(
            f"{path}: expected a whole model, found an adapter, whose factors cannot be averaged: "
            "merge whole models"
        )
    stored = stored_fisher(path / "fisher", source)
    check_finite(source.weights, path)
    return OpenModel(path, source, stored, coefficient, {name: name for name in source.weights}, {})


def _renamed(task: TaskRecord, names: Mapping[str, str]) -> TaskRecord:
    """Rename a task's layers."""
    return replace(task, layers={names.get(at, at): layer for at, layer in task.layers.items()})


def _same_tensors(models: Sequence[OpenModel]) -> dict[str, str]:
    """Map the names of each tensor that some file has under several names to the common one."""
    same: dict[str, str] = {}
    for model in models:
        for name, first in copies(model.stored.ledger).items():
            one, other = same.get(name, name), same.get(first, first)
            same |= {at: other for at, to in same.items() if to == one}
            same |= {name: other, one: other}
    return same


def _once(model: OpenModel, same: Mapping[str, str]) -> OpenModel:
    """Keep one name of a tensor with several, that of its Fisher if it has one."""
    ledger = model.stored.ledger
    again = copies(ledger)
    names: dict[str, str] = {}
    for name in model.source.weights:
        at = same.get(name, name)
        other = names.setdefault(at, name)
        if other == name:
            continue
        differ = ledger.weights[name] != ledger.weights[other]
        if differ or (name in ledger.fisher and other in ledger.fisher):
            raise InputError(
                f"{model.path}: {other} and {name} are two tensors here, and one in another model: "
                + _ALIKE
            )
        if name in ledger.fisher or (other in again and other not in ledger.fisher):
            names[at] = name
    return replace(model, names=names, same=same)


def _check_alike(first: OpenModel, other: OpenModel) -> None:
    """Refuse other tensors: other names, shapes, dtypes or buffers."""
    ours, theirs = first.weights, other.weights
    for here, there in ((other, first), (first, other)):
        for name in there.weights:
            if name not in here.weights:
                raise InputError(
                    f"{here.path} has no tensor {name!r}, which {there.path} has: {_ALIKE}"
                )
    for name in ours:
        _check_shape(name, first, other)
        dtypes = dtype_of(ours, name), dtype_of(theirs, name)
        if dtypes[0] != dtypes[1]:
            found = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise InputError(
                f"the tensor {name!r} in {first.path} and {other.path} is {found}: save them in "
                "one dtype"
            )
        mergeable = dtypes[0].is_floating_point or name.endswith(COUNTER)
        if not mergeable and not torch.equal(ours[name], theirs[name]):
            raise InputError(
                f"the integer tensor {name!r} differs in {first.path} and {other.path} and cannot "
                "be averaged: make it the same in both"
            )


def _check_configs(first: OpenModel, other: OpenModel) -> None:
    """Refuse another architecture or other labels; log what else differs."""
    one, two = first.source.config, other.source.config
    changed = [key for key in {**one, **two} if one.get(key) != two.get(key)]
    for key in ("model_type", "architectures"):
        if key in changed:
            raise InputError(
                f"config.json: {key} is {one.get(key)} in {first.path} and {two.get(key)} in "
                f"{other.path}: {_ALIKE}"
            )
    if "id2label" in changed:
        raise InputError(
            f"config.json: the labels are {_labels(one)} in {first.path} and {_labels(two)} in "
            f"{other.path}: only heads with the same labels can be merged"
        )
    if changed:
        differs = f"config.json of {other.path} differs in {', '.join(changed)}"
        LOG.info("%s: that of %s is used", differs, first.path)


def _labels(config: Mapping[str, Any]) -> str:
    names = config.get("id2label")
    return ", ".join(map(str, names.values())) if isinstance(names, dict) and names else "no names"


def _check_base(models: Sequence[OpenModel], base: OpenModel) -> None:
    first = models[0]
    for model in models:
        for task, head in model.stored.heads.items():
            moved = any(name in base.stored.fisher for name in head)
            if moved and task in base.tasks and task not in base.stored.heads:
                raise InputError(
                    f"the head of {task} is saved in {model.path} but in use in the base "
                    f"{base.path}: set --base to a common ancestor with the new head"
                )
    for name in base.fisher:
        if name not in first.weights:
            raise InputError(
                f"{first.path} has no tensor {name!r}, which the base {base.path} has: set "
                "--base to a checkpoint that it was fine-tuned from"
            )
        _check_shape(name, first, base)


def _check_shape(name: str, first: OpenModel, other: OpenModel) -> None:
    ours, theirs = (list(shape_of(model.weights, name)) for model in (first, other))
    if ours != theirs:
        raise InputError(
            f"the tensor {name!r} has shape {ours} in {first.path} and {theirs} in {other.path}: "
            + _ALIKE
        )


def _joined(
    models: Sequence[OpenModel], base: OpenModel | None
) -> tuple[list[TaskRecord], dict[str, TensorFiles]]:
    """Join the ledgers' tasks, weighted by model, and their saved heads; the base's once."""
    shared = {} if base is None else base.tasks
    heads = {} if base is None else dict(base.stored.heads)
    tasks = dict(shared)
    holder: dict[str, OpenModel] = {}
    for model in models:
        for name, task in shared.items():
            if model.tasks.get(name) != task:
                what = "another record of the" if name in model.tasks else "no"
                raise InputError(
                    f"{model.stored.folder} has {what} task {name!r} of the base: set --base to a "
                    "checkpoint that it was fine-tuned from"
                )
        own = {name: task for name, task in model.tasks.items() if name not in shared}
        if twice := [name for name in own if name in tasks]:
            other = holder[twice[0]]
            if all(own[name] == other.tasks[name] for name in twice):
                advice = "name their last common ancestor with --base"
            else:
                advice = "if they are different tasks, measure one again under another --task"
            raise InputError(
                f"{other.path} and {model.path} both have the tasks {', '.join(twice)}, which "
                f"would count twice: {advice}"
            )
        for name, task in own.items():
            tasks[name] = replace(task, weight=task.weight * model.coefficient)
            holder[name] = model
        # Children may have saved the head of a shared task that is still in the base's weights.
        heads = model.stored.heads | heads
    return [_renamed(task, models[0].names) for task in tasks.values()], heads
