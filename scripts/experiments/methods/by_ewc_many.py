"""EWC with the Fisher of many texts that the model generates: the curve is over λ."""

from scripts.experiments.lib.text_sources import GENERATED, protected
from scripts.experiments.lib.tuning import Done, Job

TIMES = 16
"""The texts, divided by those of other methods."""


def tune(job: Job) -> Done:
    """Generate, measure, train."""
    return protected(job, GENERATED, TIMES * job.setting.fisher_rows)
