"""EWC with the structure `inputs`, of many texts that the model generates: the curve is over λ."""

from scripts.experiments.lib.text_sources import GENERATED, protected_by_inputs
from scripts.experiments.lib.tuning import Done, Job


def tune(job: Job) -> Done:
    """Generate, measure, train."""
    return protected_by_inputs(job, GENERATED, 16 * job.setting.fisher_rows)
