"""The chain of tasks behind a checkpoint: its Fisher, its ledger, and adding a task to them."""

import math
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from consolidate.chain.claims import refuse_changed
from consolidate.estimation.estimators import FisherDiagonal
from consolidate.ewc.merging import merge_online, merge_separate
from consolidate.ewc.overlap import fisher_overlap
from consolidate.ewc.penalty import Penalty
from consolidate.models.adapters import adapter_layout, with_base
from consolidate.models.layout import Layout, same_names_layout, transformers_layout
from consolidate.models.loading import Model, file_weights, unprotected
from consolidate.models.objectives import get_objective
from formats.atomic import check_target, claimed_in_place, has_content, replace_folder
from formats.checkpoint import Checkpoint, open_checkpoint, weight_records
from formats.digest import TensorRecord, dtype_name, set_digest
from formats.errors import InputError, UsageError
from formats.fisher_folder import (
    LEDGER_NAME,
    StoredFisher,
    check_belongs,
    check_intact,
    read_fisher,
    write_fisher,
)
from formats.hub import FISHER, locate
from formats.ledger import (
    MERGE_RULES,
    LayerRecord,
    Ledger,
    TaskRecord,
    check_names,
    check_task_name,
)
from formats.tensors import shape_of


class Chain(Protocol):
    """What the tasks so far left behind: a `StoredFisher`, or one fitted to another head."""

    @property
    def ledger(self) -> Ledger:
        """The tasks, and how they were merged."""

    @property
    def fisher(self) -> Mapping[str, Tensor]:
        """Λ by the names of the weights file."""

    @property
    def anchor(self) -> Mapping[str, Tensor] | None:
        """μ by the same names; None where it is the weights."""

    @property
    def heads(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Output layers that were put aside, by task."""


def stored_fisher(folder: Path, source: Checkpoint) -> StoredFisher:
    """Read a Fisher folder, after every byte of it and of its weights was compared with its ledger.

    Args:
        folder: The Fisher folder.
        source: The checkpoint.

    Returns:
        The Fisher, read tensor by tensor.

    Raises:
        InputError: There is none, it is damaged, or it belongs to other weights, or to an adapter
            of another base model.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist: run `consolidate fisher` first")
    stored = read_fisher(folder)
    check_belongs(stored, source.weights, str(source.path))
    check_kind(stored, source)
    check_base(stored.ledger, folder, source)
    check_intact(stored)
    return stored


def find_fisher(checkpoint: Path, elsewhere: str | Path | None) -> Path | None:
    """Find the Fisher folder: the one beside the weights, or the one that was named.

    Args:
        checkpoint: The folder or file of the weights.
        elsewhere: A Fisher folder, a folder or a repository on the Hub that holds one.

    Returns:
        The folder; None where none was named and none lies beside the weights.

    Raises:
        InputError: What was named holds no Fisher.
    """
    if elsewhere is None:
        beside = checkpoint / "fisher"
        return beside if beside.is_dir() else None
    folder = locate(elsewhere, only=FISHER)
    for candidate in (folder / "fisher", folder):
        if (candidate / "fisher.json").is_file():
            return candidate
    raise InputError(f"{elsewhere} holds no Fisher: neither fisher/fisher.json nor fisher.json")


def task_name(name: str | None, data: str, before: Chain | None) -> str:
    """Choose the name of a new task: the one given, else one made from the data's.

    Args:
        name: The name given.
        data: The name of the data.
        before: The chain so far, whose names are taken.

    Returns:
        A valid name that is free.

    Raises:
        InputError: The name given is not valid.
        UsageError: The chain has a task of that name.
    """
    if name is None:
        name = "".join(c if c.isascii() and c.isalnum() else "-" for c in Path(data).stem)
        name = name.strip("-")[:64] or "task"
    check_task_name(name)
    if before is not None and name in [task.name for task in before.ledger.tasks]:
        raise UsageError(f"the ledger has a task {name!r} already: choose another name with --task")
    return name


def merging_options(
    before: Chain | None,
    merge_rule: str | None,
    gamma: float | None,
    task_weight: float | str,
) -> tuple[str, float]:
    """Choose how a new task will be merged: as asked for, else as the chain so far was.

    Args:
        before: The chain so far; None for the first task.
        merge_rule: ``online`` or ``separate``; the chain's unless given, ``online`` for a first.
        gamma: γ of ``online``; the chain's unless given, 1 for a first.
        task_weight: A number, ``units`` or ``trace``.

    Returns:
        The merge rule and γ.

    Raises:
        UsageError: One of them is not what it may be.
    """
    rule = merge_rule or ("online" if before is None else before.ledger.merge_rule)
    if rule not in MERGE_RULES:
        raise UsageError(f"--merge-rule {rule}: expected one of {', '.join(MERGE_RULES)}")
    if task_weight not in ("units", "trace"):
        number = task_weight if isinstance(task_weight, int | float) else math.nan
        if not (math.isfinite(number) and number >= 0):
            raise UsageError(
                f"--task-weight {task_weight}: expected a number from 0, units or trace"
            )
    if rule == "separate":
        if gamma not in (None, 1.0):
            raise UsageError(
                f"--gamma {gamma} has no meaning with --merge-rule separate, which keeps every "
                "task whole: leave it out, or use --merge-rule online"
            )
        return rule, 1.0
    if gamma is None:
        gamma = 1.0 if before is None else before.ledger.gamma
    if not 0 <= gamma <= 1:
        raise UsageError(f"--gamma {gamma}: expected a number from 0 to 1")
    return rule, gamma


def add_task(
    before: Chain | None,
    model: Model,
    weights: Mapping[str, Tensor],
    diagonal: FisherDiagonal,
    *,
    records: dict[str, TensorRecord] | None = None,
    name: str,
    data: str = "",
    data_digest: str | None = None,
    ewc_lambda: float | None = None,
    penalty: str | None = None,
    penalty_on: str | None = None,
    parent: str | None = None,
    made_from: str | None = None,
    metrics: dict[str, dict[str, dict[str, float]]] | None = None,
    merge_rule: str | None = None,
    gamma: float | None = None,
    task_weight: float | str = 1.0,
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, Ledger]:
    """Merge a task's Fisher into the chain so far, and grow its ledger by the task.

    Either rule goes on from either. A chain that was merged ``online`` has its anchor at its
    weights, and there ``separate`` then holds it; ``online`` moves the anchor of a ``separate``
    chain to the new weights, as it does with every anchor, and the offset is 0 again.

    Args:
        before: The chain so far; None for the first task.
        model: The model the Fisher was measured with.
        weights: What is stored of it, by the names of the weights file.
        diagonal: The new task's Fisher by the module's names.
        records: What `weight_records` says of `weights`, where that is known already.
        name: The new task's name.
        data: The name of its data.
        data_digest: SHA-256 of the data, or None.
        ewc_lambda: λ that the task was learned with.
        penalty: The penalty that it was learned with.
        penalty_on: Where an adapter learned it: ``adapter`` or ``merged``, what the penalty held.
        parent: Set digest of the weights that learning it began from; None where it was measured.
        made_from: Digest of all that the result depends on, or None.
        metrics: What was measured while it was learned.
        merge_rule: As in `merging_options`.
        gamma: As in `merging_options`.
        task_weight: w, or ``units`` for w_1 n_t/n_1, in the units the Fishers were measured on, or
            ``trace`` for w_1 tr F_1 / tr F_t over the parameters that both have; w_1 is 1 unless
            it was given or the first task came by a merge of models.

    Returns:
        Λ by the names of the weights file; μ by the same names, None where it is the weights; and
        the ledger.

    Raises:
        UsageError: As `merging_options`.
    """
    rule, gamma = merging_options(before, merge_rule, gamma, task_weight)
    total: Mapping[str, Tensor] = {} if before is None else before.fisher
    fisher = model.layout.to_file(diagonal)
    record = TaskRecord(
        name=name,
        objective=model.objective.name,
        likelihood=model.objective.likelihood,
        labels=model.labels,
        unit=model.objective.unit,
        examples=diagonal.examples,
        units=diagonal.units,
        estimator=diagonal.estimator,
        mc_samples=diagonal.mc_samples,
        seed=diagonal.seed,
        data=data,
        data_digest=data_digest,
        ewc_lambda=ewc_lambda,
        penalty=penalty,
        penalty_on=penalty_on,
        parent=parent,
        made_from=made_from,
        metrics=metrics or {},
        layers={
            parameter: LayerRecord(
                trace=float(values.double().sum()),
                overlap=fisher_overlap(values, total[parameter]) if parameter in total else None,
            )
            for parameter, values in fisher.items()
        },
    )
    tasks = [*(before.ledger.tasks if before is not None else []), record]
    apart = () if before is None else before.heads.get(tasks[0].name, ())
    record.weight = _weight(task_weight, tasks, apart)
    anchor, offset = None, 0.0
    if rule == "online":
        merged = merge_online(total, fisher, gamma=gamma, weight=record.weight)
    else:
        where = model.checkpoint.weights if before is None or not before.anchor else before.anchor
        merged, anchor, offset = merge_separate(total, where, fisher, weights, weight=record.weight)
        if all(torch.equal(mu, weights[at].cpu().to(mu.dtype)) for at, mu in anchor.items()):
            anchor = None
        offset += 0.0 if before is None else before.ledger.penalty_offset
    ledger = Ledger(
        tasks=tasks,
        merge_rule=rule,
        gamma=gamma,
        penalty_offset=offset,
        unprotected=unprotected(model, merged),
        weights=records or weight_records(weights),
        versions=program_versions(),
        heads={} if before is None else before.ledger.heads,
        base=_base_digest(before, model.checkpoint),
    )
    return merged, anchor, ledger


def check_names_to_be(before: Chain | None, model: Model) -> None:
    """Refuse, before a pass, what the ledger after it could not say of each tensor's protection.

    Args:
        before: The chain so far, as the model has a place for it; None for the first task.
        model: As it will be measured.

    Raises:
        InputError: A tensor of the weights file would have neither a Fisher nor a reason why it has
            none; a Fisher would fit no tensor of the file; or one would be held under two names.
    """
    where = str(model.checkpoint.path)
    trained = [name for name, p in model.module.named_parameters() if p.requires_grad]
    weights, past = file_weights(model), {} if before is None else before.fisher
    shapes = {name: shape_of(past, name) for name in past}
    for name in trained:
        for at in model.layout.file_names(name):
            shapes.setdefault(at, weights.shape(at))
    _check_held_once(shapes, model.layout, where)
    check_names(
        Ledger(
            [],
            unprotected=unprotected(model, shapes),
            weights={
                at: TensorRecord(dtype_name(weights.dtype(at)), weights.shape(at), "")
                for at in weights
            },
            fisher={at: TensorRecord("F32", shape, "") for at, shape in shapes.items()},
        ),
        where,
    )


def load_penalty(
    module: nn.Module,
    checkpoint: str | Path,
    *,
    ewc_lambda: float,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Penalty:
    """Make the penalty that holds a module to a checkpoint, for a training loop of one's own.

    μ is read from the checkpoint, so it does not matter how far the module has moved from it. Λ and
    μ stay in the mapped files where these have the dtype and the device: do not write into them
    while the penalty is used (replacing them, as safetensors does, is safe).

    Args:
        module: With the parameters of the checkpoint: a model of transformers, or any module whose
            ``state_dict()`` has the names of the weights file.
        checkpoint: A folder with a Fisher, or a repository on the Hub.
        ewc_lambda: λ, the strength.
        revision: Of a checkpoint on the Hub.
        dtype: Of Λ and μ as they are kept, as for `Penalty`.
        device: Where Λ and μ are kept, as for `Penalty`.

    Returns:
        The penalty; call `add_gradient_` once per optimizer step.

    Raises:
        InputError: There is no Fisher, or it does not belong to the weights or to the module.
    """
    folder = locate(checkpoint, revision)
    source = open_checkpoint(folder)
    stored = stored_fisher(folder / "fisher", source)
    layout = _layout(module, source)
    _check_held_once(stored.fisher, layout, str(stored.folder))
    anchor = stored.anchor or {name: source.weights[name] for name in stored.fisher}
    return Penalty(
        module,
        layout.to_module(stored.fisher),
        layout.to_module(anchor),
        ewc_lambda=ewc_lambda,
        offset=stored.ledger.penalty_offset,
        dtype=dtype,
        device=device,
    )


def store_fisher(
    module: nn.Module,
    checkpoint: str | Path,
    diagonal: FisherDiagonal,
    *,
    task: str,
    objective: str,
    labels: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Ledger:
    """Store what `fisher_diagonal` measured beside the weights it was measured at.

    Args:
        module: Which it was measured with; its weights are the checkpoint's.
        checkpoint: A local folder.
        diagonal: The Fisher by the module's parameter names.
        task: The task's name in the ledger.
        objective: What was predicted, such as ``classification``.
        labels: Names of the classes.
        overwrite: Replace the Fisher that is there.

    Returns:
        The ledger as written to ``fisher/fisher.json``.

    Raises:
        InputError: There is a Fisher already, or the module's weights are not the checkpoint's.
    """
    source = with_base(open_checkpoint(Path(checkpoint)), None)
    target = Path(checkpoint) / "fisher"
    refuse_existing(target, overwrite=overwrite)
    check_task_name(task)
    with claimed_in_place(Path(checkpoint), "fisher"):
        model = Model(
            module,
            source,
            get_objective(objective, factory=not hasattr(module, "save_pretrained")),
            None if labels is None else list(labels),
            None,
            _layout(module, source),
        )
        for name, values in file_weights(model).items():
            if not torch.equal(values.cpu(), source.weights[name]):
                raise InputError(
                    f"{name!r} in the module is not what {source.path} holds: save the weights "
                    "first"
                )
        merged, _, ledger = add_task(None, model, source.weights, diagonal, name=task)
        with replace_folder(target, overwrite=overwrite) as staging:
            ledger = write_fisher(staging, merged, ledger)
            refuse_changed(source.path, ledger.weights, source.path)
        return ledger


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Refuse, before any work is done, a target that must not be replaced.

    Args:
        target: Where a checkpoint or a Fisher folder is to be put.
        overwrite: It may be replaced if it is one already.

    Raises:
        InputError: It cannot be written; it holds something and `overwrite` is false; or what it
            holds is neither a checkpoint nor a Fisher, or has a git history.
    """
    if target.name == "fisher" and (target / LEDGER_NAME).is_file() and not overwrite:
        raise InputError(
            f"{target} exists already: --overwrite replaces it, --add adds another task measured "
            "at the same weights"
        )
    check_target(target, overwrite=overwrite)
    if not has_content(target):
        return
    if not (target / LEDGER_NAME).is_file():
        try:
            open_checkpoint(target)
        except InputError:
            raise InputError(
                f"{target} is not replaced, since it holds no checkpoint: remove it yourself, or "
                "choose another folder"
            ) from None
    if (target / ".git").exists():
        raise InputError(f"{target} is not replaced, since it is a git repository")


def program_versions() -> dict[str, str]:
    """Give the versions of the programs that write a ledger."""
    versions = {"python": platform.python_version()}
    for package in ("consolidate-ewc", "safetensors", "torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _base_digest(before: Chain | None, source: Checkpoint) -> str | None:
    """Give the digest of an adapter's base model; a chain so far has been compared with it."""
    if before is not None or source.base is None:
        return None if before is None else before.ledger.base
    return set_digest(weight_records(source.base.weights))


def check_base(ledger: Ledger, folder: Path, source: Checkpoint) -> None:
    """Refuse an adapter's base model that is not the one its Fisher was measured with.

    Args:
        ledger: Of the adapter.
        folder: That of the ledger, for the message.
        source: The checkpoint; one that is no adapter is left alone.

    Raises:
        InputError: The base model is another one.
    """
    if source.base is None:
        return
    found = set_digest(weight_records(source.base.weights))
    if found != ledger.base:
        raise InputError(
            f"{folder / LEDGER_NAME} was measured on a base model with the digest "
            f"{str(ledger.base)[:12]}…, and {source.base.path} has {found[:12]}…: name the "
            "right one with --base-model"
        )


def check_kind(stored: StoredFisher, source: Checkpoint) -> None:
    """Refuse the Fisher of an adapter for a whole model, and of a whole model for an adapter.

    Args:
        stored: The Fisher.
        source: The checkpoint.

    Raises:
        InputError: They are of two kinds.
    """
    if (stored.ledger.base is None) != (source.adapter is None):
        kinds = ("a whole model", "an adapter")
        raise InputError(
            f"{stored.folder / LEDGER_NAME} is of {kinds[stored.ledger.base is not None]}, and "
            f"{source.path} is {kinds[source.adapter is not None]}"
        )


def _weight(asked: float | str, tasks: Sequence[TaskRecord], apart: Collection[str]) -> float:
    """Give the weight of the last task, relative to the first's where it was not a number.

    Parameters that are `apart`, in a head that the first has for itself, are not common to both.
    """
    if not isinstance(asked, str):
        return float(asked)
    first, new = tasks[0], tasks[-1]
    if first is new:
        return 1.0
    scale = first.weight or 1.0
    if asked == "units":
        return scale * new.units / first.units
    common = (first.layers.keys() & new.layers.keys()) - set(apart)
    past, present = (math.fsum(task.layers[at].trace for at in common) for task in (first, new))
    # A Fisher of zero holds nothing at any weight, and no weight can match it.
    return scale * (past / present if past > 0 and present > 0 else 1.0)


def _check_held_once(fisher: Iterable[str], layout: Layout, where: str) -> None:
    held: dict[str, str] = {}
    for name in fisher:
        other = held.setdefault(layout.duplicates.get(name, name), name)
        if other != name:
            raise InputError(
                f"{where}: {other} and {name} are one tensor in the model, and have two Fishers: "
                "use a model in which they are two, or measure the Fisher anew"
            )


def _layout(module: nn.Module, source: Checkpoint) -> Layout:
    shapes = {name: shape_of(source.weights, name) for name in source.weights}
    if source.adapter is not None:
        return adapter_layout(module, shapes)
    if hasattr(module, "save_pretrained"):
        return transformers_layout(module, shapes)[0]
    return same_names_layout(module, shapes)
