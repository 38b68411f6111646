"""The examples of docs/how-to/pipelines.md, with the real tools where they are installed."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "how-to" / "pipelines"
BIN = Path(sys.executable).parent
MEASURE = "Measure what the old task needs"
ENVIRONMENT = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def folder(network_checkpoint: Path, write_task: Callable[..., Path], tmp_path: Path) -> Path:
    """What the quickstart leaves, smaller: start, network.py and the data of A and B."""
    (tmp_path / "network.py").write_text(
        "from torch import nn\n\n\ndef mlp(config):\n    first, hidden, last = config['sizes']\n"
        "    layers = nn.Linear(first, hidden), nn.ReLU(), nn.Linear(hidden, last)\n"
        "    return nn.Sequential(*layers)\n"
    )
    for seed, task in enumerate("ab"):
        write_task(f"{task}-train", seed=seed)
        write_task(f"{task}-test", seed=seed)
    return tmp_path


def shell(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script as a step of GitHub Actions does."""
    return subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=folder,
        env={**ENVIRONMENT, **variables},
        capture_output=True,
        text=True,
    )


def run_job(job: Mapping[str, Any], folder: Path, **variables: str) -> tuple[int, str]:
    """Run the steps of a job in order; give the exit code of the first that failed, and stderr.

    Steps that use actions, and the one that installs, are left out. After a failure only those run
    whose condition says so.
    """
    code, said = 0, ""
    for step in job["steps"]:
        condition = step.get("if", "${{ success() }}")
        assert condition in ("${{ success() }}", "${{ !cancelled() }}")
        if "run" not in step or step["name"] == "Install" or (code and "success" in condition):
            continue
        done = shell(step["run"], folder, **variables)
        code, said = code or done.returncode, said + done.stderr
    return code, said


@pytest.mark.slow
def test_the_workflow_passes_and_fails_by_the_gate(folder: Path) -> None:
    workflow = yaml.safe_load((EXAMPLES / "consolidate.yml").read_text("utf-8"))
    (job,) = workflow["jobs"].values()
    summary = folder / "summary.md"
    variables = {**workflow["env"], "EPOCHS": "2", "GITHUB_STEP_SUMMARY": str(summary)}
    for gate, code in (("0", 5), ("1", 0)):
        summary.write_text("")
        if code == 0:  # as a job begins, but for what is measured already
            shutil.rmtree(folder / "next.failed-forgetting")
            del job["steps"][[step.get("name") for step in job["steps"]].index(MEASURE)]
        found, err = run_job(job, folder, **{**variables, "MAX_FORGETTING": gate})
        assert found == code, err
        numbers = json.loads((folder / "metrics.json").read_text())
        heading, learned, header, *_, means = filter(None, summary.read_text().split("\n"))
        assert heading == ("### next" if code == 0 else "### next.failed-forgetting")
        assert learned == "Tasks: A, B."
        assert header == "| after ↓ on → | A | B |"
        assert means.startswith(f"ACC {numbers['acc']:.4f}, BWT {numbers['bwt']:.4f}")
        assert (folder / "next").is_dir() == (code == 0)


@pytest.mark.skipif(shutil.which("dvc", path=str(BIN)) is None, reason="DVC is not installed")
@pytest.mark.slow
def test_dvc_runs_each_stage_once(folder: Path) -> None:
    dvc = {"DVC_NO_ANALYTICS": "true", "DVC_SITE_CACHE_DIR": str(folder / ".site")}
    shutil.copy(EXAMPLES / "dvc.yaml", folder)
    parameters = (EXAMPLES / "params.yaml").read_text("utf-8")
    quick = parameters.replace("epochs: 20", "epochs: 1").replace("0.05", "1")
    (folder / "params.yaml").write_text(quick)
    first = shell("git init -q && dvc init -q && dvc repro", folder, **dvc)
    assert first.returncode == 0, first.stderr
    assert re.findall("Running stage '(.*)'", first.stdout) == ["fisher", "finetune", "evaluate"]
    shown = shell("dvc repro && dvc metrics show --json", folder, **dvc)
    assert shown.returncode == 0, shown.stderr
    said, _, metrics = shown.stdout.partition("\n{")
    assert "Running stage" not in said
    assert "Data and pipelines are up to date." in said
    files = json.loads("{" + metrics)[""]["data"]
    for name in ("finetune.json", "evaluate.json"):
        assert files[name]["data"] == json.loads((folder / name).read_text())
    (folder / "params.yaml").write_text(quick.replace("ewc-lambda: 100", "ewc-lambda: 10"))
    planned = shell("dvc repro --dry", folder, **dvc).stdout
    assert "Stage 'fisher' didn't change" in planned
    assert "Running stage 'finetune'" in planned


def test_the_image_copies_all_that_the_command_needs(folder: Path) -> None:
    lines = (EXAMPLES / "Containerfile").read_text("utf-8").splitlines()
    source = folder / "src"
    for line in lines:
        if line.startswith("COPY "):
            *names, target = line.split()[1:]
            assert target.startswith("/src/")
            for name in names:
                place = folder / target.removeprefix("/")
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, place)
                else:
                    place.mkdir(exist_ok=True)
                    shutil.copy(ROOT / name, place)
    project = tomllib.loads((source / "pyproject.toml").read_text("utf-8"))
    for name in (project["project"]["readme"], *project["project"]["license-files"]):
        assert (source / name).is_file()
    for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert (source / package / "__init__.py").is_file()
    (entry,) = (json.loads(line.split(" ", 1)[1]) for line in lines if "ENTRYPOINT" in line)
    module, function = project["project"]["scripts"][entry[0]].split(":")
    script = f"import sys; from {module} import {function}; sys.argv[0] = ''; {function}()"
    done = subprocess.run(
        [sys.executable, "-c", script, "evaluate", "start", "--model", "network:mlp", "--data",
         "A=a-test.npz"],
        cwd=folder, env={**ENVIRONMENT, "PYTHONPATH": str(source)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("task ")
