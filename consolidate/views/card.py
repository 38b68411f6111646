"""The model card of a checkpoint: what the ledger says, beside what a person wrote."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import validate_repo_id, yaml_dump

from consolidate.chain.consistency import side_by_side, side_by_side_text
from consolidate.training.accuracy_matrix import accuracy_matrix
from consolidate.views.markdown import escaped, table
from consolidate.views.matrix import ledger_matrix, matrix_summary, matrix_table
from consolidate.views.summary import estimator_text, penalty_text
from formats.digest import set_digest
from formats.errors import InputError
from formats.fisher_json import Ledger, copies
from formats.wording import few

MAX_CARD_BYTES = 2**20
BEGIN = "<!-- consolidate:begin {}(from here to the end mark, each push writes anew) -->"
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

    repository: str = ""  # user/model; empty of a folder that was not pushed
    config: Mapping[str, Any] = field(default_factory=dict)  # the contents of config.json
    base_model: tuple[str, ...] = ()  # the repositories of the models that this one was made from
    base_commit: str | None = None  # of the weights that a Fisher alone belongs to
    fisher_only: bool = False
    endpoint: str = ""  # the address of the Hub; empty where nothing is to be linked
    relation: str | None = None  # finetune, merge or adapter; by the number of bases unless given
    licence: Mapping[str, Any] = field(default_factory=dict)  # where the card does not say it

    @property
    def bases(self) -> list[str]:
        """The base models without their commits."""
        return [name.partition("@")[0] for name in self.base_model]


def model_card(existing: str | None, ledger: Ledger, subject: Subject) -> str:
    """Write a card from a ledger, and keep what else stands in the one that is there.

    Ours is what stands between two marks, and of the metadata the tags, the results from the
    ledger and what is not there yet. A card of ours of another repository came with its model: that
    one is the base model, unless another is named. In a card of a folder that was not pushed, the
    metadata name it.
    """
    existing = existing or ""
    data, text = _parts(existing)
    ours = _BLOCK.search(text)
    if ours and not subject.base_model:
        subject = replace(subject, base_model=_named(ours, data, subject.repository))
    _merge_metadata(data, ledger, subject)
    repository = subject.repository
    begin = BEGIN.format(f"{repository} " if repository else "")
    block = f"{begin}\n{_body(ledger, subject)}\n{END}"
    rest = _BLOCK.sub("", text)
    if _MARK.search(rest) or len(_BLOCK.findall(text)) > 1:
        of = f" of {repository}" if repository else ""
        raise InputError(
            f"README.md{of}: expected the marks <!-- consolidate:begin … --> "
            "and <!-- consolidate:end --> once each or not at all: remove those that are too many"
        )
    if ours and (rest.strip() or ours[1]):
        text = _BLOCK.sub(lambda _: block, text)
    else:
        heading = f"# {escaped(repository)}\n\n" if repository else ""
        text = f"{text.rstrip()}\n\n" if rest.strip() else f"\n{heading}"
        text += f"{block}\n"
    return f"---\n{yaml_dump(data).rstrip()}\n---\n{text}"


def named_models(existing: str) -> tuple[str, ...]:
    """Tell whose card this is, if we wrote it: of a folder, what the model there was made from."""
    data, text = _parts(existing)
    ours = _BLOCK.search(text)
    return _named(ours, data, "") if ours else ()


def of_a_folder(existing: str) -> bool:
    """Return whether we wrote a card, of a folder that was not pushed since."""
    ours = _BLOCK.search(existing)
    return ours is not None and not ours[1]


def licence(existing: str) -> dict[str, Any]:
    """Give what the metadata of a card say of the licence."""
    data, _ = _parts(existing)
    return {key: data[key] for key in _LICENCE if isinstance(data.get(key), str | list)}


def is_repository(name: Any) -> bool:
    """Return whether something can be the name of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return isinstance(name, str)


def _parts(existing: str) -> tuple[dict[str, Any], str]:
    """Cut a card into its metadata and its text."""
    found = REGEX_YAML_BLOCK.search(existing)
    try:
        data = yaml.safe_load(found.group(2) if found else "") or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"README.md: its metadata are not YAML: {reason}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise InputError("README.md: its metadata are not a mapping of names to values")
    return data, existing[found.end() :] if found else existing


def _named(ours: re.Match[str], data: Mapping[str, Any], repository: str) -> tuple[str, ...]:
    """Give the models that the model of a card of ours was made from."""
    if ours[1] not in ("", repository):
        return (ours[1],) if is_repository(ours[1]) else ()
    bases = data.get("base_model")
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
    index = data.pop("model-index", None) or []
    if not isinstance(index, list) or not all(isinstance(model, dict) for model in index):
        raise InputError("README.md: model-index of its metadata is not a list of models")
    if not all(isinstance(model.get("results") or [], list) for model in index):
        raise InputError("README.md: results in the model-index of its metadata are not a list")
    index = [kept for model in index if (kept := _without_ours(model))]
    if not subject.fisher_only and (results := evaluation_results(ledger, subject)):
        name = subject.repository.rpartition("/")[2] or "model"
        ours = eval_results_to_model_index(name, results)[0]
        for result in ours["results"] if not subject.repository else ():
            del result["source"]["url"]
        same = next((model for model in index if model.get("name") == name), None)
        if same is None:
            index.append(ours)
        else:
            same["results"] = [*(same.get("results") or []), *ours["results"]]
    if index:
        data["model-index"] = index


def _without_ours(model: dict[str, Any]) -> dict[str, Any] | None:
    results = model.get("results")
    if not isinstance(results, list):
        return model

    def is_ours(result: Any) -> bool:
        source = result.get("source") if isinstance(result, dict) else None
        return isinstance(source, dict) and source.get("name") == SOURCE

    kept = [result for result in results if not is_ours(result)]
    return {**model, "results": kept} if kept or not results else None


def _library(subject: Subject) -> str:
    """Name the library that loads the repository, as the Hub calls it."""
    if subject.fisher_only:
        return "consolidate"
    if subject.relation == "adapter":
        return "peft"
    known = "model_type" in subject.config and "architectures" in subject.config
    return "transformers" if known else "pytorch"


def evaluation_results(ledger: Ledger, subject: Subject) -> list[EvalResult]:
    """Give the accuracy matrix as the Hub's evaluation results, the model as it is now first."""
    matrix = accuracy_matrix({task.name: task.metrics for task in ledger.tasks})
    accurate = {
        name
        for task in ledger.tasks
        for scores in task.metrics.values()
        for name, values in scores.items()
        if "accuracy" in values
    }
    results = []
    last = len(ledger.tasks) - 1
    for row in [last, *range(last)]:
        for task, score in zip(ledger.tasks, matrix.scores[row], strict=True):
            if score is None:
                continue
            metric = "accuracy" if task.name in accurate else "loss"
            after = f", after training on {matrix.tasks[row]}" if row != last else ""
            results.append(
                EvalResult(
                    task_type=_PIPELINES.get(task.objective, "other"),
                    dataset_type=task.data if task.data.count("/") == 1 else task.name,
                    dataset_name=task.name,
                    metric_type=metric,
                    metric_value=score if metric == "accuracy" else -score,
                    metric_name=metric + after,
                    metric_args={"after_training": matrix.tasks[row]} if row != last else None,
                    source_name=SOURCE,
                    source_url=f"{subject.endpoint}/{subject.repository}",
                )
            )
    return results


def _body(ledger: Ledger, subject: Subject) -> str:
    parts = [_what(ledger, subject), _use(ledger, subject), _tasks(ledger), _scores(ledger)]
    return "\n\n".join(filter(None, [*parts, _measured(ledger), _limits(ledger, subject)]))


def _what(ledger: Ledger, subject: Subject) -> str:
    names = ", ".join(escaped(task.name) for task in ledger.tasks)
    digest = set_digest(ledger.weights)
    if subject.fisher_only:
        base = subject.bases[0]
        at = f" at commit `{subject.base_commit}`" if subject.base_commit else ""
        return (
            "## A Fisher for fine-tuning without forgetting\n\n"
            f"This repository holds no weights. It holds the Fisher diagonal of those of "
            f"[{escaped(base)}]({subject.endpoint}/{base}){at}, whose digest is `{digest}`, and "
            f"belongs to no others. It tells how much each of them matters for: {names}."
        )
    architectures = subject.config.get("architectures")
    kind = architectures[0] if isinstance(architectures, list) and architectures else "model"
    if subject.relation == "adapter":
        kind = "LoRA adapter"
    links = " and ".join(
        f"[{escaped(base)}]({subject.endpoint}/{base})" if subject.endpoint else escaped(base)
        for base in subject.bases
    )
    made = f" made from {links}" if links else ""
    return (
        "## Fine-tuning without forgetting\n\n"
        f"A {escaped(str(kind))}{made} for: {names}. Beside the weights, in `fisher/`, lies their "
        "Fisher diagonal: how much each weight matters for these tasks. With it, the model can be "
        "fine-tuned on something new and keep them, without their data (Elastic Weight "
        "Consolidation, [Kirkpatrick et al. 2017](https://arxiv.org/abs/1612.00796)). The digest "
        f"of the weights is `{digest}`."
    )


def _use(ledger: Ledger, subject: Subject) -> str:
    where, fisher, keyword = subject.repository or "path/to/this/folder", "", ""
    if subject.fisher_only:
        where = subject.bases[0]
        fisher, keyword = f" --fisher {subject.repository}", f'\n    fisher="{subject.repository}",'
    elif subject.relation == "adapter":
        base = subject.base_model[0] if subject.base_model else "BASE-MODEL"
        fisher, keyword = f" --base-model {base}", f'\n    base_model="{base}",'
    elif _library(subject) != "transformers":
        fisher, keyword = " --model PACKAGE.MODULE:FACTORY", '\n    model="PACKAGE.MODULE:FACTORY",'
    strength = next((t.ewc_lambda for t in reversed(ledger.tasks) if t.ewc_lambda), None)
    if strength is None:
        shell, python = "auto", '"auto"'
        note = "`auto` looks for λ, the strength of the penalty; a number saves the search."
    else:
        shell = python = f"{strength:g}"
        note = "λ is that of the last task here; another task may want another (`auto` looks for "
        note += "it)."
    return (
        "```sh\n"
        f"consolidate finetune {where}{fisher} --data mine.jsonl \\\n"
        f"    --ewc-lambda {shell} --output-dir my-model\n"
        "```\n\n"
        "```python\n"
        "import consolidate  # of the distribution consolidate-ewc\n\n"
        f'consolidate.finetune(\n    "{where}", "mine.jsonl",{keyword} ewc_lambda={python},'
        ' output_dir="my-model"\n)\n'
        f"```\n\n{note}"
    )


def _tasks(ledger: Ledger) -> str:
    rows = [["", "task", "objective", "labels", "data", "learned with"]]
    for number, task in enumerate(ledger.tasks, 1):
        labels = few([escaped(label) for label in task.labels or []], 8) or "–"
        learned = escaped(penalty_text(task.penalty, task.penalty_on, task.ewc_lambda))
        learned = "(measured only)" if task.penalty is None else learned
        objective, data = escaped(task.objective), escaped(task.data) or "–"
        rows.append([str(number), escaped(task.name), objective, labels, data, learned])
    return "### Tasks, in the order they were learned\n\n" + table(rows)


def _scores(ledger: Ledger) -> str:
    matrix = ledger_matrix(ledger)
    if matrix is None:
        return ""
    merged = side_by_side_text(side_by_side(ledger))
    return (
        "### Scores\n\nOn each task after training on each: accuracy, or minus the mean negative "
        f"log-likelihood; – was not measured.\n\n{matrix_table(matrix_summary(matrix))} ACC is the "
        "mean of the last row, BWT the mean gain on the earlier tasks since each was learned, "
        f"forgetting their mean loss since each was at its best. {merged}"
    ).rstrip()


def _measured(ledger: Ledger) -> str:
    rows = [["task", "expectation over the labels", "measured on", "seed", "weight"]]
    for task in ledger.tasks:
        tokens = f", {task.units or 0:,} tokens" if task.unit == "token" else ""
        estimator = estimator_text(task.estimator, task.mc_samples)
        on = f"{task.examples or 0:,} examples{tokens}"
        rows.append([escaped(task.name), estimator, on, str(task.seed), f"{task.weight:g}"])
    count = sum(math.prod(record.shape) for record in ledger.fisher.values())
    dtype = next(iter(ledger.fisher.values())).dtype
    rule = ledger.merge_rule + (f", γ = {ledger.gamma:g}" if ledger.merge_rule == "online" else "")
    lines = [
        "### How the Fisher was measured",
        "F = (1/units) Σ_x E_y[(∇ log p(y|x))²], squared per example.",
        table(rows),
        f"{count:,} values in {dtype}, digest `{set_digest(ledger.fisher)}`; merged {rule}.",
    ]
    again = copies(ledger)
    if unheld := [why for name, why in ledger.unprotected.items() if name not in again]:
        why = "; ".join(escaped(reason) for reason in sorted(set(unheld))[:5])
        lines.append(f"{len(unheld)} tensors are not protected: {why}.")
    return "\n\n".join(lines)


def _limits(ledger: Ledger, subject: Subject) -> str:
    named = [escaped(task.name) for task in ledger.tasks if task.data_digest is not None]
    digests = (
        f"It holds a digest of the data of {', '.join(named)}, which confirms a guess of them."
        if named
        else "It holds no digest of any data."
    )
    place = "this repository" if subject.repository else "`fisher/`"  # the rest is not ours
    return (
        "### Limits\n\n"
        "The penalty is a quadratic around these weights with a diagonal Fisher: it knows nothing "
        "of how weights act together, holds less well the further the weights move, and holds only "
        "the tasks above, on data like theirs. How much is kept depends on λ: measure it.\n\n"
        f"No row of data is in {place}. A Fisher is an average of squared gradients over "
        "them all the same: with the labels, counts and scores it tells something of the data, and "
        "may help to tell whether an example was among them. " + digests
    )
