"""A stop waits for a point that work can go on from, and never longer than it should."""

from collections.abc import Iterator

import pytest

from consolidate.runtime import signals
from consolidate.runtime.signals import Terminated, ask, asked, stop_if_asked, waiting


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert (signals._waits, signals._asked) == (False, None)


def test_outside_of_such_work_nothing_waits() -> None:
    assert not ask(Terminated)
    assert not asked()
    stop_if_asked()


def test_a_stop_waits_for_the_next_point() -> None:
    done = []

    def work() -> None:
        stop_if_asked()
        assert ask(Terminated)
        done.append("the rest of the step")
        assert asked()
        stop_if_asked()
        done.append("never")

    with pytest.raises(Terminated), waiting():
        work()
    assert done == ["the rest of the step"]


def test_a_second_ctrl_c_does_not_wait_and_a_second_sigterm_does() -> None:
    def work() -> None:
        assert ask(KeyboardInterrupt)
        assert not ask(KeyboardInterrupt)
        assert ask(Terminated)
        stop_if_asked()  # for what came first

    with pytest.raises(KeyboardInterrupt), waiting():
        work()


def test_what_can_be_left_at_any_moment_is() -> None:
    def work() -> None:
        with waiting(False):
            assert not ask(Terminated)
        assert ask(Terminated)
        with waiting(False):
            raise AssertionError("it was asked for before")

    with pytest.raises(Terminated), waiting():
        work()


def test_at_the_end_of_the_work_it_is_obeyed() -> None:
    with pytest.raises(Terminated), waiting():
        assert ask(Terminated)


def test_an_error_wins() -> None:
    def work() -> None:
        assert ask(Terminated)
        raise ValueError("first")

    with pytest.raises(ValueError, match="first"), waiting():
        work()
