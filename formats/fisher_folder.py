"""The Fisher folder beside the weights: Λ, its anchor, heads of earlier tasks, the ledger."""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from formats.atomic import recover, unreplaced, write_file
from formats.checkpoint import weight_records
from formats.checkpoint_files import check_link
from formats.digest import TensorRecord, differences, dtype_name, set_digest, tensor_record
from formats.disk_errors import final_path
from formats.errors import InputError, NonFiniteError
from formats.fisher_json import (
    FISHER_DTYPES,
    FORMAT,
    Ledger,
    ledger_bytes,
    needed_version,
    read_ledger,
)
from formats.renaming import renaming
from formats.tensors import (
    MAX_SHARD_SIZE,
    TensorFiles,
    extremes,
    open_tensors,
    write_tensor_file,
    write_tensors,
)

LEDGER_NAME = "fisher.json"
METADATA_KEY = FORMAT
SETS = ("fisher", "anchor", "factors", "factor_anchor")
"""The sets of tensors that have files of their kind's name."""


@dataclass(frozen=True)
class StoredFisher:
    """An open Fisher folder: its ledger, and its tensors, each read on access.

    `fisher` is Λ by the names of the weights file; `anchor` is μ by the same names, None where it
    equals the weights; `factors` are matrices by the ledger's block names, `factor_anchor` what
    their penalty is around, None where it equals the weights; `heads` are by task.
    """

    folder: Path
    ledger: Ledger
    fisher: TensorFiles
    anchor: TensorFiles | None
    heads: dict[str, TensorFiles] = field(default_factory=dict)
    factors: TensorFiles | None = None
    factor_anchor: TensorFiles | None = None


def write_fisher(
    folder: Path,
    fisher: Mapping[str, Tensor],
    ledger: Ledger,
    *,
    anchor: Mapping[str, Tensor] | None = None,
    heads: Mapping[str, Mapping[str, Tensor]] | None = None,
    factors: Mapping[str, Tensor] | None = None,
    factor_anchor: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> Ledger:
    """Write a Fisher folder after checking all of it, and return the ledger as written.

    Λ is stored in `dtype`, float32 or bfloat16, factors and anchors in float32. The records of all
    tensors but the weights are computed here.
    """
    heads = heads or {}
    if dtype_name(dtype) not in FISHER_DTYPES:
        raise InputError(
            f"a Fisher is stored as {' or '.join(FISHER_DTYPES)}, not as {dtype_name(dtype)}; "
            "choose another dtype"
        )
    if lost := ledger.heads.keys() - heads.keys():
        raise InputError(
            f"the ledger lists a head of task {min(lost)!r}, but `heads` has none; pass its tensors"
        )
    sets: dict[str, tuple[Mapping[str, Tensor] | None, torch.dtype, str, dict[str, bool]]] = {
        "fisher": (fisher, dtype, "Fisher", {"not_negative": True}),
        "anchor": (anchor, torch.float32, "anchor", {}),
        # Rounded to bfloat16 they would have negative eigenvalues, which push weights away.
        "factors": (factors, torch.float32, "factor", {"symmetric": True}),
        "factor_anchor": (factor_anchor, torch.float32, "factor anchor", {}),
    }
    for kind in ("factors", "factor_anchor"):
        if sets[kind][0] is None and getattr(ledger, kind) is not None:
            raise InputError(f"the ledger lists {kind}, but `{kind}` is None; pass their tensors")
    where = final_path(folder)
    records: dict[str, Any] = {
        kind: None if t is None else _measured(t, cast, f"{where}: the {what}", **checks)
        for kind, (t, cast, what, checks) in sets.items()
    }
    records["heads"] = {t: _measured(head, None, f"{where}: {t}") for t, head in heads.items()}
    ledger = replace(ledger, **records)
    data = ledger_bytes(ledger, str(where / LEDGER_NAME))
    of = needed_version(ledger), set_digest(ledger.weights)

    folder.mkdir(exist_ok=True)
    for stem, (tensors, cast, *_) in sets.items():
        if tensors is not None:
            write_tensors(
                folder,
                tensors,
                stem=stem,
                metadata=file_metadata(stem, *of),
                max_shard_size=max_shard_size,
                dtype=cast,
            )
    for task, head in heads.items():
        (folder / "heads").mkdir(exist_ok=True)
        path = folder / "heads" / f"{task}.safetensors"
        write_tensor_file(path, head, file_metadata("head", *of))
    write_file(folder / LEDGER_NAME, data)
    return ledger


def read_fisher(folder: str | Path) -> StoredFisher:
    """Open a Fisher folder, and check the headers of its tensor files against its ledger.

    Values are neither read nor checked; `verify` does that.

    Args:
        folder: ``CHECKPOINT/fisher``.

    Returns:
        The ledger, and Λ, μ, factors with their anchor and heads by name, each tensor read on
        access.

    Raises:
        InputError: The folder or a file is missing, a file does not belong, the version is unknown,
            or names, shapes, dtypes or metadata differ from the ledger.
        NonFiniteError: A number of the ledger overflows to infinity.
    """
    folder = Path(folder)
    return unreplaced(folder.parent, lambda: _read(folder))


def _read(folder: Path) -> StoredFisher:
    recover(folder)
    if not folder.parent.is_dir():
        found = "a file" if folder.parent.exists() else "nothing"
        raise InputError(f"{folder.parent}: expected a checkpoint folder, found {found}")
    if not folder.is_dir():
        raise InputError(
            f"{folder} does not exist: the checkpoint has no Fisher; measure it with "
            "`consolidate fisher`"
        )
    if folder.name == "fisher":  # a user who typed another name may well mean a link
        check_link(folder.parent, folder)
    check_link(folder, folder / LEDGER_NAME)
    ledger = read_ledger(folder / LEDGER_NAME)
    sets: dict[str, Any] = {
        kind: None if getattr(ledger, kind) is None else open_tensors(folder, kind) for kind in SETS
    }
    check_link(folder, folder / "heads")
    heads = {task: open_tensors(folder / "heads", task) for task in ledger.heads}
    stored = StoredFisher(folder, ledger, heads=heads, **sets)
    _check_files(stored)
    of = needed_version(ledger), set_digest(ledger.weights)
    for kind, tensors, records in tensor_sets(stored):
        expected = file_metadata(kind, *of)[METADATA_KEY]
        for file in tensors.files:
            _check_metadata(file, expected)
        _check_headers(tensors, records)
    return stored


def tensor_sets(stored: StoredFisher) -> Iterator[tuple[str, TensorFiles, dict[str, TensorRecord]]]:
    """Yield every set of tensors of the folder: its kind, the tensors and the ledger's records."""
    for kind in SETS:
        if (tensors := getattr(stored, kind)) is not None:
            yield kind, tensors, getattr(stored.ledger, kind)
    for task, head in stored.heads.items():
        yield "head", head, stored.ledger.heads[task]


def check_belongs(stored: StoredFisher, weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse a Fisher that was measured at other weights; every byte of the weights is read."""
    found = weight_records(weights)
    if lines := differences(stored.ledger.weights, found):
        if (why := under_other_names(stored, found, where)) is not None:
            raise InputError(why)
        raise InputError(
            f"{stored.folder / LEDGER_NAME} does not belong to the weights of {where}: "
            f"{in_one_line(lines, 2)}; measure the Fisher of these weights with "
            "`consolidate fisher`, or name the weights that it was measured at (--revision; the "
            "model card may have their commit)"
        )


def under_other_names(
    stored: StoredFisher, found: Mapping[str, TensorRecord], where: str
) -> str | None:
    """Explain weights that are a Fisher's under other names, and name the command for them."""
    fit, ledger = renaming(stored.ledger, found), stored.folder / LEDGER_NAME
    if stored.ledger.base is not None or not (fit.is_pure or fit.is_impure):
        return None
    same = f"the tensors of {ledger} under other names ({fit.examples()})"
    if fit.is_impure:
        return f"{where} has {same}, but {fit.faults()}"
    if not fit.examples():
        apart = [*(f"without {n!r}" for n in fit.left_out), *(f"and {n!r}" for n in fit.extra)]
        same = f"the tensors of {ledger} {in_one_line(apart, 2)}"
    beside = stored.folder.parent if stored.folder.name == "fisher" else stored.folder
    of = "" if beside == Path(where) else f" --fisher-of {quote(str(beside))}"
    return (
        f"{where} has {same}: carry the Fisher over with "
        f"`consolidate remap {quote(where)}{of} --output-dir DIR`"
    )


def check_intact(stored: StoredFisher, *, kinds: Collection[str] = (*SETS, "head")) -> None:
    """Refuse tensors of the folder whose bytes differ from the ledger's digests; all are read."""
    for kind, tensors, records in tensor_sets(stored):
        if kind in kinds and (lines := differences(records, weight_records(tensors))):
            raise InputError(
                f"{tensors.path} is damaged: {in_one_line(lines, 2)}; measure the Fisher again, or "
                "fetch it again"
            )


def in_one_line(lines: list[str], most: int = 5) -> str:
    """Join the first few of several findings, counting the rest."""
    rest = len(lines) - most
    return "; ".join(lines[:most]) + (f"; and {rest} more" if rest > 0 else "")


def file_metadata(kind: str, version: int, weights_digest: str) -> dict[str, str]:
    """Return the one metadata entry of a tensor file; `tensor_sets` names the kinds."""
    content = {"kind": kind, "version": version, "weights": weights_digest}
    return {METADATA_KEY: json.dumps(content, separators=(",", ":"))}


def check_values(
    tensor: Tensor, where: str, *, not_negative: bool = False, symmetric: bool = False
) -> None:
    """Refuse values that are not finite, negative in a Fisher, or asymmetric in a factor."""
    if not tensor.is_floating_point():
        return
    # isfinite does not support float8.
    values = tensor if tensor.element_size() > 1 else tensor.float()
    least, largest = extremes(values)
    if not (math.isfinite(least) and math.isfinite(largest)):
        not_finite = values.numel() - int(torch.isfinite(values).count_nonzero())
        raise NonFiniteError(
            f"{where} has {not_finite} of {values.numel()} values NaN or infinite; measure it again"
        )
    if not_negative and least < 0:
        negative = int((values < 0).count_nonzero())
        raise InputError(
            f"{where} has {negative} of {values.numel()} values below 0, which a sum of squares "
            "cannot be; measure it again"
        )
    if symmetric and not (values.ndim == 2 and torch.equal(values, values.T)):
        raise InputError(f"{where} is not symmetric; measure it again")
    if symmetric and bool((values.diagonal() < 0).any()):
        raise InputError(f"{where} has values below 0 on its diagonal; measure it again")


def check_fisher_values(stored: StoredFisher) -> None:
    """Refuse values in a Fisher folder that `check_values` refuses."""
    for kind, tensors, _ in tensor_sets(stored):
        for name in tensors:
            where = f"{tensors.path}: {kind} of {name!r}"
            symmetric = kind == "factors"
            check_values(tensors[name], where, not_negative=kind == "fisher", symmetric=symmetric)


def _measured(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None, what: str, **checks: bool
) -> dict[str, TensorRecord]:
    """Record each tensor as it will be stored, and refuse forbidden values."""
    records = {}
    for name, tensor in tensors.items():
        stored = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        check_values(stored, f"{what} of {name!r}", **checks)
        records[name] = tensor_record(stored)
    return records


def _check_files(stored: StoredFisher) -> None:
    """Refuse files that the format does not know, except hidden ones."""
    folder, heads = stored.folder, stored.folder / "heads"
    expected = {folder / LEDGER_NAME, *(heads / f"{task}.safetensors" for task in stored.heads)}
    found = list(folder.iterdir())
    if stored.heads:
        expected.add(heads)
        found += heads.iterdir()
    for kind, tensors, _ in tensor_sets(stored):
        if kind != "head":
            expected |= {folder / name for name in _file_names(kind, tensors)}
    for file in sorted(found):
        if file not in expected and not file.name.startswith("."):
            raise InputError(
                f"{file} is not part of the Fisher folder: its ledger does not list it; move it "
                "elsewhere"
            )


def _file_names(stem: str, tensors: TensorFiles) -> set[str]:
    names = {file.name for file in tensors.files}
    if names == {f"{stem}.safetensors"}:
        return names
    shards = [f"{stem}-{i:05}-of-{len(names):05}.safetensors" for i in range(1, len(names) + 1)]
    for expected, name in zip(shards, sorted(names), strict=True):
        if name != expected:
            raise InputError(
                f"{tensors.path}: {stem}.safetensors.index.json: expected {len(names)} shards, "
                f"with the name {expected} among them, found {name}; fetch or save the folder again"
            )
    return names | {f"{stem}.safetensors.index.json"}


def _check_metadata(file: Path, expected: str) -> None:
    with safe_open(file, framework="pt") as handle:
        metadata: dict[str, str] = handle.metadata() or {}
    if list(metadata) != [METADATA_KEY]:
        raise InputError(
            f"{file}: expected exactly one metadata key, {METADATA_KEY!r}, found {sorted(metadata)}"
        )
    found = metadata[METADATA_KEY]
    with suppress(ValueError, RecursionError):
        content: Any = json.loads(found)
        for name, value in json.loads(expected).items():
            if isinstance(content, dict) and content.get(name) != value:
                raise InputError(
                    f"{file}, metadata: expected {name} {value!r} as in {LEDGER_NAME}, found "
                    f"{content.get(name)!r}: the files come from different runs; measure the "
                    "Fisher again, or fetch it again"
                )
    if found != expected:
        raise InputError(f"{file}, metadata: expected {expected}, found {found[:200]!r}")


def _check_headers(tensors: TensorFiles, records: Mapping[str, TensorRecord]) -> None:
    """Compare names, dtypes and shapes, which the headers give without reading any value."""
    headers = {
        name: TensorRecord(
            dtype_name(tensors.dtype(name)),
            tensors.shape(name),
            records[name].sha256 if name in records else "",
        )
        for name in tensors
    }
    if lines := differences(records, headers):
        extra = next((name for name in headers if name not in records), None)
        path = tensors.files[0] if len(tensors.files) == 1 else tensors.path
        if extra is not None:
            path = tensors.file_of(extra)
        raise InputError(f"{path} does not match {LEDGER_NAME}: {in_one_line(lines)}")
