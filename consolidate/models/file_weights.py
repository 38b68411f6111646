"""A module's current values as the tensors of its weights file, each converted on access."""

from collections.abc import Mapping

from torch import Tensor, nn

from consolidate.models.layout import Layout
from consolidate.runtime.shards import whole
from formats.tensors import LazyTensors, header_of

MOST_KEPT = 4
"""Conversions whose results are cached: a layer's experts take two or three."""


class FileWeights(LazyTensors):
    """A module's values with the names, order, shapes and dtypes of its weights file.

    A tensor with the file's dtype and shape is not copied. A tensor that the file splits, such as
    the experts of a layer, is cached for a while, since its other parts will be read too. A sharded
    module's tensors are gathered: every process must read the same ones.
    """

    def __init__(self, module: nn.Module, layout: Layout, stored: Mapping[str, Tensor]) -> None:
        # The module was loaded from `stored`, and may have been trained since and later.
        self._layout = layout
        self._stored = stored
        self._state: dict[str, Tensor] = {}
        for name, tensor in module.state_dict().items():
            if isinstance(tensor, Tensor) and (own := layout.canonical(name)) is not None:
                self._state.setdefault(own, tensor)
        fresh = (name for name in layout.fresh if name not in stored)
        self.headers = {name: header_of(stored, name) for name in stored}
        self.headers |= {
            name: header_of(self._state, layout.module_names(name)[0]) for name in fresh
        }
        self._kept: dict[tuple[str, ...], tuple[list[int], dict[str, Tensor]]] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.headers:
            raise KeyError(name)
        first = self._layout.duplicates.get(name, name)
        made = self._made(first)
        if name not in self._stored:
            return made[name]
        return made[first].to(self.dtype(name)) if first in made else self._stored[name]

    def _made(self, name: str) -> dict[str, Tensor]:
        """Convert the module's tensors behind one name of the file; without any, return none."""
        names = tuple(n for n in self._layout.module_names(name) if n in self._state)
        parts = {n: whole(self._state[n]) for n in names}
        now = [part._version for part in parts.values()]  # counts the changes of its values
        versions, made = self._kept.get(names, ([], {}))
        if versions != now:
            made = self._layout.to_file(parts)
        if len(made) > 1:
            self._kept[names] = now, made
            if len(self._kept) > MOST_KEPT:
                del self._kept[next(iter(self._kept))]
        return made
