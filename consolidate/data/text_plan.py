"""What a causal language model is to generate: how many texts, from what, in which batches."""

from collections.abc import Callable

from consolidate.data.prompts import end_tokens, starts_of
from consolidate.data.texts import most_tokens
from consolidate.models.generation_plan import TextPlan
from consolidate.models.model import Model
from consolidate.models.sampling import Distribution
from consolidate.options import Generation
from formats.errors import InputError, UsageError
from formats.rows import Rows

MAX_LENGTH = 128
"""Tokens of a generated text, unless --max-length is given."""


def check_generates(model: Model) -> None:
    """Refuse a model that has no distribution over texts."""
    why = {
        "masked-lm": "a masked language model fills gaps and has no distribution over whole texts",
        "seq2seq-lm": "an encoder-decoder only generates from an input text",
    }
    name, module, where = model.objective.name, model.module, model.checkpoint.path
    if name != "causal-lm":
        reason = why.get(name, f"its objective {name} generates no text")
        if model.objective.modality == "tensor":
            reason = "--model names a module of your own, which transformers cannot generate with"
        raise UsageError(
            f"{where}: --generate needs a causal language model of transformers: {reason}; "
            "measure it on --data"
        )
    can: Callable[[], bool] = getattr(module, "can_generate", lambda: False)
    if not can():
        raise UsageError(
            f"{where}: --generate needs a causal language model: a {type(module).__name__} cannot "
            "generate; measure it on --data"
        )


def plan_texts(
    model: Model,
    prompts: Rows,
    options: Generation,
    *,
    max_length: int | None,
    batch_size: int,
    seed: int,
) -> TextPlan:
    """Encode the prompts, and settle what is to be generated."""
    check_generates(model)
    assert options.generate is not None
    starts = starts_of(model, prompts)
    limit = most_tokens(model)
    longest = max(range(len(starts)), key=lambda i: len(starts[i]))
    room = None if limit is None else limit - len(starts[longest])
    if room is not None and room < (max_length or 1):
        where = prompts.where(longest) if len(prompts) else str(model.checkpoint.path)
        if room < 1:
            raise InputError(
                f"{where}: the prompt has {len(starts[longest])} tokens: expected fewer than the "
                f"{limit} that the model reads; shorten it"
            )
        raise UsageError(
            f"{where}: --max-length {max_length or 1}: the model reads {limit} tokens, of which "
            f"{len(starts[longest])} are the prompt's: expected at most {room}"
        )
    return TextPlan(
        starts,
        options.generate,
        Distribution(
            seed,
            ends=end_tokens(model),
            most=max_length or min(MAX_LENGTH, room or MAX_LENGTH),
            temperature=options.temperature,
            top_p=options.top_p,
        ),
        batch_size,
    )
