"""Models: a checkpoint's module with its weights, and what is needed to run and save it."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consolidate.estimation.gradient_checkpointing import enable
from consolidate.models.architectures import (
    architectures,
    declared_class,
    labels_of_config,
    new_head,
)
from consolidate.models.factories import make_module
from consolidate.models.layout import Layout
from consolidate.models.model import Model, freeze_parameters, layout_of
from consolidate.models.objectives import Objective, default_objective, get_objective
from consolidate.models.tensor_names import computed_names, outer_prefix
from consolidate.runtime.quiet import quiet, silent_stdout
from consolidate.runtime.randomness import untouched_randomness
from formats.checkpoint import Checkpoint
from formats.errors import ConsolidateError, InputError, UsageError
from formats.tensors import apart, dtype_of
from formats.wording import few, first_line

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)


def load_model(
    checkpoint: Checkpoint,
    *,
    objective: str | None = None,  # by the architecture unless given
    factory: str | None = None,  # package.module:function; else transformers creates the module
    dtype: torch.dtype | None = None,  # of floating-point weights; as stored unless given
    device: str | torch.device = "cpu",
    freeze: Sequence[str] = (),  # glob patterns of parameters, by module or file name
    new_labels: Sequence[str] | None = None,  # of a head that the checkpoint lacks
    gradient_checkpointing: bool = False,
    seed: int = 0,  # of the new head's weights
    adapter: Checkpoint | None = None,  # whose own tokenizer is taken, if it has one
) -> Model:
    """Load a checkpoint into its module, in eval mode; every weight is bit-identical to the file.

    Only a new head is random, nothing is fetched, and no code of a checkpoint runs.
    """
    own = factory is not None
    if objective is None:
        chosen = default_objective(checkpoint.config, own)
    else:
        chosen = get_objective(objective, factory=own)
    if factory is not None:
        model = _from_factory(checkpoint, chosen, factory, dtype, seed, new_labels is not None)
    else:
        model = _from_transformers(checkpoint, chosen, dtype, new_labels, seed, adapter)
    model.module.to(device)
    model.module.eval()
    if gradient_checkpointing:
        enable(model.module)
    freeze_parameters(model, freeze)
    return model


def _from_factory(
    checkpoint: Checkpoint,
    objective: Objective,
    factory: str,
    dtype: torch.dtype | None,
    seed: int,
    head_is_new: bool,
) -> Model:
    with untouched_randomness(seed):
        module = make_module(factory, checkpoint.config)
    weights = checkpoint.weights
    where = checkpoint.path
    layout = layout_of(module, checkpoint, own=True)
    state = module.state_dict()
    if unused := list(layout.unused):
        raise InputError(
            f"{where}: expected the names of the state_dict() of {factory}: {_some(unused)} in the "
            f"file but not in the module{_near(unused[0], state)}{_prefix_hint(weights, state)}"
        )
    loaded = {name for group in layout.groups for name in group.module_names}
    missing = [
        name
        for name in state
        if layout.canonical(name) not in loaded and not name.endswith("num_batches_tracked")
    ]
    if missing and not head_is_new:
        raise InputError(
            f"{where}: expected the names of the state_dict() of {factory}: {_some(missing)} in "
            f"the module but not in the file{_near(missing[0], weights)}"
        )
    _check_duplicates(layout, weights, where)
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for name, tensor in layout.to_module(apart(weights)).items():
            # Memory of the stored dtype; tied parameters stay tied, as they are one object.
            own[name].data = tensor
    if dtype is not None:
        module.to(dtype)
    labels = None if objective.name == "regression" else labels_of_config(checkpoint.config)
    return Model(module, checkpoint, objective, labels, None, layout)


def _prefix_hint(names: Iterable[str], state: Mapping[str, Any]) -> str:
    """Explain names as Lightning writes them: with the network's attribute as a prefix."""
    prefix = next(iter(names)).partition(".")[0]
    if not all(name.removeprefix(f"{prefix}.") in state for name in names):
        return ""
    return (
        f"; all names begin with {prefix!r}: use a factory that returns a module with the network "
        f"as its attribute {prefix}"
    )


class _Lazy:
    """A tensor of the file that is read when transformers slices it."""

    def __init__(self, weights: Mapping[str, Tensor], name: str) -> None:
        self._weights = weights
        self._name = name

    def __getitem__(self, index: Any) -> Tensor:
        return self._weights[self._name][index]


def _from_transformers(
    checkpoint: Checkpoint,
    objective: Objective,
    dtype: torch.dtype | None,
    new_labels: Sequence[str] | None,
    seed: int,
    adapter: Checkpoint | None,
) -> Model:
    weights = checkpoint.weights
    where = checkpoint.path
    with untouched_randomness(seed), quiet():
        config, classes = architectures(checkpoint, objective)
        names = [cls.__name__ for cls in classes]
        declared = declared_class(config)
        cls = classes[names.index(declared)] if declared in names else classes[0]
        changes: dict[str, Any] = {}
        if new_labels is not None:
            changes = new_head(config, cls, objective, list(new_labels), declared in names, where)
        elif objective.name == "multi-label":
            changes["problem_type"] = config.problem_type = "multi_label_classification"
        wanted, notes = _dtype_to_run(weights, dtype)
        if outer := outer_prefix(weights, cls.base_model_prefix):
            notes.append(
                f"all names of the file begin with {outer}, and transformers itself reads them "
                "only without it"
            )
        own = checkpoint.config.get("auto_map")
        if isinstance(own, Mapping) and f"AutoModelFor{objective.auto_class}" in own:
            notes.append(
                "the model's own code (auto_map in config.json) is not run: transformers' "
                f"{cls.__name__} computes instead, which may differ"
            )
        module, info = _pretrained(cls, config, checkpoint, outer, wanted)
        _check_shapes(info, config, checkpoint)
        layout = layout_of(module, checkpoint)
        for name, parameter in module.named_parameters():
            if not layout.file_names(name) and name in computed_names(module):
                parameter.requires_grad_(False)  # no file has it, so training must not change it
        _check_missing(module, info, objective, declared, new_labels is not None, where)
        if dropped := _check_unexpected(module, info, layout, where):
            notes.append(
                f"{_some(dropped)} in the file but not used by {cls.__name__}; kept unchanged"
            )
        _check_duplicates(layout, weights, where)
        _check_values(module, layout, weights, where)
        if new_labels is not None and layout.fresh:
            notes.append(f"new head, seed {seed}: {', '.join(layout.fresh)}")
        # An adapter has no config.json, by which transformers chooses among tokenizers.
        processor = None if adapter is None else _processor(adapter, objective, config)
        if processor is None:
            processor = _processor(checkpoint, objective)
    if getattr(getattr(processor, "_tokenizer", None), "fix_mistral_regex", None) is False:
        notes.append(
            "transformers says that this tokenizer splits texts otherwise than the model was "
            "trained on: load it with fix_mistral_regex=True and save it again"
        )
    _settle_config(module, objective, processor)
    labels = labels_of_config(checkpoint.config | changes) if objective.has_labels else None
    return Model(module, checkpoint, objective, labels, processor, layout, notes, changes)


def _dtype_to_run(
    weights: Mapping[str, Tensor], asked: torch.dtype | None
) -> tuple[torch.dtype, list[str]]:
    """Give the dtype asked for, else the narrowest that represents all, and what to note."""
    if asked is not None:
        return asked, []
    dtypes = dict.fromkeys(dtype_of(weights, name) for name in weights)
    stored = [one for one in dtypes if one.is_floating_point]
    wanted = reduce(torch.promote_types, stored or [torch.float32])
    if len(stored) < 2:
        return wanted, []
    *mixed, one = [str(each).removeprefix("torch.") for each in (*stored, wanted)]
    return wanted, [
        f"the file mixes {', '.join(mixed)}; the model runs in {one}, which represents all"
    ]


def _pretrained(
    cls: Any, config: Any, checkpoint: Checkpoint, outer: str, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """Let transformers make the module and read the weights; give what it says about them too."""
    own = apart(checkpoint.weights)  # training writes into it, and the checkpoint stays unchanged
    try:
        return cls.from_pretrained(
            None,
            config=config,
            state_dict={name.removeprefix(outer): _Lazy(own, name) for name in checkpoint.weights},
            dtype=dtype,
            ignore_mismatched_sizes=True,  # `_check_shapes` reports them, by the file's names
            output_loading_info=True,
        )
    except ConsolidateError:
        raise
    except Exception as error:
        raise InputError(
            f"{checkpoint.path}: transformers cannot load it as {cls.__name__}: {first_line(error)}"
        ) from error


def _settle_config(module: Any, objective: Objective, processor: Any) -> None:
    """Set what training needs in the module's configuration."""
    config = module.config
    if hasattr(config, "use_cache"):
        config.use_cache = False  # the cache for generation would only cost memory
    if objective.modality == "text":
        # Classifiers on decoders need it to find the last token of each row of a batch; a token
        # without an embedding, such as -1, cannot pad.
        known = range(len(module.get_input_embeddings().weight))
        places = (config, "pad_token_id"), (processor, "pad_token_id"), (processor, "eos_token_id")
        tokens = (getattr(*place, None) for place in places)
        config.pad_token_id = next((token for token in tokens if token in known), None)


def _check_shapes(info: Mapping[str, Any], config: Any, checkpoint: Checkpoint) -> None:
    where = checkpoint.path
    if not (mismatched := sorted(info["mismatched_keys"])):
        return
    name, found, expected = mismatched[0]
    unknown = not checkpoint.config.keys() & {"num_labels", "id2label"}
    if unknown and tuple(expected) == (config.num_labels, *found[1:]):
        raise InputError(
            f"{where}: config.json has neither num_labels nor id2label, so transformers "
            f"expects {expected[0]} outputs, and {name} has {found[0]} rows: add "
            f'"num_labels": {found[0]} to config.json'
        )
    raise InputError(
        f"{where}: the shapes of {len(mismatched)} tensors do not match config.json, such "
        f"as {name}: expected {list(expected)}, found {list(found)} in the file; use the "
        "config.json that belongs to the weights"
    )


def _check_missing(
    module: Any,
    info: Mapping[str, Any],
    objective: Objective,
    declared: str,
    head_is_new: bool,
    where: Path,
) -> None:
    missing = sorted(info["missing_keys"])
    in_body = f"{module.base_model_prefix}."
    head = [n for n in missing if not n.startswith(in_body) or ".pooler." in f".{n}"]
    if head_is_new:
        missing = [name for name in missing if name not in head]
    if not missing:
        return
    name = type(module).__name__
    if len(head) == len(missing) and declared != name:
        outside = [n for n, _ in module.named_parameters() if not n.startswith(in_body)]
        if outside and outside[-1] not in info["missing_keys"]:  # the output layer
            raise InputError(
                f"{where}: {_some(missing)} missing, which a {name} has; other tensors have the "
                f"names of its head: start from the model that this {declared or 'one'} was "
                "trained from"
            )
        raise InputError(
            f"{where}: {objective.name} needs the head of a {name}, found a "
            f"{declared or 'model'} without it: {_some(missing)} missing; `consolidate finetune` "
            "trains one (with --penalty none where there is no Fisher)"
        )
    raise InputError(
        f"{where}: {_some(missing)} missing in the file, but part of a {name}; save the checkpoint "
        "again"
    )


def _check_unexpected(
    module: Any, info: Mapping[str, Any], layout: Layout, where: Path
) -> list[str]:
    """Refuse unexpected tensors of the model's body; return those of other heads."""
    body = {name for name, _ in module.base_model.named_children()}
    prefix = f"{module.base_model_prefix}."
    sought = layout.unused
    unexpected = [name for name in sought if sought[name] in info["unexpected_keys"]]
    if inside := [
        name
        for name in unexpected
        if module.base_model is module
        or sought[name].startswith(prefix)
        or sought[name].split(".")[0] in body
        # A body's pooler feeds other heads; a model without it has no place for it.
        if "pooler" not in sought[name].split(".")
    ]:
        raise InputError(
            f"{where}: {_some(inside)} in the file but not in {type(module).__name__} as "
            "config.json describes it; use the config.json that belongs to the weights"
        )
    return unexpected


def _check_duplicates(layout: Layout, weights: Mapping[str, Tensor], where: Path) -> None:
    for second, first in layout.duplicates.items():
        if not _same_bits(weights[second], weights[first]):
            raise InputError(
                f"{where}: {first} and {second} are one tensor in the model: expected equal values "
                "in the file, found different ones; save the checkpoint again"
            )


def _check_values(
    module: nn.Module, layout: Layout, weights: Mapping[str, Tensor], where: Path
) -> None:
    """Check the values that transformers loaded against the layout's own reading of the file."""
    state = module.state_dict()
    for group in layout.groups:
        parts = layout.to_module({name: weights[name] for name in group.file_names})
        for name, expected in parts.items():
            if not _same_bits(state[name], expected.to(state[name].dtype)):
                raise InputError(
                    f"{where}: transformers changed the values of {name} while loading: expected "
                    f"those of {group.file_names[0]} in the file; try another release of "
                    "transformers"
                )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # Compared as integers, since NaN differs from itself.
    same_width = _INTEGERS[a.element_size()]
    return torch.equal(*(each.contiguous().view(-1).view(same_width) for each in (a, b)))


def _processor(checkpoint: Checkpoint, objective: Objective, config: Any = None) -> Any:
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if objective.modality == "image":
        files: tuple[str, ...] = ("preprocessor_config.json", "processor_config.json")
        kind = "AutoImageProcessor"
        options["backend"] = "pil"  # the same pixels with and without torchvision
    else:
        files, kind = _TOKENIZER_FILES, "AutoTokenizer"
        options["mistral_format"] = False  # the same tokens with and without mistral-common
        if config is not None:
            options["config"] = config
    if not any((folder / name).is_file() for name in files):
        return None
    import transformers

    try:
        with silent_stdout():  # where tokenizers prints names of options that it does not know
            return getattr(transformers, kind).from_pretrained(str(folder), **options)
    except Exception as error:
        pieces = [name for name in ("sentencepiece", "google.protobuf") if not _is_installed(name)]
        whole = (folder / "tokenizer.json").is_file()
        if pieces and kind == "AutoTokenizer" and not whole and any(folder.glob("*.model")):
            raise UsageError(
                f"{folder}: the tokenizer is one of SentencePiece: pip install sentencepiece "
                "protobuf"
            ) from error
        what = "tokenizer" if kind == "AutoTokenizer" else "image processor"
        raise InputError(f"{folder}: the {what} cannot be loaded: {first_line(error)}") from error


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of what it is in
        return False


def _some(names: Sequence[str]) -> str:
    return f"{few(names, 4)} {'are' if len(names) > 1 else 'is'}"


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (which has {near[0]})" if near else ""
