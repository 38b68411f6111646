import json
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from consolidate.api import evaluate, finetune, fisher, merge, show, verify
from consolidate.chain.module_penalty import load_penalty
from consolidate.chain.opening import with_base
from consolidate.data.encoding import encode
from consolidate.estimation.likelihoods import get_likelihood
from consolidate.ewc.low_rank_penalty import MergedPenalty
from consolidate.models.adapters import load, refuse_unmergeable
from consolidate.models.lora import Lora, add_lora, low_rank_layers, merge_lora
from consolidate.models.model import file_weights
from consolidate.views.summary import show_text
from consolidate.views.text import verify_text
from formats.checkpoint import open_checkpoint, weight_records
from formats.digest import set_digest
from formats.errors import InputError, UsageError
from formats.fisher_folder import read_fisher
from formats.task_file import open_task
from support.faults import break_off, killed_and_resumed
from support.folders import contents
from support.loopback_hub import Hub, run
from support.tiny_models import (
    SIZES,
    bert_config,
    byte_tokenizer,
    gpt2_config,
    outputs,
    save,
    word_tokenizer,
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write_gpt2(folder: Path) -> Path:
    config = gpt2_config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return save(folder / "gpt2", transformers.GPT2LMHeadModel, config, byte_tokenizer())


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    return write_gpt2(tmp_path)


@contextmanager
def by_peft() -> Iterator[None]:
    """Let peft use what this transformers calls deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def read_by_peft(folder: Path, base: Path, cls: Any = transformers.GPT2LMHeadModel) -> Any:
    with by_peft():
        return peft.PeftModel.from_pretrained(cls.from_pretrained(base), folder)


def peft_adapter(
    folder: Path, base: Path, cls: Any = transformers.GPT2LMHeadModel, **options: Any
) -> Path:
    """Save an adapter as peft itself does, away from zero unless told otherwise."""
    start = {"r": 2, "lora_alpha": 6, "init_lora_weights": False, "fan_in_fan_out": True}
    with torch.random.fork_rng(), by_peft():
        torch.manual_seed(3)
        model = peft.get_peft_model(cls.from_pretrained(base), peft.LoraConfig(**(start | options)))
        model.save_pretrained(folder)
    return folder


def opened(adapter: Path, base: Path | None = None) -> Any:
    return with_base(open_checkpoint(adapter), base)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 2), (True, 6 / math.sqrt(2))])
def test_an_adapter_of_peft_is_read_and_stored_bit_for_bit(
    gpt2: Path, tmp_path: Path, rslora: bool, scale: float
):
    folder = peft_adapter(
        tmp_path / "adapter", gpt2, target_modules=["c_attn", "c_fc"], use_rslora=rslora
    )
    model = load(opened(folder))
    reference = read_by_peft(folder, gpt2)
    assert torch.equal(outputs(model.module), outputs(reference))
    stored, made = load_file(folder / "adapter_model.safetensors"), file_weights(model)
    assert stored.keys() == made.keys()
    assert all(torch.equal(made[name], stored[name]) for name in stored)
    assert {layer.scale for layer in low_rank_layers(model.module).values()} == {scale}
    trained = [name for name, p in model.module.named_parameters() if p.requires_grad]
    assert len(trained) == len(stored)
    assert model.processor is not None


def test_embeddings_and_a_trained_output_layer_are_part_of_an_adapter(tmp_path: Path):
    base = save(
        tmp_path / "bert",
        transformers.BertForSequenceClassification,
        bert_config(num_labels=3),
        word_tokenizer(),
    )
    folder = peft_adapter(
        tmp_path / "adapter",
        base,
        transformers.BertForSequenceClassification,
        target_modules=["query", "position_embeddings"],
        modules_to_save=["classifier"],
        fan_in_fan_out=False,
    )
    model = load(opened(folder))
    reference = read_by_peft(folder, base, transformers.BertForSequenceClassification)
    assert torch.equal(outputs(model.module), outputs(reference))
    stored, made = load_file(folder / "adapter_model.safetensors"), file_weights(model)
    assert stored.keys() == made.keys()
    assert "base_model.model.classifier.weight" in stored
    trained = [name for name, p in model.module.named_parameters() if p.requires_grad]
    assert len(trained) == len(stored)


def test_an_adapter_of_an_output_layer_has_the_weight_of_its_base(tmp_path: Path):
    """peft writes it beside the factors."""
    config = transformers.LlamaConfig(vocab_size=300, num_key_value_heads=2, **SIZES)
    base = save(tmp_path / "llama", transformers.LlamaForCausalLM, config, byte_tokenizer())
    cls = transformers.LlamaForCausalLM
    options = {"target_modules": ["lm_head", "q_proj"], "fan_in_fan_out": False}
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        folder = peft_adapter(tmp_path / "adapter", base, cls, **options)
    stored = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.lm_head.base_layer.weight"
    model = load(opened(folder))
    assert torch.equal(outputs(model.module), outputs(read_by_peft(folder, base, cls)))
    found = file_weights(model)
    assert found.keys() == stored.keys()
    assert torch.equal(found[name], stored[name])
    save_file(stored | {name: stored[name] + 1}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.base_layer\.weight is not the weight of the"):
        load(opened(folder))


def test_an_adapter_has_its_own_tokenizer_or_that_of_its_base(gpt2: Path, tmp_path: Path):
    folder = peft_adapter(tmp_path / "adapter", gpt2, target_modules=["c_attn"])
    assert load(opened(folder)).processor.chat_template is None
    byte_tokenizer(chat_template="{{ messages }}").save_pretrained(folder)
    assert load(opened(folder)).processor.chat_template == "{{ messages }}"


def test_a_token_without_a_row_is_refused_where_it_occurs(gpt2: Path, tmp_path: Path):
    folder = peft_adapter(tmp_path / "adapter", gpt2, target_modules=["c_attn"])
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(300)])
    tokenizer.save_pretrained(folder)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "sun and rain"}\n' * 2)
    options = {"penalty": "none", "no_fisher": True, "epochs": 1, "batch_size": 2}
    finetune(folder, texts, output_dir=tmp_path / "out", **options)
    texts.write_text('{"text": "sun and <299>"}\n' * 2)
    with pytest.raises(InputError, match="an adapter cannot add rows: use the tokenizer of the"):
        finetune(folder, texts, output_dir=tmp_path / "other", **options)


def test_the_base_model_is_found_or_named(gpt2: Path, tmp_path: Path):
    folder = peft_adapter(tmp_path / "adapter", gpt2, target_modules=["c_attn"])
    assert opened(folder).base.path == gpt2
    moved = gpt2.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"gpt2'.*name the base model with --base-model"):
        opened(folder)
    assert opened(folder, moved).base.path == moved
    with pytest.raises(UsageError, match="is not an adapter"):
        opened(moved, moved)
    with pytest.raises(
        InputError, match="expected a whole model as the base model, found an adapter"
    ):
        opened(folder, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "found use_dora .DoRA scales"),
        ({"peft_type": "IA3"}, "peft_type 'LORA', found 'IA3'"),
        ({"bias": "all"}, "bias 'none', found 'all'"),
        ({"lora_bias": True}, "found lora_bias"),
        ({"init_lora_weights": "pissa"}, "'pissa', which also changes the base model's weights"),
        ({"target_parameters": ["w"]}, "found target_parameters"),
        ({"use_newest": True}, "does not know the option 'use_newest'"),
        ({"r": 1}, r"expected \[1, 16\] as in the model, found \[2, 16\]"),
        ({"r": 10**12}, "expected the rank of the factors in the file, 2, found 1000000000000"),
        ({"rank_pattern": {"c_attn": 10**12}}, "expected the rank .*, found 1000000000000"),
        ({"lora_alpha": "much"}, "does not match the base model"),
        ({"target_modules": 7}, "does not match the base model"),
        ({"target_modules": ["c_fc"]}, "does not match its base model.*is not in the model"),
        ({"target_modules": ["c_attn", "c_fc"]}, "is missing in the file"),
        ({"target_modules": ["q_proj"]}, "does not match the base model"),
    ],
)
def test_other_adapters_are_refused_by_name(
    gpt2: Path, tmp_path: Path, changes: dict[str, Any], message: str
):
    folder = peft_adapter(tmp_path / "adapter", gpt2, target_modules=["c_attn"])
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=message):
        load(opened(folder))


TEXTS = ["the cat sat", "a dog ate my homework", "what a lovely day", "rain again", "nobody"]


def write_texts(folder: Path) -> Path:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write_texts(tmp_path)


def test_the_fisher_of_an_adapter_is_that_of_its_parameters(gpt2: Path, tmp_path: Path, task: Path):
    folder = peft_adapter(tmp_path / "adapter", gpt2, target_modules=["c_attn", "c_fc"])
    result = fisher(
        folder, task, task="texts", estimator="empirical", batch_size=2, dtype=torch.float64
    )
    stored = read_fisher(folder / "fisher")
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert stored.fisher.keys() == names
    assert result["methods"] == {"rule": len(names)}
    reference = read_by_peft(folder, gpt2).double()
    trained = {
        name.replace(".default", ""): parameter.requires_grad_()
        for name, parameter in reference.named_parameters()
        if "lora_" in name
    }
    processor = byte_tokenizer()
    expected = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    units = 0
    for text in TEXTS:
        ids = torch.tensor([processor(text)["input_ids"] + [processor.eos_token_id]])
        logs = reference(ids).logits.log_softmax(-1)[0, :-1]
        score = logs.gather(1, ids[0, 1:, None]).sum()
        units += ids.shape[1] - 1
        for name, g in zip(
            trained, torch.autograd.grad(score, list(trained.values())), strict=True
        ):
            expected[name] += g**2
    assert result["units"] == units
    for name, values in expected.items():
        torch.testing.assert_close(stored.fisher[name], (values / units).float())
    assert stored.ledger.base == set_digest(weight_records(open_checkpoint(gpt2).weights))
    assert "an adapter of the base model" in show_text(show(folder))
    assert verify(folder)["weights"]["tensors"] == len(names)
    assert f"its base model is in {gpt2}: {stored.ledger.base}" in verify_text(verify(folder))
    metrics = evaluate(folder, {"texts": task}, dtype=torch.float64)["texts"]
    with torch.no_grad():
        total = sum(
            reference(ids, labels=ids).loss * (ids.shape[1] - 1)
            for ids in (
                torch.tensor([processor(text)["input_ids"] + [processor.eos_token_id]])
                for text in TEXTS
            )
        )
    assert metrics["loss"] == pytest.approx(float(total) / units)


def test_a_fisher_where_b_is_zero_is_warned_of(
    gpt2: Path, tmp_path: Path, task: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    folder = peft_adapter(
        tmp_path / "adapter", gpt2, target_modules=["c_attn"], init_lora_weights=True
    )
    fisher(folder, task, max_examples=2)
    (line,) = [line for line in caplog.messages if line.startswith("warning: ")]
    assert "2 of the adapter's factors have no Fisher" in line
    assert "lora_A" in line
    assert "lora_B" not in line


def test_a_fisher_on_another_base_model_is_refused(gpt2: Path, tmp_path: Path, task: Path):
    folder = peft_adapter(tmp_path / "adapter", gpt2, target_modules=["c_attn"])
    fisher(folder, task, task="texts", max_examples=2)
    base = verify(folder, base_model=gpt2)["base"]
    tensors = load_file(gpt2 / "model.safetensors")
    tensors["transformer.wpe.weight"][0, 0] += 1
    save_file(tensors, gpt2 / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"measured on another base model: expected the digest"):
        fisher(folder, task, task="more", add=True)
    with pytest.raises(InputError, match=r"name the right one with --base-model"):
        evaluate(folder, {"texts": task})
    moved = gpt2.rename(tmp_path / "elsewhere")
    assert f"base model {base} was not checked" in verify_text(verify(folder))
    with pytest.raises(InputError, match=r"measured on another base model: expected the digest"):
        verify(folder, base_model=moved)
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_model.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(
        InputError, match=r"expected the Fisher of a whole model for .*, found that of an adapter"
    ):
        verify(folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="found an adapter, whose factors cannot be averaged"):
        merge([folder, folder], output_dir=tmp_path / "merged")


@pytest.fixture(scope="module")
def protected_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with that model and its data, which `protected` copies."""
    folder = tmp_path_factory.mktemp("protected")
    fisher(write_gpt2(folder), write_texts(folder), task="old", estimator="empirical", batch_size=5)
    return folder


@pytest.fixture
def protected(protected_once: Path, tmp_path: Path) -> Path:
    """A model with the Fisher of all its weights."""
    return shutil.copytree(protected_once, tmp_path, dirs_exist_ok=True) / "gpt2"


@pytest.fixture
def new_task(tmp_path: Path) -> Path:
    path = tmp_path / "new.jsonl"
    texts = ["spanish rain", "my mat is lovely", "the dog and the cat", "nobody ate it", "my my"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


TRAINING: dict[str, Any] = {
    "task": "new",
    "max_steps": 6,
    "batch_size": 3,
    "optimizer": "sgd",
    "learning_rate": 0.5,
    "fisher_estimator": "empirical",
}
LORA: dict[str, Any] = {"lora_rank": 2, "lora_targets": ["c_attn", "mlp.c_fc"], "lora_alpha": 4}


def test_a_whole_model_learns_by_an_adapter_and_stays_whole(
    protected: Path, new_task: Path, tmp_path: Path
):
    options = TRAINING | LORA | {"ewc_lambda": 20.0}
    result = finetune(protected, new_task, output_dir=tmp_path / "next", **options)
    assert result["penalty_on"] == "merged"
    old, new = open_checkpoint(protected).weights, open_checkpoint(tmp_path / "next").weights
    assert list(old) == list(new)
    moved = [name for name in old if not torch.equal(old[name], new[name])]
    assert {name.split(".", 3)[-1] for name in moved} == {"attn.c_attn.weight", "mlp.c_fc.weight"}
    for name in moved:
        assert torch.linalg.matrix_rank(new[name] - old[name], rtol=1e-4) == 2
    stored, before = read_fisher(tmp_path / "next/fisher"), read_fisher(protected / "fisher")
    assert [task.name for task in stored.ledger.tasks] == ["old", "new"]
    assert stored.ledger.base is None
    assert stored.ledger.tasks[1].penalty_on == "merged"
    # all weights are measured, not only those that the adapter has changed
    assert stored.fisher.keys() == before.fisher.keys() == dict(old).keys()
    assert all((stored.fisher[name] >= before.fisher[name]).all() for name in stored.fisher)
    assert "ewc on merged weights, λ = 20" in show_text(show(tmp_path / "next"))
    assert verify(protected, tmp_path / "next")["later"][0]["descends_by"] == "weights"
    # and the chain goes on, by whichever way
    again = finetune(
        tmp_path / "next", new_task, output_dir=tmp_path / "more", **options | {"task": "more"}
    )
    assert again["fisher"]["task"] == "more"


def test_the_merged_penalty_trains_as_the_explicit_one(
    protected: Path, new_task: Path, tmp_path: Path
):
    """Steps by hand: the loss and the penalty of W' = W + s B A, by autograd alone."""
    strength, options = 50.0, TRAINING | LORA | {"ewc_lambda": 50.0, "batch_size": 5}
    result = finetune(protected, new_task, output_dir=tmp_path / "next", **options)
    model = load(open_checkpoint(protected), dtype=torch.float32)
    stored = read_fisher(protected / "fisher").fisher
    add_lora(model.module, Lora(rank=2, targets=LORA["lora_targets"], alpha=4))
    examples = encode(open_task(new_task)[1], model)
    (batch,) = examples.batches(5)
    likelihood = get_likelihood("next-token-softmax")
    trained = [p for p in model.module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for step in range(6):
        optimizer.zero_grad()
        outputs = model.module(**batch[0]).logits
        loss = likelihood.negative_log_likelihood(outputs, batch[1]).sum()
        loss = loss / likelihood.units(batch[1]).sum()
        penalty = torch.zeros(())
        for name, layer in low_rank_layers(model.module).items():
            change = layer.scale * (layer.b @ layer.a)
            penalty = (
                penalty + (stored[name] * (change.T if layer.transposed else change) ** 2).sum()
            )
        penalty = strength / 2 * penalty
        record = result["history"][step]
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert record["penalty"] == pytest.approx(penalty.item(), rel=1e-3, abs=1e-9)
        (loss + penalty).backward()
        optimizer.step()
    assert record["penalty"] > 0
    merge_lora(model.module)
    made = open_checkpoint(tmp_path / "next").weights
    for name, values in file_weights(model).items():
        torch.testing.assert_close(made[name], values.detach(), rtol=1e-3, atol=1e-5)


def test_the_merged_penalty_holds_the_weights_that_matter(
    protected: Path, new_task: Path, tmp_path: Path
):
    stored = read_fisher(protected / "fisher").fisher
    old = open_checkpoint(protected).weights
    distances = []
    for strength in (0.0, 1e3):
        out = tmp_path / f"at-{strength:g}"
        options = TRAINING | LORA | {"learning_rate": 0.1, "max_steps": 12}
        finetune(protected, new_task, output_dir=out, ewc_lambda=strength, **options)
        new = open_checkpoint(out).weights
        distances.append(sum(float((stored[n] * (new[n] - old[n]) ** 2).sum()) for n in stored))
    assert distances[1] < 0.2 * distances[0]


def test_an_adapter_learns_and_stays_an_adapter(
    gpt2: Path, task: Path, new_task: Path, tmp_path: Path
):
    folder = peft_adapter(tmp_path / "adapter", gpt2, target_modules=["c_attn", "c_fc"])
    fisher(folder, task, task="old", estimator="empirical")
    out = tmp_path / "next"
    options = TRAINING | {"evaluate": {"old": task}}
    result = finetune(folder, new_task, output_dir=out, ewc_lambda=10.0, **options)
    assert result["penalty_on"] == "adapter"
    assert result["penalty_value"] > 0
    stored = read_fisher(out / "fisher")
    assert [task.penalty_on for task in stored.ledger.tasks] == [None, "adapter"]
    assert stored.ledger.base == read_fisher(folder / "fisher").ledger.base
    assert not (out / "config.json").exists()
    assert "ewc on the adapter, λ = 10" in show_text(show(out))
    verify(folder, out)
    # peft reads it, and computes what we did
    reference = read_by_peft(out, gpt2)
    assert torch.equal(outputs(reference), outputs(load(opened(out)).module))
    assert not torch.equal(outputs(reference), outputs(read_by_peft(folder, gpt2)))
    metrics = evaluate(out, {"old": task})["old"]
    assert metrics["loss"] == pytest.approx(result["metrics"]["after"]["old"]["loss"])
    # the chain goes on, with proximal steps too
    options = TRAINING | {"task": "third", "penalty_step": "proximal"}
    finetune(out, new_task, output_dir=tmp_path / "third", ewc_lambda=10.0, **options)


def test_an_adapter_is_held_by_the_fisher_of_its_base_model(
    protected: Path, new_task: Path, tmp_path: Path
):
    folder = peft_adapter(
        tmp_path / "adapter", protected, target_modules=["c_attn"], init_lora_weights=True
    )
    out = tmp_path / "next"
    result = finetune(folder, new_task, output_dir=out, ewc_lambda=10.0, **TRAINING)
    assert result["penalty_on"] == "merged"
    stored = read_fisher(out / "fisher")
    assert [(task.name, task.penalty_on) for task in stored.ledger.tasks] == [("new", "merged")]
    base = read_fisher(protected / "fisher").fisher
    layers = low_rank_layers(load(opened(out)).module)
    expected = sum(
        5.0 * (base[n] * (layer.scale * (layer.b @ layer.a).detach().T) ** 2).sum().item()
        for n, layer in layers.items()
    )
    made = MergedPenalty(layers, {n: base[n] for n in layers}, ewc_lambda=10.0).value()
    assert made == pytest.approx(expected, rel=1e-5)
    assert result["penalty_value"] == pytest.approx(made, rel=0.5)  # before the last step
    assert result["predicted_nats"] == pytest.approx(made / 10, rel=1e-5)
    assert result["task_weights"] == dict.fromkeys(["old"], 1.0)
    # now that it has a Fisher of its own, that is what holds it, unless the other is asked for
    options = TRAINING | {"task": "third", "ewc_lambda": 10.0}
    assert finetune(out, new_task, output_dir=tmp_path / "a", **options)["penalty_on"] == "adapter"
    options |= {"penalty_on": "merged"}
    again = finetune(out, new_task, output_dir=tmp_path / "b", **options)
    assert again["history"][0]["penalty"] == pytest.approx(made, rel=1e-5)
    layers = low_rank_layers(load(opened(tmp_path / "b")).module)
    ended = MergedPenalty(layers, {n: base[n] for n in layers}, ewc_lambda=1.0).value()
    assert again["predicted_nats"] == pytest.approx(ended - made / 10, rel=1e-4)


def test_a_new_output_layer_trains_whole_beside_the_adapter(tmp_path: Path):
    base = save(
        tmp_path / "bert",
        transformers.BertForSequenceClassification,
        bert_config(num_labels=2, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}),
        word_tokenizer(),
    )
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(TEXTS)]
    more = [{"text": text, "label": "xyz"[i % 3]} for i, text in enumerate(TEXTS)]
    paths = [tmp_path / "old.jsonl", tmp_path / "new.jsonl"]
    for path, content in zip(paths, (rows, more), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    fisher(base, paths[0], task="old")
    options = TRAINING | {"lora_rank": 2, "ewc_lambda": 1.0, "fisher_estimator": "exact"}
    options |= {"evaluate": {"old": paths[0]}, "evaluate_every": 3}
    result = finetune(base, paths[1], output_dir=tmp_path / "next", head="new", **options)
    scores = [found["old"]["loss"] for found in result["metrics"].values()]
    assert len(set(scores)) > 2  # the old head is measured on the trunk with its adapter
    old, new = open_checkpoint(base).weights, open_checkpoint(tmp_path / "next").weights
    moved = {name for name in old if old[name].shape != new[name].shape}
    assert moved == {"classifier.weight", "classifier.bias"}
    changed = [n for n in old if n not in moved and not torch.equal(old[n], new[n])]
    assert {name.rpartition("self.")[2] for name in changed} == {"query.weight", "value.weight"}
    # wider: the rows that are new are free, those that were there are held
    third = tmp_path / "third.jsonl"
    third.write_text(json.dumps({"text": "rain", "label": "w"}) + "\n")
    options |= {"task": "third", "evaluate": None, "evaluate_every": None, "max_steps": 20}
    options |= {"learning_rate": 0.05}
    moved = []
    for strength in (0.0, 100.0):
        out = tmp_path / f"wide-{strength:g}"
        options["ewc_lambda"] = strength
        finetune(tmp_path / "next", third, output_dir=out, head="extend", **options)
        wide = open_checkpoint(out).weights["classifier.bias"]
        assert len(wide) == 4
        moved.append((wide[:3] - new["classifier.bias"]).abs().max())
    assert moved[1] < 0.2 * moved[0]
    options |= {"lora_targets": ["classifier"], "task": "more"}
    with pytest.raises(
        UsageError, match=r"classifier\.weight is trained in full.*leave it out of --lora-targets"
    ):
        finetune(base, paths[1], output_dir=tmp_path / "no", head="new", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty_on": "adapter"}, "a fresh one has none"),
        (
            {"penalty": "none", "ewc_lambda": None, "penalty_on": "merged"},
            "cannot be combined with --pen",
        ),
        ({"penalty_step": "proximal"}, "--penalty-step proximal cannot be combined"),
        ({"lora_rank": None}, "--lora-targets needs --lora-rank"),
        (
            {"lora_rank": None, "lora_targets": (), "lora_alpha": None, "penalty_on": "merged"},
            "is for adapters",
        ),
        ({"base_model": "x"}, "is not an adapter"),
        ({"freeze": ["*c_attn*"]}, "frozen by --freeze and a target"),
        ({"lora_rank": 0}, "--lora-rank 0"),
        ({"lora_alpha": -1.0}, "--lora-alpha"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    protected: Path, new_task: Path, tmp_path: Path, options: dict[str, Any], message: str
):
    options = TRAINING | LORA | {"ewc_lambda": 1.0} | options
    with pytest.raises(UsageError, match=message):
        finetune(protected, new_task, output_dir=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_adapter_takes_no_second_adapter_and_no_new_output_layer(
    gpt2: Path, new_task: Path, tmp_path: Path
):
    folder = peft_adapter(tmp_path / "adapter", gpt2, target_modules=["c_attn"])
    options: dict[str, Any] = TRAINING | {"output_dir": tmp_path / "out"}
    with pytest.raises(UsageError, match="is an adapter already"):
        finetune(folder, new_task, penalty="none", lora_rank=2, **options)
    with pytest.raises(UsageError, match="needs a whole model"):
        finetune(folder, new_task, penalty="none", head="new", **options)
    with pytest.raises(InputError, match=r"gpt2 holds no Fisher.*fisher \S+gpt2 --data OLD_DATA`"):
        finetune(folder, new_task, ewc_lambda=1.0, **options)


def test_the_fisher_of_a_base_model_on_the_hub_is_that_of_its_name(
    gpt2: Path, new_task: Path, tmp_path: Path, hub: Hub
):
    folder = peft_adapter(tmp_path / "adapter", gpt2, target_modules=["c_attn"])
    hub.put("user/base", gpt2)
    words = (folder, "--base-model", "user/base", "--data", new_task, "--ewc-lambda", 1)
    address = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"}
    code, _, err = run(tmp_path, "finetune", *words, "--output-dir", "out", **address)
    assert code == 3
    assert "run `consolidate fisher user/base --data OLD_DATA --output-dir DIR` first, or" in err


def test_the_fisher_of_a_base_model_is_fetched_where_it_holds_an_adapter(
    protected: Path, new_task: Path, tmp_path: Path, hub: Hub
):
    folder = peft_adapter(tmp_path / "adapter", protected, target_modules=["c_attn"])
    hub.put("user/base", protected)
    address = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"}
    words = ("finetune", folder, "--base-model", "user/base", "--data", new_task, "--no-fisher")
    words += ("--task", "new", "--max-steps", 1)
    code, _, err = run(tmp_path, *words, "--penalty", "none", "--output-dir", "free", **address)
    assert code == 0, err
    assert not hub.sent["fisher/fisher.safetensors"]
    code, _, err = run(tmp_path, *words, "--ewc-lambda", 1, "--output-dir", "held", **address)
    assert code == 0, err
    assert hub.sent["fisher/fisher.safetensors"]


def test_a_search_tries_each_strength_from_the_same_adapter(
    protected: Path, task: Path, new_task: Path, tmp_path: Path
):
    options = TRAINING | LORA | {"max_steps": 3, "learning_rate": 0.1}
    result = finetune(
        protected,
        new_task,
        output_dir=tmp_path / "next",
        ewc_lambda=[1.0, 3e3],
        validation={"old": task},
        **options,
    )
    trials = {trial["ewc_lambda"]: trial for trial in result["lambda_search"]["trials"]}
    assert trials[3e3]["penalty_per_lambda"] < trials[1.0]["penalty_per_lambda"]
    chosen = result["ewc_lambda"]
    alone = finetune(protected, new_task, output_dir=tmp_path / "one", ewc_lambda=chosen, **options)
    assert alone["history"] == result["history"]


def test_the_penalty_of_an_adapter_is_loaded_for_a_model_of_peft(
    gpt2: Path, tmp_path: Path, task: Path
):
    folder = peft_adapter(tmp_path / "adapter", gpt2, target_modules=["c_attn"])
    fisher(folder, task, task="old", estimator="empirical")
    model = read_by_peft(folder, gpt2)
    trained = {n: p.requires_grad_() for n, p in model.named_parameters() if "lora_" in n}
    penalty = load_penalty(model, folder, ewc_lambda=2.0)
    assert penalty.value() == 0
    expected = 0.0
    for name, values in read_fisher(folder / "fisher").fisher.items():
        first, _, last = name.rpartition(".")
        trained[f"{first}.default.{last}"].data += 0.5
        expected += 0.25 * values.sum().item()
    assert penalty.value() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_the_penalty_of_the_whole_weights_is_loaded_for_a_model_of_peft(
    gpt2: Path, task: Path, wrapped: bool, whole: bool
):
    fisher(gpt2, task, task="old", estimator="empirical")
    options: dict[str, Any] = {"modules_to_save": ["ln_f"]} if whole else {}
    start = peft.LoraConfig(
        r=2, target_modules=["c_attn", "wpe"], init_lora_weights=False, fan_in_fan_out=True,
        **options,
    )  # fmt: skip
    with torch.random.fork_rng(), by_peft():
        torch.manual_seed(3)
        model = peft.get_peft_model(transformers.GPT2LMHeadModel.from_pretrained(gpt2), start)
    for name, parameter in model.named_parameters():
        if "ln_f.modules_to_save" in name:
            parameter.data += 0.5
    penalty = load_penalty(torch.nn.DataParallel(model) if wrapped else model, gpt2, ewc_lambda=2.0)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in penalty.parameters()} == trained
    assert penalty.unprotected == []
    value = penalty.value()
    with by_peft():
        merged = model.merge_and_unload().requires_grad_(True)
    assert load_penalty(merged, gpt2, ewc_lambda=2.0).value() == pytest.approx(value, rel=1e-5)


def test_a_module_of_the_users_own_takes_an_adapter(
    network_checkpoint: Path, write_task: Callable[..., Path], tmp_path: Path
):
    options: dict[str, Any] = {"model": "support.networks:make_network"}
    fisher(network_checkpoint, write_task("old"), task="old", **options)
    options |= {"lora_rank": 2, "lora_targets": ["0"], "ewc_lambda": 1.0, "task": "new"}
    finetune(
        network_checkpoint, write_task("new", 1), output_dir=tmp_path / "next", epochs=2, **options
    )
    old, new = (open_checkpoint(p).weights for p in (network_checkpoint, tmp_path / "next"))
    assert [name for name in old if not torch.equal(old[name], new[name])] == ["0.weight"]


@pytest.mark.parametrize(
    ("layer", "setting"),
    [
        (torch.nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
        (torch.nn.Conv2d(2, 4, 3, padding="same", dilation=2), r"dilation=\(2, 2\)"),
        (torch.nn.Embedding(5, 4, max_norm=1.0), r"max_norm=1\.0"),
    ],
)
def test_layers_that_the_factors_do_not_follow_are_refused(layer: torch.nn.Module, setting: str):
    module = torch.nn.Sequential(layer)
    add_lora(module, Lora(rank=2, targets=["0"]))
    with pytest.raises(UsageError, match=f"0 has {setting}, which the adapter's factors lack"):
        refuse_unmergeable(module)


def test_the_head_trains_whole_beside_the_adapter_where_it_is_asked_to(
    network_checkpoint: Path,
    write_task: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    new = write_task("new", 1)
    options: dict[str, Any] = {"model": "support.networks:make_network"}
    fisher(network_checkpoint, write_task("old"), task="old", **options)
    options |= {"lora_rank": 2, "lora_targets": ["0"], "task": "new", "epochs": 3}
    options |= {"learning_rate": 0.01, "save_every_minutes": 0, "ewc_lambda": 0.0}

    def trained(name: str, **changes: Any) -> dict[str, torch.Tensor]:
        finetune(network_checkpoint, new, output_dir=tmp_path / name, **options | changes)
        stored = open_checkpoint(tmp_path / name).weights
        return {tensor: stored[tensor] for tensor in stored}

    old = open_checkpoint(network_checkpoint).weights
    with caplog.at_level("INFO", "consolidate"):
        frozen = trained("frozen")
        assert caplog.text.count("the head is frozen: --lora-train-head trains it") == 1
        free = trained("free", lora_train_head=True)
    assert caplog.text.count("the head is frozen") == 1
    assert [name for name in old if not torch.equal(old[name], frozen[name])] == ["0.weight"]
    moved = [name for name in old if not torch.equal(old[name], free[name])]
    assert moved == ["0.weight", "2.bias", "2.weight"]
    assert torch.linalg.matrix_rank(free["0.weight"] - old["0.weight"], rtol=1e-4) == 2
    # penalized by its Fisher, as the merged weights are
    held = trained("held", lora_train_head=True, ewc_lambda=1e4)
    distances = [sum((end[n] - old[n]).abs().sum() for n in moved[1:]) for end in (held, free)]
    assert distances[0] < 0.3 * distances[1]
    after, before = (
        read_fisher(p / "fisher").fisher for p in (tmp_path / "held", network_checkpoint)
    )
    assert after.keys() == before.keys()  # all is measured
    assert verify(network_checkpoint, tmp_path / "held")["later"][0]["descends_by"] == "weights"

    names = ["2.bias"]
    chosen = trained("named", lora_train_head=True, head_parameters=names)
    assert [n for n in old if not torch.equal(old[n], chosen[n])] == ["0.weight", *names]
    # and it resumes to the same bytes
    command = partial(trained, "killed", lora_train_head=True)
    kill = partial(break_off, monkeypatch, 5)
    again = killed_and_resumed(command, tmp_path / "killed", caplog, kill)
    assert all(torch.equal(again[name], free[name]) for name in old)
    assert contents(tmp_path / "killed") == contents(tmp_path / "free")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": None, "lora_targets": ()}, "--lora-train-head needs --lora-rank"),
        ({"head": "new"}, "--lora-train-head cannot be combined with --head new, which trains"),
        ({"lora_targets": ["0", "2"]}, r"2\.weight is trained in full.*leave it out"),
        ({"freeze": ["2.*"]}, "--freeze freezes the head, which --lora-train-head is to train"),
        ({"head_parameters": ["3.*"]}, r"--head-parameters 3\.\* matches no parameter"),
    ],
)
def test_a_head_that_cannot_train_is_refused(
    network_checkpoint: Path,
    write_task: Callable[..., Path],
    tmp_path: Path,
    options: dict[str, Any],
    message: str,
):
    given: dict[str, Any] = {"model": "support.networks:make_network", "penalty": "none"}
    given |= {"lora_rank": 2, "lora_targets": ["0"], "lora_train_head": True}
    with pytest.raises(UsageError, match=message):
        finetune(
            network_checkpoint, write_task("new"), output_dir=tmp_path / "out", **given | options
        )
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_the_embedding_cannot_train_beside_the_adapter(
    protected: Path, new_task: Path, tmp_path: Path
):
    options = TRAINING | LORA | {"ewc_lambda": 1.0, "lora_train_head": True}
    with pytest.raises(UsageError, match="no head of its own to train"):
        finetune(protected, new_task, output_dir=tmp_path / "out", **options)


@pytest.mark.parametrize("kind", ["whole", "an adapter"])
def test_tied_weights_of_transformers_and_adapters_are_interpolated(
    gpt2: Path, task: Path, new_task: Path, tmp_path: Path, kind: str
):
    start, file = gpt2, "model.safetensors"
    if kind == "an adapter":
        start = peft_adapter(tmp_path / "adapter", gpt2, target_modules=["c_attn"])
        file = "adapter_model.safetensors"
    fisher(start, task, task="old", estimator="empirical", batch_size=5)
    options = TRAINING | {"ewc_lambda": 1.0}
    finetune(start, new_task, output_dir=tmp_path / "whole", **options)
    mu, theta = (load_file(folder / file) for folder in (start, tmp_path / "whole"))
    for method in ("plain", "fisher"):
        out = tmp_path / method
        finetune(start, new_task, output_dir=out, interpolate=0.5, interpolation=method, **options)
        half = load_file(out / file)
        assert half.keys() == mu.keys()
        moved = False
        for name in mu:
            low, high = torch.minimum(mu[name], theta[name]), torch.maximum(mu[name], theta[name])
            assert ((low - 1e-6 <= half[name]) & (half[name] <= high + 1e-6)).all(), name
            if method == "plain":
                torch.testing.assert_close(half[name], mu[name].lerp(theta[name], 0.5))
            else:
                plain = mu[name].lerp(theta[name], 0.5)
                moved = moved or not torch.allclose(half[name], plain, rtol=1e-4, atol=1e-6)
        assert moved == (method == "fisher")
        verify(out)
        if kind == "whole":
            tied = transformers.GPT2LMHeadModel.from_pretrained(out)
            assert tied.lm_head.weight is tied.transformer.wte.weight


def test_what_trains_beside_an_adapter_is_held_where_the_base_model_is(
    tmp_path: Path,
) -> None:
    """Not where the adapter has it."""
    kind = transformers.BertForSequenceClassification
    base = save(tmp_path / "bert", kind, bert_config(num_labels=3), word_tokenizer())
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the cat", "label": 0}\n{"text": "a dog", "label": 2}\n')
    fisher(base, rows, task="old")
    options: dict[str, Any] = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
    folder = peft_adapter(tmp_path / "adapter", base, kind, fan_in_fan_out=False, **options)
    stored = load_file(folder / "adapter_model.safetensors")
    for name in stored:
        if "classifier" in name:
            stored[name] += 0.5
    save_file(stored, folder / "adapter_model.safetensors", {"format": "pt"})
    found = finetune(
        folder, rows, task="new", output_dir=tmp_path / "out", ewc_lambda=2.0, max_steps=1,
        learning_rate=1e-9, no_fisher=True,
    )  # fmt: skip
    model = read_by_peft(folder, base, kind)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "modules_to_save" in name)
    value = load_penalty(model, base, ewc_lambda=2.0).value()
    assert value > 0
    assert found["penalty_value"] == pytest.approx(value, rel=1e-4)
