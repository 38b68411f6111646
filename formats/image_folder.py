"""Rows of an image folder with one subfolder per class, and the decoding of images."""

import array
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from formats.errors import InputError, UsageError, install
from formats.rows import Rows, check_regular, check_unchanged, file_digest, listing_digest, stamp

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}

# A whitelist for Pillow, which otherwise goes by content alone: PostScript starts a program.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def is_image(path: Path) -> bool:
    """Return whether a file is an image that can be read, by its name."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def require_pillow() -> None:
    """Raise a UsageError if Pillow is not installed."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        needed = install("transformers", error, "PIL")
        raise UsageError(f"reading images needs Pillow: {needed}") from error


def decode_image(source: Path | IO[bytes], where: str) -> Any:
    """Decode an image of one of `IMAGE_FORMATS` to a PIL image, rotated by its EXIF data."""
    require_pillow()
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        if isinstance(source, Path):
            check_regular(source)
            # From memory a damaged length reads no more than there is; from a file it is allocated.
            source = BytesIO(source.read_bytes())
        with Image.open(source, formats=IMAGE_FORMATS) as image:
            image.load()
            if image.getexif().get(Image.ExifTags.Base.Orientation, 1) != 1:
                return ImageOps.exif_transpose(image)
            return image
    except (InputError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise InputError(
            f"{where}: the image cannot be read: expected one of {', '.join(IMAGE_FORMATS)}, found "
            "another format or damaged bytes; save it as PNG or JPEG"
        ) from None
    except Exception as error:  # a damaged image can raise anything
        raise InputError(
            f"{where}: the image cannot be read ({error}); save it as PNG or JPEG"
        ) from None


class ImageFolderRows(Rows):
    """One folder of images per class: `image` is a PIL image, `label` the name of the class folder.

    Rows are ordered by class, then by path, both by Unicode code points; deeper folders belong to
    the class at their top. Files without an image's suffix and hidden files are skipped.
    """

    def __init__(self, folder: Path, classes: list[str]) -> None:
        require_pillow()
        self.name = folder.name
        self.columns = ["image", "label"]
        self.classes = sorted(classes)
        self._folder = folder
        self._files = [
            (name, path)
            for name in self.classes
            for path in sorted(filter(is_image, (folder / name).rglob("*")), key=Path.as_posix)
        ]
        if not self._files:
            raise InputError(
                f"{folder}: expected images in the class folders {', '.join(self.classes)}, found "
                "none"
            )
        self._stamps = array.array("q", bytes(16 * len(self._files)))  # 0: not read so far

    def __len__(self) -> int:
        return len(self._files)

    def read_row(self, i: int) -> dict[str, Any]:
        """Return image and label `i`."""
        label, path = self._files[i]
        self._check_unchanged(i)
        return {"image": decode_image(path, f"{path}, row {i + 1}"), "label": label}

    def values(self, column: str) -> Iterator[Any]:
        """Yield one column; labels are read without the images."""
        return (label for label, _ in self._files) if column == "label" else super().values(column)

    def _place(self, i: int) -> str:
        return f"{self.name}/{self._below(self._files[i][1])}, row {i + 1}"

    def _below(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    def label_names(self, column: str) -> list[str] | None:
        """Return the names of the class folders in order."""
        return self.classes if column == "label" else None

    def digest(self) -> str:
        """Return the SHA-256 over JSON lines [path in the folder, file's digest], in row order."""

        def digest(i: int, path: Path) -> str:
            self._check_unchanged(i)
            return file_digest(path)

        files = enumerate(path for _, path in self._files)
        return listing_digest((self._below(path), digest(i, path)) for i, path in files)

    def _check_unchanged(self, i: int) -> None:
        path, seen = self._files[i][1], self._stamps[2 * i : 2 * i + 2]
        if path.exists():  # else it is refused where it is read
            now = array.array("q", stamp(path))
            if any(seen):
                check_unchanged(path, seen, now)
            self._stamps[2 * i : 2 * i + 2] = now
