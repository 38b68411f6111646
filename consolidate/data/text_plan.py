"""What a causal language model is to generate: how many texts, from what, in which batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from consolidate.data.prompts import end_tokens, starts_of
from consolidate.data.texts import most_tokens
from consolidate.models.model import Model
from consolidate.models.sampling import Distribution, Written
from consolidate.options import Generation
from formats.errors import InputError, UsageError
from formats.rows import Rows

MAX_LENGTH = 128
"""Tokens of a generated text, unless --max-length is given."""


@dataclass(frozen=True)
class TextPlan:
    """Texts to be generated, by their number: what each begins with, and the distribution."""

    starts: list[list[int]]  # token ids; the texts begin with them in turn
    count: int
    distribution: Distribution
    batch_size: int

    @property
    def unchanged(self) -> bool:
        """Whether texts are drawn from the model's own distribution."""
        return self.distribution.temperature == 1 and self.distribution.top_p == 1

    def first(self, count: int) -> "TextPlan":
        """Give the plan of the first few texts."""
        return replace(self, count=min(count, self.count))

    def prompt(self, i: int) -> list[int]:
        """Return what text i begins with."""
        return self.starts[i % len(self.starts)]

    def batches(self) -> Iterator[list[int]]:
        """Yield the numbers of the texts of each batch, whose prompts have one length."""
        places: dict[int, list[int]] = {}
        for place, start in enumerate(self.starts):
            places.setdefault(len(start), []).append(place)
        for _, alike in sorted(places.items()):
            turns = range(0, self.count, len(self.starts))
            each = (turn + place for turn in turns for place in alike)
            numbers = (i for i in each if i < self.count)
            while batch := list(islice(numbers, self.batch_size)):
                yield batch

    def in_order(self, written: Written) -> list[list[int]]:
        """Return all that was written in the order of the texts."""
        found = zip((i for batch in self.batches() for i in batch), written.texts, strict=True)
        return [text for _, text in sorted(found)]


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
        what = "the prompt" if len(prompts) else "what a text begins with"
        if room < 1:
            raise InputError(
                f"{where}: {what} has {len(starts[longest])} tokens: expected fewer than the "
                f"{limit} that the model reads; shorten it"
            )
        raise UsageError(
            f"{where}: --max-length {max_length or 1}: the model reads {limit} tokens, and {what} "
            f"has {len(starts[longest])}: expected at most {room}"
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
