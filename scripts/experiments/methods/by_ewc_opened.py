"""EWC with the Fisher of generated turns of a user: the curve is over λ."""

from scripts.experiments.lib.text_sources import OPENED, protected
from scripts.experiments.lib.tuning import Done, Job


def tune(job: Job) -> Done:
    """Generate, measure, train."""
    return protected(job, OPENED, job.setting.fisher_rows)
