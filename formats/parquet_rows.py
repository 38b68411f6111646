"""Rows of a Parquet file, read by row group."""

import bisect
import io
import itertools
import json
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from formats.errors import InputError, UsageError, install
from formats.image_folder import decode_image
from formats.rows import Rows, check_unchanged, stamp
from formats.wording import first_line

_CACHE_BYTES = 256 * 2**20


class ParquetRows(Rows):
    """The rows of a Parquet file as Python values.

    The row groups used last stay in memory, up to 256 MiB or a single larger one. Columns of
    structs {bytes, path}, as `datasets` stores images, are decoded to PIL images.
    """

    fills_in = True

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            needed = install("datasets", error, "pyarrow")
            raise UsageError(f"{path}: reading it needs pyarrow: {needed}") from error

        self.name, self.path, self._stamp = path.name, path, stamp(path)
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                schema = file.schema_arrow
                groups = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise InputError(
                f"{path} is not valid Parquet ({first_line(error)}); check that it was copied in "
                "full"
            ) from None
        self.columns = list(schema.names)
        for name, times in Counter(self.columns).most_common(1):
            if times > 1:
                raise InputError(f"{path}: two columns are named {name!r}; rename one of them")
        self._starts = list(itertools.accumulate(groups, initial=0))
        if not len(self):
            raise InputError(f"{path} is empty: expected at least one row")
        self._images = [
            field.name
            for field in schema
            if pyarrow.types.is_struct(field.type)
            and {inner.name for inner in field.type.fields} == {"bytes", "path"}
        ]
        self._features = _features(schema.metadata)
        self._cache: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def _group(self, g: int) -> Any:
        import pyarrow
        import pyarrow.parquet

        # popped and stored again, since another thread may have evicted it in between
        table = self._cache.pop(g, None)
        if table is None:
            try:
                check_unchanged(self.path, self._stamp, stamp(self.path))
                with pyarrow.parquet.ParquetFile(self.path) as file:
                    table = file.read_row_group(g)
                table.validate(full=True)
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                raise InputError(
                    f"{self.path}: row group {g + 1} is damaged ({first_line(error)}); check that "
                    "the file was copied in full"
                ) from None
        self._cache[g] = table
        while len(self._cache) > 1 and sum(t.nbytes for t in self._cache.values()) > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return table

    def read_row(self, i: int) -> dict[str, Any]:
        """Return row `i`."""
        g = bisect.bisect_right(self._starts, i) - 1
        row: dict[str, Any] = self._group(g).slice(i - self._starts[g], 1).to_pylist()[0]
        for column in self._images:
            stored = row[column]
            if stored is not None and stored["bytes"] is not None:
                row[column] = decode_image(io.BytesIO(stored["bytes"]), self.where(i, column))
        return row

    def values(self, column: str) -> Iterator[Any]:
        """Yield one column, without decoding the images of others."""
        if column in self._images or column not in self.columns:
            return super().values(column)
        groups = (self._group(g).column(column) for g in range(len(self._starts) - 1))
        return (value.as_py() for group in groups for value in group)

    def label_names(self, column: str) -> list[str] | None:
        """Return the class names that `datasets` wrote beside the column."""
        feature = self._features.get(column)
        while isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
            feature = feature["feature"]  # a list of class ids, as for the words of a sentence
        return feature.get("names") if isinstance(feature, dict) else None


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """Return the feature descriptions `datasets` keeps in a schema's metadata, or nothing."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}
