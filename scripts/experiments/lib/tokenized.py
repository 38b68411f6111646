"""Texts with labels: reading, tokens, batches, and a classifier's scores."""

import csv
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

EVALUATED = 64
"""Texts that are evaluated at a time."""


class Text(NamedTuple):
    """A text as the model reads it."""

    tokens: list[int]
    label: int


def read_table(path: Path) -> list[tuple[str, str]]:
    """Read (label, text) from a `.tab` file, which begins with three lines of header."""
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[3:]
    return [(row[0], row[1]) for row in rows if len(row) == 2 and row[1].strip()]


def data_digest(rows: Iterable[Any], files: Iterable[Path]) -> str:
    """Return the SHA-256, 16 digits, of raw rows and of the files a model is made of."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def tokenized(folder: Path, rows: Sequence[tuple[str, int]], length: int) -> list[Text]:
    """Cut texts into tokens, as many as `length` at most, by the tokenizer.json of a folder."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    found = tokenizer.encode_batch([text for text, _ in rows])
    return [Text(one.ids, label) for one, (_, label) in zip(found, rows, strict=True)]


def padded(texts: Sequence[Text]) -> tuple[dict[str, Tensor], Tensor]:
    """Put texts together: padded with 0 to the longest, that rounded up to a multiple of 8."""
    width = -(-max(len(text.tokens) for text in texts) // 8) * 8
    rows = [text.tokens + [0] * (width - len(text.tokens)) for text in texts]
    mask = [[1] * len(text.tokens) + [0] * (width - len(text.tokens)) for text in texts]
    inputs = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}
    return inputs, torch.tensor([text.label for text in texts])


class Classifier:
    """A setting whose model puts each text into one class."""

    likelihood = "softmax"
    estimator = "exact"
    head = "classifier."

    def batch(self, rows: Sequence[Text]) -> tuple[dict[str, Tensor], Tensor]:
        """Put rows together, the labels beside them."""
        return padded(rows)

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        """Return what the model says of each text, (N, classes), float32."""
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch[0]).logits.float()

    def old_logits(self, model: nn.Module, batch: Any, logits: Tensor | None = None) -> Tensor:
        """Return what the old task's outputs say: both tasks have the same."""
        return self.logits(model, batch) if logits is None else logits

    def loss_of(self, logits: Tensor, batch: Any) -> Tensor:
        """Return the mean loss of a batch whose logits these are."""
        return cross_entropy(logits, batch[1])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of a batch."""
        return self.loss_of(self.logits(model, batch), batch)

    def outcomes(self, model: nn.Module, rows: Sequence[Text]) -> list[float]:
        """Say of each row whether it is put into its class."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
        found = [0.0] * len(rows)
        for first in range(0, len(rows), EVALUATED):
            some = order[first : first + EVALUATED]
            batch = padded([rows[i] for i in some])
            right = self.logits(model, batch).argmax(1) == batch[1]
            for i, value in zip(some, right.tolist(), strict=True):
                found[i] = float(value)
        return found


def bert_layers(count: int) -> list[tuple[str, ...]]:
    """Return what names of parameters of BERT begin with: the embeddings, then each layer."""
    return [("bert.embeddings.",), *((f"bert.encoder.layer.{i}.",) for i in range(count))]


def bert_classifier(folder: Path | None, labels: int, seed: int) -> nn.Module:
    """Make a BERT with a fresh head; without a folder a tiny one, of random weights."""
    import transformers
    from transformers import BertConfig, BertForSequenceClassification

    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    if folder is None:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = BertConfig(**sizes, vocab_size=300, intermediate_size=64, num_labels=labels)  # type: ignore[arg-type,call-arg]
        return BertForSequenceClassification(config)
    return BertForSequenceClassification.from_pretrained(folder, num_labels=labels)
