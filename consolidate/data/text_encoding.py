"""Examples of texts, for classification, tagging, and causal, masked and seq2seq models."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from consolidate.data.chats import Chats, Document, loss_text, unsuitable
from consolidate.data.columns import default_loss, find_column, kind_of_rows, label_column
from consolidate.data.examples import Examples
from consolidate.data.labels import Labels, as_list, read_labels
from consolidate.data.text_examples import Masking, Ragged, TextExamples
from consolidate.data.texts import TokenizedTexts
from consolidate.estimation.likelihoods import IGNORED
from consolidate.models.model import Model
from consolidate.options import Columns, Encoding
from consolidate.runtime.quiet import quiet
from consolidate.runtime.randomness import untouched_randomness
from formats.errors import InputError
from formats.rows import Rows
from formats.wording import first_line

_NO_INPUT = re.compile(r"(Text|PreTokenized)\w*Input\w* must be")  # of the tokenizers library
_PAIRS = (("text", "text_pair"), ("premise", "hypothesis"), ("sentence1", "sentence2"))


def encode_texts(
    rows: Rows, model: Model, encoding: Encoding, *, seed: int, labels_needed: bool
) -> Examples:
    """Encode rows of texts for the model's objective."""
    if model.processor is None:
        raise InputError(
            f"{model.checkpoint.path}: expected a tokenizer, found none; save it beside the weights"
        )
    columns = encoding.columns
    texts = TokenizedTexts(rows, model, encoding.max_length, encoding.pack)
    # A chat template may draw.
    with quiet(), untouched_randomness(seed), _tokenizing(rows, model):
        match model.objective.name:
            case "token-classification":
                examples = _words(texts, columns)
            case "causal-lm":
                examples = _continued(texts, columns, encoding.loss_on)
            case "masked-lm":
                examples = _filled_in(texts, columns, seed)
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
    if encoding.pack:
        examples.notes.append(
            f"{len(rows)} texts fill {len(examples)} sequences of {texts.max_length} tokens"
        )
    module: Any = model.module
    known = len(module.get_input_embeddings().weight)
    token = examples.fields["input_ids"].largest()
    if token >= known:
        way = "widen the embedding with `consolidate finetune`"
        if model.checkpoint.adapter is not None:
            way = "an adapter cannot add rows: use the tokenizer of the base model"
        raise InputError(
            f"{rows.name}: expected token ids below {known}, the rows of the model's embedding, "
            f"found {token}: the tokenizer has grown; {way}"
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


def _classified(texts: TokenizedTexts, columns: Columns, labels_needed: bool) -> TextExamples:
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


def _words(texts: TokenizedTexts, columns: Columns) -> TextExamples:
    rows = texts.rows
    if not texts.tokenizer.is_fast:
        raise InputError(
            f"{texts.model.checkpoint.path}: token classification needs a fast tokenizer, which "
            "maps words to tokens, found none; save tokenizer.json beside the weights"
        )
    column = find_column(rows, columns, "tokens", "tokens", "words")
    labelled = label_column(rows, columns, texts.model.objective.name)
    reader = Labels(rows, labelled, texts.model, texts.model.outputs)
    labels, spaced = Ragged(), _needs_spaces(texts.tokenizer)
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
            if spaced:
                words = [*words[:1], *(f" {one}" if one.strip() else one for one in words[1:])]
            sentences.append(texts.shortened(words, is_split_into_words=True))
            classes = [reader.index(mark, i, ignorable=True) for mark in marks]
            from_left = texts.tokenizer.truncation_side == "left"
            numbers.append(classes[-len(sentences[-1]) :] if from_left else classes)
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


def _needs_spaces(tokenizer: Any) -> bool:
    """Whether words one by one lose the space before them, as with RoBERTa's byte pairs."""
    options = {"add_special_tokens": False}
    text = tokenizer("a a", **options)["input_ids"]
    plain, spaced = (
        tokenizer(words, is_split_into_words=True, **options)["input_ids"]
        for words in (["a", "a"], ["a", " a"])
    )
    return bool(plain != text and spaced == text)


def _continued(texts: TokenizedTexts, columns: Columns, loss_on: str | None) -> TextExamples:
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
    blocks = _packed(documents, texts.max_length) if texts.whole else _cut(documents, texts)
    for ids, marks, cut in blocks:
        if not _predicts(marks):
            texts.empty += not texts.whole
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


def _plain(texts: TokenizedTexts, column: str, loss_on: str = "all") -> Iterator[Document]:
    end = texts.tokenizer.eos_token_id
    if loss_on != "all":
        raise unsuitable(texts.rows.where(0, column), loss_on, "a text")
    for chunk in texts.chunks():
        for ids in texts.tokenizer(texts.column(chunk, column))["input_ids"]:
            # The end token separates a text from the next one in a packed sequence.
            ended = [*ids, end] if ids and end is not None and ids[-1] != end else list(ids)
            yield Document(ended, list(ended))


def _prompted(
    texts: TokenizedTexts, chats: Chats, prompt: str, completion: str, loss_on: str
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


def _cut(documents: Iterable[Document], texts: TokenizedTexts) -> Iterator[_Block]:
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


def _filled_in(texts: TokenizedTexts, columns: Columns, seed: int) -> TextExamples:
    tokenizer = texts.tokenizer
    if tokenizer.mask_token_id is None:
        raise InputError(
            f"{texts.model.checkpoint.path}: masked-lm needs a mask token, and the tokenizer has "
            "none; choose another --objective"
        )
    column = find_column(texts.rows, columns, "text")
    fields = texts.kept
    special = frozenset(tokenizer.all_special_ids)
    if texts.whole:
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
    module: Any = texts.model.module
    known = min(len(tokenizer), len(module.get_input_embeddings().weight))
    masking = Masking(tokenizer.mask_token_id, torch.tensor(sorted(special)), known, seed)
    return texts.examples(None, fields, masking=masking)


def _rewritten(texts: TokenizedTexts, columns: Columns) -> TextExamples:
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
