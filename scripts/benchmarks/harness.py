"""What the benchmarks share: workloads, the slow reference, clocks, memory, conditions, pages.

One command reproduces every figure of a page, and stands on it. Full runs write into docs/results/,
quick ones into experiments-output/.
"""

import argparse
import copy
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
STABLE = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "67108864",
}
"""Read when the process starts: freed memory is kept for reuse."""

PAGE = """{text}

## Conditions

```text
{command}
```

{processor}, {threads} threads of torch, {system}. Python {python}, {versions}. Seed 0.
Environment: {environment}. {minutes:.0f} minutes in all.
"""

Squares = dict[str, Tensor]
"""Σ over a batch's examples of squared gradients, by parameter name."""


Panel = tuple[str, str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]
"""Names of the x-axis and of the y-axis, and lines by name as (x, y)."""


def start(description: str) -> argparse.ArgumentParser:
    """Begin a benchmark's command line; the process restarts if STABLE is not set."""
    if not STABLE.keys() <= os.environ.keys():
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, {**STABLE, **os.environ})
    torch.manual_seed(0)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes, only to see that everything works; the page goes to experiments-output/",
    )
    return parser


def results_folder(quick: bool) -> Path:
    """Return the folder of pages and plots, which exists afterwards."""
    folder = ROOT / "experiments-output" if quick else ROOT / "docs" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_page(name: str, text: str, *, quick: bool, packages: Sequence[str] = ()) -> None:
    """Write NAME.md: the text, then the command and the conditions it ran under.

    Args:
        name: Of the page, without its suffix.
        text: Heading, paragraphs and tables, as Markdown.
        quick: Where to write it.
        packages: Distributions whose versions are stated beside torch's; missing ones are left out.
    """
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    versions = [f"{name} {installed(name)}" for name in ("torch", *packages) if installed(name)]
    page = PAGE.format(
        text=text.strip(),
        command=shlex.join([".venv/bin/python", str(script), *sys.argv[1:]]),
        processor=processor(),
        threads=torch.get_num_threads(),
        system=platform.system(),
        python=platform.python_version(),
        versions=", ".join(versions),
        environment=" ".join(f"`{key}={os.environ[key]}`" for key in STABLE if key in os.environ)
        or "nothing set",
        minutes=time.monotonic() / 60 - STARTED / 60,
    )
    path = results_folder(quick) / f"{name}.md"
    path.write_text(page, encoding="utf-8")
    print(path)


STARTED = time.monotonic()


def installed(distribution: str) -> str:
    """Return the distribution's version, or nothing where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def processor() -> str:
    """Return the processor's name and how many cores this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.machine()} ({capability}), {cores} cores"


def nll(likelihood: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """Return −log p(labels|x), summed over positions and examples: what is differentiated."""
    if likelihood == "gaussian":
        return (outputs - labels).square().sum() / 2
    if likelihood == "next-token-softmax":
        outputs, labels = outputs[:, :-1], labels[:, 1:]
    logits = outputs.flatten(0, -2)
    return functional.cross_entropy(logits, labels.flatten(), reduction="sum")


def forward_backward(model: nn.Module, inputs: Any, labels: Tensor, likelihood: str) -> None:
    """Do what every ratio is over: gradients of the batch's loss, left in `grad`."""
    model.zero_grad(set_to_none=True)
    nll(likelihood, outputs_of(model, inputs), labels).backward()


def outputs_of(model: nn.Module, inputs: Any) -> Tensor:
    """Call the model and return its output tensor or logits."""
    outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def squares_one_by_one(
    model: nn.Module, inputs: Any, labels: Tensor, likelihood: str, estimator: str = "empirical"
) -> Squares:
    """Return Σ_x E_y[(∇ log p(y|x))²] by one backward pass for every example and outcome.

    Args:
        model: In eval mode, of any dtype.
        inputs: A tensor, or a mapping of keyword arguments, with a row per example.
        labels: One row per example; of `empirical` the outcomes themselves.
        likelihood: As in consolidate, one that `nll` knows.
        estimator: `empirical`, or `exact` for a softmax over classes.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for i in range(len(labels)):
        outputs = outputs_of(model, take(inputs, slice(i, i + 1)))
        label = labels[i : i + 1]
        weighted = [(torch.tensor(1.0), label)]
        if estimator == "exact":
            weighted = [(p, torch.full_like(label, c)) for c, p in enumerate(outputs[0].softmax(0))]
        for weight, outcome in weighted:
            gradients = torch.autograd.grad(
                nll(likelihood, outputs, outcome),
                list(parameters.values()),
                retain_graph=len(weighted) > 1,
                allow_unused=True,
            )
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    totals[name].addcmul_(gradient, gradient, value=weight.item())
    return totals


def take(inputs: Any, rows: slice) -> Any:
    """Return those examples of a tensor or of every tensor in a mapping."""
    if isinstance(inputs, dict):
        return {key: take(value, rows) for key, value in inputs.items()}
    return inputs[rows]


def double(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    """Return a copy of the model in float64 and its inputs likewise; integers stay as they are."""
    return copy.deepcopy(model).double(), _double(inputs)


def _double(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {key: _double(value) for key, value in inputs.items()}
    return inputs.double() if inputs.is_floating_point() else inputs


class Double(TorchDispatchMode):
    """Make float64 where a model asks for float32 by name, as for its norms and softmaxes.

    Nothing else would show whether a formula is right in a model that is float64 in part only.
    """

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call the operator, with float64 in place of float32."""
        kwargs = kwargs or {}
        if kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return operator(*args, **kwargs)


def relative_errors(found: Squares, expected: Squares) -> dict[str, float]:
    """Return max |found − expected| / (max |expected| + floor) by parameter.

    The floor, machine precision times the largest value of all, is for what is truly zero, such as
    the bias of an attention key. Parameters that were not found are left out.
    """
    dtype = next(iter(found.values())).dtype
    floor = torch.finfo(dtype).eps * max(value.max().item() for value in expected.values())
    differences = {name: value.double() - expected[name] for name, value in found.items()}
    return {
        name: difference.abs().max().item() / (expected[name].max().item() + floor)
        for name, difference in differences.items()
    }


def plot_powers(picture: Path, panels: Sequence[Panel]) -> list[dict[str, float]]:
    """Draw log-log panels with a fitted power law through every line.

    Args:
        picture: The PNG to write.
        panels: From left to right.

    Returns:
        The fitted exponents by line, for every panel.
    """
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (4.6 * len(panels), 3.6)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, constrained_layout=True)
    exponents = []
    for axis, (x_name, y_name, lines) in zip(np.atleast_1d(axes), panels, strict=True):
        fitted = {}
        for name, (x, y) in lines.items():
            slope, offset = np.polyfit(np.log(x), np.log(y), 1)
            fitted[name] = float(slope)
            points = axis.loglog(x, y, "o", markersize=4, label=f"{name}: exponent {slope:.2f}")
            law = np.exp(offset) * np.asarray(x, dtype=float) ** slope
            axis.loglog(x, law, color=points[0].get_color(), linewidth=1)
        axis.set_xlabel(x_name)
        axis.set_ylabel(y_name)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1))  # above the points
        exponents.append(fitted)
    figure.savefig(picture, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return exponents


class Size(NamedTuple):
    """The shape of a model like Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int  # of keys and values


EMPTY = Size(8, 8, 1, 1, 1)
INTERVAL = 0.005  # seconds between two looks at a process


class Peak(NamedTuple):
    """The most memory that a part of a run had, in bytes."""

    own: int  # anonymous and shared
    mapped: int


class Watched(NamedTuple):
    """What was seen of a command."""

    peaks: dict[str, dict[int, Peak]]  # by part, and by the process's number
    seconds: float
    result: Any  # what it wrote as JSON


def make_checkpoint(folder: Path, size: Size, vocabulary: int = 32000) -> int:
    """Write a checkpoint with random weights, in a process of its own; return its parameters.

    Args:
        folder: Where to.
        size: The model's.
        vocabulary: The tokens that it tells apart.
    """
    script = f"""
import torch, transformers
from tokenizers import Tokenizer, models, pre_tokenizers

words = Tokenizer(models.WordLevel({{f"w{{i}}": i for i in range(100)}}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1")
config = transformers.LlamaConfig(
    vocab_size={vocabulary},
    hidden_size={size.hidden},
    intermediate_size={size.intermediate},
    num_hidden_layers={size.layers},
    num_attention_heads={size.heads},
    num_key_value_heads={size.groups},
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
model = transformers.LlamaForCausalLM(config)
model.save_pretrained({str(folder)!r})
tokenizer.save_pretrained({str(folder)!r})
print(sum(p.numel() for p in model.parameters()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


def write_texts(path: Path, seed: int, sequences: int, tokens: int) -> None:
    """Write texts of N random tokens each, the end of text included."""
    draw = random.Random(seed)
    texts = [
        " ".join(f"w{draw.randrange(2, 100)}" for _ in range(tokens - 1)) for _ in range(sequences)
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def watch(command: Sequence[str], parts: Sequence[str], turn: str, processes: int = 1) -> Watched:
    """Run a command that writes JSON, and watch its memory.

    Args:
        command: The program and its arguments.
        parts: What the run is called; if two, the second begins after the line that says `turn`.
        turn: The beginning of a line on stderr.
        processes: Where there are several, the command is a launcher, whose children know their
            numbers by the variable RANK.

    Raises:
        RuntimeError: The command fails.
    """
    began = time.monotonic()
    said: list[str] = []
    written: list[str] = []
    turned = threading.Event()
    peaks: dict[str, dict[int, Peak]] = {part: {} for part in parts}

    def listen(lines: IO[str]) -> None:
        for line in lines:
            said.append(line)
            if line.startswith(turn):
                turned.set()

    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        readers = [
            threading.Thread(target=listen, args=[process.stderr]),
            threading.Thread(target=lambda lines: written.extend(lines), args=[process.stdout]),
        ]
        for reader in readers:
            reader.start()
        numbers = {0: process.pid} if processes == 1 else {}
        while process.poll() is None:
            if len(numbers) < processes:
                numbers |= children_of(process.pid)
            seen = peaks[parts[-1] if turned.is_set() else parts[0]]
            for number, worker in numbers.items():
                now, most = memory_of(worker), seen.get(number, Peak(0, 0))
                seen[number] = Peak(max(most.own, now.own), max(most.mapped, now.mapped))
            time.sleep(INTERVAL)
        for reader in readers:
            reader.join()
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{''.join(said)}")
    return Watched(peaks, time.monotonic() - began, json.loads("".join(written)))


def children_of(launcher: int) -> dict[int, int]:
    """Return the processes that a launcher has started, by their RANK."""
    found: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0") if parent == launcher else []
        except OSError:  # which has ended, or is not ours
            continue
        ranks = [value.partition(b"=")[2] for value in variables if value.startswith(b"RANK=")]
        found |= {int(rank): int(folder.name) for rank in ranks}
    return found


def memory_of(process: int) -> Peak:
    """Return what a process has in memory now; nothing once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return Peak(0, 0)
    sizes = {
        key: 1024 * int(value.split()[0])
        for key, _, value in (line.partition(":") for line in lines)
        if key.startswith("Rss")
    }
    if not sizes:
        return Peak(0, 0)
    return Peak(sizes["RssAnon"] + sizes["RssShmem"], sizes["RssFile"])


class Logits(nn.Module):
    """A transformers model as a function of one tensor, as the other tools ask for."""

    def __init__(self, model: nn.Module, name: str):
        super().__init__()
        self.model = model
        self.name = name

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the model's logits."""
        return self.model(**{self.name: inputs}).logits


class Block(nn.Module):
    """The residual block of ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(f(x) + x)."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet18(widths: Sequence[int] = (64, 128, 256, 512), blocks: int = 2) -> nn.Sequential:
    """Make torchvision's ResNet-18 for 10 classes; its batch norms hold statistics of noise."""
    layers = [nn.Conv2d(3, widths[0], 7, 2, 3, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    before = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(Block(before, width, 2 if stage and not block else 1))
            before = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10)]
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(32, 3, 64, 64))
    return model


def mlp(inputs: int = 784, width: int = 400) -> nn.Sequential:
    """Make a network of two hidden layers and 10 outputs."""
    return nn.Sequential(
        *(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, 10),
    )


@dataclass(frozen=True)
class Workload:
    """A model, one batch and what is asked of them."""

    title: str
    make: Callable[[bool], nn.Module]  # from whether it is a quick run
    shape: tuple[int, ...]  # of the inputs
    likelihood: str = "softmax"
    tokens: int = 0  # the inputs are ids below it
    estimator: str = "empirical"
    chunk: int = 8  # examples that vmap takes at once

    def batch(self, quick: bool) -> tuple[Tensor, Tensor]:
        """Return the inputs and the labels."""
        shape = (min(self.shape[0], 8), *self.shape[1:]) if quick else self.shape
        ids = quick_size(self.tokens, 500, quick)
        inputs = torch.randint(ids, shape) if self.tokens else torch.randn(shape)
        causal = self.likelihood == "next-token-softmax"
        return inputs, inputs if causal else torch.randint(10, shape[:1])


def quick_size(full: int, small: int, quick: bool) -> int:
    """Return the smaller of both in a quick run, else the full one."""
    return min(full, small) if quick else full


def _bert(quick: bool) -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=quick_size(30522, 500, quick),
        **_encoder(quick),
    )
    return Logits(transformers.BertForSequenceClassification(config), "input_ids")


def _gpt2(quick: bool) -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=quick_size(50257, 500, quick),
        n_embd=384,
        n_layer=quick_size(6, 1, quick),
        n_head=6,
        n_positions=128,
        use_cache=False,
    )
    return Logits(transformers.GPT2LMHeadModel(config), "input_ids")


def _llama(quick: bool) -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=quick_size(32000, 500, quick),
        **(_encoder(quick) | {"intermediate_size": 1024}),
        num_key_value_heads=2,
        max_position_embeddings=128,
        use_cache=False,
    )
    return Logits(transformers.LlamaForCausalLM(config), "input_ids")


def _vit(quick: bool) -> nn.Module:
    import transformers

    config = transformers.ViTConfig(image_size=96, patch_size=8, **_encoder(quick))
    return Logits(transformers.ViTForImageClassification(config), "pixel_values")


def _encoder(quick: bool) -> dict[str, Any]:
    layers = quick_size(6, 1, quick)
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
    return {**sizes, "num_hidden_layers": layers, "num_labels": 10}


def _resnet(quick: bool) -> nn.Module:
    return resnet18((8, 16), 1) if quick else resnet18()


def _mlp(quick: bool) -> nn.Module:
    return mlp()


CAUSAL = "next-token-softmax"
WORKLOADS = {
    "mlp": Workload("MLP 784-400-400-10, batch 256", _mlp, (256, 784), chunk=32),
    "mlp1024": Workload("MLP 784-400-400-10, batch 1024", _mlp, (1024, 784), chunk=32),
    "resnet64": Workload("ResNet-18, 64 px, batch 32", _resnet, (32, 3, 64, 64)),
    "resnet32": Workload("ResNet-18, 32 px, batch 32", _resnet, (32, 3, 32, 32)),
    "bert": Workload("BERT 6×384, T = 128, batch 16", _bert, (16, 128), tokens=30522),
    "gpt2": Workload("GPT-2 6×384, T = 128, batch 8, tied head", _gpt2, (8, 128), CAUSAL, 50257),
    "llama": Workload("Llama 6×384, T = 128, batch 8", _llama, (8, 128), CAUSAL, 32000),
    "vit": Workload("ViT 6×384, 144 patches, batch 16", _vit, (16, 3, 96, 96)),
    "exact": Workload(
        "MLP 784-400-400-10, batch 256, exact over 10 classes",
        _mlp,
        (256, 784),
        estimator="exact",
    ),
}
