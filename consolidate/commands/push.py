"""What `consolidate push` does, without the command line: verify, write the card, one commit."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from consolidate.commands.upload_rules import named_code, without_local_paths
from consolidate.commands.verify import verify
from consolidate.views.card import MAX_CARD_BYTES, Subject, model_card
from formats.checkpoint import CARD, Checkpoint, open_checkpoint
from formats.checkpoint_files import check_link
from formats.digest import set_digest
from formats.errors import InputError, NetworkError, UsageError
from formats.fisher_folder import (
    StoredFisher,
    check_belongs,
    check_intact,
    check_values,
    in_one_line,
    read_fisher,
    tensor_sets,
    write_fisher,
)
from formats.hub import FISHER, commits_of, locate
from formats.hub_errors import ODD_ANSWER, commit_in, hub_call
from formats.tensors import TensorFiles, write_tensors

LOG = logging.getLogger("consolidate")
INDEX = "model.safetensors.index.json"
AGAIN = "push again, which sends what is missing"

# What a model is used with; anything else in a folder may be data or a secret, and stays there.
PUBLISHED = (
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.spm",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "[0-9]_*/config.json",
    "[0-9]_*/model.safetensors",
    "LICENSE*",
    "NOTICE*",
)
_OURS_TO_REPLACE = re.compile(
    r"fisher/.*|(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|tf_model.*\.h5(\.index\.json)?|flax_model.*\.msgpack(\.index\.json)?|rust_model\.ot"
)
_WEIGHTS = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)")


@dataclass(frozen=True)
class Remote:
    """A repository as it is before a push.

    Attributes:
        exists: Whether it is there.
        private: Whether only some can see it; None where it is not there.
        head: The commit that is built upon; None where there is none.
        has_branch: Whether the branch is there; the head is that of the default branch otherwise.
        files: What the head holds, by path.
        tags: The commits of its tags, by name.
    """

    exists: bool
    private: bool | None
    head: str | None
    has_branch: bool
    files: dict[str, RepoFile]
    tags: dict[str, str]


NOTHING = Remote(False, None, None, True, {}, {})
"""A repository that is not there."""


def push(
    checkpoint: str | Path,
    repository: str,
    *,
    public: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    tag: str | None = None,
    token: str | None = None,
    base_model: Sequence[str] = (),
    fisher_dtype: torch.dtype | None = None,
    fisher_only: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Publish a checkpoint with its Fisher, ledger and card on the Hub, in one commit.

    The checkpoint is verified before anything is sent, and what the repository holds after. A
    commit is made only upon the one that was looked at; until it is made the repository is as it
    was, and a push that is started again sends what is missing.

    Args:
        checkpoint: A folder with weights and a Fisher, or a repository on the Hub.
        repository: Where to, such as ``user/model``; made where it is missing.
        public: Whether a new repository can be seen by all, and one that can be may be pushed to.
        create_pr: Open a pull request instead of committing to the branch.
        revision: The branch; made where it is missing.
        commit_message: Of the commit.
        tag: Name the commit so afterwards.
        token: Of the Hub; that of the client's login unless given.
        base_model: The repositories of the models that this one was made from, for the card.
        fisher_dtype: Store Λ so: float32 or bfloat16; as it is unless given.
        fisher_only: Publish the Fisher alone, of the weights in the repository `base_model`.
        dry_run: Only say what would be sent; without a network, all of it.

    Returns:
        What was done: the commit, every file with its size and what became of it, and digests.

    Raises:
        UsageError: The options contradict each other or the repository.
        InputError: The checkpoint is not intact, or the Hub refuses.
        NonFiniteError: NaN or infinity in the weights or in the Fisher.
        NetworkError: The Hub cannot be reached or fails, or does not hold what was sent.
    """
    _check_options(create_pr, revision, tag, token, base_model, fisher_only)
    folder = locate(checkpoint)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: a checkpoint with its Fisher is needed")
    if not fisher_only and open_checkpoint(folder).adapter is not None:
        raise InputError(f"{folder} is an adapter, and only whole models can be published")
    seen = _stamps(folder, fisher_only)
    stored = read_fisher(folder / "fisher")
    api = HfApi(token=token, library_name="consolidate")
    asked = True
    try:
        name = _full_name(api, repository)
        remote = _look(api, name, revision, tagged=tag is not None)
    except NetworkError:
        if not dry_run:
            raise
        LOG.info("the Hub could not be asked what %s holds: all files are listed", repository)
        asked, name, remote = False, repository, NOTHING
    _check_remote(name, remote, public, create_pr, fisher_only)
    base_commit = None
    if fisher_only:
        base_commit = _check_fisher(stored, base_model[0])
    else:
        LOG.info("verifying %s", folder)
        verify(folder)
    with TemporaryDirectory(prefix="consolidate-push-") as scratch:
        contents = _contents(folder, stored, fisher_dtype, fisher_only, Path(scratch))
        if fisher_dtype is not None:
            stored = read_fisher(Path(scratch) / "fisher")
        existing = _existing_card(api, name, remote, folder, fisher_only)
        subject = Subject(
            repository=name,
            config={} if fisher_only else open_checkpoint(folder).config,
            base_model=tuple(base_model),
            base_commit=base_commit,
            fisher_only=fisher_only,
            endpoint=api.endpoint,
        )
        card = model_card(existing, stored.ledger, subject)
        contents = {CARD: card.encode(), **contents}
        operations = {path: CommitOperationAdd(path, _source(c)) for path, c in contents.items()}
        for operation in operations.values():
            _ = operation.upload_info.sha256  # which the client may put off until it sends
        _refuse_written(folder, fisher_only, seen, "sent")
        changes = {
            path: _change(remote.files.get(path), op) if asked else "not compared"
            for path, op in operations.items()
        }
        stale = sorted(p for p in remote.files if _is_stale(p, operations, fisher_only))
        _check_tag(name, tag, remote, changed=bool(stale) or set(changes.values()) != {"unchanged"})
        result: dict[str, Any] = {
            "status": "dry run",
            "repository": name,
            "url": f"{api.endpoint}/{name}",
            "private": (not public) if remote.private is None else remote.private,
            "commit": None,
            "pull_request": None,
            "tag": tag,
            "weights": set_digest(stored.ledger.weights),
            "fisher": set_digest(stored.ledger.fisher),
            "files": [
                {"path": path, "size": op.upload_info.size, "change": changes[path]}
                for path, op in operations.items()
            ],
            "deleted": stale,
            "code": [path for path in operations if path.endswith(".py")],
        }
        if dry_run:
            return result
        message = commit_message or "Push " + ", ".join(t.name for t in stored.ledger.tasks[-5:])
        commit, pull_request = _commit(
            api,
            name,
            remote,
            [op for path, op in operations.items() if changes[path] != "unchanged"],
            stale,
            message=message,
            revision=revision,
            create_pr=create_pr,
            public=public,
            refuse_written=partial(_refuse_written, folder, fisher_only, seen, "committed"),
        )
        _check_arrived(api, name, commit, operations, stale)
        if tag is not None and remote.tags.get(tag) != commit:
            with hub_call(
                f"{name}: the commit {commit} is there, but the tag {tag!r} is not: ",
                "push again, which sets the tag alone",
            ):
                api.create_tag(name, tag=tag, revision=commit)
        return {
            **result,
            "status": "unchanged" if commit == remote.head else "done",
            "commit": commit,
            "pull_request": pull_request,
        }


def _check_options(
    create_pr: bool,
    revision: str | None,
    tag: str | None,
    token: str | None,
    base_model: Sequence[str],
    fisher_only: bool,
) -> None:
    """Refuse what contradicts itself, before anything is read; the token is never shown."""
    if create_pr and revision not in (None, "main"):
        raise UsageError("--create-pr opens a pull request to main: leave --revision out")
    if create_pr and tag is not None:
        raise UsageError("--tag names a commit of a branch: leave it or --create-pr out")
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise UsageError("--token is no token: it is empty, or holds blanks or other characters")
    if fisher_only and len(base_model) != 1:
        raise UsageError(
            "--fisher-only needs one --base-model REPO: the repository with the weights that the "
            "Fisher belongs to"
        )
    for name in base_model:
        _check_name(name.partition("@")[0], "--base-model ")


def _check_name(name: str, what: str = "") -> None:
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UsageError(
            f"{what}{name!r} cannot be a repository: expected one such as user/model"
        ) from None


def _call(name: str) -> AbstractContextManager[None]:
    return hub_call(f"{name}: ", AGAIN)


def _full_name(api: HfApi, name: str) -> str:
    _check_name(name)
    if "/" in name:
        return name
    with _call(name):
        user = api.whoami()
    if not isinstance(user, dict) or not isinstance(user.get("name"), str):
        raise InputError(f"{name}: {ODD_ANSWER.format('the user has no name')}")
    return f"{user['name']}/{name}"


def _look(api: HfApi, name: str, revision: str | None, *, tagged: bool) -> Remote:
    with _call(name):
        try:
            info = api.model_info(name, timeout=30)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError as error:
            if (
                error.response.status_code == 401
                and "Authorization" in error.response.request.headers
            ):
                raise  # the token is refused, in words that the client does not know
            return NOTHING
    head = commit_in(f"{name}: ", info)
    has_branch = True
    if revision is not None:
        with _call(name):
            try:
                info_of_branch = api.model_info(name, revision=revision, timeout=30)
            except RevisionNotFoundError:
                has_branch = False
        head = commit_in(f"{name}: ", info_of_branch) if has_branch else head
    tags = {}
    if tagged:
        with _call(name):
            refs = api.list_repo_refs(name).tags
        if not all(isinstance(ref.name, str) for ref in refs):
            raise InputError(f"{name}: {ODD_ANSWER.format('tags without names')}")
        tags = {ref.name: ref.target_commit for ref in refs}
    files = _files_at(api, name, head, f"{name}: ")
    return Remote(True, bool(info.private), head, has_branch, files, tags)


def _files_at(api: HfApi, name: str, commit: str, start: str) -> dict[str, RepoFile]:
    with hub_call(start, AGAIN):
        entries = list(api.list_repo_tree(name, recursive=True, revision=commit))
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    for file in files:
        if not isinstance(file.path, str) or not isinstance(file.size, int):
            raise InputError(start + ODD_ANSWER.format(f"a file {file.path!r}, {file.size!r}"))
    return {file.path: file for file in files}


def _check_remote(
    name: str, remote: Remote, public: bool, create_pr: bool, fisher_only: bool
) -> None:
    if not remote.exists and create_pr:
        raise InputError(f"{name}: no such repository on the Hub to open a pull request in")
    if remote.exists and not remote.private and not public:
        raise UsageError(f"{name} can be seen by all: say with --public that this may be, too")
    if remote.private and public:
        LOG.info("%s is private and stays so: its settings on the Hub change that", name)
    if fisher_only and any(_WEIGHTS.fullmatch(path) for path in remote.files):
        raise UsageError(
            f"{name} holds weights, and --fisher-only is for a repository without: push the whole "
            "checkpoint (weights that are there already are not sent again)"
        )


def _check_tag(name: str, tag: str | None, remote: Remote, *, changed: bool) -> None:
    if tag in remote.tags and (changed or remote.tags[tag] != remote.head):
        raise UsageError(f"{name} has a tag {tag!r} already, of another commit: choose another")


def _check_fisher(stored: StoredFisher, base: str) -> str | None:
    """Check every value of a Fisher, and of the weights of a repository that it is to be of.

    Returns:
        The repository's commit.
    """
    weights = locate(base, without=FISHER)
    LOG.info("checking that %s has the weights that the Fisher is of", base)
    check_intact(stored)
    for kind, tensors, _ in tensor_sets(stored):
        for name in tensors:
            where = f"{tensors.path}: {kind} of {name!r}"
            check_values(tensors[name], where, not_negative=kind == "fisher")
    check_belongs(stored, open_checkpoint(weights).weights, base)
    return next(iter(commits_of(weights).values()), None)


def _contents(
    folder: Path,
    stored: StoredFisher,
    fisher_dtype: torch.dtype | None,
    fisher_only: bool,
    scratch: Path,
) -> dict[str, Path | bytes]:
    """Give the file or the bytes of every path in the repository, but for the card."""
    contents: dict[str, Path | bytes] = {}
    if not fisher_only:
        source = open_checkpoint(folder)
        contents |= _weights(source, scratch)
        contents |= _others(folder, source)
    fisher = folder / "fisher"
    if fisher_dtype is not None:
        fisher = scratch / "fisher"
        write_fisher(
            fisher,
            stored.fisher,
            stored.ledger,
            anchor=stored.anchor,
            heads=stored.heads,
            dtype=fisher_dtype,
        )
    for file in sorted(fisher.rglob("*")):
        name = file.relative_to(fisher).as_posix()
        if file.is_file() and not file.name.startswith("."):
            check_link(fisher.parent, file)
            contents[f"fisher/{name}"] = file
    return contents


def _weights(source: Checkpoint, scratch: Path) -> dict[str, Path | bytes]:
    """Give the weights under the names that loaders look for, always with an index.

    With an index, loaders that glob ``*.safetensors`` in sub-folders too leave the Fisher alone.
    """
    weights = source.weights
    files = list(source.files)
    standard = all(re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", file.name)
                   for file in files)  # fmt: skip
    marked = isinstance(weights, TensorFiles) and weights.metadata.get("format") == "pt"
    if not (standard and marked):
        (scratch / "weights").mkdir()
        files = write_tensors(scratch / "weights", weights, metadata={"format": "pt"})
    contents: dict[str, Path | bytes] = {file.name: file for file in files}
    if INDEX not in contents:
        tensors = TensorFiles(source.path, files)
        size = sum(_bytes(tensors, name) for name in tensors)
        index = {
            "metadata": {"total_size": size},
            "weight_map": {name: tensors.file_of(name).name for name in sorted(tensors)},
        }
        contents[INDEX] = (json.dumps(index, ensure_ascii=False, indent=2) + "\n").encode()
    return contents


def _bytes(tensors: TensorFiles, name: str) -> int:
    count = tensors.dtype(name).itemsize
    for size in tensors.shape(name):
        count *= size
    return count


def _others(folder: Path, source: Checkpoint) -> dict[str, Path | bytes]:
    """Give configuration, tokenizer, licence and named code; tell of what is left out."""
    code = named_code(folder)
    used = {file.name for file in source.files} | {CARD, "fisher"}
    contents: dict[str, Path | bytes] = {}
    left_out = []
    for entry in sorted(folder.iterdir()):
        if entry.name in used or entry.name.startswith("."):
            continue
        below = [p for p in sorted(entry.rglob("*")) if p.is_file()] if entry.is_dir() else [entry]
        names = {file.relative_to(folder).as_posix(): file for file in below}
        chosen = [name for name in names if name in code or any(_fits(name, p) for p in PUBLISHED)]
        for name in chosen:
            check_link(folder, names[name])
            is_config = name.endswith("config.json")
            contents[name] = without_local_paths(names[name]) if is_config else names[name]
        if not chosen:
            left_out.append(entry.name)
    if left_out:
        LOG.info(
            "left out, as neither weights, configuration, tokenizer, licence nor code that an "
            "auto_map needs: %s",
            in_one_line([repr(name) for name in left_out]).replace(";", ","),
        )
    return contents


def _fits(name: str, pattern: str) -> bool:
    """Whether a path matches, its folders one by one."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _existing_card(
    api: HfApi, name: str, remote: Remote, folder: Path, fisher_only: bool
) -> str | None:
    """Read the card that is there: the repository's, else the checkpoint's own."""
    own = folder / CARD
    where = f"{name}, {CARD}"
    if CARD in remote.files:
        if remote.files[CARD].size > MAX_CARD_BYTES:
            raise InputError(f"{where} is larger than {MAX_CARD_BYTES // 2**20} MiB")
        with _call(name):
            card = api.hf_hub_download(name, CARD, revision=remote.head)
        data = Path(card).read_bytes()
        if own.is_file() and not fisher_only and own.read_bytes() != data:
            LOG.info("the text of %s is that in the repository, not that of %s", where, own)
    elif own.is_file() and not fisher_only:  # else it is the card of somebody else's weights
        where = str(own)
        check_link(folder, own)
        if own.stat().st_size > MAX_CARD_BYTES:
            raise InputError(f"{where} is larger than {MAX_CARD_BYTES // 2**20} MiB")
        data = own.read_bytes()
        LOG.info("the card keeps the text of %s", own)
    else:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InputError(f"{where} is not text in UTF-8: mend it or take it away") from None


def _source(content: Path | bytes) -> str | bytes:
    """Give what the client hashes and sends: small files as they are now."""
    if isinstance(content, bytes):
        return content
    return str(content) if content.suffix == ".safetensors" else content.read_bytes()


def _stamps(folder: Path, fisher_only: bool) -> dict[Path, tuple[int, ...]]:
    """Tell which files hold the Fisher and its weights, and when they were written last."""
    weights = () if fisher_only else open_checkpoint(folder).files
    stamps: dict[Path, tuple[int, ...]] = {}
    for file in (*weights, *sorted((folder / "fisher").rglob("*"))):
        status = file.stat()
        stamps[file] = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return stamps


def _refuse_written(
    folder: Path, fisher_only: bool, seen: dict[Path, tuple[int, ...]], done: str
) -> None:
    """Refuse to go on with a checkpoint that was written to since it was seen."""
    try:
        same = _stamps(folder, fisher_only) == seen
    except (FileNotFoundError, InputError):
        same = False
    if not same:
        raise InputError(
            f"{folder} was written to while it was read, and nothing was {done}: push again "
            "once nothing writes there"
        )


def _change(there: RepoFile | None, operation: CommitOperationAdd) -> str:
    if there is None:
        return "new"
    return "unchanged" if _is_same(there, operation) else "changed"


def _is_same(there: RepoFile, operation: CommitOperationAdd) -> bool:
    """Compare by size and digest: SHA-256 of a file in LFS, else git's own."""
    info = operation.upload_info
    if there.size != info.size:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == info.sha256.hex()
    digest = hashlib.sha1(b"blob %d\0" % info.size)
    with operation.as_file() as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return there.blob_id == digest.hexdigest()


def _is_stale(path: str, kept: Mapping[str, Any], fisher_only: bool) -> bool:
    """Whether a file is of earlier weights or of an earlier Fisher, which loaders might take."""
    if path in kept or not _OURS_TO_REPLACE.fullmatch(path):
        return False
    return path.startswith("fisher/") or not fisher_only


def _commit(
    api: HfApi,
    name: str,
    remote: Remote,
    additions: list[CommitOperationAdd],
    stale: list[str],
    *,
    message: str,
    revision: str | None,
    create_pr: bool,
    public: bool,
    refuse_written: Callable[[], None],
) -> tuple[str, str | None]:
    """Send the files one by one, then commit them; give the commit, and its pull request."""
    head = remote.head
    if not remote.exists:
        with _call(name):
            api.create_repo(name, private=not public, exist_ok=True)
            info = api.model_info(name, timeout=30)
        head = commit_in(f"{name}: ", info)
        if revision is not None:
            remote = _look(api, name, revision, tagged=False)
    if not additions and not stale and head is not None:
        return head, None
    large = [op for op in additions if op.path_in_repo.endswith(".safetensors")]
    for number, addition in enumerate(large, 1):
        refuse_written()
        size = f"{addition.upload_info.size / 1e6:,.1f} MB"
        LOG.info("sending %s, %s (%d of %d)", addition.path_in_repo, size, number, len(large))
        with _call(name):
            api.preupload_lfs_files(
                name,
                [addition],
                revision=revision if remote.has_branch else None,
                create_pr=create_pr,
                free_memory=False,
            )
    if not remote.has_branch and revision is not None:
        with _call(name):
            api.create_branch(name, branch=revision, revision=head)
    refuse_written()  # what was sent after a replacement would be of another checkpoint
    deletions = [CommitOperationDelete(path) for path in stale]
    with _call(name):
        done = api.create_commit(
            name,
            [*additions, *deletions],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,
        )
    return done.oid, done.pr_url


def _check_arrived(
    api: HfApi,
    name: str,
    commit: str,
    operations: Mapping[str, CommitOperationAdd],
    stale: list[str],
) -> None:
    there = _files_at(
        api, name, commit, f"{name}: the commit {commit} is made, and could not be checked: "
    )
    wrong = [
        f"{path} {'has another digest' if path in there else 'is missing'}"
        for path, operation in operations.items()
        if path not in there or not _is_same(there[path], operation)
    ]
    wrong += [f"{path} is still there" for path in stale if path in there]
    if wrong:
        raise NetworkError(
            f"{name} at {commit} does not hold what was sent: {in_one_line(wrong)}; push again"
        )
