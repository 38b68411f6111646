import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from consolidate.estimation.batches import eval_mode
from consolidate.models.adapters import load
from consolidate.models.lora import Lora, add_lora, low_rank_layers, merge_lora
from consolidate.models.model import file_weights
from formats.checkpoint import open_checkpoint
from formats.errors import InputError, UsageError
from support.tiny_models import byte_tokenizer, gpt2_config, outputs, save


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    config = gpt2_config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return save(tmp_path / "gpt2", transformers.GPT2LMHeadModel, config, byte_tokenizer())


def test_a_fresh_adapter_changes_nothing_and_only_it_is_trained(gpt2: Path):
    model = load(open_checkpoint(gpt2))
    before = outputs(model.module)
    state = torch.random.get_rng_state()
    assert add_lora(model.module, Lora(rank=2, targets=["c_attn", "transformer.h.0.mlp.*"])) == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.mlp.c_fc",
        "transformer.h.0.mlp.c_proj",
        "transformer.h.1.attn.c_attn",
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(outputs(model.module), before)
    trained = [name for name, p in model.module.named_parameters() if p.requires_grad]
    assert len(trained) == 8
    assert all("lora_" in name for name in trained)
    twin = load(open_checkpoint(gpt2)).module
    add_lora(twin, Lora(rank=2, targets=["c_attn", "transformer.h.0.mlp.*"]))
    for (name, one), other in zip(model.module.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_merging_gives_the_module_back_with_what_the_adapter_computed(gpt2: Path):
    model = load(open_checkpoint(gpt2))
    names = list(model.module.state_dict())
    add_lora(model.module, Lora(rank=3, targets=["c_attn", "c_proj"], alpha=5))
    for layer in low_rank_layers(model.module).values():
        nn.init.normal_(layer.b)
    expected = outputs(model.module)
    merge_lora(model.module)
    torch.testing.assert_close(outputs(model.module), expected)
    assert list(model.module.state_dict()) == names
    assert list(file_weights(model)) == list(model.checkpoint.weights)
    assert not hasattr(model.module, "peft_config")
    add_lora(model.module, Lora(rank=2, targets=["c_fc"]))  # as if nothing had been there


def test_the_architecture_has_targets_of_its_own(gpt2: Path):
    module = load(open_checkpoint(gpt2)).module
    assert {name.rpartition(".")[2] for name in add_lora(module, Lora(rank=1))} == {"c_attn"}
    with pytest.raises(UsageError, match="name them with --lora-targets, such as 0, 2"):
        add_lora(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), Lora(rank=1))


def test_targets_that_cannot_be_are_refused(gpt2: Path):
    module = load(open_checkpoint(gpt2)).module
    with pytest.raises(UsageError, match=r"--lora-targets q_proj matches no layer.*c_attn"):
        add_lora(module, Lora(rank=1, targets=["q_proj"]))
    with pytest.raises(UsageError, match=r"--lora-targets ln_1 matches no layer"):
        add_lora(module, Lora(rank=1, targets=["ln_1"]))
    with pytest.raises(InputError, match=r"wte cannot have an adapter.*lm_head\.weight"):
        add_lora(module, Lora(rank=1, targets=["wte"]))


def test_without_peft_it_says_what_to_install(gpt2: Path, monkeypatch: pytest.MonkeyPatch):
    module = load(open_checkpoint(gpt2)).module
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"pip install 'consolidate-ewc\[peft\]', or '\.\[peft\]'"):
        add_lora(module, Lora(rank=2))


def test_evaluations_see_the_adapter_of_an_encoder_layer():
    """In eval mode torch passes the weights of such a layer to one function of its own."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    inputs = torch.randn(3, 4, 8)
    with eval_mode(layer), torch.no_grad():
        before = layer(inputs)
    add_lora(layer, Lora(rank=2, targets=["linear1", "linear2"]))
    for adapted in low_rank_layers(layer).values():
        nn.init.normal_(adapted.b)
    with eval_mode(layer), torch.no_grad():
        found = layer(inputs)
    assert torch.backends.mha.get_fastpath_enabled()
    merge_lora(layer)
    with eval_mode(layer), torch.no_grad():
        torch.testing.assert_close(found, layer(inputs))
    assert not torch.allclose(found, before)
