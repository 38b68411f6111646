"""What a task predicts: its likelihood, its unit, and the transformers class for it."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from formats.errors import InputError, UsageError
from formats.wording import suggestion


@dataclass(frozen=True)
class Objective:
    """One kind of prediction."""

    name: str
    likelihood: str  # a name that consolidate.estimation.likelihoods knows
    unit: Literal["example", "token"]
    auto_class: str | None  # of transformers, after AutoModelFor; None for a user's own module
    modality: Literal["text", "image", "tensor"]

    @property
    def language(self) -> bool:
        """Whether it predicts words of the vocabulary, so that perplexity is its measure."""
        return self.name in ("causal-lm", "masked-lm", "seq2seq-lm")

    @property
    def has_labels(self) -> bool:
        """Whether its outcomes are labels, which can have names."""
        return not self.language and self.name != "regression"


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective(
            "sequence-classification", "softmax", "example", "SequenceClassification", "text"
        ),
        Objective("multi-label", "bernoulli", "example", "SequenceClassification", "text"),
        Objective("regression", "gaussian", "example", "SequenceClassification", "text"),
        Objective("token-classification", "token-softmax", "token", "TokenClassification", "text"),
        Objective("causal-lm", "next-token-softmax", "token", "CausalLM", "text"),
        Objective("masked-lm", "token-softmax", "token", "MaskedLM", "text"),
        Objective("seq2seq-lm", "token-softmax", "token", "Seq2SeqLM", "text"),
        Objective("image-classification", "softmax", "example", "ImageClassification", "image"),
        Objective("classification", "softmax", "example", None, "tensor"),
    )
}

# Objectives of a user's own module, whose inputs are tensors.
_OF_TENSORS = ("classification", "regression", "multi-label")

_BY_ARCHITECTURE = {
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    "ForImageClassificationWithTeacher": "image-classification",
    "ForMaskedLM": "masked-lm",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "seq2seq-lm",
    "MTModel": "seq2seq-lm",  # Marian
}


def get_objective(name: str, *, factory: bool = False) -> Objective:
    """Return the objective of that name; with a factory, one whose inputs are tensors."""
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(name, OBJECTIVES, n=1)
        raise UsageError(
            f"unknown objective {name!r}: expected one of {', '.join(OBJECTIVES)}{suggestion(near)}"
        )
    objective = OBJECTIVES[name]
    if factory:
        if name not in _OF_TENSORS:
            images = "; classification reads images too" * (objective.modality == "image")
            raise UsageError(
                f"objective {name} needs a model of transformers: expected one of "
                f"{', '.join(_OF_TENSORS)} with --model{images}"
            )
        return replace(objective, auto_class=None, modality="tensor")
    if objective.auto_class is None:
        raise UsageError(
            f"objective {name} is for your own module; name it with --model "
            "package.module:factory, or choose another objective"
        )
    return objective


def check_declared(config: Mapping[str, Any]) -> None:
    """Refuse a ``config.json`` whose task fields have types that transformers cannot use."""
    names = config.get("architectures")
    expected = {
        "architectures": names is None
        or (isinstance(names, list) and all(isinstance(name, str) for name in names)),
        "model_type": isinstance(config.get("model_type"), str | None),
        "problem_type": isinstance(config.get("problem_type"), str | None),
        "id2label": isinstance(config.get("id2label"), dict | None),
        "num_labels": isinstance(config.get("num_labels"), int | None),
    }
    for name, valid in expected.items():
        if not valid:
            raise InputError(
                f"config.json: {name} is of type {type(config[name]).__name__}, which transformers "
                "cannot use; save the model again"
            )


def check_model_type(config: Mapping[str, Any], where: str = "config.json") -> None:
    """Refuse a ``model_type`` that transformers does not have, where it is installed."""
    try:
        import transformers
    except ImportError:
        return
    kind = config.get("model_type")
    if kind is not None and kind not in transformers.CONFIG_MAPPING:
        code = " (the code in its auto_map is never run)" if "auto_map" in config else ""
        raise InputError(
            f"{where}: transformers {transformers.__version__} has no model_type {kind!r}{code}; "
            "name the module with --model package.module:factory, or install a newer transformers"
        )


def check_readable(kind: str | None, where: str = "config.json") -> None:
    """Refuse a ``model_type`` that transformers has for no objective, where it is installed."""
    try:
        import transformers
    except ImportError:
        return
    if kind is None:
        return
    config = transformers.CONFIG_MAPPING[kind]
    classes = {one.auto_class for one in OBJECTIVES.values() if one.auto_class is not None}
    if getattr(config, "is_encoder_decoder", False):
        classes -= {"CausalLM"}  # which would be the decoder alone, as of Whisper
    found = (getattr(transformers, f"AutoModelFor{name}")._model_mapping for name in classes)
    if not any(config in mapping for mapping in found):
        raise InputError(
            f"{where}: no objective fits a model of type {kind}, whose inputs or outputs are "
            "others (such as audio, or texts with images): measure it from Python with "
            "`fisher_diagonal`, or name a module of your own with --model"
        )


def _is_causal_alone(config: Mapping[str, Any]) -> bool:
    """Return whether transformers has a type among causal models, and not among encoder-decoders.

    Those of texts and images end in ForConditionalGeneration too.
    """
    try:
        from transformers.models.auto import modeling_auto as auto
    except ImportError:
        return False
    causal, both = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    kind = config.get("model_type")
    return kind in causal and kind not in both


def default_objective(config: Mapping[str, Any], factory: bool) -> Objective:
    """Choose the objective by the architecture's name, ``problem_type`` and number of labels."""
    problem = config.get("problem_type")
    by_problem = {"regression": "regression", "multi_label_classification": "multi-label"}
    if factory:
        return get_objective(by_problem.get(str(problem), "classification"), factory=True)
    check_declared(config)
    architecture = (config.get("architectures") or [""])[0]
    if architecture.endswith("ForSequenceClassification"):
        if problem in by_problem:
            return OBJECTIVES[by_problem[problem]]
        labels = config.get("id2label")
        if problem is None and (len(labels) if labels else config.get("num_labels")) == 1:
            return OBJECTIVES["regression"]
    for ending, name in _BY_ARCHITECTURE.items():
        if architecture.endswith(ending):
            both = config.get("is_encoder_decoder", False)
            causal = name == "seq2seq-lm" and not both and _is_causal_alone(config)
            return OBJECTIVES["causal-lm" if causal else name]
    if not architecture and "model_type" not in config:
        what = "config.json names no architecture" if config else "there is no config.json"
        raise InputError(
            f"{what}: name the function that makes the model with --model package.module:factory; "
            "a model of transformers needs the config.json that save_pretrained writes"
        )
    check_model_type(config)
    check_readable(config.get("model_type"))
    what = f"the architecture {architecture}" if architecture else "config.json"
    raise InputError(
        f"{what} does not determine the objective; choose --objective, one of "
        f"{', '.join(OBJECTIVES)}, or name a model unknown to transformers with --model "
        "package.module:factory"
    )


def settled_objective(config: Mapping[str, Any], factory: bool = False) -> str | None:
    """Return the name of the objective that a ``config.json`` determines; None if it does not."""
    try:
        return default_objective(config, factory).name
    except InputError:
        return None
