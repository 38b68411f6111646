"""Architectures of transformers: the one that a checkpoint's config.json names, and its labels."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from consolidate.models.objectives import (
    Objective,
    check_declared,
    check_model_type,
    check_readable,
    get_objective,
)
from consolidate.models.tensor_names import outer_prefix
from consolidate.runtime.quiet import quiet
from consolidate.runtime.randomness import untouched_randomness
from formats.checkpoint import Checkpoint
from formats.errors import InputError, UsageError, install
from formats.wording import first_line

# Not every machine has them.
_KERNELS = (
    *("attn_implementation", "_attn_implementation"),
    *("experts_implementation", "_experts_implementation"),
)
_LAYERS = re.compile("layer|depth")
_WIDTH = re.compile("size|dim|channel")  # such as vocab_size_per_layer_input


def architectures(checkpoint: Checkpoint, objective: Objective) -> tuple[Any, list[Any]]:
    """Return the config object and the model classes of transformers for a checkpoint."""
    try:
        import transformers
    except ImportError as error:
        needed = install("transformers", error)
        raise UsageError(
            f"{checkpoint.path}: loading it needs transformers: {needed}; or name your own module "
            "with --model package.module:factory"
        ) from error
    contents = checkpoint.config
    check_declared(contents)
    where = checkpoint.path
    _check_depth(contents, len(checkpoint.weights), where)
    kind = contents.get("model_type")
    if not contents or kind is None:
        what = "no model_type in config.json" if contents else "no config.json beside the weights"
        raise InputError(
            f"{where}: the architecture is unknown to transformers: {what}; name the module with "
            "--model package.module:factory"
        )
    check_model_type(contents, str(where))
    if (
        kind == "mistral"
        and "layer_types" in contents
        and "ministral" in transformers.CONFIG_MAPPING
    ):
        kind = "ministral"  # as for transformers' AutoConfig: it attends otherwise
        declared = contents.get("architectures") or []
        names = [str(name).replace("Mistral", "Ministral") for name in declared]
        contents = {**contents, "architectures": names}
    try:
        config = transformers.CONFIG_MAPPING[kind].from_dict(
            {key: _plain(value) for key, value in _of_any_machine(contents).items()}
            | {"model_type": kind}
        )
    except Exception as error:
        raise InputError(
            f"{where}/config.json is not a valid {kind} config: {first_line(error)}"
        ) from error
    assert objective.auto_class is not None
    mapping = getattr(transformers, f"AutoModelFor{objective.auto_class}")._model_mapping
    if type(config) not in mapping:
        check_readable(kind, str(where))
        raise InputError(
            f"{where}: transformers has no {kind} model for {objective.name}; choose another "
            "--objective"
        )
    found = mapping[type(config)]
    classes = list(found) if isinstance(found, list | tuple) else [found]
    of_text = getattr(config, "sub_configs", {}).get("text_config")
    if of_text is not None and all(cls.config_class is of_text for cls in classes):
        declared = config.architectures
        config = config.get_text_config()  # of a model of texts and images, the part for texts
        config.architectures = declared
    return config, classes


def lacks_head(checkpoint: Checkpoint, objective: str) -> bool:
    """Return whether a checkpoint lacks the output layer, by its config and its tensors."""
    chosen = get_objective(objective)
    if chosen.language:
        return False
    with quiet():
        config, classes = architectures(checkpoint, chosen)
        if declared_class(config) in [cls.__name__ for cls in classes]:
            return False
        # Heads of two objectives can have the same names, as those of tokens and of texts; others
        # have a layer before the last in common, as ModernBERT's.
        with suppress(Exception), untouched_randomness(0), torch.device("meta"):
            module = classes[0](config)
            body = {id(parameter) for parameter in module.base_model.parameters()}
            head = [name for name, p in module.named_parameters() if id(p) not in body]
            weights = (checkpoint.base or checkpoint).weights
            outer = outer_prefix(weights, module.base_model_prefix)
            return not head or outer + head[-1] not in weights
    return True  # loading says what is wrong with the config


def declared_class(config: Any) -> str:
    """Return the model class that a config names, or an empty string."""
    return str((getattr(config, "architectures", None) or [""])[0])


def labels_of_config(config: Mapping[str, Any]) -> list[str] | None:
    """Return the names of the labels in a ``config.json``; None if it has none."""
    names = config.get("id2label")
    if names is None and isinstance(stated := config.get("label_names"), list):  # timm's key
        return [str(name) for name in stated]
    if not isinstance(names, Mapping) or names.keys() != set(map(str, range(len(names)))):
        return None
    labels = [str(names[str(i)]) for i in range(len(names))]
    # transformers fills these in where there are no names.
    return None if labels == [f"LABEL_{i}" for i in range(len(labels))] else labels


def relabelled(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a config with the labels of another head; without names it has one output."""
    names = names or ["LABEL_0"]
    changed = dict(config) | {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    # The count and the names by their other keys too, at the top and where timm repeats them.
    others = {"num_labels": len(names), "num_classes": len(names), "label_names": list(names)}
    changed |= {key: value for key, value in others.items() if key in config}
    for inner in ("model_args", "pretrained_cfg"):
        if isinstance(part := config.get(inner), dict):
            changed[inner] = part | {key: value for key, value in others.items() if key in part}
    return changed


def new_head(
    config: Any, cls: Any, objective: Objective, labels: list[str], has_head: bool, where: Path
) -> dict[str, Any]:
    """Set the labels of a new head in a config; return the changes to ``config.json``."""
    if len(set(labels)) != len(labels):
        raise UsageError(f"the new labels must be distinct, found {', '.join(labels)}")
    count = len(labels) if labels or objective.name != "regression" else 1
    if count < 1 or (count < 2 and objective.name not in ("regression", "multi-label")):
        raise UsageError(f"{objective.name}: expected at least two labels, found {count}")
    if has_head and config.num_labels != count:
        raise InputError(
            f"{where} already has a head: expected its {config.num_labels} labels, found {count} "
            "new ones; use its labels, or start from a checkpoint without a head"
        )
    problem = {
        "regression": "regression",
        "multi-label": "multi_label_classification",
        "sequence-classification": "single_label_classification",
    }.get(objective.name)
    changes = relabelled({"architectures": [cls.__name__]}, labels)
    if problem is not None:
        changes["problem_type"] = config.problem_type = problem
    config.num_labels = count
    config.id2label = dict(enumerate(changes["label2id"]))
    config.label2id = dict(changes["label2id"])
    return changes


def _check_depth(contents: Mapping[str, Any], tensors: int, where: Path) -> None:
    """Refuse a number of layers that the weights cannot fill, before the layers are built."""
    for name, value in contents.items():
        if isinstance(value, Mapping):
            _check_depth(value, tensors, where)
        elif _LAYERS.search(name) and not _WIDTH.search(name):
            for count in value if isinstance(value, list) else [value]:
                if isinstance(count, int | float) and count > max(tensors, 1000):
                    raise InputError(
                        f"{where}/config.json: {name} is {value}, too many for weights of "
                        f"{tensors} tensors"
                    )


def _of_any_machine(contents: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out code and kernels, also of parts."""
    return {
        key: _of_any_machine(value) if isinstance(value, Mapping) else value
        for key, value in contents.items()
        if key != "auto_map" and (key not in _KERNELS or value in ("eager", "sdpa"))
    }


def _plain(value: Any) -> Any:
    """Copy a value of config.json, in which transformers writes infinity as {"__float__": …}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value
