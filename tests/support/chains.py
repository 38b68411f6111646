"""Chains of tasks, learned one after the other."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from consolidate.api import finetune, fisher
from formats.fisher_folder import StoredFisher, read_fisher
from support.networks import FAST, NETWORK


class Tasks:
    """Learn one task after another, each into a folder of its name; measure each alone."""

    def __init__(self, start: Path, write: Callable[..., Path], folder: Path, **measured: Any):
        """Begin at a checkpoint; `measured` says how the first Fisher and each alone are."""
        self.last, self.write, self.folder, self.measured = start, write, folder, measured
        self.learned: list[Path] = []

    def learn(self, name: str, *, count: int = 60, **options: Any) -> dict[str, Any]:
        data = self.write(name, seed=len(self.learned), count=count)
        how = {"ewc_lambda": 10.0} if self.learned else {"penalty": "none", **self.measured}
        out = self.folder / name
        result = finetune(self.last, data, output_dir=out, epochs=2, **FAST, **(how | options))
        self.last = out
        self.learned.append(out)
        return result

    def alone(self, name: str) -> StoredFisher:
        """The Fisher of this task only, at the weights after it."""
        out = self.folder / f"{name}-alone"
        shutil.copytree(self.folder / name, out, ignore=shutil.ignore_patterns("fisher"))
        fisher(out, self.folder / f"{name}.npz", **NETWORK, **self.measured)
        return read_fisher(out / "fisher")

    @property
    def stored(self) -> StoredFisher:
        return read_fisher(self.last / "fisher")
