"""Checkpoints of small networks with exact factors, one example and outcome at a time."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from formats.checkpoint import weight_records
from formats.digest import set_digest, tensor_record
from formats.fisher_folder import file_metadata, read_fisher, write_fisher
from formats.fisher_json import Block, LayerRecord, Ledger
from support.networks import SIZES, make_network
from support.report_checkpoints import task

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")
BLOCKS = {
    "0.weight.R": Block("R", (1,), ("0.weight", "0.bias")),
    "2.weight.R": Block("R", (1,), ("2.weight", "2.bias")),
}


def exact(network: nn.Module, inputs: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Λ = E[J²] and R = E[Jᵀ J] of the layers of `make_network`, in float64; J has the bias."""
    network = network.double()
    fisher = {name: torch.zeros_like(values) for name, values in network.named_parameters()}
    factors = {
        name: torch.zeros(n + 1, n + 1, dtype=torch.float64)
        for name, block in BLOCKS.items()
        for n in [fisher[block.parameters[0]].shape[1]]
    }
    for x in inputs.double():
        for y, p in enumerate(network(x).softmax(-1).detach()):
            network.zero_grad()
            cross_entropy(network(x), torch.tensor(y)).backward()
            gradients = {n: v.grad for n, v in network.named_parameters() if v.grad is not None}
            for name, gradient in gradients.items():
                fisher[name] += p * gradient**2 / len(inputs)
            for name, block in BLOCKS.items():
                weight, bias = (gradients[at] for at in block.parameters)
                jacobian = torch.cat([weight, bias[:, None]], 1)
                factors[name] += p * jacobian.T @ jacobian / len(inputs)
    return fisher, {name: (matrix + matrix.T) / 2 for name, matrix in factors.items()}


def write(
    folder: Path,
    name: str = "old",
    *,
    seed: int = 0,
    without: tuple[str, ...] = (),
    anchored: bool = False,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> Path:
    """Write a checkpoint of random weights with a task, Λ and R; `without` are layers without R.

    With `anchored` both anchors are beside the weights, and both offsets are positive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = make_network({"sizes": SIZES})
        inputs = torch.randn(20, SIZES[0])
        moved = {at: torch.randn_like(v) * 0.1 for at, v in network.named_parameters()}
    weights = {at: values.detach().clone() for at, values in network.named_parameters()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"sizes": SIZES}))
    fisher, factors = exact(network, inputs)
    blocks = {at: block for at, block in BLOCKS.items() if at not in without}
    traces = {at: LayerRecord(float(values.sum())) for at, values in fisher.items()}
    known: dict[str, Any] = {"data": "", "layers": traces}
    ledger = Ledger([task(name, **known)], weights=weight_records(weights), blocks=blocks or None)
    anchors: dict[str, Any] = {}
    if anchored:
        anchor = {at: values + moved[at] for at, values in weights.items()}
        ledger = replace(ledger, merge_rule="separate", penalty_offset=0.25)
        anchors["anchor"] = anchor
        if blocks:
            of_blocks = {at for block in blocks.values() for at in block.parameters}
            anchors["factor_anchor"] = {at: 2 * anchor[at] - weights[at] for at in of_blocks}
            ledger = replace(ledger, factor_offset=0.5)
    write_fisher(
        folder / "fisher",
        {at: fisher[at].float() for at in NAMES},
        replace(ledger, **fields),
        factors={at: factors[at].float() for at in blocks} or None,
        dtype=dtype,
        **anchors,
    )
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None], kind: str) -> None:
    """Change tensors of a Fisher folder, and their records in its ledger: digests still fit."""
    path = folder / "fisher" / f"{kind}.safetensors"
    tensors = load_file(path)
    change(tensors)
    records = {at: tensor_record(values) for at, values in tensors.items()}
    ledger = json.loads((folder / "fisher" / "fisher.json").read_text())
    plain = msgspec.to_builtins(dict(sorted(records.items())))
    ledger[kind] = {"digest": set_digest(records), "tensors": plain}
    (folder / "fisher" / "fisher.json").write_text(json.dumps(ledger, indent=2) + "\n")
    save_file(tensors, path, file_metadata(kind, ledger["version"], ledger["weights"]["digest"]))


def penalty_at(folder: Path, theta: Mapping[str, Tensor]) -> float:
    """The stored penalty with its factors as `docs/reference/format.md` has it, without λ."""
    stored = read_fisher(folder / "fisher")
    weights = load_file(folder / "model.safetensors")
    blocks, anchor = stored.ledger.blocks or {}, stored.anchor or weights
    own = stored.factor_anchor or weights
    offset = stored.ledger.factor_offset if blocks else None
    total = stored.ledger.penalty_offset if offset is None else offset
    covered = {at for block in blocks.values() for at in block.parameters}
    for at in stored.fisher:
        if at not in covered:
            moved = theta[at].double() - anchor[at].double()
            total += float((stored.fisher[at].double() * moved**2).sum()) / 2
    for name, block in blocks.items():
        ends = [theta[at].double() - own[at].double() for at in block.parameters]
        moved = torch.cat([end if end.ndim > 1 else end[:, None] for end in ends], 1)
        assert stored.factors is not None
        matrix = stored.factors[name].double()
        total += float((moved @ matrix * moved).sum()) / 2 / len(moved)
    return total
