"""The errors a user can meet, each with the exit code its command leaves with."""

from typing import Any


class ConsolidateError(Exception):
    """A fault told in one or two plain lines; exit code 1 unless a subclass says otherwise."""

    exit_code = 1


class UsageError(ConsolidateError):
    """What was asked for contradicts itself or cannot be done."""

    exit_code = 2


class InputError(ConsolidateError):
    """A file, a tensor, a row or a disk that does not fit."""

    exit_code = 3


class NonFiniteError(ConsolidateError):
    """A NaN or an infinity in weights, Fisher, loss or gradients."""

    exit_code = 4


class ForgettingError(ConsolidateError):
    """An old task lost more than `--max-forgetting` allows.

    Attributes:
        result: What the run returns otherwise, with the status ``forgot too much``.
    """

    exit_code = 5

    def __init__(self, message: str, result: dict[str, Any]):
        super().__init__(message)
        self.result = result


class NetworkError(ConsolidateError):
    """The network or a remote server failed; trying again may help."""

    exit_code = 75


class PeerError(ConsolidateError):
    """Another process of the same run failed, with this exit code; it tells what went wrong."""

    def __init__(self, exit_code: int, message: str = ""):
        super().__init__(message)
        self.exit_code = exit_code
