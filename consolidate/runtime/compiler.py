"""Shared libraries compiled from C for this processor, and kept for the next time."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

_SECONDS = 120  # after which a compiler is hanging
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")
_THREADS = "-fopenmp"  # which Apple's compiler lacks: one thread then


class CompilerError(Exception):
    """There is no compiler, it failed, or there is no place for what it makes."""


def compiled(source: str) -> ctypes.CDLL:
    """Return the library of a source in C, which the first call on a machine compiles.

    Libraries are kept in `$XDG_CACHE_HOME/consolidate`, by default `~/.cache/consolidate`, which
    nobody else may write to. A file name has two digests: of source, flags, compiler and the
    processor's instructions, so that machines can share the folder; and of the file, which shows
    damage.

    Raises:
        CompilerError: There is no compiler, it failed, or its output cannot be kept or loaded.
    """
    try:
        command = shlex.split(os.environ.get("CC", "")) or [_compiler()]
        folder = _folder()
        made_by = [source, *command, *_FLAGS, _run([*command, "--version"]), *_processor()]
        key = _digest("\0".join(made_by).encode(errors="surrogateescape"))
        for library in folder.glob(f"{key}-*.so"):
            if library.stem == f"{key}-{_digest(library.read_bytes())}":
                return ctypes.CDLL(str(library))
        return ctypes.CDLL(str(_compile(command, source, folder, key)))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise CompilerError(_reason(error)) from error


def _compiler() -> str:
    for name in ("cc", "gcc", "clang"):
        if (path := shutil.which(name)) is not None:
            return path
    raise CompilerError("there is no C compiler (cc, gcc or clang; CC names another)")


def _folder() -> Path:
    """Return the folder of libraries, made if need be; refuse one that others can write to."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = (cache if cache.is_absolute() else Path.home() / ".cache") / "consolidate"
    except RuntimeError as error:
        raise CompilerError(f"{error} Set HOME or XDG_CACHE_HOME") from error
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CompilerError(
            f"{folder} is another user's, or others can write to it; use a folder of your own "
            "(XDG_CACHE_HOME)"
        )
    return folder


def _processor() -> list[str]:
    """Describe the processor's instructions, which are those of its first core."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return [platform.machine(), platform.processor()]
    lines = text.split("\n\n", 1)[0].splitlines()
    return [line for line in lines if "MHz" not in line and "bogomips" not in line]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _compile(command: list[str], source: str, folder: Path, key: str) -> Path:
    """Compile to a folder of its own; the file replaces what another process wrote meanwhile."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        written = Path(temporary, "source.c")
        written.write_text(source, encoding="utf-8")
        made = written.with_suffix(".so")
        try:
            _run([*command, *_FLAGS, _THREADS, "-o", str(made), str(written)])
        except subprocess.CalledProcessError as error:
            if _THREADS not in error.stderr:
                raise
            _run([*command, *_FLAGS, "-o", str(made), str(written)])
        return made.replace(folder / f"{key}-{_digest(made.read_bytes())}.so")


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        encoding="utf-8",
        errors="replace",
        timeout=_SECONDS,
        env={**os.environ, "LC_ALL": "C"},  # for `_reason`
    )
    return done.stdout


def _reason(error: Exception) -> str:
    """Return what is wrong, of a compiler's output the line that says it."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.strip().splitlines()
        why = next((line for line in lines if "error:" in line), f"exit code {error.returncode}")
        return f"{error.cmd[0]}: {why}"
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} does not exist: set CC to a C compiler"
    return str(error)
