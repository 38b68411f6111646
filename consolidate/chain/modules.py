"""The penalty of a torch module, and its Fisher stored, without a command."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from consolidate.chain.claims import refuse_changed
from consolidate.chain.opening import stored_fisher, with_base
from consolidate.chain.output import refuse_existing
from consolidate.chain.tasks import add_task, check_held_once
from consolidate.estimation.estimates import FisherDiagonal
from consolidate.ewc.penalty import Penalty
from consolidate.models.model import Model, file_weights, layout_of
from consolidate.models.objectives import get_objective
from formats.atomic import claimed_in_place, replace_folder
from formats.checkpoint import open_checkpoint
from formats.errors import InputError
from formats.fisher_folder import write_fisher
from formats.fisher_json import Ledger, check_task_name
from formats.hub import locate


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
    layout = layout_of(module, source, own=not hasattr(module, "save_pretrained"))
    check_held_once(stored.fisher, layout, str(stored.folder))
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
