"""Pixels beside those of timm and torchvision, and what states how they are made."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from consolidate.data.image_settings import read_preprocessing
from consolidate.data.preprocessing import Preprocessing
from consolidate.options import INTERPOLATIONS, Images
from formats.errors import InputError

NETWORK = nn.Conv2d(3, 2, 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(31, 47), (47, 31), (40, 40), (200, 90), (9, 13), (32, 32)]


def pictures(mode: str = "RGB") -> Iterator[Any]:
    """Make noise of several sizes, upscaled images among them."""
    chance = np.random.default_rng(0)
    for width, height in SIZES:
        shape = (height, width) if mode == "L" else (height, width, len(mode))
        yield Image.fromarray(chance.integers(0, 256, shape, dtype=np.uint8), mode)


def read(config: dict[str, Any], folder: Path = Path(), **given: Any) -> Preprocessing:
    """Read the preprocessing of a folder with this config.json."""
    return read_preprocessing(folder, config, Images(**given), NETWORK)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_pixels_are_those_of_timm(
    interpolation: str, crop_pct: float, size: tuple[int, int], crop_mode: str
) -> None:
    config = {
        "input_size": [3, *size], "crop_pct": crop_pct, "interpolation": interpolation,
        "mean": MEAN, "std": STD, "crop_mode": crop_mode,
    }  # fmt: skip
    transform = timm.data.create_transform(**config, is_training=False)
    ours = read({"architecture": "resnet18", "pretrained_cfg": config})
    for image in pictures():
        assert torch.equal(ours.pixels([image], "here")[0], transform(image))


def test_pixels_are_those_of_timm_in_grey() -> None:
    config = {"input_size": [1, 28, 28], "mean": [0.1307], "std": [0.3081]}
    data = timm.data.resolve_data_config(pretrained_cfg=config)
    transform = timm.data.create_transform(**data, is_training=False)
    ours = read({"pretrained_cfg": config})
    assert ours.mode == "L"
    for image in pictures("L"):
        assert torch.equal(ours.pixels([image], "here")[0], transform(image))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_pixels_are_those_of_torchvision(interpolation: str) -> None:
    method = InterpolationMode(interpolation)
    preset = ImageClassification(
        crop_size=28, resize_size=33, mean=MEAN, std=STD, interpolation=method
    )
    config = {"crop_size": [28], "resize_size": [33], "mean": MEAN, "std": STD}
    ours = read({**config, "interpolation": str(method)})
    for image in pictures():
        assert torch.equal(ours.pixels([image], "here")[0], preset(image))


def test_a_batch_is_its_images() -> None:
    ours = read({"input_size": [3, 20, 20], "mean": MEAN, "std": STD})
    images = list(pictures())
    batch = ours.pixels(images, "here")
    assert batch.shape == (len(images), 3, 20, 20)
    for image, pixels in zip(images, batch, strict=True):
        assert torch.equal(ours.pixels([image], "here")[0], pixels)


@pytest.mark.parametrize("name", ["ViT", "CLIP", "ConvNext", "ConvNext-384"])
def test_a_processor_of_transformers_gives_its_own_pixels(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    options = {
        "ViT": {"size": {"height": 24, "width": 32}},
        "CLIP": {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 24}},
        "ConvNext": {"size": {"shortest_edge": 32}, "crop_pct": 0.8},
        "ConvNext-384": {"size": {"shortest_edge": 384}, "crop_pct": 0.8},
    }[name]
    kind = getattr(transformers, f"{name.partition('-')[0]}ImageProcessorPil")
    processor = kind(image_mean=MEAN, image_std=STD, **options)
    processor.save_pretrained(tmp_path)
    ours = read({"input_size": [1, 5, 5]}, tmp_path)
    for image in pictures():
        theirs = processor(images=[image], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(ours.pixels([image], "here"), theirs, atol=1e-6, rtol=0)


def test_without_resizing_another_size_is_refused(tmp_path: Path) -> None:
    values = {"size": {"height": 40, "width": 40}, "do_resize": False, "do_normalize": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    ours = read({}, tmp_path)
    image = Image.new("RGB", (40, 40), (255, 0, 51))
    assert ours.pixels([image], "here")[0, :, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])
    with pytest.raises(InputError, match=r"row 3, .*40 × 40, found 39 × 40.*--crop-pct 1"):
        ours.pixels([image, Image.new("RGB", (40, 39))], "row 3")
    resized = read({}, tmp_path, crop_pct=1.0)
    assert resized.pixels([image, Image.new("RGB", (40, 39))], "row 3").shape == (2, 3, 40, 40)


def test_options_come_first() -> None:
    config = {
        "crop_size": 224, "resize_size": 256, "mean": MEAN, "std": STD, "interpolation": "bicubic"
    }  # fmt: skip
    stated = read(config)
    assert (stated.size, stated.scale) == ((224, 224), (256, 256))
    smaller = read(config, image_size=112)
    assert (smaller.size, smaller.scale) == ((112, 112), (128, 128))
    given = read(
        config, image_size=28, crop_pct=1.0, image_mean=(0.5,), image_std=(0.25, 0.5, 1.0),
        image_interpolation="nearest",
    )  # fmt: skip
    assert given == Preprocessing(
        (28, 28), (28, 28), False, "nearest", (0.5, 0.5, 0.5), (0.25, 0.5, 1.0), 3
    )
    assert given == read(
        {}, image_size=28, image_mean=(0.5,), image_std=(0.25, 0.5, 1.0),
        image_interpolation="nearest",
    )  # fmt: skip
    assert given.describe()["size"] == [28, 28]
    assert str(given) == (
        "RGB, resized (nearest), the shorter side to 28, center crop 28 × 28; mean 0.5, 0.5, 0.5; "
        "std 0.25, 0.5, 1"
    )


def test_a_flag_that_does_not_fit_is_named() -> None:
    with pytest.raises(InputError, match=r"^--image-mean: expected 1 or 3 numbers.* found 2$"):
        read(SIZE, image_mean=(0.5, 0.5))


def test_timm_fills_in_what_its_config_leaves_out() -> None:
    ours = read({"pretrained_cfg": {"input_size": [3, 224, 224]}})
    theirs = timm.data.resolve_data_config(pretrained_cfg={"input_size": (3, 224, 224)})
    assert ours == Preprocessing(
        (224, 224), (256, 256), False, theirs["interpolation"], theirs["mean"], theirs["std"], 3
    )
    assert theirs["crop_pct"] == 0.875


@pytest.mark.parametrize(
    ("config", "channels"),
    [({}, 1), ({"in_chans": 3}, 3), ({"num_channels": 3}, 3), ({"input_size": [3, 9, 9]}, 3)],
)
def test_channels_are_those_of_the_config_or_the_first_convolution(
    config: dict[str, Any], channels: int
) -> None:
    given = Images(image_size=8, image_mean=(0.5,), image_std=(0.5,))
    network = nn.Sequential(nn.Identity(), nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3))
    assert read_preprocessing(Path(), config, given, network).channels == channels


def test_a_processor_leaves_the_channels_to_the_config(tmp_path: Path) -> None:
    values = {"size": {"height": 8, "width": 8}, "image_mean": [0.5], "image_std": [0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    assert read({"num_channels": 1}, tmp_path).channels == 1
    assert read({}, tmp_path).channels == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"crop_size": 8, "rescale_factor": "x"}', "rescale_factor: expected .*, found 'x'"),
        ('{"crop_size": 8, "rescale_factor": [1]}', r"rescale_factor: expected .*, found \[1\]"),
        ("[" * 200_000, "is not valid JSON"),
    ],
)
def test_a_processor_that_is_damaged(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read({}, tmp_path)


SIZE: dict[str, Any] = {"input_size": [3, 8, 8], "mean": [0.5], "std": [0.5]}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"size, mean, std of .* --image-size, --image-mean, --image-std, or add input_size"),
        (
            {"input_size": [3, 8, 8]},
            r"the mean, std .* --image-mean, --image-std, or add mean, std to",
        ),
        (
            {"input_size": [3, 8, 8], "mean": 0},
            r"the std of .* name them with --image-std, or add std to",
        ),
        (SIZE | {"mean": [0.5, 0.5]}, r"config\.json: mean: expected 1 or 3 numbers.* found 2"),
        (SIZE | {"std": [0.0]}, "std: expected numbers above 0"),
        (SIZE | {"std": "x"}, "std: expected a list of numbers, found 'x'"),
        (SIZE | {"input_size": [8, 8]}, r"input_size: expected \[channels, height, width\]"),
        (SIZE | {"input_size": [3, 8, 0.5]}, r"input_size: expected \[channels, height, width\]"),
        (SIZE | {"input_size": [4, 8, 8]}, "expected a model of 1 or 3 channels, found 4"),
        (SIZE | {"crop_pct": 1.5}, "crop_pct: expected a number above 0 and at most 1, found 1.5"),
        (SIZE | {"crop_mode": "border"}, "crop_mode: expected center or squash, found 'border'"),
        (SIZE | {"interpolation": "random"}, "interpolation: expected one of nearest, bilinear"),
        (SIZE | {"std": [10**400]}, "std: expected a list of numbers, found "),
        (SIZE | {"input_size": [3, 8, 2**31]}, r"input_size: expected \[channels, height, width\]"),
        (SIZE | {"crop_pct": 5e-324}, "expected images resized to at most 16384 pixels a side"),
        ({"crop_size": [1, 2, 3]}, "crop_size: expected a number of pixels, or height and width"),
    ],
)
def test_what_is_not_usable_is_refused_by_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": {"longest_edge": 9}}, "size: expected a number of pixels, or height and width"),
        ({"size": {"shortest_edge": 9}}, "size: expected height and width, or do_center_crop"),
        ({"size": {"height": 9, "width": 9}, "rescale_factor": 1}, "rescale_factor: expected"),
        ([], "expected a JSON object, found list"),
    ],
)
def test_a_processor_that_cannot_be_followed_is_refused(
    values: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=message) as caught:
        read({}, tmp_path)
    assert str(caught.value).startswith(str(path))
