from pathlib import Path

import pytest
import torch
import transformers

from consolidate.models.file_weights import FileWeights
from consolidate.models.loading import load_model
from consolidate.models.model import Model
from formats.checkpoint import open_checkpoint
from formats.tensors import dtype_of, shape_of
from support.tiny_models import bert_config, byte_tokenizer, mixtral_config, save


def loaded(folder: Path, **options: object) -> tuple[Model, FileWeights]:
    model = load_model(open_checkpoint(folder), **options)
    return model, FileWeights(model.module, model.layout, model.checkpoint.weights)


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    cls = transformers.MixtralForCausalLM
    return save(tmp_path / "m", cls, mixtral_config(), byte_tokenizer(), torch.bfloat16)


def test_headers_are_known_before_a_tensor_is_made(mixtral: Path) -> None:
    model, weights = loaded(mixtral, dtype=torch.float32)
    assert list(weights) == list(model.checkpoint.weights)
    assert len(weights) == len(list(weights))
    for name, tensor in weights.items():
        assert dtype_of(weights, name) == tensor.dtype == torch.bfloat16
        assert shape_of(weights, name) == tuple(tensor.shape)
        assert torch.equal(tensor, model.checkpoint.weights[name])
    assert "lm_head.weight" in weights
    assert "other" not in weights
    with pytest.raises(KeyError):
        weights["other"]


def test_values_are_those_at_the_time_they_are_asked_for(mixtral: Path) -> None:
    model, weights = loaded(mixtral, dtype=torch.float32)
    names = ("lm_head.weight", "model.layers.0.block_sparse_moe.experts.2.w1.weight")
    before = {name: weights[name] for name in names}  # one alone, one of a stack of experts
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(1.0)
    for name, old in before.items():
        assert torch.equal(weights[name], (old.float() + 1).bfloat16()), name


def test_what_several_tensors_are_made_of_is_made_once(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, weights = loaded(mixtral)
    calls = []
    to_file = model.layout.to_file
    monkeypatch.setattr(model.layout, "to_file", lambda parts: calls.append(1) or to_file(parts))
    for name in weights:  # in which the experts' first and second matrices take turns
        weights[name]
    assert len(calls) == len(model.layout.groups) < len(weights)


def test_a_tensor_of_the_files_dtype_is_the_modules_own_memory(tmp_path: Path) -> None:
    cls = transformers.BertForMaskedLM
    model, weights = loaded(save(tmp_path / "m", cls, bert_config()), objective="masked-lm")
    own = {p.data_ptr() for p in model.module.parameters()}
    assert all(
        weights[name].data_ptr() in own for name in weights if not name.endswith("position_ids")
    )
