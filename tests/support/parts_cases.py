"""What the tests of kept parts run: commands in several processes that are killed and stopped.

python parts_cases.py FOLDER
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from consolidate.chain import rank_progress
from consolidate.estimation import compensated_sums
from consolidate.runtime import signals
from formats.errors import InputError
from support.checkpoints import normed
from support.folders import contents
from support.networks import Network
from support.together import ended, started

COMMON = "--model support.parts_cases:network --device cpu --output-dir {out} "
COMMON += "--save-every-minutes {every}"
FINETUNE = "finetune start --data new.npz --ewc-lambda 10 --epochs 2 --batch-size 6 "
FINETUNE += "--gradient-accumulation-steps 2 --optimizer adam --learning-rate 0.01 --log-every 1 "
FINETUNE += "--fisher-batch-size 2 --evaluate old=old.npz --evaluate-every 3 " + COMMON
FISHER = "fisher start --data new.npz --batch-size 2 " + COMMON


def network(config: dict[str, Any]) -> torch.nn.Module:
    """Make a network that sends a signal where a file of that name asks for it, once.

    ``stop-SIGKILL-1-training-5``: in the second process, in its fifth run of this kind.
    """
    module = Network(config)
    runs: list[str] = []

    def count(module: torch.nn.Module, inputs: object) -> None:
        measuring = "measuring" if torch.is_grad_enabled() else "evaluating"
        kind = "training" if module.training else measuring
        runs.append(kind)
        for file in Path().glob("stop-*"):
            name, rank, *when = file.name.removeprefix("stop-").split("-")
            receiver = os.getppid() if name.endswith("_torchrun") else os.getpid()
            if rank == os.environ.get("RANK", "alone") and when == [kind, str(runs.count(kind))]:
                file.unlink()
                os.kill(receiver, getattr(signal, name.removesuffix("_torchrun")))
                until = time.monotonic() + 60  # torchrun takes its time to pass it on
                while receiver != os.getpid() and not signals.asked() and time.monotonic() < until:
                    time.sleep(0.01)

    module.register_forward_pre_hook(count)
    return module


def run(
    line: str,
    *,
    count: int = 2,
    out: str = "out",
    every: int = 0,
    stop: str | None = None,
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Run a command in so many processes; gives their exit codes, what they said and left."""
    log = Path("log.txt")
    log.unlink(missing_ok=True)
    if stop is not None:
        Path(f"stop-{stop}").touch()
    codes = ended(started(count, line.format(out=out, every=every).split(), log, prepare))
    left = sorted(path.name for path in Path().iterdir() if path.name.startswith(".out"))
    return {"codes": codes, "said": log.read_text(), "left": left}


def same(out: str, expected: str) -> bool:
    """Whether two outputs hold the same bytes, and nothing was left beside the first."""
    return contents(Path(out)) == contents(Path(expected)) and not list(Path().glob(f".{out}.*"))


def killed_before_publishing() -> None:
    """Let the second process be killed when it has prepared its third part, and the first not."""
    publish, times = rank_progress.publish_partial, [0]

    def killed(target: Path, process: int = 0) -> None:
        times[0] += 1
        if process == 1 and times[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        publish(target, process)

    rank_progress.publish_partial = killed


def without_room() -> None:
    """Let the second process find no room for its second part."""
    prepare, times = rank_progress.prepare_partial, [0]

    def full(target: Path, *arguments: Any) -> None:
        times[0] += 1
        if os.environ["RANK"] == "1" and times[0] == 2:
            raise InputError("no room")
        prepare(target, *arguments)

    rank_progress.prepare_partial = full


def by_torchrun(line: str, name: str) -> dict[str, Any]:
    """Run a command by torchrun, which is sent a signal of this name; waits for all of them."""
    Path(f"stop-{name}_torchrun-0-training-5").touch()
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 -m consolidate"
    done = subprocess.run(
        [sys.executable, *torchrun.split(), *line.format(out="out", every=60).split()],
        # A store that ended with torchrun is warned of in pieces, between and within other lines.
        env=os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        check=False,
    )
    return {"codes": [done.returncode], "said": done.stdout + done.stderr}


def whole_models() -> dict[str, Any]:
    """Kill and stop processes that each have the whole model."""
    found: dict[str, Any] = {"undisturbed": run(FINETUNE, out="whole")}
    found["killed"] = run(FINETUNE, stop="SIGKILL-1-training-5")
    found["terminated"] = run(FINETUNE, every=60, stop="SIGTERM-1-training-3")
    found["one"] = run(FINETUNE, count=1)
    found["three"] = run(FINETUNE, count=3)
    found["shards"] = run(FINETUNE + " --shard")
    found["interrupted"] = run(FINETUNE, every=60, stop="SIGINT-0-evaluating-4")
    found["killed measuring"] = run(FINETUNE, stop="SIGKILL-1-measuring-14")
    found["resumed"] = run(FINETUNE)
    found["same"] = same("out", "whole")
    for name in ("SIGTERM", "SIGKILL"):
        found[f"torchrun {name}"] = by_torchrun(FINETUNE.replace("{out}", "{out}-2"), name)
        found[f"resumed from {name}"] = run(FINETUNE, out="out-2")
        found[f"same from {name}"] = same("out-2", "whole")
        Path("out-2").rename(f"out-2-{name}")
    found["alone"] = run(FINETUNE, count=1, out="out-3", stop="SIGKILL-alone-training-5")
    found["two"] = run(FINETUNE, out="out-3")
    found["restarted"] = run(FINETUNE + " --restart", out="out-3")
    found["same restarted"] = same("out-3", "whole")
    return found


def interpolated() -> dict[str, Any]:
    """Stop and kill processes while α is chosen, and before."""
    line = FINETUNE + " --interpolate auto --validation new=held.npz --norm-statistics update"
    line += " --max-examples 48"
    found: dict[str, Any] = {"undisturbed": run(line, out="whole-i")}
    found["killed"] = run(line, stop="SIGKILL-1-training-5")
    found["terminated"] = run(line, every=60, stop="SIGTERM-1-evaluating-20")
    found["killed again"] = run(line, stop="SIGKILL-0-evaluating-20")
    found["killed measuring"] = run(line, stop="SIGKILL-1-measuring-14")
    found["resumed"] = run(line)
    found["same"] = same("out", "whole-i")
    line = line.replace("--norm-statistics update", "--interpolation fisher")
    found["weighted"] = run(line, out="whole-w")
    found["killed before"] = run(line, out="out-w", stop="SIGKILL-1-measuring-14")
    found["killed between"] = run(line, out="out-w", stop="SIGKILL-0-evaluating-9")
    found["killed after"] = run(line, out="out-w", stop="SIGKILL-1-measuring-14")
    found["resumed weighted"] = run(line, out="out-w")
    found["same weighted"] = same("out-w", "whole-w")
    return found


def budgeted() -> dict[str, Any]:
    """Stop and kill processes while λ follows a budget, and while α is chosen."""
    line = FINETUNE.replace("--ewc-lambda 10", "--budget 0.01 --validation old=turned.npz")
    found: dict[str, Any] = {"undisturbed": run(line, out="whole-b")}
    found["terminated"] = run(line, every=60, stop="SIGTERM-1-evaluating-9")
    found["killed"] = run(line, stop="SIGKILL-1-training-5")
    found["resumed"] = run(line)
    found["same"] = same("out", "whole-b")
    return found


def shards() -> dict[str, Any]:
    """Kill and stop processes that each have a shard."""
    line = FINETUNE + " --shard --fisher-max-examples 30"
    found: dict[str, Any] = {"undisturbed": run(line, out="whole-s", prepare=without_room)}
    found["killed"] = run(line, prepare=killed_before_publishing)
    found["terminated"] = run(line, every=60, stop="SIGTERM-1-training-5")
    other = Path(".out.consolidate-partial-1")
    other.rename("aside")
    found["incomplete"] = run(line)
    Path("aside").rename(other)
    found["whole models"] = run(FINETUNE)
    found["killed measuring"] = run(line, stop="SIGKILL-1-measuring-14")
    found["resumed"] = run(line)
    found["same"] = same("out", "whole-s")
    found["killed again"] = run(line, out="out-2", stop="SIGKILL-0-training-7")
    found["restarted alone"] = run(FINETUNE + " --restart", count=1, out="out-2")
    return found


def fisher() -> dict[str, Any]:
    """Kill measurements, of shards and of whole models."""
    found: dict[str, Any] = {}
    for kind, line in (("shards", FISHER + " --shard --max-examples 41"), ("whole models", FISHER)):
        undisturbed, out = f"fisher-{kind[0]}", f"out-{kind[0]}"
        killed = "SIGKILL-0-measuring-16" if kind == "shards" else "SIGKILL-1-measuring-12"
        found[kind] = {
            "undisturbed": run(line, out=undisturbed),
            "killed": run(line, out=out, stop=killed),
            "three": run(line, count=3, out=out),
            "other": run(
                line.replace(" --shard", "") if "--shard" in line else f"{line} --shard", out=out
            ),
            "resumed": run(line, out=out),
            "same": same(out, undisturbed),
        }
    return found


def main(folder: Path) -> None:
    """Run all cases and write what they gave."""
    os.chdir(folder)
    torch.set_num_threads(1)
    compensated_sums.FOLDED_BATCHES = 4
    random = np.random.default_rng(0)
    for name, count in (("old", 20), ("new", 50), ("held", 24)):
        labels = random.integers(0, 3, count)
        inputs = random.normal(size=(count, 6)) + 2 * labels[:, None]
        np.savez(f"{name}.npz", inputs=inputs.astype(np.float32), labels=labels)
    new = np.load("new.npz")  # whose labels are others in the rows that a budget is kept on
    np.savez("turned.npz", inputs=new["inputs"], labels=(new["labels"] + 1) % 3)
    normed(folder / "start", folder / "old.npz")
    found = {}
    for case in (whole_models, interpolated, budgeted, shards, fisher):
        found[case.__name__] = case()
        for left in folder.glob("out*"):
            left.rename(folder / f"of-{case.__name__}-{left.name}")
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
