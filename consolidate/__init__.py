"""Elastic Weight Consolidation for checkpoints: measure the Fisher, store it, train with it.

The public names are in ``__init__.pyi``. Each is imported when it is first used, so that
`consolidate --help` does not wait for torch.
"""

import ast
from importlib import import_module
from pkgutil import get_data
from typing import Any

_HOMES = {
    alias.name: str(node.module)
    for node in ast.parse(get_data(__name__, "__init__.pyi") or b"").body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(_HOMES)

try:
    import formats.errors  # noqa: F401
except ImportError:
    raise ImportError(
        "another package or file named 'formats' on sys.path hides that of consolidate-ewc: "
        "rename it, or run from another folder"
    ) from None


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'consolidate' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
