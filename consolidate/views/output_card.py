"""The model card of a checkpoint that a command writes; it differs from those of its sources."""

import logging
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from consolidate.views.card import (
    MAX_CARD_BYTES,
    is_repository,
    licence,
    model_card,
    named_models,
    of_a_folder,
)
from consolidate.views.card_text import Subject
from formats.atomic import write_file
from formats.checkpoint import CARD, Checkpoint, open_checkpoint
from formats.errors import InputError
from formats.fisher_json import Ledger
from formats.hub import commits_of

LOG = logging.getLogger("consolidate")
_OF_A_TRAINING = re.compile(r"checkpoint-\d+")


def write_card(
    staging: Path, target: Path, ledger: Ledger, sources: Sequence[Checkpoint], relation: str
) -> None:
    """Write the card that `push` would write, as far as known without a repository.

    Only licences and names of repositories are taken from the sources' cards. Where the output
    replaces its source, what a person wrote there is kept.
    """
    made = open_checkpoint(staging)
    existing = None
    for source in sources:
        if target.exists() and source.path.exists() and target.samefile(source.path):
            existing = _card(source)
            if existing is None and (source.path / CARD).is_file():
                shutil.copyfile(source.path / CARD, staging / CARD)
                return
    subject = Subject(
        config=made.config,
        base_model=tuple(dict.fromkeys(name for source in sources for name in _names(source))),
        relation=relation if made.adapter is None else "adapter",
        licence=_licence(sources),
    )
    _write(staging, existing, ledger, subject)


def renew_card(staging: Path, ledger: Ledger) -> None:
    """Rewrite our block in the card of a checkpoint that was copied with another Fisher.

    A card without our block, or that was pushed, stays unchanged.
    """
    made = open_checkpoint(staging)
    card = _card(made)
    if card is not None and of_a_folder(card):
        relation = None if made.adapter is None else "adapter"
        _write(staging, card, ledger, Subject(config=made.config, relation=relation))


def _write(staging: Path, existing: str | None, ledger: Ledger, subject: Subject) -> None:
    try:
        card = model_card(existing, ledger, subject)
    except InputError as error:  # no reason to lose the result
        LOG.info("the model card is left unchanged: %s", error)
        card = existing or ""
    write_file(staging / CARD, card)


def _card(source: Checkpoint) -> str | None:
    """Read the card beside weights, if there is one that can be read."""
    path = source.path / CARD
    try:
        if path.is_file() and path.stat().st_size <= MAX_CARD_BYTES:
            return path.read_bytes().decode()  # line ends unchanged
    except (OSError, UnicodeDecodeError) as error:
        LOG.info("%s cannot be read: %s", path, error)
    return None


def _licence(sources: Sequence[Checkpoint]) -> dict[str, Any]:
    """Give the licence that all sources state."""
    stated = []
    for source in sources:
        try:
            stated.append(licence(_card(source) or ""))
        except InputError as error:
            LOG.info("the licence of %s cannot be read: %s", source.path, error)
            stated.append({})
    if all(one == stated[0] for one in stated):
        return stated[0]
    paths = ", ".join(str(source.path) for source in sources)
    LOG.info("the model cards of %s state different licences: the new one states none", paths)
    return {}


def _names(source: Checkpoint) -> Sequence[str]:
    """Name the repositories that a checkpoint is, or was made from; never a path."""
    here: tuple[str, ...] = ()
    if source.adapter is not None:
        named = source.adapter.get("base_model_name_or_path")
        if source.base is not None:
            here = tuple(commits_of(source.base.path))
    else:
        named = source.config.get("_name_or_path")
        with suppress(InputError):
            here = tuple(commits_of(source.path)) or named_models(_card(source) or "")
    if here:
        return [name for name in here if is_repository(name)]
    return [named] if isinstance(named, str) and _is_elsewhere(named, source.path) else []


def _is_elsewhere(name: str, checkpoint: Path) -> bool:
    """Whether a name can only be a repository's; a relative path may look like one."""
    first, _, rest = name.partition("/")
    if not rest or not is_repository(name) or _OF_A_TRAINING.fullmatch(rest):
        return False
    return not Path(first).exists() and first not in checkpoint.resolve().parts
