"""Builds the sdist and the wheel of the current commit in dist/, and checks both.

Both are built twice, in fresh copies of the commit that differ in folder, umask, time zone and hash
seed; the bytes must be equal. `twine check` reads their metadata. The sdist must hold the files of
the commit, the wheel the two packages. `--smoke` also installs the wheel into an empty environment
and runs scripts/smoke.py there. The tools have the versions of the dependency group `release`; the
bytes depend on them, and on Python's zlib. Needs git and Python 3.11 or newer, nothing else.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Of the commit, but not in the sdist: what serves the repository alone.
NOT_IN_SDIST = (".ci/", ".gitattributes", ".github/", ".pre-commit-config.yaml")
MADE = {"PKG-INFO"}  # in the sdist, but not of the commit
IN_WHEEL = ("consolidate/", "formats/")
SURROUNDINGS = (
    (0o022, {"TZ": "UTC", "PYTHONHASHSEED": "1", "LC_ALL": "C"}),
    (0o077, {"TZ": "Asia/Tokyo", "PYTHONHASHSEED": "2", "LC_ALL": "C.UTF-8"}),
)


def main() -> None:
    """Build, check, and copy the two files to dist/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--smoke", action="store_true", help="install the wheel and run smoke.py")
    parser.add_argument("--bill", type=Path, help="with --smoke: write a bill of materials here")
    parser.add_argument("--tag", help="of the release: v and the version that the changelog names")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="instead of dist/")
    options = parser.parse_args()
    if options.bill and not options.smoke:
        parser.error("--bill lists the environment that --smoke makes")
    if options.tag:
        check_tag(options.tag)
    changed = git("status", "--porcelain").strip()
    if changed:
        print(f"Not in the commit, so not built:\n{changed}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="consolidate-build-") as folder:
        work = Path(folder)
        tools = make_environment(work / "tools", "--group", f"{ROOT / 'pyproject.toml'}:release")
        first, second = (
            build(tools, work / f"{number}{'-' * number}", umask, variables)
            for number, (umask, variables) in enumerate(SURROUNDINGS)
        )
        compare(first, second)
        run(tools, "-m", "twine", "check", "--strict", *sorted(map(str, first.iterdir())))
        check_sdist(next(first.glob("*.tar.gz")))
        wheel = next(first.glob("*.whl"))
        check_wheel(wheel)
        if options.smoke:
            empty = make_environment(work / "empty", str(wheel))
            run(empty, "-I", str(ROOT / "scripts" / "smoke.py"), cwd=work)
            if options.bill:
                write_bill(tools, empty, options.bill)
        options.output.mkdir(parents=True, exist_ok=True)
        for path in sorted(first.iterdir()):
            (options.output / path.name).write_bytes(path.read_bytes())
            print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}")


def git(*arguments: str) -> str:
    """Run git in the repository."""
    return subprocess.check_output(["git", "-C", str(ROOT), *arguments], text=True)


def run(python: Path, *arguments: str, cwd: Path | None = None) -> None:
    """Run an interpreter; stop where it fails."""
    done = subprocess.run([python, *arguments], cwd=cwd)
    if done.returncode:
        sys.exit(f"scripts/build: failed: python {' '.join(arguments[:3])}")


def make_environment(folder: Path, *packages: str) -> Path:
    """Make an environment with these packages, and return its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "pip>=25.1")
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages)
    return python


def build(tools: Path, folder: Path, umask: int, variables: dict[str, str]) -> Path:
    """Build the sdist, and the wheel from it, in a fresh copy of the commit."""
    folder.mkdir()
    archive, source, output = (folder / name for name in ("commit.tar", "source", "built"))
    git("archive", f"--output={archive}", "HEAD")
    source.mkdir()
    environment = os.environ | variables | {"SOURCE_DATE_EPOCH": commit_time()}
    for command in (
        ["tar", "-xf", str(archive), "-C", str(source)],
        [str(tools), "-m", "build", "--no-isolation", "--outdir", str(output), str(source)],
    ):
        done = subprocess.run(command, env=environment, umask=umask, text=True, capture_output=True)
        if done.returncode:
            sys.exit(f"scripts/build: failed:\n{done.stdout}{done.stderr}")
    return output


def commit_time() -> str:
    """Return the time of the commit, in seconds: what every file in the archives is dated."""
    return git("log", "-1", "--format=%ct").strip()


def compare(first: Path, second: Path) -> None:
    """Stop where the two builds are not the same files with the same bytes."""
    names = {path.name for path in first.iterdir()}
    if len(names) != 2 or names != {path.name for path in second.iterdir()}:
        sys.exit(f"scripts/build: expected an sdist and a wheel, found {sorted(names)}")
    for name in sorted(names):
        if (first / name).read_bytes() != (second / name).read_bytes():
            sys.exit(f"scripts/build: {name} differs between two builds of one commit")
    print("Built twice, the same bytes.")


def check_sdist(path: Path) -> None:
    """Stop where the sdist holds anything but the files of the commit, or lacks one."""
    with tarfile.open(path) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()} - MADE
    listed = git("ls-tree", "-r", "-z", "--name-only", "HEAD").split("\0")
    expected = {name for name in listed if name and not name.startswith(NOT_IN_SDIST)}
    if found != expected:
        sys.exit(
            f"scripts/build: {path.name} has {sorted(found - expected)[:5]} that it should not "
            f"have, and lacks {sorted(expected - found)[:5]}; see [tool.hatch] in pyproject.toml"
        )
    print(f"{path.name}: {len(found)} files of the commit, {path.stat().st_size:,} bytes")


def check_wheel(path: Path) -> None:
    """Stop where the wheel is not pure, or holds anything but the packages and their metadata."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        metadata = next(name for name in names if name.endswith(".dist-info/WHEEL"))
        pure = "Root-Is-Purelib: true" in archive.read(metadata).decode().splitlines()
    places = (*IN_WHEEL, f"{metadata.partition('/')[0]}/")
    strange = [name for name in names if not name.startswith(places)]
    listed = git("ls-tree", "-r", "-z", "--name-only", "HEAD", *IN_WHEEL).split("\0")
    missing = sorted({name for name in listed if name} - set(names))
    if strange or missing or not pure or not path.name.endswith("-py3-none-any.whl"):
        sys.exit(
            f"scripts/build: {path.name}: pure: {pure}, strange: {strange}, missing: {missing}"
        )
    print(f"{path.name}: pure, {len(names)} files, {path.stat().st_size:,} bytes")


def check_tag(tag: str) -> None:
    """Stop where a tag is not the version, or the changelog has no section for it."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    if tag != f"v{version}":
        sys.exit(f"scripts/build: the tag is {tag}, the version in pyproject.toml {version}")
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    if not re.search(rf"^## \[{re.escape(version)}\] – \d{{4}}-\d\d-\d\d$", changes, re.M):
        sys.exit(f"scripts/build: CHANGELOG.md has no section [{version}] with the release's date")


def write_bill(tools: Path, empty: Path, path: Path) -> None:
    """Write the CycloneDX bill of materials of an environment: each package with its version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    run(
        tools,
        *("-m", "cyclonedx_py", "environment", "--output-reproducible", "--output-format", "JSON"),
        *("--pyproject", str(ROOT / "pyproject.toml"), "--output-file", str(path), str(empty)),
    )
    found = json.loads(path.read_text("utf-8"))
    print(f"{path.name}: CycloneDX {found['specVersion']}, {len(found['components'])} packages")


if __name__ == "__main__":
    main()
