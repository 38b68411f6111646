"""The same tensors under other names: paired by digest, and by name where several are alike."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec

from formats.digest import TensorRecord
from formats.fisher_json import SAME_AS, Ledger, copies
from formats.wording import few

R = TypeVar("R")
_Parts = tuple[str, ...]
_COMPARED = 100  # names, to name the best fit in a message


@dataclass(frozen=True)
class Renaming:
    """How the tensors that a ledger records are found under other names.

    A tensor without a counterpart is `missing` if the Fisher or a saved head has it, and else
    `left_out`; it is `changed` where a tensor of its dtype and shape has other values in its place.
    """

    names: dict[str, str]  # in the ledger -> found, with the same dtype, shape and bytes
    unclear: list[tuple[list[str], list[str]]]  # alike, and not told apart by their names
    missing: list[str]
    changed: dict[str, str]  # in the ledger -> found
    left_out: list[str]
    extra: list[str]  # found, and not in the ledger

    @property
    def is_pure(self) -> bool:
        """Whether nothing but names changed, as far as the Fisher needs it."""
        return bool(self.names) and not self.missing and not self.changed

    @property
    def is_impure(self) -> bool:
        """Whether most tensors have other names, and some differ in more than that."""
        there = {*self.names.values(), *self.changed.values(), *self.extra}
        gone = sum(old not in there for old in self.names)
        return not self.is_pure and gone > len(self.changed) + len(self.missing)

    def faults(self) -> str:
        """Name a few of the tensors with other values, or without a counterpart, and what to do."""
        pairs = [
            repr(old) + (f" (now {new!r})" if old != new else "")
            for old, new in self.changed.items()
        ]
        if pairs:
            what = f"other values of {few(pairs, 2)}; if it was trained since,"
        else:
            what = (
                f"no tensor with the dtype, shape and bytes of {few(self.missing, 3)}, which the "
                "Fisher protects; save it again with that, or"
            )
        return f"{what} measure its Fisher with `consolidate fisher`"

    def examples(self) -> str:
        """Name a few of the tensors with another name; empty if there are none."""
        other = [f"{old!r} is now {new!r}" for old, new in self.names.items() if old != new]
        return few(other, 2)


def renaming(ledger: Ledger, found: Mapping[str, TensorRecord]) -> Renaming:
    """Find the tensors of a ledger among others by dtype, shape and bytes."""
    again = copies(ledger)
    once = {name: record for name, record in ledger.weights.items() if name not in again}
    names, unclear = _paired(once, found)
    # A second name is sought among what is left, since some programs write a tied tensor once.
    taken = set(names.values()) | {name for _, news in unclear for name in news}
    rest = {name: record for name, record in found.items() if name not in taken}
    second = {name: ledger.weights[name] for name in again}
    names |= _paired(second, rest)[0]
    taken |= set(names.values())
    unpaired = {name for olds, _ in unclear for name in olds}
    extra = [name for name in found if name not in taken]
    needed = {*ledger.fisher, *(name for head in ledger.heads.values() for name in head)}
    lost = [name for name in ledger.weights if name not in names and name not in unpaired]
    changed = _changed([name for name in lost if name not in again], ledger.weights, extra, found)
    return Renaming(
        names,
        unclear,
        missing=[name for name in lost if name in needed and name not in changed],
        changed=changed,
        left_out=[name for name in lost if name not in needed and name not in changed],
        extra=[name for name in extra if name not in changed.values()],
    )


def renamed(ledger: Ledger, names: Mapping[str, str]) -> Ledger:
    """Give a ledger with other names of its tensors; those that `names` lacks keep theirs."""

    def of(records: Mapping[str, R]) -> dict[str, R]:
        return {names.get(name, name): record for name, record in records.items()}

    again = copies(ledger)
    reasons = {name: SAME_AS + names.get(first, first) for name, first in again.items()}
    blocks = {
        name: msgspec.structs.replace(
            block, parameters=tuple(names.get(at, at) for at in block.parameters)
        )
        for name, block in (ledger.blocks or {}).items()
    }
    return replace(
        ledger,
        tasks=[replace(task, layers=of(task.layers)) for task in ledger.tasks],
        unprotected=of(ledger.unprotected | reasons),
        weights=of(ledger.weights),
        fisher=of(ledger.fisher),
        anchor=None if ledger.anchor is None else of(ledger.anchor),
        blocks=blocks or None,
        factor_anchor=None if ledger.factor_anchor is None else of(ledger.factor_anchor),
        heads={task: of(head) for task, head in ledger.heads.items()},
    )


def _paired(
    olds: Mapping[str, TensorRecord], news: Mapping[str, TensorRecord]
) -> tuple[dict[str, str], list[tuple[list[str], list[str]]]]:
    """Pair equal records one to one; give the pairs, and the groups that names do not tell apart.

    What has one counterpart shows where modules went, and alike tensors are sought beside it. The
    rest is paired by the longest common suffix of the dotted names.
    """
    alike: dict[TensorRecord, tuple[list[str], list[str]]] = {}
    for side, records in enumerate((olds, news)):
        for name, record in records.items():
            alike.setdefault(record, ([], []))[side].append(name)
    groups = [group for group in alike.values() if group[0] and group[1]]
    names = {old[0]: new[0] for old, new in groups if len(old) == len(new) == 1}
    moved = _moved(names)
    unclear = []
    for old, new in groups:
        if len(old) == len(new) == 1:
            continue
        found = _beside(old, new, moved)
        left = [name for name in old if name not in found]
        free = set(new) - set(found.values())
        found |= _by_suffix(left, [name for name in new if name in free])
        names |= found
        left = [name for name in old if name not in found]
        free -= set(found.values())
        if left and free:
            unclear.append((left, [name for name in new if name in free]))
    return {name: names[name] for name in olds if name in names}, unclear


def _moved(names: Mapping[str, str]) -> dict[_Parts, _Parts]:
    """Give the new name of each module all of whose known tensors moved alike."""
    found: dict[_Parts, set[_Parts]] = {}
    for old, new in names.items():
        before, after = _parts(old), _parts(new)
        for length in range(1, _common(before, after) + 1):
            found.setdefault(before[:-length], set()).add(after[:-length])
    return {before: next(iter(after)) for before, after in found.items() if len(after) == 1}


def _beside(
    olds: Sequence[str], news: Collection[str], moved: Mapping[_Parts, _Parts]
) -> dict[str, str]:
    """Pair names by where the innermost known module of each went."""
    there, claims = set(news), dict[str, list[str]]()
    for old in olds:
        parts = _parts(old)
        for length in range(len(parts) - 1, -1, -1):
            if (to := moved.get(parts[:length])) is not None:
                name = ".".join(to + parts[length:])
                if name in there:
                    claims.setdefault(name, []).append(old)
                    break
    return {claim[0]: name for name, claim in claims.items() if len(claim) == 1}


def _by_suffix(olds: Sequence[str], news: Sequence[str]) -> dict[str, str]:
    """Pair names by their longest common suffix, where only one on each side has it."""
    pairs = {name: name for name in olds if name in set(news)}
    sides = [dict.fromkeys(name for name in names if name not in pairs) for names in (olds, news)]
    for length in range(max((len(_parts(name)) for name in [*olds, *news]), default=0), -1, -1):
        endings: dict[_Parts, tuple[list[str], list[str]]] = {}
        for side, names in enumerate(sides):
            for name in names:
                parts = _parts(name)
                if len(parts) >= length:
                    ending = parts[len(parts) - length :]
                    endings.setdefault(ending, ([], []))[side].append(name)
        for old, new in endings.values():
            if len(old) == len(new) == 1:
                pairs[old[0]] = new[0]
                del sides[0][old[0]], sides[1][new[0]]
    return pairs


def _changed(
    olds: Sequence[str],
    expected: Mapping[str, TensorRecord],
    news: Sequence[str],
    found: Mapping[str, TensorRecord],
) -> dict[str, str]:
    """Find what has other values: dtype, shape and the last part of the name are the same."""
    like: dict[tuple[str, tuple[int, ...], str], list[str]] = {}
    for name in news:
        like.setdefault((found[name].dtype, found[name].shape, _parts(name)[-1]), []).append(name)
    pairs = {}
    for old in olds:
        kind = expected[old].dtype, expected[old].shape, _parts(old)[-1]
        if fits := like.get(kind, [])[:_COMPARED]:
            best = max(fits, key=lambda new: _common(_parts(old), _parts(new)))
            pairs[old] = old if old in found else best
    return pairs


def _common(a: _Parts, b: _Parts) -> int:
    """Count the last parts that two names have in common."""
    pairs = zip(reversed(a), reversed(b), strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _parts(name: str) -> _Parts:
    return tuple(name.split("."))
