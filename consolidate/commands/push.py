"""What `consolidate push` does, without the command line: verify, write the card, one commit."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from consolidate.chain.factor_consistency import check_factors
from consolidate.commands.push_files import Source, contents_of, open_source
from consolidate.commands.push_repository import (
    Target,
    Upload,
    check_arrived,
    check_name,
    commit_files,
    compared,
    existing_card,
    open_repository,
    set_tag,
)
from consolidate.commands.verify import verify
from consolidate.options import PushOptions, VerifyOptions
from consolidate.results import PushResult
from consolidate.views.card import model_card
from consolidate.views.card_text import Subject
from formats.checkpoint import CARD, open_checkpoint
from formats.digest import set_digest
from formats.errors import UsageError
from formats.fisher_folder import check_belongs, check_fisher_values, check_intact
from formats.fisher_json import Ledger
from formats.hub import FISHER, commits_of, find_local, locate

LOG = logging.getLogger("consolidate")


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
    source = open_source(options)
    target = open_repository(options)
    base_commit = _verified(source, options.base_model)
    with TemporaryDirectory(prefix="consolidate-push-") as scratch:
        contents, ledger = contents_of(source, options, Path(scratch))
        subject = Subject(
            repository=target.name,
            config={} if options.fisher_only else open_checkpoint(source.folder).config,
            base_model=options.base_model,
            base_commit=base_commit,
            fisher_only=options.fisher_only,
            endpoint=target.api.endpoint,
        )
        card = model_card(existing_card(target, source), ledger, subject)
        upload = compared(target, source, {CARD: card.encode(), **contents})
        result = _summary(target, upload, ledger)
        if options.dry_run:
            return result
        names = ", ".join(task.name for task in ledger.tasks[-5:])
        message = options.commit_message or f"Push {names}"
        commit, pull_request = commit_files(target, source, upload, message)
        check_arrived(target, upload, commit, pull_request)
        set_tag(target, commit)
    result["status"] = "unchanged" if commit == target.remote.head else "done"
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
        check_name(name.partition("@")[0], "--base-model ")
        if options.fisher_only and find_local(name).exists():
            raise UsageError(
                f"--base-model {name} is a folder here, and the card is to name the repository on "
                "the Hub that the Fisher was compared with: push from another folder"
            )


def _verified(source: Source, base_model: Sequence[str]) -> str | None:
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


def _summary(target: Target, upload: Upload, ledger: Ledger) -> PushResult:
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
