"""The Fisher of a torch module, stored beside its checkpoint without a command."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from consolidate.chain.claims import refuse_changed
from consolidate.chain.elsewhere import open_origin
from consolidate.chain.fitted_chain import Chain
from consolidate.chain.opening import stored_fisher, with_base
from consolidate.chain.output import refuse_existing
from consolidate.chain.tasks import add_task, task_name
from consolidate.estimation.estimates import FisherDiagonal
from consolidate.fields import gather
from consolidate.models.model import Model, file_weights, layout_of
from consolidate.models.objectives import get_objective
from consolidate.options import Merging
from formats.atomic import claimed_in_place, replace_folder
from formats.checkpoint import open_checkpoint
from formats.errors import InputError, NonFiniteError, UsageError
from formats.fisher_folder import LEDGER_NAME
from formats.fisher_json import Ledger, check_task_name, read_ledger


def store_fisher(
    module: nn.Module,
    checkpoint: str | Path,
    diagonal: FisherDiagonal,
    *,
    task: str,
    objective: str,
    labels: Sequence[str] | None = None,
    overwrite: bool = False,
    after: str | Path | None = None,
    merge_rule: str | None = None,
    gamma: float | None = None,
    task_weight: float | str = 1.0,
) -> Ledger:
    """Store a Fisher measured by `fisher_diagonal` beside the weights it was measured at.

    With `after` it is merged with the tasks of the checkpoint that the training began from, so that
    the next training protects all of them. A last task of this name that `finetune` left unmeasured
    is merged as its training asked.

    Args:
        module: Module it was measured with, which has the checkpoint's weights.
        checkpoint: Local folder.
        diagonal: Fisher by the module's parameter names, in their shapes, with its factors if it
            has any.
        task: Name of the task in the ledger.
        objective: What was predicted, such as ``classification``.
        labels: Names of the classes.
        overwrite: Replace an existing Fisher.
        after: Checkpoint with a Fisher from which the module was trained.
        merge_rule: ``online`` or ``separate``; default: that of the earlier tasks, else online.
        gamma: γ of ``online``, from 0 to 1; default: that of the earlier tasks, else 1.
        task_weight: Factor of the task's Fisher, or ``units`` or ``trace``.

    Returns:
        The ledger as written to ``fisher/fisher.json``.

    Raises:
        InputError: A Fisher already exists, the module's weights are not the checkpoint's, or its
            tensors are not those of `after`.
        UsageError: `diagonal` is not what `fisher_diagonal` returns.
    """
    if not isinstance(diagonal, FisherDiagonal):
        raise UsageError(
            f"diagonal: expected a FisherDiagonal, as fisher_diagonal returns it, found "
            f"{type(diagonal).__name__}"
        )
    source = with_base(open_checkpoint(Path(checkpoint)), None)
    target = Path(checkpoint) / "fisher"
    before: Chain | None = None
    try:
        if after is None and _is_unmeasured(target, task):
            before, overwrite = stored_fisher(target, source), True
    except (InputError, NonFiniteError):
        if not overwrite:
            raise
    refuse_existing(target, overwrite=overwrite)
    check_task_name(task)
    origin = None if after is None else open_origin(after, source, None)
    asked = {"merge_rule": merge_rule, "gamma": gamma, "task_weight": task_weight}
    merging = gather(Merging, asked)
    with claimed_in_place(Path(checkpoint), "fisher"):
        own = not hasattr(module, "save_pretrained")
        model = Model(
            module,
            source,
            get_objective(objective, factory=own),
            None if labels is None else list(labels),
            None,
            layout_of(module, source, own=own),
        )
        for name, values in file_weights(model).items():
            if name not in source.weights or not torch.equal(values.cpu(), source.weights[name]):
                raise InputError(
                    f"{source.path}: the tensor {name!r} differs from the module's: save the "
                    "module's weights there first"
                )
        training = None
        if origin is not None:
            before, training = origin.chain(model), origin.training()
            task_name(task, "", before)  # refuses one that the ledger has
        added = add_task(
            before, model, source.weights, diagonal, name=task, training=training, merging=merging
        )
        with replace_folder(target, overwrite=overwrite) as staging:
            ledger = added.write(staging)
            refuse_changed(source.path, ledger.weights, source.path)
        return ledger


def _is_unmeasured(folder: Path, task: str) -> bool:
    """Return whether a task is the last of the ledger there, and has no Fisher."""
    if not (folder / LEDGER_NAME).is_file():
        return False
    last = read_ledger(folder / LEDGER_NAME).tasks[-1]
    return last.name == task and not last.measured
