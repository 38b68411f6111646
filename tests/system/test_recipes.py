"""Recipes of the how-to guides in several processes, which the test of the pages runs in one."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from system.test_documentation import DOCS, run_shell, workspace

from support import loopback_hub

__all__ = ["workspace"]
PAGE = DOCS / "how-to" / "accelerate.md"


@pytest.mark.slow
def test_the_loop_for_accelerate_in_two_processes(workspace: Path, hub: loopback_hub.Hub) -> None:
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(# train\.py\n.*?)^```$", text, re.DOTALL | re.MULTILINE)
    measure, start, check = re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    code += (  # what each process ends with, to compare
        "end = accelerator.unwrap_model(trained).state_dict()\n"
        "torch.save(end, f'end-{accelerator.process_index}.pt')\n"
    )
    (workspace / "train.py").write_text(code, encoding="utf-8")
    run_shell(measure, workspace, hub)
    command, *words = shlex.split(start.splitlines()[-1], comments=True)
    assert command == "torchrun"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("penalty ") == 1
    run_shell(check, workspace, hub)
    ends = [torch.load(workspace / f"end-{i}.pt") for i in range(2)]
    written = load_file(workspace / "my-model-2" / "model.safetensors")
    before = load_file(workspace / "my-model" / "model.safetensors")
    for name, tensor in written.items():
        assert torch.equal(tensor, ends[0][name])
        assert torch.equal(tensor, ends[1][name])
    assert not torch.equal(written["classifier.weight"], before["classifier.weight"])
