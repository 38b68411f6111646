"""Runs that are interrupted where a test says."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import consolidate
from consolidate.commands import finetune_run
from consolidate.runtime import signals
from consolidate.training.loop import Step
from formats.atomic import partial_path


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


def killed_and_resumed(
    command: Callable[[], Any],
    out: Path,
    caplog: pytest.LogCaptureFixture,
    *kills: Callable[[], None],
) -> Any:
    """Run a command after each of `kills`, which breaks it off, and once more to its end.

    Each time progress is saved beside the output, and the next run resumes from it.
    """
    with caplog.at_level("INFO", "consolidate"):
        for number, kill in enumerate(kills):
            caplog.clear()
            kill()
            with pytest.raises((Killed, signals.Terminated)):
                command()
            assert not out.exists()
            assert partial_path(out).exists()
            assert ("resuming" in caplog.text) == (number > 0)
        caplog.clear()
        result = command()
    assert "resuming" in caplog.text
    return result
