"""Cost of the Fisher diagonal against examples and against parameters: writes fisher-scaling.md.

A whole pass of consolidate.fisher_diagonal, comparison with single examples included, beside plain
forward and backward passes over the same batches; all sizes take turns in one process.
"""

import gc
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from benchmarks import (
    Logits,
    Panel,
    forward_backward,
    markdown,
    mlp,
    plot_powers,
    results_folder,
    start,
    write_page,
)
from torch import Tensor, nn

import consolidate

EXAMPLES, PARAMETERS = "examples", "parameters"
TEXT = """
# Cost against examples and parameters

Wall time t of whole passes, medians of {rounds}, with t ∝ n^exponent fitted to the points of each
line: of consolidate's empirical Fisher, first batch compared with single examples, and of plain
forward and backward passes over the same batches.{quick}

![Time against examples and against parameters](fisher-scaling.png)

{table}

Examples: an MLP 784-400-400-10 in batches of 128, and a BERT of 2 layers × 128 in batches of 4
texts of 64 tokens. Parameters: the MLP's width at {images} examples in batches of 512, and the
width of a BERT of 4 layers at {texts} texts of 64 tokens in batches of 16.
"""


class Pass(NamedTuple):
    """A point of the plot and how to time it."""

    panel: str
    line: str
    size: int
    run: Callable[[], object]


def bert(width: int, layers: int) -> nn.Module:
    """Make a BERT whose parameters are nearly all in its layers."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=64,
    )
    return Logits(transformers.BertForSequenceClassification(config), "input_ids")


def texts(size: int) -> tuple[Tensor, Tensor]:
    """Return random ids of 64 tokens and labels."""
    return torch.randint(100, (size, 64)), torch.randint(2, (size,))


def images(size: int) -> tuple[Tensor, Tensor]:
    """Return random inputs of the MLP and labels."""
    return torch.randn(size, 784), torch.randint(10, (size,))


def both(
    panel: str, name: str, model: nn.Module, batch: tuple[Tensor, Tensor], batches: int
) -> list[Pass]:
    """Return consolidate's pass and the training passes over that many equal batches."""
    model.eval()
    size = (
        batches * len(batch[1]) if panel == EXAMPLES else sum(p.numel() for p in model.parameters())
    )

    def fisher() -> object:
        repeated = (batch for _ in range(batches))
        return consolidate.fisher_diagonal(model, repeated, "softmax", estimator="empirical")

    def training() -> None:
        for _ in range(batches):
            forward_backward(model, *batch, "softmax")

    return [
        Pass(panel, f"consolidate, {name}", size, fisher),
        Pass(panel, f"forward + backward, {name}", size, training),
    ]


def main() -> None:
    """Time all sizes and write the page and the plot."""
    options = start(__doc__.splitlines()[0]).parse_args()
    quick = options.quick
    counts = (10, 20, 40) if quick else (10, 30, 100, 300, 1000)
    widths = (64, 128, 256) if quick else (256, 500, 1000, 2200, 4800)
    bert_widths = (32, 64) if quick else (96, 192, 320, 576, 960)
    rounds, batches = (2, 1) if quick else (5, 2)
    passes: list[Pass] = []
    for count in counts:
        passes += both(EXAMPLES, "MLP", mlp(), images(128), count)
        passes += both(EXAMPLES, "BERT", bert(128, 2), texts(4), count)
    for width in widths:
        passes += both(PARAMETERS, "MLP", mlp(width=width), images(512), batches)
    for width in bert_widths:
        passes += both(PARAMETERS, "BERT", bert(width, 4), texts(16), batches)
    seconds: dict[Pass, list[float]] = defaultdict(list)
    for turn in range(rounds + 1):
        for timed in passes:
            gc.collect()
            began = time.perf_counter()
            timed.run()
            if turn:  # The first turn warms up.
                seconds[timed].append(time.perf_counter() - began)
        print(f"{turn} of {rounds} rounds", file=sys.stderr)
    panels: list[Panel] = []
    for panel in (EXAMPLES, PARAMETERS):
        lines: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        for timed in passes:
            if timed.panel == panel:
                lines[timed.line][0].append(timed.size)
                lines[timed.line][1].append(statistics.median(seconds[timed]))
        panels.append((panel, "seconds", dict(lines)))
    exponents = plot_powers(results_folder(quick) / "fisher-scaling.png", panels)
    rows = [[name, *(f"{fitted[name]:.2f}" for fitted in exponents)] for name in exponents[0]]
    text = TEXT.format(
        rounds=rounds,
        quick=" **A quick run at tiny sizes: its figures mean nothing.**" * quick,
        table=markdown(["exponent in", EXAMPLES, PARAMETERS], rows),
        images=512 * batches,
        texts=16 * batches,
    )
    write_page("fisher-scaling", text, quick=quick, packages=["transformers"])


if __name__ == "__main__":
    main()
