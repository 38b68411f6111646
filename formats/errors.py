"""The errors that users see, each with the exit code of its command."""

from typing import Any


class ConsolidateError(Exception):
    """An error with a message of one or two lines; exit code 1 unless a subclass has another."""

    exit_code = 1


class UsageError(ConsolidateError):
    """Options that contradict each other, or that cannot be satisfied."""

    exit_code = 2


class InputError(ConsolidateError):
    """A file, tensor or row that is missing, damaged or unsuitable, or a full disk."""

    exit_code = 3


class BusyError(InputError):
    """A target that another process is writing; a retry may succeed."""

    exit_code = 75


class NonFiniteError(ConsolidateError):
    """A NaN or an infinity in weights, Fisher, loss or gradients."""

    exit_code = 4


class ForgettingError(ConsolidateError):
    """An earlier task lost more than `--max-forgetting` or `--budget` allows.

    Attributes:
        result: The run's result, with the status ``forgot too much``; None where nothing was
            written, as only the weights it started from keep the budget.
    """

    exit_code = 5

    def __init__(self, message: str, result: dict[str, Any] | None = None):
        super().__init__(message)
        self.result = result


class NetworkError(ConsolidateError):
    """The network or a remote server failed; a retry may succeed."""

    exit_code = 75


class PeerError(ConsolidateError):
    """Another process of the same run failed with this exit code, and reports the reason."""

    def __init__(self, exit_code: int, message: str = ""):
        super().__init__(message)
        self.exit_code = exit_code


def install(extra: str, error: ImportError | None = None, module: str | None = None) -> str:
    """Return what makes an import succeed: the command that installs an extra, if it is missing.

    A module that is there, in a version that does not fit the others, say, is not missing.
    """
    module = module or extra
    if error is None or (isinstance(error, ModuleNotFoundError) and error.name in (None, module)):
        return f"pip install 'consolidate-ewc[{extra}]', or '.[{extra}]' in a clone"
    reason = str(error).strip().partition("\n")[0]
    return f"{module} is installed, but importing it failed: {reason}"
