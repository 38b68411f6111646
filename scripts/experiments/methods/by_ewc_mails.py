"""EWC with the Fisher of texts of another domain: the curve is over λ."""

from scripts.experiments.lib.text_sources import MAILS, protected
from scripts.experiments.lib.tuning import Done, Job


def tune(job: Job) -> Done:
    """Measure, train."""
    return protected(job, MAILS, job.setting.fisher_rows)
