"""Which tensor of a module each of a weights file is, by its name: of peft, of transformers."""

import re
from collections.abc import Collection, Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from consolidate.models.layout import Group, Layout, Shapes
from formats.errors import InputError

NAME = "default"  # of the one adapter in a model, as peft has it
PREFIX = "base_model.model."  # what peft puts before the module's names


def is_adapter(name: str) -> bool:
    """Return whether a parameter of a module belongs to its adapter."""
    parts = name.split(".")
    return "modules_to_save" in parts or any(part.startswith("lora_") for part in parts)


def adapter_layout(module: nn.Module, file_shapes: Shapes) -> Layout:
    """Map the adapter in a module, without the base model, to the names that peft writes."""
    own = {_file_name(name): name for name, _ in module.named_parameters() if is_adapter(name)}
    copied = copies_of_base(module, file_shapes)
    unused = [name for name in file_shapes if name not in own and name not in copied]
    missing = [name for name in own if name not in file_shapes]
    for which, names in (("not in the model", unused), ("missing in the file", missing)):
        if names:
            raise InputError(
                f"the adapter does not match its base model: {names[0]} is {which}, one of "
                f"{len(names)}; use the base model that it was trained on"
            )
    groups = [Group((name,), (own[name],), None) for name in file_shapes if name in own]
    outside = [name for name, _ in module.named_parameters() if name not in own.values()]
    return Layout(module, groups, file_shapes, {name: name for name in copied}, outside=outside)


def copies_of_base(module: nn.Module, file_names: Iterable[str]) -> dict[str, str]:
    """Map tensors of an adapter's file that are the base model's to their names in the module.

    peft writes those of embeddings and output layers that it adapts.
    """
    own = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    names = {name: name.removeprefix(PREFIX) for name in file_names if ".base_layer." in name}
    return {name: at for name, at in names.items() if at in own}


def _file_name(name: str) -> str:
    """Return the name that peft gives a parameter of the adapter in a file."""
    name = name.replace(f".modules_to_save.{NAME}.", ".")
    name = re.sub(rf"(\.lora_\w+)\.{NAME}(?=\.|$)", r"\1", name)
    return name if name.startswith(PREFIX) else PREFIX + name


def same_names_layout(module: nn.Module, file_shapes: Shapes) -> Layout:
    """Map a module to a file with the names of its state dict."""
    state = module.state_dict()
    groups = [Group((name,), (name,), None) for name in file_shapes if name in state]
    unused = {name: name for name in file_shapes if name not in state}
    return Layout(module, groups, file_shapes, unused)


def transformers_layout(module: Any, file_shapes: Shapes) -> Layout:
    """Map a transformers model to its file, as transformers loads it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    mapping = get_model_conversion_mapping(module)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state = module.state_dict()
    outer = outer_prefix(file_shapes, module.base_model_prefix)
    names = [name.removeprefix(outer) for name in file_shapes]
    groups: dict[str, Group] = {}
    joint: dict[str, tuple[WeightConverter, list[tuple[str, str]]]] = {}
    unused: dict[str, str] = {}
    for own, (renamed, pattern) in _looked_up(module, names, mapping).items():
        name = outer + own
        if renamed not in state:
            unused[name] = renamed
        elif pattern is None:
            groups[name] = Group((name,), (renamed,), None)
        else:
            joint.setdefault(renamed, (by_pattern[pattern], []))[1].append((name, pattern))
    for renamed, (converter, sources) in joint.items():
        group = _converted_group(module, renamed, converter, sources, file_shapes)
        groups[group.file_names[0]] = group
    ordered = [groups[name] for name in file_shapes if name in groups]
    unused = {name: unused[name] for name in file_shapes if name in unused}
    return Layout(module, ordered, file_shapes, unused, computed_names(module), outer)


def computed_names(module: Any) -> set[str]:
    """Name the parameters that transformers computes and stores in no file, as sinusoids."""
    return set(getattr(module, "_keys_to_ignore_on_save", None) or ())


def outer_prefix(names: Collection[str], base_model_prefix: str) -> str:
    """Give what a wrapper puts before all names, as DistributedDataParallel and compile do."""
    outer = ""
    while True:
        inner = [name.removeprefix(outer) for name in names]
        first = inner[0].partition(".")[0] + "."
        # Many models of transformers have an attribute `model` of their own.
        known = first in ("module.", "_orig_mod.") or (
            first == "model." and any(n.startswith(f"model.{base_model_prefix}.") for n in inner)
        )
        if not known or not all(name.startswith(first) for name in inner):
            return outer
        outer += first


def full_names(module: Any, names: Collection[str]) -> dict[str, str]:
    """Give the names that transformers writes for tensors of a file without a head.

    A base model alone is stored without the prefix that its names have in a model with a head.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    prefix, state = module.base_model_prefix, module.state_dict()
    outer = outer_prefix(names, prefix)
    inner = [name.removeprefix(outer) for name in names]
    full = {f"{prefix}.{name}": name for name in inner}
    if module.base_model is module or full.keys() & set(inner):
        full = {}
    mappings = (get_model_conversion_mapping(module) for _ in range(3))  # they have a state
    found = _looked_up(module, inner, next(mappings))
    again = _looked_up(module, full, next(mappings))
    plain = _looked_up(module, inner, next(mappings), add_prefix=False)
    changed = {outer + name: name for name in inner if outer}
    for longer, name in full.items():
        at = found[name][0]
        if at not in state:  # not used, as a pooler that is None here
            bare = hasattr(module.base_model, name.split(".")[0])
        else:
            bare = found[name] == again[longer] and at == f"{prefix}.{plain[name][0]}"
        if bare:
            changed[outer + name] = longer
    return changed


def _looked_up(
    module: Any, names: Collection[str], mapping: Sequence[Any], *, add_prefix: bool = True
) -> dict[str, tuple[str, str | None]]:
    """Give, for each name of a file, the module's and the pattern of its conversion, if any."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = module.state_dict()
    base = (module.base_model_prefix, state) if add_prefix else (None, None)
    found = {}
    # Some renamings depend on earlier ones, so the order must be that of transformers.
    for name in sorted(names, key=dot_natural_key):
        found[name] = rename_source_key(name, renamings, converters, *base)
        if found[name][0] not in state and name in state:
            found[name] = rename_source_key(name, [], [], *base)
    return found


def _converted_group(
    module: Any,
    renamed: str,
    converter: Any,
    sources: Sequence[tuple[str, str]],
    file_shapes: Shapes,
) -> Group:
    def run(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        one_use = deepcopy(converter)
        for (name, pattern), tensor in zip(sources, tensors, strict=True):
            one_use.add_tensor(renamed, name, pattern, tensor)
        made = one_use.convert(renamed, model=module, config=module.config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }

    names = tuple(name for name, _ in sources)
    state = module.state_dict()
    try:
        made = run([torch.empty(file_shapes[name], device="meta") for name in names])
    except Exception as error:
        raise InputError(
            f"{names[0]} and {len(names) - 1} related tensors cannot be converted to {renamed}: "
            f"{error}"
        ) from error
    module_names = tuple(name for name in made if name in state)
    if not module_names:
        raise InputError(f"{names[0]} converts to {', '.join(made)}, which the model lacks")

    def convert(tensors: Sequence[Tensor]) -> list[Tensor]:
        made = run(tensors)
        return [made[name] for name in module_names]

    return Group(names, module_names, convert)
