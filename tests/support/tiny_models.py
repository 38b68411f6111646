"""Tiny checkpoints of transformers with random weights and real tokenizers, as files."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers.utils import logging

logging.disable_progress_bar()

CORPUS = [
    "the cat sat on the mat",
    "a dog ate my homework",
    "what a lovely day it is",
    "rain again, and again rain",
    "nobody expects the spanish inquisition",
]
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}


def word_tokenizer() -> Any:
    """WordPiece-like, with [CLS] and [SEP], as BERT has it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def byte_tokenizer(**options: Any) -> Any:
    """Byte-level pairs and one end-of-text token, as GPT-2 has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>", **options
    )


def bert_config(**options: Any) -> Any:
    return transformers.BertConfig(vocab_size=len(word_tokenizer()), **SIZES, **options)


def gpt2_config(**options: Any) -> Any:
    return transformers.GPT2Config(
        vocab_size=len(byte_tokenizer()), n_embd=16, n_layer=2, n_head=2, n_positions=40, **options
    )


def mixtral_config() -> Any:
    return transformers.MixtralConfig(
        vocab_size=len(byte_tokenizer()),
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        **SIZES,
    )


def save(
    folder: Path, cls: Any, config: Any, processor: Any = None, dtype: torch.dtype = torch.float32
) -> Path:
    """Save a model with random weights as transformers itself does."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        module = cls(config)
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # biases and norms too must be told apart
        for number, parameter in enumerate(module.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    module.to(dtype).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def outputs(module: Any) -> torch.Tensor:
    ids = torch.tensor([[1, 5, 9, 2, 7]])
    with torch.no_grad():
        return module.eval()(ids).logits
