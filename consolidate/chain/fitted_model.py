"""A model fitted to a new task: with a head for its labels, and a vocabulary for its tokens."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from consolidate.chain.factors import without_blocks
from consolidate.chain.fitted_chain import Chain, FittedChain, with_present_head
from consolidate.chain.heads import Load, check_labels, head_tensors, known_labels, with_saved_head
from consolidate.data.labels import label_names, label_values, lacking_labels
from consolidate.models.architectures import relabelled
from consolidate.models.model import Model, file_weights, with_full_names
from consolidate.options import Columns
from formats.checkpoint import Checkpoint
from formats.errors import InputError, UsageError
from formats.renaming import renamed
from formats.rows import Rows
from formats.tensors import Overlaid, Renamed, dtype_of
from formats.wording import few

LOG = logging.getLogger("consolidate")


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
        return replace(fitted, free=dict.fromkeys(model.layout.fresh, 0) | fitted.free)
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
    known = known_labels(model, tensors)
    found = label_values(rows, model.objective.name, columns, used=True)
    lacking = lacking_labels(found, known)
    if not lacking:
        LOG.info("the head already has all labels of %s: nothing to extend", rows.name)
        return fitted
    return _with_wider_head(load, fitted, tensors, [*known, *lacking])


def _with_new_head(load: Load, fitted: Fitted, head: list[str], names: list[str]) -> Fitted:
    model, before = fitted.model, fitted.before
    source = model.checkpoint
    fresh, _ = _with_fresh_head(load, model, head, names)
    free = {**fitted.free, **dict.fromkeys(head, 0)}
    if before is None:
        LOG.info("the old head is not saved, since no task of a ledger uses it")
        return Fitted(fresh, None, free)
    saved = {name: source.weights[name] for name in head}
    LOG.info(
        "new head (%s) for %s; the head of %s is saved in fisher/heads",
        ", ".join(head),
        ", ".join(names) or "one number",
        ", ".join(task.name for task in with_present_head(before)),
    )
    return Fitted(fresh, with_saved_head(before, saved), free)


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
        return fitted  # tokens that it lacks are refused where they occur
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
    if hasattr(module, "final_logits_bias"):  # a buffer of BART and its like, (1, tokens)
        for name in layout.file_names("final_logits_bias"):
            if source.weights[name].shape[-1] != count:
                continue  # of a decoder with its own embedding
            values[name] = nn.functional.pad(source.weights[name], (0, wanted - count))
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
    if config.get("decoder_vocab_size") == count:  # Marian's, of the same embedding
        config["decoder_vocab_size"] = wanted
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
