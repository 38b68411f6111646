"""Runs that are interrupted where a test says."""

from collections.abc import Iterator
from typing import Any

import pytest

import consolidate
from consolidate.commands import finetune_run
from consolidate.training.loop import Step


class Killed(BaseException):
    """As a signal would end a pass."""


def kill_after(monkeypatch: pytest.MonkeyPatch, examples: int) -> None:
    """Break the next pass off once so many examples have been read."""
    whole = consolidate.commands.measurement.fisher_diagonal

    def broken(model: Any, batches: Any, *arguments: Any, **options: Any) -> Any:
        def read() -> Any:
            count = 0
            for inputs, labels in batches:
                if count >= examples:
                    monkeypatch.setattr(consolidate.commands.measurement, "fisher_diagonal", whole)
                    raise Killed
                count += len(labels)
                yield inputs, labels

        return whole(model, read(), *arguments, **options)

    monkeypatch.setattr(consolidate.commands.measurement, "fisher_diagonal", broken)


def break_off(monkeypatch: pytest.MonkeyPatch, step: int, *, saved: bool = False) -> None:
    """Break the next training off after this step, when it has been kept if it was to be.

    With `saved` it is the next one that is kept, unlike that of a search's candidate.
    """
    whole = finetune_run.training_steps

    def broken(*arguments: Any, **options: Any) -> Iterator[Step]:
        for done in whole(*arguments, **options):
            yield done
            if done.step == step and (options["sum_loss"] is not None or not saved):
                monkeypatch.setattr(finetune_run, "training_steps", whole)
                raise Killed

    monkeypatch.setattr(finetune_run, "training_steps", broken)
