"""Examples of texts, for classification, tagging, and causal, masked and seq2seq models."""

import inspect
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from consolidate.data.columns import find_column, label_column
from consolidate.data.examples import Examples
from consolidate.data.labels import Labels, as_list, describe, read_labels
from consolidate.data.text_bounds import T, shortened, stated_length
from consolidate.models.model import Model
from consolidate.options import Columns
from consolidate.runtime.quiet import quiet
from consolidate.runtime.randomness import uniforms
from formats.errors import InputError, UsageError
from formats.rows import Rows

IGNORED = -100
_PAIRS = (("text", "text_pair"), ("premise", "hypothesis"), ("sentence1", "sentence2"))
_ROWS_AT_ONCE = 1000
_LONGEST_PACK = 1024  # tokens, unless --max-length is given: some models accept up to 10⁵
_LONGEST = 512  # for models without a limit
# The positions of these models begin after the padding token's id.
_OFFSET_POSITIONS = ("roberta", "camembert", "xlm-roberta", "xlm-roberta-xl", "mpnet", "longformer")
_MASKED, _KEPT_OR_RANDOM, _WHICH_TOKEN = 1, 2, 3  # streams of uniforms; 0 samples labels


class Ragged:
    """Sequences of integers of different lengths, in one block of memory."""

    def __init__(self) -> None:
        self._values = array("i")
        self._ends = array("q", [0])

    def append(self, values: Iterable[int]) -> None:
        """Add a sequence at the end."""
        self._values.extend(values)
        self._ends.append(len(self._values))

    def largest(self) -> int:
        """Return the largest integer of all; −1 where there is none."""
        return max(self._values, default=-1)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> Tensor:
        values = np.frombuffer(self._values, dtype=np.intc)[self._ends[i] : self._ends[i + 1]]
        return torch.from_numpy(values.astype(np.int64))


@dataclass(frozen=True)
class Masking:
    """Which tokens a masked language model predicts: 15%, of them 80% masked and 10% replaced.

    Devlin et al. 2019, section 3.1. At least one token of each text is predicted.
    """

    mask_token: int
    special_tokens: Tensor
    vocabulary: int
    seed: int

    def apply(self, ids: Tensor, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Return masked ids and labels, (B, T); padding must be a special token in `ids`."""
        draws = [
            uniforms(self.seed, indices, ids.shape[1], epoch, stream=stream)
            for stream in (_MASKED, _KEPT_OR_RANDOM, _WHICH_TOKEN)
        ]
        special = torch.isin(ids, self.special_tokens)
        draw = draws[0].masked_fill(special, 2.0)
        least = draw == draw.amin(1, keepdim=True)
        chosen = ((draw < 0.15) | least) & ~special
        labels = ids.masked_fill(~chosen, IGNORED)
        masked = ids.masked_fill(chosen & (draws[1] < 0.8), self.mask_token)
        replaced = chosen & (draws[1] >= 0.9)
        return torch.where(replaced, (draws[2] * self.vocabulary).long(), masked), labels


@dataclass(eq=False)
class TextExamples(Examples):
    """Token ids, padded on the right batch by batch."""

    fields: dict[str, Ragged]  # `input_ids` and maybe `token_type_ids`
    labels: Ragged | Tensor | None  # of each text; None where masking creates them
    padding: dict[str, int]  # of each field
    masking: Masking | None = None

    def __len__(self) -> int:
        return len(self.fields["input_ids"])

    def collate(self, indices: Sequence[int], epoch: int = 0) -> tuple[Any, Tensor]:
        """Return token ids, attention mask and the model's other inputs, (B, T), and labels."""
        inputs = {
            name: _padded([values[i] for i in indices], self.padding[name])
            for name, values in self.fields.items()
        }
        lengths = torch.tensor([len(self.fields["input_ids"][i]) for i in indices])
        present = torch.arange(inputs["input_ids"].shape[1]) < lengths[:, None]
        inputs["attention_mask"] = present.long()
        chosen = torch.as_tensor(list(indices), dtype=torch.long)
        if self.masking is not None:
            # Padding may be a token that also occurs in texts, so it is marked separately.
            ids = inputs["input_ids"].masked_fill(~present, int(self.masking.special_tokens[0]))
            masked, labels = self.masking.apply(ids, chosen, epoch)
            inputs["input_ids"] = torch.where(present, masked, inputs["input_ids"])
        elif isinstance(self.labels, Ragged):
            labels = _padded([self.labels[i] for i in indices], IGNORED)
        else:
            assert self.labels is not None
            labels = self.labels[chosen]
        return inputs, labels

    def length(self, i: int) -> int:
        """Return the number of tokens."""
        return len(self.fields["input_ids"][i])


def encode_texts(
    rows: Rows, model: Model, columns: Columns, *, max_length: int | None, pack: bool, seed: int
) -> Examples:
    """Encode rows of texts for the model's objective."""
    if model.processor is None:
        raise InputError(
            f"{model.checkpoint.path}: expected a tokenizer, found none; save it beside the weights"
        )
    texts = _Texts(rows, model, max_length, pack)
    with quiet():
        match model.objective.name:
            case "token-classification":
                examples = _words(texts, columns)
            case "causal-lm":
                examples = _continued(texts, columns, pack)
            case "masked-lm":
                examples = _filled_in(texts, columns, pack, seed)
            case "seq2seq-lm":
                examples = _rewritten(texts, columns)
            case _:
                examples = _classified(texts, columns)
    examples.notes[:0] = texts.notes()
    if pack:
        examples.notes.append(
            f"{len(rows)} texts fill {len(examples)} sequences of {texts.max_length} tokens"
        )
    if len(examples) == 0:
        raise InputError(f"{rows.name}: expected at least one row with a prediction, found none")
    module: Any = model.module
    known = len(module.get_input_embeddings().weight)
    token = examples.fields["input_ids"].largest()
    if token >= known:
        raise InputError(
            f"{rows.name}: expected token ids below {known}, the rows of the model's embedding, "
            f"found {token}: the tokenizer has grown; widen the embedding with "
            "`consolidate finetune`"
        )
    return examples


_Chunk = list[tuple[int, dict[str, Any]]]  # rows with their indices


class _Texts:
    """The tokenizer with the model's limits, and the counts for the notes."""

    def __init__(self, rows: Rows, model: Model, max_length: int | None, pack: bool) -> None:
        self.rows = rows
        self.model = model
        self.tokenizer = model.processor
        limit = _most_tokens(model)
        if max_length is not None and limit is not None and max_length > limit:
            raise UsageError(
                f"--max-length: expected at most {limit}, the limit of the model, found "
                f"{max_length}"
            )
        of_tokenizer = stated_length(self.tokenizer, model.checkpoint.path)
        stated = [n for n in (limit, of_tokenizer) if n is not None and n < 10**9]
        longest = min(stated, default=_LONGEST)
        self.max_length = max_length or (min(longest, _LONGEST_PACK) if pack else longest)
        self.whole = pack  # all tokens of all texts are kept
        self.count = 0
        self.truncated = 0
        self.empty = 0
        accepted = inspect.signature(model.module.forward).parameters
        config = model.module.config
        # Decoders such as GPT-2 would add an embedding of types that they were not trained with.
        self.has_types = "token_type_ids" in accepted and getattr(config, "type_vocab_size", 0) > 1
        if (pad := self.tokenizer.pad_token_id) is None:
            pad = getattr(config, "pad_token_id", None)
        self.padding = {
            "input_ids": int(pad or 0),
            "token_type_ids": int(getattr(self.tokenizer, "pad_token_type_id", 0)),
        }
        self.kept = {name: Ragged() for name in [*self.padding][: 1 + self.has_types]}

    def column(self, chunk: _Chunk, column: str) -> list[str]:
        return [self.text(row, i, column) for i, row in chunk]

    def text(self, row: dict[str, Any], i: int, column: str, *, last: bool = False) -> str:
        value = row.get(column)
        if not isinstance(value, str):
            raise InputError(
                f"{self.rows.where(i, column)}: expected a text, found {describe(value)}"
            )
        return self.shortened(value, last=last)

    def shortened(self, value: T, *, last: bool = False, **options: Any) -> T:
        """Return what the tokens that are kept depend on: at the end where `last`."""
        if self.whole:
            return value
        objective = self.model.objective.name
        # `_cut` truncates the texts of causal models, and the tokenizer all others.
        last |= self.tokenizer.truncation_side == "left" and objective != "causal-lm"
        kinds = ("text", "text_target") if objective == "seq2seq-lm" else ("text",)
        return shortened(self.tokenizer, value, self.max_length, last=last, kinds=kinds, **options)

    def encode(
        self,
        texts: list[Any],
        pairs: list[Any] | None = None,
        *,
        target: bool = False,
        **options: Any,
    ) -> Any:
        """Tokenize, truncate to `max_length` and count what was truncated."""
        # In translation the target has another language, with other special tokens.
        given = {"text_target": texts} if target else {"text": texts, "text_pair": pairs}
        self.count += len(texts)
        special = self.tokenizer.num_special_tokens_to_add(pair=pairs is not None)
        if self.max_length <= special:
            raise UsageError(
                f"--max-length: expected more than the {special} special tokens, found "
                f"{self.max_length}"
            )
        options |= {"return_token_type_ids": self.has_types, "return_attention_mask": False}
        full = self.tokenizer(**given, truncation=False, **options)
        long = [n for n, ids in enumerate(full["input_ids"]) if len(ids) > self.max_length]
        if not long:
            return full
        self.truncated += len(long)
        return self.tokenizer(
            **given, truncation="longest_first", max_length=self.max_length, **options
        )

    def keep(self, encoded: Any, n: int) -> None:
        """Store text `n` of those that were encoded together."""
        for name, values in self.kept.items():
            values.append(encoded[name][n])

    def ids(self, text: str, *, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def chunks(self) -> Iterator[_Chunk]:
        for start in range(0, len(self.rows), _ROWS_AT_ONCE):
            yield list(enumerate(self.rows[start : start + _ROWS_AT_ONCE], start))

    def notes(self) -> list[str]:
        notes = []
        if self.truncated:
            notes.append(
                f"{self.truncated} of {self.count} texts were truncated to {self.max_length} tokens"
            )
        if self.empty:
            notes.append(
                f"{self.empty} of {len(self.rows)} rows have nothing to predict and were left out"
            )
        return notes


def _padded(sequences: list[Tensor], value: int) -> Tensor:
    return pad_sequence(sequences, batch_first=True, padding_value=value)  # (B, T)


def _most_tokens(model: Model) -> int | None:
    config: Any = model.module.config
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    if config.model_type in _OFFSET_POSITIONS:
        limit -= (config.pad_token_id or 0) + 1
    return limit


def _classified(texts: _Texts, columns: Columns) -> TextExamples:
    rows, model = texts.rows, texts.model
    first, second = _text_columns(rows, columns)
    labels, notes = read_labels(rows, columns, model, model.outputs)
    for chunk in texts.chunks():
        pairs = None if second is None else texts.column(chunk, second)
        encoded = texts.encode(texts.column(chunk, first), pairs)
        for n, (i, _) in enumerate(chunk):
            if not encoded["input_ids"][n]:
                raise InputError(f"{rows.where(i, first)}: expected a text, found an empty one")
            texts.keep(encoded, n)
    return TextExamples(texts.kept, labels, texts.padding, notes=notes)


def _text_columns(rows: Rows, columns: Columns) -> tuple[str, str | None]:
    if columns.text is None and columns.text_pair is None:
        for first, second in _PAIRS:
            if first in rows.columns and second in rows.columns:
                return first, second
    first = find_column(rows, columns, "text", "text", "sentence")
    if columns.text_pair is None:
        return first, None
    return first, find_column(rows, columns, "text_pair")


def _words(texts: _Texts, columns: Columns) -> TextExamples:
    rows = texts.rows
    if not texts.tokenizer.is_fast:
        raise InputError(
            f"{texts.model.checkpoint.path}: token classification needs a fast tokenizer, which "
            "maps words to tokens, found none; save tokenizer.json beside the weights"
        )
    column = find_column(rows, columns, "tokens", "tokens", "words")
    labelled = label_column(rows, columns, texts.model.objective.name)
    reader = Labels(rows, labelled, texts.model, texts.model.outputs)
    labels = Ragged()
    for chunk in texts.chunks():
        sentences, numbers = [], []
        for i, row in chunk:
            words = as_list(row.get(column), rows.where(i, column))
            marks = as_list(row.get(labelled), rows.where(i, labelled))
            if len(words) != len(marks):
                raise InputError(
                    f"{rows.where(i, labelled)}: expected one label per word, found {len(marks)} "
                    f"labels for {len(words)} words"
                )
            if not all(isinstance(word, str) for word in words):
                raise InputError(f"{rows.where(i, column)}: expected words, found {words!r:.60}")
            sentences.append(texts.shortened(words, is_split_into_words=True))
            numbers.append([reader.index(mark, i, ignorable=True) for mark in marks])
        encoded = texts.encode(sentences, is_split_into_words=True)
        for n in range(len(chunk)):
            # The first token of a word gets its label, the others none.
            marked, before = [], None
            for word in encoded.word_ids(n):
                is_first = word is not None and word != before
                marked.append(numbers[n][word] if is_first else IGNORED)
                before = word
            if all(mark == IGNORED for mark in marked):
                texts.empty += 1
                continue
            labels.append(marked)
            texts.keep(encoded, n)
    return TextExamples(texts.kept, labels, texts.padding, notes=reader.notes)


def _continued(texts: _Texts, columns: Columns, pack: bool) -> TextExamples:
    rows = texts.rows
    has = frozenset(rows.columns)
    named = columns.text is not None
    chats = columns.messages is not None or (not named and "messages" in has)
    prompted = columns.prompt is not None or columns.completion is not None
    prompted |= not named and {"prompt", "completion"} <= has
    if chats:
        documents = _chats(texts, find_column(rows, columns, "messages"))
    elif prompted:
        prompt, completion = (find_column(rows, columns, at) for at in ("prompt", "completion"))
        documents = _prompted(texts, prompt, completion, pack)
    else:
        documents = _plain(texts, find_column(rows, columns, "text"))
    fields, labels = {"input_ids": Ragged()}, Ragged()
    blocks = _packed(documents, texts.max_length) if pack else _cut(documents, texts)
    for ids, marks in blocks:
        if all(mark == IGNORED for mark in marks[1:]):
            texts.empty += not pack
            continue
        fields["input_ids"].append(ids)
        labels.append(marks)
    return TextExamples(fields, labels, texts.padding)


_Document = tuple[list[int], list[int]]  # token ids and labels, of the same length


def _plain(texts: _Texts, column: str) -> Iterator[_Document]:
    end = texts.tokenizer.eos_token_id
    for chunk in texts.chunks():
        for ids in texts.tokenizer(texts.column(chunk, column))["input_ids"]:
            # The end token separates a text from the next one in a packed sequence.
            ended = [*ids, end] if ids and end is not None and ids[-1] != end else list(ids)
            yield ended, list(ended)


def _prompted(texts: _Texts, prompt: str, completion: str, pack: bool) -> Iterator[_Document]:
    """Yield each prompt with its completion, of which the completion alone is predicted."""
    end = texts.tokenizer.eos_token_id
    for i in range(len(texts.rows)):
        row = texts.rows[i]
        before = texts.ids(texts.text(row, i, prompt, last=True), special=True)
        if before and before[-1] == end and len(before) > 1:
            before.pop()
        after = texts.ids(texts.text(row, i, completion), special=False)
        if after and end is not None and after[-1] != end:
            after.append(end)
        if not pack and len(before) + len(after) > texts.max_length:
            # The prompt's beginning is cut first: without a completion there is nothing to learn.
            texts.truncated += 1
            after = after[: max(1, texts.max_length - 1)]
            before = before[max(0, len(before) + len(after) - texts.max_length) :]
        yield before + after, [IGNORED] * len(before) + after


def _chats(texts: _Texts, column: str) -> Iterator[_Document]:
    if not getattr(texts.tokenizer, "chat_template", None):
        raise InputError(
            f"{texts.model.checkpoint.path}: messages need a chat template, and the tokenizer has "
            "none; set its chat_template"
        )
    for i, messages in enumerate(texts.rows.values(column)):
        where = texts.rows.where(i, column)
        if isinstance(messages, str):
            messages = as_list(messages, where)
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise InputError(
                f"{where}: expected a list of messages with role and content, found "
                f"{describe(messages)}"
            )
        try:
            written = texts.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:
            raise InputError(
                f"{where}: the chat template refuses these messages: {error}"
            ) from error
        ids = texts.ids(written, special=False)
        yield ids, list(ids)


def _cut(documents: Iterable[_Document], texts: _Texts) -> Iterator[_Document]:
    for ids, labels in documents:
        texts.count += 1
        texts.truncated += len(ids) > texts.max_length
        yield ids[: texts.max_length], labels[: texts.max_length]


def _packed(documents: Iterable[_Document], length: int) -> Iterator[_Document]:
    ids: list[int] = []
    labels: list[int] = []
    for more_ids, more_labels in documents:
        ids += more_ids
        labels += more_labels
        while len(ids) >= length:
            yield ids[:length], labels[:length]
            del ids[:length], labels[:length]
    if ids:
        yield ids, labels


def _filled_in(texts: _Texts, columns: Columns, pack: bool, seed: int) -> TextExamples:
    tokenizer = texts.tokenizer
    if tokenizer.mask_token_id is None:
        raise InputError(
            f"{texts.model.checkpoint.path}: masked-lm needs a mask token, and the tokenizer has "
            "none; choose another --objective"
        )
    column = find_column(texts.rows, columns, "text")
    fields = texts.kept
    special = frozenset(tokenizer.all_special_ids)
    if pack:
        fields = {"input_ids": Ragged()}
        for ids, _ in _packed(_plain(texts, column), texts.max_length):
            if not special.issuperset(ids):
                fields["input_ids"].append(ids)
    else:
        for chunk in texts.chunks():
            encoded = texts.encode(texts.column(chunk, column))
            for n, ids in enumerate(encoded["input_ids"]):
                if special.issuperset(ids):
                    texts.empty += 1
                    continue
                texts.keep(encoded, n)
    masking = Masking(tokenizer.mask_token_id, torch.tensor(sorted(special)), len(tokenizer), seed)
    return TextExamples(fields, None, texts.padding, masking=masking)


def _rewritten(texts: _Texts, columns: Columns) -> TextExamples:
    rows = texts.rows
    text, written = columns.text or columns.prompt, columns.target or columns.completion
    columns = replace(columns, text=text, target=written)
    source = find_column(rows, columns, "text", "text", "prompt")
    target = find_column(rows, columns, "target", "target", "completion", "summary")
    labels = Ragged()
    for chunk in texts.chunks():
        encoded = texts.encode(texts.column(chunk, source))
        written = texts.encode(texts.column(chunk, target), target=True)
        for n in range(len(chunk)):
            if not written["input_ids"][n]:
                texts.empty += 1
                continue
            labels.append(written["input_ids"][n])
            texts.keep(encoded, n)
    return TextExamples(texts.kept, labels, texts.padding)
