"""Low-rank adapters in a model that is trained: added by peft, inspected, merged."""

import re
import sys
from collections.abc import Collection, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from consolidate.ewc.low_rank_penalty import LowRank
from consolidate.models.model import Model
from consolidate.models.tensor_names import NAME, PREFIX, is_adapter
from consolidate.runtime.quiet import quiet
from consolidate.runtime.randomness import untouched_randomness
from formats.errors import InputError, UsageError, install

# Layers whose weights an adapter can change by a product.
KINDS = ("Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d")


@dataclass(frozen=True)
class Lora:
    """The options of a new adapter, for `add_lora`."""

    rank: int
    targets: Sequence[str] = ()  # glob patterns of layers' names, or of their last parts
    alpha: float | None = None  # the rank unless given, so that s = 1


def add_lora(module: nn.Module, lora: Lora, seed: int = 0) -> list[str]:
    """Add a new LoRA adapter to a module, in place: W + s B A with B = 0 (Hu et al. 2021).

    s = α/r, and `seed` is that of A. All else is frozen, and the module's outputs are unchanged
    until B is trained.
    """
    peft = import_peft()
    names = _targets(module, lora.targets)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank if lora.alpha is None else lora.alpha,
        target_modules="|".join(map(re.escape, names)),
        fan_in_fan_out=False,
    )
    with untouched_randomness(seed), quiet():
        peft.inject_adapter_in_model(config, module, adapter_name=NAME)
    return names


def low_rank_layers(module: nn.Module) -> dict[str, LowRank]:
    """Return the layers that an adapter changes, by the names of their weights without it."""
    found = {}
    for name, layer in _adapted(module).items():
        base = layer.get_base_layer()
        kind = type(base).__name__
        if kind not in KINDS or getattr(base, "groups", 1) != 1 or NAME in layer.lora_variant:
            raise InputError(
                f"the adapter's layer {name} is not W + s B A: expected one of {', '.join(KINDS)} "
                f"without groups, found {type(layer).__name__} on {kind}"
            )
        if kind == "Embedding":
            a, b = layer.lora_embedding_A[NAME], layer.lora_embedding_B[NAME]
        else:
            a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        transposed = kind in ("Conv1D", "Embedding")
        bias = getattr(base, "bias", None)
        found[f"{name}.weight"] = LowRank(base.weight, a, b, layer.scaling[NAME], transposed, bias)
    return found


def other_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train beside the low-rank factors, by name without the adapter."""
    return {
        name.replace(f".modules_to_save.{NAME}.", "."): parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and not any(p.startswith("lora_") for p in name.split("."))
    }


@torch.no_grad()
def merge_lora(module: nn.Module) -> None:
    """Replace W by W + s B A and remove the adapter from a module, in place."""
    for layer in low_rank_layers(module).values():
        a, b = (factor.flatten(1).to(layer.weight.dtype) for factor in (layer.a, layer.b))
        change = (b @ a).T if layer.transposed else b @ a
        layer.weight.add_(change.reshape(layer.weight.shape), alpha=layer.scale)
    remove_lora(module)


def remove_lora(module: nn.Module) -> None:
    """Remove the adapter from a module, in place; W is unchanged."""
    for name, layer in _adapted(module).items():
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(module, "peft_config"):
        del module.peft_config


def adapt(
    model: Model,
    lora: Lora,
    whole: Collection[str],
    others: Iterable[Model] = (),  # share the weights' memory, and get the same adapter
    seed: int = 0,
) -> list[nn.Parameter]:
    """Add a new adapter to a model and return the parameters frozen for it, for `end_adapting`.

    `whole`, by names in the file, trains in full beside the adapter: new tensors, or the head.
    """
    module = model.module
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    new = {at for name in whole for at in model.layout.module_names(name)}
    kept = [parameter for name, parameter in module.named_parameters() if name in new]
    names = add_lora(module, lora, seed)
    trained = {id(parameter) for parameter in trainable}
    for name, layer in low_rank_layers(module).items():
        if id(layer.weight) not in trained:
            raise UsageError(
                f"{name} is frozen by --freeze and a target of the adapter; leave it out of one"
            )
        if name in new:
            raise UsageError(
                f"{name} is trained in full, without an adapter; leave it out of --lora-targets"
            )
    for parameter in kept:
        parameter.requires_grad_(id(parameter) in trained)
    own = dict(module.named_parameters())
    for other in dict.fromkeys(others):  # tasks may share one
        add_lora(other.module, replace(lora, targets=names), seed)
        for name, parameter in other.module.named_parameters():
            if is_adapter(name):
                parameter.data = own[name].data
    return [parameter for parameter in trainable if not parameter.requires_grad]


def end_adapting(
    model: Model, frozen: Iterable[nn.Parameter], others: Iterable[Model] = ()
) -> None:
    """Merge the adapter into a model's weights, and unfreeze what was frozen for it."""
    merge_lora(model.module)
    for parameter in frozen:
        parameter.requires_grad_(True)
    for other in dict.fromkeys(others):
        remove_lora(other.module)


def has_adapter(module: nn.Module) -> bool:
    """Return whether a module has layers with a LoRA adapter of peft."""
    return "peft" in sys.modules and bool(_adapted(module))


def adapted_module(module: Any) -> nn.Module:
    """Return the adapted module that a PeftModel wraps, or the module itself."""
    base: nn.Module = module.get_base_model() if hasattr(module, "get_base_model") else module
    return base


def without_adapter(module: nn.Module) -> nn.Module:
    """Return the module as it was before peft adapted it, on the meta device: names and shapes."""
    base = adapted_module(module)
    tensors = [*base.parameters(), *base.buffers()]
    memo: dict[int, Any] = {id(t): t.to("meta") for t in tensors}
    memo |= {id(p): nn.Parameter(memo[id(p)], p.requires_grad) for p in base.parameters()}
    plain: nn.Module = deepcopy(base, memo)
    remove_lora(plain)
    for name, wrapper in list(plain.named_modules()):
        if isinstance(wrapper, import_peft().utils.ModulesToSaveWrapper):
            plain.set_submodule(name, wrapper.original_module)
    return plain


def import_peft() -> Any:
    """Import peft, or raise a UsageError that names the package to install."""
    try:
        import peft
    except ImportError as error:
        raise UsageError(f"adapters need peft: {install('peft')}") from error
    return peft


def _adapted(module: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix(PREFIX): layer
        for name, layer in module.named_modules()
        if isinstance(layer, LoraLayer)
    }


def _targets(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    fitting = [
        name
        for name, layer in module.named_modules()
        if name and type(layer).__name__ in KINDS and getattr(layer, "groups", 1) == 1
    ]
    if not patterns:
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

        kind = getattr(getattr(module, "config", None), "model_type", None)
        if kind not in KNOWN:
            raise UsageError(
                f"peft has no default layers for {'this module' if kind is None else kind}; name "
                f"them with --lora-targets, such as {', '.join(_last_parts(fitting)[:6])}"
            )
        patterns = KNOWN[kind]
    chosen = set()
    for pattern in patterns:
        matched = {n for n in fitting if fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}")}
        if not matched:
            raise UsageError(
                f"--lora-targets {pattern} matches no layer that can have an adapter: expected one "
                f"of {', '.join(_last_parts(fitting)[:12])}"
            )
        chosen |= matched
    uses: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    names = [name for name in fitting if name in chosen]
    for name in names:
        weight = module.get_submodule(name).weight
        if others := [other for other in uses[id(weight)] if other != f"{name}.weight"]:
            raise InputError(
                f"{name} cannot have an adapter: its weight is tied to {others[0]}, which would "
                "change when the adapter is merged; leave it out of --lora-targets"
            )
    return names


def _last_parts(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))
