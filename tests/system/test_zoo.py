"""Six kinds of checkpoints, each from its first Fisher to a repository and back, by commands."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import consolidate
from support import loopback_hub, tiny_models

MODULES = """
from torch import nn


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.cells = nn.GRU(2, config["width"], batch_first=True)
        self.head = nn.Linear(config["width"], 3)

    def forward(self, x):
        return self.head(self.cells(x.view(len(x), 3, 2))[0][:, -1])
"""


def tensors(folder: Path, *shape: int) -> list[Path]:
    """Write three tasks of vectors or images in three classes."""
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        rows = {
            "inputs": torch.randn(18, *shape, generator=generator),
            "labels": torch.randint(3, (18,), generator=generator),
        }
        save_file(rows, folder / f"{number}.safetensors")
    return [folder / f"{number}.safetensors" for number in range(3)]


def texts(folder: Path, row: Callable[[str], dict[str, Any]]) -> list[Path]:
    """Write three tasks of the corpus."""
    for number in range(3):
        rows = [row(text) for text in tiny_models.CORPUS[number : number + 3]]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return [folder / f"{number}.jsonl" for number in range(3)]


def made(folder: Path, name: str, *given: Any) -> nn.Module:
    namespace: dict[str, Any] = {}
    (folder / "zoo.py").write_text(MODULES, encoding="utf-8")
    exec(MODULES, namespace)
    torch.manual_seed(0)
    module: nn.Module = namespace[name](*given)
    return module


def pickled(folder: Path) -> tuple[str, list[Path], list[str]]:
    """A `.pth` alone, as a training script of one's own leaves it."""
    network = made(folder, "Scaled")
    torch.save({"epoch": 3, "model_state_dict": network.state_dict()}, folder / "start.pth")
    return "start.pth", tensors(folder, 6), ["--model", "zoo:Scaled"]


def with_batch_norm(folder: Path) -> tuple[str, list[Path], list[str]]:
    """Running statistics, in a folder with nothing but a pickle."""
    (folder / "start").mkdir()
    torch.save(made(folder, "Convolutional").state_dict(), folder / "start" / "model.pt")
    return "start", tensors(folder, 3, 6, 6), ["--model", "zoo:Convolutional"]


def unknown(folder: Path) -> tuple[str, list[Path], list[str]]:
    """What transformers does not know, with a configuration of its own."""
    config = {"width": 5}
    (folder / "start").mkdir()
    save_file(made(folder, "Recurrent", config).state_dict(), folder / "start/model.safetensors")
    (folder / "start" / "config.json").write_text(json.dumps(config))
    return "start", tensors(folder, 6), ["--model", "zoo:Recurrent"]


def tied(folder: Path) -> tuple[str, list[Path], list[str]]:
    config = tiny_models.gpt2_config(tie_word_embeddings=True)
    tokenizer = tiny_models.byte_tokenizer()
    tiny_models.save(folder / "start", transformers.GPT2LMHeadModel, config, tokenizer)
    return "start", texts(folder, lambda text: {"text": text}), []


def with_experts(folder: Path) -> tuple[str, list[Path], list[str]]:
    config, tokenizer = tiny_models.mixtral_config(), tiny_models.byte_tokenizer()
    tiny_models.save(folder / "start", transformers.MixtralForCausalLM, config, tokenizer)
    return "start", texts(folder, lambda text: {"text": text}), []


def encoder_and_decoder(folder: Path) -> tuple[str, list[Path], list[str]]:
    tokenizer = tiny_models.byte_tokenizer(pad_token="<|endoftext|>")
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 0}
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, **ids
    )
    tiny_models.save(folder / "start", transformers.T5ForConditionalGeneration, config, tokenizer)
    pairs = texts(folder, lambda text: {"prompt": text, "completion": text.upper()})
    return "start", pairs, []


def test_positions_that_no_file_has_are_neither_measured_nor_trained(tmp_path: Path) -> None:
    tokenizer = tiny_models.byte_tokenizer(pad_token="<|endoftext|>")
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 0}
    sizes = {"d_model": 16, "max_position_embeddings": 40, "forced_eos_token_id": 0}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 24}
    config = transformers.MarianConfig(vocab_size=len(tokenizer), **sizes, **ids)
    start = tiny_models.save(tmp_path / "start", transformers.MarianMTModel, config, tokenizer)
    old, new, _ = texts(tmp_path, lambda text: {"prompt": text, "completion": text.upper()})
    consolidate.fisher(start, old, task="old")
    out = tmp_path / "out"
    consolidate.finetune(start, new, task="new", output_dir=out, ewc_lambda=1, learning_rate=0.1)
    consolidate.verify(out)
    before, after = (load_file(folder / "model.safetensors") for folder in (start, out))
    assert list(after) == list(before)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    assert not any(
        "embed_positions" in name for name in load_file(out / "fisher/fisher.safetensors")
    )
    ledger = json.loads((out / "fisher" / "fisher.json").read_text())
    assert "embed_positions" not in json.dumps(ledger)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pickled, tied, with_batch_norm, encoder_and_decoder, with_experts, unknown]
)
def test_a_checkpoint_goes_all_the_way(
    kind: Callable[[Path], tuple[str, list[Path], list[str]]],
    tmp_path: Path,
    hub: loopback_hub.Hub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    start, (old, new, third), how = kind(tmp_path)
    variables = {"HF_ENDPOINT": hub.address, "HF_TOKEN": loopback_hub.TOKEN}

    def consolidate(*words: object) -> dict[str, Any]:
        code, out, err = loopback_hub.run(tmp_path, *words, "--json", **variables)
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    consolidate("fisher", start, "--data", old, "--task", "old", "--output-dir", "first", *how)
    steps = ["--ewc-lambda", 10, "--epochs", 2, "--learning-rate", 1e-2, *how]
    for task, data in (("new", new), ("third", third)):
        consolidate(
            "finetune", "first", "--data", data, "--task", task, "--evaluate", f"old={old}",
            "--output-dir", task, *steps,
        )  # fmt: skip
        consolidate("evaluate", task, "--data", f"old={old}", "--data", f"{task}={data}", *how)
        consolidate("verify", "first", task)
    consolidate("merge", "new", "third", "--base", "first", "--output-dir", "both")
    verified = consolidate("verify", "both")
    pushed = consolidate("push", "both", "user/both")
    assert pushed["repository"] == "user/both"
    # Somebody else goes on from the repository.
    last = consolidate(
        "finetune", "user/both", "--data", old, "--task", "again", "--output-dir", "last", *steps
    )
    assert last["penalty_value"] > 0
    assert consolidate("verify", "last")["weights"]["digest"] != verified["weights"]["digest"]
    shown = consolidate("show", "last")
    assert [task["name"] for task in shown["tasks"]] == ["old", "new", "third", "again"]
    if not how:  # it loads in transformers as before
        config = transformers.AutoConfig.from_pretrained("last")
        cls = getattr(transformers, config.architectures[0])
        _, info = cls.from_pretrained("last", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    else:  # and by the names of its state_dict()
        given = [json.loads(Path("last/config.json").read_text())] if kind is unknown else []
        module = made(tmp_path, how[1].partition(":")[2], *given)
        module.load_state_dict(load_file("last/model.safetensors"))
