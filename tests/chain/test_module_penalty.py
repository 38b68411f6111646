"""The penalty of a module with stored factors."""

import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import consolidate
from consolidate.chain.module_penalty import load_penalty
from consolidate.ewc.block_penalty import BlockPenalty
from consolidate.ewc.low_rank_penalty import MergedPenalty
from consolidate.ewc.penalty import Penalty
from formats.errors import InputError, UsageError
from formats.fisher_folder import read_fisher, write_fisher
from formats.fisher_json import Block
from support.checkpoints import Write
from support.networks import NETWORK, make_network
from support.tiny_models import bert_config, byte_tokenizer, gpt2_config, save, word_tokenizer


def give_factors(checkpoint: Path, dims: dict[str, tuple[int, ...]], matrix: str = "R") -> None:
    """Write a random R, with the trace of Λ, beside the Fisher of some layers and their biases."""
    stored = read_fisher(checkpoint / "fisher")
    fisher = {name: stored.fisher[name].clone() for name in stored.fisher}
    generator = torch.Generator().manual_seed(0)
    factors, blocks = {}, {}
    for layer, over in dims.items():
        # In the order of the file, so that the bias may be before its weight.
        ends = tuple(name for name in fisher if name.rpartition(".")[0] == layer)
        n = fisher[f"{layer}.weight"].shape[over[0]] + 1
        root = torch.randn(n, 4, generator=generator, dtype=torch.float64)
        values = (root[:, None] * root).sum(2)
        values *= sum(fisher[name].double().sum() for name in ends) / values.trace()
        factors[f"{layer}.weight.{matrix}"] = values.float()
        blocks[f"{layer}.weight.{matrix}"] = Block(matrix, over, ends)
    shutil.rmtree(checkpoint / "fisher")
    ledger = replace(stored.ledger, blocks=blocks)
    write_fisher(checkpoint / "fisher", fisher, ledger, factors=factors)


def explicit(
    checkpoint: Path, theta: dict[str, Tensor], outs: int, ewc_lambda: float = 2.0
) -> float:
    """The penalty around the checkpoint's weights; `outs` is the dimension of W's outputs."""
    stored, mu = read_fisher(checkpoint / "fisher"), load_file(checkpoint / "model.safetensors")
    change = {name: theta[name].double() - mu[name] for name in stored.fisher}
    covered = {at for block in stored.ledger.blocks.values() for at in block.parameters}
    total = sum(
        (change[name] ** 2 * stored.fisher[name]).sum() for name in change if name not in covered
    )
    for name, block in stored.ledger.blocks.items():
        weight, bias = sorted((change[at] for at in block.parameters), key=lambda t: -t.ndim)
        rows = torch.cat([weight.movedim(outs, 0), bias[:, None]], 1)
        total += (rows @ stored.factors[name].double() * rows).sum() / len(rows)
    return ewc_lambda / 2 * float(total)


@pytest.fixture
def with_factors(network_checkpoint: Path, write_task: Write) -> Path:
    consolidate.fisher(network_checkpoint, write_task("old"), **NETWORK)
    give_factors(network_checkpoint, {"0": (1,)})
    return network_checkpoint


def moved_network() -> torch.nn.Module:
    torch.manual_seed(3)
    return make_network({"sizes": [6, 8, 3]})


def test_stored_factors_are_used_unless_the_diagonal_is_asked_for(with_factors: Path) -> None:
    network = moved_network()
    theta = dict(network.state_dict())
    for structure in (None, "inputs"):
        penalty = load_penalty(network, with_factors, ewc_lambda=2.0, structure=structure)
        assert isinstance(penalty, BlockPenalty)
        assert penalty.value() == pytest.approx(explicit(with_factors, theta, 0), rel=1e-5)
    diagonal = load_penalty(network, with_factors, ewc_lambda=2.0, structure="diagonal")
    assert isinstance(diagonal, Penalty)
    mu = load_file(with_factors / "model.safetensors")
    fisher = load_file(with_factors / "fisher" / "fisher.safetensors")
    assert diagonal.value() == Penalty(network, fisher, mu, ewc_lambda=2.0).value()
    assert diagonal.value() != pytest.approx(penalty.value(), rel=0.01)
    network.load_state_dict(mu)
    assert penalty.value() == 0


def test_where_there_are_none_that_fit_inputs_is_refused(
    network_checkpoint: Path, write_task: Write
) -> None:
    consolidate.fisher(network_checkpoint, write_task("old"), **NETWORK)
    network = moved_network()
    with pytest.raises(InputError, match=r"has no factors that fit .* --structure inputs"):
        load_penalty(network, network_checkpoint, ewc_lambda=2.0, structure="inputs")
    expected = load_penalty(network, network_checkpoint, ewc_lambda=2.0).value()
    give_factors(network_checkpoint, {"0": (1,)}, "A")  # which no penalty here uses
    with pytest.raises(InputError, match="no factors that fit"):
        load_penalty(network, network_checkpoint, ewc_lambda=2.0, structure="inputs")
    penalty = load_penalty(network, network_checkpoint, ewc_lambda=2.0)
    assert isinstance(penalty, Penalty)
    assert penalty.value() == expected
    with pytest.raises(UsageError, match=r"'kronecker': expected 'diagonal' or 'inputs'"):
        load_penalty(network, network_checkpoint, ewc_lambda=2.0, structure="kronecker")


def test_a_module_that_lacks_what_has_a_fisher_is_refused(
    network_checkpoint: Path, write_task: Write
) -> None:
    consolidate.fisher(network_checkpoint, write_task("old"), **NETWORK)
    network = moved_network()
    renamed = torch.nn.ModuleDict({"0": network[0], "head": network[2]})
    for module, count in ((renamed, 2), (torch.nn.ModuleDict({"model": network}), 4)):
        message = rf"contains '\d\.\w+' \({count} such names\), which is not in the module"
        with pytest.raises(InputError, match=message):
            load_penalty(module, network_checkpoint, ewc_lambda=2.0)


def test_a_head_that_a_model_of_transformers_lacks_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind = transformers.BertForSequenceClassification
    bert = save(tmp_path / "bert", kind, bert_config(num_labels=3), word_tokenizer())
    task = tmp_path / "old.jsonl"
    task.write_text('{"text": "the cat", "label": 0}\n{"text": "a dog", "label": 2}\n')
    consolidate.fisher(bert, task, task="old")
    penalty = load_penalty(transformers.BertModel.from_pretrained(bert), bert, ewc_lambda=2.0)
    assert penalty.unprotected == []
    lacking = "classifier.bias, classifier.weight|classifier.weight, classifier.bias"
    assert re.search(f"the model lacks, and so does not protect, ({lacking})$", caplog.text, re.M)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="maps are read from /proc")
def test_factors_stay_in_the_mapped_file(with_factors: Path) -> None:
    penalty = load_penalty(moved_network(), with_factors, ewc_lambda=2.0)
    assert isinstance(penalty, BlockPenalty)
    places = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            places[range(start, end)] = Path(line.split()[-1]).name
    (term,) = penalty._terms
    for tensor, file in zip(term.stored, ("factors", "model", "model"), strict=False):
        (found,) = (name for place, name in places.items() if tensor.data_ptr() in place)
        assert found == f"{file}.safetensors"


def test_the_penalty_by_blocks_is_loaded_for_a_model_of_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = gpt2_config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    gpt2 = save(tmp_path / "gpt2", transformers.GPT2LMHeadModel, config, byte_tokenizer())
    task = tmp_path / "old.jsonl"
    task.write_text('{"text": "the plot was dull"}\n' * 3)
    consolidate.fisher(gpt2, task, task="old", estimator="empirical")
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    give_factors(gpt2, {f"transformer.h.{i}.{name}": (0,) for i in range(2) for name in names})
    options: dict[str, Any] = {"modules_to_save": ["c_fc", "ln_f"], "init_lora_weights": False}
    start = peft.LoraConfig(r=2, target_modules=["c_attn", "wpe"], fan_in_fan_out=True, **options)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(3)
        model = peft.get_peft_model(transformers.GPT2LMHeadModel.from_pretrained(gpt2), start)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    penalty = load_penalty(model, gpt2, ewc_lambda=2.0)
    assert isinstance(penalty, MergedPenalty)
    assert {id(p) for p in penalty.parameters()} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    assert penalty.unprotected == []
    value = float(penalty.value_and_add_gradient_())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        merged = model.merge_and_unload().requires_grad_(True)
    whole = load_penalty(merged, gpt2, ewc_lambda=2.0)
    assert isinstance(whole, BlockPenalty)
    assert whole.value() == pytest.approx(value, rel=1e-5)
    assert value == pytest.approx(explicit(gpt2, dict(merged.state_dict()), 1), rel=1e-4)


def adapted_gpt2(folder: Path, **options: Any) -> tuple[torch.nn.Module, Path]:
    """A model of peft on a checkpoint with a Fisher."""
    start = save(folder / "gpt2", transformers.GPT2LMHeadModel, gpt2_config(), byte_tokenizer())
    task = folder / "old.jsonl"
    task.write_text('{"text": "the plot was dull"}\n' * 3)
    consolidate.fisher(start, task, task="old", estimator="empirical")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **options)
    model = transformers.GPT2LMHeadModel.from_pretrained(start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config), start


@pytest.mark.parametrize(
    ("options", "free"),
    [
        ({"bias": "lora_only"}, ""),
        ({"bias": "all"}, ""),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),  # tied before, and a copy of its own now
        ({"lora_bias": True}, "lora_B"),
    ],
)
def test_what_trains_beside_an_adapter_is_held_or_named(
    tmp_path: Path, options: dict[str, Any], free: str
) -> None:
    model, start = adapted_gpt2(tmp_path, **options)
    penalty = load_penalty(model, start, ewc_lambda=2.0)
    held = {id(p) for p in penalty.parameters()}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    assert len(penalty.unprotected) == len(lost)
    assert bool(lost) == bool(free)
    assert all(free in name for name in penalty.unprotected)


def test_another_adapter_than_the_penalized_one_is_refused(tmp_path: Path) -> None:
    model, start = adapted_gpt2(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        model.add_adapter("new", config)
    load_penalty(model, start, ewc_lambda=2.0)
    model.set_adapter("new")
    with pytest.raises(InputError, match="one active adapter, 'default', found new"):
        load_penalty(model, start, ewc_lambda=2.0)
