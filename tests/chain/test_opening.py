"""A Fisher from elsewhere is compared with the checkpoint that it is used for."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import consolidate
from consolidate.api import evaluate, show, verify
from consolidate.chain.opening import find_fisher, stored_fisher, with_base
from formats.checkpoint import open_checkpoint
from formats.hub import locate
from support import tiny_models
from support.checkpoints import Write
from support.loopback_hub import Hub, run
from support.networks import NETWORK
from support.tiny_models import change_config


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    config = tiny_models.gpt2_config(bos_token_id=0, eos_token_id=0)
    tiny_models.save(tmp_path / "measured", transformers.GPT2LMHeadModel, config)
    consolidate.fisher(tmp_path / "measured", generate=1, max_length=2)
    return tmp_path / "measured"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"activation_function": "relu"}, "activation_function 'gelu_new' there, 'relu' here"),
        ({"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon 1e-05 there, 0.001 here"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor absent there, 2.0 here"),
    ],
)
def test_a_config_that_computes_otherwise_is_told(
    measured: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], told: str
) -> None:
    other = shutil.copytree(measured, measured.with_name("other"))
    change_config(other, **changes)
    stored_fisher(measured / "fisher", open_checkpoint(other))
    (record,) = caplog.records
    assert f"{told}: if the model computes something else now" in record.getMessage()
    assert str(other) in record.getMessage()


def test_the_config_beside_a_fisher_on_the_hub_is_compared(
    measured: Path, tmp_path: Path, hub: Hub
) -> None:
    other = shutil.copytree(measured, measured.with_name("other"))
    tiny_models.byte_tokenizer().save_pretrained(other)
    change_config(other, activation_function="relu")
    hub.put("user/name", measured)
    shutil.copytree(measured / "fisher", tmp_path / "alone" / "fisher")
    hub.put("user/alone", tmp_path / "alone")
    (tmp_path / "new.jsonl").write_text('{"text": "the cat"}\n' * 4)
    words = ("finetune", other, "--data", "new.jsonl", "--ewc-lambda", 1, "--dry-run")
    for name, told in (("user/name", True), ("user/alone", False)):
        more = ("--output-dir", "out", "--fisher", name)
        code, _, err = run(tmp_path, *words, *more, HF_ENDPOINT=hub.address)
        assert code == 0, err
        assert ("differs from that in" in err) == told, err
    assert not hub.sent["model.safetensors"]


def test_keys_that_compute_nothing_are_not_told(
    measured: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = shutil.copytree(measured, measured.with_name("other"))
    change_config(
        other,
        _name_or_path="elsewhere",
        architectures=["GPT2Model"],
        attn_pdrop=0.5,
        dtype=str(torch.bfloat16),
        id2label={"0": "a"},
        transformers_version="0",
        use_cache=False,
        rope_scaling=None,
        pad_token_id=3,
        problem_type="single_label_classification",
    )
    stored_fisher(measured / "fisher", open_checkpoint(other))
    change_config(measured, rope_theta=1e5)
    change_config(other, rope_parameters={"rope_theta": 1e5, "rope_type": "default"})
    stored_fisher(measured / "fisher", open_checkpoint(other))
    for folder in (measured, other):
        change_config(folder, rope_parameters=5, rope_theta=1e5)
    stored_fisher(measured / "fisher", open_checkpoint(other))
    (other / "config.json").unlink()
    stored_fisher(measured / "fisher", open_checkpoint(other))
    assert not caplog.records


def test_a_fisher_is_not_compared_with_a_config_that_is_not_its_own(
    measured: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside its own weights there is one config, and in a folder of another name none of it."""
    change_config(measured, activation_function="relu")
    stored_fisher(measured / "fisher", open_checkpoint(measured))
    (measured.parent / "config.json").write_text('{"activation_function": "tanh"}')
    apart = shutil.copytree(measured / "fisher", measured.parent / "apart")
    stored_fisher(apart, open_checkpoint(measured))
    assert not caplog.records


@pytest.mark.parametrize("moved", ["", "fisher"])
def test_what_a_killed_command_moved_away_is_found_by_those_that_read(
    network_checkpoint: Path, write_task: Write, moved: str
) -> None:
    """As after a kill between the two renames, where folders cannot be exchanged."""
    data = write_task("old")
    consolidate.fisher(network_checkpoint, data, **NETWORK)
    factory = NETWORK["model"]
    readers: list[Callable[[], Any]] = [
        lambda: show(network_checkpoint),
        lambda: evaluate(network_checkpoint, data, model=factory),
        lambda: verify(network_checkpoint),
        lambda: find_fisher(locate(network_checkpoint), None),
        lambda: find_fisher(network_checkpoint.parent, network_checkpoint),
    ]
    target = network_checkpoint / moved if moved else network_checkpoint
    for read in readers:
        target.rename(target.with_name(f".{target.name}.consolidate-old"))
        assert read()
        assert target.is_dir()


def test_a_base_model_that_a_killed_command_moved_away_is_found(network_checkpoint: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": str(network_checkpoint)}
    adapter = replace(open_checkpoint(network_checkpoint), adapter=config)
    network_checkpoint.rename(network_checkpoint.with_name(".start.consolidate-old"))
    base = with_base(adapter, None).base
    assert base is not None
    assert base.path == network_checkpoint
