"""Runs that are interrupted where a test says."""

from collections.abc import Callable
from typing import Any

import pytest

import consolidate
from consolidate.commands import finetune_run


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


def break_off(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Break the next training off after this step, when it has been kept if it was to be."""
    whole = finetune_run.train_epoch

    def broken(*arguments: Any, on_step: Callable[[Any], None], **options: Any) -> int:
        def then_killed(done: Any) -> None:
            on_step(done)
            if done.step == step:
                monkeypatch.setattr(finetune_run, "train_epoch", whole)
                raise Killed

        return whole(*arguments, on_step=then_killed, **options)

    monkeypatch.setattr(finetune_run, "train_epoch", broken)
