"""Versions of the programs that wrote a file."""

import platform
from importlib.metadata import PackageNotFoundError, version


def program_versions() -> dict[str, str]:
    """Give the versions of the programs that write a ledger."""
    versions = {"python": platform.python_version()}
    for package in ("consolidate-ewc", "safetensors", "torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
