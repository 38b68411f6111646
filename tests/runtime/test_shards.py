from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from consolidate.runtime.shards import is_cut, is_sharded, shard

WIDTH = 6


class Block(nn.Module):
    """A layer as language models have it: without biases, and with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(torch.relu(self.up(self.norm(hidden))))


class Network(nn.Module):
    """Blocks between a table and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_blocks_without_biases_are_gathered_one_at_a_time(group: dist.ProcessGroup) -> None:
    model = Network()
    shard(model, group, torch.device("cpu"))
    assert all(is_sharded(layer) for layer in model.layers)
    gathered: list[list[bool]] = []

    def look(*_: object) -> None:
        whole = [not any(is_cut(p) for p in layer.parameters()) for layer in model.layers]
        gathered.append(whole)

    for layer in model.layers:
        layer.up.register_forward_hook(look)
    outputs = model(torch.arange(5)[None])
    assert gathered == [[i == at for i in range(3)] for at in range(3)]
    outputs.sum().backward()
    assert all(is_cut(p) and is_cut(p.grad) for p in model.parameters())


def test_a_block_that_shares_a_parameter_is_not_gathered_by_itself(
    group: dist.ProcessGroup,
) -> None:
    model = Network()
    model.layers[1].down.weight = model.layers[0].down.weight
    shard(model, group, torch.device("cpu"))
    assert [is_sharded(layer) for layer in model.layers] == [False, False, True]
