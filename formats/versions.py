"""Versions of the programs that wrote a file."""

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version


def program_versions() -> dict[str, str]:
    """Return the versions of the programs that write a ledger."""
    versions = {"python": platform.python_version()}
    for package in ("consolidate-ewc", "safetensors", "torch", "transformers"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
