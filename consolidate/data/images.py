"""Examples of images, for a model of transformers or a user's own module."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consolidate.data.columns import INPUT_COLUMNS, find_column
from consolidate.data.examples import Examples
from consolidate.data.image_settings import read_preprocessing
from consolidate.data.labels import describe, read_labels
from consolidate.models.model import Model, module_dtype, outputs_of_first
from consolidate.options import Columns, Images
from formats.errors import InputError
from formats.rows import Rows

_USUAL = ("image", "img")


@dataclass(eq=False)
class ImageExamples(Examples):
    """Images that are read and resized batch by batch, without augmentation."""

    rows: Rows
    column: str
    labels: Tensor
    prepare: Callable[[Sequence[Any], str], Any]  # from images and the place of the first
    mode: str  # of Pillow

    def __len__(self) -> int:
        return len(self.labels)

    def collate(self, indices: Sequence[int], epoch: int = 0) -> tuple[Any, Tensor]:
        """Return pixel values, (B, C, H, W), as the model takes them, and class numbers, (B,)."""
        images = [self.image(i) for i in indices]
        first = self.rows.where(indices[0], self.column)
        return self.prepare(images, first), self.labels[list(indices)]

    def image(self, i: int) -> Any:
        """Return image `i` in the mode of the model."""
        value: Any = self.rows[i].get(self.column)
        where = self.rows.where(i, self.column)
        if not hasattr(value, "convert"):
            raise InputError(f"{where}: expected an image, found {describe(value)}")
        return _converted(value, self.mode, where)


def _converted(image: Any, mode: str, where: str) -> Any:
    """Convert to grey or RGB as Pillow does, without alpha; of 16 bits the upper 8 are taken."""
    from PIL import Image

    if image.mode == "I" and image.format in ("PPM", "PNG"):  # which have no more than 16 bits
        image = image.convert("I;16")
    if image.mode.startswith("I;16"):  # Pillow would clip it at 255
        upper = 0 if image.mode == "I;16B" else 1
        image = Image.frombytes("L", image.size, image.tobytes()[upper::2])
    elif image.mode in ("I", "F"):
        raise InputError(
            f"{where}: expected an image of 8 or 16 bits a channel, found Pillow's mode "
            f"{image.mode}, whose range is not known; save it as 8 bits"
        )
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def holds_images(rows: Rows, columns: Columns) -> bool:
    """Return whether data for a user's own module are images, by their columns."""
    if columns.image is not None or columns.inputs is not None or rows.tensors is not None:
        return columns.inputs is None and columns.image is not None
    return not set(INPUT_COLUMNS) & set(rows.columns) and bool(set(_USUAL) & set(rows.columns))


def encode_images(rows: Rows, model: Model, columns: Columns, *, labels_needed: bool) -> Examples:
    """Encode images for transformers; labels are checked now, the images when they are read."""
    if model.processor is None:
        raise InputError(
            f"{model.checkpoint.path}: expected a preprocessor_config.json with the size and scale "
            "of images, found none; save the image processor beside the weights"
        )
    column = find_column(rows, columns, "image", *_USUAL)
    labels, notes = read_labels(rows, columns, model, model.outputs, needed=labels_needed)
    mode = "L" if getattr(model.module.config, "num_channels", 3) == 1 else "RGB"
    dtype = module_dtype(model)

    def prepare(images: Sequence[Any], where: str) -> dict[str, Tensor]:
        try:
            pixels = model.processor(images=images, return_tensors="pt")["pixel_values"]
        except Exception as error:
            raise InputError(
                f"{where}: the image processor refuses the batch that begins with this row: {error}"
            ) from error
        return {"pixel_values": pixels.to(dtype)}

    return ImageExamples(rows, column, labels, prepare, mode, notes=notes)


def encode_own_images(
    rows: Rows, model: Model, columns: Columns, given: Images, *, labels_needed: bool
) -> Examples:
    """Encode images for a user's own module; the first row shows the model's outputs."""
    path = model.checkpoint.path
    folder = path if path.is_dir() else path.parent
    column = find_column(rows, columns, "image", *_USUAL)
    how = read_preprocessing(folder, model.checkpoint.config, given, model.module)
    dtype = module_dtype(model)

    def prepare(images: Sequence[Any], where: str) -> Tensor:
        return how.pixels(images, where).to(dtype)

    none = torch.empty(0, dtype=torch.long)
    examples = ImageExamples(rows, column, none, prepare, how.mode, preprocessing=how)
    first = prepare([examples.image(0)], rows.where(0, column))
    hint = "; the size is --image-size, the channels are in_chans in config.json"
    outputs = outputs_of_first(model, first, rows.where(0, column), hint)
    examples.labels, examples.notes = read_labels(
        rows, columns, model, outputs.shape[-1], needed=labels_needed
    )
    return examples
