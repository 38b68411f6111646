"""Compare the time of a training step with and without the penalty: docs/results/penalty.md.

All forms of a step take turns on one model and one optimizer, so that slow periods of the machine
and the placement of tensors in memory affect them all.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from consolidate.ewc.block_penalty import BlockPenalty
from consolidate.ewc.penalty import Penalty, WeightPenalty
from formats.fisher_json import Block
from scripts.benchmarks import harness
from scripts.benchmarks.harness import Workload, nll, start, write_page
from scripts.experiments.lib.common import markdown

NAMES = ("mlp", "bert", "minilm")
WORKLOADS = harness.WORKLOADS | {
    "minilm": replace(
        harness.WORKLOADS["bert"], title="BERT 6×384 as MiniLM, T = 64, batch 16", shape=(16, 64)
    )
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "SGD": torch.optim.SGD,
}
LAMBDA = 10.0
RATE = 1e-5  # small, so that no form trains away from where the others are timed

TEXT = """
# The penalty beside the training step

Wall time of a whole optimizer step (`zero_grad`, forward, backward, penalty, `optimizer.step`) over
the same step without a penalty. All forms take turns in one process, in a new random order each
round, on one model with one optimizer; ratios of medians of at least {rounds} rounds.{quick}

{summary}

{details}

*Gradient* is `penalty.add_gradient_()` after `backward`, *proximal* is `penalty.proximal_step_`
after the optimizer's step. *Autograd* is the usual form, `loss + λ/2 · Σ (Λ * (θ − μ) ** 2).sum()`
before `backward`. *Blocks* is `add_gradient_()` of a `BlockPenalty` with a matrix R for every
linear layer of at most four times as many inputs as outputs: one product out × n × n for each,
whatever the batch. Λ, μ and R are float32 unless another dtype is named; the Fisher is noise, and
the weights differ from their anchor.
"""

Step = Callable[[], None]


def forms(
    workload: Workload, model: nn.Module, optimizer: torch.optim.Optimizer, quick: bool
) -> dict[str, Step]:
    """Return a training step without a penalty, and the same with it in each form.

    Args:
        workload: Whose batch is trained on.
        model: In train mode.
        optimizer: Of the model's parameters.
        quick: At tiny sizes.
    """
    inputs, labels = workload.batch(quick)
    parameters = dict(model.named_parameters())
    fisher = {name: torch.rand_like(p) for name, p in parameters.items()}
    anchor = {name: p.detach() + 1e-3 * torch.randn_like(p) for name, p in parameters.items()}
    penalty = Penalty(model, fisher, anchor, ewc_lambda=LAMBDA)
    narrow = Penalty(model, fisher, anchor, ewc_lambda=LAMBDA, dtype=torch.bfloat16)
    covered = of_blocks(model, fisher)
    by_blocks = BlockPenalty(model, fisher, anchor, **covered, ewc_lambda=LAMBDA)

    def loss() -> Tensor:
        optimizer.zero_grad()
        return nll(workload.likelihood, model(inputs), labels) / len(labels)

    def plain() -> None:
        loss().backward()
        optimizer.step()

    def gradient(penalty: WeightPenalty) -> Step:
        def step() -> None:
            loss().backward()
            penalty.add_gradient_()
            optimizer.step()

        return step

    def gradient_and_value() -> None:
        loss().backward()
        penalty.value_and_add_gradient_()
        optimizer.step()

    def proximal() -> None:
        plain()
        penalty.proximal_step_(optimizer)

    def autograd() -> None:
        pull: Any = sum((fisher[n] * (p - anchor[n]) ** 2).sum() for n, p in parameters.items())
        (loss() + LAMBDA / 2 * pull).backward()
        optimizer.step()

    return {
        "no penalty": plain,
        "gradient": gradient(penalty),
        "gradient and value": gradient_and_value,
        "gradient, bfloat16": gradient(narrow),
        "blocks": gradient(by_blocks),
        "proximal": proximal,
        "autograd": autograd,
    }


def of_blocks(model: nn.Module, fisher: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return noise as the R of every linear layer that is not too narrow, and the blocks.

    Args:
        model: Whose layers are covered.
        fisher: By parameter name; each R gets its trace.
    """
    factors, blocks = {}, {}
    for layer, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module.in_features > 4 * module.out_features:
            continue
        ends = tuple(f"{layer}.{name}" for name, _ in module.named_parameters())
        n = module.in_features + len(ends) - 1
        noise = torch.rand(n, n)
        matrix = (noise + noise.T) / 2
        matrix *= float(sum(fisher[end].sum() for end in ends) / matrix.trace())
        factors[f"{layer}.weight.R"] = matrix
        blocks[f"{layer}.weight.R"] = Block("R", (1,), ends)
    return {"factors": factors, "blocks": blocks}


def measure(
    name: str, optimizer_name: str, quick: bool, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Return the seconds that each form's steps took.

    Args:
        name: Of the workload.
        optimizer_name: A key of OPTIMIZERS.
        quick: At tiny sizes.
        rounds: How often each form is timed, at least.
        seconds: How long the rounds take, at least.
    """
    workload = WORKLOADS[name]
    torch.manual_seed(0)
    model = workload.make(quick).train()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters(), lr=RATE)
    steps = forms(workload, model, optimizer, quick)
    times: dict[str, list[float]] = {form: [] for form in steps}
    for step in steps.values():
        step()  # Once for what is made at the first call.
    began = time.monotonic()
    gc.disable()
    order = random.Random(0)
    while rounds > 0 or time.monotonic() - began < seconds:
        rounds -= 1
        gc.collect()
        # What runs before a step decides what it finds in the cache.
        for form, step in order.sample(list(steps.items()), len(steps)):
            before = time.perf_counter()
            step()
            times[form].append(time.perf_counter() - before)
    gc.enable()
    return times


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Return each form's median over that without a penalty."""
    plain = statistics.median(times["no penalty"])
    return {form: statistics.median(found) / plain for form, found in times.items()}


def detail(title: str, times: dict[str, list[float]]) -> str:
    """Write the times of one workload with one optimizer."""
    lines = [
        [form, f"{1000 * statistics.median(found):.2f}", f"{1000 * min(found):.2f}", f"{ratio:.3f}"]
        for (form, found), ratio in zip(times.items(), ratios(times).values(), strict=True)
    ]
    table = markdown(["", "median, ms", "least, ms", "ratio"], lines)
    return f"## {title}\n\n{len(times['no penalty'])} rounds.\n\n{table}"


def main() -> None:
    """Measure both workloads with both optimizers and write the page."""
    options = start(__doc__.splitlines()[0]).parse_args()
    rounds, seconds = (2, 0.0) if options.quick else (9, 60.0)
    tables = {
        f"{WORKLOADS[name].title}, {optimizer}": measure(
            name, optimizer, options.quick, rounds, seconds
        )
        for name in NAMES
        for optimizer in OPTIMIZERS
    }
    forms_but_one = list(next(iter(tables.values())))[1:]
    write_page(
        "penalty",
        TEXT.format(
            rounds=rounds,
            quick=" **A quick run at tiny sizes: its figures mean nothing.**" * options.quick,
            summary=markdown(
                ["", *forms_but_one],
                [
                    [title, *(f"{ratios(times)[form]:.3f}" for form in forms_but_one)]
                    for title, times in tables.items()
                ],
            ),
            details="\n\n".join(detail(title, times) for title, times in tables.items()),
        ),
        quick=options.quick,
        packages=["transformers"],
    )


if __name__ == "__main__":
    main()
