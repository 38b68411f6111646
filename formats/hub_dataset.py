"""Rows of datasets from the Hugging Face Hub or saved on disk, through the `datasets` library."""

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from formats.errors import ConsolidateError, InputError, NetworkError, UsageError, install
from formats.image_folder import decode_image
from formats.rows import Rows
from formats.wording import first_line

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def is_hub_id(spec: str) -> bool:
    """Return whether `spec` has the form of a Hub dataset's id: `user/name`, or a single name."""
    return _ID.fullmatch(spec) is not None and ".." not in spec


class HubRows(Rows):
    """The rows of one split, memory-mapped by `datasets`.

    Images are decoded here, not by `datasets`, which would read any format that Pillow knows.
    Audio, video and other files are returned as stored.
    """

    fills_in = True

    def __init__(self, dataset: Any, name: str) -> None:
        self.name = name
        self.columns = list(dataset.column_names)
        self._dataset = dataset.with_format("arrow")
        if not len(dataset) or not self.columns:
            raise InputError(f"{name} is empty: expected at least one row")

    def __len__(self) -> int:
        return len(self._dataset)

    def read_row(self, i: int) -> dict[str, Any]:
        """Return row `i`."""
        try:
            row = self._dataset[i].to_pylist()[0]
            return {
                name: _decoded(row[name], feature, self.where(i, name))
                for name, feature in self._dataset.features.items()
            }
        except (OSError, ValueError) as error:
            raise InputError(f"{self.where(i)} cannot be read ({first_line(error)})") from None

    def values(self, column: str) -> Iterator[Any]:
        """Yield one column; the others are not decoded."""
        if column not in self.columns:
            return super().values(column)
        only = HubRows(self._dataset.select_columns([column]), self.name)
        return (only.read_row(i)[column] for i in range(len(only)))

    def label_names(self, column: str) -> list[str] | None:
        """Return the names of a ClassLabel column, or of a list of them."""
        feature = self._dataset.features.get(column)
        names = getattr(getattr(feature, "feature", feature), "names", None)
        return None if names is None else list(names)

    def beside_digest(self) -> dict[str, Any]:
        """Name the classes, of which the rows have the numbers."""
        names = {at: names for at in self.columns if (names := self.label_names(at)) is not None}
        return {"classes": names} if names else {}

    def digest(self) -> str:
        """Return the SHA-256 over the rows as JSON lines with sorted keys.

        Bytes (images, audio) enter as their SHA-256, without the name of their file, so that the
        digest depends neither on the cache's path nor on how the data are sharded.
        """
        dataset = self._dataset
        for name, feature in dataset.features.items():
            if isinstance(getattr(feature, "decode", None), bool):
                stored = dataclasses.replace(feature, decode=False)
                dataset = dataset.cast_column(name, stored)
        total = hashlib.sha256()
        for table in dataset:
            (row,) = table.to_pylist()
            line = json.dumps(_plain(row), sort_keys=True, ensure_ascii=False)
            total.update(line.encode("utf-8", "surrogatepass") + b"\n")
        return total.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        if value.keys() == {"bytes", "path"}:
            content = value["bytes"]
            if content is None and value["path"] is not None:
                content = Path(value["path"]).read_bytes()
            return _plain(content)
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)


def _decoded(value: Any, feature: Any, where: str) -> Any:
    """Decode a stored value, with images and JSON inside lists and structs."""
    if value is None:
        return None
    if isinstance(feature, Mapping):
        return {name: _decoded(value[name], inner, where) for name, inner in feature.items()}
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if inner is not None:
        return [_decoded(one, inner, where) for one in value]
    kind = type(feature).__name__ if getattr(feature, "decode", False) else ""
    if kind == "Json":
        return feature.decode_example(value)
    if kind == "Image":
        image = decode_image(_stored(value), where)
        return image if feature.mode in (None, image.mode) else image.convert(feature.mode)
    return value


def _stored(image: Mapping[str, Any]) -> Path | io.BytesIO:
    """Return the file or the bytes of an image as `datasets` stores it."""
    from datasets.utils.file_utils import is_local_path, xopen

    content, path = image["bytes"], image["path"]
    if content is None and path is None:
        raise ValueError("expected an image with bytes or a path, found neither")
    if content is None and is_local_path(path):
        return Path(path)
    if content is None:
        with xopen(path, "rb") as file:
            content = file.read()
    return io.BytesIO(content)


def open_hub(
    name: str, *, split: str | None = None, subset: str | None = None, revision: str | None = None
) -> HubRows:
    """Open a split of a Hub dataset, without the network if it is in the cache.

    `name` may also be a local folder that `datasets.load_dataset` understands; `split` may be a
    slice such as `train[:1000]`, or None if there is only one; `subset` is also known as config.
    """
    what = name if Path(name).exists() else f"{name} is no file or folder; as a dataset of the Hub"
    datasets = _import_datasets(what)
    from formats.hub_errors import limit_waiting

    limit_waiting()
    try:
        commit = None if revision is None else _commit(name, revision)
        loaded = datasets.load_dataset(name, subset, split=split, revision=commit)
    except ConsolidateError:
        raise
    except Exception as error:
        raise _explained(error, name, split, revision) from error
    dataset = _one_split(loaded, name, None)
    # datasets falls back to any version in the cache; its folders are named by the commit
    if commit is not None and not all(commit in file["filename"] for file in dataset.cache_files):
        missing = f"{name}: revision {revision} is not in the cache of datasets, and "
        advice = "or leave out the revision to use the cache"
        if datasets.config.HF_HUB_OFFLINE:
            raise InputError(f"{missing}HF_HUB_OFFLINE disables the Hub; unset it, {advice}")
        raise NetworkError(f"{missing}the Hub did not provide it; try again later, {advice}")
    return HubRows(dataset, name)


def _commit(name: str, revision: str) -> str:
    """Return the commit of a branch or tag; a commit is returned as it is."""
    import datasets
    from huggingface_hub import HfApi

    from formats.hub_errors import commit_in

    if _COMMIT.fullmatch(revision):
        return revision
    if datasets.config.HF_HUB_OFFLINE:
        raise InputError(
            f"{name}: revision {revision!r} cannot be looked up, because HF_HUB_OFFLINE disables "
            "the Hub; name the commit, or leave out the revision"
        )
    info = HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(name, revision=revision)
    return commit_in(f"{name}: ", info)


def is_saved_dataset(folder: Path) -> bool:
    """Return whether `datasets` wrote the folder with `save_to_disk`."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def open_saved(folder: Path, *, split: str | None = None) -> HubRows:
    """Open a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    datasets = _import_datasets(str(folder))
    try:
        loaded = datasets.load_from_disk(folder)
        for rows in loaded.values() if isinstance(loaded, dict) else [loaded]:
            rows.data.validate(full=True)  # damaged offsets would be read beyond the memory
    except Exception as error:
        raise InputError(
            f"{folder} cannot be opened as a dataset saved by datasets ({first_line(error)}); save "
            "it again"
        ) from error
    if split is not None and not isinstance(loaded, dict):
        raise UsageError(
            f"{folder} contains one dataset without splits; leave out split = {split!r}"
        )
    return HubRows(_one_split(loaded, str(folder), split), folder.name)


def _import_datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        needed = install("datasets", error)
        raise UsageError(f"{what}: reading it needs datasets: {needed}") from error
    return datasets


def _one_split(loaded: Any, name: str, split: str | None) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    splits = list(loaded)
    if split is None and len(splits) == 1:
        return loaded[splits[0]]
    if split in loaded:
        return loaded[split]
    what = "it has several splits" if split is None else f"there is no split {split!r}"
    raise InputError(f"{name}: {what}; set split to one of: {', '.join(splits)}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explained(
    error: Exception, name: str, split: str | None, revision: str | None
) -> ConsolidateError:
    """Translate an error of `datasets` into one of this program."""
    import datasets
    from huggingface_hub.errors import RepositoryNotFoundError

    from formats.hub_errors import AccessError, explain

    first = first_line(error).rstrip(".")
    meanings = [meaning for cause in _chain(error) if (meaning := explain(cause, revision))]
    reasons = {type(meaning): meaning for meaning in reversed(meanings)}  # the first of its kind
    if AccessError in reasons:
        return AccessError(f"{name}: {reasons[AccessError]}")
    not_found = datasets.exceptions.DatasetNotFoundError | RepositoryNotFoundError
    if isinstance(error, not_found):
        return InputError(
            f"{name} is neither a local file nor a readable dataset on the Hub ({first}); check "
            "the name, or log in with `hf auth login`"
        )
    if NetworkError in reasons:
        if datasets.config.HF_HUB_OFFLINE:
            return InputError(
                f"{name} is neither a local file nor in the cache of datasets, and HF_HUB_OFFLINE "
                "disables the Hub; fetch it once while online, or name a local file"
            )
        return NetworkError(
            f"{name} is not a local file, and {reasons[NetworkError]}; "
            "try again later, or name a local file"
        )
    if (meaning := explain(error, revision)) is not None:
        return type(meaning)(f"{name}: {meaning}")
    available = re.search(r"Should be one of (\[.*\])|Available splits: (\[.*\])", str(error))
    if split is not None and available:
        names = re.findall(r"'([^']+)'", available[0])
        return InputError(
            f"{name}: there is no split {split!r}; set split to one of: {', '.join(names)}"
        )
    if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
        names = re.findall(r"'([^']+)'", str(error).partition("[")[2].partition("]")[0])
        return InputError(
            f"{name} has several subsets; set subset in a task.toml to one of: {', '.join(names)}"
        )
    return InputError(f"{name} cannot be read as a dataset ({first})")
