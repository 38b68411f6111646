"""Finding a checkpoint: at a local path, or in a repository that is fetched from the Hub."""

import logging
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from glob import escape
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, ModelInfo, snapshot_download
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import validate_repo_id

from formats.atomic import recover
from formats.checkpoint import PICKLE_SUFFIXES, quantized_by
from formats.checkpoint_files import MAX_JSON_BYTES
from formats.errors import InputError, NetworkError, UsageError
from formats.fisher_json import MAX_LEDGER_BYTES
from formats.hub_errors import AccessError, commit_in, hub_call
from formats.wording import few, neighbours

LOG = logging.getLogger("consolidate")

FISHER = ("fisher/*", "fisher*.json", "fisher*.safetensors", "anchor*", "factor*", "heads/*")
"""The files of a Fisher; they are at the root of a repository that contains nothing else."""
VALUES = ("fisher/fisher*.safetensors*", "fisher/anchor*", "fisher/factor*")
"""Those of them that are as large as the weights."""

_OTHER_WEIGHTS = (".h5", ".msgpack", ".onnx", ".ot", ".tflite", ".gguf")
OTHER_FRAMEWORKS = [*(f"*{suffix}" for suffix in _OTHER_WEIGHTS), "onnx/*", "openvino/*"]
COPIES = ["original/*", "consolidated*.safetensors"]
COPIES += [f"model.{kind}*.safetensors" for kind in ("fp16", "bf16", "fp32", "non_ema")]
"""The same weights in another form or dtype, which no command reads."""
_MODULE = re.compile(r"\d_[^/]*/")  # of sentence-transformers, whose weights may be a pickle
UNREADABLE = (SafetensorsParsingError, AttributeError, TypeError, LookupError, RecursionError)
"""What the client raises for a damaged header, or for JSON of another form."""


def find_local(checkpoint: str | Path) -> Path:
    """Return the path of a checkpoint, moved back if a command was killed while it replaced it."""
    path = Path(checkpoint).expanduser()
    if path.name and "\0" not in path.name and path.parent.exists() and not path.exists():
        recover(path)
    return path


def locate(
    checkpoint: str | Path,
    revision: str | None = None,
    *,
    only: Sequence[str] | None = None,
    without: Sequence[str] = (),
) -> Path:
    """Find a checkpoint on disk, or fetch a repository into the client's cache; return its folder.

    A repository is named ``user/model`` or ``user/model@revision``; `only` and `without` are
    patterns of files to fetch and to skip. Where the Hub cannot be reached, the cache is used.
    """
    path = find_local(checkpoint)
    if path.exists():
        if revision is not None:
            raise UsageError(
                f"{checkpoint} is local, and --revision is for repositories on the Hub; leave it "
                "out"
            )
        return path
    name = str(checkpoint)
    name, _, named = name.partition("@")
    if named and revision is not None:
        raise UsageError(
            f"{checkpoint} names a revision, and so does --revision {revision}: name it once"
        )
    revision = revision or named or None
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    lost = f"{checkpoint}: no such file or folder{_near(path)}"
    if path.is_symlink():
        raise InputError(f"{checkpoint} is a broken link; correct what it points to")
    is_file = path.suffix in (".safetensors", *PICKLE_SUFFIXES)
    if not name or path.is_absolute() or name.startswith(".") or is_file:
        raise InputError(lost)
    if revision is None and Path(path.parts[0]).is_dir():  # which may be called as an owner is
        raise InputError(
            f"{lost}; not looked for on the Hub, as there is a folder {path.parts[0]} here: name a "
            f"revision, as in {name}@main, to fetch it"
        )
    wanted = None if only is None else list(only)
    fetch = partial(snapshot_download, name, revision=revision, allow_patterns=wanted)
    reached, ignored = False, None
    try:
        with hub_call("", again="", revision=revision):
            info = HfApi().model_info(name, revision=revision, timeout=10, files_metadata=True)
        reached = True
        commit_in("", info)
        files = _names(info)
        _refuse_large(info)
        if only is None and not any(PurePosixPath(file).name == "fisher.json" for file in files):
            _refuse_unreadable(info, files, revision)
        safe = any("/" not in file and file.endswith(".safetensors") for file in files)
        pickles = [f for f in files if f.endswith(PICKLE_SUFFIXES) and not _MODULE.match(f)]
        standard = {"model.safetensors", "model.safetensors.index.json"}.intersection(files)
        # Beside a pickle of the usual name, a file of another name is not the weights.
        usual = {"pytorch_model.bin", "pytorch_model.bin.index.json"}.intersection(files)
        safe &= bool(standard or not usual or "adapter_model.safetensors" in files)
        copies = COPIES if standard else []
        ignored = [*OTHER_FRAMEWORKS, *copies, *(map(escape, pickles) if safe else []), *without]
        with hub_call("", again="", revision=revision):
            snapshot = fetch(ignore_patterns=ignored)
    except (InputError, NetworkError) as error:
        failed = isinstance(error, NetworkError)
        if failed or isinstance(error, AccessError):
            if (cached := _cached(fetch, without, ignored)) is not None:
                if not is_offline_mode():
                    LOG.warning("%s: %s; using the copy in the cache", name, error)
                return _logged(name, cached, only)
            if not reached and revision is None and _near(path):
                raise InputError(lost) from None  # a typing error, which no retry cures
        start = f"{name}: " if reached else f"{lost}, and "
        if failed and is_offline_mode():  # the same command would fail again
            raise InputError(f"{start}{error}; check the spelling, or unset it") from None
        advice = "try again" if reached else "check the spelling, or try again"
        raise type(error)(f"{start}{error}{f'; {advice}' if failed else ''}") from None
    return _logged(name, snapshot, only)


def commits_of(*paths: Path | None) -> dict[str, str]:
    """Return the commits of the repositories whose snapshots, as of `locate`, contain the paths."""
    commits = {}
    for path in paths:
        for snapshot in () if path is None else (path, *path.parents):
            kind, *name = snapshot.parent.parent.name.split("--")
            if snapshot.parent.name == "snapshots" and kind == "models":
                commits["/".join(name)] = snapshot.name
    return commits


def remote_headers(name: str, commit: str, stem: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read the headers of safetensors files on the Hub by range requests, without any values.

    `stem` names a file or its shards, such as ``fisher/fisher``.
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
                raise InputError(
                    f"{name}: the header of {file} is damaged and cannot be read; upload it again"
                ) from None
        headers |= {
            tensor: (info.dtype, tuple(info.shape)) for tensor, info in found.tensors.items()
        }
    return headers


def _logged(name: str, snapshot: str, only: Sequence[str] | None) -> Path:
    path = Path(snapshot)
    of_fisher = only is not None and "config.json" not in only
    if of_fisher and not (path / "fisher" / "fisher.json").is_file():
        raise InputError(f"{name} has no fisher/fisher.json: name a checkpoint with a Fisher")
    LOG.info("%s is at commit %s", name, path.name)
    return path


def _near(path: Path) -> str:
    near = neighbours(path)
    if len(path.parts) == 2:  # "run/a" for "runs/a"
        folders = [Path(name) / path.name for name in neighbours(path.parent)]
        near += [str(other) for other in folders if other.exists()]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _names(info: ModelInfo) -> list[str]:
    names: list[str] = [file.rfilename for file in info.siblings or []]
    for name in names:
        parts = PurePosixPath(name).parts if isinstance(name, str) else ("/",)
        if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
            raise InputError(
                f"the Hub lists a file with the invalid name {name!r}; nothing was fetched"
            )
    return names


def _refuse_large(info: ModelInfo) -> None:
    """Refuse a ledger or a config of a size that would be refused once it was fetched."""
    for file in info.siblings or []:
        size, name = file.size, PurePosixPath(file.rfilename).name
        most = MAX_LEDGER_BYTES if name == "fisher.json" else MAX_JSON_BYTES
        known = name in ("fisher.json", "config.json", "adapter_config.json")
        if (known or name.endswith(".index.json")) and isinstance(size, int) and size > most:
            raise InputError(
                f"{file.rfilename}: expected at most {most:,} bytes, found {size:,}; nothing was "
                "fetched"
            )


def _refuse_unreadable(info: ModelInfo, files: Sequence[str], revision: str | None) -> None:
    """Refuse quantized weights, and those of other programs or in folders, before the fetch."""
    # what the Hub says of the config may be of the main branch
    config = info.config if isinstance(info.config, dict) and revision in (None, "main") else {}
    if "config.json" in files and (why := quantized_by(config)) is not None:
        raise InputError(f"{why}; nothing was fetched")
    readable = (".safetensors", ".index.json", *PICKLE_SUFFIXES)
    weights = [
        f for f in files if f.endswith(readable) and not f.startswith(("onnx/", "openvino/"))
    ]
    if any("/" not in file for file in weights):
        return
    if folders := dict.fromkeys(f"{PurePosixPath(file).parent}/" for file in weights):
        raise InputError(
            f"expected weights at the root, found them only in {few([*folders], 4)}: "
            "download one of these folders and name it; nothing was fetched"
        )
    if others := [file for file in files if file.endswith(_OTHER_WEIGHTS)]:
        raise InputError(
            f"expected weights in .safetensors or of PyTorch, found only {few(others, 4)}: name "
            "the repository that they were converted from, or convert them; nothing was fetched"
        )


def _cached(
    fetch: Callable[..., str], without: Sequence[str], ignored: Sequence[str] | None
) -> str | None:
    """Find a snapshot in the cache with all files but the ignored, or those that may have been."""
    # What was skipped does not make a snapshot incomplete. Pickles of a `_MODULE` never are.
    starts = ("[!0-9]", "[0-9][!_]")
    pickles = [f"{start}*{suffix}" for start in starts for suffix in PICKLE_SUFFIXES]
    guesses = ([], pickles, [*pickles, *COPIES]) if ignored is None else ([],)
    for more in guesses:
        patterns = [*OTHER_FRAMEWORKS, *more, *without] if ignored is None else ignored
        with suppress(LocalEntryNotFoundError):
            found = fetch(ignore_patterns=patterns, local_files_only=True)
            if not more or any(Path(found).glob("*.safetensors")):
                return found
    return None
