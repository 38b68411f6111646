"""Task data by name: the rows of a file, a folder or a Hub dataset."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from formats.errors import InputError, NetworkError, UsageError
from formats.hub_dataset import is_hub_id, is_saved_dataset, open_hub, open_saved
from formats.image_folder import ImageFolderRows, is_image
from formats.parquet_rows import ParquetRows
from formats.rows import JoinedRows, Rows, check_regular
from formats.tensor_rows import TensorRows
from formats.text_rows import CsvRows, JsonLinesRows, open_json
from formats.wording import neighbours, suggestion

__all__ = ["DATA_SUFFIXES", "Rows", "open_data"]

_KINDS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": JsonLinesRows,
    ".json": open_json,
    ".csv": partial(CsvRows, delimiter=","),
    ".tsv": partial(CsvRows, delimiter="\t"),
    ".parquet": ParquetRows,
    ".safetensors": TensorRows,
    ".npz": TensorRows,
}
DATA_SUFFIXES = tuple(_KINDS)
_SPLITS = (
    *("train", "training", "validation", "valid", "val", "dev"),
    *("eval", "evaluation", "test", "testing", "holdout"),
)
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def open_data(
    spec: str | Path,
    *,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
) -> Rows:
    """Open the data of a task: a file or folder, or a Hub dataset if no such path exists."""
    path = Path(spec).expanduser()
    if not path.exists():
        if path.is_symlink():
            raise InputError(f"{spec} is a broken link; correct what it points to")
        if isinstance(spec, str) and not _looks_like_file(path) and is_hub_id(spec):
            try:
                return open_hub(spec, split=split, subset=subset, revision=revision)
            except (InputError, NetworkError) as error:
                raise type(error)(f"{error}{_near(path)}") from error
        lost = "" if path.parent.is_dir() else f": there is no folder {path.parent}"
        raise InputError(f"{spec} does not exist{lost}{_near(path) or '; check the path'}")
    for option, value in (("subset", subset), ("revision", revision)):
        if value is not None:
            raise UsageError(
                f"{spec} is local, and {option} is for datasets on the Hub; leave out "
                f"{option} = {value!r}"
            )
    try:
        if path.is_dir():
            return _open_folder(path, split)
        if split is not None:
            raise UsageError(f"{spec} is a file and has no splits; leave out split = {split!r}")
        return _open_file(path)
    except OSError as error:
        raise InputError(f"{error.filename or spec} cannot be read: {error.strerror}") from error


def _looks_like_file(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix in DATA_SUFFIXES or (len(path.parts) == 1 and suffix[1:].isalpha())


def _near(path: Path) -> str:
    return suggestion(neighbours(path))


def _open_file(path: Path) -> Rows:
    if (kind := _KINDS.get(path.suffix.lower())) is not None:
        return kind(check_regular(path))
    raise InputError(
        f"{path}: unknown kind of data: expected one of {', '.join(DATA_SUFFIXES)}, or a folder of "
        f"images by class, found {path.suffix or 'no suffix'}"
    )


def _open_folder(folder: Path, split: str | None) -> Rows:
    folder = folder.resolve()  # so that "." has a name
    if is_saved_dataset(folder):
        return open_saved(folder, split=split)
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [
        entry
        for entry in entries
        if entry.suffix.lower() in DATA_SUFFIXES and entry.name not in _NOT_DATA and entry.is_file()
    ]
    inner = [entry for entry in entries if entry.is_dir()]
    if split is not None:
        return _open_split(folder, split, files, inner)
    named = (name for file in files for name in _SPLITS if _belongs(file.stem.lower(), name))
    splits = list(dict.fromkeys(named))
    if not files and all(entry.name.lower() in _SPLITS for entry in inner):
        splits = [entry.name for entry in inner]
    if len(splits) > 1:
        names = ", ".join(splits)
        raise InputError(f"{folder} contains several splits; set split to one of: {names}")
    if splits and (others := [f.name for f in files if not _belongs(f.stem.lower(), splits[0])]):
        raise InputError(
            f"{folder} contains the split {splits[0]} and other files, as {others[0]}; set split "
            "to it, or move the others away"
        )
    if files:
        return _open_files(folder, files)
    if splits:
        return _open_folder(inner[0], None)
    classes = [entry.name for entry in inner if any(is_image(file) for file in entry.rglob("*"))]
    if classes:
        return ImageFolderRows(folder, classes)
    if any(is_image(entry) for entry in entries):
        raise InputError(
            f"{folder} contains images but no class folders; put the images of each class into a "
            "folder with the name of the class"
        )
    found = ", ".join(entry.name for entry in entries[:8]) or "nothing"
    raise InputError(
        f"{folder} contains no data: expected files of one kind ({', '.join(DATA_SUFFIXES)}) or "
        f"one folder of images for each class, found {found}"
    )


def _belongs(stem: str, split: str) -> bool:
    return stem == split or stem.startswith((f"{split}-", f"{split}_", f"{split}."))


def _open_split(folder: Path, split: str, files: Sequence[Path], inner: Sequence[Path]) -> Rows:
    for entry in inner:
        if entry.name == split:
            return _open_folder(entry, None)
    if chosen := [file for file in files if _belongs(file.stem.lower(), split.lower())]:
        return _open_files(folder, chosen)
    names = ", ".join([*(file.name for file in files), *(entry.name for entry in inner)])
    raise InputError(
        f"{folder} has no split {split!r}: expected a folder of that name or files that begin with "
        f"it, found {names or 'nothing'}"
    )


def _open_files(folder: Path, files: Sequence[Path]) -> Rows:
    kinds = sorted({file.suffix.lower() for file in files})
    if len(kinds) > 1:
        raise InputError(
            f"{folder} contains files of several kinds ({', '.join(kinds)}); name one file, or put "
            "the files of one kind into a separate folder"
        )
    return JoinedRows(folder, [_open_file(file) for file in files])
