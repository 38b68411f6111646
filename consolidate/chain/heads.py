"""Heads (output layers) of tasks: named, saved, restored, and compared with the data's labels.

With a head per task the trunk is shared and protected, and the heads of earlier tasks are saved in
``fisher/heads/``, one file for each task whose head is no longer in the weights.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from consolidate.chain.factors import offset_with_factors, penalty_of_blocks, without_blocks
from consolidate.chain.fitted_chain import Chain, FittedChain, with_present_head
from consolidate.data.columns import label_column
from consolidate.data.labels import (
    UNNAMED,
    as_integer,
    label_values,
    lacking_labels,
    place_of_label,
)
from consolidate.models.architectures import relabelled
from consolidate.models.model import Model
from consolidate.options import Columns
from formats.checkpoint import Checkpoint
from formats.errors import InputError, UsageError
from formats.fisher_json import covered
from formats.rows import Rows
from formats.tensors import Overlaid, shape_of
from formats.wording import few

# `load_model` with its options: takes a checkpoint and maybe `new_labels` or `objective`.
Load = Callable[..., Model]


def head_tensors(model: Model, patterns: Sequence[str] = ()) -> list[str]:
    """Name the tensors of the head in the weights file, in the file's order.

    Without patterns these are all parameters outside the base model of a transformers model; for
    other modules, those of the last submodule, in the order of definition, that has its own.
    """
    module, layout = model.module, model.layout
    names = {name for name, _ in module.named_parameters()}
    if patterns:
        chosen = set()
        for pattern in patterns:
            matched = {
                name
                for name in names
                if any(fnmatchcase(n, pattern) for n in (name, *layout.file_names(name)))
            }
            if not matched:
                raise UsageError(
                    f"--head-parameters {pattern} matches no parameter; the model has "
                    f"{few(sorted(names), 4)}"
                )
            chosen |= matched
    elif isinstance(base := getattr(module, "base_model", None), nn.Module):
        body = {id(parameter) for parameter in base.parameters()}
        chosen = {name for name, p in module.named_parameters() if id(p) not in body}
    else:
        chosen = _last_layer(module)
    files = {file for name in chosen for file in layout.file_names(name)}
    for file in files:
        if rest := [name for name in layout.module_names(file) if name not in chosen]:
            raise InputError(
                f"{model.checkpoint.path}: the tensor {file!r} has both a part of the head and "
                f"{rest[0]!r}, so they cannot be separated: name others with --head-parameters"
            )
    return [name for name in [*model.checkpoint.weights, *layout.fresh] if name in files]


def with_head_of(load: Load, source: Checkpoint, chain: Chain, task: str) -> Model:
    """Load a checkpoint with the saved head of an earlier task, bit for bit."""
    head = chain.heads[task]
    for name in head:
        if name not in source.weights:
            raise InputError(
                f"{source.path}: the weights have no tensor {name!r}, which the saved head of "
                f"{task!r} replaces: use the weights that this Fisher was measured at"
            )
    records = {record.name: record for record in chain.ledger.tasks}
    # Several tasks can share a saved head: the last of them has all of its labels.
    names = next(
        (
            records[other].labels
            for other in reversed(list(records))
            if (same := chain.heads.get(other))
            and same.keys() == head.keys()
            and all(torch.equal(same[name], head[name]) for name in head)
        ),
        records[task].labels,
    )
    if names is None and (count := _outcomes(head, source)) is not None:
        names = [f"LABEL_{i}" for i in range(count)]
    weights = Overlaid(source.weights, replaced=head)
    config = source.config if names is None else relabelled(source.config, names)
    checkpoint = replace(source, weights=weights, config=config)
    return load(checkpoint, objective=records[task].objective)


def models_of_tasks(
    load: Load, model: Model, chain: Chain, tasks: Mapping[str, str]
) -> dict[str, Model]:
    """Load a model again with each saved head, on the same trunk in memory."""
    used = [task for task in dict.fromkeys(tasks.values()) if task in chain.heads]
    models = {}
    for task in used:
        models[task] = with_head_of(load, model.checkpoint, chain, task)
        _share_trunk(model, models[task], chain.heads[task])
    return {name: models[task] for name, task in tasks.items() if task in models}


def _share_trunk(model: Model, other: Model, head: Mapping[str, Tensor]) -> None:
    own = {name for file in head for name in other.layout.module_names(file)}
    trunk = model.module.state_dict(keep_vars=True)
    for name, tensor in other.module.state_dict(keep_vars=True).items():
        # Two dtypes only where nothing is trained and the files mix them: the values are the same.
        if other.layout.canonical(name) in own or name not in trunk:  # of another architecture
            continue
        if tensor.dtype == trunk[name].dtype:
            tensor.data = trunk[name].data


def _last_layer(module: nn.Module) -> set[str]:
    for prefix, layer in reversed(list(module.named_modules())):  # the module itself comes last
        if parameters := dict(layer.named_parameters(prefix, recurse=False)):
            break
    shapes = [tuple(parameter.shape) for parameter in parameters.values()]
    if len({shape[:1] for shape in shapes}) != 1 or all(len(shape) < 2 for shape in shapes):
        raise UsageError(
            f"the head was not found: the last module with parameters is "
            f"{prefix or 'the model itself'} ({', '.join(parameters)}), which does not have a row "
            "for each outcome: name the head's parameters with --head-parameters PATTERN"
        )
    return set(parameters)


def known_labels(model: Model, head: Sequence[str]) -> list[str]:
    """Give the model's labels: their names, or numbers where they have none."""
    count = model.outputs or shape_of(model.checkpoint.weights, head[-1])[0]
    return model.labels or [str(i) for i in range(count)]


NEW_LABELS = "--head new gives the task its own head, --head extend adds rows for the new labels"


def check_labels(rows: Rows, model: Model, columns: Columns, *, remedy: str = NEW_LABELS) -> None:
    """Refuse data with labels that the model does not know by name."""
    if not model.objective.has_labels or model.objective.name == "multi-label":
        return  # a row of zeros and ones has no names
    try:
        known = known_labels(model, head_tensors(model))
    except (InputError, UsageError):  # without a head of its own, as when it is tied
        return  # encoding checks the numbers against the model's outputs
    found = label_values(rows, model.objective.name, columns, used=True)
    stated = rows.label_names(label_column(rows, columns, model.objective.name))
    if stated is not None and model.labels is None and len(stated) == len(known):
        return  # classes in the data's order, which encoding reports
    if model.labels is None and any(as_integer(name) is None for name in found):
        remedy = f"{UNNAMED}; {remedy}"
    refuse_lacking(rows, model.objective.name, columns, found, known, remedy=remedy)


def refuse_lacking(
    rows: Rows,
    objective: str,
    columns: Columns,
    found: Sequence[str],
    known: Sequence[str],
    *,
    remedy: str = NEW_LABELS,
) -> None:
    """Refuse data with labels, found by name, that are not among the known ones."""
    if lacking := lacking_labels(found, known):
        first = place_of_label(rows, objective, columns, lacking)
        raise InputError(
            f"{first}: the model lacks the labels {few(lacking, 20)}: expected some of "
            f"{few(known, 20)}, found {few(found, 20)}: {remedy}"
        )


def with_saved_head(before: Chain, head: Mapping[str, Tensor]) -> FittedChain:
    """Save the head in the weights for the tasks that use it; it is no longer part of Λ and μ."""
    offset, anchor = before.ledger.penalty_offset, before.anchor
    factor_offset = None
    left = without_blocks(before, head)
    if before.factors is not None:
        factor_offset = offset_with_factors(before.ledger)
        alone = [name for name in head if name not in covered(before.ledger.blocks or {})]
        factor_offset += _penalty_of(before, head, alone) + penalty_of_blocks(before, head)
    if anchor is not None:
        # The saved head no longer moves, so its part of the penalty is constant.
        offset += _penalty_of(before, head, head)
        anchor = Overlaid(anchor, without=head)
    users = [task.name for task in with_present_head(before)]
    # A head that was saved with fewer tensors needs the others as well from now on.
    heads = {task: {**head, **own} if head.keys() - own.keys() else own
             for task, own in before.heads.items()}  # fmt: skip
    offsets = {"penalty_offset": offset, "factor_offset": factor_offset}
    return FittedChain(
        fisher=Overlaid(before.fisher, without=head),
        anchor=anchor,
        heads={**heads, **dict.fromkeys(users, head)},
        **{**left, "ledger": replace(left["ledger"], **offsets)},
    )


def _penalty_of(before: Chain, head: Mapping[str, Tensor], names: Collection[str]) -> float:
    """Return Σ ½ Λ (θ − μ)² over some tensors of a head."""
    if (anchor := before.anchor) is None:
        return 0.0
    return 0.5 * math.fsum(
        float((before.fisher[n].double() * (head[n].double() - anchor[n]) ** 2).sum())
        for n in names
        if n in before.fisher
    )


def _outcomes(head: Mapping[str, Tensor], source: Checkpoint) -> int | None:
    """Give the number of outcomes of a head without label names; None if it is not known."""
    for name in head:
        if shape_of(head, name) != shape_of(source.weights, name):
            return shape_of(head, name)[0]
    labels = source.config.get("id2label")
    count = source.config.get("num_labels")
    if isinstance(labels, dict | list) and labels:
        return len(labels)
    return count if isinstance(count, int) else None
