"""Output layers of tasks ("heads") and vocabularies: fresh ones, wider ones, earlier ones put back.

With a head per task the trunk is shared and protected, and the heads of earlier tasks lie in
``fisher/heads/``, one file for each task whose head is no longer in the weights.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from consolidate.chain.tasks import Chain, FittedChain
from consolidate.data.columns import label_column
from consolidate.data.labels import label_names, label_values, lacking_labels
from consolidate.models.architectures import relabelled
from consolidate.models.model import Model, file_weights
from consolidate.options import Columns
from formats.checkpoint import Checkpoint
from formats.errors import InputError, UsageError
from formats.rows import Rows
from formats.tensors import Overlaid, dtype_of, shape_of
from formats.wording import few

LOG = logging.getLogger("consolidate")

# `load_model` with its options: takes a checkpoint and maybe `new_labels` or `objective`.
Load = Callable[..., Model]


@dataclass(frozen=True)
class Fitted:
    """A model that has an output for every label and a row for every token of the new task."""

    model: Model  # its checkpoint's weights are where training starts, fresh rows included
    before: Chain | None  # of the model's shapes: without a new head, and Λ = 0 in new rows
    free: dict[str, int]  # by file name, the first row that no earlier task has a part in


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
    """Load a model for a new task, with the output layer and the vocabulary that the task needs."""
    if source.adapter is not None and head != "keep":
        raise UsageError(f"--head {head} needs a whole model, and {source.path} is an adapter")
    model = load(source, new_labels=new_labels)
    fitted = _with_wider_vocabulary(load, Fitted(model, before, {}), new_labels)
    model = fitted.model
    if new_labels is not None:
        return fitted
    if head == "keep":
        _check_labels(rows, model, columns)
        return fitted
    if model.objective.language or (head == "extend" and not model.objective.has_labels):
        raise UsageError(f"--head {head} has no meaning for {model.objective.name}: no labels")
    tensors = head_tensors(model, patterns)
    if head == "new":
        names = label_names if model.objective.name == "regression" else label_values
        return _with_new_head(load, fitted, tensors, names(rows, model.objective.name, columns))
    known = _known(model, tensors)
    found = label_values(rows, model.objective.name, columns, used=True)
    lacking = lacking_labels(found, known)
    if not lacking:
        LOG.info("the output layer has all labels of %s: nothing to extend", rows.name)
        return fitted
    return _with_wider_head(load, fitted, tensors, [*known, *lacking])


def head_tensors(model: Model, patterns: Sequence[str] = ()) -> list[str]:
    """Name the tensors of the output layer in the weights file, in its order.

    Without patterns they are all parameters outside the base model of a transformers model, and of
    another module those of its last module, in the order of definition, that has any of its own.
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
                raise UsageError(f"--head-parameters {pattern} matches no parameter")
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
                f"{model.checkpoint.path}: {file} holds a part of the output layer and {rest[0]}: "
                "they cannot be kept apart"
            )
    return [name for name in [*model.checkpoint.weights, *layout.fresh] if name in files]


def with_head_of(load: Load, source: Checkpoint, chain: Chain, task: str) -> Model:
    """Load a checkpoint with the head of an earlier task that was put aside, bit for bit."""
    head = chain.heads[task]
    for name in head:
        if name not in source.weights:
            raise InputError(
                f"{source.path} has no tensor {name!r}, which the output layer of {task!r} has"
            )
    records = {record.name: record for record in chain.ledger.tasks}
    # Tasks that shared the head up to when it was put aside: the last one knew all of its labels.
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
    """Load a model again with each head that was put aside, on the same trunk in memory."""
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
            f"the last module with parameters of its own is {prefix or 'the model itself'} "
            f"({', '.join(parameters)}), which is no layer with a row for each outcome: name the "
            "output layer's with --head-parameters PATTERN"
        )
    return set(parameters)


def _known(model: Model, head: Sequence[str]) -> list[str]:
    """Give the model's labels: their names, or numbers where they have none."""
    count = model.outputs or shape_of(model.checkpoint.weights, head[-1])[0]
    return model.labels or [str(i) for i in range(count)]


def _check_labels(rows: Rows, model: Model, columns: Columns) -> None:
    """Refuse data with labels that the model does not know by name."""
    if not model.objective.has_labels or model.objective.name == "multi-label":
        return  # a row of zeros and ones has no names
    try:
        known = _known(model, head_tensors(model))
    except UsageError:
        return  # the numbers are held against the model's outputs while they are encoded
    found = label_values(rows, model.objective.name, columns, used=True)
    stated = rows.label_names(label_column(rows, columns, model.objective.name))
    if stated is not None and model.labels is None and len(stated) == len(known):
        return  # classes in the data's order, as is said while they are encoded
    if lacking := lacking_labels(found, known):
        raise InputError(
            f"{rows.name} has labels that the model lacks ({few(lacking, 20)}). Labels of the "
            f"data: {few(found, 20)}; of the model: {few(known, 20)}. With --head new the task "
            "gets an output layer of its own, with --head extend the model's is widened"
        )


def _with_new_head(load: Load, fitted: Fitted, head: list[str], names: list[str]) -> Fitted:
    model, before = fitted.model, fitted.before
    source = model.checkpoint
    fresh, _ = _with_fresh_head(load, model, head, names)
    if before is None:
        LOG.info("the output layer so far is not kept, since no task of a ledger uses it")
        return replace(fitted, model=fresh)
    put_aside = {name: source.weights[name] for name in head}
    users = [task.name for task in before.ledger.tasks if task.name not in before.heads]
    LOG.info(
        "new output layer (%s) for %s; that of %s is kept in fisher/heads",
        ", ".join(head),
        ", ".join(names) or "one number",
        ", ".join(users),
    )
    offset = before.ledger.penalty_offset
    anchor = before.anchor
    if anchor is not None:
        # The head no longer moves, and with it this part of the tasks' penalties.
        offset += 0.5 * math.fsum(
            float((before.fisher[n].double() * (put_aside[n].double() - anchor[n]) ** 2).sum())
            for n in head
            if n in before.fisher
        )
        anchor = Overlaid(anchor, without=head)
    chain = FittedChain(
        replace(before.ledger, penalty_offset=offset),
        Overlaid(before.fisher, without=head),
        anchor,
        {**before.heads, **dict.fromkeys(users, put_aside)},
    )
    return Fitted(fresh, chain, {**fitted.free, **dict.fromkeys(head, 0)})


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
    LOG.info("output layer widened (%s) by %s", ", ".join(rows), ", ".join(names[count:]))
    return _widened(fitted, wide, values, rows)


def _with_fresh_head(
    load: Load, model: Model, head: list[str], names: list[str]
) -> tuple[Model, dict[str, Tensor]]:
    """Load a model with a head that is made afresh, and give its values as they are stored."""
    source = model.checkpoint
    objective = model.objective.name  # the number of labels must not decide it anew
    weights = Overlaid(source.weights, without=head)
    bare = replace(source, weights=weights, config=relabelled(source.config, names))
    fresh = load(bare, new_labels=names, objective=objective)
    if set(fresh.layout.fresh) != set(head):
        other = sorted(set(fresh.layout.fresh) ^ set(head))[0]
        raise InputError(f"{source.path}: with new labels the model differs in {other} as well")
    made = file_weights(fresh)
    found = {made.shape(name)[0] for name in head if made.shape(name)}
    if (wanted := len(names) or 1) not in found:
        raise InputError(
            f"{source.path}: {wanted} outputs are needed, for {few(names, 20)}, and the model is "
            f"made with {max(found)}: its factory has to read num_labels from config.json, which "
            "is set where it is there"
        )
    dtypes = {name: dtype_of(source.weights, name) for name in head}
    values = {name: made[name].cpu().to(dtypes[name], copy=True) for name in head}
    # What it would have been loaded from, in the file's order.
    checkpoint = replace(fresh.checkpoint, weights=Overlaid(source.weights, replaced=values))
    return replace(fresh, checkpoint=checkpoint, notes=model.notes), values


def _widened(
    fitted: Fitted, wide: Model, weights: Mapping[str, Tensor], rows: Mapping[str, int]
) -> Fitted:
    """Give Λ zeros and μ the weights' values in rows that are new, from `rows` on."""
    chain = fitted.before
    if chain is not None:
        new = {name: weights[name][count:] for name, count in rows.items() if name in chain.fisher}
        fisher = _longer(chain.fisher, {at: torch.zeros_like(new[at]) for at in new})
        anchor = None if chain.anchor is None else _longer(chain.anchor, new)
        chain = FittedChain(chain.ledger, fisher, anchor, chain.heads)
    return Fitted(wide, chain, {**fitted.free, **rows})


def _longer(tensors: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> Overlaid:
    joined = {at: torch.cat([tensors[at], rows[at].to(tensors[at].dtype)]) for at in rows}
    return Overlaid(tensors, replaced=joined)


def _with_wider_vocabulary(load: Load, fitted: Fitted, new_labels: Sequence[str] | None) -> Fitted:
    """Add rows, the mean of the old, for tokens that the tokenizer has and the embedding lacks."""
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
            f"{source.path}: the tokenizer has {wanted} tokens and the base model {count}, and an "
            "adapter has no rows for them: use the tokenizer of the base model"
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
        "the tokenizer has %d tokens and the embedding %d rows: %s widened by the mean of the rows",
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


def _outcomes(head: Mapping[str, Tensor], source: Checkpoint) -> int | None:
    """Tell how many outcomes a head without label names has; None where nothing says so."""
    for name in head:
        if shape_of(head, name) != shape_of(source.weights, name):
            return shape_of(head, name)[0]
    labels = source.config.get("id2label")
    count = source.config.get("num_labels")
    if isinstance(labels, dict | list) and labels:
        return len(labels)
    return count if isinstance(count, int) else None
