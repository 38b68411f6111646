import copy
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import consolidate
from consolidate.api import finetune
from consolidate.estimation.fisher_diagonal import fisher_diagonal
from consolidate.estimation.gradient_checkpointing import (
    checkpointed_layers,
    checkpointing_in_eval_mode,
    enable,
)
from consolidate.estimation.likelihoods import LIKELIHOODS
from formats.errors import NonFiniteError, UsageError
from formats.fisher_json import ESTIMATORS
from support.tiny_models import (
    SIZES,
    bert_config,
    byte_tokenizer,
    gpt2_config,
    save,
    word_tokenizer,
)

LAYERS = 3


def make(name: str) -> tuple[nn.Module, dict[str, Tensor], Tensor, str]:
    """Make a model with dropout everywhere, and a batch for it."""
    torch.manual_seed(0)
    ids = torch.randint(5, 20, (3, 7))
    if name == "bart":  # whose layers call dropout as a function
        config = transformers.BartConfig(
            vocab_size=30, d_model=8, encoder_layers=LAYERS, decoder_layers=LAYERS,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=8,
            decoder_ffn_dim=8, max_position_embeddings=20, dropout=0.5, activation_dropout=0.5,
        )  # fmt: skip
        model = transformers.BartForConditionalGeneration(config)
        return model, {"input_ids": ids}, ids.flip(1), "token-softmax"
    if name == "llama":
        config = transformers.LlamaConfig(
            vocab_size=30, num_key_value_heads=1, attention_dropout=0.5,
            **(SIZES | {"num_hidden_layers": LAYERS}),
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        return model, {"input_ids": ids}, ids, "next-token-softmax"
    if name == "mixtral":
        config = transformers.MixtralConfig(
            vocab_size=30, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
            **(SIZES | {"num_hidden_layers": LAYERS}),
        )  # fmt: skip
        model = transformers.MixtralForCausalLM(config)
        return model, {"input_ids": ids}, ids, "next-token-softmax"
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=8, n_layer=LAYERS, n_head=2, n_positions=20
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids}, ids, "next-token-softmax"


@pytest.mark.parametrize("name", ["bart", "gpt2", "llama", "mixtral"])
def test_the_fisher_is_the_same_to_the_bit(name: str) -> None:
    model, inputs, labels, likelihood = make(name)
    batches = [{**inputs, "labels": labels}, {**inputs, "labels": labels.roll(1, 0)}]
    for estimator in ESTIMATORS if name == "llama" else ("mc",):
        plain = fisher_diagonal(copy.deepcopy(model), batches, likelihood, estimator=estimator)
        checkpointed = copy.deepcopy(model)
        enable(checkpointed)
        assert len(checkpointed_layers(checkpointed)) == LAYERS * (2 if name == "bart" else 1)
        found = fisher_diagonal(checkpointed, batches, likelihood, estimator=estimator)
        assert found.methods == plain.methods
        assert found.relative_errors == plain.relative_errors
        for parameter, values in plain.items():
            assert torch.equal(found[parameter], values), parameter
        assert sum(plain.trace().values()) > 0


class Counting:
    """Says how many inputs of the layers' last matrices wait for the backward pass."""

    def __init__(self, model: nn.Module):
        self.alive = 0
        self.found: list[int] = []
        for module in model.modules():
            if isinstance(module, transformers.models.llama.modeling_llama.LlamaMLP):
                module.down_proj.register_forward_pre_hook(self._note)

    def __getattr__(self, name: str) -> Any:
        return getattr(LIKELIHOODS["next-token-softmax"], name)

    def observed_scores(self, outputs: Tensor, labels: Tensor) -> Tensor:
        self.found.append(self.alive)
        return LIKELIHOODS["next-token-softmax"].observed_scores(outputs, labels)

    def _note(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.alive += 1
        weakref.finalize(args[0].untyped_storage(), self._gone)

    def _gone(self) -> None:
        self.alive -= 1


def test_inputs_of_layers_do_not_wait_for_the_backward_pass() -> None:
    model, inputs, labels, _ = make("llama")
    batches = [{**inputs, "labels": labels}] * 2
    for expected in (LAYERS, 0):
        counting = Counting(model)
        fisher = fisher_diagonal(model, batches, counting, estimator="empirical")
        assert set(fisher.methods.values()) == {"rule"}
        assert counting.found == [expected, expected]
        enable(model)


def test_the_layers_come_back_when_a_pass_is_broken_off() -> None:
    model, inputs, labels, likelihood = make("llama")
    enable(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteError):
        fisher_diagonal(model, [{**inputs, "labels": labels}], likelihood)
    for layer in checkpointed_layers(model):
        assert "forward" not in vars(layer)
        assert not layer.training or model.training
    with checkpointing_in_eval_mode(model):
        assert all("forward" in vars(layer) for layer in checkpointed_layers(model))


def folder_with_data(tmp_path: Path) -> tuple[Path, Path]:
    folder = save(
        tmp_path / "model",
        transformers.GPT2LMHeadModel,
        gpt2_config(),
        byte_tokenizer(),
    )
    data = tmp_path / "texts.jsonl"
    texts = ["the cat sat on the mat", "a dog ate my homework", "rain again"]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder, data


def test_both_commands_write_the_same_bytes_with_it(tmp_path: Path) -> None:
    folder, data = folder_with_data(tmp_path)
    written = []
    for on in (False, True):
        consolidate.fisher(folder, data, task="old", gradient_checkpointing=on, overwrite=True)
        out = tmp_path / f"out-{on}"
        finetune(
            folder, data, task="new", output_dir=out, ewc_lambda=1.0, gradient_checkpointing=on,
            max_steps=3, batch_size=2, learning_rate=1e-2,
        )  # fmt: skip
        fisher = (folder / "fisher" / "fisher.safetensors").read_bytes()
        files = [out / "model.safetensors", out / "fisher" / "fisher.safetensors"]
        written.append([fisher, *(file.read_bytes() for file in files)])
    assert written[0] == written[1]


def test_training_runs_layers_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, data = folder_with_data(tmp_path)
    consolidate.fisher(folder, data, task="old")
    runs = []
    mlp = transformers.models.gpt2.modeling_gpt2.GPT2MLP
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: runs.append(1) or forward(self, x))
    counts = []
    for on in (False, True):
        runs.clear()
        finetune(
            folder, data, task="new", output_dir=tmp_path / f"{on}", ewc_lambda=1.0,
            max_steps=1, batch_size=3, gradient_checkpointing=on, fisher_estimator="batched",
        )  # fmt: skip
        counts.append(len(runs))
    # Two layers, in one step and one pass.
    assert counts[1] == counts[0] + 2 * 2


def test_a_model_that_does_not_know_how_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--gradient-checkpointing needs a model of transformers"):
        enable(nn.Linear(2, 2))
    module = nn.Linear(2, 2)

    def refuse(options: dict[str, Any]) -> None:
        raise ValueError("Linear does not support it.")

    module.gradient_checkpointing_enable = refuse
    with pytest.raises(UsageError, match="Linear does not support it"):
        enable(module)


class Normed(nn.Sequential):
    def gradient_checkpointing_enable(self, options: dict[str, Any]) -> None:
        pass


def normed_network() -> nn.Module:
    return Normed(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def test_running_statistics_would_be_updated_twice(
    network_checkpoint: Path, write_task: Any, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    save_file(normed_network().state_dict(), tmp_path / "bare.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="running statistics twice"):
        finetune(
            tmp_path / "bare.safetensors", write_task("new"), output_dir=tmp_path / "out",
            penalty="none", model=f"{__name__}:normed_network", gradient_checkpointing=True,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_classifier_with_dropout_trains_alike(tmp_path: Path) -> None:
    folder = save(
        tmp_path / "model",
        transformers.BertForSequenceClassification,
        bert_config(num_labels=2, hidden_dropout_prob=0.5),
        word_tokenizer(),
    )
    data = tmp_path / "rows.jsonl"
    rows = [("the cat sat", 0), ("a dog ate", 1), ("rain again", 0)]
    data.write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in rows))
    found = []
    for on in (False, True):
        finetune(
            folder, data, output_dir=tmp_path / f"{on}", penalty="none", epochs=2, batch_size=2,
            gradient_checkpointing=on, learning_rate=1e-2,
        )  # fmt: skip
        found.append((tmp_path / f"{on}" / "model.safetensors").read_bytes())
    assert found[0] == found[1]
