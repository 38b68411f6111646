"""The errors a user can meet, each with the exit code its command leaves with."""


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


class NetworkError(ConsolidateError):
    """The network or a remote server failed; trying again may help."""

    exit_code = 75
