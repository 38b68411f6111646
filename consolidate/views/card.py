"""The model card of a checkpoint: facts from the ledger beside what a person wrote."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Template
from typing import Any

import yaml
from huggingface_hub import CardData, EvalResult, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import validate_repo_id

from consolidate.chain.consistency import side_by_side, side_by_side_text
from consolidate.views.markdown import escaped, table
from consolidate.views.matrix import (
    chain_matrix,
    columns_and_rows,
    ledger_matrix,
    matrix_summary,
    matrix_table,
)
from consolidate.views.summary import (
    budget_text,
    encoding_text,
    estimator_text,
    penalty_text,
    replay_text,
    size_text,
)
from formats.digest import set_digest
from formats.errors import InputError
from formats.fisher_json import Ledger, benchmarks_of, copies, covered
from formats.wording import few

MAX_CARD_BYTES = 2**20
BEGIN = "<!-- consolidate:begin {}(each push rewrites everything up to the end mark) -->"
END = "<!-- consolidate:end -->"
SOURCE = "consolidate ledger"
TAGS = ("consolidate", "ewc")
_LICENCE = ("license", "license_name", "license_link")
_BLOCK = re.compile(r"<!-- consolidate:begin\b ?([\w./-]*).*?<!-- consolidate:end -->", re.DOTALL)
_MARK = re.compile(r"<!-- consolidate:(begin|end)\b")
_PIPELINES = {
    "sequence-classification": "text-classification",
    "multi-label": "text-classification",
    "token-classification": "token-classification",
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "seq2seq-lm": "text2text-generation",
    "image-classification": "image-classification",
}


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


class _Metadata(CardData):
    """Fields unchanged: ModelCardData would drop nulls, and results it does not know."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class _Card(ModelCard):
    card_data_class = _Metadata  # type: ignore[assignment]


def model_card(existing: str | None, ledger: Ledger, subject: Subject) -> str:
    """Write a card from a ledger, and keep everything else in an existing card.

    Written here are the block between two marks, and in the metadata the tags, the results from
    the ledger and missing fields. A block with the name of another repository came with its model,
    which is then the base model unless one is named; in a card of a folder that was not pushed,
    the metadata name it.
    """
    existing = existing or ""
    windows = 0 < existing.count("\n") == existing.count("\r\n")
    card = _read(existing.replace("\r\n", "\n") if windows else existing)
    ours = _BLOCK.search(card.text)
    if ours and not subject.base_model:
        subject = replace(subject, base_model=_named(card, subject.repository))
    _merge_metadata(vars(card.data), ledger, subject)
    name = subject.repository
    block = f"{BEGIN.format(f'{name} ' if name else '')}\n{_body(ledger, subject)}\n{END}"
    rest, blocks = _BLOCK.subn("", card.text)
    if _MARK.search(rest) or blocks > 1:
        raise InputError(
            f"README.md{f' of {name}' if name else ''}: expected the marks "
            "<!-- consolidate:begin … --> and <!-- consolidate:end --> once each or not at all: "
            "remove the others"
        )
    if ours and (rest.strip() or ours[1]):
        card.text = _BLOCK.sub(lambda _: block, card.text)
    else:
        heading = f"# {escaped(name)}\n\n" if name else ""
        start = f"{card.text.rstrip()}\n\n" if rest.strip() else f"\n{heading}"
        card.text = f"{start}{block}\n"
    return str(card).replace("\n", "\r\n") if windows else str(card)


def named_models(existing: str) -> tuple[str, ...]:
    """Name the repository of a card with our block; for a folder, the model's bases."""
    return _named(_read(existing))


def of_a_folder(existing: str) -> bool:
    """Return whether a card has our block, of a folder that was not pushed since."""
    ours = _BLOCK.search(existing)
    return ours is not None and not ours[1]


def licence(existing: str) -> dict[str, Any]:
    """Give the licence fields in the metadata of a card."""
    data = vars(_read(existing).data)
    return {key: data[key] for key in _LICENCE if isinstance(data.get(key), str | list)}


def is_repository(name: Any) -> bool:
    """Return whether something can be the name of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return isinstance(name, str)


def _read(existing: str) -> ModelCard:
    existing = existing.removeprefix("\ufeff")
    try:
        found = REGEX_YAML_BLOCK.search(existing)  # the library warns about a card without
        card = _Card(existing if found else f"---\n{{}}\n---\n{existing}")
        str(card)  # fails if a field has the name of a method
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"README.md: expected metadata in YAML, names mapped to values: {reason}"
        ) from None
    return card


def _named(card: ModelCard, repository: str = "") -> tuple[str, ...]:
    """Give the models that a card with our block names as bases; none for other cards."""
    ours = _BLOCK.search(card.text)
    if ours is None:
        return ()
    bases = vars(card.data).get("base_model") if ours[1] in ("", repository) else ours[1]
    bases = bases if isinstance(bases, list) else [bases]
    return tuple(bases) if all(map(is_repository, bases)) else ()


def _merge_metadata(data: dict[str, Any], ledger: Ledger, subject: Subject) -> None:
    tags = data.get("tags") or []
    tags = list(tags) if isinstance(tags, list) else [tags]
    data["tags"] = [*tags, *(tag for tag in TAGS if tag not in tags)]
    data.setdefault("library_name", _library(subject))
    for key, value in subject.licence.items():
        data.setdefault(key, value)
    if subject.base_model:
        bases = subject.bases[0] if len(subject.bases) == 1 else subject.bases
        if bases != data.get("base_model"):
            data.pop("base_model_relation", None)
        data["base_model"] = bases
        if not subject.fisher_only:
            relation = "finetune" if len(subject.bases) == 1 else "merge"
            data.setdefault("base_model_relation", subject.relation or relation)
    index = _kept_results(data.pop("model-index", None) or [])
    if not subject.fisher_only and (results := evaluation_results(ledger, subject)):
        name = subject.repository.rpartition("/")[2] or "model"
        ours = eval_results_to_model_index(name, results)[0]
        for result in ours["results"] if not subject.repository else ():
            del result["source"]["url"]  # the library requires one beside a name
        same = next((model for model in index if model.get("name") == name), None)
        if same is None:
            index.append(ours)
        else:
            same["results"] = [*(same.get("results") or []), *ours["results"]]
    if index:
        data["model-index"] = index


def _kept_results(index: Any) -> list[dict[str, Any]]:
    """Give a person's results unchanged: as EvalResults they would lose unknown fields."""
    if not isinstance(index, list) or not all(isinstance(model, dict) for model in index):
        raise InputError("README.md: expected a list of models as model-index of the metadata")
    kept = []
    for model in index:
        results = model.get("results") or []
        if not isinstance(results, list):
            raise InputError("README.md: expected a list as results in model-index of the metadata")
        theirs = [result for result in results if not _is_ours(result)]
        if theirs or not results:
            kept.append({**model, "results": theirs} if theirs else model)
    return kept


def _is_ours(result: Any) -> bool:
    source = result.get("source") if isinstance(result, dict) else None
    return isinstance(source, dict) and source.get("name") == SOURCE


def _library(subject: Subject) -> str:
    """Give the Hub's name of the library that loads the repository."""
    if subject.fisher_only:
        return "consolidate"
    if subject.relation == "adapter":
        return "peft"
    known = "model_type" in subject.config and "architectures" in subject.config
    return "transformers" if known else "pytorch"


def evaluation_results(ledger: Ledger, subject: Subject) -> list[EvalResult]:
    """Give the accuracy matrix as evaluation results of the Hub, the present model first."""
    names, (_, *rows) = columns_and_rows(matrix_summary(chain_matrix(ledger)))
    tasks = {task.name: task for task in ledger.tasks}
    benchmarks = benchmarks_of(ledger)
    measured = [on.items() for task in ledger.tasks for on in task.metrics.values()]
    accurate = {name for on in measured for name, scores in on if "accuracy" in scores}
    results = []
    last = len(ledger.tasks) - 1
    for row in [last, *range(last)]:
        for name, score in zip(names, rows[row], strict=True):
            if score is None:
                continue
            task, benchmark = tasks.get(name, ledger.tasks[row]), benchmarks.get(name)
            dataset = task.data if task.data.count("/") == 1 else name
            metric = "accuracy" if name in accurate else "minus loss"
            if benchmark is not None:
                dataset, metric = benchmark.task, benchmark.metric
            value = -score if metric.startswith("minus ") else score
            metric = metric.removeprefix("minus ")
            after = f", after training on {ledger.tasks[row].name}" if row != last else ""
            results.append(
                EvalResult(
                    task_type=_PIPELINES.get(task.objective, "other"),
                    dataset_type=dataset,
                    dataset_name=name,
                    metric_type=metric,
                    metric_value=value,
                    metric_name=metric + after,
                    metric_args={"after_training": ledger.tasks[row].name} if after else None,
                    source_name=SOURCE,
                    source_url=f"{subject.endpoint}/{subject.repository}",
                )
            )
    return results


def _body(ledger: Ledger, subject: Subject) -> str:
    """Fill in card.md; parts, separated by two blank lines, are left out if a field is None."""
    matrix, merged = ledger_matrix(ledger), side_by_side_text(side_by_side(ledger))
    rule = ledger.merge_rule + (f", γ = {ledger.gamma:g}" if ledger.merge_rule == "online" else "")
    digests = "The ledger has no digest of any data."
    named = [escaped(task.name) for task in ledger.tasks if task.data_digest is not None]
    replayed = [task for task in ledger.tasks if task.replayed and task.replayed.data_digest]
    named += [f"what was replayed for {escaped(task.name)}" for task in replayed]
    prompted = [task for task in ledger.tasks if task.generated and task.generated.prompts]
    named += [f"the prompts of {escaped(task.name)}" for task in prompted]
    if named:
        digests = f"The ledger has a digest of the data of {', '.join(named)}, which can confirm "
        digests += "a guess of the exact data."
    copied = copies(ledger)
    unprotected = [why for name, why in ledger.unprotected.items() if name not in copied]
    several = len(subject.base_model) > 1 or subject.relation == "merge" or side_by_side(ledger)
    found = {
        **_what(subject),
        **_use(ledger, subject),
        **_factors(ledger),
        "tasks_heading": "Tasks of the merged models" if several else "Tasks, in training order",
        "names": ", ".join(escaped(task.name) for task in ledger.tasks),
        "weights": set_digest(ledger.weights),
        "tasks": _tasks(ledger),
        "matrix": matrix and matrix_table(matrix_summary(matrix)),
        "side_by_side": f" {merged}".rstrip(),
        "measured": _measured(ledger),
        "values": f"{sum(record.count for record in ledger.fisher.values()):,}",
        "dtype": next(iter(ledger.fisher.values())).dtype,
        "fisher": set_digest(ledger.fisher),
        "rule": rule,
        "unprotected": len(unprotected) or None,
        "reasons": "; ".join(map(escaped, sorted(set(unprotected))[:5])),
        "reveals": _reveals(ledger, "this repository" if subject.repository else "`fisher/`"),
        "digests": digests,
    }
    parts = map(Template, Path(__file__).with_name("card.md").read_text("utf-8").split("\n\n\n"))
    return "\n\n".join(
        part.substitute(found).strip()
        for part in parts
        if all(found[name] is not None for name in part.get_identifiers())
    )


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
        where, option = subject.bases[0], {"fisher": subject.repository}
    elif subject.relation == "adapter":
        option = {"base-model": next(iter(subject.base_model), "BASE-MODEL")}
    elif _library(subject) != "transformers":
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
    for number, task in enumerate(ledger.tasks, 1):
        labels = few([escaped(label) for label in task.labels or []], 8) or "–"
        learned = penalty_text(task.penalty, task.penalty_on, task.ewc_lambda)
        if task.budget is not None:
            learned += budget_text(task.budget.nats)
        if task.replayed is not None:
            learned += replay_text(task.replayed.data, task.replayed.share)
        learned = escaped(learned)
        learned = "(measured only)" if task.penalty is None else learned
        objective, data = escaped(task.objective), escaped(task.data) or "–"
        rows.append([str(number), escaped(task.name), objective, labels, data, learned])
    return table(rows)


def _measured(ledger: Ledger) -> str:
    rows = [["task", "expectation over the labels", "measured on", "seed", "weight"]]
    for task in ledger.tasks:
        tokens = f", {task.units:,} tokens" if task.unit == "token" and task.units else ""
        estimator = estimator_text(task.estimator, task.mc_samples)
        on = "–"
        if task.examples is not None:
            on = f"{task.examples:,} examples{tokens}"
            generated = None if task.generated is None else vars(task.generated)
            on += encoding_text(task.loss_on, task.max_length, generated)
        rows.append([escaped(task.name), estimator, on, str(task.seed), f"{task.weight:g}"])
    return table(rows)
