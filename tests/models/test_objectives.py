import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from consolidate.estimation.likelihoods import get_likelihood
from consolidate.models.loading import load_model
from consolidate.models.objectives import (
    OBJECTIVES,
    default_objective,
    get_objective,
    settled_objective,
)
from formats.checkpoint import open_checkpoint
from formats.errors import InputError, UsageError


def test_a_file_that_transformers_did_not_write_needs_a_factory() -> None:
    with pytest.raises(InputError, match=r"there is no config\.json: name the function .* --model"):
        default_objective({}, factory=False)
    with pytest.raises(InputError, match=r"config\.json names no architecture: .* --model"):
        default_objective({"width": 5}, factory=False)
    with pytest.raises(InputError, match=r"config\.json does not determine .* --objective"):
        default_objective({"model_type": "bert"}, factory=False)


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("wav2vec2", "Wav2Vec2ForCTC"),
        ("wav2vec2", "Wav2Vec2ForSequenceClassification"),
        ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
        ("whisper", "WhisperForConditionalGeneration"),
    ],
)
def test_a_model_that_no_objective_fits_is_told_at_once(
    tmp_path: Path, kind: str, architecture: str
) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    config = {"model_type": kind, "architectures": [architecture]}
    config["is_encoder_decoder"] = kind == "whisper"
    (tmp_path / "config.json").write_text(json.dumps(config))
    for objective in (None, "seq2seq-lm", "sequence-classification"):
        with pytest.raises(InputError, match=r"no objective fits .* with `fisher_diagonal`"):
            load_model(open_checkpoint(tmp_path), objective=objective)


def test_every_objective_has_a_likelihood() -> None:
    for objective in OBJECTIVES.values():
        assert get_likelihood(objective.likelihood).name == objective.likelihood


def test_language_models_have_no_labels() -> None:
    language = {o.name for o in OBJECTIVES.values() if o.language}
    assert language == {"causal-lm", "masked-lm", "seq2seq-lm"}
    assert not any(o.has_labels for o in OBJECTIVES.values() if o.language)
    assert not OBJECTIVES["regression"].has_labels


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"architectures": ["BertForSequenceClassification"]}, "sequence-classification"),
        (
            {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "score"}},
            "regression",
        ),
        (
            {
                "architectures": ["RobertaForSequenceClassification"],
                "problem_type": "multi_label_classification",
            },
            "multi-label",
        ),
        (
            {
                "architectures": ["XForSequenceClassification"],
                "problem_type": "single_label_classification",
                "num_labels": 1,
            },
            "sequence-classification",
        ),
        ({"architectures": ["BertForTokenClassification"]}, "token-classification"),
        ({"architectures": ["GPT2LMHeadModel"]}, "causal-lm"),
        ({"architectures": ["LlamaForCausalLM"]}, "causal-lm"),
        ({"architectures": ["BertForMaskedLM"]}, "masked-lm"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "seq2seq-lm"),
        ({"architectures": ["MarianMTModel"]}, "seq2seq-lm"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "seq2seq-lm"),
        (
            {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5"},
            "causal-lm",  # of texts and images
        ),
        ({"architectures": ["ResNetForImageClassification"]}, "image-classification"),
    ],
)
def test_the_architecture_names_the_objective(config: dict, name: str) -> None:
    assert default_objective(config, factory=False).name == name


def test_an_architecture_that_names_none() -> None:
    with pytest.raises(InputError, match=r"architecture BertModel does not .* --objective"):
        default_objective({"architectures": ["BertModel"]}, factory=False)


def test_a_model_type_that_transformers_lacks() -> None:
    config = {"model_type": "tcn", "architectures": ["TCN"]}
    with pytest.raises(InputError, match=r"has no model_type 'tcn'; name the module with --model"):
        default_objective(config, factory=False)


def test_own_modules_take_tensors() -> None:
    objective = default_objective({}, factory=True)
    assert (objective.name, objective.modality, objective.auto_class) == (
        "classification",
        "tensor",
        None,
    )
    assert default_objective({"problem_type": "regression"}, factory=True).name == "regression"
    regression = get_objective("regression", factory=True)
    assert (regression.modality, regression.auto_class) == ("tensor", None)
    assert get_objective("regression").modality == "text"
    with pytest.raises(UsageError, match="needs a model of transformers"):
        get_objective("causal-lm", factory=True)
    with pytest.raises(UsageError, match="with --model; classification reads images too"):
        get_objective("image-classification", factory=True)
    with pytest.raises(UsageError, match="--model"):
        get_objective("classification")
    with pytest.raises(UsageError, match="did you mean causal-lm"):
        get_objective("causal_lm")


def test_a_config_settles_an_objective_or_none() -> None:
    assert settled_objective({"architectures": ["GPT2LMHeadModel"]}) == "causal-lm"
    assert settled_objective({"architectures": ["BertModel"]}) is None
    assert settled_objective({}, factory=True) == "classification"
