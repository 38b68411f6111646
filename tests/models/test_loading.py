import json
import logging
import os
import random
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from consolidate.models import loading
from consolidate.models.architectures import lacks_head
from consolidate.models.loading import load_model
from consolidate.models.model import config_of, file_weights, unprotected, with_full_names
from formats.checkpoint import open_checkpoint, write_checkpoint
from formats.errors import InputError, UsageError
from support.tiny_models import (
    SIZES,
    bert_config,
    byte_tokenizer,
    change_config,
    gpt2_config,
    mixtral_config,
    save,
    word_tokenizer,
)

NAMES = {0: "comp", 1: "rec", 2: "sci"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def assert_round_trip(folder: Path, **options: object) -> None:
    """What is loaded goes back under the file's names, in its order, bit for bit."""
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint, **options)
    back = file_weights(model)
    assert list(back) == list(checkpoint.weights)
    for name in back:
        assert same_bits(back[name], checkpoint.weights[name]), name


T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 40,
}
DISTIL = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 40}
VIT = {**SIZES, "image_size": 8, "patch_size": 4, "num_labels": 3}
VIT.pop("max_position_embeddings")
LLAMA = {**SIZES, "num_key_value_heads": 1, "tie_word_embeddings": True}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}

ARCHITECTURES = {
    "bert-sequence": ("BertForSequenceClassification", "Bert", SIZES, "sequence-classification"),
    "bert-regression": (
        "BertForSequenceClassification",
        "Bert",
        {**SIZES, "num_labels": 1},
        "regression",
    ),
    "bert-multi-label": (
        "BertForSequenceClassification",
        "Bert",
        {**SIZES, "problem_type": "multi_label_classification"},
        "multi-label",
    ),
    "bert-tokens": ("BertForTokenClassification", "Bert", SIZES, "token-classification"),
    "bert-masked": ("BertForMaskedLM", "Bert", SIZES, "masked-lm"),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBert",
        DISTIL,
        "sequence-classification",
    ),
    "roberta": ("RobertaForSequenceClassification", "Roberta", SIZES, "sequence-classification"),
    "roberta-masked": ("RobertaForMaskedLM", "Roberta", SIZES, "masked-lm"),
    "gpt2": ("GPT2LMHeadModel", "GPT2", {"n_embd": 16, "n_layer": 1, "n_head": 2}, "causal-lm"),
    "llama-tied": ("LlamaForCausalLM", "Llama", LLAMA, "causal-lm"),
    "t5": ("T5ForConditionalGeneration", "T5", T5, "seq2seq-lm"),
    "bart": ("BartForConditionalGeneration", "Bart", BART, "seq2seq-lm"),
    "vit": ("ViTForImageClassification", "ViT", VIT, "image-classification"),
    "resnet": ("ResNetForImageClassification", "ResNet", RESNET, "image-classification"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_loads_as_itself_and_goes_back(name: str, tmp_path: Path) -> None:
    cls, kind, sizes, objective = ARCHITECTURES[name]
    vocabulary = {} if kind in ("ViT", "ResNet") else {"vocab_size": 60}
    config = getattr(transformers, f"{kind}Config")(**sizes, **vocabulary)
    folder = save(tmp_path, getattr(transformers, cls), config)
    model = load_model(open_checkpoint(folder))
    assert type(model.module).__name__ == cls
    assert model.objective.name == objective
    assert not model.module.training
    assert model.layout.fresh == ()
    assert_round_trip(folder)
    reference = getattr(transformers, cls).from_pretrained(folder)
    for key, value in reference.state_dict().items():
        assert same_bits(model.module.state_dict()[key], value), key
    assert {k for k, _ in model.module.named_parameters()} == {
        k for k, _ in reference.named_parameters()
    }


def test_loading_says_nothing_and_leaves_the_random_numbers_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tmp_path, transformers.BertModel, bert_config(), word_tokenizer())
    checkpoint = open_checkpoint(folder)
    caplog.clear()
    capfd.readouterr()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    load_model(checkpoint, objective="sequence-classification", new_labels=["a", "b"])
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    logger.removeHandler(caplog.handler)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_training_does_not_write_into_the_file(tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.BertForMaskedLM, bert_config())
    bytes_before = (folder / "model.safetensors").read_bytes()
    checkpoint = open_checkpoint(folder)
    values = {name: tensor.clone() for name, tensor in checkpoint.weights.items()}
    model = load_model(checkpoint)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter += 1
    for name, tensor in checkpoint.weights.items():
        assert same_bits(tensor, values[name]), name
        assert not torch.equal(file_weights(model)[name], tensor), name
    assert (folder / "model.safetensors").read_bytes() == bytes_before


# --- tied weights ------------------------------------------------------------------------------


def test_a_tied_head_is_one_tensor_whatever_name_the_file_has(tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.GPT2LMHeadModel, gpt2_config())
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    head = weights.pop("transformer.wte.weight")
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    model = load_model(open_checkpoint(folder))
    assert model.module.lm_head.weight is model.module.transformer.wte.weight
    assert same_bits(model.module.transformer.wte.weight.detach(), head)
    to_file = model.layout.to_file({"transformer.wte.weight": torch.ones_like(head)})
    assert list(to_file) == ["lm_head.weight"]
    assert list(model.layout.to_module(to_file)) == ["transformer.wte.weight"]
    assert_round_trip(folder)
    again = transformers.GPT2LMHeadModel.from_pretrained(folder)
    assert same_bits(again.transformer.wte.weight.detach(), head)


def test_a_pickle_that_holds_tied_weights_twice_keeps_its_form(tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.GPT2LMHeadModel, gpt2_config(), byte_tokenizer())
    module = transformers.GPT2LMHeadModel.from_pretrained(folder)
    torch.save(module.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    checkpoint = open_checkpoint(folder)
    assert "lm_head.weight" in checkpoint.weights
    model = load_model(checkpoint)
    assert model.layout.duplicates == {"lm_head.weight": "transformer.wte.weight"}
    with torch.no_grad():
        module = model.module
        module.lm_head.weight += 1
    stored = file_weights(model)
    assert same_bits(stored["lm_head.weight"], stored["transformer.wte.weight"])
    assert same_bits(stored["lm_head.weight"], module.lm_head.weight.detach())
    assert_round_trip(folder)
    protected = [name for name in checkpoint.weights if name != "lm_head.weight"]
    reasons = unprotected(model, protected)
    assert reasons == {"lm_head.weight": "the same tensor as transformer.wte.weight"}


def test_a_head_that_config_ties_but_the_file_does_not_stays_untied(tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.GPT2LMHeadModel, gpt2_config(tie_word_embeddings=False))
    change_config(folder, tie_word_embeddings=True)
    model = load_model(open_checkpoint(folder))
    assert model.module.lm_head.weight is not model.module.transformer.wte.weight
    assert_round_trip(folder)


# --- experts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_key_per_expert_goes_round(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.MixtralForCausalLM, mixtral_config(), dtype=dtype)
    checkpoint = open_checkpoint(folder)
    experts = [name for name in checkpoint.weights if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    model = load_model(checkpoint)
    assert {p.dtype for p in model.module.parameters()} == {dtype}
    stacked = "model.layers.1.mlp.experts.gate_up_proj"
    assert len(model.layout.file_names(stacked)) == 8
    assert_round_trip(folder)
    # Λ and μ are float32 beside bfloat16 weights, and not every parameter has them.
    generator = torch.Generator().manual_seed(0)
    fisher = {
        name: torch.rand(parameter.shape, generator=generator)
        for name, parameter in model.module.named_parameters()
        if "layers.0.mlp.experts" not in name
    }
    stored = model.layout.to_file(fisher)
    expected = [n for n in checkpoint.weights if "layers.0.block_sparse_moe.experts" not in n]
    assert list(stored) == expected
    for name, tensor in stored.items():
        assert tensor.dtype == torch.float32
        assert tensor.shape == checkpoint.weights[name].shape
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel() or name in fisher
    back = model.layout.to_module(stored)
    assert list(back) == list(fisher)
    for name in fisher:
        assert same_bits(back[name], fisher[name]), name
    # Where an expert's weights stand in the stack is transformers' own business: ask it.
    prefix = "model.layers.1.block_sparse_moe.experts.2"
    w1 = stored[f"{prefix}.w1.weight"]
    assert same_bits(fisher[stacked][2, : w1.shape[0]], w1)
    assert same_bits(fisher[stacked][2, w1.shape[0] :], stored[f"{prefix}.w3.weight"])


def test_a_part_of_the_experts_is_no_stack(tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.MixtralForCausalLM, mixtral_config())
    model = load_model(open_checkpoint(folder))
    stored = model.layout.to_file(dict(model.module.named_parameters()))
    del stored["model.layers.0.block_sparse_moe.experts.3.w3.weight"]
    with pytest.raises(InputError, match=r"experts\.3\.w3\.weight is missing"):
        model.layout.to_module(stored)


def test_freezing_a_part_of_a_stack_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.MixtralForCausalLM, mixtral_config())
    checkpoint = open_checkpoint(folder)
    with pytest.raises(UsageError, match="part of"):
        load_model(checkpoint, freeze=["*experts.1.w1.weight"])
    model = load_model(checkpoint, freeze=["*layers.1.block_sparse_moe.experts.*"])
    frozen = [n for n, p in model.module.named_parameters() if not p.requires_grad]
    assert frozen == [f"model.layers.1.mlp.experts.{n}" for n in ("gate_up_proj", "down_proj")]


# --- other output layers -----------------------------------------------------------------------


def test_a_bare_encoder_gets_a_new_output_layer(tmp_path: Path) -> None:
    config = bert_config()
    folder = save(tmp_path / "bare", transformers.BertModel, config, word_tokenizer())
    checkpoint = open_checkpoint(folder)
    assert lacks_head(checkpoint, "sequence-classification")
    with pytest.raises(InputError, match=r"needs the head of a .*classifier\.bias"):
        load_model(checkpoint, objective="sequence-classification")
    options = {"objective": "sequence-classification", "new_labels": list(NAMES.values())}
    model = load_model(checkpoint, **options)
    assert model.labels == ["comp", "rec", "sci"]
    assert model.outputs == 3
    assert model.layout.fresh == ("classifier.weight", "classifier.bias")
    assert any("classifier.weight" in note for note in model.notes)
    model, names = with_full_names(model)
    weights = file_weights(model)
    # The names that transformers writes for the class with the head.
    model.module.save_pretrained(tmp_path / "written")
    assert set(weights) == set(load_file(tmp_path / "written" / "model.safetensors"))
    assert names == {name: f"bert.{name}" for name in checkpoint.weights}
    assert float(weights["classifier.weight"].std()) > 0
    again = load_model(checkpoint, **options)
    other = load_model(checkpoint, **options, seed=1)
    assert same_bits(weights["classifier.weight"], file_weights(again)["classifier.weight"])
    assert not torch.equal(weights["classifier.weight"], file_weights(other)["classifier.weight"])
    # And transformers reads what comes out.
    out = tmp_path / "out"
    out.mkdir()
    save_file(dict(weights), out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config_of(model)))
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        out, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert loaded.config.id2label == NAMES
    assert loaded.config.label2id == {name: i for i, name in NAMES.items()}
    assert loaded.config.architectures == ["BertForSequenceClassification"]
    for key, value in model.module.state_dict().items():
        assert same_bits(loaded.state_dict()[key], value), key
    assert not lacks_head(open_checkpoint(out), "sequence-classification")
    assert load_model(open_checkpoint(out)).labels == ["comp", "rec", "sci"]
    assert checkpoint.config.get("id2label") is None


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_another_head_of_the_same_names_is_not_taken_for_ones_own(
    tmp_path: Path, kind: str
) -> None:
    """Its labels would be renamed, and a part of it be trained on as if it were new."""
    model, config = {
        "bert": (transformers.BertForTokenClassification, bert_config()),
        "distilbert": (
            transformers.DistilBertForTokenClassification,
            transformers.DistilBertConfig(**DISTIL),
        ),
    }[kind]
    source = open_checkpoint(save(tmp_path, model, config))
    assert not lacks_head(source, "sequence-classification")
    with pytest.raises(InputError, match="other tensors have the names of its head: start from"):
        load_model(source, objective="sequence-classification")


def test_a_head_that_shares_a_layer_with_another_is_lacking(tmp_path: Path) -> None:
    config = transformers.ModernBertConfig(
        vocab_size=28, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0,
    )  # fmt: skip
    source = open_checkpoint(save(tmp_path, transformers.ModernBertForMaskedLM, config))
    assert "head.dense.weight" in source.weights
    assert lacks_head(source, "sequence-classification")
    load_model(source, objective="sequence-classification", new_labels=["a", "b"])
    with pytest.raises(InputError, match="`consolidate finetune` trains one"):
        load_model(source, objective="sequence-classification")


def test_a_head_under_the_names_of_a_wrapper_is_there(tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.BertForSequenceClassification, bert_config())
    weights = load_file(folder / "model.safetensors")
    wrapped = {f"module.{name}": values for name, values in weights.items()}
    save_file(wrapped, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, architectures=["BertModel"])
    assert not lacks_head(open_checkpoint(folder), "sequence-classification")


BARE = {
    "bert": (transformers.BertModel, bert_config(), "token-classification"),
    "distilbert": (transformers.DistilBertModel, transformers.DistilBertConfig(**DISTIL), ""),
    "gpt2": (transformers.GPT2Model, gpt2_config(pad_token_id=0), ""),
    "llama": (transformers.LlamaModel, transformers.LlamaConfig(**LLAMA, pad_token_id=0), ""),
    "mixtral": (transformers.MixtralModel, mixtral_config(), ""),
    "bart": (transformers.BartModel, transformers.BartConfig(**BART), ""),
    "t5": (transformers.T5Model, transformers.T5Config(**T5), ""),
    "vit": (transformers.ViTModel, transformers.ViTConfig(**VIT), "image-classification"),
    "resnet": (
        transformers.ResNetModel,
        transformers.ResNetConfig(**RESNET),
        "image-classification",
    ),
}


@pytest.mark.parametrize("name", list(BARE))
def test_every_bare_model_gets_the_names_of_its_class_with_a_head(
    name: str, tmp_path: Path
) -> None:
    cls, config, objective = BARE[name]
    checkpoint = open_checkpoint(save(tmp_path / "bare", cls, config))
    options: dict[str, Any] = {"objective": objective or "sequence-classification"}
    model, _ = with_full_names(load_model(checkpoint, **options, new_labels=["a", "b", "c"]))
    model.module.save_pretrained(tmp_path / "written")
    written = set(open_checkpoint(tmp_path / "written").weights)
    weights = file_weights(model)
    assert written <= set(weights)
    beside = {*model.layout.unused, *model.layout.duplicates}
    assert set(weights) - written <= beside
    prefix = f"{model.module.base_model_prefix}."
    assert all(name.startswith(prefix) for name in beside)
    # The same module comes of it.
    out = tmp_path / "out"
    out.mkdir()
    save_file(dict(weights), out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config_of(model)))
    again = load_model(open_checkpoint(out), **options)
    for at, value in model.module.state_dict().items():
        assert same_bits(again.module.state_dict()[at], value), at


def test_a_head_is_frozen_and_named_by_the_names_of_the_bare_model_too(tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.BertModel, bert_config())
    model = load_model(
        open_checkpoint(folder),
        objective="sequence-classification",
        new_labels=["a", "b"],
        freeze=["encoder.*", "bert.pooler.*"],
    )
    trained = {name for name, p in model.module.named_parameters() if p.requires_grad}
    assert "classifier.weight" in trained
    assert "bert.embeddings.word_embeddings.weight" in trained
    assert not any(".encoder." in name or ".pooler." in name for name in trained)


@pytest.mark.parametrize("outer", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("kind", ["bert", "mixtral"])
def test_names_with_a_wrapper_in_front_load_and_stay(outer: str, kind: str, tmp_path: Path) -> None:
    cls, config = {
        "bert": (transformers.BertForSequenceClassification, bert_config(num_labels=3)),
        "mixtral": (transformers.MixtralForCausalLM, mixtral_config()),
    }[kind]
    folder = save(tmp_path, cls, config)
    plain = load_model(open_checkpoint(folder)).module.state_dict()
    weights = load_file(folder / "model.safetensors")
    save_file({outer + name: t for name, t in weights.items()}, folder / "model.safetensors")
    assert_round_trip(folder)
    model = load_model(open_checkpoint(folder))
    assert any(f"begin with {outer}, " in note for note in model.notes)
    assert all(same_bits(tensor, plain[at]) for at, tensor in model.module.state_dict().items())
    assert outer + next(iter(weights)) in model.layout.to_file(dict(model.module.state_dict()))


def test_a_bare_encoder_with_a_wrapper_in_front_gets_plain_names(tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.BertModel, bert_config())
    weights = load_file(folder / "model.safetensors")
    save_file({f"module.{name}": t for name, t in weights.items()}, folder / "model.safetensors")
    options = {"objective": "sequence-classification", "new_labels": ["a", "b"]}
    model, _ = with_full_names(load_model(open_checkpoint(folder), **options))
    expected = [*(f"bert.{name}" for name in weights), "classifier.weight", "classifier.bias"]
    assert sorted(file_weights(model)) == sorted(expected)


def test_the_number_of_labels_that_a_config_lacks_is_named(tmp_path: Path) -> None:
    config = bert_config(num_labels=4)
    folder = save(tmp_path, transformers.BertForSequenceClassification, config)
    written = json.loads((folder / "config.json").read_text())
    for key in ("id2label", "label2id", "num_labels"):
        written.pop(key, None)
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(InputError, match=r'classifier.* has 4 rows: add "num_labels": 4 to config'):
        load_model(open_checkpoint(folder))
    change_config(folder, num_labels=4)
    assert load_model(open_checkpoint(folder)).outputs == 4


def test_a_new_output_layer_does_not_excuse_a_missing_body(tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.BertModel, bert_config())
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"layer\.1\.output\.dense\.weight is missing"):
        load_model(
            open_checkpoint(folder), objective="sequence-classification", new_labels=["a", "b"]
        )


def test_new_labels_must_fit_an_output_layer_that_is_there(tmp_path: Path) -> None:
    config = bert_config(num_labels=3)
    folder = save(tmp_path, transformers.BertForSequenceClassification, config)
    with pytest.raises(InputError, match="already has a head: expected its 3 labels, found 2"):
        load_model(open_checkpoint(folder), new_labels=["a", "b"])
    named = load_model(open_checkpoint(folder), new_labels=["a", "b", "c"])
    assert named.labels == ["a", "b", "c"]
    assert named.layout.fresh == ()
    assert config_of(named)["id2label"] == {"0": "a", "1": "b", "2": "c"}


def test_a_new_output_of_a_regression_is_one_number(tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.BertModel, bert_config())
    model = load_model(open_checkpoint(folder), objective="regression", new_labels=[])
    assert model.module.classifier.weight.shape[0] == 1
    assert model.labels is None
    assert model.outputs == 1
    assert config_of(model)["problem_type"] == "regression"


def test_an_encoder_without_pooler_gets_one_with_its_output_layer(tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.BertForMaskedLM, bert_config())
    model = load_model(
        open_checkpoint(folder), objective="sequence-classification", new_labels=["a", "b"]
    )
    assert "bert.pooler.dense.weight" in model.layout.fresh
    # The old output layer is not lost.
    assert any("cls.predictions" in note for note in model.notes)
    assert "cls.predictions.bias" in file_weights(model)
    assert unprotected(model, [])["cls.predictions.bias"] == "not used by the model"


def test_a_second_pretraining_head_is_kept_and_told(tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.BertForPreTraining, bert_config())
    change_config(folder, architectures=["BertForMaskedLM"])
    model = load_model(open_checkpoint(folder))
    assert any("cls.seq_relationship.weight" in note for note in model.notes)
    assert_round_trip(folder)


# --- dtypes ------------------------------------------------------------------------------------


def test_weights_load_as_stored_and_go_back_to_the_stored_type(tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.BertForMaskedLM, bert_config(), dtype=torch.bfloat16)
    assert {p.dtype for p in load_model(open_checkpoint(folder)).module.parameters()} == {
        torch.bfloat16
    }
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint, dtype=torch.float32)
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    for name, tensor in file_weights(model).items():
        assert same_bits(tensor, checkpoint.weights[name]), name


def test_mixed_types_are_widened_and_go_back_exactly(tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.BertForMaskedLM, bert_config())
    weights = load_file(folder / "model.safetensors")
    mixed = {n: t if "LayerNorm" in n else t.bfloat16() for n, t in weights.items()}
    save_file(mixed, folder / "model.safetensors", {"format": "pt"})
    model = load_model(open_checkpoint(folder))
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    assert any("mixes" in note for note in model.notes)
    assert_round_trip(folder)


# --- what does not fit -------------------------------------------------------------------------


def test_weights_and_config_that_do_not_belong_together(tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.BertForMaskedLM, bert_config())
    change_config(folder, num_hidden_layers=1)
    with pytest.raises(InputError, match=r"encoder\.layer\.1\..* in the file but not in Bert"):
        load_model(open_checkpoint(folder))
    change_config(folder, num_hidden_layers=3)
    with pytest.raises(InputError, match=r"encoder\.layer\.2\..* missing"):
        load_model(open_checkpoint(folder))
    change_config(folder, num_hidden_layers=2, intermediate_size=32)
    with pytest.raises(
        InputError, match=r"do not match config.*expected \[32\], found \[24\] in the file"
    ):
        load_model(open_checkpoint(folder))


def test_a_tensor_that_the_body_does_not_know(tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.BertForMaskedLM, bert_config())
    weights = load_file(folder / "model.safetensors")
    surplus = {"bert.surplus.weight": torch.ones(2)}
    save_file(weights | surplus, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"bert\.surplus\.weight is in the file but not in Bert"):
        load_model(open_checkpoint(folder))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.BertForMaskedLM, bert_config())
    (folder / "modeling_trap.py").write_text("raise SystemExit('the trap was run')\n")
    auto_map = {"AutoConfig": "modeling_trap.C", "AutoModelForMaskedLM": "modeling_trap.M"}
    change_config(folder, auto_map=auto_map)
    [note] = load_model(open_checkpoint(folder)).notes
    assert "code (auto_map in config.json) is not run: transformers' BertForMaskedLM" in note
    change_config(folder, model_type="trap", architectures=["TrapForMaskedLM"])
    with pytest.raises(
        InputError, match=r"no model_type 'trap' \(the code .* is never run\).*--model"
    ):
        load_model(open_checkpoint(folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no config.json"),
        ({"architectures": ["BertForMaskedLM"]}, "no model_type"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "--objective"),
        ({"model_type": ["bert"]}, "model_type is of type list"),
        ({"model_type": "bert", "architectures": 7}, "architectures is of type int"),
        ({"model_type": "bert", "num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        (
            {"model_type": "bert", "vocab_size_per_layer_input": 10**9, "layers": [10**9]},
            "layers is",
        ),
        ({"model_type": "clip", "text_config": {"num_hidden_layers": 1e9}}, "num_hidden_layers is"),
        ({"model_type": "swin", "depths": [2, 10**9]}, r"depths is \[2, 1000000000\]"),
    ],
)
def test_a_config_that_says_too_little(config: dict, message: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    objective = None if "BertModel" in str(config) else "masked-lm"
    with pytest.raises(InputError, match=message):
        load_model(open_checkpoint(tmp_path), objective=objective)


def test_an_objective_that_the_architecture_lacks(tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.BertForMaskedLM, bert_config())
    with pytest.raises(InputError, match="no bert model for image-classification"):
        load_model(open_checkpoint(folder), objective="image-classification")
    with pytest.raises(UsageError, match="did you mean masked-lm"):
        load_model(open_checkpoint(folder), objective="maskedlm")


def test_freeze_patterns(tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.GPT2LMHeadModel, gpt2_config())
    model = load_model(open_checkpoint(folder), freeze=["lm_head.*", "*.ln_1.*"])
    frozen = {n for n, p in model.module.named_parameters() if not p.requires_grad}
    norms = {f"transformer.h.{i}.ln_1.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    assert frozen == norms | {"transformer.wte.weight"}
    reasons = unprotected(model, [n for n in model.checkpoint.weights if n not in frozen])
    assert reasons == dict.fromkeys([n for n in model.checkpoint.weights if n in frozen], "frozen")
    with pytest.raises(UsageError, match=r"wpe\.wight matches no parameter.*wpe\.weight"):
        load_model(open_checkpoint(folder), freeze=["transformer.wpe.wight"])


# --- modules of the user's own -----------------------------------------------------------------

NETWORKS = """
import random
import numpy, torch
from torch import nn

class Net(nn.Module):
    def __init__(self, config):
        super().__init__()
        random.random(), numpy.random.rand(), torch.rand(1)
        width = config.get("width", 4)
        self.stem = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 3)
        config["width"] = "changed"

    def forward(self, x):
        return self.head(self.norm(self.stem(x)).mean((2, 3)))

def make():
    return Net({})

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight

broken = 3
def raises(config):
    raise ValueError("no luck")
def wrong(config):
    return config
"""


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_networks.py").write_text(NETWORKS)
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    return tmp_path


def own_state(width: int = 4) -> dict[str, torch.Tensor]:
    net = nn.ModuleDict(
        {"stem": nn.Conv2d(1, width, 3), "norm": nn.BatchNorm2d(width), "head": nn.Linear(width, 3)}
    )
    net["norm"].running_mean.uniform_(-1, 1)
    net["norm"].num_batches_tracked += 7
    return dict(net.state_dict())


def test_a_module_of_the_users_own(networks: Path) -> None:
    state = own_state()
    torch.save(state, networks / "net.pt")
    path = list(sys.path)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for factory in ("own_networks:Net", "own_networks:make"):
        model = load_model(open_checkpoint(networks / "net.pt"), factory=factory)
        assert model.objective.name == "classification"
        for name, tensor in model.module.state_dict().items():
            assert same_bits(tensor, state[name]), name
        assert list(file_weights(model)) == list(state)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert sys.path == path
    assert unprotected(model, ["stem.weight"])["norm.running_mean"] == "a buffer, not a parameter"


def test_the_factory_gets_the_config_but_cannot_change_it(networks: Path) -> None:
    folder = networks / "checkpoint"
    folder.mkdir()
    save_file(own_state(6), folder / "model.safetensors")
    (folder / "config.json").write_text('{"width": 6, "id2label": {"0": "a", "1": "b", "2": "c"}}')
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint, factory="own_networks:Net", dtype=torch.float64)
    assert model.module.stem.weight.shape[0] == 6
    assert checkpoint.config["width"] == 6
    assert model.labels == ["a", "b", "c"]
    assert model.module.stem.weight.dtype == torch.float64
    assert file_weights(model)["stem.weight"].dtype == torch.float32
    assert_round_trip(folder, factory="own_networks:Net")


def test_a_factory_is_given_the_number_of_its_labels(networks: Path) -> None:
    (networks / "counted.py").write_text(
        "from torch import nn\n\ndef make(config):\n    return nn.Linear(2, config['num_labels'])\n"
    )
    save_file(dict(nn.Linear(2, 3).state_dict()), networks / "model.safetensors")
    (networks / "config.json").write_text('{"id2label": {"0": "a", "1": "b", "2": "c"}}')
    assert load_model(open_checkpoint(networks), factory="counted:make").outputs == 3
    (networks / "config.json").write_text('{"hidden": 2}')
    with pytest.raises(UsageError, match=r'has neither num_labels nor id2label: add "num_labels"'):
        load_model(open_checkpoint(networks), factory="counted:make")


def test_own_half_precision_weights_stay_as_stored(networks: Path) -> None:
    state = {n: t.half() if t.is_floating_point() else t for n, t in own_state().items()}
    save_file(state, networks / "net.safetensors")
    model = load_model(open_checkpoint(networks / "net.safetensors"), factory="own_networks:Net")
    assert {p.dtype for p in model.module.parameters()} == {torch.float16}


def test_own_tied_weights_stay_tied(networks: Path) -> None:
    weight, biases = torch.randn(3, 3), torch.randn(2, 3)
    state = {"second.weight": weight, "first.bias": biases[0], "second.bias": biases[1]}
    save_file(state, networks / "net.safetensors")
    model = load_model(open_checkpoint(networks / "net.safetensors"), factory="own_networks:Tied")
    assert model.module.first.weight is model.module.second.weight
    assert same_bits(model.module.first.weight.detach(), weight)
    assert set(file_weights(model)) == set(state)
    twice = state | {"first.weight": weight + 1}
    save_file(twice, networks / "twice.safetensors")
    with pytest.raises(InputError, match="are one tensor in the model: expected equal"):
        load_model(open_checkpoint(networks / "twice.safetensors"), factory="own_networks:Tied")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"hed.weight": s["head.weight"]}, r"hed\.weight is in the file.*head\.wei"),
        (lambda s: {k: v for k, v in s.items() if k != "stem.bias"}, r"stem\.bias is in the mod"),
        (
            lambda s: s | {"head.bias": torch.zeros(4)},
            r"head\.bias does not match: .*found \[4\] in the file",
        ),
    ],
)
def test_own_weights_must_fit_exactly(change, message: str, networks: Path) -> None:
    torch.save(change(own_state()), networks / "net.pt")
    with pytest.raises(InputError, match=message):
        load_model(open_checkpoint(networks / "net.pt"), factory="own_networks:make")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("own_networks", "package.module:factory"),
        ("own_network:Net", "no module named own_network"),
        ("own_networks:Nett", "did you mean Net"),
        ("own_networks:broken", "expected a function or class, found broken of type"),
        ("own_networks:raises", "failed with ValueError: no luck"),
        ("own_networks:wrong", "expected a torch.nn.Module, found dict"),
    ],
)
def test_a_factory_that_cannot_be_used(factory: str, message: str, networks: Path) -> None:
    torch.save(own_state(), networks / "net.pt")
    with pytest.raises(UsageError, match=message):
        load_model(open_checkpoint(networks / "net.pt"), factory=factory)


def test_infinity_in_a_config_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    config = bert_config(horizon=float("inf"))
    folder = save(tmp_path, transformers.BertForMaskedLM, config)
    assert "__float__" in (folder / "config.json").read_text()
    assert load_model(open_checkpoint(folder)).module.config.horizon == float("inf")


WRITTEN = {
    "gpt2": ("GPT2LMHeadModel", "AutoModelForCausalLM", gpt2_config),
    "mixtral": ("MixtralForCausalLM", "AutoModelForCausalLM", mixtral_config),
    "resnet": (
        "ResNetForImageClassification",
        "AutoModelForImageClassification",
        lambda: transformers.ResNetConfig(**RESNET),
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_others_read_what_is_written(name: str, tmp_path: Path) -> None:
    cls, auto, config = WRITTEN[name]
    folder = save(tmp_path / "in", getattr(transformers, cls), config())
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter += 1
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(out, checkpoint, file_weights(model))
    expected = model.module.state_dict()
    loaded = getattr(transformers, auto).from_pretrained(out)
    assert type(loaded).__name__ == cls
    assert loaded.state_dict().keys() == expected.keys()
    for key, value in loaded.state_dict().items():
        assert same_bits(value, expected[key]), key
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(checkpoint.weights)
        assert file.metadata() == {"format": "pt"}
    again = load_model(open_checkpoint(out))
    for key, value in again.module.state_dict().items():
        assert same_bits(value, expected[key]), key


def test_names_of_the_file_are_read_by_safe_open(tmp_path: Path) -> None:
    """The round trip's reference is the file itself, not our reader of it."""
    folder = save(tmp_path, transformers.MixtralForCausalLM, mixtral_config())
    weights = file_weights(load_model(open_checkpoint(folder)))
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(weights)
        for name in file.keys():  # noqa: SIM118
            assert same_bits(file.get_tensor(name), weights[name])


def test_tokenizers_prints_nothing_on_stdout(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path, transformers.GPT2LMHeadModel, gpt2_config(), byte_tokenizer())
    token = {"content": "<|endoftext|>", "special": True, "un\x1b[31mknown": 1}
    path = folder / "tokenizer_config.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | {"added_tokens_decoder": {"0": token}}))
    capfd.readouterr()
    assert load_model(open_checkpoint(folder)).processor.eos_token == "<|endoftext|>"
    os.write(1, b"not silenced")
    assert capfd.readouterr().out == "not silenced"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="maps are read from /proc")
def test_weights_stay_in_a_private_map_of_the_file_until_they_are_written_to(
    tmp_path: Path,
) -> None:
    folder = save(tmp_path / "m", transformers.GPT2LMHeadModel, gpt2_config(), byte_tokenizer())
    file = folder / "model.safetensors"
    written = file.read_bytes()
    checkpoint = open_checkpoint(folder)
    before = {name: checkpoint.weights[name].clone() for name in checkpoint.weights}
    model = load_model(checkpoint)
    places = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            assert line.split()[1] == "rw-p"
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            places.append(range(start, end))
    (held,) = (
        place
        for place in places
        if any(checkpoint.weights[name].data_ptr() in place for name in before)
    )
    for name, parameter in model.module.named_parameters():
        (found,) = (place for place in places if parameter.data_ptr() in place)
        assert found != held, name
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(1.0)
    assert file.read_bytes() == written
    for name, tensor in before.items():
        assert same_bits(checkpoint.weights[name], tensor), name


def qwen(folder: Path) -> Path:
    """A model of texts and images, whose part for texts is a model of its own."""
    config = transformers.Qwen3_5Config()
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    linear = {"key_heads": 2, "value_heads": 2}, {"key_head_dim": 8, "value_head_dim": 8}
    sizes = {f"linear_num_{name}": n for name, n in linear[0].items()}
    sizes |= {f"linear_{name}": n for name, n in linear[1].items()} | heads
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    text = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "pad_token_id": 0}
    for name, value in (text | sizes | layers).items():
        setattr(config.text_config, name, value)
    seen = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
    for name, value in (seen | {"out_hidden_size": 16}).items():
        setattr(config.vision_config, name, value)
    return save(folder, transformers.Qwen3_5ForConditionalGeneration, config)


def test_the_part_for_texts_of_a_model_of_texts_and_images(tmp_path: Path) -> None:
    folder = qwen(tmp_path / "qwen")
    model = load_model(open_checkpoint(folder))
    assert (type(model.module).__name__, model.objective.name) == (
        "Qwen3_5ForCausalLM",
        "causal-lm",
    )
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model.module(ids).logits, reference(ids).logits)
    assert_round_trip(folder)


def test_kernels_are_no_part_of_a_model_and_layers_that_attend_otherwise_are(
    tmp_path: Path,
) -> None:
    config = transformers.LlamaConfig(vocab_size=60, num_key_value_heads=2, **SIZES)
    folder = save(tmp_path / "llama", transformers.LlamaForCausalLM, config)
    change_config(folder, attn_implementation="flash_attention_2")
    assert load_model(open_checkpoint(folder)).module.config._attn_implementation == "sdpa"
    config = transformers.MinistralConfig(vocab_size=60, num_key_value_heads=2, head_dim=8, **SIZES)
    folder = save(tmp_path / "mistral", transformers.MinistralForCausalLM, config)
    change_config(folder, model_type="mistral", architectures=["MistralForCausalLM"])
    assert type(load_model(open_checkpoint(folder)).module).__name__ == "MinistralForCausalLM"


def test_a_tokenizer_of_pieces_names_what_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=1)
    folder = save(tmp_path, transformers.T5ForConditionalGeneration, config)
    (folder / "spiece.model").write_bytes(b"no model")
    monkeypatch.setattr(loading, "_is_installed", lambda module: module != "sentencepiece")
    with pytest.raises(UsageError, match="pip install sentencepiece protobuf"):
        load_model(open_checkpoint(folder))
    monkeypatch.setattr(loading, "_is_installed", lambda module: True)
    with pytest.raises(InputError, match="the tokenizer cannot be loaded"):
        load_model(open_checkpoint(folder))
