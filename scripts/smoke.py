"""A smoke test of an installed consolidate: a tiny perceptron through the commands of a first hour.

    python -I scripts/smoke.py

It needs the package and what that depends on, nothing of the repository and no network: the proxy
that is set answers nobody. Run it outside of a clone, so that what is installed is what is tested.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import consolidate

SIZES = (6, 8, 3)
NETWORK = '''
from torch import nn


def perceptron(config):
    """Make a perceptron with one hidden layer."""
    inputs, hidden, outputs = config["sizes"]
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
'''
NOBODY = "http://127.0.0.1:9"
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), NOBODY),
    "OMP_NUM_THREADS": "1",
}


def main() -> None:
    """Run the commands in a temporary folder, and look at what they write."""
    installed = Path(consolidate.__file__).resolve()
    if not installed.is_relative_to(Path(sys.prefix).resolve()):
        sys.exit(f"smoke: {installed} is not installed in {sys.prefix}")
    with tempfile.TemporaryDirectory(prefix="consolidate-smoke-") as folder:
        os.chdir(folder)
        prepare()
        smoke()
    print(f"smoke: consolidate {version('consolidate-ewc')} works with torch {torch.__version__}")


def prepare() -> None:
    """Write a checkpoint, and two tasks whose labels depend on different inputs."""
    torch.manual_seed(0)
    inputs, hidden, outputs = SIZES
    module = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    Path("start").mkdir()
    save_file(module.state_dict(), "start/model.safetensors")
    Path("start/config.json").write_text(json.dumps({"sizes": SIZES}))
    Path("network.py").write_text(NETWORK)
    random = np.random.default_rng(0)
    for task, first in (("old", 0), ("new", 3)):
        rows = random.standard_normal((64, inputs), dtype=np.float32)
        labels = rows[:, first : first + outputs].argmax(axis=1)
        np.savez(f"{task}.npz", inputs=rows, labels=labels)


def smoke() -> None:
    """Measure, fine-tune, verify; then damage a weight, which `verify` must find."""
    model = ("--model", "network:perceptron")
    expect(command("--version").stdout.strip().endswith(version("consolidate-ewc")), "--version")
    fisher = result("fisher", "start", *model, "--data", "old.npz", "--task", "old")
    expect(fisher["trace"] > 0, "a Fisher with a trace above 0")
    tuned = result(
        *("finetune", "start", *model, "--data", "new.npz", "--task", "new"),
        *("--output-dir", "next", "--ewc-lambda", "10", "--epochs", "2"),
    )
    expect(tuned["penalty_value"] > 0, "a penalty above 0")
    expect(result("verify", "next")["tasks"] == ["old", "new"], "two tasks that verify")
    weights = Path("next/model.safetensors")
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    expect(command("verify", "next", code=3).stderr != "", "a message about the damage")


def command(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the installed command; stop where its exit code is another."""
    program = Path(sys.executable).with_name("consolidate")
    done = subprocess.run(
        [program, *arguments], env=os.environ | SETTINGS, text=True, capture_output=True
    )
    if done.returncode != code:
        shown = " ".join(arguments)
        sys.exit(f"smoke: {shown}: exit code {done.returncode}, expected {code}\n{done.stderr}")
    return done


def result(*arguments: str) -> dict[str, Any]:
    """Run a command with `--json`, and return the object that it prints."""
    print("smoke: consolidate", " ".join(arguments), flush=True)
    return json.loads(command(*arguments, "--json").stdout)


def expect(found: bool, what: str) -> None:
    """Stop where something is not as it must be."""
    if not found:
        sys.exit(f"smoke: expected {what}")


if __name__ == "__main__":
    main()
