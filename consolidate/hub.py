"""Where a checkpoint is: a local path, or a repository that is fetched from the Hub."""

import logging
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import httpx, validate_repo_id

from formats.checkpoint import PICKLE_SUFFIXES
from formats.errors import InputError, NetworkError, UsageError

LOG = logging.getLogger("consolidate")

FISHER = ("fisher/*", "fisher*.json", "fisher*.safetensors", "anchor*", "heads/*")
"""What a Fisher is read from; at the root in a repository that holds nothing else."""
VALUES = ("fisher/fisher*.safetensors*", "fisher/anchor*")
"""What is as large as the weights in it."""

OTHER_FRAMEWORKS = [
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.ot",
    "*.tflite",
    "*.gguf",
    "onnx/*",
    "openvino/*",
]
PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt"]


def locate(
    checkpoint: str | Path,
    revision: str | None = None,
    *,
    only: Sequence[str] | None = None,
    without: Sequence[str] = (),
) -> Path:
    """Find a checkpoint on disk, or fetch it from the Hub into the client's cache.

    Args:
        checkpoint: A path, or a repository such as ``user/model`` or ``user/model@revision``.
        revision: Branch, tag or commit of the repository.
        only: Patterns of the files to fetch; all unless given.
        without: Patterns of files to leave.

    Returns:
        The path; for a repository the folder of its snapshot.

    Raises:
        UsageError: A revision of a local path was asked for.
        InputError: There is no such path, and no such repository or revision; or the Hub cannot be
            reached, and a path here has nearly that name.
        NetworkError: The Hub cannot be reached, and the cache does not hold the repository.
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
    try:
        files = _files(name, revision)
        safe = any("/" not in file and file.endswith(".safetensors") for file in files)
        ignored = [*OTHER_FRAMEWORKS, *(PICKLES if safe else []), *without]
        wanted = None if only is None else list(only)
        return _told(
            name,
            snapshot_download(
                name, revision=revision, allow_patterns=wanted, ignore_patterns=ignored
            ),
        )
    except RevisionNotFoundError:
        raise InputError(f"{name} on the Hub has no revision {revision!r}") from None
    except GatedRepoError:
        raise InputError(
            f"{name} is gated: ask for access on its page and log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{lost}, and no such repository on the Hub (or a private one: log in with "
            "`hf auth login`)"
        ) from None
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled):
        if (cached := _cached(name, revision, only, without)) is not None:
            return _told(name, cached)
        if "/" not in name and _near(path):
            raise InputError(lost) from None  # misspelt, which no other try cures
        raise NetworkError(
            f"{lost}, and the Hub could not be reached to look for a repository of that name; "
            "check the spelling, or try again"
        ) from None


def commits_of(*paths: Path | None) -> dict[str, str]:
    """Give the commits that were read of repositories.

    Args:
        paths: What `locate` returned, or what lies in it; None is left out.

    Returns:
        Repository to commit, of those paths that are snapshots in the client's cache.
    """
    commits = {}
    for path in paths:
        for snapshot in () if path is None else (path, *path.parents):
            kind, *name = snapshot.parent.parent.name.split("--")
            if snapshot.parent.name == "snapshots" and kind == "models":
                commits["/".join(name)] = snapshot.name
    return commits


def remote_headers(name: str, commit: str, stem: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read the headers of safetensors files on the Hub, and no values, by requests of ranges.

    Args:
        name: The repository.
        commit: Its commit.
        stem: Such as ``fisher/fisher``, for that file or its shards.

    Returns:
        Dtype and shape of every tensor.

    Raises:
        InputError: One of them is no safetensors file.
        NetworkError: The Hub cannot be reached.
    """
    api = HfApi()
    headers: dict[str, tuple[str, tuple[int, ...]]] = {}
    try:
        for file in api.list_repo_files(name, revision=commit):
            if file.startswith(stem) and file.endswith(".safetensors"):
                found = api.parse_safetensors_file_metadata(name, file, revision=commit)
                headers |= {
                    tensor: (info.dtype, tuple(info.shape))
                    for tensor, info in found.tensors.items()
                }
    except SafetensorsParsingError:
        raise InputError(f"{name}: the headers of {stem}*.safetensors cannot be read") from None
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled):
        raise NetworkError(f"{name}: the Hub cannot be reached; try again") from None
    return headers


def _told(name: str, snapshot: str) -> Path:
    path = Path(snapshot)
    LOG.info("%s is at commit %s", name, path.name)
    return path


def _in_a_folder(path: Path) -> bool:
    """Whether a path that leads nowhere begins with a folder that is there, or names a file."""
    return path.suffix in (".safetensors", *PICKLE_SUFFIXES) or Path(path.parts[0]).is_dir()


def _near(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, names)
    return f" (in {path.parent} there is {', '.join(near)})" if near else ""


def _files(name: str, revision: str | None) -> list[str]:
    info = HfApi().model_info(name, revision=revision, timeout=10)
    return [file.rfilename for file in info.siblings or []]


def _cached(
    name: str, revision: str | None, only: Sequence[str] | None, without: Sequence[str]
) -> str | None:
    # Pickles that were left out do not make a snapshot incomplete.
    for ignored in (OTHER_FRAMEWORKS, OTHER_FRAMEWORKS + PICKLES):
        try:
            return snapshot_download(
                name,
                revision=revision,
                allow_patterns=None if only is None else list(only),
                ignore_patterns=[*ignored, *without],
                local_files_only=True,
            )
        except LocalEntryNotFoundError:
            continue
    return None
