"""The Fisher of softmax(z/T), times T², by the library; measured once for a start and kept."""

from collections.abc import Mapping

import torch
from torch import Tensor

from consolidate.estimation.fisher_diagonal import fisher_diagonal
from scripts.experiments.lib.kept import kept
from scripts.experiments.lib.tuning import Job

TEMPERATURE = 4.0


def tempered_fisher(job: Job) -> dict[str, Tensor]:
    """Return T² times the Fisher of softmax(z/T) of the job's start, on rows of the old task."""
    return kept(job.fisher_name, lambda: (measured(job, TEMPERATURE), None))[0]


def measured(job: Job, temperature: float) -> Mapping[str, Tensor]:
    """Measure it on a model whose head is divided by T, which divides its logits.

    The gradients for the divided head are T times those for the head itself.
    """
    setting, model = job.setting, job.start()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(setting.head):
                parameter.div_(temperature)
    found = fisher_diagonal(
        model,
        setting.fisher_batches(),
        setting.likelihood,
        estimator=setting.estimator,
        seed=setting.seed,
    )
    return {
        name: one if name.startswith(setting.head) else temperature**2 * one
        for name, one in found.items()
    }
