"""From images to the pixels that a user's own module takes, as timm and torchvision do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consolidate.results import ImagePreprocessing
from formats.errors import InputError

PROCESSOR_FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop the center, scale to [0, 1], normalize; without augmentation.

    An image smaller than the crop is padded with zeros.
    """

    size: tuple[int, int]  # height and width that the model gets
    scale: tuple[int, int] | None  # what images are resized to before the crop; None: not at all
    squash: bool  # whether both sides are resized to `scale`, or the shorter one, as the image is
    interpolation: str
    mean: tuple[float, ...]  # one a channel
    std: tuple[float, ...]
    channels: int

    @property
    def mode(self) -> str:
        """The mode of Pillow that images are converted to; alpha is dropped."""
        return "L" if self.channels == 1 else "RGB"

    def pixels(self, images: Sequence[Any], where: str) -> Tensor:
        """Return the pixels of images of Pillow in `mode`, (B, C, H, W) float32.

        `where` is the place of the first, for messages.
        """
        if self.scale is None and (odd := {i.size[::-1] for i in images} - {self.size}):
            raise InputError(
                f"{where}, or in its batch: expected an image of {self.size[0]} × {self.size[1]}, "
                f"found {' × '.join(map(str, odd.pop()))}, and {PROCESSOR_FILE} has do_resize "
                "false; resize it, or name --crop-pct 1"
            )
        raw = torch.stack([self._cropped(image) for image in images])
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (self.mean, self.std))
        return raw.float().div_(255).sub_(mean).div_(std)

    def _cropped(self, image: Any) -> Tensor:
        from PIL import Image

        size = self._resized(*image.size)
        if size != image.size:
            method = Image.Resampling[self.interpolation.upper()]
            image = image.resize(size, method)
        height, width = self.size
        left, top = (
            _offset(have, wanted) for have, wanted in zip(size, (width, height), strict=True)
        )
        image = image.crop((left, top, left + width, top + height))
        flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return flat.view(height, width, self.channels).permute(2, 0, 1)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height before the crop, rounded as torchvision or timm do."""
        if self.scale is None:
            return width, height
        if self.squash:
            return self.scale[1], self.scale[0]
        if self.scale[0] == self.scale[1]:
            short = self.scale[0]
            long = int(short * max(width, height) / min(width, height))
            return (short, long) if width <= height else (long, short)
        ratio = min(height / self.scale[0], width / self.scale[1])
        return round(width / ratio), round(height / ratio)

    def describe(self) -> ImagePreprocessing:
        """Return what is done, for results."""
        return {
            "size": list(self.size),
            "resize": None if self.scale is None else list(self.scale),
            "crop_mode": "squash" if self.squash else "center",
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
            "channels": self.channels,
        }

    def __str__(self) -> str:
        """Say what is done in one line."""
        height, width = self.size
        colour = "grey" if self.channels == 1 else "RGB"
        steps = [colour]
        if self.scale is not None:
            both = f"{self.scale[0]} × {self.scale[1]}"
            square = self.scale[0] == self.scale[1]
            shorter = f"the shorter side to {self.scale[0]}" if square else f"to cover {both}"
            steps.append(
                f"resized ({self.interpolation}), {f'to {both}' if self.squash else shorter}"
            )
        if self.scale != self.size or not self.squash:
            steps.append(f"center crop {height} × {width}")
        numbers = (", ".join(f"{n:g}" for n in each) for each in (self.mean, self.std))
        return f"{', '.join(steps)}; mean {next(numbers)}; std {next(numbers)}"


def _offset(have: int, wanted: int) -> int:
    """Return where a center crop begins, below 0 where it is padded, as torchvision rounds."""
    if wanted > have:
        return -((wanted - have) // 2)
    return round((have - wanted) / 2)
