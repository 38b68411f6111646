"""Run time against examples and against parameters: is it linear, as the paper says of EWC."""

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from consolidate.estimation.fisher_diagonal import fisher_diagonal
from consolidate.training.loop import seeded
from scripts.experiments.lib.common import markdown
from scripts.experiments.lib.networks import mlp
from scripts.experiments.lib.pictures import COLOURS, panels, save_picture, write_csv
from scripts.experiments.lib.records import (
    Experiment,
    Figures,
    Findings,
    Record,
    Row,
    Unit,
    chosen,
    mean,
    signed,
)
from scripts.experiments.lib.sittings import main

NAME = "run-time"
EXAMPLES, PARAMETERS = "examples", "parameters"
MLP, BERT = "MLP", "BERT"
FISHER, TRAINING = "Fisher", "forward and backward"
SIZES = {  # batches of each example count, or widths of each network
    (EXAMPLES, MLP): (10, 30, 100, 300, 1000),
    (EXAMPLES, BERT): (10, 30, 100, 300, 1000),
    (PARAMETERS, MLP): (256, 500, 1000, 2200, 4800),
    (PARAMETERS, BERT): (96, 192, 320, 576, 960),
}
BATCH = {(EXAMPLES, MLP): 128, (EXAMPLES, BERT): 4, (PARAMETERS, MLP): 512, (PARAMETERS, BERT): 16}
SECONDS = {
    (EXAMPLES, MLP): 100,
    (EXAMPLES, BERT): 300,
    (PARAMETERS, MLP): 80,
    (PARAMETERS, BERT): 90,
}
ROUNDS = 5
BATCHES = 2  # of each pass where the number of parameters grows
TOKENS, VOCABULARY = 64, 100
TEXT = """
Wall time t of whole passes of the empirical Fisher on one thread, and of plain forward and backward
passes over the same batches, taking turns in one process, {rounds} rounds after one that warms up;
t ∝ n^exponent is fitted to each round. Mean exponent and its standard error over the rounds, and
the median of the ratio of both times at the largest size:

{table}

![Time against examples and against parameters](run-time.png)

Examples: an MLP 784–400–400–10 in batches of {images}, and a BERT of 2 layers × 128 in batches of
{texts} texts of {tokens} tokens. Parameters: the MLP's width at {batches} batches of {wide_images},
and the width of a BERT of 4 layers at {batches} batches of {wide_texts} texts. Both are random. A
pass of the Fisher compares its first batch with single examples. Against examples that is a fixed
cost, which lowers the exponent; where there are {batches} batches only it raises the ratio. The
cost of calls, which is most of a pass of small matrices such as those of the BERT against examples,
also raises the ratio, and lowers the exponents of a BERT against parameters. Longer passes of
larger networks [have a page](../fisher.md).
"""


class Pass(NamedTuple):
    """Passes over some data: the Fisher's, and those of training."""

    size: int  # examples, or parameters
    run: dict[str, Callable[[], object]]


class Logits(nn.Module):
    """A BERT of random weights as a function of the tokens."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        import transformers

        self.model = transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=width // 32,
                max_position_embeddings=TOKENS,
            )
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        return self.model(input_ids=tokens).logits


def plan(records: Sequence[Record], quick: bool) -> list[Unit]:
    """List each network against examples and against parameters."""
    return [
        Unit(
            NAME,
            network,
            0,
            {
                "against": against,
                "sizes": [1, 2, 4] if quick and against == EXAMPLES else
                [32, 64] if quick else list(sizes),
                "batch_size": 4 if quick else BATCH[against, network],
                "rounds": 2 if quick else ROUNDS,
            },
        )
        for (against, network), sizes in SIZES.items()
    ]  # fmt: skip


def cost(unit: Unit) -> float:
    """Return about how long a unit takes on one core."""
    return SECONDS[unit.settings["against"], unit.method]


def measure(unit: Unit) -> Figures:
    """Time all sizes, which take turns."""
    with seeded(unit.seed):
        passes = [_passes(unit, size) for size in unit.settings["sizes"]]
    times: dict[str, list[list[float]]] = {FISHER: [], TRAINING: []}
    for turn in range(unit.settings["rounds"] + 1):
        found: dict[str, list[float]] = {FISHER: [], TRAINING: []}
        for one in passes:
            for kind, run in one.run.items():
                gc.collect()
                began = time.perf_counter()
                run()
                found[kind].append(time.perf_counter() - began)
        if turn:  # the first one warms up
            for kind, line in found.items():
                times[kind].append(line)
    return {"n": [one.size for one in passes], **times}


def _passes(unit: Unit, size: int) -> Pass:
    """Make a network and a batch, and the passes over as many batches as the size asks for."""
    against, examples = unit.settings["against"], unit.settings["batch_size"]
    width = size if against == PARAMETERS else {MLP: 400, BERT: 128}[unit.method]
    count = BATCHES if against == PARAMETERS else size
    if unit.method == MLP:
        model: nn.Module = mlp({"sizes": (784, width, width, 10)})
        inputs, labels = torch.randn(examples, 784), torch.randint(10, (examples,))
    else:
        model = Logits(width, 4 if against == PARAMETERS else 2)
        inputs = torch.randint(VOCABULARY, (examples, TOKENS))
        labels = torch.randint(2, (examples,))
    model.eval()

    def fisher() -> object:
        repeated = ((inputs, labels) for _ in range(count))
        return fisher_diagonal(model, repeated, "softmax", estimator="empirical")

    def training() -> None:
        for _ in range(count):
            model.zero_grad(set_to_none=True)
            cross_entropy(model(inputs), labels).backward()

    parameters = sum(p.numel() for p in model.parameters())
    n = parameters if against == PARAMETERS else count * examples
    return Pass(n, {FISHER: fisher, TRAINING: training})


def exponents(sizes: Sequence[float], rounds: Sequence[Sequence[float]]) -> list[float]:
    """Fit t ∝ n^exponent to each round.

    Args:
        sizes: n.
        rounds: The times of all sizes, by round.

    Returns:
        One exponent a round.
    """
    return [float(np.polyfit(np.log(sizes), np.log(times), 1)[0]) for times in rounds]


def report(records: Sequence[Record], folder: Path) -> Findings:
    """Draw the times, and give the exponents."""
    rows, table = [], []
    for against, network in SIZES:
        figure = f"run time: exponent of time against {against}, {network}"
        row = Row(figure, "1 (linear)")
        for record in chosen(records, method=network, against=against):
            found = record.figures
            fitted = {kind: mean(exponents(found["n"], found[kind])) for kind in (FISHER, TRAINING)}
            value = fitted[FISHER].value
            row = row._replace(
                here=f"{value:.2f}",
                difference=signed(value - 1),
                reason=f"training itself has {fitted[TRAINING].value:.2f} on this machine, from "
                f"{found['n'][0]:,} to {found['n'][-1]:,}",
            )
            ratio = np.median(np.array(found[FISHER])[:, -1] / np.array(found[TRAINING])[:, -1])
            cells = [f"{one.value:.2f} ± {one.error:.2f}" for one in fitted.values()]
            table.append([f"{against}, {network}", *cells, f"{ratio:.2f}"])
        rows.append(row)
    if not records:
        return Findings("", rows)
    _draw(records, folder)
    write_csv(
        folder,
        NAME,
        ["network", "against", "n", "pass", "round", "seconds"],
        [
            [record.unit.method, record.unit.settings["against"], n, kind, turn + 1, times[i]]
            for record in records
            for kind in (FISHER, TRAINING)
            for turn, times in enumerate(record.figures[kind])
            for i, n in enumerate(record.figures["n"])
        ],
    )
    header = ["", "exponent of the Fisher", "of forward and backward", "ratio at the largest"]
    text = TEXT.format(
        rounds=records[0].unit.settings["rounds"],
        table=markdown(header, table),
        batches=BATCHES,
        tokens=TOKENS,
        images=BATCH[EXAMPLES, MLP],
        texts=BATCH[EXAMPLES, BERT],
        wide_images=BATCH[PARAMETERS, MLP],
        wide_texts=BATCH[PARAMETERS, BERT],
    )
    return Findings(text.strip(), rows)


def _draw(records: Sequence[Record], folder: Path) -> None:
    figure, axes = panels(2, width=4.6, height=4)
    for against, axis in zip((EXAMPLES, PARAMETERS), axes, strict=True):
        colours = iter(COLOURS)
        for record in chosen(records, against=against):
            n = np.array(record.figures["n"], dtype=float)
            for kind in (FISHER, TRAINING):
                times = np.array(record.figures[kind])  # (rounds, sizes)
                middle, colour = np.median(times, 0), next(colours)
                exponent = mean(exponents(record.figures["n"], record.figures[kind])).value
                offset = np.mean(np.log(middle) - exponent * np.log(n))
                label = f"{record.unit.method}, {kind}: exponent {exponent:.2f}"
                axis.loglog(n, middle, "o", ms=4, color=colour, label=label)
                axis.loglog(n, np.exp(offset) * n**exponent, color=colour, lw=1)
        axis.set_xlabel(against)
        axis.legend(fontsize="x-small", loc="lower left", bbox_to_anchor=(0, 1))
    axes[0].set_ylabel("seconds")
    save_picture(figure, folder, NAME)


EXPERIMENT = Experiment(NAME, "Run time", cost, plan, measure, report, alone=True)

if __name__ == "__main__":
    main(EXPERIMENT)
