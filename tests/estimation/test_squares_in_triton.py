"""The kernel for CUDA, by Triton's interpreter on the CPU."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "1")  # read at import, and when Triton first runs
    pytest.importorskip("triton")
    from consolidate.estimation import squares_in_triton

from consolidate.estimation import squares_kernel
from consolidate.estimation.fisher_diagonal import FisherDiagonal, fisher_diagonal
from support.modules import assert_close, cut, tiny
from support.squares import check_sums_and_traces


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Use it for tensors of the CPU, in place of the kernel in C; list the sums it adds to."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    made: list[torch.Size] = []

    def add(total: Tensor, g: Tensor, a: Tensor, seen: Any, traces: Tensor) -> None:
        made.append(total.shape)
        fields = tuple(getattr(seen, name) for name, _ in seen._fields_)
        squares_in_triton.add_squares(total, g, a, fields, traces)

    monkeypatch.setattr(squares_kernel, "_add", add)
    return made


def fail(text: str) -> None:
    pytest.fail(text)


@pytest.mark.parametrize("layout", ["rows", "positions", "apart"])
@pytest.mark.parametrize(
    ("examples", "positions", "rows", "columns"),
    [(1, 1, 1, 1), (3, 5, 7, 9), (4, 16, 64, 100), (2, 33, 70, 3), (2, 65, 130, 129)],
)
def test_sums_and_traces(examples, positions, rows, columns, layout):
    check_sums_and_traces(examples, positions, rows, columns, layout)


def convolved(layer: nn.Module, *shape: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(7, *shape)
    model(x)
    return model, cut(x, torch.arange(7) % 3, 4)


def measured(model: nn.Module, batches: list, **options) -> FisherDiagonal:
    return fisher_diagonal(model, batches, "softmax", estimator="empirical", **options)


MODELS: dict[str, Callable[[], tuple[nn.Module, list]]] = {
    "plain": lambda: convolved(nn.Conv2d(3, 8, 3), 3, 9, 7),
    "padded, strided": lambda: convolved(nn.Conv2d(3, 20, 7, 2, 3), 3, 15, 12),
    "unlike sides": lambda: convolved(nn.Conv2d(8, 9, (3, 5), (2, 1), (0, 2), (1, 2)), 8, 12, 13),
    "one dimension": lambda: convolved(nn.Conv1d(6, 9, 5, 2, 3, 2), 6, 50),
}


@pytest.mark.parametrize("name", MODELS)
def test_convolutions(name):
    model, batches = MODELS[name]()
    found = measured(model, batches, kernel=True, note=fail)
    expected = measured(model.double(), batches, accumulate_dtype=torch.float64)
    assert found.methods == expected.methods
    for key, value in expected.items():
        torch.testing.assert_close(found[key].double(), value, rtol=1e-4, atol=1e-5 * value.max())


def test_a_transformer_in_bfloat16(calls):
    model, _, _, likelihood = tiny("llama")
    model.to(torch.bfloat16)
    ids = torch.randint(5, (3, 40), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    results = [
        fisher_diagonal(
            model, [(inputs, ids)], likelihood, estimator="empirical", kernel=kernel, note=fail
        )
        for kernel in (False, True)
    ]
    linear = [m.weight.shape for m in model.modules() if isinstance(m, nn.Linear)]
    assert set(linear) <= set(calls)
    assert_close(results[1], results[0], 1e-4)


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    places = squares_in_triton._places

    def reversed_(*arguments):
        positions, offsets = places(*arguments)
        return positions, offsets.flip(0)

    monkeypatch.setattr(squares_in_triton, "_places", reversed_)


@pytest.mark.usefixtures("wrong")
def test_a_wrong_kernel_leaves_a_line_and_the_plain_path():
    model, batches = MODELS["plain"]()
    notes: list[str] = []
    found = measured(model, batches, kernel=True, note=notes.append)
    assert "it differs from sums in float64" in notes[0]
    assert len(notes) == 1
    for name, value in measured(model, batches).items():
        assert torch.equal(found[name], value)


@pytest.mark.usefixtures("wrong")
def test_the_first_batch_guards_it_too(monkeypatch):
    monkeypatch.setattr(squares_kernel, "_verify", lambda device: None)
    model, batches = MODELS["plain"]()
    notes: list[str] = []
    found = measured(model, batches, kernel=True, note=notes.append)
    assert any("by rule, the gradients of 0 differ from single examples" in n for n in notes)
    assert_close(found, measured(model, batches), 1e-4)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from consolidate.estimation.squares_in_triton import _squares
kinds = ["*fp32", "i32", "*fp32", "*fp32", "i64", "*i64", "*i64", "*fp32", *4 * ["i32"]]
source = ASTSource(_squares, dict(zip(_squares.arg_names, kinds, strict=True)))
for capability in (80, 90):
    made = compile(source, target=GPUTarget("cuda", capability, 32)).asm
    assert len(made["cubin"]) and "mma" not in made["ptx"]  # which would round the factors
"""


def test_it_compiles_for_cuda(tmp_path: Path) -> None:
    """The interpreter accepts what the compiler refuses."""
    paths = os.pathsep.join(filter(None, sys.path))
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    del env["TRITON_INTERPRET"]
    words = [sys.executable, "-c", COMPILE]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
