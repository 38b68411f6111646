"""The Fisher with the structure `inputs` by the library: of a start, or of a task of a chain."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from consolidate.estimation.fisher_diagonal import fisher_diagonal
from formats.fisher_json import Block
from scripts.experiments.lib.kept import kept
from scripts.experiments.lib.tuning import Job

SUFFIX = ".R"
"""Of the name of a matrix, after that of its weight."""


class BlockFisher(NamedTuple):
    """A diagonal, and the matrices of the layers that have one."""

    diagonal: dict[str, Tensor]
    factors: dict[str, Tensor]
    blocks: dict[str, Block]


def block_fisher(job: Job) -> BlockFisher:
    """Return the Fisher of the job's start on rows of the old task, measured once and kept.

    In a chain the sum over the tasks so far is kept there already.
    """
    found, _ = kept(job.fisher_name, lambda: (measured(job, job.setting.seed), None))
    factors = {name: tensor for name, tensor in found.items() if name.endswith(SUFFIX)}
    return BlockFisher(
        {name: tensor for name, tensor in found.items() if name not in factors},
        factors,
        {name: block_of(name, matrix, job.model) for name, matrix in factors.items()},
    )


def task_block_fisher(job: Job, number: int) -> Mapping[str, Tensor]:
    """Return the Fisher of the task of a chain before the job's, on its first rows."""
    return measured(job, 100 * job.setting.seed + number)


def measured(job: Job, seed: int) -> dict[str, Tensor]:
    """Measure diagonal and matrices, by names that tell them apart."""
    setting = job.setting
    found = fisher_diagonal(
        job.start(),
        setting.fisher_batches(),
        setting.likelihood,
        estimator=setting.estimator,
        structure="inputs",
        seed=seed,
    )
    return {**found, **found.factors}


def block_of(name: str, matrix: Tensor, model: nn.Module) -> Block:
    """Return the block of a matrix: of a weight whose first dimension is that of the outputs."""
    weight = name.removesuffix(SUFFIX)
    shape = model.get_parameter(weight).shape
    biased = len(matrix) > shape[1:].numel()
    bias = weight.removesuffix("weight") + "bias"
    return Block("R", tuple(range(1, len(shape))), (weight, bias) if biased else (weight,))
