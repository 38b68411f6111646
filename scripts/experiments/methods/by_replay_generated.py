"""Replay of texts that the model generates, some in every step: the curve is over their weight."""

from typing import Any

from torch import Tensor, nn

from scripts.experiments.lib.running_text import packed_rows
from scripts.experiments.lib.text_sources import GENERATED, rows_of
from scripts.experiments.lib.tuning import Done, Job, fit


def tune(job: Job) -> Done:
    """Train all weights on the new rows and, weighted, on a quarter as many generated ones."""
    setting: Any = job.setting
    texts = rows_of(job, GENERATED, setting.fisher_rows)
    tokens = [token for row in texts for token in row.tokens]
    rows = packed_rows(tokens, len(setting.new.train[0]))
    generated = map(setting.batch, job.rows(rows, setting.batch_size // 4, 2))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        new, again = batch
        value: Tensor = setting.loss(model, new) + job.strength * setting.loss(model, again)
        return value

    batches = zip(job.new_batches(), generated, strict=True)
    return fit(job.model, batches, loss, rate=job.rate, steps=setting.steps)
