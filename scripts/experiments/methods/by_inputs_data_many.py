"""EWC with the structure `inputs`, of many rows of the old task's text: the curve is over λ."""

from scripts.experiments.lib.text_sources import DATA, protected_by_inputs
from scripts.experiments.lib.tuning import Done, Job


def tune(job: Job) -> Done:
    """Measure, train."""
    setting = job.setting
    count = min(16 * setting.fisher_rows, len(setting.old.train))
    return protected_by_inputs(job, DATA, count)
