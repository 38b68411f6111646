"""What `push` publishes of a checkpoint, by its path in the repository."""

import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from consolidate.chain.output import bytes_of
from consolidate.commands.push_rules import named_code, without_local_paths
from consolidate.options import PushOptions
from consolidate.runtime.devices import dtype_of_name
from formats.checkpoint import CARD, Checkpoint, open_checkpoint
from formats.checkpoint_files import check_link
from formats.errors import InputError, UsageError
from formats.fisher_folder import StoredFisher, read_fisher, write_fisher
from formats.fisher_json import Ledger
from formats.hub import locate
from formats.tensors import TensorFiles, dtype_of, write_tensors
from formats.wording import few

LOG = logging.getLogger("consolidate")
INDEX = "model.safetensors.index.json"
# Files that a model needs; anything else in a folder may be data or a secret, and is not sent.
PUBLISHED = (
    *("config.json", "generation_config.json", "*processor_config.json", "tokenizer*.json"),
    *("tokenizer.model", "spiece.model", "spm.model", "spm_char.model", "sentencepiece.model"),
    *("sentencepiece.bpe.model", "*.spm", "*.tiktoken", "bpe.codes", "dict.txt", "tekken.json"),
    *("vocab.json", "vocab.txt", "vocab-src.json", "vocab-tgt.json", "target_vocab.json"),
    *("entity_vocab.json", "byte_maps.json", "emoji.json", "prophetnet.tokenizer"),
    *("word_shape.json", "word_pronunciation.json"),
    *("merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
    *("[0-9]_*/config.json", "[0-9]_*/model.safetensors", "[0-9]_*/pytorch_model.bin"),
    *("LICENSE*", "NOTICE*"),
)
_STANDARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class Source:
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


def open_source(options: PushOptions) -> Source:
    """Open the checkpoint that is published, or its Fisher alone."""
    folder, fisher_only = locate(options.checkpoint), options.fisher_only
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: expected a checkpoint with its Fisher")
    if not fisher_only and open_checkpoint(folder).adapter is not None:
        raise InputError(f"{folder} is an adapter: only whole models can be published")
    stamps = _stamps(folder, fisher_only)
    source = Source(folder, fisher_only, stamps, read_fisher(folder / "fisher"))
    if options.structure == "inputs" and source.stored.factors is None:
        raise UsageError(
            f"--structure inputs: {source.stored.folder} has no factors: measure them with "
            "`consolidate fisher --structure inputs`, or leave the option out"
        )
    return source


def contents_of(
    source: Source, options: PushOptions, scratch: Path
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
        place = file.relative_to(fisher)
        if file.is_file() and not _is_hidden(place):
            check_link(fisher.parent, file)
            contents[f"fisher/{place.as_posix()}"] = file
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
        index = {
            "metadata": {"total_size": bytes_of(tensors)},
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
        left_out += [name for name in names if name not in chosen] if chosen else [entry.name]
    if left_out:
        LOG.info(
            "not sent: %s (only weights, configuration, tokenizer, licence and the code of an "
            "auto_map are)",
            few([repr(name) for name in left_out], 5),
        )
    return contents


def _fits(name: str, pattern: str) -> bool:
    """Whether a path matches as a whole, its folders one by one."""
    return PurePosixPath("/", name).match(f"/{pattern}")


def _is_hidden(place: Path) -> bool:
    return any(part.startswith(".") for part in place.parts)


def _stamps(folder: Path, fisher_only: bool) -> dict[Path, tuple[int, ...]]:
    """List the files of the Fisher and its weights, with times of their last change."""
    weights = () if fisher_only else open_checkpoint(folder).files
    stamps: dict[Path, tuple[int, ...]] = {}
    fisher = folder / "fisher"
    own = [file for file in sorted(fisher.rglob("*")) if not _is_hidden(file.relative_to(fisher))]
    for file in (*weights, *own):
        status = file.stat()
        stamps[file] = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return stamps
