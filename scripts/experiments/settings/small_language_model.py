"""From edited prose to hockey talk, with a small language model whose training text is known."""

from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from scripts.experiments.lib.running_text import (
    NEEDS,
    QuickText,
    RunningText,
    Size,
    documents_of,
    llama,
    llama_layers,
    prose,
)
from scripts.experiments.lib.tokenized import data_digest

__all__ = ["DATA", "NAME", "NEEDS", "Quick", "Setting", "digest"]

NAME = "small_language_model"
SIZE = Size(
    tokens=64,
    old={"train": 1408, "validation": 40, "test": 80},
    new={"train": 512, "validation": 96, "test": 240},
    other=1024,
    words=None,
)
VOCABULARY = 2000
PROMPT = 8  # tokens
DATA = "f807c236d767ca1e"
END = "<end>"


class Setting(RunningText):
    """A Llama of a million weights that learned the old task's training text and no other."""

    name = NAME
    batch_size = 8
    steps = 60
    old_steps = 3000
    old_rate = 3e-3
    fisher_rows = 64

    def __init__(self, raw: Path, seed: int):
        """Choose the seed's documents, and cut them into rows."""
        self.seed = seed
        tokenizer = _tokenizer(raw)
        end = tokenizer.token_to_id(END)

        def encode(documents: Any) -> list[list[int]]:
            return [[end, *one.ids] for one in tokenizer.encode_batch(list(documents))]

        self.cut(raw, encode, SIZE)
        self.first, self.ends = end, frozenset({end})
        self.vocabulary = VOCABULARY
        self.prompts = [row[:PROMPT] for row in self.other[::8]]

    def fresh(self) -> nn.Module:
        """Return the model before it learned anything."""
        return llama(self.seed, VOCABULARY, width=128, layers=4, heads=4, inner=352)

    def layers(self) -> list[tuple[str, ...]]:
        """Return what names of parameters begin with, layer by layer, the embeddings first."""
        return llama_layers(4)


class Quick(QuickText):
    """The same with a few rows of random tokens, and a tiny model of random weights."""

    name = NAME
    old_steps, old_rate = 3, 1e-3


@cache
def _tokenizer(raw: Path) -> Any:
    """Learn byte pairs from all prose."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((one for kind in prose(raw).values() for one in kind), trainer)
    return tokenizer


@cache
def digest(raw: Path) -> str:
    """Return the digest of all documents that are chosen from."""
    return data_digest(documents_of(raw), [])
