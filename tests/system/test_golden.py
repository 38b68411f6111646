"""Golden checkpoints: they load, they verify, and today's writer makes the same bytes."""

import io
import os
import runpy
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

from consolidate.api import show, verify
from consolidate.views.summary import show_text
from formats.checkpoint import open_checkpoint
from formats.fisher_folder import check_belongs, read_fisher
from formats.fisher_json import needed_version
from support.folders import contents

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
FIRST = ["adapter", "anchor", "bfloat16", "made-from", "sharded", "unsharded"]
SECOND = ["version-2", "version-2-factors", "version-2-task"]
NAMES = FIRST + SECOND
WRITE = runpy.run_path(str(ROOT / "scripts" / "write_golden.py"))


@pytest.mark.skipif(not (ROOT / ".gitattributes").exists(), reason="not in the sdist")
@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_changes_no_line_end(tmp_path: Path) -> None:
    """Else a checkout with core.autocrlf has other golden files, and builds other wheels."""
    (tmp_path / ".gitattributes").write_bytes((ROOT / ".gitattributes").read_bytes())
    (tmp_path / "card.md").write_bytes(b"a\nb\n")
    words = ["-c", "core.autocrlf=true", "-c", "user.name=a", "-c", "user.email=a@b"]
    own = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run(["git", *words, *command], cwd=tmp_path, check=True, env=own)
    archiving = ["git", *words, "archive", "HEAD", "card.md"]
    built = subprocess.check_output(archiving, cwd=tmp_path, env=own)
    with tarfile.open(fileobj=io.BytesIO(built)) as archive:
        card = archive.extractfile("card.md")
        assert card is not None
        assert card.read() == b"a\nb\n"


def test_none_is_forgotten() -> None:
    assert sorted(path.name for path in GOLDEN.iterdir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_and_verifies(name: str) -> None:
    checkpoint = open_checkpoint(GOLDEN / name)
    stored = read_fisher(GOLDEN / name / "fisher")
    check_belongs(stored, checkpoint.weights, name)
    for key, values in WRITE["fisher"]().items():
        torch.testing.assert_close(stored.fisher[key].float(), values, rtol=2**-8, atol=0)
        if name != "bfloat16":
            assert torch.equal(stored.fisher[key], values)
    assert (stored.anchor is not None) == (name in ("anchor", "sharded", "version-2-factors"))
    if stored.anchor is not None:
        for key in stored.fisher:
            assert torch.equal(stored.anchor[key], checkpoint.weights[key] / 2)
    assert (stored.ledger.base is None) == (checkpoint.adapter is None) == (name != "adapter")
    assert (stored.factors is not None) == (name in ("version-2", "version-2-factors"))
    if stored.factors is not None:
        assert len(stored.factors.files) == (2 if name == "version-2" else 1)
        made = "factors" if name == "version-2" else "input_factors"
        for key, values in WRITE[made]()[0].items():
            assert torch.equal(stored.factors[key], values)
    assert (stored.factor_anchor is not None) == (name == "version-2-factors")
    if stored.factor_anchor is not None:
        assert stored.ledger.factor_offset == 0.046875
        for key in ("hidden.weight", "hidden.bias", "output.weight"):
            assert torch.equal(stored.factor_anchor[key], checkpoint.weights[key] / 8)
    assert needed_version(stored.ledger) == (1 if name in FIRST else 2)
    assert list(stored.heads) == (["digits"] if name == "anchor" else [])
    assert verify(GOLDEN / name)["weights"]["tensors"] == 5
    shown = show_text(show(GOLDEN / name))
    assert "zahlen" in shown or name == "unsharded" or name in SECOND


def test_one_file_and_shards_have_the_same_digests() -> None:
    one, shards = (read_fisher(GOLDEN / name / "fisher").ledger for name in ("anchor", "sharded"))
    assert (one.weights, one.fisher, one.anchor) == (shards.weights, shards.fisher, shards.anchor)


def test_the_present_writer_gives_the_same_bytes(tmp_path: Path) -> None:
    WRITE["write_all"](tmp_path)
    assert contents(tmp_path) == contents(GOLDEN)


def test_they_stay_small() -> None:
    assert sum(len(data) for data in contents(GOLDEN).values()) < 60_000
