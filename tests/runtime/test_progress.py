"""A bar on a terminal, in no colour; lines elsewhere."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from contextlib import suppress

import pytest

from consolidate.runtime import progress as module
from consolidate.runtime.progress import progress, seconds_of, show_progress, start_timing


def shown(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """What a terminal of 80 columns gets of a short pass."""
    above, below = pty.openpty()
    fcntl.ioctl(below, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(below, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress("passing", 3, "rows") as advance:
            for _ in range(3):
                advance(1)
    found = b""
    with suppress(OSError):  # the end
        while read := os.read(above, 65536):
            found += read
    os.close(above)
    return found


def test_a_terminal_gets_a_bar_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    found = shown(monkeypatch)
    assert b"\rpassing:" in found
    assert found.endswith(b"\r")  # it was wiped
    assert not re.search(rb"\x1b\[[0-9;]*m", found)


def test_nothing_is_shown_where_it_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_shown", True)
    show_progress(False)
    assert shown(monkeypatch) == b""
    show_progress(True)
    found = shown(monkeypatch).decode()
    assert "0/3 [00:00<?, ? rows/s]" in found  # with the rate and the remaining time


def test_the_seconds_of_a_phase_are_without_those_within(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    for _ in range(2):
        start_timing()
        assert seconds_of("training") == 0
        passes(100)
        with progress("training", 2, "steps"):
            passes(1)
            with progress("evaluating", 1, "rows", phase="evaluation"):
                passes(10)
            passes(2)
        passes(100)
        with suppress(KeyError), progress("evaluating", 1, "rows", phase="evaluation"):
            passes(20)
            raise KeyError
        passes(100)
        assert (seconds_of("training"), seconds_of("evaluation")) == (3, 30)


def test_elsewhere_there_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level("INFO", "consolidate"), progress("passing", 3, "rows") as advance:
        for _ in range(3):
            advance(1)
    out, err = capsys.readouterr()
    assert out == ""
    assert "\r" not in err  # no bar
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "passing: 1 of 3 rows",
        "passing: 2 of 3 rows",
    ]


def test_what_was_done_before_counts_but_not_for_the_rate(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    clock = iter([0.0, 2.0, 4.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with (
        caplog.at_level("INFO", "consolidate"),
        progress("passing", 100, "rows", before=90) as advance,
    ):
        advance(4)
        advance(6)
    assert [record.getMessage() for record in caplog.records] == [
        "passing: 94 of 100 rows, 2/s, 3 s left"
    ]
