"""EWC with the structure `inputs`, of many texts of random tokens: the curve is over λ."""

from scripts.experiments.lib.text_sources import RANDOM, protected_by_inputs
from scripts.experiments.lib.tuning import Done, Job


def tune(job: Job) -> Done:
    """Measure, train."""
    return protected_by_inputs(job, RANDOM, 16 * job.setting.fisher_rows)
