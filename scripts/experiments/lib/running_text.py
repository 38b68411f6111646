"""Language models on running text: documents, rows of one length, and the scores of a model."""

import random
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from scripts.experiments.lib.brown import plain_text
from scripts.experiments.lib.mails import mails
from scripts.experiments.lib.tokenized import read_table
from scripts.experiments.lib.tuning import Task

KINDS = ("news", "learned", "addresses")  # Brown's reportage and science; State of the Union
WORST = -20.0  # log-likelihood a token
BROWN = "brown/package"
ADDRESSES = "sotu/package/data"
MAILS = "spam/package/data"
TABLES = "orange/orangecontrib/text/datasets"
NEEDS = (
    *(BROWN, ADDRESSES, f"{MAILS}/spam-1"),
    *(f"{TABLES}/20newsgroups-train.tab", f"{TABLES}/20newsgroups-test.tab"),
)
DOCUMENTS = {"train": slice(0, 28), "validation": slice(28, 32), "test": slice(32, 44)}
"""Of each kind of prose, in an order of the seed."""

Encode = Callable[[Sequence[str]], list[list[int]]]
"""From documents to their tokens, an end-of-text token after each."""


class Size(NamedTuple):
    """How many rows there are, and how long they are."""

    tokens: int  # of a row
    old: dict[str, int]  # rows of each kind, by part
    new: dict[str, int]
    other: int  # rows of another domain
    words: int | None  # of a document of prose, its first ones only


class RunningText:
    """Rows of a fixed number of tokens, without padding: three kinds of prose, and messages."""

    batch_size = 4
    old_steps = 0
    old_rate = 0.0
    likelihood = "next-token-softmax"
    estimator = "mc"
    head = ""
    fisher_rows: int
    seed: int
    old: Task
    new: Task
    other: list[list[int]]  # rows of mails, which no task has
    first: int  # the token that a generated text begins with
    ends: frozenset[int]  # the tokens that end one
    prompts: list[list[int]]  # that others begin with
    opening: list[int]  # what a chat template writes before a user's words
    vocabulary: int

    def cut(self, raw: Path, encode: Encode, size: Size) -> None:
        """Choose the seed's documents, and cut them into rows.

        Args:
            raw: The folder of the data.
            encode: The tokenizer.
            size: Of what is made.
        """
        chance = random.Random(self.seed)

        def rows(documents: Sequence[str], count: int) -> list[list[int]]:
            tokens = [token for one in encode(documents) for token in one]
            if len(tokens) < count * size.tokens:
                raise ValueError(f"{len(tokens)} tokens are too few for {count} rows")
            return packed_rows(tokens, size.tokens)[:count]

        parts: dict[str, list[list[int]]] = {part: [] for part in size.old}
        for kind in KINDS:
            documents = chance.sample(prose(raw)[kind], len(prose(raw)[kind]))
            for part, count in size.old.items():
                some = documents[DOCUMENTS[part]]
                if size.words is not None:
                    some = [" ".join(text.split(" ")[: size.words]) for text in some]
                parts[part] += rows(some, count)
        self.old = Task(**parts)
        train = chance.sample(talk(raw)["train"], len(talk(raw)["train"]))
        messages = {
            "train": train[100:],
            "validation": train[:100],
            "test": chance.sample(talk(raw)["test"], len(talk(raw)["test"])),
        }
        self.new = Task(**{part: rows(messages[part], count) for part, count in size.new.items()})
        self.other = rows(chance.sample(letters(raw), 1000), size.other)

    def batch(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Put rows together; the labels are the rows themselves."""
        return torch.tensor(rows)

    def logits(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Return what the model says of each token but the first of a row, (N, words), float32."""
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = model(input_ids=batch, use_cache=False).logits
        return logits[:, :-1].float().flatten(0, 1)

    def old_logits(self, model: nn.Module, batch: Tensor, logits: Tensor | None = None) -> Tensor:
        """Return what the old task's outputs say: both tasks have the same."""
        return self.logits(model, batch) if logits is None else logits

    def loss_of(self, logits: Tensor, batch: Tensor) -> Tensor:
        """Return the mean loss of a batch whose logits these are."""
        return cross_entropy(logits, batch[:, 1:].flatten())

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        return self.loss_of(self.logits(model, batch), batch)

    def outcomes(self, model: nn.Module, rows: Sequence[Sequence[int]]) -> list[float]:
        """Return the mean log-likelihood of each row's tokens, WORST at least."""
        found: list[float] = []
        for first in range(0, len(rows), 8):
            batch = self.batch(rows[first : first + 8])
            losses = cross_entropy(
                self.logits(model, batch), batch[:, 1:].flatten(), reduction="none"
            )
            means = -losses.view(len(batch), -1).mean(1)
            found += means.nan_to_num(WORST).clamp(min=WORST).tolist()
        return found

    def fisher_batches(self) -> Iterable[tuple[Any, Tensor]]:
        """Yield inputs and labels of rows of each kind alike."""
        rows = self.spread(self.fisher_rows)
        for first in range(0, len(rows), 4):
            batch = self.batch(rows[first : first + 4])
            yield {"input_ids": batch}, batch

    def spread(self, count: int, skip: int = 0) -> Sequence[list[int]]:
        """Return training rows of the old task, of each kind alike.

        Args:
            count: How many.
            skip: Less than the step between them: other values give other rows.
        """
        step = len(self.old.train) // count
        return self.old.train[skip::step][:count]


class QuickText(RunningText):
    """The same with a few rows of random tokens, and a tiny model of random weights."""

    steps, fisher_rows = 3, 6

    def __init__(self, raw: Path, seed: int):
        """Make up rows."""
        del raw
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self.old, self.new = (
            Task(*(torch.randint(low, low + 100, (12, 16), generator=generator).tolist()
                   for _ in range(3)))
            for low in (0, 100)
        )  # fmt: skip
        self.other = torch.randint(200, 256, (12, 16), generator=generator).tolist()
        self.first, self.ends, self.vocabulary = 0, frozenset({1}), 256
        self.prompts, self.opening = [[0, 5, 7], [0, 9]], [0, 3]

    def fresh(self) -> nn.Module:
        """Return a tiny model."""
        return llama(self.seed, 256, width=16, layers=2, heads=2, inner=32)

    def layers(self) -> list[tuple[str, ...]]:
        """Return what names of parameters begin with, layer by layer, the embeddings first."""
        return llama_layers(2)


def llama(
    seed: int, vocabulary: int, *, width: int, layers: int, heads: int, inner: int
) -> nn.Module:
    """Return a Llama of random weights, whose output layer is its embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "intermediate_size": inner}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=vocabulary, tie_word_embeddings=True))


def llama_layers(count: int) -> list[tuple[str, ...]]:
    """Return what names of parameters of a Llama begin with: the embeddings, then each layer."""
    return [("model.embed_tokens.",), *((f"model.layers.{i}.",) for i in range(count))]


def packed_rows(tokens: Sequence[int], length: int) -> list[list[int]]:
    """Cut tokens into rows of one length; the rest is left out."""
    return [list(tokens[i : i + length]) for i in range(0, len(tokens) - length + 1, length)]


@cache
def prose(raw: Path) -> dict[str, list[str]]:
    """Read documents of each kind of prose."""
    brown = {
        kind: [
            plain_text(file.read_text(encoding="utf-8"))
            for file in sorted((raw / BROWN).glob(f"{name}[0-9][0-9]"))
        ]
        for kind, name in (("news", "ca"), ("learned", "cj"))
    }
    recent = sorted((raw / ADDRESSES).glob("*.txt"))[-100:]
    return {**brown, "addresses": [file.read_text(encoding="utf-8") for file in recent]}


@cache
def talk(raw: Path) -> dict[str, list[str]]:
    """Read the messages of rec.sport.hockey."""
    return {
        part: [
            text
            for group, text in read_table(raw / TABLES / f"20newsgroups-{part}.tab")
            if group == "rec.sport.hockey"
        ]
        for part in ("train", "test")
    }


@cache
def letters(raw: Path) -> list[str]:
    """Read mails: spam and other."""
    return [text for _, text in mails(raw / MAILS)]


def documents_of(raw: Path) -> list[list[str]]:
    """Return all documents that are chosen from."""
    return [*(prose(raw)[kind] for kind in KINDS), *talk(raw).values(), letters(raw)]
