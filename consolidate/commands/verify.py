"""Verify every byte of a checkpoint and its Fisher, and the consistency of the ledger."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from torch import Tensor

from consolidate.chain.consistency import contradictions, descent
from consolidate.chain.factor_consistency import factor_contradictions, traces_of
from consolidate.chain.opening import check_base, check_kind, named_base, with_base
from consolidate.options import VerifyOptions
from consolidate.results import Descent, TensorSet, VerifyResult
from formats.atomic import unreplaced
from formats.checkpoint import Checkpoint, is_fisher_alone, open_checkpoint, weight_records
from formats.digest import TensorRecord, differences, set_digest, tensor_record
from formats.errors import ConsolidateError, InputError, NonFiniteError, UsageError
from formats.fisher_folder import (
    LEDGER_NAME,
    check_values,
    in_one_line,
    read_fisher,
    tensor_sets,
    under_other_names,
)
from formats.fisher_json import Ledger
from formats.hub import FISHER, commits_of, locate
from formats.tensors import TensorFiles


def verify(options: VerifyOptions) -> VerifyResult:
    """Check every digest, name, shape and value, and the consistency of the ledger.

    Returns:
        JSON-ready: for each set of tensors their number, bytes and the set's digest;
        ``other_files`` that no digest covers; and in ``later`` the same for the other checkpoints,
        with ``descends_by``: ``weights``, or ``tasks`` if the ledger has no digest of the parent.

    Raises:
        InputError: Anything missing, extra, renamed, resized, of another dtype, with other bytes,
            or negative in the Fisher; each finding names the file and the tensor. Or the ledger
            contradicts itself, the Fisher's traces, or the previous checkpoint; or a factor is
            asymmetric, has a negative eigenvalue, or another trace than the Fisher it stands for.
        NonFiniteError: Values are NaN or infinite, and nothing else is wrong.
    """
    if not options.checkpoints:
        raise UsageError("verify needs at least one checkpoint")
    before, *later = options.checkpoints
    summary, ledger = _verify_one(before, options.revision, options.base_model)
    if not later:
        return summary
    summary["later"] = []
    for path in later:
        found, next_ledger = _verify_one(path, None, options.base_model)
        how, lines = descent(ledger, next_ledger)
        if lines:
            raise InputError(
                f"{Path(path) / 'fisher' / LEDGER_NAME} does not descend from {before}: "
                f"{in_one_line(lines)}"
            )
        found["descends_by"] = cast(Descent, how)
        summary["later"].append(found)
        before, ledger = path, next_ledger
    return summary


def _verify_one(
    checkpoint: str | Path, revision: str | None, base_model: str | Path | None
) -> tuple[VerifyResult, Ledger]:
    folder = locate(checkpoint, revision)
    return unreplaced(folder, lambda: _verify_folder(folder, checkpoint, base_model))


def _verify_folder(
    folder: Path, checkpoint: str | Path, base_model: str | Path | None
) -> tuple[VerifyResult, Ledger]:
    alone = is_fisher_alone(folder)
    if alone and base_model is None:
        raise InputError(
            f"{folder} has a Fisher but no weights: name the model it belongs to with --base-model"
        )
    source = open_checkpoint(locate(str(base_model), without=FISHER) if alone else folder)
    of_adapter = None if alone else base_model
    if of_adapter is not None or named_base(source) is not None:
        source = with_base(source, of_adapter)
    other = source if alone and source.adapter is None else source.base
    weights_path = source.files[0] if len(source.files) == 1 else source.path
    stored = read_fisher(folder / "fisher")
    check_kind(stored, source)
    check_base(stored.ledger, stored.folder, source)
    findings: list[ConsolidateError] = []
    of_weights = _verify_set(
        "weights", source.weights, stored.ledger.weights, findings, weights_path
    )
    why = None
    if findings:
        why = under_other_names(stored, weight_records(source.weights), str(source.path))
    if why is not None:
        not_finite = [each for each in findings if isinstance(each, NonFiniteError)]
        findings = [InputError(why), *not_finite]
    elif alone and findings:
        hint = f"{weights_path} does not have the weights that the Fisher in {folder} belongs to"
        findings.insert(0, InputError(f"{hint}: name the right model with --base-model"))
    others, heads = {}, {}
    for kind, tensors, records in tensor_sets(stored):
        found = _verify_set(kind, tensors, records, findings, tensors.path)
        if kind == "head":
            heads[tensors.files[0].stem] = found
        else:
            others[kind] = found
    if not findings:  # else the traces are of damaged values
        traces = traces_of(stored)
        where = stored.folder / LEDGER_NAME
        lines = contradictions(stored.ledger, traces)
        findings.extend(InputError(f"{where}: {line}") for line in lines)
        findings.extend(map(InputError, factor_contradictions(stored, traces)))
    if findings:
        worst = all(isinstance(finding, NonFiniteError) for finding in findings)
        raise (NonFiniteError if worst else InputError)(in_one_line([*map(str, findings)]))
    summary = {
        "checkpoint": str(checkpoint),
        "commits": commits_of(folder, None if other is None else other.path),
        "tasks": [task.name for task in stored.ledger.tasks],
        "generated": [t.name for t in stored.ledger.tasks if t.generated is not None],
        "base": stored.ledger.base,
        "base_model": None if other is None else str(other.path),
        "weights": of_weights,
        "heads": heads,
        **others,
        "other_files": _other_files(folder, source),
    }
    return cast(VerifyResult, summary), stored.ledger


def _other_files(root: Path, source: Checkpoint) -> list[str]:
    """Name the files beside weights and Fisher; hidden ones and links to folders are skipped."""
    others = []
    for at, folders, names in os.walk(root):
        folder = Path(at)
        top = folder == root
        folders[:] = [n for n in folders if not n.startswith(".") and not (top and n == "fisher")]
        others += [
            str((folder / name).relative_to(root))
            for name in names
            if not name.startswith(".") and folder / name not in source.files
        ]
    return sorted(others)


def _verify_set(
    kind: str,
    tensors: Mapping[str, Tensor],
    records: Mapping[str, TensorRecord],
    findings: list[ConsolidateError],
    path: Path,
) -> TensorSet:
    """Read every tensor once; list wrong values, then differences from the ledger."""
    found: dict[str, TensorRecord] = {}
    for name in tensors:
        tensor = tensors[name]
        found[name] = tensor_record(tensor)
        try:
            where = f"{_file(tensors, name, path)}: {name!r}"
            damaged = name in records and records[name] != found[name]  # then reported once
            symmetric = kind == "factors" and not damaged
            check_values(tensor, where, not_negative=kind == "fisher", symmetric=symmetric)
        except ConsolidateError as finding:
            findings.append(finding)
    for name in sorted(records.keys() & found.keys()):
        for line in differences({name: records[name]}, {name: found[name]}):
            findings.append(InputError(f"{_file(tensors, name, path)}: {line}"))
    if isinstance(tensors, TensorFiles) and len(tensors.files) == 1:
        path = tensors.files[0]
    missing = {name: record for name, record in records.items() if name not in found}
    extra = {name: record for name, record in found.items() if name not in records}
    findings.extend(InputError(f"{path}: {line}") for line in differences(missing, extra))
    size = sum(record.nbytes for record in found.values())
    return {"tensors": len(found), "bytes": size, "digest": set_digest(found)}


def _file(tensors: Mapping[str, Tensor], name: str, path: Path) -> Path:
    return tensors.file_of(name) if isinstance(tensors, TensorFiles) else path
