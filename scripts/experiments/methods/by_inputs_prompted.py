"""EWC with the structure `inputs`, of answers to prompts: the curve is over λ."""

from scripts.experiments.lib.text_sources import PROMPTED, protected_by_inputs
from scripts.experiments.lib.tuning import Done, Job


def tune(job: Job) -> Done:
    """Generate, measure, train."""
    return protected_by_inputs(job, PROMPTED, job.setting.fisher_rows)
