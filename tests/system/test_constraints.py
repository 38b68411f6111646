"""constraints.txt: what was tested fits what pyproject.toml asks for, and is what is installed."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
LINES = (ROOT / "constraints.txt").read_text("utf-8").splitlines()[1:]
VERSIONS = {canonicalize_name(name): version for name, version in (x.split("==") for x in LINES)}


def requirements() -> list[Requirement]:
    groups = PROJECT["dependency-groups"]  # what builds a release is pinned there, not installed
    lists = [PROJECT["project"]["dependencies"], groups["dev"], groups["games"]]
    lists += PROJECT["project"]["optional-dependencies"].values()
    lists.append(re.findall(r"'([a-z-]+>=[^']+)'", (ROOT / "scripts/environment").read_text()))
    # What is not a text includes another group.
    found = [Requirement(text) for texts in lists for text in texts if isinstance(text, str)]
    return [one for one in found if one.name not in (PROJECT["project"]["name"], "pip")]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_what_was_tested_fits_what_is_asked_for(requirement: Requirement) -> None:
    assert requirement.specifier.contains(VERSIONS[canonicalize_name(requirement.name)])


def test_every_line_names_one_public_version() -> None:
    assert len(VERSIONS) == len(LINES)
    assert all(re.fullmatch(r"[\w.-]+==[0-9][0-9a-z.]*", line) for line in LINES)
    assert not VERSIONS.keys() & {"pip", "setuptools", "wheel", PROJECT["project"]["name"]}


PYTHON = f"""#!/usr/bin/env bash
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip list "*) printf 'torch==2.13.0+cpu\\nclick==8.5.1\\n' ;;
    "-m pip "*) echo "$*" >> pip.log ;;
    "- "*) exec {shlex.quote(sys.executable)} "$@" ;;
esac
"""


def test_what_is_installed_is_what_was_tested(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/environment", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    log = tmp_path / "pip.log"

    def installs(profile: str) -> list[str]:
        log.write_text("")
        environment = {"PYTHON": str(python), "PATH": "/usr/bin:/bin"}
        command = [tmp_path / "scripts" / "environment", profile]
        subprocess.run(command, check=True, env=environment, capture_output=True)
        return [line for line in log.read_text().splitlines() if " -e " in line]

    for profile in ("dev", "quickstart"):
        (install,) = installs(profile)
        assert " -c constraints.txt -e " in install
        assert not installs(profile)
    with (tmp_path / "constraints.txt").open("a") as file:
        file.write("more==1\n")
    assert installs("dev")
    assert installs("quickstart")

    (install,) = installs("renew")
    assert "constraints.txt" not in install
    _, *lines = (tmp_path / "constraints.txt").read_text().splitlines()
    assert lines == ["torch==2.13.0", "click==8.5.1"]
    assert installs("dev")
