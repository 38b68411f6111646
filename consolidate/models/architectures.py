"""Architectures of transformers: which one a checkpoint's config.json names, and its labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from consolidate.models.objectives import Objective, check_declared, get_objective
from consolidate.runtime.quiet import quiet
from formats.checkpoint import Checkpoint
from formats.errors import InputError, UsageError


def architectures(checkpoint: Checkpoint, objective: Objective) -> tuple[Any, list[Any]]:
    """Find what transformers has for a checkpoint and an objective.

    Args:
        checkpoint: With the contents of its ``config.json``.
        objective: What the model is trained for.

    Returns:
        The config object, and the classes of models that take it.

    Raises:
        InputError: The config names no architecture, an unknown one, or one without such a model.
        UsageError: transformers is not installed.
    """
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
            f"{where}/config.json does not make a {kind} config: {first_line(error)}"
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
        config, classes = architectures(checkpoint, chosen)
    return declared_class(config) not in [cls.__name__ for cls in classes]


def declared_class(config: Any) -> str:
    """Name the class of model that a config says it is of; nothing where it does not say.

    Args:
        config: Of transformers.
    """
    return str((getattr(config, "architectures", None) or [""])[0])


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


def new_head(
    config: Any, cls: Any, objective: Objective, labels: list[str], has_head: bool, where: Path
) -> dict[str, Any]:
    """Give a config the labels of a new output layer.

    Args:
        config: Of transformers; changed in place.
        cls: The class of the model.
        objective: What it is trained for.
        labels: Their names; empty for one output without a name.
        has_head: Whether the checkpoint has an output layer.
        where: The checkpoint, for messages.

    Returns:
        What changes in ``config.json``.

    Raises:
        InputError: The checkpoint has an output layer of another size.
        UsageError: The labels do not suit the objective.
    """
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


def first_line(error: Exception) -> str:
    """Give the first line of an error that says anything.

    Args:
        error: Any.
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
