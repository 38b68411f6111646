"""Where a checkpoint is: a local path, or a repository that is fetched from the Hub."""

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
)
from huggingface_hub.utils import httpx, validate_repo_id

from formats.checkpoint import PICKLE_SUFFIXES
from formats.errors import InputError, NetworkError, UsageError

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


def locate(checkpoint: str | Path, revision: str | None = None) -> Path:
    """Find a checkpoint on disk, or fetch it from the Hub into the client's cache.

    Args:
        checkpoint: A path, or a repository such as ``user/model``.
        revision: Branch, tag or commit of the repository.

    Returns:
        The path; for a repository the folder of its snapshot.

    Raises:
        UsageError: A revision of a local path was asked for.
        InputError: There is no such path, and no such repository or revision.
        NetworkError: The Hub cannot be reached, and the cache does not hold the repository.
    """
    path = Path(checkpoint).expanduser()
    if path.exists():
        if revision is not None:
            raise UsageError(f"{checkpoint} is local; --revision is for repositories on the Hub")
        return path
    name = str(checkpoint)
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
        ignored = OTHER_FRAMEWORKS + (PICKLES if safe else [])
        return Path(snapshot_download(name, revision=revision, ignore_patterns=ignored))
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
        if (cached := _cached(name, revision)) is not None:
            return cached
        raise NetworkError(
            f"{lost}, and the Hub could not be reached to look for a repository of that name; "
            "check the spelling, or try again"
        ) from None


def commit_of(path: Path) -> str | None:
    """Give the commit that a snapshot in the client's cache is of.

    Args:
        path: What `locate` returned.

    Returns:
        The commit; None for a path that is no snapshot.
    """
    return path.name if path.parent.name == "snapshots" else None


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


def _cached(name: str, revision: str | None) -> Path | None:
    # Pickles that were left out do not make a snapshot incomplete.
    for ignored in (OTHER_FRAMEWORKS, OTHER_FRAMEWORKS + PICKLES):
        try:
            return Path(
                snapshot_download(
                    name, revision=revision, ignore_patterns=ignored, local_files_only=True
                )
            )
        except LocalEntryNotFoundError:
            continue
    return None
