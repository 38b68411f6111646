"""How images become inputs of a user's own module: as options and the checkpoint's files say."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from torch import nn

from consolidate.data.preprocessing import PROCESSOR_FILE, Preprocessing
from consolidate.options import INTERPOLATIONS, Images
from formats.checkpoint_files import read_json
from formats.errors import InputError

_BY_NUMBER = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # of Pillow
_TIMM = {  # what timm takes where its own config says nothing
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
_MOST_PIXELS = 2**14  # a side; more is damage, and takes memory without bounds
_KEYS = {"size": "input_size", "mean": "mean", "std": "std"}  # of timm


@dataclass(frozen=True)
class _Settings:
    """What one source says; None where it says nothing."""

    size: tuple[int, int] | None = None
    scale: tuple[int, int] | None = None
    crop_pct: float | None = None
    squash: bool = False
    resize: bool = True
    interpolation: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: int | None = None


def read_preprocessing(
    folder: Path, config: Mapping[str, Any], given: Images, module: nn.Module
) -> Preprocessing:
    """Read how images become inputs: from options, a processor's file, or config.json.

    Raises:
        InputError: The size, mean or deviation is stated nowhere, or a value is not usable.
    """
    processor = folder / PROCESSOR_FILE
    if processor.is_file():
        found, where = _of_processor(read_json(processor), str(processor)), str(processor)
    else:
        where = str(folder / "config.json")
        found = _of_config(config, where)
    size = found.size if given.image_size is None else (given.image_size, given.image_size)
    _check_stated(
        {"size": size, "mean": given.image_mean or found.mean, "std": given.image_std or found.std},
        folder,
    )
    assert size is not None
    stated = _Keys(config, str(folder / "config.json")).count("in_chans", "num_channels")
    channels = found.channels or stated or _channels_of(module)
    if channels not in (1, 3):
        raise InputError(f"{where}: expected a model of 1 or 3 channels, found {channels}")
    mean = _by_channel("mean", given.image_mean, found.mean, channels, where)
    std = _by_channel("std", given.image_std, found.std, channels, where)
    if min(std) <= 0:
        of = f"{where}: std" if given.image_std is None else "--image-std"
        raise InputError(f"{of}: expected numbers above 0, found {list(std)}")
    interpolation = given.image_interpolation or found.interpolation or "bilinear"
    scale = _scale(found, size, given)
    if scale is not None and max(scale) > _MOST_PIXELS:
        raise InputError(
            f"{where}: expected images resized to at most {_MOST_PIXELS} pixels a side before the "
            "crop, found more; correct the size, or crop_pct"
        )
    return Preprocessing(size, scale, found.squash, interpolation, mean, std, channels)


def _by_channel(
    name: str,
    given: tuple[float, ...] | None,
    found: tuple[float, ...] | None,
    channels: int,
    where: str,
) -> tuple[float, ...]:
    """Return the numbers of an option, or of a file, one for each channel."""
    numbers = given or found or ()
    if len(numbers) == 1:
        return tuple(numbers) * channels
    if len(numbers) != channels:
        of = f"{where}: {name}" if given is None else f"--image-{name}"
        raise InputError(
            f"{of}: expected 1 or {channels} numbers, one a channel, found {len(numbers)}"
        )
    return tuple(numbers)


def _check_stated(values: Mapping[str, Any], folder: Path) -> None:
    """Refuse to guess what neither options nor files state."""
    missing = [name for name, value in values.items() if value is None]
    if not missing:
        return
    names, keys = ", ".join(missing), ", ".join(_KEYS[name] for name in missing)
    flags = ", ".join(f"--image-{name}" for name in missing)
    raise InputError(
        f"{folder}: expected the {names} of the model's input images in {PROCESSOR_FILE} or "
        f"config.json, found none; name them with {flags}, or add {keys} to config.json, as timm "
        "writes them (mean 0 and std 1 leave pixels in [0, 1])"
    )


def _scale(found: _Settings, size: tuple[int, int], given: Images) -> tuple[int, int] | None:
    """Return what images are resized to; a size that the options change keeps the ratio."""
    if given.crop_pct is None and not found.resize:
        return None
    share = given.crop_pct or found.crop_pct
    if share is None and found.scale is not None and found.size is not None:
        each = zip(size, found.scale, found.size, strict=True)
        return _pair(wanted * before // after for wanted, before, after in each)
    return _pair(_before_crop(side, share or 1.0) for side in size)


def _before_crop(side: int, share: float) -> int:
    """Return the side of which a crop is this share; more than is accepted where it overflows."""
    return math.floor(min(side / share, 2.0 * _MOST_PIXELS))


def _pair(sides: Iterator[int]) -> tuple[int, int]:
    height, width = sides
    return height, width


def _of_config(config: Mapping[str, Any], where: str) -> _Settings:
    """Read config.json: timm's keys, inside `pretrained_cfg` or not, or torchvision's."""
    inside = config.get("pretrained_cfg")
    timm = isinstance(inside, Mapping)
    keys = _Keys({**config, **(inside if isinstance(inside, Mapping) else {})}, where)
    mode = keys.values.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise keys.refusal("crop_mode", "center or squash")
    shape = keys.values.get("input_size")
    size = keys.sides("crop_size", "img_size", "image_size")
    channels = keys.count("in_chans", "num_channels")
    if shape is not None:
        if not isinstance(shape, list | tuple) or len(shape) != 3 or not all(map(_is_side, shape)):
            raise keys.refusal("input_size", "[channels, height, width]")
        channels, size = shape[0], (shape[1], shape[2])
    found = _Settings(
        size=size,
        scale=keys.sides("resize_size"),
        crop_pct=keys.share("crop_pct"),
        squash=mode == "squash",
        interpolation=keys.interpolation("interpolation"),
        mean=keys.numbers("mean", "image_mean"),
        std=keys.numbers("std", "image_std"),
        channels=channels,
    )
    if not timm:
        return found
    missing: dict[str, Any] = {
        name: value for name, value in _TIMM.items() if getattr(found, name) is None
    }
    return replace(found, **missing)


def _of_processor(values: Mapping[str, Any], where: str) -> _Settings:
    """Read the file of an image processor of transformers; also with the keys of config.json."""
    keys = _Keys(values, where)
    if not {"size", "crop_size"} & values.keys():
        return _of_config(values, where)
    factor = values.get("rescale_factor", 1 / 255)
    usual = _is_number(factor) and math.isclose(factor, 1 / 255)
    if not values.get("do_rescale", True) or not usual:
        raise keys.refusal(
            "rescale_factor", "do_rescale with 1/255, as pixels are scaled to [0, 1]"
        )
    size, crops = values.get("size"), values.get("do_center_crop", "crop_size" in values)
    short = size.get("shortest_edge") if isinstance(size, Mapping) else None
    if isinstance(size, int) and crops:
        short = size
    if short is not None and not _is_side(short):
        raise keys.refusal("size", "a number of pixels, or height and width")
    squash = short is None
    scale = keys.sides("size") if short is None else (short, short)
    share, crop = keys.share("crop_pct"), keys.sides("crop_size") if crops else None
    if share is not None and short is not None:  # of ConvNeXT: from 384 on it crops nothing
        squash, crop = short >= 384, scale
        scale = scale if squash else _pair(_before_crop(side, share) for side in (short, short))
    if not squash and crop is None:
        raise keys.refusal("size", "height and width, or do_center_crop with crop_size")
    plain = not values.get("do_normalize", True)
    return _Settings(
        size=crop or scale,
        scale=scale,
        squash=squash,
        resize=values.get("do_resize", True),
        interpolation=keys.interpolation("resample", "interpolation"),
        mean=(0.0,) if plain else keys.numbers("image_mean", "mean"),
        std=(1.0,) if plain else keys.numbers("image_std", "std"),
    )


@dataclass(frozen=True)
class _Keys:
    """The keys of a JSON file, refused with its name."""

    values: Mapping[str, Any]
    where: str

    def refusal(self, key: str, expected: str) -> InputError:
        """Return the error for a key's value."""
        return InputError(
            f"{self.where}: {key}: expected {expected}, found {self.values.get(key)!r:.80}"
        )

    def numbers(self, *names: str) -> tuple[float, ...] | None:
        """Return the numbers of the first key that is there."""
        for key in self._there(names):
            value = self.values[key]
            several = value if isinstance(value, list | tuple) else [value]
            if not several or not all(map(_is_number, several)):
                raise self.refusal(key, "a list of numbers")
            return tuple(map(float, several))
        return None

    def sides(self, *names: str) -> tuple[int, int] | None:
        """Return height and width: of one number, of two, or by name."""
        for key in self._there(names):
            value = self.values[key]
            if isinstance(value, Mapping):
                value = [value.get("height"), value.get("width")]
            several = list(value) if isinstance(value, list | tuple) else [value]
            if len(several) not in (1, 2) or not all(map(_is_side, several)):
                raise self.refusal(key, "a number of pixels, or height and width")
            return several[0], several[-1]
        return None

    def count(self, *names: str) -> int | None:
        """Return the first whole number above 0."""
        for key in self._there(names):
            if not _is_side(self.values[key]):
                raise self.refusal(key, "a whole number above 0")
            return int(self.values[key])
        return None

    def share(self, key: str) -> float | None:
        """Return a number above 0 and at most 1."""
        for name in self._there((key,)):
            value = self.values[name]
            if not _is_number(value) or not 0 < value <= 1:
                raise self.refusal(key, "a number above 0 and at most 1")
            return float(value)
        return None

    def interpolation(self, *names: str) -> str | None:
        """Return the name of an interpolation, which may be Pillow's number or torchvision's."""
        for key in self._there(names):
            value = self.values[key]
            if isinstance(value, int) and 0 <= value < len(_BY_NUMBER):
                return _BY_NUMBER[value]
            name = str(value).removeprefix("InterpolationMode.").lower()
            if name not in INTERPOLATIONS:
                raise self.refusal(key, f"one of {', '.join(INTERPOLATIONS)}")
            return name
        return None

    def _there(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if self.values.get(name) is not None][:1]


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def _is_side(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST_PIXELS


def _channels_of(module: nn.Module) -> int:
    """Return the input channels of the first convolution, 3 if there is none."""
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    return 3 if first is None else first.in_channels
