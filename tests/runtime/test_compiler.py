import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from consolidate.runtime import compiler
from consolidate.runtime.compiler import CompilerError, compiled

THREE = "int number(void) { return 3; }"

needs_a_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "consolidate"


@needs_a_compiler
def test_a_library_is_compiled_once_for_each_source(cache, monkeypatch):
    assert compiled(THREE).number() == 3
    assert compiled(THREE.replace("3", "4")).number() == 4
    assert sorted(path.suffix for path in cache.iterdir()) == [".so", ".so"]
    monkeypatch.setattr(compiler, "_compile", None)
    assert compiled(THREE).number() == 3


@needs_a_compiler
def test_a_compiler_without_openmp_will_do(tmp_path, monkeypatch):
    """As Apple's."""
    lacking = tmp_path / "cc"
    lacking.write_text(
        '#!/bin/sh\ncase "$*" in *-fopenmp*) echo "error: no option -fopenmp" >&2; exit 1;; '
        f'esac\nexec {compiler._compiler()} "$@"\n'
    )
    lacking.chmod(0o755)
    monkeypatch.setenv("CC", str(lacking))
    assert compiled(THREE).number() == 3


@needs_a_compiler
def test_another_processor_has_another_library(cache, monkeypatch):
    compiled(THREE)
    read = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path, **how: "flags: other" if path.name == "cpuinfo" else read(path, **how),
    )
    compiled(THREE)
    assert len([*cache.iterdir()]) == 2


@needs_a_compiler
@pytest.mark.parametrize("size", [100, 4096, 8192])
def test_a_damaged_library_is_compiled_again(cache, size):
    subprocess.run(  # in a process of its own: a library that is loaded stays
        [sys.executable, "-c", f"from consolidate.runtime.compiler import *; compiled({THREE!r})"],
        check=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    (library,) = cache.iterdir()
    library.write_bytes(library.read_bytes()[:size])
    assert compiled(THREE).number() == 3


@needs_a_compiler
def test_a_folder_that_others_can_write_to_is_refused(cache):
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(CompilerError, match="others can write to it"):
        compiled(THREE)
    assert not [*cache.iterdir()]


@needs_a_compiler
def test_the_folder_is_the_users_alone(cache):
    before = os.umask(0)
    try:
        compiled(THREE)
    finally:
        os.umask(before)
    assert cache.stat().st_mode & 0o777 == 0o700


@needs_a_compiler
def test_without_a_home(monkeypatch):
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(CompilerError, match=r"home directory\. Set HOME or XDG_CACHE_HOME"):
        compiled(THREE)


@needs_a_compiler
def test_a_compiler_in_a_folder_with_a_blank_that_writes_latin(cache, monkeypatch, tmp_path):
    script = tmp_path / "my compilers" / "cc"
    script.parent.mkdir()
    script.write_bytes(b"#!/bin/sh\necho '\xe9'\nexec cc \"$@\"\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", f"'{script}'")
    assert compiled(THREE).number() == 3


@needs_a_compiler
def test_the_compilers_error_is_named():
    with pytest.raises(CompilerError, match=r"cc: .*error: .*undefined_name"):
        compiled("int number(void) { return undefined_name; }")


@needs_a_compiler
def test_a_cache_that_cannot_be_written(cache):
    cache.write_text("a file")
    with pytest.raises(CompilerError, match=r"consolidate"):
        compiled(THREE)


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CompilerError, match="there is no C compiler"):
        compiled(THREE)


def test_cc_names_a_compiler(monkeypatch):
    monkeypatch.setenv("CC", "/no/such/compiler -m64")
    with pytest.raises(CompilerError, match=r"^/no/such/compiler does not exist: set CC to"):
        compiled(THREE)
    monkeypatch.setenv("CC", "false")
    with pytest.raises(CompilerError, match="false: exit code 1"):
        compiled(THREE)
