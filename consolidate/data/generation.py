"""Examples that a causal language model generates: a sample of its own distribution, no data."""

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from consolidate.data.chats import Chats
from consolidate.data.text_examples import Ragged, TextExamples
from consolidate.data.texts import most_tokens, padding_token
from consolidate.estimation.batches import out_of_memory, place_of
from consolidate.estimation.likelihoods import IGNORED
from consolidate.models.model import Model
from consolidate.models.sampling import (
    Continued,
    Distribution,
    Written,
    continued,
    disagreement,
    has_cache,
    up_to_end,
)
from consolidate.options import Generation
from consolidate.runtime.distributed import from_all, place_in
from consolidate.runtime.quiet import quiet
from formats.checkpoint import read_beside
from formats.errors import ConsolidateError, InputError, UsageError
from formats.rows import Rows
from formats.text_rows import PromptRows
from formats.wording import first_line

MAX_LENGTH = 128
"""Tokens of a generated text, unless --max-length is given."""

_CHECKED = 2  # texts of the first batch that are read whole too
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of log p; of narrower types _ROUGH
_ROUGH = 0.1


class NoPrompts(Rows):
    """The rows of texts without a prompt: none."""

    def __init__(self) -> None:
        self.name, self.columns = "", ["prompt"]

    def __len__(self) -> int:
        return 0

    def read_row(self, i: int) -> dict[str, Any]:
        """Refuse, as there is no row."""
        raise IndexError(i)

    def digest(self) -> str:
        """Return that there is no content."""
        return ""


@dataclass(frozen=True)
class Texts:
    """What is to be generated: a prompt for each text, and the distribution."""

    prompts: list[list[int]]  # token ids
    distribution: Distribution
    batch_size: int

    @property
    def unchanged(self) -> bool:
        """Whether texts are drawn from the model's own distribution."""
        return self.distribution.temperature == 1 and self.distribution.top_p == 1

    def first(self, count: int) -> "Texts":
        """Give the plan of the first few texts."""
        return replace(self, prompts=self.prompts[:count])

    @property
    def batches(self) -> list[list[int]]:
        """The numbers of the texts of each batch, whose prompts have one length."""
        lengths = [len(prompt) for prompt in self.prompts]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        groups = (list(group) for _, group in groupby(order, key=lengths.__getitem__))
        size = self.batch_size
        return [group[i : i + size] for group in groups for i in range(0, len(group), size)]

    def in_order(self, written: Written) -> list[list[int]]:
        """Return all that was written in the order of the texts."""
        found = zip((i for batch in self.batches for i in batch), written.texts, strict=True)
        return [text for _, text in sorted(found)]


def open_prompts(path: str | Path | None) -> Rows:
    """Open the prompts, or no prompts."""
    if path is None:
        return NoPrompts()
    try:
        return PromptRows(Path(path).expanduser())
    except OSError as error:
        raise InputError(f"{path}: the prompts cannot be read: {error.strerror}") from error


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
) -> Texts:
    """Encode the prompts, and settle what is to be generated."""
    check_generates(model)
    assert options.generate is not None
    starts = [[_first_token(model)]] if not len(prompts) else _encoded(model, prompts)
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
    return Texts(
        [starts[i % len(starts)] for i in range(options.generate)],
        Distribution(
            seed,
            ends=_end_tokens(model),
            most=max_length or min(MAX_LENGTH, room or MAX_LENGTH),
            temperature=options.temperature,
            top_p=options.top_p,
        ),
        batch_size,
    )


def generate(
    model: Model,
    plan: Texts,
    *,
    group: ProcessGroup | None = None,
    start: Written | None = None,
    keep: Callable[[Written], None] = lambda written: None,
    note: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] = lambda texts: None,
) -> Written:
    """Generate the texts of a plan, batch by batch, which are dealt to the processes in turn.

    A batch that runs out of memory is split in half. `keep` is called after each batch of every
    process, from which another call can `start`.
    """
    written = start or Written()
    batches, (number, size) = plan.batches, place_in(group)
    rounds = [batches[n : n + size] for n in range(0, len(batches), size)]
    writer = _Writer(model.module, plan, note, written)
    done = 0
    for dealt in rounds:
        done += sum(map(len, dealt))
        if done <= len(written.texts):  # before the work was interrupted
            continue
        own = writer.write(dealt[number]) if number < len(dealt) else []
        every, halvings = _exchanged(own, writer.halvings, plan, group)
        texts = [text for texts in every for text in texts]
        written = Written([*written.texts, *texts], writer.most, halvings)
        progress(len(texts))
        keep(written)
    return written


class _Writer:
    """Generates batches of one process, as large as its memory allows."""

    def __init__(
        self, module: nn.Module, plan: Texts, note: Callable[[str], None], start: Written
    ) -> None:
        self.module, self.plan = module, plan
        self.most, self.halvings = start.most, start.halvings
        self._note = note
        self._cached = has_cache(module)
        self._checked = False

    def write(self, indices: Sequence[int]) -> list[list[int]]:
        """Generate the texts of these numbers, without their prompts."""
        found: list[list[int]] = []
        while len(found) < len(indices):
            some = indices[len(found) :][: self.most]
            texts = self._tried(some)
            if texts is None:
                self._halve(len(some))
                continue
            prompt = len(self.plan.prompts[some[0]])
            ends = self.plan.distribution.ends
            found += [up_to_end(ids[prompt:], ends) for ids in texts.ids.tolist()]
        return found

    def _tried(self, indices: Sequence[int]) -> Continued | None:
        """Generate a batch and check the first; None if memory was not enough."""
        try:
            texts = self._continued(indices)
            if not self._checked:
                texts = self._agreeing(texts, indices)
                self._checked = True
            return texts
        except ConsolidateError:
            raise
        except Exception as error:
            if out_of_memory(error):
                return None
            if self._checked or not self._cached:
                raise
            why = f"does not run ({type(error).__name__}: {first_line(error)})"
        self._leave_cache(why)
        return self._tried(indices)

    def _continued(self, indices: Sequence[int]) -> Continued:
        prompts = [self.plan.prompts[i] for i in indices]
        distribution, cached = self.plan.distribution, self._cached
        return continued(self.module, prompts, indices, distribution, cached=cached)

    def _agreeing(self, texts: Continued, indices: Sequence[int]) -> Continued:
        """Return texts whose tokens are as likely to the model when it reads them whole."""
        tolerance = _TOLERANCE.get(place_of(self.module).dtype or torch.float32, _ROUGH)
        few = Continued(texts.ids[:_CHECKED], texts.log_p[:_CHECKED])
        if disagreement(self.module, few) <= tolerance:
            return texts
        if not self._cached:
            raise UsageError(
                "--generate needs a causal language model: the outputs of "
                f"{type(self.module).__name__} change with the tokens after them; measure it on "
                "--data"
            )
        self._leave_cache("changes its outputs")
        return self._agreeing(self._continued(indices), indices)

    def _leave_cache(self, why: str) -> None:
        name = type(self.module).__name__
        self._note(f"the cache of {name} {why}: generating without it, more slowly")
        self._cached = False

    def _halve(self, size: int) -> None:
        if size == 1:
            raise InputError(
                "out of memory with a single generated text: lower --max-length, or use a smaller "
                "--dtype or another device"
            )
        self.most = (size + 1) // 2
        self.halvings += 1
        self._note(f"out of memory with {size} texts: continuing with {self.most}")
        gc.collect()
        backend: Any = getattr(torch, place_of(self.module).device.type, None)
        if hasattr(backend, "empty_cache"):
            backend.empty_cache()


def _exchanged(
    own: list[list[int]], halvings: int, plan: Texts, group: ProcessGroup | None
) -> tuple[list[list[list[int]]], int]:
    """Give each process the texts of all, in the order of the processes, and the most halvings."""
    if group is None:
        return [own], halvings
    width, numbers = plan.distribution.most, [halvings, len(own)]
    for text in own:
        numbers += [len(text), *text, *[0] * (width - len(text))]
    numbers += [0] * (2 + plan.batch_size * (width + 1) - len(numbers))
    found = from_all(numbers, group)
    every = []
    for _, count, *rest in found:
        rows = [rest[n * (width + 1) :] for n in range(count)]
        every.append([row[1 : 1 + row[0]] for row in rows])
    return every, max(numbers[0] for numbers in found)


def examples_of(model: Model, plan: Texts, texts: Sequence[Sequence[int]]) -> TextExamples:
    """Return generated texts as examples with their own labels; prompts are not predicted."""
    ids, labels = Ragged(), Ragged()
    for prompt, text in zip(plan.prompts, texts, strict=True):
        ids.append([*prompt, *text])
        labels.append([*[IGNORED] * len(prompt), *text])
    return TextExamples(
        {"input_ids": ids},
        labels,
        {"input_ids": padding_token(model)},
        cut=bytearray(len(ids)),
        max_length=plan.distribution.most,
    )


def json_lines(model: Model, prompts: Rows, texts: Sequence[Sequence[int]]) -> str:
    """Return generated texts as JSON Lines: ``{"text": …}``, with its prompt if it has one."""

    def lines() -> Iterator[str]:
        for i, ids in enumerate(texts):
            row = {"text": model.processor.decode(list(ids), skip_special_tokens=True)}
            row = {**prompts[i % len(prompts)], **row} if len(prompts) else row
            yield json.dumps(row, ensure_ascii=False) + "\n"

    with quiet():
        return "".join(lines())


def _first_token(model: Model) -> int:
    """Return the token that texts without a prompt begin with."""
    for name in ("bos_token_id", "eos_token_id"):
        for place in (model.processor, model.module.config):
            for token in _tokens(getattr(place, name, None)):
                return _known(model, token, name)
    raise UsageError(
        f"{model.checkpoint.path}: neither tokenizer nor config has a beginning-of-text or an "
        "end-of-text token to begin with: give --prompts FILE"
    )


def _end_tokens(model: Model) -> frozenset[int]:
    """Return the tokens that end a text: the tokenizer's, and those of the checkpoint's config."""
    source = model.checkpoint.base or model.checkpoint
    written = read_beside(source.path, "generation_config.json") if source.path.is_dir() else {}
    stated = written.get("eos_token_id", getattr(model.module.config, "eos_token_id", None))
    of_tokenizer = getattr(model.processor, "eos_token_id", None)
    return frozenset([*_tokens(of_tokenizer), *_tokens(stated)])


def _tokens(stated: Any) -> list[int]:
    """Return token ids that a config gives as a number, a list or not at all."""
    several = stated if isinstance(stated, list) else [stated]
    whole = (token for token in several if isinstance(token, int) and not isinstance(token, bool))
    return [token for token in whole if 0 <= token < 2**31]


def _known(model: Model, token: int, name: str) -> int:
    module: Any = model.module
    known = len(module.get_input_embeddings().weight)
    if not 0 <= token < known:
        raise InputError(
            f"{model.checkpoint.path}: {name}: expected a token id below {known}, the rows of the "
            f"model's embedding, found {token}: correct it, or give --prompts FILE"
        )
    return token


def _encoded(model: Model, rows: Rows) -> list[list[int]]:
    """Encode prompts: as a user's turn where the tokenizer has a chat template."""
    tokenizer = model.processor
    if tokenizer is None:
        raise InputError(
            f"{model.checkpoint.path}: --prompts need a tokenizer, found none; save it beside the "
            "weights"
        )
    chats, found = Chats(tokenizer, rows, model.checkpoint.path), []
    with quiet():
        for i, row in enumerate(rows):
            if getattr(tokenizer, "chat_template", None):
                ids = chats.asking(i, row["prompt"])
            else:
                ids = list(tokenizer(row["prompt"])["input_ids"])
                if ids and ids[-1] == tokenizer.eos_token_id and len(ids) > 1:
                    ids.pop()
            if not ids:
                raise InputError(f"{rows.where(i)}: expected a prompt, found one without tokens")
            found.append([_known(model, token, rows.where(i)) for token in ids])
    return found
