"""Where a checkpoint is: a local path, or a repository that is fetched from the Hub."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, ModelInfo, snapshot_download
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import validate_repo_id

from formats.checkpoint import PICKLE_SUFFIXES
from formats.errors import InputError, NetworkError, UsageError
from formats.hub_errors import AccessError, commit_in, hub_call
from formats.wording import neighbours

LOG = logging.getLogger("consolidate")

FISHER = ("fisher/*", "fisher*.json", "fisher*.safetensors", "anchor*", "factors*", "heads/*")
"""What a Fisher is read from; at the root in a repository that holds nothing else."""
VALUES = ("fisher/fisher*.safetensors*", "fisher/anchor*", "fisher/factors*")
"""What is as large as the weights in it."""

OTHER_FRAMEWORKS = ["*.h5", "*.msgpack", "*.onnx", "*.ot", "*.tflite", "*.gguf"]
OTHER_FRAMEWORKS += ["onnx/*", "openvino/*"]
PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt"]
UNREADABLE = (SafetensorsParsingError, AttributeError, TypeError, LookupError, RecursionError)
"""What the client raises of a header that is damaged, or JSON of another form."""


def locate(
    checkpoint: str | Path,
    revision: str | None = None,
    *,
    only: Sequence[str] | None = None,
    without: Sequence[str] = (),
) -> Path:
    """Find a checkpoint on disk, or fetch a repository into the client's cache: give its snapshot.

    A repository is named ``user/model`` or ``user/model@revision``; `only` and `without` are
    patterns of files to fetch and to leave. Where the Hub cannot be reached, the cache is read.
    """
    path = Path(checkpoint).expanduser()
    if path.exists():
        if revision is not None:
            raise UsageError(f"{checkpoint} is local; --revision is for repositories on the Hub")
        return path
    name = str(checkpoint)
    if revision is None:
        name, _, named = name.partition("@")
        revision = named or None
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    lost = f"{checkpoint}: no such file or folder{_near(path)}"
    if not name or path.is_absolute() or name.startswith(".") or _in_a_folder(path):
        raise InputError(lost)
    wanted = None if only is None else list(only)
    fetch = partial(snapshot_download, name, revision=revision, allow_patterns=wanted)
    reached = False
    try:
        with hub_call("", again="", revision=revision):
            info = HfApi().model_info(name, revision=revision, timeout=10)
        reached = True
        commit_in("", info)
        files = _names(info)
        safe = any("/" not in file and file.endswith(".safetensors") for file in files)
        ignored = [*OTHER_FRAMEWORKS, *(PICKLES if safe else []), *without]
        with hub_call("", again="", revision=revision):
            snapshot = fetch(ignore_patterns=ignored)
    except (InputError, NetworkError) as error:
        failed = isinstance(error, NetworkError)
        if failed or isinstance(error, AccessError):
            if (cached := _cached(fetch, without)) is not None:
                if not is_offline_mode():
                    LOG.warning("%s: %s; the copy in the cache is read", name, error)
                return _told(name, cached)
            if "/" not in name and _near(path):
                raise InputError(lost) from None  # misspelt, which no other try cures
        start = f"{name}: " if reached else f"{lost}, and "
        advice = "try again" if reached else "check the spelling, or try again"
        raise type(error)(f"{start}{error}{f'; {advice}' if failed else ''}") from None
    return _told(name, snapshot)


def commits_of(*paths: Path | None) -> dict[str, str]:
    """Give the commit of each repository in whose snapshot, as `locate` finds it, a path lies."""
    commits = {}
    for path in paths:
        for snapshot in () if path is None else (path, *path.parents):
            kind, *name = snapshot.parent.parent.name.split("--")
            if snapshot.parent.name == "snapshots" and kind == "models":
                commits["/".join(name)] = snapshot.name
    return commits


def remote_headers(name: str, commit: str, stem: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read the headers of safetensors files on the Hub, and no values, by requests of ranges.

    `stem` is such as ``fisher/fisher``, for that file or its shards.
    """
    api = HfApi()
    headers: dict[str, tuple[str, tuple[int, ...]]] = {}
    with hub_call(f"{name}: "):
        files = list(api.list_repo_files(name, revision=commit))
    for file in files:
        if not (file.startswith(stem) and file.endswith(".safetensors")):
            continue
        with hub_call(f"{name}: "):
            try:
                found = api.parse_safetensors_file_metadata(name, file, revision=commit)
            except UNREADABLE:
                raise InputError(f"{name}: the header of {file} cannot be read") from None
        headers |= {
            tensor: (info.dtype, tuple(info.shape)) for tensor, info in found.tensors.items()
        }
    return headers


def _told(name: str, snapshot: str) -> Path:
    path = Path(snapshot)
    LOG.info("%s is at commit %s", name, path.name)
    return path


def _in_a_folder(path: Path) -> bool:
    """Whether a path that leads nowhere begins with a folder that is there, or names a file."""
    return path.suffix in (".safetensors", *PICKLE_SUFFIXES) or Path(path.parts[0]).is_dir()


def _near(path: Path) -> str:
    near = neighbours(path)
    return f" (in {path.parent} there is {', '.join(near)})" if near else ""


def _names(info: ModelInfo) -> list[str]:
    names: list[str] = [file.rfilename for file in info.siblings or []]
    for name in names:
        parts = PurePosixPath(name).parts if isinstance(name, str) else ("/",)
        if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
            raise InputError(f"the Hub lists a file named {name!r}, and none of it was fetched")
    return names


def _cached(fetch: Callable[..., str], without: Sequence[str]) -> str | None:
    # Pickles that were left out do not make a snapshot incomplete.
    for ignored in (OTHER_FRAMEWORKS, OTHER_FRAMEWORKS + PICKLES):
        with suppress(LocalEntryNotFoundError):
            return fetch(ignore_patterns=[*ignored, *without], local_files_only=True)
    return None
