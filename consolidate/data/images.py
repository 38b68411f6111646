"""Examples of images, encoded by the checkpoint's image processor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consolidate.data.columns import find_column
from consolidate.data.examples import Examples
from consolidate.data.labels import describe, read_labels
from consolidate.models.model import Model
from consolidate.options import Columns
from formats.errors import InputError
from formats.rows import Rows


@dataclass(eq=False)
class ImageExamples(Examples):
    """Images that are read and resized batch by batch, without augmentation."""

    rows: Rows
    column: str
    labels: Tensor
    processor: Any
    mode: str  # of Pillow
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.labels)

    def collate(self, indices: Sequence[int], epoch: int = 0) -> tuple[Any, Tensor]:
        """Return pixel values, (B, C, H, W), and class numbers, (B,)."""
        images = [self._image(i) for i in indices]
        try:
            pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        except Exception as error:
            raise InputError(
                f"{self.rows.where(indices[0], self.column)}: the image processor refuses the "
                f"batch that begins with this row: {error}"
            ) from error
        return {"pixel_values": pixels.to(self.dtype)}, self.labels[list(indices)]

    def _image(self, i: int) -> Any:
        value: Any = self.rows[i].get(self.column)
        if not hasattr(value, "convert"):
            where = self.rows.where(i, self.column)
            raise InputError(f"{where}: expected an image, found {describe(value)}")
        return value.convert(self.mode)


def encode_images(rows: Rows, model: Model, columns: Columns) -> Examples:
    """Encode rows of images; the labels are checked now, the images when they are read."""
    if model.processor is None:
        raise InputError(
            f"{model.checkpoint.path}: expected a preprocessor_config.json with the size and scale "
            "of images, found none; save the image processor beside the weights"
        )
    image = find_column(rows, columns, "image", "image", "img")
    labels, notes = read_labels(rows, columns, model, model.outputs)
    mode = "L" if getattr(model.module.config, "num_channels", 3) == 1 else "RGB"
    dtype = next(model.module.parameters()).dtype
    return ImageExamples(rows, image, labels, model.processor, mode, dtype, notes=notes)
