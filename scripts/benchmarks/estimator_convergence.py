"""How `mc` and `batched` converge to the exact Fisher diagonal: writes fisher-convergence.md."""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

import consolidate
from scripts.benchmarks.harness import Panel, mlp, plot_powers, results_folder, start, write_page
from scripts.experiments.lib.common import markdown

EXAMPLES = 256
TEXT = """
# How the sampled estimators converge

The relative error ‖F̂ − F‖ / ‖F‖ of the whole diagonal against the exact Fisher of the same
{examples} examples, root mean square over {seeds} seeds, with error ∝ n^exponent fitted to each
line. The network is an MLP 64-64-64-10 trained on ten Gaussian clusters to an accuracy of
{accuracy:.2f}.{quick}

![Error against samples per example and against squared batches](fisher-convergence.png)

{table}

The error of `mc` falls with the square root of the samples per example. The error of `batched`
falls with the square root of the number of squared batches, whatever their size: one pass in
batches of {examples} squares one batch and has an error of {once:.2f}; one pass of `mc` over the
same examples has {mc_once:.2f}.
"""


def clusters() -> tuple[Tensor, Tensor]:
    """Return overlapping clusters (EXAMPLES, 64) and which one each point is of."""
    labels = torch.arange(EXAMPLES) % 10
    return torch.randn(10, 64)[labels] + 2.5 * torch.randn(EXAMPLES, 64), labels


def trained(inputs: Tensor, labels: Tensor) -> tuple[nn.Module, float]:
    """Return a network that has learnt the clusters in part, and its accuracy on them."""
    model = mlp(64, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(40):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model, (model(inputs).argmax(1) == labels).double().mean().item()


def diagonal(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    size: int,
    estimator: str,
    samples: int = 1,
    seed: int = 0,
) -> Tensor:
    """Return the Fisher diagonal as one vector, from batches of that size."""
    batches = zip(*(tensor.split(size) for tensor in data), strict=True)
    fisher = consolidate.fisher_diagonal(
        model, batches, "softmax", estimator=estimator, mc_samples=samples, seed=seed
    )
    return torch.cat([tensor.flatten().double() for tensor in fisher.values()])


def errors(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    size: int,
    estimator: str,
    samples: Sequence[int],
    seeds: int,
) -> list[float]:
    """Return the root mean square over seeds of the relative error, for each number of samples."""
    exact = diagonal(model, data, EXAMPLES, "exact")
    found = []
    for count in samples:
        # Far apart, so that no seed's examples meet another's.
        trials = [diagonal(model, data, size, estimator, count, 1000 * k) for k in range(seeds)]
        squares = [((trial - exact).norm() / exact.norm()) ** 2 for trial in trials]
        found.append(torch.stack(squares).mean().sqrt().item())
    print(f"{estimator} in batches of {size}: {found[0]:.3f} … {found[-1]:.3f}", file=sys.stderr)
    return found


def main() -> None:
    """Measure both estimators and write the page and the plot."""
    quick = start(__doc__.splitlines()[0]).parse_args().quick
    samples, seeds = ((1, 2, 4, 8), 3) if quick else ((1, 2, 4, 8, 16, 32, 64, 128, 256), 10)
    data = clusters()
    model, accuracy = trained(*data)
    mc = errors(model, data, EXAMPLES, "mc", samples, seeds)
    batched = {size: errors(model, data, size, "batched", samples, seeds) for size in (256, 64, 16)}
    panels: list[Panel] = [
        ("samples per example", "relative error", {"mc": (samples, mc)}),
        (
            "squared batches",
            "relative error",
            {
                f"batched, {size} examples each": ([n * EXAMPLES // size for n in samples], found)
                for size, found in batched.items()
            },
        ),
    ]
    exponents = plot_powers(results_folder(quick) / "fisher-convergence.png", panels)
    rows = [
        [name, axis, f"{exponent:.3f}"]
        for (axis, _, _), fitted in zip(panels, exponents, strict=True)
        for name, exponent in fitted.items()
    ]
    text = TEXT.format(
        examples=EXAMPLES,
        seeds=seeds,
        accuracy=accuracy,
        quick=" **A quick run: its figures mean little.**" * quick,
        table=markdown(["", "against", "exponent"], rows),
        once=batched[EXAMPLES][0],
        mc_once=mc[0],
    )
    write_page("fisher-convergence", text, quick=quick)


if __name__ == "__main__":
    main()
