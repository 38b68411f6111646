"""The repository that `push` publishes to: what it has, what changes, and the one commit."""

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects
from huggingface_hub.utils.sha import git_hash

from consolidate.commands.push_files import Source
from consolidate.options import PushOptions
from consolidate.results import Change
from consolidate.views.card import MAX_CARD_BYTES, is_repository
from formats.checkpoint import CARD
from formats.checkpoint_files import check_link
from formats.errors import InputError, NetworkError, UsageError
from formats.fisher_folder import in_one_line
from formats.hub import COPIES, OTHER_FRAMEWORKS
from formats.hub_errors import ODD_ANSWER, commit_in, hub_call
from formats.wording import few

LOG = logging.getLogger("consolidate")
AGAIN = (
    "push again, which sends only what is missing; if uploads keep failing, set "
    "HF_HUB_DISABLE_XET=1"
)


_OURS_TO_REPLACE = re.compile(
    r"fisher/.*|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
    r"|adapter_config\.json|adapter_model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
)
_OTHER_FORMATS = re.compile(
    r"(pytorch_)?model(-\d+-of-\d+)?\.bin(\.index\.json)?|rust_model\.ot"
    r"|tf_model.*\.h5(\.index\.json)?|flax_model.*\.msgpack(\.index\.json)?"
)
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
class Target:
    """The repository, as the Hub reports it, and the options."""

    api: HfApi
    name: str
    remote: Remote
    asked: bool  # whether the Hub could be asked for its contents
    options: PushOptions


@dataclass(frozen=True)
class Upload:
    """The files the repository will have, and how they differ from those it has now."""

    files: dict[str, CommitOperationAdd]
    changes: dict[str, Change]
    stale: list[str]  # files of earlier weights or Fishers, to be deleted


def check_name(name: str, what: str = "") -> None:
    """Refuse what cannot be the name of a repository."""
    if not is_repository(name):
        raise UsageError(f"{what}{name!r} is not a repository name: expected USER/MODEL")


def _call(name: str) -> AbstractContextManager[None]:
    return hub_call(f"{name}: ", AGAIN)


def open_repository(options: PushOptions) -> Target:
    """Ask the Hub for the repository; a dry run continues where the Hub cannot be reached."""
    api = HfApi(token=options.token, library_name="consolidate")
    try:
        name = _full_name(api, options.repository)
        remote = _look(api, name, options.revision, tagged=options.tag is not None)
        target = Target(api, name, remote, True, options)
    except NetworkError:
        if not options.dry_run:
            if is_offline_mode():
                raise InputError(
                    f"{options.repository}: HF_HUB_OFFLINE disables the Hub: unset it to push"
                ) from None
            raise
        name = options.repository
        LOG.info("the Hub could not be asked for the contents of %s: all files are listed", name)
        target = Target(api, name, NOTHING, False, options)
    _check_remote(target)
    return target


def _full_name(api: HfApi, name: str) -> str:
    check_name(name)
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


def _check_remote(target: Target) -> None:
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
    if target.options.fisher_only and any(_WEIGHTS.fullmatch(path) for path in remote.files):
        raise UsageError(
            f"{name} has weights, and --fisher-only is for repositories without: push the whole "
            "checkpoint (weights that are up to date there are not sent again)"
        )


def existing_card(target: Target, source: Source) -> str | None:
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


def compared(target: Target, source: Source, contents: Mapping[str, Path | bytes]) -> Upload:
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
    same = all(changes[path] == "unchanged" for path in files if _WEIGHTS.fullmatch(path))
    others = remote.files.keys() - files.keys()
    stale = sorted(path for path in others if _is_stale(path, source.fisher_only, same))
    copies = filter_repo_objects(others.difference(stale), allow_patterns=COPIES + OTHER_FRAMEWORKS)
    if not same and (left := sorted(map(repr, copies))):
        LOG.info(
            "%s: %s may hold earlier weights still: delete them on the Hub, or make them again",
            name,
            few(left, 5),
        )
    changed = bool(stale) or set(changes.values()) != {"unchanged"}
    tag = target.options.tag
    if tag in remote.tags and (changed or remote.tags[tag] != remote.head):
        raise UsageError(
            f"{name} already has a tag {tag!r} of another commit: choose another --tag"
        )
    return Upload(files, changes, stale)


def _payload(content: Path | bytes) -> Path | bytes:
    """Give what the client hashes and sends: the contents of small files, as of now."""
    if isinstance(content, bytes) or content.suffix == ".safetensors":
        return content
    return content.read_bytes()


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


def _is_stale(path: str, fisher_only: bool, same_weights: bool) -> bool:
    """Whether a file is of earlier weights or an earlier Fisher, which loaders might load."""
    if fisher_only:
        return path.startswith("fisher/")
    if _OTHER_FORMATS.fullmatch(path):
        return not same_weights
    return _OURS_TO_REPLACE.fullmatch(path) is not None


def commit_files(
    target: Target, source: Source, upload: Upload, message: str
) -> tuple[str, str | None]:
    """Send the files one by one, then commit them; give the commit, and its pull request."""
    api, name, revision, remote = target.api, target.name, target.options.revision, target.remote
    additions = [file for path, file in upload.files.items() if upload.changes[path] != "unchanged"]
    _check_card(target, additions)
    if not remote.exists:
        with _call(name):
            api.create_repo(name, private=not target.options.public, exist_ok=True)
        remote = _look(api, name, revision, tagged=False)
    head = remote.head
    if not additions and not upload.stale and head is not None:
        _make_branch(target, remote)
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
    _make_branch(target, remote)
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


def _check_card(target: Target, additions: Sequence[CommitOperationAdd]) -> None:
    """Let the Hub check the card's metadata before anything is sent, as it does at the commit."""
    check = getattr(target.api, "_validate_yaml", None)  # of the client itself
    for file in additions:
        if file.path_in_repo == CARD and check is not None:
            with file.as_file() as card, _call(target.name):
                check(card.read().decode())


def _make_branch(target: Target, remote: Remote) -> None:
    """Make the branch that is pushed to, where there is none."""
    if not remote.has_branch and target.options.revision is not None:
        with _call(target.name):
            target.api.create_branch(
                target.name, branch=target.options.revision, revision=remote.head
            )


def check_arrived(target: Target, upload: Upload, commit: str, opened: str | None) -> None:
    """Compare the repository at a commit, or at that of a pull request, with what was sent."""
    what = f"commit {commit}" if opened is None else f"pull request {opened}"
    made = f"{target.name}: the {what} was made, but could not be checked: "
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


def set_tag(target: Target, commit: str) -> None:
    """Tag the commit, if that was asked for and is not done."""
    tag, name = target.options.tag, target.name
    if tag is not None and target.remote.tags.get(tag) != commit:
        with hub_call(
            f"{name}: the commit {commit} was made, but not the tag {tag!r}: ",
            "push again, which sets only the tag",
        ):
            target.api.create_tag(name, tag=tag, revision=commit)
