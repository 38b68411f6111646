"""Examples of texts, for classification, tagging, and causal, masked and seq2seq models."""

import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from consolidate.data.chats import Chats, Document, loss_text, unsuitable
from consolidate.data.columns import default_loss, find_column, kind_of_rows, label_column
from consolidate.data.examples import Examples
from consolidate.data.labels import Labels, as_list, describe, read_labels
from consolidate.data.text_bounds import T, shortened, stated_length
from consolidate.data.text_examples import Masking, Ragged, TextExamples
from consolidate.estimation.likelihoods import IGNORED
from consolidate.models.model import Model
from consolidate.options import Columns, Encoding
from consolidate.runtime.quiet import quiet
from consolidate.runtime.randomness import untouched_randomness
from formats.errors import InputError, UsageError
from formats.rows import Rows
from formats.wording import first_line

_NO_INPUT = re.compile(r"(Text|PreTokenized)\w*Input\w* must be")  # of the tokenizers library
_PAIRS = (("text", "text_pair"), ("premise", "hypothesis"), ("sentence1", "sentence2"))
_ROWS_AT_ONCE = 1000
_LONGEST_PACK = 1024  # tokens, unless --max-length is given: some models accept up to 10⁵
_LONGEST = 512  # for models without a limit
# The positions of these models begin after the padding token's id.
_OFFSET_POSITIONS = ("roberta", "camembert", "xlm-roberta", "xlm-roberta-xl", "mpnet", "longformer")


def encode_texts(
    rows: Rows,
    model: Model,
    encoding: Encoding,
    *,
    seed: int,
    labels_needed: bool = True,
) -> Examples:
    """Encode rows of texts for the model's objective."""
    if model.processor is None:
        raise InputError(
            f"{model.checkpoint.path}: expected a tokenizer, found none; save it beside the weights"
        )
    columns, pack = encoding.columns, encoding.pack
    texts = _Texts(rows, model, encoding.max_length, pack)
    # A chat template may draw.
    with quiet(), untouched_randomness(seed), _tokenizing(rows, model):
        match model.objective.name:
            case "token-classification":
                examples = _words(texts, columns)
            case "causal-lm":
                examples = _continued(texts, columns, pack, encoding.loss_on)
            case "masked-lm":
                examples = _filled_in(texts, columns, pack, seed)
            case "seq2seq-lm":
                examples = _rewritten(texts, columns)
            case _:
                examples = _classified(texts, columns, labels_needed)
    if len(examples) == 0:
        raise texts.nothing_to_predict()
    examples.notes[:0] = texts.notes()
    sequences = examples.fields["input_ids"]
    if texts.all_unknown(sequences[i].tolist() for i in range(len(sequences))):
        if model.objective.language:
            raise texts.unknown_tokens()
        examples.notes.append(str(texts.unknown_tokens()))
    if pack:
        examples.notes.append(
            f"{len(rows)} texts fill {len(examples)} sequences of {texts.max_length} tokens"
        )
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


@contextmanager
def _tokenizing(rows: Rows, model: Model) -> Iterator[None]:
    """Explain errors of the tokenizers library: plain Exceptions, and of texts it cannot take."""
    try:
        yield
    except Exception as error:
        of_input = isinstance(error, TypeError) and _NO_INPUT.match(str(error))
        if type(error) is not Exception and not of_input:
            raise
        if of_input:  # of a str, which can only be so
            raise InputError(
                f"{rows.name}: expected Unicode characters in the texts, found half a surrogate "
                r"pair, such as \ud800; correct or remove it"
            ) from error
        raise InputError(
            f"{model.checkpoint.path}: the tokenizer cannot encode the texts "
            f"({first_line(error)}); save the model's own tokenizer beside the weights"
        ) from error


_Chunk = list[tuple[int, dict[str, Any]]]  # rows with their indices


class _Texts:
    """The tokenizer with the model's limits, and the counts for the notes."""

    def __init__(self, rows: Rows, model: Model, max_length: int | None, pack: bool) -> None:
        self.rows = rows
        self.model = model
        self.tokenizer = model.processor
        limit = most_tokens(model)
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
        self.cut = bytearray()
        self.empty = 0  # rows without anything to predict
        self.cut_off = 0  # of these, rows that had it before they were truncated
        self.example: tuple[str, str] | None = None  # the first text, and where it is
        accepted = inspect.signature(model.module.forward).parameters
        config = model.module.config
        # Decoders such as GPT-2 would add an embedding of types that they were not trained with.
        self.has_types = "token_type_ids" in accepted and getattr(config, "type_vocab_size", 0) > 1
        self.padding = {
            "input_ids": padding_token(model),
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
        if self.example is None and value.strip():
            self.example = self.rows.where(i, column), value
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
    ) -> tuple[Any, set[int]]:
        """Tokenize, truncate to `max_length`, and return which texts were truncated."""
        # In translation the target has another language, with other special tokens.
        given = {"text_target": texts} if target else {"text": texts, "text_pair": pairs}
        special = self.tokenizer.num_special_tokens_to_add(pair=pairs is not None)
        if self.max_length <= special:
            raise UsageError(
                f"--max-length: expected more than the {special} special tokens, found "
                f"{self.max_length}"
            )
        options |= {"return_token_type_ids": self.has_types, "return_attention_mask": False}
        full = self.tokenizer(**given, truncation=False, **options)
        long = {n for n, ids in enumerate(full["input_ids"]) if len(ids) > self.max_length}
        if not long:
            return full, long
        encoded = self.tokenizer(
            **given, truncation="longest_first", max_length=self.max_length, **options
        )
        return encoded, long

    def keep(self, encoded: Any, n: int, cut: int) -> None:
        """Store text `n` of those that were encoded together, of which `cut` were truncated."""
        for name, values in self.kept.items():
            values.append(encoded[name][n])
        self.cut.append(cut)

    def examples(
        self,
        labels: Ragged | Tensor | None,
        fields: dict[str, Ragged] | None = None,
        **more: Any,
    ) -> TextExamples:
        """Return what was stored, in `kept` or in `fields`, as examples."""
        more |= {"cut": self.cut, "max_length": self.max_length}
        return TextExamples(fields or self.kept, labels, self.padding, **more)

    def ids(self, text: str, *, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def chunks(self) -> Iterator[_Chunk]:
        for start in range(0, len(self.rows), _ROWS_AT_ONCE):
            yield list(enumerate(self.rows[start : start + _ROWS_AT_ONCE], start))

    def notes(self) -> list[str]:
        if not self.empty:
            return []
        note = f"{self.empty} of {len(self.rows)} rows have nothing to predict and were left out"
        if self.cut_off:
            note += f"; {self.cut_off} of them since {self.max_length} tokens do not reach it"
        return [note]

    def nothing_to_predict(self) -> InputError:
        """Return the reason why no row is left."""
        if self.cut_off:
            return InputError(
                f"{self.rows.name}: truncation to {self.max_length} tokens cut off all that is "
                f"predicted in {self.cut_off} of {len(self.rows)} rows; raise --max-length"
            )
        if self.example is not None and self.all_unknown(
            [self.ids(self.example[1], special=False)]
        ):
            return self.unknown_tokens()
        return InputError(
            f"{self.rows.name}: expected at least one row with a prediction, found none"
        )

    def all_unknown(self, sequences: Iterable[Iterable[int]]) -> bool:
        """Return whether no token of any sequence is of the vocabulary, save special ones."""
        unknown, special = self.tokenizer.unk_token_id, set(self.tokenizer.all_special_ids)
        found = False
        for ids in map(set, sequences):
            if not special.issuperset(ids):
                return False
            found |= not ids or unknown in ids
        return found

    def unknown_tokens(self) -> InputError:
        """Return that the tokenizer knows nothing of the texts."""
        where, such = self.rows.name, ""
        if self.example is not None:
            where, such = self.example[0], f", such as {self.example[1][:40]!r},"
        return InputError(
            f"{where}: all tokens of all texts{such} are unknown to the tokenizer in "
            f"{self.model.checkpoint.path}, which is probably that of another model; save the "
            "model's own tokenizer beside the weights"
        )


def padding_token(model: Model) -> int:
    """Return the id to pad with: the tokenizer's, else the config's.

    Outside of the embedding it is 0, as padding is masked; a masked language model must know it.
    """
    module: Any = model.module
    pad = getattr(model.processor, "pad_token_id", None)
    pad = getattr(module.config, "pad_token_id", None) if pad is None else pad
    if model.objective.name == "masked-lm":
        return int(pad or 0)
    known = len(module.get_input_embeddings().weight)
    return int(pad) if pad is not None and 0 <= pad < known else 0


def most_tokens(model: Model) -> int | None:
    """Return how many tokens a model reads at most; None where its config has no limit."""
    config: Any = model.module.config
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    if config.model_type in _OFFSET_POSITIONS:
        limit -= (config.pad_token_id or 0) + 1
    return limit


def _classified(texts: _Texts, columns: Columns, labels_needed: bool) -> TextExamples:
    rows, model = texts.rows, texts.model
    first, second = _text_columns(rows, columns)
    labels, notes = read_labels(rows, columns, model, model.outputs, needed=labels_needed)
    for chunk in texts.chunks():
        pairs = None if second is None else texts.column(chunk, second)
        encoded, long = texts.encode(texts.column(chunk, first), pairs)
        for n, (i, _) in enumerate(chunk):
            if not encoded["input_ids"][n]:
                raise InputError(f"{rows.where(i, first)}: expected a text, found an empty one")
            texts.keep(encoded, n, n in long)
    return texts.examples(labels, notes=notes)


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
        encoded, long = texts.encode(sentences, is_split_into_words=True)
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
            texts.keep(encoded, n, n in long)
    return texts.examples(labels, notes=reader.notes)


def _continued(texts: _Texts, columns: Columns, pack: bool, loss_on: str | None) -> TextExamples:
    rows, kind = texts.rows, kind_of_rows(texts.rows, columns)
    used = loss_on or default_loss(rows, columns)
    chats = Chats(texts.tokenizer, rows, texts.model.checkpoint.path)
    if kind == "chats":
        documents = chats.documents(find_column(rows, columns, "messages"), used)
    elif kind == "completions":
        prompt, completion = (find_column(rows, columns, at) for at in ("prompt", "completion"))
        documents = _prompted(texts, chats, prompt, completion, used)
    else:
        documents = _plain(texts, find_column(rows, columns, "text"), used)
    fields, labels = {"input_ids": Ragged()}, Ragged()
    blocks = _packed(documents, texts.max_length) if pack else _cut(documents, texts)
    for ids, marks, cut in blocks:
        if not _predicts(marks):
            texts.empty += not pack
            continue
        fields["input_ids"].append(ids)
        labels.append(marks)
        texts.cut.append(cut)
    if used == "assistant" and not len(labels) and not texts.cut_off:
        raise InputError(
            f"{rows.name}: --loss-on assistant: expected turns with the role 'assistant', which a "
            "template with {% generation %} has to mark, found none in any row; correct the roles "
            "or the template, or use --loss-on all"
        )
    examples = texts.examples(labels, fields)
    if kind != "texts":  # of which all is predicted
        examples.notes.append(f"{rows.name}: {loss_text(used, chats.how)}")
    if kind == "chats" and loss_on is None:
        examples.notes[-1] += "; --loss-on assistant takes the assistant's turns alone"
    return examples


def _predicts(labels: list[int]) -> bool:
    return any(label != IGNORED for label in labels[1:])  # nothing stands before the first token


_Block = tuple[list[int], list[int], bool]  # token ids, labels, whether they were truncated


def _plain(texts: _Texts, column: str, loss_on: str = "all") -> Iterator[Document]:
    end = texts.tokenizer.eos_token_id
    if loss_on != "all":
        raise unsuitable(texts.rows.where(0, column), loss_on, "a text")
    for chunk in texts.chunks():
        for ids in texts.tokenizer(texts.column(chunk, column))["input_ids"]:
            # The end token separates a text from the next one in a packed sequence.
            ended = [*ids, end] if ids and end is not None and ids[-1] != end else list(ids)
            yield Document(ended, list(ended))


def _prompted(
    texts: _Texts, chats: Chats, prompt: str, completion: str, loss_on: str
) -> Iterator[Document]:
    end = texts.tokenizer.eos_token_id
    for i in range(len(texts.rows)):
        row = texts.rows[i]
        if isinstance(row.get(prompt), list):
            yield chats.completed(i, row, prompt, completion, loss_on)
            continue
        before = texts.ids(texts.text(row, i, prompt, last=True), special=True)
        if before and before[-1] == end and len(before) > 1:
            before.pop()
        after = texts.ids(texts.text(row, i, completion), special=False)
        if loss_on == "assistant":
            raise unsuitable(texts.rows.where(i, completion), loss_on, "a text")
        if after and end is not None and after[-1] != end:
            after.append(end)
        ids = before + after
        labels = ids if loss_on == "all" else [IGNORED] * len(before) + after
        yield Document(ids, list(labels), prompt=len(before))


def _cut(documents: Iterable[Document], texts: _Texts) -> Iterator[_Block]:
    most = texts.max_length
    for ids, labels, prompt in documents:
        # The prompt's beginning is cut first: without a completion there is nothing to learn.
        start = min(max(len(ids) - most, 0), max(prompt - 1, 0))
        kept = labels[start : start + most]
        texts.cut_off += _predicts(labels) and not _predicts(kept)
        yield ids[start : start + most], kept, len(ids) > most


def _packed(documents: Iterable[Document], length: int) -> Iterator[_Block]:
    ids: list[int] = []
    labels: list[int] = []
    for more_ids, more_labels, _ in documents:
        ids += more_ids
        labels += more_labels
        while len(ids) >= length:
            yield ids[:length], labels[:length], False
            del ids[:length], labels[:length]
    if ids:
        yield ids, labels, False


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
        for ids, _, cut in _packed(_plain(texts, column), texts.max_length):
            if not special.issuperset(ids):
                fields["input_ids"].append(ids)
                texts.cut.append(cut)
    else:
        for chunk in texts.chunks():
            encoded, long = texts.encode(texts.column(chunk, column))
            for n, ids in enumerate(encoded["input_ids"]):
                if special.issuperset(ids):
                    texts.empty += 1
                    continue
                texts.keep(encoded, n, n in long)
    masking = Masking(tokenizer.mask_token_id, torch.tensor(sorted(special)), len(tokenizer), seed)
    return texts.examples(None, fields, masking=masking)


def _rewritten(texts: _Texts, columns: Columns) -> TextExamples:
    rows = texts.rows
    text, written = columns.text or columns.prompt, columns.target or columns.completion
    columns = replace(columns, text=text, target=written)
    source = find_column(rows, columns, "text", "text", "prompt")
    target = find_column(rows, columns, "target", "target", "completion", "summary")
    labels = Ragged()
    for chunk in texts.chunks():
        encoded, long = texts.encode(texts.column(chunk, source))
        written, long_targets = texts.encode(texts.column(chunk, target), target=True)
        for n in range(len(chunk)):
            if not written["input_ids"][n]:
                texts.empty += 1
                continue
            labels.append(written["input_ids"][n])
            texts.keep(encoded, n, (n in long) + (n in long_targets))
    return texts.examples(labels, texts_each=2)
