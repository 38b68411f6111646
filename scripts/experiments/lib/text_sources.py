"""Fishers of a language model on texts of several sources, made once for a start and kept."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from consolidate.estimation.fisher_diagonal import fisher_diagonal
from consolidate.estimation.likelihoods import IGNORED
from consolidate.ewc.block_penalty import BlockPenalty
from consolidate.ewc.penalty import Penalty
from consolidate.models.sampling import Distribution, continued, up_to_end
from scripts.experiments.lib.block_fisher import SUFFIX, block_of
from scripts.experiments.lib.kept import kept
from scripts.experiments.lib.tuning import Done, Job, fit

DATA = "data"  # training text of the old task; of the published model a proxy of it
OTHER_DATA = "other data"  # other rows of the same, to see how much chance does
GENERATED = "generated"
PROMPTED = "prompted"
OPENED = "opened"  # generated from what the chat template writes before a user's words
MAILS = "mails"  # another domain, which neither task has
RANDOM = "random tokens"
SOURCES = (DATA, OTHER_DATA, GENERATED, PROMPTED, OPENED, MAILS, RANDOM)
OWN = (GENERATED, PROMPTED, OPENED)

AT_A_TIME = 32  # texts that are generated together
READ = 4  # texts that are measured together


class Row(NamedTuple):
    """A text, and how many tokens at its beginning are given and not predicted."""

    tokens: list[int]
    given: int = 1


def rows_of(job: Job, source: str, count: int) -> list[Row]:
    """Return the texts of a source.

    Args:
        job: Its start and its setting, which is one of running text.
        source: One of SOURCES.
        count: How many.
    """
    setting: Any = job.setting
    match source:
        case "data" | "other data":
            return [Row(one) for one in setting.spread(count, skip=source != DATA)]
        case "mails":
            return [Row(one) for one in setting.other[:count]]
        case "random tokens":
            generator = torch.Generator().manual_seed(setting.seed)
            size = (count, len(setting.other[0]))
            tokens = torch.randint(setting.vocabulary, size, generator=generator)
            return [Row(one) for one in tokens.tolist()]
        case "generated":
            return generated(job, source, [[setting.first]], count)
        case "prompted":
            return generated(job, source, setting.prompts, count)
        case "opened":
            return generated(job, source, [setting.opening], count)
    raise ValueError(source)


def generated(job: Job, source: str, prompts: Sequence[list[int]], count: int) -> list[Row]:
    """Let the start continue a source's prompts, in turn, to the length of the data's rows."""
    setting: Any = job.setting
    most = len(setting.other[0]) - 1

    def make() -> tuple[Mapping[str, Tensor], Any]:
        model = job.start()
        given = [prompts[i % len(prompts)] for i in range(count)]
        texts: list[list[int]] = [[]] * count
        for batch in _alike(given):
            distribution = Distribution(setting.seed, setting.ends, most)
            found = continued(model, [given[i] for i in batch], batch, distribution, cached=True)
            for i, ids in zip(batch, found.ids.tolist(), strict=True):
                texts[i] = up_to_end(ids[len(given[i]) :], setting.ends)
        return {}, [[given[i], texts[i]] for i in range(count)]

    texts = kept(f"{job.fisher_name}-{source}-{count}-texts", make)[1]
    return [Row([*prompt, *text], len(prompt)) for prompt, text in texts]


def _alike(given: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield the numbers of prompts of one length, AT_A_TIME of them."""
    order = sorted(range(len(given)), key=lambda i: len(given[i]))
    while order:
        some = [i for i in order[:AT_A_TIME] if len(given[i]) == len(given[order[0]])]
        yield some
        order = order[len(some) :]


def batches_of(rows: Sequence[Row]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield inputs and labels, padded on the right, which a causal model does not see."""
    for first in range(0, len(rows), READ):
        some = rows[first : first + READ]
        width = max(len(row.tokens) for row in some)
        ids = torch.zeros(len(some), width, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for i, row in enumerate(some):
            ids[i, : len(row.tokens)] = torch.tensor(row.tokens)
            labels[i, row.given : len(row.tokens)] = ids[i, row.given : len(row.tokens)]
        yield {"input_ids": ids}, labels


def source_fisher(
    job: Job, source: str, count: int, *, structure: str = "diagonal"
) -> dict[str, Tensor]:
    """Return the Fisher of the job's start on texts of a source.

    Generated texts are draws of the model, and count with their own labels; for all others labels
    are sampled.
    """

    def make() -> tuple[Mapping[str, Tensor], None]:
        found = fisher_diagonal(
            job.start(),
            batches_of(rows_of(job, source, count)),
            job.setting.likelihood,
            estimator="empirical" if source in OWN else "mc",
            structure=structure,
            seed=job.setting.seed,
        )
        return {**found, **found.factors}, None

    return kept(f"{job.fisher_name}-{source.replace(' ', '-')}-{count}-{structure}", make)[0]


def protected(job: Job, source: str, count: int) -> Done:
    """Train all weights, each pulled back by the Fisher of a source's texts."""
    penalty = Penalty(job.model, source_fisher(job, source, count), ewc_lambda=job.strength)
    return _fit(job, penalty.add_gradient_)


def protected_by_inputs(job: Job, source: str, count: int) -> Done:
    """Train all weights with the structure `inputs`, measured on a source's texts."""
    found = source_fisher(job, source, count, structure="inputs")
    factors = {name: tensor for name, tensor in found.items() if name.endswith(SUFFIX)}
    penalty = BlockPenalty(
        job.model,
        {name: tensor for name, tensor in found.items() if name not in factors},
        factors=factors,
        blocks={name: block_of(name, matrix, job.model) for name, matrix in factors.items()},
        ewc_lambda=job.strength,
    )
    return _fit(job, penalty.add_gradient_)


def _fit(job: Job, add_gradient: Any) -> Done:
    setting = job.setting
    return fit(
        job.model,
        job.new_batches(),
        setting.loss,
        rate=job.rate,
        steps=setting.steps,
        after_backward=add_gradient,
    )
