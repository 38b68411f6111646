"""Fishers of whole batches beside those of their examples one at a time, in float64."""

import copy

import torch
from torch import Tensor, nn

from consolidate.estimation.fisher_diagonal import fisher_diagonal
from support.modules import assert_close, cut
from support.reference import example

F64 = {"accumulate_dtype": torch.float64}


def agrees_with_one_at_a_time(
    model: nn.Module, batches: list, likelihood: str, rtol: float = 1e-9
) -> dict[str, str]:
    """Hold batches against single examples; return the methods of the parameters."""
    model = model.double()
    alone = [
        (example(inputs, i), labels[i : i + 1])
        for inputs, labels in batches
        for i in range(len(labels))
    ]
    for estimator in ("empirical", "mc", "exact"):
        expected = fisher_diagonal(model, alone, likelihood, estimator=estimator, **F64)
        assert set(expected.methods.values()) == {"loop"}
        for check in (False, True):
            other = copy.deepcopy(model)
            found = fisher_diagonal(
                other, batches, likelihood, estimator=estimator, check=check, **F64
            )
            assert_close(found, expected, rtol)
            assert found.unreached == expected.unreached
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())
            assert all(
                p.requires_grad == q.requires_grad
                for p, q in zip(other.parameters(), model.parameters(), strict=True)
            )
    return found.methods


def all_by(method: str, model: nn.Module) -> dict[str, str]:
    return {name: method for name, p in model.named_parameters() if p.requires_grad}


def labelled(*shape: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).double()
    return cut(x, torch.randint(3, shape[:1], generator=generator), size)


class Mean(nn.Module):
    """A body over positions, then the mean, then a head."""

    def __init__(self, body: nn.Module, width: int = 5):
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1, -2).mean(1))


def goes_by_rule(model: nn.Module, batches: list, likelihood: str = "softmax") -> None:
    assert agrees_with_one_at_a_time(model, batches, likelihood) == all_by("rule", model)
