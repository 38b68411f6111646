"""Write the golden checkpoints of `tests/golden/`: small, and the same bytes every time.

Folders of a released version of the format are never changed; a new version gets new ones.
Usage: python scripts/write_golden.py FOLDER
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from formats.digest import json_digest, tensor_record
from formats.fisher_folder import write_fisher
from formats.fisher_json import Block, Generated, LayerRecord, Ledger, TaskRecord
from formats.tensors import write_tensors

CONFIG = {"model_type": "golden", "sizes": [4, 3, 2]}
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "owner/golden", "r": 3}


def ramp(shape: tuple[int, ...], start: float) -> Tensor:
    """Give values that are exact in bfloat16, and all different: start, start + 1/8 and so on."""
    count = int(torch.tensor(shape).prod())
    return (torch.arange(count) / 8 + start).reshape(shape)


def weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Give the weights of a small network with a batch norm, whose buffers have no Fisher."""
    return {
        "hidden.weight": ramp((3, 4), -0.75).to(dtype),
        "hidden.bias": ramp((3,), 0.25).to(dtype),
        "norm.running_mean": ramp((3,), 0.5).to(dtype),
        "norm.num_batches_tracked": torch.tensor(7),
        "output.weight": ramp((2, 3), -0.5).to(dtype),
    }


def fisher() -> dict[str, Tensor]:
    """Give Λ for the parameters; a zero and a tiny value are among its values."""
    values = {
        "hidden.weight": ramp((3, 4), 0.0),
        "hidden.bias": ramp((3,), 2.0),
        "output.weight": ramp((2, 3), 1.0),
    }
    values["hidden.bias"][1] = 2.0**-30
    return values


def first_task() -> TaskRecord:
    """Give a task that was only measured."""
    return TaskRecord(
        name="digits",
        objective="classification",
        likelihood="softmax",
        labels=["even", "odd"],
        unit="example",
        examples=7,
        units=7,
        estimator="exact",
        mc_samples=None,
        seed=0,
        weight=1.0,
        data="digits.npz",
        data_digest="0123456789abcdef" * 4,
        layers={name: LayerRecord(float(values.sum())) for name, values in fisher().items()},
    )


def second_task() -> TaskRecord:
    """Give a task that was trained against the first, with every optional field filled."""
    return TaskRecord(
        name="zahlen-2.0_b",
        objective="causal-lm",
        likelihood="next-token-softmax",
        labels=["gerade", "größer", "\u001b[31m"],
        unit="token",
        examples=3,
        units=41,
        estimator="mc",
        mc_samples=4,
        seed=12345678901234567,
        weight=0.1,
        data="owner/zahlen",
        data_digest=None,
        ewc_lambda=1e-5,
        penalty="ewc",
        metrics={
            "before": {"digits": {"loss": 0.5, "accuracy": 0.875}},
            "epoch 1": {"digits": {"loss": 0.75, "accuracy": 0.75}},
            "after": {
                "digits": {"loss": 0.625, "accuracy": 0.8125},
                "zahlen-2.0_b": {"loss": 2.25, "perplexity": 9.487735836358526},
            },
        },
        layers={name: LayerRecord(12.5, 0.25) for name in fisher()},
    )


def written_task() -> TaskRecord:
    """Give a task whose data the model wrote, with what its digest is of."""
    description = {"command": "finetune", "options": {"epochs": 2, "größe": 0.5}, "data": None}
    return replace(
        first_task(),
        name="written",
        penalty="none",
        generated=Generated(7, 32, 0.75, 1.0, 3, "89abcdef01234567" * 4, 2, 4, 1),
        made_from=json_digest(description),
        description=description,
    )


def unmeasured_task() -> TaskRecord:
    """Give a task that was trained and not measured."""
    return replace(
        second_task(), name="last", examples=None, units=None, estimator=None, mc_samples=None,
        layers={},
    )  # fmt: skip


def factors() -> tuple[dict[str, Tensor], dict[str, Block]]:
    """Give symmetric matrices, exact in bfloat16, and what they are."""
    blocks = {
        "hidden.weight.R": Block("R", (1,), ("hidden.weight", "hidden.bias")),
        "output.weight.A": Block("A", (1,), ("output.weight",)),
        "output.weight.G": Block("G", (0,), ("output.weight",)),
    }
    sizes = {"hidden.weight.R": 5, "output.weight.A": 3, "output.weight.G": 2}
    values = {name: ramp((size, 1), 0.5) for name, size in sizes.items()}
    return {name: column @ column.T for name, column in values.items()}, blocks


def input_factors() -> tuple[dict[str, Tensor], dict[str, Block]]:
    """Give the matrices that a penalty uses: each has the trace that Λ has over its parameters."""
    measured, found = fisher(), {}
    blocks = {
        "hidden.weight.R": Block("R", (1,), ("hidden.weight", "hidden.bias")),
        "output.weight.R": Block("R", (1,), ("output.weight",)),
    }
    for name, block in blocks.items():
        weight, *bias = (measured[parameter] for parameter in block.parameters)
        diagonal = torch.cat([weight.sum(0), *(values.sum()[None] for values in bias)])
        found[name] = torch.full((len(diagonal),) * 2, 0.125).fill_diagonal_(0) + diagonal.diag()
    return found, blocks


def write(
    folder: Path,
    ledger: Ledger,
    *,
    dtype: torch.dtype = torch.float32,
    anchor: dict[str, Tensor] | None = None,
    heads: dict[str, dict[str, Tensor]] | None = None,
    factors: dict[str, Tensor] | None = None,
    factor_anchor: dict[str, Tensor] | None = None,
    max_shard_size: int = 10**9,
    stem: str = "model",
) -> None:
    """Write one checkpoint: its configuration, the weights, and the Fisher folder."""
    folder.mkdir(parents=True)
    config = CONFIG if stem == "model" else ADAPTER
    name = "config.json" if stem == "model" else "adapter_config.json"
    (folder / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    theta = weights(dtype)
    write_tensors(
        folder, theta, stem=stem, metadata={"format": "pt"}, max_shard_size=max_shard_size
    )
    ledger.weights = {name: tensor_record(values) for name, values in theta.items()}
    ledger.unprotected = {
        name: "a buffer: it has no gradient" for name in theta if name not in fisher()
    }
    ledger.versions = {"consolidate-ewc": "0.1.0"}
    write_fisher(
        folder / "fisher",
        fisher(),
        ledger,
        anchor=anchor,
        heads=heads,
        factors=factors,
        factor_anchor=factor_anchor,
        dtype=dtype,
        max_shard_size=max_shard_size,
    )


def write_all(folder: Path) -> None:
    """Write every golden checkpoint below a folder that must not hold them yet."""
    mu = {name: values * 0.5 for name, values in weights().items() if name in fisher()}
    write(folder / "unsharded", Ledger([first_task()]))
    write(
        folder / "anchor",
        Ledger([first_task(), second_task()], merge_rule="separate", penalty_offset=0.03125),
        anchor=mu,
        heads={"digits": {"output.weight": ramp((5, 3), -1.0)}},
    )
    write(
        folder / "sharded",
        Ledger([first_task(), second_task()], merge_rule="separate", penalty_offset=0.03125),
        anchor=mu,
        max_shard_size=48,
    )
    learned = replace(second_task(), penalty_on="adapter", parent="0123456789abcdef" * 4)
    write(
        folder / "adapter",
        Ledger([first_task(), learned], gamma=0.9, base="fedcba9876543210" * 4),
        stem="adapter_model",
    )
    write(
        folder / "bfloat16",
        Ledger([first_task(), second_task()], gamma=0.9),
        dtype=torch.bfloat16,
    )
    learned = replace(
        second_task(), parent="fedcba9876543210" * 4, made_from="02468ace13579bdf" * 4
    )
    write(
        folder / "made-from",
        Ledger([first_task(), learned], gamma=0.9, made_from="13579bdf02468ace" * 4),
    )
    matrices, blocks = factors()
    whole = {"merge": ["a", "b"], "base": None}
    write(
        folder / "version-2",
        Ledger(
            [written_task(), unmeasured_task()],
            blocks=blocks,
            made_from=json_digest(whole),
            description=whole,
        ),
        factors=matrices,
        max_shard_size=100,
    )
    matrices, blocks = input_factors()
    write(
        folder / "version-2-factors",
        Ledger(
            [first_task(), second_task()],
            merge_rule="separate",
            penalty_offset=0.03125,
            blocks=blocks,
            factor_offset=0.046875,
        ),
        anchor=mu,
        factors=matrices,
        factor_anchor={name: values * 0.25 for name, values in mu.items()},
    )
    write(folder / "version-2-task", Ledger([first_task(), unmeasured_task()]))


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
