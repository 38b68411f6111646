"""Measure the Fisher diagonal of real architectures at tiny sizes: fisher-architectures.md.

For each: which parameters are measured by a rule and which by a fallback, the error against a
batch-of-one loop in float64, and the time over a plain forward and backward pass.
"""

import logging
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import consolidate
from scripts.benchmarks.competitors import Case, ours, training_pass
from scripts.benchmarks.harness import (
    Double,
    double,
    relative_errors,
    squares_one_by_one,
    start,
    take,
    write_page,
)
from scripts.experiments.lib.common import markdown

BATCH, T, VOCABULARY, PIXELS = 8, 12, 99, 64
TEXT = """
# The Fisher diagonal on real architectures

Models of transformers, timm, torchvision and torch with random weights at tiny sizes; empirical
Fisher of {batch} examples. The columns *by …* count the parameter tensors measured by each method.
Error: the largest over parameters of max |F − F₀| / max |F₀| against a batch-of-one loop in
float64, with batches of 3, 3 and 2; once with the model in float32, once in float64, also where its
code asks for float32 by name. Ratio: wall time of one batch of {batch} over a plain forward and
backward pass of it, medians of {rounds}. At these sizes this is mostly the overhead of calls; [the
benchmark](fisher.md) has real sizes.{quick}

{table}

## What is not measured by a rule

{others}
{failures}"""


class Network(NamedTuple):
    """A model and a batch for it."""

    model: nn.Module
    inputs: Any
    labels: Tensor
    likelihood: str


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
BOTH_SIDES: dict[str, Any] = {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()
}
DECODER = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False}

EAGER = {"experts_implementation": "eager"}  # The grouped product has no float64.


def ids() -> Tensor:
    """Return random tokens, none of them special."""
    return torch.randint(5, VOCABULARY, (BATCH, T))


def made(name: str, head: str, options: dict[str, Any]) -> nn.Module:
    """Make a model of transformers from its configuration."""
    import transformers

    kind = getattr(transformers, f"{name}TextConfig", None) if head == "ForCausalLM" else None
    config = (kind or getattr(transformers, f"{name}Config"))(**options)
    return getattr(transformers, name + head)(config)


def classifier(name: str, **options: Any) -> Network:
    """Make an encoder that classifies texts, the last two padded."""
    model = made(name, "ForSequenceClassification", {"num_labels": 3, "pad_token_id": 1, **options})
    tokens, mask = ids(), torch.ones(BATCH, T, dtype=torch.long)
    tokens[-2:, T // 2 :], mask[-2:, T // 2 :] = 1, 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    return Network(model, inputs, torch.randint(3, (BATCH,)), "softmax")


def causal(name: str, **options: Any) -> Network:
    """Make a language model."""
    tokens = ids()
    model = made(name, "ForCausalLM" if name != "GPT2" else "LMHeadModel", options)
    return Network(model, {"input_ids": tokens}, tokens, "next-token-softmax")


def translator(name: str, inputs: dict[str, Tensor] | None = None, **options: Any) -> Network:
    """Make an encoder-decoder."""
    model = made(name, "ForConditionalGeneration", {"use_cache": False, **options})
    inputs = {**(inputs or {"input_ids": ids()}), "decoder_input_ids": ids()}
    return Network(model, inputs, ids(), "token-softmax")


def vision(model: nn.Module | str, name: str | None = "pixel_values", **options: Any) -> Network:
    """Make a model that classifies images."""
    if isinstance(model, str):
        model = made(model, "ForImageClassification", {"num_labels": 3, **options})
    images = torch.randn(BATCH, 3, PIXELS, PIXELS)
    inputs = images if name is None else {name: images}
    return Network(model, inputs, torch.randint(3, (BATCH,)), "softmax")


def torchvision(name: str, **options: Any) -> Network:
    """Make one of torchvision's networks for images."""
    from torchvision import models

    return vision(getattr(models, name)(num_classes=3, **options), None)


def timm(name: str, **options: Any) -> Network:
    """Make one of timm's networks for images."""
    from timm import create_model

    return vision(create_model(name, num_classes=3, **options), None)


def speech(name: str, **options: Any) -> Network:
    """Make a model that classifies sounds."""
    model = made(name, "ForSequenceClassification", {"num_labels": 3, **options})
    sounds = torch.randn(BATCH, 400)
    return Network(model, {"input_values": sounds}, torch.randint(3, (BATCH,)), "softmax")


class TextEmbedding(nn.Module):
    """CLIP's text tower as a function of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        options = {**SIZES, "projection_dim": 16, "bos_token_id": 0, "eos_token_id": 2}
        self.tower = made("CLIPText", "ModelWithProjection", options)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the projected embedding of each text."""
        return self.tower(input_ids=tokens).text_embeds


class Tokens(nn.Module):
    """Torch's own sequence layers between an embedding and a head, the batch first or second."""

    def __init__(self, layer: nn.Module, batch_first: bool):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.layer = layer
        self.head = nn.Linear(32, 3)
        self.batch_first = batch_first

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the classes' logits."""
        x = self.embedding(tokens if self.batch_first else tokens.T)
        y = self.layer(x)
        y = y[0] if isinstance(y, tuple) else y
        return self.head(y.mean(1 if self.batch_first else 0))


def sequence(kind: Callable[..., nn.Module], batch_first: bool = True) -> Network:
    """Make a recurrent network or torch's TransformerEncoder."""
    if kind is nn.TransformerEncoder:
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=batch_first)
        stack: nn.Module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    else:
        stack = kind(32, 32, 2, batch_first=batch_first)
    model = Tokens(stack, batch_first)
    return Network(model, ids(), torch.randint(3, (BATCH,)), "softmax")


NETWORKS: dict[str, Callable[[], Network]] = {
    "BERT": lambda: classifier("Bert", **SIZES),
    "RoBERTa": lambda: classifier("Roberta", **SIZES),
    "DistilBERT": lambda: classifier(
        "DistilBert", vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=2, n_heads=4
    ),
    "DeBERTa-v2": lambda: classifier(
        "DebertaV2", **SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"]
    ),
    "MPNet": lambda: classifier("MPNet", **SIZES),
    "ELECTRA": lambda: classifier("Electra", **SIZES, embedding_size=16),
    "ALBERT": lambda: classifier("Albert", **SIZES, embedding_size=16),
    "T5": lambda: translator(
        "T5", vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    ),
    "BART": lambda: translator(
        "Bart",
        vocab_size=VOCABULARY,
        d_model=32,
        **BOTH_SIDES,
        max_position_embeddings=64,
    ),
    "GPT-2": lambda: causal(
        "GPT2", vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64
    ),
    "GPT-NeoX": lambda: causal("GPTNeoX", **SIZES),
    "Llama": lambda: causal("Llama", **DECODER),
    "Mistral": lambda: causal("Mistral", **DECODER),
    "Qwen 2": lambda: causal("Qwen2", **DECODER),
    "Qwen 3": lambda: causal("Qwen3", **DECODER),
    "Qwen 3.5": lambda: causal(
        "Qwen3_5",
        **DECODER,
        **{f"linear_{kind}_head_dim": 8 for kind in ("key", "value")},
        **{f"linear_num_{kind}_heads": 2 for kind in ("key", "value")},
        layer_types=["linear_attention", "full_attention"],
    ),
    "Gemma 3": lambda: causal("Gemma3", **DECODER),
    "Gemma 4": lambda: causal(
        "Gemma4", **DECODER, vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8
    ),
    "Mixtral": lambda: causal(
        "Mixtral", **DECODER, num_local_experts=4, num_experts_per_tok=2, **EAGER
    ),
    "Qwen 3, experts": lambda: causal(
        "Qwen3Moe",
        **DECODER,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        **EAGER,
    ),
    "Phi 3": lambda: causal("Phi3", **{**DECODER, "pad_token_id": 0}),
    "Mamba": lambda: causal(
        "Mamba", vocab_size=VOCABULARY, hidden_size=32, state_size=8, num_hidden_layers=2
    ),
    "ViT": lambda: vision("ViT", **SIZES, image_size=PIXELS, patch_size=16),
    "ConvNeXt": lambda: vision("ConvNext", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
    "ResNet": lambda: vision(
        "ResNet", embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], layer_type="basic"
    ),
    "Swin": lambda: vision(
        "Swin", image_size=PIXELS, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    ),
    "CLIP, images": lambda: vision(
        "CLIP", vision_config={**SIZES, "image_size": PIXELS, "patch_size": 16}
    ),
    "CLIP, texts": lambda: Network(TextEmbedding(), ids(), torch.randn(BATCH, 16), "gaussian"),
    "Whisper": lambda: translator(
        "Whisper",
        {"input_features": torch.randn(BATCH, 16, 40)},
        vocab_size=VOCABULARY,
        d_model=32,
        **BOTH_SIDES,
        num_mel_bins=16,
        max_source_positions=20,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
    "Wav2Vec2": lambda: speech(
        "Wav2Vec2",
        **{name: size for name, size in SIZES.items() if name != "vocab_size"},
        conv_dim=[8, 8],
        conv_stride=[5, 2],
        conv_kernel=[10, 3],
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=16,
    ),
    "ResNet (timm)": lambda: timm("resnet26"),
    "ConvNeXt (timm)": lambda: timm("convnext_atto"),
    "EfficientNet (timm)": lambda: timm("efficientnet_b0"),
    "MobileNet v3 (timm)": lambda: timm("mobilenetv3_small_050"),
    "ViT (timm)": lambda: timm("vit_tiny_patch16_224", img_size=PIXELS, depth=2),
    "Swin (timm)": lambda: timm(
        "swin_tiny_patch4_window7_224",
        img_size=PIXELS,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=4,
    ),
    "ResNet (torchvision)": lambda: torchvision("resnet18"),
    "DenseNet (torchvision)": lambda: torchvision(
        "DenseNet", growth_rate=4, block_config=(2, 2), num_init_features=8
    ),
    "ViT (torchvision)": lambda: torchvision(
        "VisionTransformer",
        image_size=PIXELS,
        patch_size=16,
        num_layers=2,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=48,
    ),
    "Swin (torchvision)": lambda: torchvision(
        "SwinTransformer",
        patch_size=[4, 4],
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
    ),
    "ConvNeXt (torchvision)": lambda: torchvision("convnext_tiny"),
    "MobileNet v3 (torchvision)": lambda: torchvision("mobilenet_v3_small"),
    "EfficientNet b0 (torchvision)": lambda: torchvision("efficientnet_b0"),
    "TransformerEncoder": lambda: sequence(nn.TransformerEncoder),
    "TransformerEncoder, time first": lambda: sequence(nn.TransformerEncoder, batch_first=False),
    "LSTM": lambda: sequence(nn.LSTM),
    "LSTM, time first": lambda: sequence(nn.LSTM, batch_first=False),
    "GRU": lambda: sequence(nn.GRU),
}


class Result(NamedTuple):
    """What was found of one architecture."""

    ways: dict[str, str]  # parameter -> how it was measured
    tensors: int
    parameters: int
    errors: tuple[float, float]  # in float32, in float64
    ratio: float


def measure(make: Callable[[], Network], rounds: int) -> Result:
    """Measure an architecture's errors and time."""
    torch.manual_seed(0)
    model, inputs, labels, likelihood = make()
    model.eval()
    with torch.no_grad():  # Biases, norms and scales that start out equal must be told apart.
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    wide_model, wide_inputs = double(model, inputs)
    with Double():
        expected = squares_one_by_one(wide_model, wide_inputs, labels, likelihood)
    errors = []
    for network, x, dtype in (
        (model, inputs, torch.float32),
        (wide_model, wide_inputs, torch.float64),
    ):
        rows = [slice(i, i + 3) for i in range(0, BATCH, 3)]
        with Double() if dtype == torch.float64 else nullcontext():
            found = consolidate.fisher_diagonal(
                network,
                [(take(x, row), labels[row]) for row in rows],
                likelihood,
                estimator="empirical",
                accumulate_dtype=dtype,
            )
        sums = {name: value * found.units for name, value in found.items()}
        errors.append(max(relative_errors(sums, expected).values()))
    case = Case(model, inputs, labels, likelihood, "empirical", BATCH)
    fisher, training = ours(case), training_pass(case)
    # The first turn warms up.
    turns = [(fisher()[0], training()[0]) for _ in range(rounds + 1)][1:]
    ratio = statistics.median(f for f, _ in turns) / statistics.median(t for _, t in turns)
    ways = dict(getattr(found, "methods", {}))
    sizes = [p.numel() for p in model.parameters()]
    return Result(ways, len(sizes), sum(sizes), (errors[0], errors[1]), ratio)


def patterns(names: list[str]) -> str:
    """Write parameter names with their numbers as stars, each pattern once."""
    return ", ".join(f"`{name}`" for name in dict.fromkeys(re.sub(r"\d+", "*", n) for n in names))


def main() -> None:
    """Measure all architectures and write the page."""
    parser = start(__doc__.splitlines()[0])
    logging.disable(logging.WARNING)
    parser.add_argument("--only", action="append", choices=NETWORKS, help="may be repeated")
    options = parser.parse_args()
    rounds = 2 if options.quick else 7
    results: dict[str, Result] = {}
    failures = []
    for title in options.only or NETWORKS:
        try:
            results[title] = measure(NETWORKS[title], rounds)
        except Exception as error:  # Also of an architecture that this installation lacks.
            failures.append(f"- {title}: `{type(error).__name__}: {' '.join(str(error).split())}`")
        last = failures[-1] if title not in results else results[title].errors
        print(f"{title}: {last}", file=sys.stderr)
    ways = list(dict.fromkeys(way for result in results.values() for way in result.ways.values()))
    rows, others = [], []
    for title, result in results.items():
        counts = Counter(result.ways.values())
        numbers = [f"{error:.0e}" for error in result.errors]
        cells = [f"{result.tensors}", f"{result.parameters:,}", *(str(counts[w]) for w in ways)]
        rows.append([title, *cells, *numbers, f"{result.ratio:.2f}"])
        for way in ways:
            names = [name for name, found in result.ways.items() if found == way]
            if way != "rule" and names:
                others.append(f"- {title}, by {way}: {patterns(names)}")
    header = ["", "tensors", "parameters", *(f"by {way}" for way in ways)]
    text = TEXT.format(
        batch=BATCH,
        rounds=rounds,
        quick=" **A quick run: its ratios mean nothing.**" * options.quick,
        table=markdown([*header, "error, float32", "error, float64", "ratio"], rows),
        others="\n".join(others) or "Nothing.",
        failures="\n## What failed\n\n" + "\n".join(failures) if failures else "",
    )
    packages = ["transformers", "timm", "torchvision"]
    partial = bool(options.quick or options.only)
    write_page("fisher-architectures", text, quick=partial, packages=packages)


if __name__ == "__main__":
    main()
