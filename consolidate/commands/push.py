"""What `consolidate push` does, without the command line: verify, write the card, one commit."""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from consolidate.chain.factor_consistency import check_factors
from consolidate.commands.upload_rules import named_code, without_local_paths
from consolidate.commands.verify import check_fisher_values, verify
from consolidate.options import PushOptions, VerifyOptions
from consolidate.results import Change, PushResult
from consolidate.runtime.devices import dtype_of_name
from consolidate.views.card import MAX_CARD_BYTES, Subject, is_repository, model_card
from formats.checkpoint import CARD, Checkpoint, open_checkpoint
from formats.checkpoint_files import check_link
from formats.digest import set_digest
from formats.errors import InputError, NetworkError, UsageError
from formats.fisher_folder import (
    StoredFisher,
    check_belongs,
    check_intact,
    in_one_line,
    read_fisher,
    write_fisher,
)
from formats.fisher_json import Ledger
from formats.hub import FISHER, commits_of, locate
from formats.hub_errors import ODD_ANSWER, commit_in, hub_call
from formats.tensors import TensorFiles, dtype_of, write_tensors

LOG = logging.getLogger("consolidate")
INDEX = "model.safetensors.index.json"
AGAIN = (
    "push again, which sends only what is missing; if uploads keep failing, set "
    "HF_HUB_DISABLE_XET=1"
)

# Files that a model needs; anything else in a folder may be data or a secret, and is not sent.
PUBLISHED = (
    *("config.json", "generation_config.json", "*processor_config.json", "tokenizer*.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "*.spm", "*.tiktoken"),
    *("vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
    *("[0-9]_*/config.json", "[0-9]_*/model.safetensors", "LICENSE*", "NOTICE*"),
)
_OURS_TO_REPLACE = re.compile(
    r"fisher/.*|(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|tf_model.*\.h5(\.index\.json)?|flax_model.*\.msgpack(\.index\.json)?|rust_model\.ot"
)
_STANDARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_WEIGHTS = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)")


@dataclass(frozen=True)
class Remote:
    """A repository as it is before a push."""

    exists: bool
    private: bool | None  # None if it does not exist
    head: str | None  # the parent of the next commit; None if there is none
    has_branch: bool  # whether the branch exists; else the head is the default branch's
    files: dict[str, RepoFile]  # at the head, by path
    tags: dict[str, str]  # the commits of its tags, by name


NOTHING = Remote(False, None, None, True, {}, {})
"""A repository that does not exist."""


@dataclass(frozen=True)
class _Source:
    """What is published, with the state of its files at the start."""

    folder: Path
    fisher_only: bool
    stamps: dict[Path, tuple[int, ...]]
    stored: StoredFisher

    def refuse_written(self, done: str) -> None:
        """Refuse to continue with a checkpoint that was written to since the start."""
        try:
            same = _stamps(self.folder, self.fisher_only) == self.stamps
        except (FileNotFoundError, InputError):
            same = False
        if not same:
            raise InputError(
                f"{self.folder} changed while it was being read; nothing was {done}: push again "
                "once nothing else writes there"
            )


@dataclass(frozen=True)
class _Target:
    """The repository, as the Hub reports it, and the options."""

    api: HfApi
    name: str
    remote: Remote
    asked: bool  # whether the Hub could be asked for its contents
    options: PushOptions


@dataclass(frozen=True)
class _Upload:
    """The files the repository will have, and how they differ from those it has now."""

    files: dict[str, CommitOperationAdd]
    changes: dict[str, Change]
    stale: list[str]  # files of earlier weights or Fishers, to be deleted


def push(options: PushOptions) -> PushResult:
    """Publish a checkpoint with its Fisher, ledger and card on the Hub, in one commit.

    The checkpoint is verified before anything is sent, and the repository's contents after. The
    commit is made only if the repository has not changed meanwhile. Until then the repository is
    unchanged, and pushing again sends only what is missing.

    Returns:
        The commit, every file with its size and change, and digests.

    Raises:
        UsageError: The options contradict each other or the repository.
        InputError: The checkpoint is damaged, or the Hub refuses.
        NonFiniteError: NaN or infinity in the weights or in the Fisher.
        NetworkError: The Hub cannot be reached or fails, or does not have what was sent.
    """
    _check_options(options)
    tag, fisher_only = options.tag, options.fisher_only
    source = _opened(options.checkpoint, fisher_only)
    if options.structure == "inputs" and source.stored.factors is None:
        raise UsageError(
            f"--structure inputs: {source.stored.folder} has no factors: measure them with "
            "`consolidate fisher --structure inputs`, or leave the option out"
        )
    api = HfApi(token=options.token, library_name="consolidate")
    name, remote, asked = options.repository, NOTHING, True
    try:
        name = _full_name(api, options.repository)
        remote = _look(api, name, options.revision, tagged=tag is not None)
    except NetworkError:
        if not options.dry_run:
            raise
        name, asked = options.repository, False
        LOG.info("the Hub could not be asked for the contents of %s: all files are listed", name)
    target = _Target(api, name, remote, asked, options)
    _check_remote(target, fisher_only)
    base_commit = _verified(source, options.base_model)
    with TemporaryDirectory(prefix="consolidate-push-") as scratch:
        contents, ledger = _contents(source, options, Path(scratch))
        subject = Subject(
            repository=name,
            config={} if fisher_only else open_checkpoint(source.folder).config,
            base_model=options.base_model,
            base_commit=base_commit,
            fisher_only=fisher_only,
            endpoint=api.endpoint,
        )
        card = model_card(_existing_card(target, source), ledger, subject)
        upload = _upload(target, source, {CARD: card.encode(), **contents})
        result = _summary(target, upload, ledger)
        if options.dry_run:
            return result
        message = "Push " + ", ".join(task.name for task in ledger.tasks[-5:])
        commit, pull_request = _commit(target, source, upload, options.commit_message or message)
        _check_arrived(target, upload, commit)
        if tag is not None and remote.tags.get(tag) != commit:
            with hub_call(
                f"{name}: the commit {commit} was made, but not the tag {tag!r}: ",
                "push again, which sets only the tag",
            ):
                api.create_tag(name, tag=tag, revision=commit)
    result["status"] = "unchanged" if commit == remote.head else "done"
    result["commit"], result["pull_request"] = commit, pull_request
    return result


def _check_options(options: PushOptions) -> None:
    """Refuse options that contradict each other, before anything is read; never show the token."""
    create_pr, tag, token = options.create_pr, options.tag, options.token
    if create_pr and options.revision not in (None, "main"):
        raise UsageError(
            "--create-pr opens a pull request to main and cannot be combined with --revision: "
            "leave one of them out"
        )
    if create_pr and tag is not None:
        raise UsageError(
            "--tag names a commit of a branch and cannot be combined with --create-pr: leave one "
            "of them out"
        )
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise UsageError(
            "--token: expected an access token of the Hub, found an empty or invalid text"
        )
    if options.fisher_only and len(options.base_model) != 1:
        raise UsageError(
            "--fisher-only needs one --base-model REPO, the repository with the weights that the "
            f"Fisher belongs to; found {len(options.base_model)}"
        )
    for name in options.base_model:
        _check_name(name.partition("@")[0], "--base-model ")


def _check_name(name: str, what: str = "") -> None:
    if not is_repository(name):
        raise UsageError(f"{what}{name!r} is not a repository name: expected USER/MODEL")


def _opened(checkpoint: str | Path, fisher_only: bool) -> _Source:
    folder = locate(checkpoint)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: expected a checkpoint with its Fisher")
    if not fisher_only and open_checkpoint(folder).adapter is not None:
        raise InputError(f"{folder} is an adapter: only whole models can be published")
    stamps = _stamps(folder, fisher_only)
    return _Source(folder, fisher_only, stamps, read_fisher(folder / "fisher"))


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
        except RepositoryNotFoundError as error:
            answer = error.response  # the client does not know the answer to a refused token
            refused = answer.status_code == 401 and "Authorization" in answer.request.headers
            if refused or isinstance(error, GatedRepoError):
                raise
            return NOTHING
    head, has_branch = commit_in(f"{name}: ", info), True
    if revision is not None:
        with _call(name):
            try:
                of_branch = api.model_info(name, revision=revision, timeout=30)
                head = commit_in(f"{name}: ", of_branch)
            except RevisionNotFoundError:
                has_branch = False
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


def _check_remote(target: _Target, fisher_only: bool) -> None:
    name, remote = target.name, target.remote
    if not remote.exists and target.options.create_pr:
        raise InputError(
            f"{name} does not exist on the Hub, so --create-pr cannot open a pull request there: "
            "leave it out to create the repository"
        )
    if remote.exists and not remote.private and not target.options.public:
        raise UsageError(
            f"{name} is public: push there with --public, or name a private repository"
        )
    if remote.private and target.options.public:
        LOG.info("%s stays private despite --public: change that in its settings on the Hub", name)
    if fisher_only and any(_WEIGHTS.fullmatch(path) for path in remote.files):
        raise UsageError(
            f"{name} has weights, and --fisher-only is for repositories without: push the whole "
            "checkpoint (weights that are up to date there are not sent again)"
        )


def _verified(source: _Source, base_model: Sequence[str]) -> str | None:
    """Check every byte; with --fisher-only give the commit of the repository with the weights."""
    if not source.fisher_only:
        LOG.info("verifying %s", source.folder)
        verify(VerifyOptions((source.folder,)))
        return None
    base = base_model[0]
    weights = locate(base, without=FISHER)
    LOG.info("checking that %s has the weights that the Fisher belongs to", base)
    check_intact(source.stored)
    check_fisher_values(source.stored)
    check_factors(source.stored)
    check_belongs(source.stored, open_checkpoint(weights).weights, base)
    return next(iter(commits_of(weights).values()), None)


def _contents(
    source: _Source, options: PushOptions, scratch: Path
) -> tuple[dict[str, Path | bytes], Ledger]:
    """Give the file or the bytes for every path except the card's, and the ledger."""
    contents: dict[str, Path | bytes] = {}
    if not source.fisher_only:
        checkpoint = open_checkpoint(source.folder)
        contents |= _weights(checkpoint, scratch)
        contents |= _others(source.folder, checkpoint)
    fisher, stored = source.folder / "fisher", source.stored
    as_stored = dtype_of(stored.fisher, next(iter(stored.fisher)))
    dtype = dtype_of_name(options.fisher_dtype) or as_stored
    diagonal = options.structure == "diagonal" and stored.factors is not None
    if dtype != as_stored or diagonal:
        fisher = scratch / "fisher"
        left_out = ("factors", "blocks", "factor_anchor", "factor_offset") if diagonal else ()
        # No command writes it as it is now, so that it is never up to date.
        none: dict[str, Any] = dict.fromkeys((*left_out, "made_from", "description"))
        tasks = [replace(t, made_from=None, description=None) for t in stored.ledger.tasks]
        write_fisher(
            fisher,
            stored.fisher,
            replace(stored.ledger, **none, tasks=tasks),
            anchor=stored.anchor,
            heads=stored.heads,
            factors=None if diagonal else stored.factors,
            factor_anchor=None if diagonal else stored.factor_anchor,
            dtype=dtype,
        )
        stored = read_fisher(fisher)
    for file in sorted(fisher.rglob("*")):
        name = file.relative_to(fisher).as_posix()
        if file.is_file() and not file.name.startswith("."):
            check_link(fisher.parent, file)
            contents[f"fisher/{name}"] = file
    return contents, stored.ledger


def _weights(source: Checkpoint, scratch: Path) -> dict[str, Path | bytes]:
    """Give the weights under the names that loaders look for, always with an index.

    With an index, loaders that glob ``*.safetensors`` in sub-folders too leave the Fisher alone.
    """
    weights = source.weights
    files = list(source.files)
    standard = all(_STANDARD.fullmatch(file.name) for file in files)
    marked = isinstance(weights, TensorFiles) and weights.metadata.get("format") == "pt"
    if not (standard and marked):
        (scratch / "weights").mkdir()
        files = write_tensors(scratch / "weights", weights, metadata={"format": "pt"})
    contents: dict[str, Path | bytes] = {file.name: file for file in files}
    if INDEX not in contents:
        tensors = TensorFiles(source.path, files)
        sizes = (tensors.dtype(at).itemsize * math.prod(tensors.shape(at)) for at in tensors)
        index = {
            "metadata": {"total_size": sum(sizes)},
            "weight_map": {name: tensors.file_of(name).name for name in sorted(tensors)},
        }
        contents[INDEX] = (json.dumps(index, ensure_ascii=False, indent=2) + "\n").encode()
    return contents


def _others(folder: Path, source: Checkpoint) -> dict[str, Path | bytes]:
    """Give configuration, tokenizer, licence and named code; log what is left out."""
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
            "not sent: %s (only weights, configuration, tokenizer, licence and the code of an "
            "auto_map are)",
            in_one_line([repr(name) for name in left_out]).replace(";", ","),
        )
    return contents


def _fits(name: str, pattern: str) -> bool:
    """Whether a path matches as a whole, its folders one by one."""
    return PurePosixPath("/", name).match(f"/{pattern}")


def _existing_card(target: _Target, source: _Source) -> str | None:
    """Read the existing card: the repository's, else the checkpoint's."""
    own = source.folder / CARD
    # With --fisher-only it is the card of somebody else's weights.
    has_own = own.is_file() and not source.fisher_only
    there = target.remote.files.get(CARD)
    if there is not None:
        where, size = f"{target.name}, {CARD}", there.size
    elif has_own:
        check_link(source.folder, own)
        where, size = str(own), own.stat().st_size
    else:
        return None
    if size > MAX_CARD_BYTES:
        raise InputError(
            f"{where}: expected at most {MAX_CARD_BYTES:,} bytes, found {size:,}: shorten it"
        )
    if there is not None:
        with _call(target.name):
            card = target.api.hf_hub_download(target.name, CARD, revision=target.remote.head)
        data = Path(card).read_bytes()
        if has_own and own.read_bytes() != data:
            LOG.info("%s keeps the text in the repository, not that of %s", where, own)
    else:
        data = own.read_bytes()
        LOG.info("the model card keeps the text of %s", own)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InputError(f"{where}: expected text in UTF-8: correct or remove it") from None


def _upload(target: _Target, source: _Source, contents: Mapping[str, Path | bytes]) -> _Upload:
    """Digest all that is to be sent, and compare it with the repository's files."""
    name, remote = target.name, target.remote
    files = {path: CommitOperationAdd(path, _payload(c)) for path, c in contents.items()}
    for file in files.values():
        _ = file.upload_info.sha256  # which the client may postpone until it sends
    source.refuse_written("sent")
    changes = {
        path: _change(remote.files.get(path), file) if target.asked else "not compared"
        for path, file in files.items()
    }
    stale = sorted(p for p in remote.files if _is_stale(p, files, source.fisher_only))
    changed = bool(stale) or set(changes.values()) != {"unchanged"}
    tag = target.options.tag
    if tag in remote.tags and (changed or remote.tags[tag] != remote.head):
        raise UsageError(
            f"{name} already has a tag {tag!r} of another commit: choose another --tag"
        )
    return _Upload(files, changes, stale)


def _summary(target: _Target, upload: _Upload, ledger: Ledger) -> PushResult:
    """Summarize what a push would do."""
    private = target.remote.private
    return {
        "status": "dry run",
        "repository": target.name,
        "url": f"{target.api.endpoint}/{target.name}",
        "private": not target.options.public if private is None else private,
        "commit": None,
        "pull_request": None,
        "tag": target.options.tag,
        "weights": set_digest(ledger.weights),
        "fisher": set_digest(ledger.fisher),
        "files": [
            {"path": path, "size": file.upload_info.size, "change": upload.changes[path]}
            for path, file in upload.files.items()
        ],
        "deleted": upload.stale,
        "code": [path for path in upload.files if path.endswith(".py")],
    }


def _payload(content: Path | bytes) -> Path | bytes:
    """Give what the client hashes and sends: the contents of small files, as of now."""
    if isinstance(content, bytes) or content.suffix == ".safetensors":
        return content
    return content.read_bytes()


def _stamps(folder: Path, fisher_only: bool) -> dict[Path, tuple[int, ...]]:
    """List the files of the Fisher and its weights, with times of their last change."""
    weights = () if fisher_only else open_checkpoint(folder).files
    stamps: dict[Path, tuple[int, ...]] = {}
    for file in (*weights, *sorted((folder / "fisher").rglob("*"))):
        status = file.stat()
        stamps[file] = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return stamps


def _change(there: RepoFile | None, operation: CommitOperationAdd) -> Change:
    """Compare by size and digest: SHA-256 of a file in LFS, else git's own."""
    if there is None:
        return "new"
    same = there.size == operation.upload_info.size
    if same and there.lfs is not None:
        same = there.lfs.sha256 == operation.upload_info.sha256.hex()
    elif same:  # a small file
        with operation.as_file() as file:
            same = there.blob_id == git_hash(file.read())
    return "unchanged" if same else "changed"


def _is_stale(path: str, kept: Mapping[str, Any], fisher_only: bool) -> bool:
    """Whether a file is of earlier weights or an earlier Fisher, which loaders might load."""
    if path in kept or not _OURS_TO_REPLACE.fullmatch(path):
        return False
    return path.startswith("fisher/") or not fisher_only


def _commit(
    target: _Target, source: _Source, upload: _Upload, message: str
) -> tuple[str, str | None]:
    """Send the files one by one, then commit them; give the commit, and its pull request."""
    api, name, revision, remote = target.api, target.name, target.options.revision, target.remote
    additions = [file for path, file in upload.files.items() if upload.changes[path] != "unchanged"]
    if not remote.exists:
        with _call(name):
            api.create_repo(name, private=not target.options.public, exist_ok=True)
        remote = _look(api, name, revision, tagged=False)
    head = remote.head
    if not additions and not upload.stale and head is not None:
        return head, None
    large = [file for file in additions if file.path_in_repo.endswith(".safetensors")]
    for number, file in enumerate(large, 1):
        source.refuse_written("committed")
        size = f"{file.upload_info.size / 1e6:,.1f} MB"
        LOG.info("sending %s, %s (%d of %d)", file.path_in_repo, size, number, len(large))
        with _call(name):
            api.preupload_lfs_files(
                name,
                [file],
                revision=revision if remote.has_branch else None,
                create_pr=target.options.create_pr,
                free_memory=False,
            )
    if not remote.has_branch and revision is not None:
        with _call(name):
            api.create_branch(name, branch=revision, revision=head)
    # Files sent after a replacement would belong to another checkpoint.
    source.refuse_written("committed")
    with _call(name):
        done = api.create_commit(
            name,
            [*additions, *map(CommitOperationDelete, upload.stale)],
            commit_message=message,
            revision=revision,
            create_pr=target.options.create_pr,
            parent_commit=head,
        )
    return done.oid, done.pr_url


def _check_arrived(target: _Target, upload: _Upload, commit: str) -> None:
    made = f"{target.name}: the commit {commit} was made, but could not be checked: "
    there = _files_at(target.api, target.name, commit, made)
    wrong = [
        f"{path} {'has another digest' if path in there else 'is missing'}"
        for path, file in upload.files.items()
        if _change(there.get(path), file) != "unchanged"
    ]
    wrong += [f"{path} is still there" for path in upload.stale if path in there]
    if wrong:
        raise NetworkError(
            f"{target.name} at {commit} differs from what was sent: {in_one_line(wrong)}: push "
            "again"
        )
