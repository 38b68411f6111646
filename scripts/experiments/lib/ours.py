"""The Fisher of the old task by the library, measured once for a start and kept."""

from collections.abc import Mapping

from torch import Tensor

from consolidate.estimation.fisher_diagonal import fisher_diagonal
from scripts.experiments.lib.kept import kept
from scripts.experiments.lib.tuning import Job


def fisher(job: Job) -> dict[str, Tensor]:
    """Return the Fisher of the job's start on rows of the old task."""

    def make() -> tuple[Mapping[str, Tensor], None]:
        setting = job.setting
        return fisher_diagonal(
            job.start(),
            setting.fisher_batches(),
            setting.likelihood,
            estimator=setting.estimator,
            seed=setting.seed,
        ), None

    return kept(job.fisher_name, make)[0]
