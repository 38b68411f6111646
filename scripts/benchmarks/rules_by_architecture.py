"""List which share of common architectures' parameters each method measures: fisher-rules.md.

The methods are chosen on a small model with random weights, as in benchmark_architectures; the
parameters are counted in the library's default configuration, by the same names, without memory.
"""

import logging
import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import consolidate
from consolidate.estimation.gradient_methods import METHODS
from scripts.benchmarks.benchmark_architectures import BATCH, NETWORKS, made, patterns
from scripts.benchmarks.harness import start, take, write_page
from scripts.experiments.lib.common import markdown

UNUSED = "frozen or not used"  # by the outputs of the small model
TEXT = """
# Which parameters are measured by a rule

The share of parameters that each [method](../explanation/fisher.md#how-whole-batches-are-measured)
measures. The methods are chosen by the first batch of a small model with random weights, in batches
of 3, 3 and 2; the parameters are counted in the library's default configuration, by their names.
Both are exact, and no time is measured: where a parameter goes *by module*, its module runs again
for each example, which can cost more than its share.
*Frozen or not used*: `requires_grad` is False, or the outputs do not depend on it.

{table}

## What is not measured by a rule

{others}

Four kinds of weights have no rule: those of experts, whose gradients need the tokens routed to
each, which only their own code knows; those of layers that see tokens, windows or heads of all
examples in one dimension (routers, Swin's attention, DeBERTa's positions), where it is not known
which row belongs to which example; convolutions whose weight the code reshapes (Mamba, Qwen 3.5);
and parametrized weights (the position convolution of Wav2Vec2).
"""


def whole(name: str, head: str, **options: Any) -> Callable[[], nn.Module]:
    """Return what makes a model of transformers in its default configuration."""
    return lambda: made(name, head, options)


def timm(name: str) -> Callable[[], nn.Module]:
    """Return what makes one of timm's networks."""

    def make() -> nn.Module:
        import timm

        return timm.create_model(name)

    return make


def torchvision(name: str) -> Callable[[], nn.Module]:
    """Return what makes one of torchvision's networks."""

    def make() -> nn.Module:
        from torchvision import models

        return getattr(models, name)()

    return make


CLASSIFIER, CAUSAL, TRANSLATOR, IMAGES = (
    "ForSequenceClassification",
    "ForCausalLM",
    "ForConditionalGeneration",
    "ForImageClassification",
)
FULL: dict[str, Callable[[], nn.Module]] = {
    "BERT": whole("Bert", CLASSIFIER),
    "RoBERTa": whole("Roberta", CLASSIFIER),
    "DistilBERT": whole("DistilBert", CLASSIFIER),
    "MPNet": whole("MPNet", CLASSIFIER),
    "DeBERTa-v2": whole(
        "DebertaV2",
        CLASSIFIER,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=256,
    ),
    "ELECTRA": whole("Electra", CLASSIFIER),
    "ALBERT": whole("Albert", CLASSIFIER),
    "T5": whole("T5", TRANSLATOR),
    "BART": whole("Bart", TRANSLATOR),
    "GPT-2": whole("GPT2", "LMHeadModel"),
    "GPT-NeoX": whole("GPTNeoX", CAUSAL),
    "Llama": whole("Llama", CAUSAL),
    "Mistral": whole("Mistral", CAUSAL),
    "Qwen 2": whole("Qwen2", CAUSAL),
    "Qwen 3": whole("Qwen3", CAUSAL),
    "Qwen 3.5": whole("Qwen3_5", CAUSAL),
    "Qwen 3, experts": whole("Qwen3Moe", CAUSAL),
    "Gemma 3": whole("Gemma3", CAUSAL),
    "Phi 3": whole("Phi3", CAUSAL),
    "Mixtral": whole("Mixtral", CAUSAL),
    "Mamba": whole("Mamba", CAUSAL),
    "ViT": whole("ViT", IMAGES),
    "CLIP, images": whole("CLIP", IMAGES),
    "Swin": whole("Swin", IMAGES),
    "ConvNeXt": whole("ConvNext", IMAGES),
    "Wav2Vec2": whole("Wav2Vec2", CLASSIFIER),
    "Whisper": whole("Whisper", TRANSLATOR),
    "ResNet (timm)": timm("resnet50"),
    "ConvNeXt (timm)": timm("convnext_tiny"),
    "EfficientNet (timm)": timm("efficientnet_b0"),
    "MobileNet v3 (timm)": timm("mobilenetv3_large_100"),
    "ViT (timm)": timm("vit_base_patch16_224"),
    "Swin (timm)": timm("swin_tiny_patch4_window7_224"),
    "ResNet (torchvision)": torchvision("resnet18"),
    "DenseNet (torchvision)": torchvision("densenet121"),
    "MobileNet v3 (torchvision)": torchvision("mobilenet_v3_large"),
    "EfficientNet b0 (torchvision)": torchvision("efficientnet_b0"),
    "ViT (torchvision)": torchvision("vit_b_16"),
    "Swin (torchvision)": torchvision("swin_t"),
    "ConvNeXt (torchvision)": torchvision("convnext_tiny"),
}


def methods_of(title: str) -> dict[str, str]:
    """Return the methods of a small model's parameters."""
    torch.manual_seed(0)
    model, inputs, labels, likelihood = NETWORKS[title]()
    model.eval()
    rows = [slice(i, i + 3) for i in range(0, BATCH, 3)]
    batches = [(take(inputs, row), labels[row]) for row in rows]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return consolidate.fisher_diagonal(
        model, batches, likelihood, estimator="empirical", note=lambda t: print(title, t)
    ).methods


def counterpart(name: str, methods: dict[str, str]) -> str:
    """Return the method of the parameter whose name has the same words and last numbers."""

    def numbers(text: str) -> list[str]:
        return re.findall(r"\d+", text)[::-1]

    def common(other: str) -> int:
        same = [a == b for a, b in zip(numbers(name), numbers(other), strict=True)]
        return same.index(False) if False in same else len(same)

    words = re.sub(r"\d+", "*", name)
    alike = [other for other in methods if re.sub(r"\d+", "*", other) == words]
    return methods[max(alike, key=common)] if alike else UNUSED


def shares(title: str) -> tuple[int, Counter[str], dict[str, list[str]]]:
    """Return a full model's parameters: how many, how many by each method, and their names."""
    methods = methods_of(title)
    with torch.device("meta"):
        model = FULL[title]()
    counts: Counter[str] = Counter()
    names: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        method = counterpart(name, methods)
        counts[method] += parameter.numel()
        names.setdefault(method, []).append(name)
    return counts.total(), counts, names


def share(count: int, total: int) -> str:
    """Write a share in percent; a small one is not 0, nor is a large one 100."""
    if count in (0, total):
        return "–" if count == 0 else "100"
    return f"{min(max(100 * count / total, 0.01), 99.99):.2f}"


def main() -> None:
    """Count all architectures and write the page."""
    parser = start(__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=FULL, help="may be repeated")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    rows, others = [], []
    for title in options.only or FULL:
        total, counts, names = shares(title)
        cells = [share(counts[method], total) for method in (*METHODS, UNUSED)]
        rows.append([title, f"{total / 1e6:,.1f}", *cells])
        for method in (*METHODS[1:], UNUSED):
            if method in names:
                others.append(f"- {title}, {method}: {patterns(names[method])}")
        print(*rows[-1], file=sys.stderr)
    header = ["", "million parameters", *(f"by {method}, %" for method in METHODS), f"{UNUSED}, %"]
    text = TEXT.format(table=markdown(header, rows), others="\n".join(others) or "Nothing.")
    packages = ["transformers", "timm", "torchvision"]
    quick = bool(options.quick or options.only)
    write_page("fisher-rules", text, quick=quick, packages=packages)


if __name__ == "__main__":
    main()
