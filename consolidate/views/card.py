"""The model card of a checkpoint: facts from the ledger beside what a person wrote."""

import re
from dataclasses import replace
from itertools import takewhile
from typing import Any

import yaml
from huggingface_hub import CardData, EvalResult, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import validate_repo_id, yaml_dump

from consolidate.views.card_text import Subject, card_text, library
from consolidate.views.markdown import escaped
from consolidate.views.matrix import chain_matrix, columns_and_rows, matrix_summary
from formats.errors import InputError
from formats.fisher_json import Ledger, benchmarks_of

MAX_CARD_BYTES = 2**20
BEGIN = "<!-- consolidate:begin {}(each push rewrites everything up to the end mark) -->"
END = "<!-- consolidate:end -->"
_MOST_RESULTS = 2000  # of earlier models none beyond, for the size of the card
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
    which is then the base model unless one is named; else the metadata name it.
    """
    existing = existing or ""
    windows = 0 < existing.count("\n") == existing.count("\r\n")
    existing = existing.replace("\r\n", "\n") if windows else existing
    card = _read(existing)
    found = REGEX_YAML_BLOCK.search(existing.removeprefix("\ufeff"))
    ours = _BLOCK.search(card.text)
    if not subject.base_model:
        own = not ours or ours[1] in ("", subject.repository)
        relation = vars(card.data).get("base_model_relation")
        known = own and relation in ("finetune", "merge")
        subject = replace(
            subject,
            base_model=_named(card, subject.repository) if ours else _bases(card),
            relation=subject.relation or (relation if known else None),
        )
    _merge_metadata(vars(card.data), ledger, subject)
    name = subject.repository
    block = f"{BEGIN.format(f'{name} ' if name else '')}\n{card_text(ledger, subject)}\n{END}"
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
    text = f"---\n{_front_matter(card, found)}\n---\n{card.text}"
    return text.replace("\n", "\r\n") if windows else text


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


def _front_matter(card: ModelCard, found: re.Match[str] | None) -> str:
    """Write the metadata: a field keeps the comments above it, and its text if it is as it was."""
    data, (texts, end) = card.data.to_dict(), ({}, "") if found is None else _fields(found[2])
    before = {} if found is None else yaml.safe_load(found[2]) or {}
    lines = []
    for key in dict.fromkeys([*before, *data]):
        if key not in data:
            continue
        if key in texts and repr(before[key]) == repr(data[key]):
            lines.append(texts[key])
            continue
        above = takewhile(_is_comment, texts[key].split("\n")) if key in texts else ()
        lines += [*above, yaml_dump({key: data[key]}, sort_keys=False).rstrip()]
    return "\n".join([*lines, *([end] if end else [])]) or "{}"


def _is_comment(line: str) -> bool:
    return not line.strip() or line.startswith("#")


def _fields(block: str) -> tuple[dict[Any, str], str]:
    """Give the text of each field of metadata, and the comments at the end.

    Both are empty where they cannot be told apart.
    """
    parts: list[str] = []
    above: list[str] = []  # comments and empty lines
    for line in block.split("\n"):
        if _is_comment(line):
            above.append(line)
        elif line.startswith((" ", "-", "\t")) and parts:
            parts[-1] = "\n".join([parts[-1], *above, line])
            above = []
        else:
            parts.append("\n".join([*above, line]))
            above = []
    try:
        fields = [(yaml.safe_load(f"{part}\n"), part) for part in parts]
        texts = {key: part for one, part in fields for key in one if len(one) == 1}
        together = {key: value for one, _ in fields for key, value in one.items()}
        whole = len(texts) == len(parts) and repr(together) == repr(yaml.safe_load(f"{block}\n"))
        return (texts, "\n".join(above)) if whole else ({}, "")
    except (yaml.YAMLError, TypeError, AttributeError):
        return {}, ""


def _named(card: ModelCard, repository: str = "") -> tuple[str, ...]:
    """Give the models that a card with our block names as bases; none for other cards."""
    ours = _BLOCK.search(card.text)
    if ours is None:
        return ()
    if ours[1] in ("", repository):
        return _bases(card)
    return (ours[1],) if is_repository(ours[1]) else ()


def _bases(card: ModelCard) -> tuple[str, ...]:
    """Give the base models in the metadata of a card; none where one is not a repository."""
    bases = vars(card.data).get("base_model")
    bases = bases if isinstance(bases, list) else [bases]
    return tuple(bases) if all(map(is_repository, bases)) else ()


def _merge_metadata(data: dict[str, Any], ledger: Ledger, subject: Subject) -> None:
    tags = data.get("tags") or []
    tags = list(tags) if isinstance(tags, list) else [tags]
    data["tags"] = [*tags, *(tag for tag in TAGS if tag not in tags)]
    data.setdefault("library_name", library(subject))
    for key, value in subject.licence.items():
        data.setdefault(key, value)
    if subject.base_model:
        if subject.bases not in (data.get("base_model"), [data.get("base_model")]):
            data.pop("base_model_relation", None)
            data["base_model"] = subject.bases[0] if len(subject.bases) == 1 else subject.bases
        if not subject.fisher_only:
            relation = "finetune" if len(subject.bases) == 1 else "merge"
            data.setdefault("base_model_relation", subject.relation or relation)
    index = _kept_results(data.pop("model-index", None) or [])
    if not subject.fisher_only and (results := evaluation_results(ledger, subject)):
        name = subject.repository.rpartition("/")[2] or "model"
        ours: dict[str, Any] = {"name": name, "results": []}
        by_task: dict[str, list[EvalResult]] = {}
        for result in results:
            by_task.setdefault(result.dataset_name, []).append(result)
        for some in by_task.values():  # as tasks of one dataset are one to the library
            ours["results"] += eval_results_to_model_index(name, some)[0]["results"]
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
        if len(results) > _MOST_RESULTS:
            break
    return results
