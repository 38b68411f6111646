"""The text of a model card, which the ledger gives: tasks, Fisher, how to fine-tune further."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from consolidate.chain.consistency import side_by_side, side_by_side_text
from consolidate.views.markdown import escaped, table
from consolidate.views.matrix import ledger_matrix, matrix_summary, matrix_table
from consolidate.views.summary import (
    encoding_text,
    estimator_text,
    learned_text,
    shown_task,
    size_text,
)
from formats.digest import set_digest
from formats.fisher_json import Ledger, copies, covered
from formats.wording import few


@dataclass(frozen=True)
class Subject:
    """What a card is about, besides its ledger."""

    repository: str = ""  # user/model; empty for a folder that was not pushed
    config: Mapping[str, Any] = field(default_factory=dict)  # the contents of config.json
    base_model: tuple[str, ...] = ()  # repositories of the models it was made from
    base_commit: str | None = None  # of the weights that a Fisher without weights belongs to
    fisher_only: bool = False
    endpoint: str = ""  # the address of the Hub; empty for no links
    relation: str | None = None  # finetune, merge or adapter; default by the number of bases
    licence: Mapping[str, Any] = field(default_factory=dict)  # used if the card has none

    @property
    def bases(self) -> list[str]:
        """The base models without their commits."""
        return [name.partition("@")[0] for name in self.base_model]


def card_text(ledger: Ledger, subject: Subject) -> str:
    """Fill in card.md; parts, separated by two blank lines, are left out if a field is None."""
    matrix, branches = ledger_matrix(ledger), side_by_side(ledger)
    rule = ledger.merge_rule + (f", γ = {ledger.gamma:g}" if ledger.merge_rule == "online" else "")
    copied = copies(ledger)
    unprotected = [why for name, why in ledger.unprotected.items() if name not in copied]
    merged = subject.relation or ("merge" if len(subject.base_model) > 1 else None)
    # Tasks that were measured on another program's merge came one after the other.
    several = branches or (merged == "merge" and ledger.merge_rule == "separate")
    found = {
        **_what(subject),
        **_use(ledger, subject),
        **_factors(ledger),
        "tasks_heading": "Tasks of the merged models" if several else "Tasks, in training order",
        "names": ", ".join(escaped(task.name) for task in ledger.tasks),
        "weights": set_digest(ledger.weights),
        "tasks": _tasks(ledger),
        "matrix": matrix and matrix_table(matrix_summary(matrix)),
        "side_by_side": f" {side_by_side_text(branches)}".rstrip(),
        "measured": _measured(ledger),
        "values": f"{sum(record.count for record in ledger.fisher.values()):,}",
        "dtype": next(iter(ledger.fisher.values())).dtype,
        "fisher": set_digest(ledger.fisher),
        "rule": rule,
        "unprotected": len(unprotected) or None,
        "reasons": "; ".join(map(escaped, sorted(set(unprotected))[:5])),
        "reveals": _reveals(ledger, "this repository" if subject.repository else "`fisher/`"),
        "digests": _digests(ledger),
    }
    parts = map(Template, Path(__file__).with_name("card.md").read_text("utf-8").split("\n\n\n"))
    return "\n\n".join(
        part.substitute(found).strip()
        for part in parts
        if all(found[name] is not None for name in part.get_identifiers())
    )


def _digests(ledger: Ledger) -> str:
    """Say which data can be recognized by a digest."""
    named = [escaped(task.name) for task in ledger.tasks if task.data_digest is not None]
    replayed = [task for task in ledger.tasks if task.replayed and task.replayed.data_digest]
    named += [f"what was replayed for {escaped(task.name)}" for task in replayed]
    prompted = [task for task in ledger.tasks if task.generated and task.generated.prompts]
    named += [f"the prompts of {escaped(task.name)}" for task in prompted]
    scored = {n for task in ledger.tasks for n, b in (task.benchmarks or {}).items() if b.digest}
    named += [f"the benchmark {escaped(name)}" for name in sorted(scored)]
    if not named:
        return "The ledger has no digest of any data."
    of = f"The ledger has a digest of the data of {', '.join(named)}"
    return f"{of}, which can confirm a guess of the exact data."


def _reveals(ledger: Ledger, place: str) -> str:
    """Say what the Fisher tells of the data that it was measured on."""
    measured = [task for task in ledger.tasks if task.examples is not None]
    if measured and all(task.generated for task in measured):
        prompted = any(task.generated and task.generated.prompts for task in measured)
        return (
            "The Fisher was measured on texts that the model generated itself"
            + (" from prompts" if prompted else "")
            + ", and on no other data: it follows from the weights"
            + (" and the prompts." if prompted else " alone.")
        )
    return (
        f"No row of the data is in {place}. But a Fisher is an average of squared gradients over "
        "all of the data: together with labels, counts and scores it reveals something about them, "
        "and may help to find out whether an example was among them."
    )


def _factors(ledger: Ledger) -> dict[str, str | None]:
    """Describe the matrices beside Λ; those that a ledger has none for are None."""
    named = dict.fromkeys(("factors", "matrices", "factors_dtype", "factors_size", "covered"))
    if not ledger.factors or not ledger.blocks:
        return {**named, "structure": "a diagonal Fisher: it ignores how weights act together"}
    sizes = [record.nbytes for record in ledger.factors.values()]
    values = sum(ledger.fisher[name].count for name in covered(ledger.blocks))
    return {
        "factors": set_digest(ledger.factors),
        "matrices": f"{len(sizes)} {'matrix' if len(sizes) == 1 else 'matrices'}",
        "factors_dtype": next(iter(ledger.factors.values())).dtype,
        "factors_size": size_text(sum(sizes)),
        "covered": f"{values:,}",
        "structure": "a Fisher that is diagonal or, in a covered layer, the same matrix for each "
        "output: it ignores most of how weights act together",
    }


def _what(subject: Subject) -> dict[str, str | None]:
    """Name the model and what it was made from, or the weights that the Fisher belongs to."""
    links = [
        f"[{escaped(base)}]({subject.endpoint}/{base})" if subject.endpoint else escaped(base)
        for base in subject.bases
    ]
    if subject.fisher_only:
        at = f" at commit `{subject.base_commit}`" if subject.base_commit else ""
        return {"weights_of": links[0] + at, "kind": None}
    architectures = subject.config.get("architectures")
    kind = architectures[0] if isinstance(architectures, list) and architectures else "model"
    kind = "LoRA adapter" if subject.relation == "adapter" else escaped(str(kind))
    made = f" made from {' and '.join(links)}" if links else ""
    return {"weights_of": None, "kind": kind + made}


def _use(ledger: Ledger, subject: Subject) -> dict[str, str]:
    """Give the parts of a command that continues from here, in a shell and in Python."""
    where, option = subject.repository or "path/to/this/folder", {}
    if subject.fisher_only:
        pinned = {"revision": subject.base_commit} if subject.base_commit else {}
        where, option = subject.bases[0], {**pinned, "fisher": subject.repository}
    elif subject.relation == "adapter":
        option = {"base-model": next(iter(subject.base_model), "BASE-MODEL")}
    elif library(subject) != "transformers":
        option = {"model": "PACKAGE.MODULE:FACTORY"}
    of_all = (t.ewc_lambda for t in reversed(ledger.tasks) if t.budget is None)  # not of an end
    last = next((strength for strength in of_all if strength), None)
    strength = "auto" if last is None else f"{last:g}"
    note = "λ is that of the last task here; others may need another (`auto` searches for it)."
    if last is None:
        note = "`auto` searches for λ, the strength of the penalty; a number skips the search."
    return {
        "where": where,
        "shell": "".join(f" --{name} {value}" for name, value in option.items()),
        "python": "".join(
            f'\n    {name.replace("-", "_")}="{value}",' for name, value in option.items()
        ),
        "strength": strength,
        "strength_python": '"auto"' if last is None else strength,
        "strength_note": note,
    }


def _tasks(ledger: Ledger) -> str:
    rows = [["", "task", "objective", "labels", "data", "learned with"]]
    for number, task in enumerate(map(shown_task, ledger.tasks), 1):
        labels = few([escaped(label) for label in task["labels"] or []], 8) or "–"
        learned = "(measured only)" if task["penalty"] is None else escaped(learned_text(task))
        name, objective, data = map(escaped, (task["name"], task["objective"], task["data"]))
        rows.append([str(number), name, objective, labels, data or "–", learned])
    return table(rows)


def _measured(ledger: Ledger) -> str:
    rows = [["task", "expectation over the labels", "measured on", "seed", "weight"]]
    for task in map(shown_task, ledger.tasks):
        tokens = f", {task['units']:,} tokens" if task["unit"] == "token" and task["units"] else ""
        on = "–"
        if task["examples"] is not None:
            on = f"{task['examples']:,} examples{tokens}{encoding_text(task)}"
        weight, seed = f"{task['weight']:g}", str(task["seed"])
        rows.append([escaped(task["name"]), estimator_text(task), on, seed, weight])
    return table(rows)


def library(subject: Subject) -> str:
    """Give the Hub's name of the library that loads the repository."""
    if subject.fisher_only:
        return "consolidate"
    if subject.relation == "adapter":
        return "peft"
    known = "model_type" in subject.config and "architectures" in subject.config
    return "transformers" if known else "pytorch"
