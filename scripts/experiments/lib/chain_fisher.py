"""The Fisher of one task of a chain by the library, at the weights before the next task."""

from collections.abc import Mapping

from torch import Tensor

from consolidate.estimation.fisher_diagonal import fisher_diagonal
from scripts.experiments.lib.tuning import Job


def task_fisher(job: Job, number: int) -> Mapping[str, Tensor]:
    """Return the Fisher of the task before the job's, on its first rows."""
    setting = job.setting
    return fisher_diagonal(
        job.start(),
        setting.fisher_batches(),
        setting.likelihood,
        estimator=setting.estimator,
        seed=100 * setting.seed + number,
    )
