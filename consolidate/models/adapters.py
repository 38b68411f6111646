"""Checkpoints that are low-rank adapters of peft: loaded into their base model."""

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consolidate.models.loading import load_model
from consolidate.models.lora import import_peft, low_rank_layers
from consolidate.models.model import Model, freeze_parameters, layout_of
from consolidate.models.tensor_names import NAME, copies_of_base
from consolidate.runtime.quiet import quiet
from consolidate.runtime.randomness import untouched_randomness
from formats.checkpoint import ADAPTER_CONFIG, Checkpoint
from formats.errors import InputError, UsageError
from formats.tensors import shape_of
from formats.wording import few


def load(checkpoint: Checkpoint, **options: Any) -> Model:
    """Load a whole model, or an adapter in its frozen base model, with its layout and tokenizer."""
    if checkpoint.base is None:
        return load_model(checkpoint, **options)
    freeze = options.pop("freeze", ())
    if options.get("new_labels") is not None:
        raise UsageError(
            f"{checkpoint.path} is an adapter, and only a whole model can have a new head; start "
            "from a whole model"
        )
    model = load_model(checkpoint.base, adapter=checkpoint, **options)
    _attach(model, checkpoint, options.get("dtype"))
    freeze_parameters(model, freeze)
    return model


def notes_on_zero_factors(model: Model, diagonal: Mapping[str, Tensor]) -> list[str]:
    """Name factors whose Fisher is zero because the other factor is, as before training."""
    names = {id(parameter): name for name, parameter in model.module.named_parameters()}
    lost = [
        names[id(factor)]
        for layer in low_rank_layers(model.module).values()
        for factor, other in ((layer.a, layer.b), (layer.b, layer.a))
        if names[id(factor)] in diagonal and not other.any()
    ]
    if not lost:
        return []
    note = (
        f"warning: {len(lost)} of the adapter's factors have no Fisher and are not penalized, "
        f"because the other factor is zero, as before any training: {few(lost, 3)}; train the "
        "adapter on the task first"
    )
    return [note]


def _attach(model: Model, checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    peft = import_peft()
    assert checkpoint.adapter is not None
    assert checkpoint.base is not None
    known = {field.name for field in fields(peft.LoraConfig)}
    where = checkpoint.path / ADAPTER_CONFIG
    given = checkpoint.adapter
    if strange := [name for name, value in given.items() if name not in known and value]:
        raise InputError(
            f"{where}: peft {peft.__version__} does not know the option {strange[0]!r}; install a "
            "newer peft"
        )
    module = model.module
    _check_ranks(given, checkpoint.weights, where)
    try:
        config = peft.LoraConfig(
            **{name: value for name, value in given.items() if name in known}
            | {"init_lora_weights": True, "inference_mode": False}
        )
        with untouched_randomness(0), quiet():
            peft.inject_adapter_in_model(config, module, adapter_name=NAME)
    except Exception as error:
        raise InputError(
            f"{where} does not match the base model {checkpoint.base.path}: {error}"
        ) from error
    layout = layout_of(module, checkpoint)
    low_rank_layers(module)
    try:
        refuse_unmergeable(module)
    except UsageError as error:
        raise InputError(f"{checkpoint.path}: {error}") from None
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, at in copies_of_base(module, checkpoint.weights).items():
        here, stored = parameters[at].detach().cpu(), checkpoint.weights[name]
        narrow = torch.promote_types(here.dtype, stored.dtype) != stored.dtype
        same = stored.dtype if narrow else here.dtype  # one may have been rounded
        if not torch.equal(stored.to(same), here.to(same)):
            raise InputError(
                f"{checkpoint.path}: {name} is not the weight of the base model "
                f"{checkpoint.base.path}: use the base model that the adapter was trained on"
            )
    with torch.no_grad():
        for name, tensor in layout.to_module(checkpoint.weights).items():
            parameters[name].data = tensor.clone().to(parameters[name].device, dtype)
    module.eval()
    model.base_layout = model.layout
    model.checkpoint, model.layout = checkpoint, layout


def refuse_unmergeable(module: nn.Module) -> None:
    """Refuse adapted layers that compute otherwise than peft's factors: B A would not be W's."""
    for name, layer in module.named_modules():
        base = getattr(layer, "base_layer", None)
        if base is None:
            continue
        settings = {
            "padding_mode": getattr(base, "padding_mode", "zeros") != "zeros",
            "dilation": any(step != 1 for step in getattr(base, "dilation", ())),
            "max_norm": getattr(base, "max_norm", None) is not None,
        }
        for setting, differs in settings.items():
            if differs:
                raise UsageError(
                    f"{name} has {setting}={getattr(base, setting)!r}, which the adapter's factors "
                    "lack, so that merging would change the function: leave the layer out"
                )


def _check_ranks(config: Mapping[str, Any], weights: Mapping[str, Tensor], where: Path) -> None:
    """Refuse ranks that differ from those of the file's factors, before layers are allocated."""
    factors = [name for name in weights if re.search(r"\.lora_(embedding_)?A(\.|$)", name)]
    found = [shape[0] for name in factors if (shape := shape_of(weights, name))]
    of_layers = config.get("rank_pattern")
    several = list(of_layers.values()) if isinstance(of_layers, dict) else []
    for rank in [config.get("r"), *several]:
        if not isinstance(rank, int) or not 1 <= rank <= max(found, default=0):
            raise InputError(
                f"{where}: expected the rank of the factors in the file, "
                f"{max(found, default='none')}, found {rank!r}"
            )
