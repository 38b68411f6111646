"""Heads (output layers) of tasks and vocabularies: new ones, wider ones, saved ones restored.

With a head per task the trunk is shared and protected, and the heads of earlier tasks are saved in
``fisher/heads/``, one file for each task whose head is no longer in the weights.
"""

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from consolidate.chain.factors import offset_with_factors, penalty_of_blocks, without_blocks
from consolidate.chain.fitted_chain import Chain, FittedChain, with_present_head
from consolidate.data.columns import label_column
from consolidate.data.labels import (
    label_names,
    label_values,
    lacking_labels,
    place_of_label,
)
from consolidate.models.architectures import relabelled
from consolidate.models.model import Model, file_weights, with_full_names
from consolidate.options import Columns
from formats.checkpoint import Checkpoint
from formats.errors import InputError, UsageError
from formats.fisher_json import covered
from formats.renaming import renamed
from formats.rows import Rows
from formats.tensors import Overlaid, Renamed, dtype_of, shape_of
from formats.wording import few

LOG = logging.getLogger("consolidate")

# `load_model` with its options: takes a checkpoint and maybe `new_labels` or `objective`.
Load = Callable[..., Model]


@dataclass(frozen=True)
class Fitted:
    """A model that has an output for every label and a row for every token of the new task."""

    model: Model  # its checkpoint's weights are where training starts, new rows included
    before: Chain | None  # in the model's shapes: without a replaced head; Λ = 0 in new rows
    free: dict[str, int]  # by file name, the first row that no earlier task uses


def fit_model(
    load: Load,
    source: Checkpoint,
    before: Chain | None,
    rows: Rows,
    columns: Columns,
    *,
    head: str = "keep",
    patterns: Sequence[str] = (),  # of the head's parameters
    new_labels: Sequence[str] | None = None,  # of a checkpoint that has no head yet
) -> Fitted:
    """Load a model for a new task, with the head and the vocabulary that the task needs."""
    if source.adapter is not None and head != "keep":
        raise UsageError(
            f"{source.path} is an adapter, and --head {head} needs a whole model: leave --head out"
        )
    model = load(source, new_labels=new_labels)
    if new_labels is not None:
        model, changed = with_full_names(model)
        if before is not None and changed:
            before = _with_names(before, changed)
    fitted = _with_wider_vocabulary(load, Fitted(model, before, {}), new_labels)
    model = fitted.model
    if new_labels is not None:
        return fitted
    if head == "keep":
        check_labels(rows, model, columns)
        return fitted
    if model.objective.language or (head == "extend" and not model.objective.has_labels):
        raise UsageError(
            f"--head {head} cannot be combined with the objective {model.objective.name}, which "
            "has no labels: leave --head out"
        )
    tensors = head_tensors(model, patterns)
    if head == "new":
        names = label_names if model.objective.name == "regression" else label_values
        return _with_new_head(load, fitted, tensors, names(rows, model.objective.name, columns))
    known = _known(model, tensors)
    found = label_values(rows, model.objective.name, columns, used=True)
    lacking = lacking_labels(found, known)
    if not lacking:
        LOG.info("the head already has all labels of %s: nothing to extend", rows.name)
        return fitted
    return _with_wider_head(load, fitted, tensors, [*known, *lacking])


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
            and list(same) == list(head)
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
        if other.layout.canonical(name) not in own and tensor.dtype == trunk[name].dtype:
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


def _known(model: Model, head: Sequence[str]) -> list[str]:
    """Give the model's labels: their names, or numbers where they have none."""
    count = model.outputs or shape_of(model.checkpoint.weights, head[-1])[0]
    return model.labels or [str(i) for i in range(count)]


NEW_LABELS = "--head new gives the task its own head, --head extend adds rows for the new labels"


def check_labels(rows: Rows, model: Model, columns: Columns, *, remedy: str = NEW_LABELS) -> None:
    """Refuse data with labels that the model does not know by name."""
    if not model.objective.has_labels or model.objective.name == "multi-label":
        return  # a row of zeros and ones has no names
    try:
        known = _known(model, head_tensors(model))
    except (InputError, UsageError):  # without a head of its own, as when it is tied
        return  # encoding checks the numbers against the model's outputs
    found = label_values(rows, model.objective.name, columns, used=True)
    stated = rows.label_names(label_column(rows, columns, model.objective.name))
    if stated is not None and model.labels is None and len(stated) == len(known):
        return  # classes in the data's order, which encoding reports
    if lacking := lacking_labels(found, known):
        first = place_of_label(rows, model.objective.name, columns, lacking)
        raise InputError(
            f"{first}: the model lacks the labels {few(lacking, 20)}: expected some of "
            f"{few(known, 20)}, found {few(found, 20)}: {remedy}"
        )


def _with_new_head(load: Load, fitted: Fitted, head: list[str], names: list[str]) -> Fitted:
    model, before = fitted.model, fitted.before
    source = model.checkpoint
    fresh, _ = _with_fresh_head(load, model, head, names)
    if before is None:
        LOG.info("the old head is not saved, since no task of a ledger uses it")
        return replace(fitted, model=fresh)
    saved = {name: source.weights[name] for name in head}
    LOG.info(
        "new head (%s) for %s; the head of %s is saved in fisher/heads",
        ", ".join(head),
        ", ".join(names) or "one number",
        ", ".join(task.name for task in with_present_head(before)),
    )
    free = {**fitted.free, **dict.fromkeys(head, 0)}
    return Fitted(fresh, with_saved_head(before, saved), free)


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
    offsets = {"penalty_offset": offset, "factor_offset": factor_offset}
    return FittedChain(
        fisher=Overlaid(before.fisher, without=head),
        anchor=anchor,
        heads={**before.heads, **dict.fromkeys(users, head)},
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


def _with_wider_head(load: Load, fitted: Fitted, head: list[str], names: list[str]) -> Fitted:
    source = fitted.model.checkpoint
    wide, values = _with_fresh_head(load, fitted.model, head, names)
    for name, new in values.items():
        old = source.weights[name]
        if new.shape[1:] != old.shape[1:] or len(new) < len(old):
            raise InputError(
                f"{source.path}: {name} of shape {list(old.shape)} cannot be widened to "
                f"{list(new.shape)}: use --head new"
            )
        new[: len(old)] = old
    state = wide.module.state_dict()
    with torch.no_grad():
        for name, tensor in wide.layout.to_module(values).items():
            state[name].copy_(tensor)
    rows = {n: len(source.weights[n]) for n in head if len(values[n]) > len(source.weights[n])}
    count = len(fitted.model.labels or []) or min(rows.values())
    LOG.info("head extended (%s) with the labels %s", ", ".join(rows), ", ".join(names[count:]))
    return _widened(fitted, wide, values, rows)


def _with_fresh_head(
    load: Load, model: Model, head: list[str], names: list[str]
) -> tuple[Model, dict[str, Tensor]]:
    """Load a model with a newly initialized head, and give its values as they are stored."""
    source = model.checkpoint
    objective = model.objective.name  # the number of labels must not change it
    weights = Overlaid(source.weights, without=head)
    bare = replace(source, weights=weights, config=relabelled(source.config, names))
    fresh = load(bare, new_labels=names, objective=objective)
    if set(fresh.layout.fresh) != set(head):
        other = sorted(set(fresh.layout.fresh) ^ set(head))[0]
        raise InputError(
            f"{source.path}: expected new labels to change only the head ({', '.join(head)}), "
            f"found a difference in {other!r}: name all of the head with --head-parameters"
        )
    made = file_weights(fresh)
    found = {made.shape(name)[0] for name in head if made.shape(name)}
    if (wanted := len(names) or 1) not in found:
        raise InputError(
            f"{source.path}: expected a model with {wanted} outputs ({few(names, 20)}), found "
            f"{max(found)}: put num_labels into config.json and make the factory read it"
        )
    dtypes = {name: dtype_of(source.weights, name) for name in head}
    values = {name: made[name].cpu().to(dtypes[name], copy=True) for name in head}
    # What it would have been loaded from, in the file's order.
    checkpoint = replace(fresh.checkpoint, weights=Overlaid(source.weights, replaced=values))
    return replace(fresh, checkpoint=checkpoint, notes=model.notes), values


def _widened(
    fitted: Fitted, wide: Model, weights: Mapping[str, Tensor], rows: Mapping[str, int]
) -> Fitted:
    """Extend Λ with zeros, and μ with the weights' values, in the new rows from `rows` on."""
    chain = fitted.before
    if chain is not None:
        new = {name: weights[name][count:] for name, count in rows.items() if name in chain.fisher}
        fisher = _longer(chain.fisher, {at: torch.zeros_like(new[at]) for at in new})
        anchor = None if chain.anchor is None else _longer(chain.anchor, new)
        left = without_blocks(chain, rows, "it has new rows")
        chain = FittedChain(fisher=fisher, anchor=anchor, heads=chain.heads, **left)
    return Fitted(wide, chain, {**fitted.free, **rows})


def _longer(tensors: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> Overlaid:
    joined = {at: torch.cat([tensors[at], rows[at].to(tensors[at].dtype)]) for at in rows}
    return Overlaid(tensors, replaced=joined)


def _with_wider_vocabulary(load: Load, fitted: Fitted, new_labels: Sequence[str] | None) -> Fitted:
    """Add rows, the mean of the old ones, for tokens that the embedding lacks."""
    model = fitted.model
    if model.objective.modality != "text" or model.processor is None:
        return fitted
    module: Any = model.module
    embedding = module.get_input_embeddings().weight
    count, wanted = len(embedding), len(model.processor)
    if wanted <= count:
        return fitted
    output = module.get_output_embeddings()
    parts = {id(embedding), *(id(p) for p in ([] if output is None else output.parameters()))}
    layout, source = model.layout, model.checkpoint
    if source.adapter is not None:
        raise InputError(
            f"{source.path}: expected a tokenizer with the {count} tokens of the base model, found "
            f"{wanted}, and an adapter cannot add rows: use the tokenizer of the base model"
        )
    files = {
        file
        for name, p in module.named_parameters()
        if id(p) in parts and len(p) == count
        for file in layout.file_names(name)
    }
    files |= {second for second, first in layout.duplicates.items() if first in files}
    values = {}
    for name in files:  # as transformers' `resize_token_embeddings` does
        old = source.weights[name]
        mean = old.float().mean(0, keepdim=True).to(old.dtype)
        values[name] = torch.cat([old, mean.expand(wanted - count, *old.shape[1:])])
    LOG.info(
        "the tokenizer has %d tokens, the embedding %d rows: %s extended with the mean of its rows",
        wanted,
        count,
        ", ".join(sorted(files)),
    )
    config = dict(source.config)
    inner = config.get("text_config")
    if "vocab_size" not in config and isinstance(inner, dict):
        config["text_config"] = inner | {"vocab_size": wanted}
    else:
        config["vocab_size"] = wanted
    wide = replace(source, weights=Overlaid(source.weights, replaced=values), config=config)
    rows = dict.fromkeys(files, count)
    return _widened(fitted, load(wide, new_labels=new_labels), values, rows)


def _with_names(chain: Chain, names: Mapping[str, str]) -> FittedChain:
    """Give a chain by the names that the weights have beside a new head."""

    def of(tensors: Mapping[str, Tensor]) -> Renamed:
        return Renamed(tensors, {names.get(name, name): name for name in tensors})

    return FittedChain(
        renamed(chain.ledger, names),
        of(chain.fisher),
        None if chain.anchor is None else of(chain.anchor),
        {task: of(head) for task, head in chain.heads.items()},
        chain.factors,
        None if chain.factor_anchor is None else of(chain.factor_anchor),
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
