"""Networks of timm by `--model timm:create_model`, from the folders that timm writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf

from consolidate.models.factories import TIMM, make_module, timm_arguments
from consolidate.models.loading import load_model
from formats.checkpoint import open_checkpoint
from formats.errors import UsageError
from support.command_line import run

HOW = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.25,), "crop_pct": 1.0}


def saved(folder: Path, **options: Any) -> Any:
    """Save a small network of timm and return it."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=2, in_chans=1)
    save_for_hf(network, str(folder), safe_serialization=True, data_config=HOW, **options)
    return network


def test_a_folder_of_timm_gives_its_network(tmp_path: Path) -> None:
    network = saved(tmp_path / "m", model_config={"label_names": ["cat", "dog"]})
    model = load_model(open_checkpoint(tmp_path / "m"), factory=TIMM)
    assert model.labels == ["cat", "dog"]
    pixels = torch.randn(2, 1, 32, 32)
    assert torch.equal(model.module(pixels), network.eval()(pixels))


def test_arguments_are_those_of_the_config() -> None:
    config = {
        "architecture": "vit_tiny_patch16_224", "num_classes": 3, "pretrained_cfg": {"mean": [0]},
        "model_args": {"img_size": [64, 64], "num_classes": 4}, "num_features": 192,
    }  # fmt: skip
    assert timm_arguments(config) == {
        "model_name": "vit_tiny_patch16_224", "num_classes": 4, "img_size": [64, 64],
        "pretrained_cfg": {"mean": [0]},
    }  # fmt: skip
    with pytest.raises(UsageError, match=r"key architecture, as timm\.models\.save_for_hf .*None"):
        make_module(TIMM, {})


def test_a_new_head_is_written_so_that_timm_loads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "m", model_config={"label_names": ["cat", "dog"]})
    for task, names in (("pets", ("cat", "dog")), ("shades", ("dark", "grey", "light"))):
        for i, name in enumerate(names):
            (tmp_path / task / name).mkdir(parents=True)
            for j in range(2):
                Image.new("RGB", (40, 36), (100 * i + j,) * 3).save(
                    tmp_path / task / name / f"{j}.png"
                )

    def done(*words: str) -> dict[str, Any]:
        code, out, err = run(capsys, *words, "--model", TIMM, "--json")
        assert code == 0, err
        assert err.count("images: grey, resized (bilinear), the shorter side to 32") == 1
        found: dict[str, Any] = json.loads(out)
        return found

    measured = done("fisher", "m", "--data", "pets", "--task", "pets")
    result = done(
        *("finetune", "m", "--data", "shades", "--task", "shades", "--output-dir", "next"),
        *("--head", "new", "--ewc-lambda", "10", "--epochs", "1", "--evaluate", "pets=pets"),
    )
    assert measured["images"] == result["images"]
    assert result["images"] == {
        "size": [32, 32], "resize": [32, 32], "crop_mode": "center", "interpolation": "bilinear",
        "mean": [0.5], "std": [0.25], "channels": 1,
    }  # fmt: skip
    config = json.loads((tmp_path / "next" / "config.json").read_text())
    assert config["label_names"] == ["dark", "grey", "light"]
    network = timm.create_model(f"local-dir:{tmp_path / 'next'}", pretrained=True)
    weights = load_file(tmp_path / "next" / "model.safetensors")
    assert network.state_dict()["fc.weight"].shape == (3, 96)
    assert torch.equal(network.state_dict()["fc.weight"], weights["fc.weight"])
    scores = done("evaluate", "next", "--data", "pets=pets", "--data", "shades=shades")
    assert scores.keys() == {"pets", "shades"}


def test_an_option_on_images_makes_another_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "m")
    for name in "01":
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (36, 36), 99).save(tmp_path / "data" / name / "x.png")
    words = ("fisher", "m", "--model", TIMM, "--data", "data", "--task", "t", "--json")

    def status(*more: str) -> str:
        code, out, err = run(capsys, *words, *more)
        assert code == 0, err
        return str(json.loads(out)["status"])

    assert status() == "done"
    assert status() == "cached"
    assert status("--overwrite", "--crop-pct", "0.9") == "done"
    assert status("--crop-pct", "0.9") == "cached"
