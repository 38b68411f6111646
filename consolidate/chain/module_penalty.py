"""The penalty of a torch module, from the Fisher of a checkpoint, without a command."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consolidate.chain.factors import module_factors
from consolidate.chain.opening import with_fisher
from consolidate.chain.tasks import check_held_once
from consolidate.ewc.block_penalty import BlockPenalty
from consolidate.ewc.low_rank_penalty import LowRank, MergedPenalty
from consolidate.ewc.matching import unwrapped
from consolidate.ewc.penalty import Penalty
from consolidate.models.lora import adapted_module, has_adapter, low_rank_layers, without_adapter
from consolidate.models.model import layout_of
from consolidate.models.tensor_names import NAME
from formats.errors import InputError, UsageError
from formats.fisher_json import Block
from formats.hub import locate
from formats.wording import few

LOG = logging.getLogger("consolidate")


def load_penalty(
    module: nn.Module,
    checkpoint: str | Path,
    *,
    ewc_lambda: float,
    structure: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Penalty | BlockPenalty | MergedPenalty:
    """Make the penalty that keeps a module close to a checkpoint, for your own training loop.

    The penalty is λ ((1/2) Σ_i Λ_i (θ_i − μ_i)² + offset), with Λ, μ and offset of the checkpoint,
    however far θ, the module, has moved from it; for layers with a matrix R it is that of
    `BlockPenalty`. Λ, μ and R stay memory-mapped where the files have the wanted dtype and device:
    do not write into these files while the penalty is in use (replacing them, as safetensors does,
    is safe).

    Args:
        module: A transformers model, or any module whose ``state_dict()`` has the names and shapes
            of the weights file.
        checkpoint: Folder with a Fisher, or repository on the Hub.
        ewc_lambda: λ, the strength.
        structure: ``diagonal``, or ``inputs`` for the matrices R too; default: what is stored.
        revision: Branch, tag or commit of a checkpoint on the Hub.
        dtype: Dtype of Λ and μ in memory, as for `Penalty`; R stays in float32 or wider.
        device: Device of Λ, μ and R, as for `Penalty`.

    Returns:
        The penalty; call `add_gradient_` once per optimizer step. For a module with a LoRA adapter
        of peft and a whole checkpoint it is on the weights W + s B A, as of
        ``finetune --penalty-on merged``; for a checkpoint that is an adapter, on A and B.

    Raises:
        InputError: There is no Fisher, it does not belong to the weights or to the module, it
            protects none of the module's trainable parameters, or it has no matrices R and
            `structure` is ``inputs``.
        UsageError: `structure` is neither.
    """
    if structure not in (None, "diagonal", "inputs"):
        raise UsageError(f"structure {structure!r}: expected 'diagonal' or 'inputs'")
    folder = locate(checkpoint, revision)
    source, stored = with_fisher(folder)
    module = unwrapped(module)
    adapted = source.adapter is None and has_adapter(module)
    if adapted:
        _check_active(module)
    plain = without_adapter(module) if adapted else module
    own = not hasattr(plain, "save_pretrained")
    layout = layout_of(plain, source, own=own)
    check_held_once(stored.fisher, layout, str(stored.folder))
    if lacking := [name for name in stored.fisher if not layout.module_names(name)]:
        if own:
            raise InputError(
                f"{stored.folder} contains {lacking[0]!r} ({len(lacking)} such names), which is "
                "not in the module: pass the submodule that has the names of the weights file, or "
                "give it these names"
            )
        LOG.warning("the model lacks, and so does not protect, %s", few(lacking, 4))
    fisher = layout.to_module(stored.fisher)
    anchor = layout.to_module(
        stored.anchor or {name: source.weights[name] for name in stored.fisher}
    )
    storage: dict[str, Any] = {"ewc_lambda": ewc_lambda, "dtype": dtype, "device": device}
    factors = None
    if structure != "diagonal":
        factors = module_factors(stored, layout, source.weights)
    if structure == "inputs" and factors is None:
        raise InputError(
            f"{stored.folder} has no factors that fit the module: measure the Fisher with "
            "`consolidate fisher --structure inputs`, or use structure='diagonal'"
        )
    storage |= factors or {"offset": stored.ledger.penalty_offset}
    penalty: Penalty | BlockPenalty | MergedPenalty
    if adapted:
        penalty = _merged_penalty(adapted_module(module), fisher, anchor, **storage)
    else:
        kind = Penalty if factors is None else BlockPenalty
        penalty = kind(module, fisher, anchor, **storage)
    if not penalty.parameters():
        raise InputError(
            f"{stored.folder} protects no trainable parameter of the module: unfreeze some"
        )
    return penalty


def _check_active(module: nn.Module) -> None:
    """Refuse adapters of which the one that the penalty is on is not the only active one."""
    for name, layer in module.named_modules():
        active = getattr(layer, "active_adapters", [NAME])
        if hasattr(layer, "lora_A") and list(active) != [NAME]:
            raise InputError(
                f"{name}: expected one active adapter, {NAME!r}, found {', '.join(active)}: give "
                "the adapter that is trained this name, and activate it alone"
            )


def _merged_penalty(
    base: nn.Module, fisher: Mapping[str, Tensor], anchor: Mapping[str, Tensor], **storage: Any
) -> MergedPenalty:
    """Protect the weights that an adapter changes, and what trains beside it."""
    layers, blocks = low_rank_layers(base), storage.get("blocks") or {}
    of_layers = [block for block in blocks.values() if block.parameters[0] in layers]
    taken = {*layers, *(at for block in of_layers for at in block.parameters)}
    parameters = {
        name.replace(f".modules_to_save.{NAME}.", ".").replace(".base_layer.", "."): p
        for name, p in base.named_parameters()
    }
    known = {at: p for at, p in parameters.items() if at in fisher and at not in taken}
    penalty = adapter_penalty(layers, known, fisher, anchor, **storage)
    held = {id(p) for p in penalty.parameters()}
    held |= {id(p) for layer in layers.values() for p in (layer.a, layer.b)}  # named by their W
    free = [at for at, p in parameters.items() if p.requires_grad and id(p) not in held]
    penalty.unprotected = [*dict.fromkeys([*penalty.unprotected, *free])]
    return penalty


def adapter_penalty(
    layers: Mapping[str, LowRank],
    others: Mapping[str, nn.Parameter],
    fisher: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor] | None,
    *,
    offset: float,
    factors: Mapping[str, Tensor] | None = None,
    blocks: Mapping[str, Block] | None = None,
    **storage: Any,
) -> MergedPenalty:
    """Make the penalty on the layers that an adapter changes, and on the parameters beside them."""
    given, blocks = factors or {}, blocks or {}
    of_layers = {name: b for name, b in blocks.items() if b.parameters[0] in layers}
    of_others = {name: b for name, b in blocks.items() if set(b.parameters) <= others.keys()}
    beside = BlockPenalty(
        others.items(),
        {name: values for name, values in fisher.items() if name in others},
        anchor,
        factors={name: given[name] for name in of_others},
        blocks=of_others,
        **storage,
    )
    return MergedPenalty(
        layers,
        fisher,
        anchor,
        offset=offset,
        beside=beside,
        factors={name: given[name] for name in of_layers},
        blocks=of_layers,
        **storage,
    )
