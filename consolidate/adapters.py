"""Low-rank adapters of peft: put into a model, read from their own checkpoint, merged again."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consolidate.hub import FISHER, locate
from consolidate.layout import Group, Layout
from consolidate.merged_penalty import LowRank
from consolidate.models import Model, freeze_parameters, load_model, quiet, untouched_randomness
from formats.checkpoint import ADAPTER_CONFIG, Checkpoint, open_checkpoint
from formats.errors import InputError, UsageError
from formats.tensors import shape_of

NAME = "default"
"""Of the one adapter in a model, as peft has it."""

KINDS = ("Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d")
"""Layers whose weights an adapter can change by a product."""

PREFIX = "base_model.model."
"""What peft puts before the module's names in an adapter's file."""

# By what an adapter is more than W + s B A, or not of the base model's own W.
_OTHER = {
    "use_dora": "DoRA scales W + s B A by columns",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "use_qalora": "QA-LoRA pools its inputs",
    "arrow_config": "Arrow routes between adapters",
    "alora_invocation_tokens": "aLoRA acts on a part of the text",
    "velora_config": "VeLoRA compresses what goes into A",
    "monteclora_config": "MonteCLoRA samples its weights",
    "kasa_config": "KaSA has singular values of its own and cuts those of W",
    "lora_bias": "lora_bias adds a bias",
    "target_parameters": "target_parameters changes tensors that are no layer's weight",
    "layer_replication": "layer_replication repeats layers of the base model",
    "trainable_token_indices": "trainable_token_indices replaces rows of the embedding",
    "megatron_config": "Megatron's layers are parallel ones",
}
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # others change W at the start


@dataclass(frozen=True)
class Lora:
    """A fresh adapter: the options of `add_lora` of these names."""

    rank: int
    targets: Sequence[str] = ()
    alpha: float | None = None
    rslora: bool = False


def add_lora(
    module: nn.Module,
    *,
    rank: int,
    targets: Sequence[str] = (),
    alpha: float | None = None,
    rslora: bool = False,
    seed: int = 0,
) -> list[str]:
    """Put a fresh LoRA adapter into a module, in place: W + s B A with B = 0 (Hu et al. 2021).

    Everything else is frozen. The module computes what it did, until B is trained.

    Args:
        module: Any module.
        rank: r, the rank of B A.
        targets: Glob patterns of the layers' names, or of their last parts; those that peft has for
            the architecture unless given.
        alpha: α of s = α/r; `rank` unless given, so that s = 1.
        rslora: s = α/√r instead (Kalajdzievski 2023).
        seed: Of A.

    Returns:
        The names of the layers that have an adapter now.

    Raises:
        UsageError: peft is missing, or a pattern matches no layer or none that can have one.
        InputError: A layer's weight is used in another place too.
    """
    peft = _peft()
    names = _targets(module, targets)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        use_rslora=rslora,
        target_modules="|".join(map(re.escape, names)),
        fan_in_fan_out=False,
    )
    with untouched_randomness(seed), quiet():
        peft.inject_adapter_in_model(config, module, adapter_name=NAME)
    return names


def low_rank_layers(module: nn.Module) -> dict[str, LowRank]:
    """Give the layers that an adapter changes.

    Args:
        module: With an adapter in it.

    Returns:
        By the name that their weight has in the module without the adapter.

    Raises:
        InputError: A layer is not W + s B A.
    """
    found = {}
    for name, layer in _adapted(module).items():
        base = layer.get_base_layer()
        kind = type(base).__name__
        if kind not in KINDS or getattr(base, "groups", 1) != 1 or NAME in layer.lora_variant:
            raise InputError(
                f"the adapter's layer {name} ({type(layer).__name__} on {kind}) is not W + s B A, "
                f"as it is on {', '.join(KINDS)} without groups"
            )
        if kind == "Embedding":
            a, b = layer.lora_embedding_A[NAME], layer.lora_embedding_B[NAME]
        else:
            a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        transposed = kind in ("Conv1D", "Embedding")
        found[f"{name}.weight"] = LowRank(base.weight, a, b, layer.scaling[NAME], transposed)
    return found


def other_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Give what trains in a module beside the low-rank factors of its adapter.

    Args:
        module: With an adapter in it.

    Returns:
        By the names in the module without the adapter.
    """
    return {
        name.replace(f".modules_to_save.{NAME}.", "."): parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and not any(p.startswith("lora_") for p in name.split("."))
    }


@torch.no_grad()
def merge_lora(module: nn.Module) -> None:
    """Put W + s B A in place of W and take the adapter out of a module, in place.

    Args:
        module: With an adapter in it, all of whose layers `low_rank_layers` knows.
    """
    for layer in low_rank_layers(module).values():
        a, b = (factor.flatten(1).to(layer.weight.dtype) for factor in (layer.a, layer.b))
        change = (b @ a).T if layer.transposed else b @ a
        layer.weight.add_(change.reshape(layer.weight.shape), alpha=layer.scale)
    remove_lora(module)


def remove_lora(module: nn.Module) -> None:
    """Take the adapter out of a module, in place: W is what it was.

    Args:
        module: With an adapter in it.
    """
    for name, layer in _adapted(module).items():
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(module, "peft_config"):
        del module.peft_config


def adapt(
    model: Model, lora: Lora, whole: Collection[str], others: Iterable[Model] = (), seed: int = 0
) -> list[nn.Parameter]:
    """Put a fresh adapter into a model that is to be trained, and freeze what it changes.

    Args:
        model: A whole model.
        lora: The adapter.
        whole: Names in the weights file of what trains as it is, beside the adapter: what is new.
        others: Models that share the weights' memory; they get the same adapter.
        seed: Of A.

    Returns:
        The parameters that were trainable before and are no longer; for `end_adapting`.

    Raises:
        UsageError: As `add_lora`; or a target is frozen, or is new.
        InputError: As `add_lora`.
    """
    module = model.module
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    new = {at for name in whole for at in model.layout.module_names(name)}
    kept = [parameter for name, parameter in module.named_parameters() if name in new]
    options: dict[str, Any] = {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "rslora": lora.rslora,
        "seed": seed,
    }
    names = add_lora(module, targets=lora.targets, **options)
    held = {id(parameter) for parameter in trainable}
    for name, layer in low_rank_layers(module).items():
        if id(layer.weight) not in held:
            raise UsageError(f"{name} is frozen by --freeze, and a target of the adapter")
        if name in new:
            raise UsageError(f"{name} is new and trains as it is: leave it out of --lora-targets")
    for parameter in kept:
        parameter.requires_grad_(id(parameter) in held)
    own = dict(module.named_parameters())
    for other in _distinct(others):
        add_lora(other.module, targets=names, **options)
        for name, parameter in other.module.named_parameters():
            if _is_adapter(name):
                parameter.data = own[name].data
    return [parameter for parameter in trainable if not parameter.requires_grad]


def end_adapting(
    model: Model, frozen: Iterable[nn.Parameter], others: Iterable[Model] = ()
) -> None:
    """Merge the adapter into a model's weights, and let train again what was frozen for it.

    Args:
        model: As `adapt` left it.
        frozen: What `adapt` returned.
        others: As for `adapt`.
    """
    merge_lora(model.module)
    for parameter in frozen:
        parameter.requires_grad_(True)
    for other in _distinct(others):
        remove_lora(other.module)


def with_base(source: Checkpoint, base_model: str | Path | None) -> Checkpoint:
    """Give an adapter the checkpoint of its base model; other checkpoints stay as they are.

    Args:
        source: What was opened.
        base_model: The base model, a path or a repository on the Hub; what the adapter's config
            names unless given, if that is there.

    Returns:
        The checkpoint, with its base model where it is an adapter.

    Raises:
        InputError: The base model is not there, or is no whole model.
        UsageError: A base model was given for what is no adapter.
    """
    if source.adapter is None:
        if base_model is not None:
            raise UsageError(f"{source.path} is no adapter, so it has no --base-model")
        return source
    check_plain(source.adapter, source.path)
    if base_model is None:
        named = source.adapter.get("base_model_name_or_path")
        if not isinstance(named, str) or not named or not Path(named).exists():
            raise InputError(
                f"{source.path / ADAPTER_CONFIG} names {named!r} as its base model, which is no "
                "folder here: name the base model with --base-model"
            )
        base_model = named
    base = open_checkpoint(locate(base_model, without=FISHER))
    if base.adapter is not None:
        raise InputError(f"{base.path}, the base model of {source.path}, is an adapter itself")
    return replace(source, base=base, config=base.config)


def check_plain(config: Mapping[str, Any], path: Path) -> None:
    """Refuse an adapter that is not W + s B A.

    Args:
        config: Of ``adapter_config.json``.
        path: Where it was read, for the message.

    Raises:
        InputError: It is another one.
    """
    where = path / ADAPTER_CONFIG
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{where}: peft_type is {kind!r}, and only adapters of LORA are supported")
    for option, why in _OTHER.items():
        if config.get(option):
            raise InputError(f"{where}: {option} is set, so it is not plain LoRA ({why})")
    if config.get("bias", "none") != "none":
        raise InputError(f"{where}: bias is {config['bias']!r}, and only 'none' is supported")
    if (start := config.get("init_lora_weights")) not in _PLAIN_STARTS:
        raise InputError(
            f"{where}: init_lora_weights is {start!r}, which changes the base model's weights too; "
            "convert the adapter to plain LoRA with peft first"
        )


def load(checkpoint: Checkpoint, **options: Any) -> Model:
    """Load a whole model, or a base model with its adapter in it.

    Args:
        checkpoint: A whole model, or an adapter that has its base (`with_base`).
        options: As of `load_model`.

    Returns:
        The model. Of an adapter its layout is that of the adapter's file: what is measured, trained
        and stored are the adapter's parameters, and the base model is frozen.

    Raises:
        InputError: As `load_model`; or the adapter does not fit its base model.
        UsageError: As `load_model`; or peft is missing.
    """
    if checkpoint.base is None:
        return load_model(checkpoint, **options)
    freeze = options.pop("freeze", ())
    if options.get("new_labels") is not None:
        raise UsageError(f"{checkpoint.path} is an adapter: a new output layer needs a whole model")
    model = load_model(checkpoint.base, **options)
    _attach(model, checkpoint, options.get("dtype"))
    freeze_parameters(model, freeze)
    return model


def adapter_layout(module: nn.Module, file_shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """Lay out the adapter's part of a module as peft names it in a file.

    Args:
        module: With an adapter in it, by `add_lora` or by peft.
        file_shapes: Of the adapter's file, by name.

    Returns:
        The layout; the base model's parameters are no part of it.

    Raises:
        InputError: Names or shapes are not those of the file.
    """
    own = {_file_name(name): name for name, _ in module.named_parameters() if _is_adapter(name)}
    unused = [name for name in file_shapes if name not in own]
    missing = [name for name in own if name not in file_shapes]
    for which, names in (("not in the model", unused), ("missing in the file", missing)):
        if names:
            raise InputError(
                f"the adapter does not fit its base model: {names[0]} is {which}, one of "
                f"{len(names)}"
            )
    groups = [Group((name,), (own[name],), None) for name in file_shapes]
    outside = [name for name, _ in module.named_parameters() if name not in own.values()]
    return Layout(module, groups, file_shapes, (), outside=outside)


def without_fisher(model: Model, diagonal: Mapping[str, Tensor]) -> list[str]:
    """Tell of factors whose Fisher is zero because the other factor is.

    At B = 0, where every adapter begins, the outputs do not depend on A.

    Args:
        model: With an adapter in it.
        diagonal: The Fisher by the module's names.

    Returns:
        A note, if there is something to tell.
    """
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
        f"warning: {len(lost)} of the adapter's factors have no Fisher, since what they are "
        f"multiplied by is zero, as before any training: {', '.join(lost[:3])}. The penalty "
        "will not hold them; train the adapter on the task first"
    )
    return [note]


def _distinct(models: Iterable[Model]) -> list[Model]:
    return list({id(model): model for model in models}.values())


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UsageError("adapters need peft: pip install 'consolidate-ewc[peft]'") from error
    return peft


def _adapted(module: nn.Module) -> dict[str, Any]:
    """Give peft's layers by name."""
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
                f"peft names no layers for {'this module' if kind is None else kind}: name them "
                f"with --lora-targets, such as {', '.join(_last_parts(fitting)[:6])}"
            )
        patterns = KNOWN[kind]
    chosen = set()
    for pattern in patterns:
        matched = {n for n in fitting if fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}")}
        if not matched:
            raise UsageError(
                f"--lora-targets {pattern} matches no layer that can have an adapter; there are "
                f"{', '.join(_last_parts(fitting)[:12])}"
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
                f"{name} cannot have an adapter: its weight is {others[0]} too, and would change "
                "there when the adapter is merged; leave it out of --lora-targets"
            )
    return names


def _last_parts(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _attach(model: Model, checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    """Put an adapter that was read into its base model."""
    peft = _peft()
    assert checkpoint.adapter is not None
    assert checkpoint.base is not None
    known = {field.name for field in fields(peft.LoraConfig)}
    where = checkpoint.path / ADAPTER_CONFIG
    given = checkpoint.adapter
    if strange := [name for name, value in given.items() if name not in known and value]:
        raise InputError(
            f"{where}: this peft ({peft.__version__}) does not know {strange[0]!r}: a newer one may"
        )
    module = model.module
    shapes = {name: shape_of(checkpoint.weights, name) for name in checkpoint.weights}
    _check_ranks(given, shapes, where)
    try:
        config = peft.LoraConfig(
            **{name: value for name, value in given.items() if name in known}
            | {"init_lora_weights": True, "inference_mode": False}
        )
        with untouched_randomness(0), quiet():
            peft.inject_adapter_in_model(config, module, adapter_name=NAME)
    except Exception as error:
        raise InputError(
            f"{where} does not fit the base model {checkpoint.base.path}: {error}"
        ) from error
    try:
        layout = adapter_layout(module, shapes)
    except InputError as error:
        raise InputError(f"{checkpoint.path}: {error}") from error
    low_rank_layers(module)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, tensor in layout.to_module(checkpoint.weights).items():
            parameters[name].data = tensor.clone().to(parameters[name].device, dtype)
    module.eval()
    model.base_layout = model.layout
    model.checkpoint, model.layout = checkpoint, layout


def _check_ranks(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: Path
) -> None:
    """Refuse ranks that the file's factors do not have, before layers of them are made."""
    found = [
        shape[0]
        for name, shape in shapes.items()
        if shape and re.search(r"\.lora_(embedding_)?A(\.|$)", name)
    ]
    of_layers = config.get("rank_pattern")
    several = list(of_layers.values()) if isinstance(of_layers, dict) else []
    for rank in [config.get("r"), *several]:
        if not isinstance(rank, int) or not 1 <= rank <= max(found, default=0):
            raise InputError(
                f"{where}: the rank is {rank!r}, and the factors in the file have "
                f"{max(found, default='none')}"
            )


def _is_adapter(name: str) -> bool:
    parts = name.split(".")
    return "modules_to_save" in parts or any(part.startswith("lora_") for part in parts)


def _file_name(name: str) -> str:
    """Name a parameter of the adapter as peft does in a file."""
    name = name.replace(f".modules_to_save.{NAME}.", ".")
    name = re.sub(rf"(\.lora_\w+)\.{NAME}(?=\.|$)", r"\1", name)
    return name if name.startswith(PREFIX) else PREFIX + name
