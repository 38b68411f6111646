"""Models: a checkpoint's module with its weights in it, and what is needed to run and save it."""

import difflib
import importlib
import inspect
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from consolidate.file_weights import FileWeights
from consolidate.gradient_checkpointing import enable
from consolidate.layout import Layout, same_names_layout, transformers_layout
from consolidate.objectives import Objective, check_declared, default_objective, get_objective
from formats.checkpoint import Checkpoint
from formats.errors import ConsolidateError, InputError, UsageError
from formats.tensors import apart, dtype_of, shape_of

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)


@dataclass
class Model:
    """A module that holds a checkpoint's weights."""

    module: nn.Module
    checkpoint: Checkpoint
    objective: Objective
    labels: list[str] | None  # in the order of their ids; None where they have no names
    processor: Any  # tokenizer or image processor of transformers; None where there is none
    layout: Layout
    notes: list[str] = field(default_factory=list)  # what a user should be told about the loading
    config_changes: dict[str, Any] = field(default_factory=dict)  # see `config_of`
    base_layout: Layout | None = None  # of an adapter: that of its base model

    @property
    def outputs(self) -> int | None:
        """How many classes or values are predicted, where the config says so."""
        if self.objective.language:
            return None
        if self.labels is not None:
            return len(self.labels)
        config = getattr(self.module, "config", None)
        return getattr(config, "num_labels", None)


def load_model(
    checkpoint: Checkpoint,
    *,
    objective: str | None = None,
    factory: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    freeze: Sequence[str] = (),
    new_labels: Sequence[str] | None = None,
    gradient_checkpointing: bool = False,
    seed: int = 0,
) -> Model:
    """Load a checkpoint into the module that it was made for.

    Every weight is the file's, bit for bit; nothing is skipped, nothing is random but the new
    output layer that `new_labels` asks for. No code that a checkpoint names is run, nothing is
    fetched, and the global random number generators come back as they were.

    Args:
        checkpoint: Weights and configuration.
        objective: A name of `OBJECTIVES`; by the architecture unless given.
        factory: ``package.module:function`` that makes the module, looked for in the working
            folder and on ``sys.path``. It is called with the config's contents (a dict), or with
            nothing if it takes no argument. None: transformers makes it, by ``config.json``.
        dtype: Of the floating-point weights. None: as stored; where the file mixes types, models
            of transformers take the narrowest type that holds them all exactly, a module of the
            user's own takes each as it is.
        device: Where the module is put.
        freeze: Glob patterns of parameters that shall not train, by module or file name.
        new_labels: Names of the labels of an output layer that the checkpoint lacks; it is made
            afresh. For regression the names of the outputs (empty: one output without a name). A
            factory has to find them in the config, as `relabelled` writes them.
        gradient_checkpointing: Whether its layers keep only their inputs for the backward pass.
        seed: Of the new output layer's weights.

    Returns:
        The model, in eval mode.

    Raises:
        InputError: Weights and architecture do not fit each other: missing, unexpected or resized
            tensors, an unknown architecture, a conversion that is not a rearrangement.
        UsageError: The factory cannot be called, an objective that does not fit, a pattern that
            matches nothing, a model without gradient checkpointing of its own, or transformers is
            not installed.
    """
    config = checkpoint.config
    chosen = (
        default_objective(config, factory is not None)
        if objective is None
        else get_objective(objective, factory=factory is not None)
    )
    if factory is not None:
        model = _from_factory(checkpoint, chosen, factory, dtype, seed, new_labels is not None)
    else:
        model = _from_transformers(checkpoint, chosen, dtype, new_labels, seed)
    model.module.to(device)
    model.module.eval()
    if gradient_checkpointing:
        enable(model.module)
    freeze_parameters(model, freeze)
    return model


def file_weights(model: Model) -> FileWeights:
    """Give the module's present values as the weights file's tensors.

    Args:
        model: As `load_model` made it, trained or not.

    Returns:
        By file name, in the file's order and dtypes, then fresh parameters; tied weights once,
        tensors the module has no use for as they are in the file. Each is made when asked for,
        of the values at that time; where no dtype changes it is the module's own memory.

    Raises:
        InputError: A tensor is asked for that has another shape than it was loaded with.
    """
    return FileWeights(model.module, model.layout, model.checkpoint.weights)


def config_of(model: Model) -> dict[str, Any]:
    """Give the contents of the ``config.json`` that belongs beside `file_weights`.

    Args:
        model: As `load_model` made it.

    Returns:
        The checkpoint's config, with architecture and labels of a new output layer filled in.
    """
    return deepcopy(model.checkpoint.config) | deepcopy(model.config_changes)


def relabelled(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Give a config the labels of another output layer.

    Args:
        config: The contents of a ``config.json``.
        names: Of the labels; empty for one output without a name.

    Returns:
        The config with ``id2label`` and ``label2id``, and with ``num_labels`` where it has that.
    """
    names = names or ["LABEL_0"]
    changed = dict(config) | {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    return changed | ({"num_labels": len(names)} if "num_labels" in config else {})


def lacks_head(checkpoint: Checkpoint, objective: str) -> bool:
    """Say whether a transformers checkpoint has no output layer for an objective with labels.

    Args:
        checkpoint: Of transformers.
        objective: A name of `OBJECTIVES`.

    Returns:
        True where `load_model` would need `new_labels`: by the architecture's name in the config.

    Raises:
        InputError: The architecture is unknown, or there is none for the objective.
        UsageError: No such objective, or transformers is not installed.
    """
    chosen = get_objective(objective)
    if chosen.language:
        return False
    with quiet():
        config, classes = _architectures(checkpoint, chosen)
    return _declared(config) not in [cls.__name__ for cls in classes]


def unprotected(model: Model, protected: Iterable[str], frozen: str = "frozen") -> dict[str, str]:
    """Say of each tensor of the weights file that has no Fisher why it has none.

    Args:
        model: As `load_model` made it.
        protected: File names that have a Fisher.
        frozen: The words for a parameter that does not train.

    Returns:
        From file name to reason, in the order of `file_weights`.
    """
    have = frozenset(protected)
    parameters = dict(model.module.named_parameters())
    reasons = {}
    for name in [*model.checkpoint.weights, *model.layout.fresh]:
        if name in have or name in model.layout.duplicates:
            continue
        names = model.layout.module_names(name)
        if not names:
            reasons[name] = "not used by the model"
        elif not any(module_name in parameters for module_name in names):
            reasons[name] = "a buffer, not a parameter"
        elif not any(parameters[n].requires_grad for n in names if n in parameters):
            reasons[name] = frozen
        else:
            reasons[name] = "not measured"
    return reasons


# --- a user's own module -----------------------------------------------------------------------


def fresh_weights(factory: str, config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Make a module of the user's own afresh and give its weights, as they are to be stored.

    Args:
        factory: As for `load_model`.
        config: What the factory is called with.
        seed: Of the weights.

    Returns:
        By the names of the state dict, tied ones once.

    Raises:
        UsageError: The factory cannot be called.
    """
    with untouched_randomness(seed):
        module = _call_factory(factory, config)
    own = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    return {name: tensor for name, tensor in module.state_dict().items() if name in own}


def _from_factory(
    checkpoint: Checkpoint,
    objective: Objective,
    factory: str,
    dtype: torch.dtype | None,
    seed: int,
    head_is_new: bool,
) -> Model:
    with untouched_randomness(seed):
        module = _call_factory(factory, checkpoint.config)
    weights = checkpoint.weights
    where = checkpoint.path
    shapes = {name: shape_of(weights, name) for name in weights}
    if not shapes:
        raise InputError(f"{where} holds no tensors")
    try:
        layout = same_names_layout(module, shapes)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    state = module.state_dict()
    if layout.unused:
        raise InputError(
            f"{where}: {_some(layout.unused)} in the file but not in the module of {factory}"
            f"{_near(layout.unused[0], state)}; the names must be those of its state_dict()"
            f"{_prefix_hint(shapes, state)}"
        )
    loaded = {name for group in layout.groups for name in group.module_names}
    missing = [
        name
        for name in state
        if layout.canonical(name) not in loaded and not name.endswith("num_batches_tracked")
    ]
    if missing and not head_is_new:
        raise InputError(
            f"{where}: {_some(missing)} in the module of {factory} but not in the file"
            f"{_near(missing[0], shapes)}; the names must be those of its state_dict()"
        )
    _check_duplicates(layout, weights, where)
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for name, tensor in layout.to_module(apart(weights)).items():
            # A memory of the stored type: what is tied stays tied, as it is one object.
            own[name].data = tensor
    if dtype is not None:
        module.to(dtype)
    labels = None if objective.name == "regression" else _label_names(checkpoint.config)
    return Model(module, checkpoint, objective, labels, None, layout)


def _prefix_hint(names: Iterable[str], state: Mapping[str, Any]) -> str:
    """Say what fits names such as Lightning writes them: the attribute that holds the network."""
    prefix = next(iter(names)).partition(".")[0]
    if not all(name.removeprefix(f"{prefix}.") in state for name in names):
        return ""
    return (
        f". All begin with {prefix!r}: a factory fits that returns a module with the network as "
        f"its attribute {prefix}"
    )


def _call_factory(factory: str, config: dict[str, Any]) -> nn.Module:
    module_name, colon, attribute = factory.partition(":")
    if not (module_name and colon and attribute):
        raise UsageError(f"--model {factory}: write package.module:factory")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        try:
            target: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise UsageError(
                f"--model {factory}: no module named {error.name} in {here} or on sys.path"
            ) from error
        except Exception as error:
            raise UsageError(
                f"--model {factory}: importing {module_name} failed: {error}"
            ) from error
        for part in attribute.split("."):
            if not hasattr(target, part):
                near = difflib.get_close_matches(part, dir(target), n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UsageError(f"--model {factory}: {module_name} has no {part}{hint}")
            target = getattr(target, part)
        if not callable(target):
            raise UsageError(f"--model {factory}: {attribute} cannot be called")
        try:
            made = target(deepcopy(config)) if _takes_config(target) else target()
        except ConsolidateError:
            raise
        except Exception as error:
            raise UsageError(
                f"--model {factory} failed with {type(error).__name__}: {error}; it is called with "
                f"the contents of config.json{'' if config else ' (here there are none)'}, or with "
                "nothing if it takes no argument"
            ) from error
    finally:
        sys.path.remove(here)
    if not isinstance(made, nn.Module):
        raise UsageError(
            f"--model {factory} returned a {type(made).__name__}, not a torch.nn.Module"
        )
    return made


def _takes_config(target: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # a callable written in C has no signature to read
        return True
    positional = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    )
    return any(parameter.kind in positional for parameter in parameters)


# --- transformers ------------------------------------------------------------------------------


class _Lazy:
    """A tensor of the file that is read when transformers takes its slice."""

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
) -> Model:
    weights = checkpoint.weights
    own = apart(weights)  # training writes into it, and the checkpoint stays as it was
    where = checkpoint.path
    notes: list[str] = []
    with untouched_randomness(seed), quiet():
        config, classes = _architectures(checkpoint, objective)
        names = [cls.__name__ for cls in classes]
        declared = _declared(config)
        cls = classes[names.index(declared)] if declared in names else classes[0]
        changes: dict[str, Any] = {}
        if new_labels is not None:
            changes = _new_head(config, cls, objective, list(new_labels), declared in names, where)
        elif objective.name == "multi-label":
            changes["problem_type"] = config.problem_type = "multi_label_classification"
        stored = _stored_dtypes(weights)
        wanted = dtype or _common_dtype(stored)
        if dtype is None and len(stored) > 1:
            notes.append(
                f"the file mixes {', '.join(_dtype_name(d) for d in stored)}; the model runs in "
                f"{_dtype_name(wanted)}, which holds them all"
            )
        try:
            module, info = cls.from_pretrained(
                None,
                config=config,
                state_dict={name: _Lazy(own, name) for name in weights},
                dtype=wanted,
                ignore_mismatched_sizes=True,  # told below, by the file's names
                output_loading_info=True,
            )
        except ConsolidateError:
            raise
        except Exception as error:
            raise InputError(
                f"{where}: transformers cannot load it as {cls.__name__}: {_first_line(error)}"
            ) from error
        _check_shapes(info, where)
        try:
            shapes = {name: shape_of(weights, name) for name in weights}
            layout, sought = transformers_layout(module, shapes)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        _check_missing(module, info, objective, declared, new_labels is not None, where)
        dropped = _check_unexpected(module, info, layout, sought, where)
        if dropped:
            notes.append(
                f"{_some(dropped)} in the file but not used by {cls.__name__}; kept as they are"
            )
        _check_duplicates(layout, weights, where)
        _check_values(module, layout, weights, where)
        if new_labels is not None and layout.fresh:
            notes.append(f"new output layer, seed {seed}: {', '.join(layout.fresh)}")
        processor = _processor(checkpoint, objective)
    if hasattr(module.config, "use_cache"):
        module.config.use_cache = False  # keys and values for generation are only memory here
    if objective.modality == "text" and getattr(module.config, "pad_token_id", None) is None:
        # Classifiers on decoders find the last token by it, and refuse batches without.
        module.config.pad_token_id = _pad_token(processor)
    labels = _label_names(checkpoint.config | changes) if objective.has_labels else None
    return Model(module, checkpoint, objective, labels, processor, layout, notes, changes)


def _architectures(checkpoint: Checkpoint, objective: Objective) -> tuple[Any, list[Any]]:
    """Return the config object and the classes that transformers has for it and the objective."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            "this checkpoint needs transformers: pip install 'consolidate-ewc[transformers]', or "
            "name a module of your own with --model package.module:factory"
        ) from error
    contents = checkpoint.config
    check_declared(contents)
    where = checkpoint.path
    _check_depth(contents, len(checkpoint.weights), where)
    kind = contents.get("model_type")
    if not contents or kind is None:
        what = "there is no config.json beside the weights" if not contents else "no model_type"
        raise InputError(
            f"{where}: {what}, so transformers cannot tell the architecture; name the module with "
            "--model package.module:factory"
        )
    if kind not in transformers.CONFIG_MAPPING:
        code = "; the code that its auto_map names is not run" if "auto_map" in contents else ""
        raise InputError(
            f"{where}: transformers {transformers.__version__} knows no model_type {kind!r}{code}. "
            "Name the module with --model package.module:factory, or install a newer transformers"
        )
    try:
        config = transformers.CONFIG_MAPPING[kind].from_dict(
            {key: _plain(value) for key, value in contents.items() if key != "auto_map"}
        )
    except Exception as error:
        raise InputError(
            f"{where}/config.json does not make a {kind} config: {_first_line(error)}"
        ) from error
    assert objective.auto_class is not None
    mapping = getattr(transformers, objective.auto_class)._model_mapping
    if type(config) not in mapping:
        raise InputError(
            f"{where}: transformers has no {kind} model for {objective.name}; choose another "
            "--objective"
        )
    found = mapping[type(config)]
    return config, list(found) if isinstance(found, list | tuple) else [found]


def _check_depth(contents: Mapping[str, Any], tensors: int, where: Path) -> None:
    """Refuse a number of layers that the weights cannot fill, before each of them is built."""
    for name, value in contents.items():
        if isinstance(value, Mapping):
            _check_depth(value, tensors, where)
        elif "layer" in name or "depth" in name:
            for count in value if isinstance(value, list) else [value]:
                if isinstance(count, int | float) and count > max(tensors, 1000):
                    raise InputError(
                        f"{where}/config.json: {name} is {value}, where the weights are {tensors} "
                        "tensors"
                    )


def _plain(value: Any) -> Any:
    """Copy a value of config.json, in which transformers writes infinity as {"__float__": …}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _declared(config: Any) -> str:
    return str((getattr(config, "architectures", None) or [""])[0])


def _new_head(
    config: Any, cls: Any, objective: Objective, labels: list[str], has_head: bool, where: Path
) -> dict[str, Any]:
    """Give the config new labels; returns what changes in config.json."""
    if objective.language:
        raise UsageError(f"new labels have no meaning for {objective.name}")
    if len(set(labels)) != len(labels):
        raise UsageError(f"the new labels are not distinct: {', '.join(labels)}")
    count = len(labels) if labels or objective.name != "regression" else 1
    if count < 1 or (count < 2 and objective.name not in ("regression", "multi-label")):
        raise UsageError(f"{objective.name} needs at least two labels, not {count}")
    if has_head and config.num_labels != count:
        raise InputError(
            f"{where} has an output layer for {config.num_labels} labels already, and {count} new "
            "ones were given: start from a checkpoint without one, or use its labels"
        )
    names = labels or ["LABEL_0"]
    problem = {
        "regression": "regression",
        "multi-label": "multi_label_classification",
        "sequence-classification": "single_label_classification",
    }.get(objective.name)
    changes: dict[str, Any] = {
        "architectures": [cls.__name__],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    if problem is not None:
        changes["problem_type"] = config.problem_type = problem
    config.num_labels = count
    config.id2label = dict(enumerate(names))
    config.label2id = dict(changes["label2id"])
    return changes


def _check_shapes(info: Mapping[str, Any], where: Path) -> None:
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise InputError(
            f"{where}: {len(info['mismatched_keys'])} tensors have other shapes than config.json "
            f"says, {name} for one: {list(found)} in the file, {list(expected)} in the model"
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
        raise InputError(
            f"{where} is a {declared or 'model'} without the output layer of a {name}, which "
            f"{objective.name} needs: {_some(missing)} missing"
        )
    raise InputError(f"{where}: {_some(missing)} missing in the file, which {name} needs")


def _check_unexpected(
    module: Any, info: Mapping[str, Any], layout: Layout, sought: Mapping[str, str], where: Path
) -> list[str]:
    """Refuse tensors that belong into the model's body; return those of other output layers."""
    body = {name for name, _ in module.base_model.named_children()}
    prefix = f"{module.base_model_prefix}."
    unexpected = [name for name in layout.unused if sought[name] in info["unexpected_keys"]]
    if module.base_model is not module:
        inside = [
            name
            for name in unexpected
            if sought[name].removeprefix(prefix).split(".")[0] in body
            or sought[name].startswith(prefix)
        ]
    else:
        inside = unexpected
    # A body's pooler feeds other output layers; a model without it has no place for it.
    inside = [name for name in inside if "pooler" not in sought[name].split(".")]
    if inside:
        raise InputError(
            f"{where}: {_some(inside)} in the file but not in {type(module).__name__} as "
            "config.json describes it"
        )
    return unexpected


def _check_duplicates(layout: Layout, weights: Mapping[str, Tensor], where: Path) -> None:
    for second, first in layout.duplicates.items():
        if not _same_bits(weights[second], weights[first]):
            raise InputError(
                f"{where}: {first} and {second} are one tensor in the model, and differ in the file"
            )


def _check_values(
    module: nn.Module, layout: Layout, weights: Mapping[str, Tensor], where: Path
) -> None:
    """Hold what transformers loaded against the layout's own reading of the file."""
    state = module.state_dict()
    for group in layout.groups:
        parts = layout.to_module({name: weights[name] for name in group.file_names})
        for name, expected in parts.items():
            if not _same_bits(state[name], expected.to(state[name].dtype)):
                raise InputError(
                    f"{where}: transformers changed the values of {name} while loading, so they "
                    f"are not those of {group.file_names[0]} in the file"
                )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # NaN is compared as bits too.
    return torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


def _processor(checkpoint: Checkpoint, objective: Objective) -> Any:
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if objective.modality == "image":
        files: tuple[str, ...] = ("preprocessor_config.json", "processor_config.json")
        kind = "AutoImageProcessor"
        options["backend"] = "pil"  # the same pixels whether torchvision is installed or not
    else:
        files, kind = _TOKENIZER_FILES, "AutoTokenizer"
    if not any((folder / name).is_file() for name in files):
        return None
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(str(folder), **options)
    except Exception as error:
        what = "tokenizer" if kind == "AutoTokenizer" else "image processor"
        raise InputError(f"{folder}: the {what} cannot be loaded: {_first_line(error)}") from error


def _pad_token(processor: Any) -> int | None:
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(processor, name, None)
        if token is not None:
            return int(token)
    return None


# --- shared ------------------------------------------------------------------------------------


def _label_names(config: Mapping[str, Any]) -> list[str] | None:
    names = config.get("id2label")
    if not isinstance(names, Mapping) or not names:
        return None
    try:
        by_id = {int(key): str(value) for key, value in names.items()}
    except ValueError:
        return None
    if sorted(by_id) != list(range(len(by_id))):
        return None
    labels = [by_id[i] for i in range(len(by_id))]
    # What transformers fills in where nobody gave names says nothing.
    return None if labels == [f"LABEL_{i}" for i in range(len(labels))] else labels


def freeze_parameters(model: Model, patterns: Sequence[str]) -> None:
    """Let the parameters that match not train.

    Args:
        model: Changed in place.
        patterns: Glob patterns of names, the module's or the file's.

    Raises:
        UsageError: A pattern matches nothing, or a part of what is one parameter.
    """
    parameters = dict(model.module.named_parameters())
    names: dict[str, set[str]] = {}  # file and module names -> parameters
    for name in model.module.state_dict():
        canonical = model.layout.canonical(name)
        if canonical in parameters:
            names.setdefault(name, set()).add(str(canonical))
    for name in [*model.checkpoint.weights, *model.layout.fresh]:
        found = [n for n in model.layout.module_names(name) if n in parameters]
        names.setdefault(name, set()).update(found)
    for pattern in patterns:
        matched = {p for name, ps in names.items() if fnmatchcase(name, pattern) for p in ps}
        if not matched:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            hint = f"; there are {', '.join(near)}, …" if near else ""
            raise UsageError(f"--freeze {pattern} matches no parameter{hint}")
        for name in matched:
            file_names = model.layout.file_names(name)
            left = [n for n in file_names if not fnmatchcase(n, pattern)]
            if left and len(left) < len(file_names) and not fnmatchcase(name, pattern):
                raise UsageError(
                    f"--freeze {pattern} matches a part of {name}, which is one parameter of the "
                    f"model and also holds {left[0]}: match all of it or none"
                )
            parameters[name].requires_grad_(False)


def _stored_dtypes(weights: Mapping[str, Tensor]) -> list[torch.dtype]:
    """The floating-point types in the file, in order of appearance."""
    dtypes = dict.fromkeys(dtype_of(weights, name) for name in weights)
    return [dtype for dtype in dtypes if dtype.is_floating_point]


def _common_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    common = dtypes[0] if dtypes else torch.float32
    for dtype in dtypes[1:]:
        common = torch.promote_types(common, dtype)
    return common


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(names: Sequence[str]) -> str:
    """Name up to four, and say how many more there are."""
    listed = ", ".join(list(names)[:4])
    return (
        f"{listed} and {len(names) - 4} more are"
        if len(names) > 4
        else (f"{listed} {'are' if len(names) > 1 else 'is'}")
    )


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (which has {near[0]})" if near else ""


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


@contextmanager
def untouched_randomness(seed: int) -> Iterator[None]:
    """Seed the CPU's generators, and put them back as they were.

    Args:
        seed: Of what is drawn meanwhile.
    """
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' reports and bars off the terminal: what matters is in errors and notes."""
    try:
        from transformers.utils import logging
    except ImportError:
        yield
        return
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
