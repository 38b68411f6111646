"""The diagonal and the matrices over inputs, against the Fisher of an independent library."""

import copy
import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from consolidate.estimation.fisher_diagonal import fisher_diagonal
from scripts.experiments.lib.structured import factors_of

with warnings.catch_warnings(action="ignore"):  # of torch.jit, which a library of its own uses
    from curvlinops import GGNLinearOperator, KFACLinearOperator

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
Batches = list[tuple[Tensor, Tensor]]


class Positions(nn.Module):
    """Two layers over positions, their mean, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh().mean(1))


MODELS = {
    "dense": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), (5,)),
    "positions": (Positions, (6, 4)),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 5, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(30, 9)
        ),
        (2, 5, 4),
    ),
}


def whole_fisher(model: nn.Module, batches: Batches) -> Tensor:
    """Return the exact Fisher of all parameters: of cross-entropy it is the Gauss-Newton matrix."""
    parameters = [*model.parameters()]
    operator: Any = GGNLinearOperator(
        model, nn.CrossEntropyLoss(), parameters, batches, check_deterministic=False
    )
    return operator @ torch.eye(sum(p.numel() for p in parameters), dtype=parameters[0].dtype)


def places(model: nn.Module) -> dict[str, Tensor]:
    """Return where each parameter's values are among all, in its shape."""
    found, at = {}, 0
    for name, p in model.named_parameters():
        found[name] = torch.arange(at, at + p.numel()).view(p.shape)
        at += p.numel()
    return found


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", MODELS)
def test_the_diagonal_and_the_mean_of_a_layers_rows(
    name: str, dtype: torch.dtype, rtol: float
) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().to(dtype)
    x, labels = torch.randn(11, *shape, dtype=dtype), torch.arange(11) % 3
    batches = list(zip(x.split((4, 1, 6)), labels.split((4, 1, 6)), strict=True))
    whole = whole_fisher(copy.deepcopy(model), batches).double()
    found = fisher_diagonal(
        model,
        batches,
        "softmax",
        estimator="exact",
        structure="inputs",
        accumulate_dtype=torch.float64,
    )
    at = places(model)
    for parameter, values in found.items():
        expected = whole.diagonal()[at[parameter]]
        assert (values.double() - expected).abs().max() <= rtol * expected.max()
    assert found.blocks
    for block_name, block in found.blocks.items():
        rows = torch.cat([at[p].flatten(1) if at[p].ndim > 1 else at[p][:, None]
                          for p in block.parameters], 1)  # fmt: skip
        expected = torch.stack([whole[row][:, row] for row in rows]).sum(0)
        error = (found.factors[block_name].double() - expected).abs().max()
        assert error <= rtol * expected.max(), block_name


@pytest.mark.parametrize("kind", ["expand", "reduce"])
def test_the_factors_of_the_experiments_are_those_of_kfac(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    layers = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    x = torch.randn(9, 4, dtype=torch.float64)

    class WithMask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, attention_mask: Tensor) -> Any:
            return types.SimpleNamespace(logits=self.inner(x))

    inputs = {"x": x, "attention_mask": torch.ones(9, 1)}
    batches: list[tuple[Any, Tensor]] = [(inputs, torch.zeros(9))]
    found = factors_of(WithMask(), batches, [f"inner.{name}" for name in layers])
    operator: Any = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        [*model.parameters()],
        [(x, torch.zeros(9, dtype=torch.int64))],
        fisher_type="type-2",
        kfac_approx=kind,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    whole = operator @ torch.eye(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    at = places(model)
    for name in layers:
        both = torch.cat([at[name], at[name.replace("weight", "bias")][:, None]], 1).flatten()
        factors = found[f"inner.{name}"]
        expected = torch.kron(factors.outputs, factors.inputs)
        assert (whole[both][:, both] - expected).abs().max() <= 1e-12 * expected.max()
