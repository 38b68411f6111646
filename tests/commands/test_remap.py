import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import consolidate
from consolidate.api import evaluate, finetune, fisher, remap, verify
from formats.checkpoint import open_checkpoint
from formats.errors import InputError
from formats.fisher_folder import read_fisher, write_fisher
from formats.fisher_json import SAME_AS, Block
from formats.tensors import write_tensors
from support import factor_checkpoints, tiny_models
from support.checkpoints import Write
from support.command_line import run
from support.folders import contents, flip
from support.networks import make_network

OLD = {"model": "support.networks:make_network"}
NEW = {"model": f"{__name__}:network_inside"}
FAST = {"optimizer": "adam", "learning_rate": 0.01, "batch_size": 16, "epochs": 1}


def network_inside(config: dict[str, Any]) -> nn.Module:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_network(config)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.net(x)
            return made

    return Outer()


def rewritten(folder: Path, to: Path, rename: Callable[[str], str], **changed: Any) -> Path:
    """A copy of a checkpoint, without its Fisher, whose tensors have other names."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("fisher"))
    weights = load_file(folder / "model.safetensors") | changed
    named = {rename(name): tensor for name, tensor in weights.items() if tensor is not None}
    save_file(named, to / "model.safetensors", {"format": "pt"})
    return to


def tensors(folder: Path, which: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{which}.safetensors")


@pytest.fixture
def old(network_checkpoint: Path, write_task: Write, tmp_path: Path) -> Path:
    """A checkpoint with two tasks, an anchor of its own and an offset."""
    options = {**OLD, **FAST, "merge_rule": "separate"}
    fisher(network_checkpoint, write_task("one"), **OLD)
    out = tmp_path / "old"
    finetune(
        network_checkpoint, write_task("two", seed=1), output_dir=out, ewc_lambda=1.0, **options
    )
    return out


@pytest.fixture
def new(old: Path, tmp_path: Path) -> Path:
    """The same weights under other names, and no Fisher."""
    return rewritten(old, tmp_path / "new", lambda name: f"net.{name}")


def test_everything_goes_to_the_new_names(old: Path, new: Path, tmp_path: Path) -> None:
    before, out = contents(new), tmp_path / "out"
    result = remap(new, fisher_of=old, output_dir=out)
    assert contents(new) == before
    assert result["names"] == {name: f"net.{name}" for name in tensors(old)}
    assert (result["status"], result["tasks"]) == ("done", ["one", "two"])
    assert (result["left_out"], result["not_covered"]) == ([], [])
    assert (out / "LICENSE").read_text() == "free\n"
    for which in ("model", "fisher/fisher", "fisher/anchor"):
        there = tensors(old, which)
        assert tensors(out, which).keys() == {f"net.{name}" for name in there}
        assert all(torch.equal(tensors(out, which)[f"net.{n}"], there[n]) for n in there)
    ledgers = [read_fisher(folder / "fisher").ledger for folder in (old, out)]
    for earlier, later in zip(*(ledger.tasks for ledger in ledgers), strict=True):
        assert later.layers == {f"net.{name}": layer for name, layer in earlier.layers.items()}
        assert later.parent == earlier.parent
    assert ledgers[1].penalty_offset == ledgers[0].penalty_offset > 0
    assert verify(out)["tasks"] == ["one", "two"]
    [descends] = verify(old, out)["later"]
    assert descends["descends_by"] == "weights"


def test_factors_go_along_and_are_named_after_their_parameters(tmp_path: Path) -> None:
    old = factor_checkpoints.write(tmp_path / "old", anchored=True, dtype=torch.bfloat16)
    new = rewritten(old, tmp_path / "new", lambda name: f"net.{name}")
    out = tmp_path / "out"
    remap(new, fisher_of=old, output_dir=out)
    for which in ("fisher/factors", "fisher/factor_anchor", "fisher/anchor"):
        there, found = tensors(old, which), tensors(out, which)
        assert found.keys() == {f"net.{name}" for name in there}
        assert all(torch.equal(found[f"net.{name}"], there[name]) for name in there)
    before, after = (read_fisher(folder / "fisher").ledger for folder in (old, out))
    assert after.factor_offset == before.factor_offset == 0.5
    assert after.blocks == {
        "net.0.weight.R": Block("R", (1,), ("net.0.weight", "net.0.bias")),
        "net.2.weight.R": Block("R", (1,), ("net.2.weight", "net.2.bias")),
    }
    assert verify(out)["factors"]["tensors"] == 2
    assert remap(new, fisher_of=old, output_dir=out)["status"] == "cached"


def test_a_factor_that_is_not_symmetric_is_refused(tmp_path: Path) -> None:
    old = factor_checkpoints.write(tmp_path / "old")
    factor_checkpoints.rewrite(old, lambda t: t["2.weight.R"][0, 1].add_(1.0), "factors")
    new = rewritten(old, tmp_path / "new", lambda name: f"net.{name}")
    with pytest.raises(InputError, match=r"factors of '2\.weight\.R' is not symmetric"):
        remap(new, fisher_of=old, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_goes_on_as_under_the_old_names(
    old: Path, new: Path, write_task: Write, tmp_path: Path
) -> None:
    remap(new, fisher_of=old, output_dir=tmp_path / "out")
    data = write_task("three", seed=2)
    results = [
        finetune(start, data, output_dir=tmp_path / name, ewc_lambda=5.0, **FAST, **model)
        for start, name, model in ((old, "a", OLD), (tmp_path / "out", "b", NEW))
    ]
    assert results[0]["loss"] == results[1]["loss"]
    assert results[0]["penalty_value"] == results[1]["penalty_value"] > 0
    for which in ("model", "fisher/fisher", "fisher/anchor"):
        there = tensors(tmp_path / "a", which)
        found = tensors(tmp_path / "b", which)
        assert found.keys() == {f"net.{name}" for name in there}
        assert all(torch.equal(found[f"net.{name}"], there[name]) for name in there)
    assert verify(old, tmp_path / "out", tmp_path / "b")["later"][1]["tasks"][-1] == "three"


def test_a_fisher_copied_beside_the_new_weights_is_enough(
    old: Path, new: Path, tmp_path: Path
) -> None:
    shutil.copytree(old / "fisher", new / "fisher")
    with pytest.raises(InputError) as caught:
        verify(new)
    assert "under other names ('0.bias' is now 'net.0.bias', " in str(caught.value)
    assert f"`consolidate remap {new} --output-dir DIR`" in str(caught.value)
    remap(new, output_dir=tmp_path / "out")
    verify(tmp_path / "out")
    # In its own place as well.
    remap(new, output_dir=new, overwrite=True)
    verify(new)
    same = (tmp_path / "out" / "fisher" / "fisher.safetensors").read_bytes()
    assert (new / "fisher" / "fisher.safetensors").read_bytes() == same


def test_whatever_refuses_the_new_names_names_the_command(
    old: Path, new: Path, write_task: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"`consolidate remap {new} --fisher-of {old} --output-dir DIR`"
    with pytest.raises(InputError) as caught:
        finetune(
            new, write_task("three"), fisher=old, output_dir=tmp_path / "x", ewc_lambda=1.0,
            **FAST, **NEW,
        )  # fmt: skip
    assert command in str(caught.value)
    shutil.copytree(old / "fisher", new / "fisher")
    with pytest.raises(InputError, match=f"consolidate remap {new} --output-dir"):
        consolidate.load_penalty(network_inside({"sizes": [6, 8, 3]}), new, ewc_lambda=1.0)
    code, _, err = run(capsys, "verify", new)
    assert (code, "under other names" in err) == (3, True)


def test_an_output_that_is_up_to_date_is_kept(old: Path, new: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = remap(new, fisher_of=old, output_dir=out)
    before = contents(out)
    assert remap(new, fisher_of=old, output_dir=out) == {**first, "status": "cached"}
    assert contents(out) == before
    # Of another Fisher, or damaged, it is not: then only --overwrite replaces it.
    other = tmp_path / "other"
    shutil.copytree(old, other)
    stored = read_fisher(other / "fisher")
    write_fisher(tmp_path / "half", stored.fisher, stored.ledger, anchor=None)
    shutil.rmtree(other / "fisher")
    (tmp_path / "half").rename(other / "fisher")
    with pytest.raises(InputError, match="--overwrite"):
        remap(new, fisher_of=other, output_dir=out)
    assert contents(out) == before
    assert remap(new, fisher_of=other, output_dir=out, overwrite=True)["status"] == "done"
    assert not (out / "fisher" / "anchor.safetensors").exists()
    flip(out / "model.safetensors")
    with pytest.raises(InputError, match="--overwrite"):
        remap(new, fisher_of=other, output_dir=out)


def test_shards_and_a_bfloat16_fisher(old: Path, tmp_path: Path) -> None:
    stored = read_fisher(old / "fisher")
    half = tmp_path / "half"
    shutil.copytree(old, half)
    shutil.rmtree(half / "fisher")
    write_fisher(
        half / "fisher", stored.fisher, stored.ledger, anchor=stored.anchor,
        dtype=torch.bfloat16, max_shard_size=100,
    )  # fmt: skip
    new = tmp_path / "new"
    new.mkdir()
    shutil.copy(old / "config.json", new)
    named = {f"net.{name}": tensor for name, tensor in tensors(old).items()}
    write_tensors(new, named, metadata={"format": "pt"}, max_shard_size=100)
    assert (new / "model.safetensors.index.json").is_file()
    remap(new, fisher_of=half, output_dir=tmp_path / "out")
    found = tensors(tmp_path / "out", "fisher/fisher")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    verify(tmp_path / "out")


def test_saved_heads_go_along(network_checkpoint: Path, write_task: Write, tmp_path: Path) -> None:
    folder = network_checkpoint
    fisher(folder, one := write_task("one"), **OLD)
    finetune(
        folder, two := write_task("two", seed=1), output_dir=tmp_path / "old", head="new",
        ewc_lambda=1.0, **FAST, **OLD,
    )  # fmt: skip
    new = rewritten(tmp_path / "old", tmp_path / "new", lambda name: f"net.{name}")
    shutil.copytree(tmp_path / "old" / "fisher", new / "fisher")
    with pytest.raises(InputError, match=f"consolidate remap {new} --output-dir"):
        evaluate(new, {"one": one}, **NEW)
    remap(new, output_dir=tmp_path / "out")
    assert tensors(tmp_path / "out" / "fisher" / "heads", "one").keys() == {
        "net.2.bias",
        "net.2.weight",
    }
    data = {"one": one, "two": two}
    assert evaluate(tmp_path / "out", data, **NEW) == evaluate(tmp_path / "old", data, **OLD)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("0.weight", 1, r"differs in more than names .*other values of '0\.weight' \(now 'net"),
        ("0.weight", None, r"no tensor with the dtype, shape and bytes of 0\.weight, which the F"),
    ],
)
def test_other_weights_are_refused(
    old: Path, tmp_path: Path, name: str, value: int | None, message: str
) -> None:
    changed = None
    if value is not None:  # one byte
        changed = tensors(old)[name].clone()
        changed.view(torch.uint8).view(-1)[0] ^= value
    new = rewritten(old, tmp_path / "new", lambda n: f"net.{n}", **{name: changed})
    with pytest.raises(InputError, match=message):
        remap(new, fisher_of=old, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.copytree(old / "fisher", new / "fisher")
    with pytest.raises(InputError) as caught:
        verify(new)
    assert "under other names" in str(caught.value)
    assert "remap" not in str(caught.value)


def test_two_layers_that_are_alike_are_told_apart_or_refused(
    write_task: Write, tmp_path: Path
) -> None:
    folder = tmp_path / "start"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"sizes": [6, 6, 6, 3]}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = make_network({"sizes": [6, 6, 6, 3]}).state_dict()
    for part in ("weight", "bias"):
        weights[f"2.{part}"] = weights[f"0.{part}"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    fisher(folder, write_task("one"), **OLD)
    names = {"0": "left", "2": "right", "4": "last"}
    new = rewritten(folder, tmp_path / "new", lambda n: f"{names[n[0]]}{n[1:]}")
    with pytest.raises(InputError, match=r"0\.bias or 2\.bias in .* may be left\.bias or right\.b"):
        remap(new, fisher_of=folder, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prefixed = rewritten(folder, tmp_path / "prefixed", lambda n: f"net.{n}")
    result = remap(prefixed, fisher_of=folder, output_dir=tmp_path / "out")
    assert result["names"] == {name: f"net.{name}" for name in weights}


def test_what_it_needs_is_asked_for(old: Path, new: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"new has no Fisher: name the .* with --fisher-of"):
        remap(new, output_dir=out)
    with pytest.raises(InputError, match=r"--fisher-of .*no Fisher found.*old has one: swap"):
        remap(old, fisher_of=new, output_dir=out)
    with pytest.raises(InputError, match=r"--fisher-of .*no such file or folder"):
        remap(old, fisher_of=tmp_path / "missing", output_dir=out)
    damaged = tmp_path / "damaged"
    shutil.copytree(old, damaged)
    flip(damaged / "fisher" / "fisher.safetensors")
    with pytest.raises(InputError, match="is damaged"):
        remap(new, fisher_of=damaged, output_dir=out)
    assert not out.exists()


def test_an_adapter_is_refused(old: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({"a.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="expected a whole model, found an adapter"):
        remap(folder, fisher_of=old, output_dir=tmp_path / "out")


def test_the_same_names_are_no_fault(old: Path, tmp_path: Path) -> None:
    again = rewritten(old, tmp_path / "again", str)
    result = remap(again, fisher_of=old, output_dir=tmp_path / "out")
    assert result["names"] == {name: name for name in tensors(old)}
    verify(old, tmp_path / "out")


def test_a_tied_tensor_that_is_stored_twice_or_once(tmp_path: Path) -> None:
    config = tiny_models.gpt2_config()
    cls, tokenizer = transformers.GPT2LMHeadModel, tiny_models.byte_tokenizer()
    old = tiny_models.save(tmp_path / "old", cls, config, tokenizer)
    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "the cat sat"}\n')
    fisher(old, data, task="one")
    embedding = tensors(old)["transformer.wte.weight"].clone()
    head = {"lm_head.weight": embedding}
    twice = rewritten(old, tmp_path / "twice", lambda name: f"module.{name}", **head)
    result = remap(twice, fisher_of=old, output_dir=tmp_path / "out")
    assert result["not_covered"] == ["module.lm_head.weight"]
    ledger = read_fisher(tmp_path / "out" / "fisher").ledger
    same = SAME_AS + "module.transformer.wte.weight"
    assert ledger.unprotected["module.lm_head.weight"] == same
    verify(tmp_path / "out")
    back = remap(old, fisher_of=tmp_path / "out", output_dir=tmp_path / "back")
    assert back["left_out"] == ["module.lm_head.weight"]
    assert verify(tmp_path / "back")["fisher"] == verify(old)["fisher"]


def test_what_from_pretrained_and_save_pretrained_make_of_mixed_names(tmp_path: Path) -> None:
    config = tiny_models.bert_config(num_labels=2, id2label={0: "a", 1: "b"})
    cls, tokenizer = transformers.BertForSequenceClassification, tiny_models.word_tokenizer()
    start = tiny_models.save(tmp_path / "start", cls, config, tokenizer)
    # As a head was once added to a bare encoder: its body without the prefix.
    old = rewritten(start, tmp_path / "old", lambda name: name.removeprefix("bert."))
    rows = [{"text": "the cat", "label": "a"}, {"text": "a dog", "label": "b"}] * 4
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fisher(old, data, task="one")
    new = tmp_path / "new"
    transformers.AutoModelForSequenceClassification.from_pretrained(old).save_pretrained(new)
    tokenizer.save_pretrained(new)
    assert "bert.pooler.dense.bias" in open_checkpoint(new).weights
    remap(new, fisher_of=old, output_dir=tmp_path / "out")
    verify(old, tmp_path / "out")
    made = []
    for start in (old, tmp_path / "out"):
        to = tmp_path / f"{start.name}-2"
        finetune(start, data, task="two", output_dir=to, ewc_lambda=10.0, max_steps=2)
        verify(start, to)
        made.append(tensors(to))
    assert all(torch.equal(made[1][n], made[0][n.removeprefix("bert.")]) for n in made[1])
    # Another head leaves the mixed names as they are.
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "the mat", "label": "x"}\n{"text": "a day", "label": "y"}\n')
    to = tmp_path / "other"
    finetune(old, other, task="two", output_dir=to, ewc_lambda=10.0, max_steps=1, head="new")
    assert verify(old, to)["later"][0]["heads"].keys() == {"one"}
    assert open_checkpoint(to).weights.keys() == open_checkpoint(old).weights.keys()


def test_on_the_command_line(
    old: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ("remap", new, "--fisher-of", old, "--output-dir", out)
    code, text, _ = run(capsys, *words)
    assert code == 0
    first, second = text.splitlines()
    assert first == f"{out}: {old / 'fisher'} for the weights of {new}; tasks one, two"
    assert second.startswith("4 of 4 tensors have another name: 0.bias is now net.0.bias, 0.weight")
    code, text, err = run(capsys, *words, "--json")
    assert (code, json.loads(text)["status"]) == (0, "cached")
    assert "is up to date" in err
