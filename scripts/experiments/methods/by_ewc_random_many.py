"""EWC with the Fisher of many texts of random tokens: the curve is over λ."""

from scripts.experiments.lib.text_sources import RANDOM, protected
from scripts.experiments.lib.tuning import Done, Job


def tune(job: Job) -> Done:
    """Measure, train."""
    return protected(job, RANDOM, 16 * job.setting.fisher_rows)
