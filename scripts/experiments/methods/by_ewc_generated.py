"""EWC with the Fisher of texts that the model generates: the curve is over λ."""

from scripts.experiments.lib.text_sources import GENERATED, protected
from scripts.experiments.lib.tuning import Done, Job


def tune(job: Job) -> Done:
    """Generate, measure, train."""
    return protected(job, GENERATED, job.setting.fisher_rows)
