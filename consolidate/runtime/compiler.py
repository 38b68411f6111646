"""Shared libraries compiled from C for this processor, and kept for the next time."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_SECONDS = 120  # after which a compiler is hanging
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


class CompilerError(Exception):
    """There is no compiler, or it failed."""


def compiled(source: str) -> ctypes.CDLL:
    """Return the library of a source in C, which the first call on a machine compiles.

    Libraries are kept in `$XDG_CACHE_HOME/consolidate`, by default `~/.cache/consolidate`, under
    names with the digest of the source, the flags, the compiler's version and the processor's
    instructions, so that machines may share the folder.

    Raises:
        CompilerError: There is no compiler, it failed, or its output cannot be stored or loaded.
    """
    command = os.environ.get("CC", "").split() or [_compiler()]
    try:
        version = _run([*command, "--version"])
        library = _folder() / f"{_digest(source, *command, *_FLAGS, version)}.so"
        try:
            return ctypes.CDLL(str(library))
        except OSError:  # It is not there yet, or damaged.
            _compile(command, source, library)
            return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        raise CompilerError(f"{command[0]}: {_reason(error)}") from error


def _compiler() -> str:
    for name in ("cc", "gcc", "clang"):
        if (path := shutil.which(name)) is not None:
            return path
    raise CompilerError("there is no C compiler (cc, gcc or clang; CC names another)")


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "consolidate"


def _digest(*parts: str) -> str:
    try:
        # All cores have the same instructions; clock rates, which differ, are left out.
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
        processor = [line for line in lines if "MHz" not in line and "bogomips" not in line]
    except OSError:
        processor = [platform.machine(), platform.processor()]
    return hashlib.sha256("\0".join([*parts, *processor]).encode()).hexdigest()[:32]


def _compile(command: list[str], source: str, library: Path) -> None:
    """Compile to a file of its own, which replaces what another process wrote meanwhile."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        written = Path(folder, "source.c")
        written.write_text(source, encoding="utf-8")
        _run([*command, *_FLAGS, "-o", str(written.with_suffix(".so")), str(written)])
        written.with_suffix(".so").replace(library)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, check=True, text=True, timeout=_SECONDS)
    return done.stdout


def _reason(error: Exception) -> str:
    """Return the line of a compiler's output that says what is wrong."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.strip().splitlines()
        return next((line for line in lines if "error:" in line), f"exit code {error.returncode}")
    return str(error)
