"""Images for a user's own module: which data are images, their modes, and what is refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from consolidate.data.encoding import encode
from consolidate.data.examples import Examples
from consolidate.models.loading import load_model
from consolidate.models.model import Model
from consolidate.options import Columns, Encoding, Images
from formats.checkpoint import open_checkpoint
from formats.data import Rows, open_data
from formats.errors import InputError, UsageError

STATED = {"input_size": [3, 8, 8], "mean": [0.5], "std": [0.25]}


def small_network(config: dict[str, Any]) -> nn.Module:
    """Make a convolutional network whose channels and classes config.json states."""
    channels = config.get("in_chans", 3)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, config.get("num_labels", 2)),
    )


def own(folder: Path, config: dict[str, Any], **options: Any) -> Model:
    """Load a checkpoint of `small_network`."""
    folder.mkdir()
    torch.manual_seed(0)
    save_file(small_network(config).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    factory = f"{__name__}:small_network"
    return load_model(open_checkpoint(folder), factory=factory, **options)


def pictures(folder: Path, *images: Any, suffix: str = "png") -> Rows:
    """Write images of two classes in turn."""
    for i, image in enumerate(images):
        path = folder / "01"[i % 2] / f"{i}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return open_data(folder)


def first(examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all examples as one batch."""
    return next(examples.batches(100))


def test_a_folder_of_images_becomes_tensors(tmp_path: Path) -> None:
    model = own(tmp_path / "model", STATED)
    rows = pictures(tmp_path / "data", *(Image.new("RGB", (9, 12), (255, 0, 51)) for _ in range(3)))
    examples = encode(rows, model)
    pixels, labels = first(examples)
    assert labels.tolist() == [0, 0, 1]
    expected = (torch.tensor([1.0, 0.0, 0.2]) - 0.5) / 0.25
    assert torch.allclose(pixels, expected[:, None, None].expand(3, 3, 8, 8))
    assert model.module(pixels).shape == (3, 2)
    assert examples.preprocessing is not None
    assert examples.preprocessing.describe()["size"] == [8, 8]


def test_pixels_have_the_dtype_of_the_module(tmp_path: Path) -> None:
    model = own(tmp_path / "model", STATED, dtype=torch.float64)
    pixels, _ = first(encode(pictures(tmp_path / "data", Image.new("L", (8, 8))), model))
    assert pixels.dtype == torch.float64


def half_red() -> Any:
    """Make a palette image with a transparent colour."""
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.info["transparency"] = b"\xff\x00"
    return image


IMAGES = {
    "L": (Image.new("L", (8, 8), 51), [51] * 3),
    "LA": (Image.new("LA", (8, 8), (51, 0)), [51] * 3),
    "1": (Image.new("1", (8, 8), 1), [255] * 3),
    "P": (half_red(), [255, 0, 0]),
    "I;16": (Image.fromarray(np.full((8, 8), 51 * 256 + 7, np.uint16)), [51] * 3),
    "RGBA": (Image.new("RGBA", (8, 8), (255, 0, 51, 0)), [255, 0, 51]),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", IMAGES)
def test_every_mode_becomes_grey_or_rgb(mode: str, channels: int, tmp_path: Path) -> None:
    config = {"in_chans": channels, "image_size": 8, "mean": 0, "std": 1}
    image, rgb = IMAGES[mode]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = pictures(tmp_path / "data", image)
        assert rows[0]["image"].mode == mode
        pixels, _ = first(encode(rows, own(tmp_path / "model", config)))
    grey = Image.new("RGB", (1, 1), tuple(rgb)).convert("L").getpixel((0, 0))
    expected = [grey] if channels == 1 else rgb
    assert (pixels[0, :, 0, 0] * 255).round().tolist() == expected


def test_sixteen_bits_of_either_byte_order_are_not_clipped(tmp_path: Path) -> None:
    config = {"in_chans": 1, "image_size": 4, "mean": 0, "std": 1}
    values = np.kron(np.array([[0, 300], [40_000, 65_535]], np.uint16), np.ones((2, 2), np.uint16))
    (tmp_path / "data" / "0").mkdir(parents=True)
    Image.fromarray(values).save(tmp_path / "data" / "0" / "little.tif")
    big = Image.frombytes("I;16B", (4, 4), values.astype(">u2").tobytes())
    big.save(tmp_path / "data" / "0" / "big.tif")
    header = b"P5 4 4 65535\n"
    (tmp_path / "data" / "0" / "x.pgm").write_bytes(header + values.astype(">u2").tobytes())
    rows = open_data(tmp_path / "data")
    assert [row["image"].mode for row in rows] == ["I;16B", "I;16", "I"]
    pixels, _ = first(encode(rows, own(tmp_path / "model", config)))
    for each in pixels:
        assert (each[0] * 255).round().tolist() == (values >> 8).tolist()


def test_a_range_that_is_not_known_is_refused(tmp_path: Path) -> None:
    rows = pictures(tmp_path / "data", Image.new("F", (8, 8), 0.5), suffix="tif")
    with pytest.raises(InputError, match=r"0/0\.tif, row 1, .*8 or 16 bits .* mode F"):
        encode(rows, own(tmp_path / "model", STATED))


def test_a_damaged_image_is_named_with_its_row(tmp_path: Path) -> None:
    rows = pictures(tmp_path / "data", *(Image.new("L", (8, 8)) for _ in range(3)))
    damaged = tmp_path / "data" / "1" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    examples = encode(rows, own(tmp_path / "model", STATED))
    with pytest.raises(InputError, match=rf"{damaged}, row 3: the image cannot be read"):
        first(examples)


def test_without_a_size_the_flags_and_keys_are_named(tmp_path: Path) -> None:
    rows = pictures(tmp_path / "data", Image.new("L", (8, 8)))
    model = own(tmp_path / "model", {})
    with pytest.raises(InputError, match=r"the size, mean, std .* --image-size, .*add input_size"):
        encode(rows, model)
    given = Images(image_size=8, image_mean=(0.0,), image_std=(1.0,))
    assert first(encode(rows, model, Encoding(images=given)))[0].shape == (1, 3, 8, 8)


def test_channels_that_the_module_refuses_name_the_key(tmp_path: Path) -> None:
    rows = pictures(tmp_path / "data", Image.new("L", (8, 8)))
    model = own(tmp_path / "model", {"in_chans": 1, "input_size": [3, 8, 8], "mean": 0, "std": 1})
    with pytest.raises(InputError, match=r"shape \[1, 3, 8, 8\].*in_chans in config\.json"):
        encode(rows, model)


def test_labels_of_other_objectives(tmp_path: Path) -> None:
    model = own(tmp_path / "model", STATED | {"problem_type": "regression", "num_labels": 1})
    rows = open_data(write_parquet(tmp_path / "data.parquet", "image", [0.5, 2.0]))
    assert first(encode(rows, model))[1].tolist() == [0.5, 2.0]


def write_parquet(path: Path, name: str, labels: list[Any]) -> Path:
    """Write a table of images as `datasets` does."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({name: datasets.Image(), "label": datasets.Value("float32")})
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    table = {name: [image] * len(labels), "label": labels}
    datasets.Dataset.from_dict(table, features).to_parquet(path)
    return path


def test_a_column_of_another_name(tmp_path: Path) -> None:
    model = own(tmp_path / "model", STATED)
    rows = open_data(write_parquet(tmp_path / "data.parquet", "picture", [0, 1]))
    examples = encode(rows, model, Encoding(columns=Columns(image="picture")))
    assert first(examples)[1].tolist() == [0, 1]
    assert examples.notes == []
    with pytest.raises(InputError, match=r"'inputs' .*--inputs-column.*--image-column"):
        encode(rows, model)
    with pytest.raises(InputError, match=r"expected numbers, found an image.*--image-column"):
        encode(rows, model, Encoding(columns=Columns(inputs="picture")))


def test_a_path_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"image": "a.png", "label": 0}\n')
    with pytest.raises(InputError, match=r"row 1 .*expected an image, found str 'a\.png'"):
        encode(open_data(path), own(tmp_path / "model", STATED))


def test_options_on_images_are_refused_where_there_are_none(tmp_path: Path) -> None:
    model = own(tmp_path / "model", STATED)
    path = tmp_path / "data.jsonl"
    path.write_text('{"inputs": [1, 2], "label": 0}\n')
    with pytest.raises(UsageError, match=r"--crop-pct is for images, found data without"):
        encode(open_data(path), model, Encoding(images=Images(crop_pct=0.9)))
