"""Errors of the Hub's client, translated for models, datasets and pushing alike."""

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb

import huggingface_hub
from huggingface_hub import DatasetInfo, ModelInfo, get_token
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http, httpx, set_client_factory

from formats.errors import ConsolidateError, InputError, NetworkError, UsageError

TIMEOUT = "CONSOLIDATE_HUB_TIMEOUT"
"""The environment variable with the seconds that a request may wait without any traffic."""
DEFAULT_TIMEOUT = 60.0

ODD_ANSWER = (
    "a response of the Hub has an unexpected form ({}); check HF_ENDPOINT, or update "
    "huggingface_hub"
)

_FULL = re.compile(r"os error (28|122)\b|No space left|[Qq]uota exceeded")


class AccessError(InputError):
    """The Hub refuses this to the token, or to a client without a token."""


@contextmanager
def hub_call(start: str, again: str = "try again", revision: str | None = None) -> Iterator[None]:
    """Translate what a call of the Hub's client raises into an error that begins with `start`.

    Only calls of the client belong into the block. Errors of this program and of the disk pass
    unchanged. `again` is the advice of a NetworkError, where a retry may succeed.
    """
    limit_waiting()
    try:
        yield
    except Exception as error:
        meaning = explain(error, revision)
        if meaning is None:
            raise
        advice = f"; {again}" if again and isinstance(meaning, NetworkError) else ""
        raise type(meaning)(f"{start}{meaning}{advice}") from None


def explain(error: BaseException, revision: str | None = None) -> ConsolidateError | None:
    """Translate an error that the Hub's client raised; None for an error of another origin."""
    if isinstance(error, ConsolidateError):
        return None
    cause: BaseException | None = error
    while cause is not None:  # the client wraps the error of a single file
        if (meaning := _meaning(cause, revision)) is not None:
            return meaning
        if isinstance(cause, OSError) and cause.errno is not None:  # the disk's, not the Hub's
            return None if cause is error else InputError(str(cause))
        cause = cause.__cause__
    if isinstance(error, LocalEntryNotFoundError):
        return NetworkError(f"the Hub cannot be reached ({_line(str(error))})")
    if isinstance(error, OSError | MemoryError) or not _in_client(error):
        return None
    if isinstance(error, ImportError | ValueError) and "proxy" in str(error).lower():
        return NetworkError(
            f"the proxy cannot be used ({_line(str(error))}): correct or unset ALL_PROXY, or "
            "install socksio"
        )
    if type(error) is RuntimeError:  # hf_xet raises it for any failure of a transfer
        if _FULL.search(str(error)):
            return InputError(f"a transfer failed, as the disk is full: {_line(str(error))}")
        return NetworkError(f"a transfer failed ({_line(str(error))})")
    if isinstance(error, ValueError):  # the client's own message
        return InputError(f"the Hub's client refuses the request: {_line(str(error))}")
    return InputError(ODD_ANSWER.format(_line(f"{type(error).__name__}: {error}")))


def _meaning(error: BaseException, revision: str | None) -> ConsolidateError | None:
    if isinstance(error, RevisionNotFoundError) and revision is not None:
        return InputError(f"the Hub has no revision {revision!r} of this repository")
    if isinstance(error, HfHubHTTPError):
        return _of_status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return NetworkError("the Hub cannot be reached (HF_HUB_OFFLINE disables it)")
    if isinstance(error, LocalTokenNotFoundError):
        return AccessError("the Hub requires a login; use `hf auth login`, or set HF_TOKEN")
    if isinstance(error, httpx.LocalProtocolError | UnicodeEncodeError) and _is_odd(get_token()):
        return AccessError(_refused_token(get_token(), " (it contains invalid characters)"))
    if isinstance(error, httpx.TimeoutException):
        return NetworkError(f"the Hub does not answer in time ({type(error).__name__})")
    if isinstance(error, httpx.RequestError | ConnectionError | TimeoutError):
        return NetworkError(f"the Hub cannot be reached ({type(error).__name__})")
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) and _in_client(error):
        return NetworkError(
            "the response is not JSON: it may come from a proxy or a network's login page"
        )
    if isinstance(error, FileMetadataError):
        return NetworkError(
            "the response lacks the digest or size of a file: it may come from a proxy or a "
            "network's login page"
        )
    if isinstance(error, LocalEntryNotFoundError):
        return None  # its cause has a better message
    if isinstance(error, OSError) and error.errno is None and _in_client(error):
        if _FULL.search(str(error)):
            return InputError(f"a transfer failed, as the disk is full: {_line(str(error))}")
        if isinstance(error, PermissionError):  # of hf_xet, as below
            return AccessError(f"the Hub's storage refuses access ({_line(str(error))})")
        return NetworkError(f"a download ended early ({_line(str(error))})")
    return None


def _of_status(error: HfHubHTTPError) -> ConsolidateError:
    status = error.response.status_code
    detail = f" ({_line(error.server_message)})" if error.server_message else ""
    path = error.response.request.url.path.partition("/resolve/")[2]
    file = f" for {_line(path.partition('/')[2])}" if path else ""
    sent = error.response.request.headers.get("Authorization", "").removeprefix("Bearer ")
    if isinstance(error, GatedRepoError):
        return AccessError(
            "the repository is gated: request access on its page and log in with `hf auth login`"
        )
    if status == 401 and sent:
        return AccessError(_refused_token(sent, detail))
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            "the Hub has no such repository (or a private one: log in with `hf auth login`)"
        )
    if status == 401:
        return AccessError(
            f"the Hub requires a login{detail}; use `hf auth login`, or set HF_TOKEN"
        )
    if status == 403:
        return AccessError(f"the Hub denies permission{file}{detail}; use a token that grants it")
    if status == 404:
        return InputError(f"the Hub has no such repository, branch, commit or file{file}{detail}")
    if status in (409, 412):
        return InputError(
            f"the repository has changed since it was read{detail}, and the request was refused; "
            "look at what changed, and try again"
        )
    if status == 429:
        wait = error.response.headers.get("Retry-After", "")
        return NetworkError(
            f"the Hub limits the rate of requests{detail}"
            f"{f'; wait {wait} s' if wait.isdigit() else ''}"
        )
    if 400 <= status < 500 and status != 408:
        return InputError(f"the Hub refuses the request with status {status}{file}{detail}")
    return NetworkError(f"the Hub responds with status {status}{file}{detail}")


def commit_in(start: str, info: DatasetInfo | ModelInfo) -> str:
    """Return the commit in a response of the Hub."""
    if not isinstance(info.sha, str) or not re.fullmatch(r"[0-9A-Fa-f]+", info.sha):
        raise InputError(f"{start}a response of the Hub names no commit; check HF_ENDPOINT")
    return info.sha


def _refused_token(token: str | None, detail: str) -> str:
    if token != get_token():
        where, remedy = "--token", "pass a valid one, or leave it out after `hf auth login`"
    elif os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        where, remedy = "HF_TOKEN", "set a valid one, or unset it and log in with `hf auth login`"
    else:
        where, remedy = "`hf auth login`", "log in again, or set HF_TOKEN"
    return f"the Hub rejects the token of {where}{detail}; {remedy}"


def _is_odd(token: str | None) -> bool:
    return token is not None and not (token.isascii() and token.isprintable() and " " not in token)


def _in_client(error: BaseException) -> bool:
    """Whether an error was raised in the client's calls, and not by this program."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    return any(name.split(".")[0] == huggingface_hub.__name__ for name in modules)


def _line(text: str) -> str:
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "?" for c in line)[:300]


def limit_waiting() -> None:
    """Set a timeout for those requests of the client that have none."""
    # The client opens a new session after a failed connection: hence the factory, not the session.
    # Some of its calls explicitly set no timeout: hence each request, not the default.
    # A factory that was set before is wrapped.
    make = _http._GLOBAL_CLIENT_FACTORY
    if hasattr(make, "limits_waiting"):
        return
    seconds = _seconds()

    def limit(request: httpx.Request) -> None:
        given = request.extensions.get("timeout", {})
        limits = {
            kind: seconds if given.get(kind) is None else given[kind]
            for kind in ("connect", "read", "write", "pool")
        }
        request.extensions = {**request.extensions, "timeout": limits}

    def make_limited() -> httpx.Client:
        client = make()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "request": [*hooks.get("request", []), limit]}
        return client

    make_limited.limits_waiting = True  # type: ignore[attr-defined]
    set_client_factory(make_limited)


def _seconds() -> float:
    given = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(given or DEFAULT_TIMEOUT)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"{TIMEOUT}: expected a number of seconds above 0, found {given!r}")
    return seconds
