"""The embeddings and the lower layers frozen: the curve is over how many layers."""

from scripts.experiments.lib.tuning import Done, Job, fit


def tune(job: Job) -> Done:
    """Train what is above the embeddings and a number of layers."""
    setting = job.setting
    frozen = [begin for layer in setting.layers()[: 1 + int(job.strength)] for begin in layer]
    for name, parameter in job.model.named_parameters():
        if name.startswith(tuple(frozen)):
            parameter.requires_grad_(False)
    return fit(job.model, job.new_batches(), setting.loss, rate=job.rate, steps=setting.steps)
