"""The other structures of the Fisher: A and G, the penalty, and a quick run."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from formats.fisher_json import Block
from scripts.experiments.lib import sittings
from scripts.experiments.lib.records import read_records
from scripts.experiments.lib.structured import STRUCTURES, Factors, StructuredPenalty, factors_of
from scripts.experiments.tasks import structures


class Pooled(nn.Module):
    """A layer at every position, their mean where they are no padding, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, inputs: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        mask = attention_mask[..., None]
        pooled = (self.layer(inputs) * mask).sum(1) / mask.sum(1)
        return SimpleNamespace(logits=self.head(pooled))


@pytest.fixture
def model() -> Pooled:
    torch.manual_seed(0)
    return Pooled().double()


def texts(lengths: list[int], fill: float) -> tuple[dict[str, Tensor], Tensor]:
    """Make texts of some lengths, padded with a value to the longest and one more."""
    generator = torch.Generator().manual_seed(1)
    width = max(lengths) + 1
    inputs = torch.full((len(lengths), width, 3), fill, dtype=torch.float64)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for i, length in enumerate(lengths):
        inputs[i, :length] = torch.randn(length, 3, generator=generator, dtype=torch.float64)
        mask[i, :length] = 1
    return {"inputs": inputs, "attention_mask": mask}, torch.zeros(len(lengths), dtype=torch.long)


def test_factors_are_those_of_the_closed_form(model: Pooled) -> None:
    lengths = [3, 1, 4]
    batch = texts(lengths, fill=7.0)
    found = factors_of(model, [batch], ["layer.weight", "head.weight"])

    rows = [row[:length] for row, length in zip(batch[0]["inputs"], lengths, strict=True)]
    ones = torch.cat([torch.cat([row, torch.ones(len(row), 1)], 1) for row in rows])
    torch.testing.assert_close(found["layer.weight"].inputs, ones.T @ ones / 8, rtol=1e-12, atol=0)
    # The gradient for each position's output is the head's, divided by the length.
    p = model(**batch[0]).logits.softmax(1).detach()
    outputs = torch.zeros(4, 4, dtype=torch.float64)
    head = torch.zeros(5, 5, dtype=torch.float64)
    for i, length in enumerate(lengths):
        for y in range(5):
            e = torch.eye(5, dtype=torch.float64)[y] - p[i]
            g = model.head.weight.detach().T @ e / length
            outputs += p[i, y] * length * torch.outer(g, g) / 3
            head += p[i, y] * torch.outer(e, e) / 3
    torch.testing.assert_close(found["layer.weight"].outputs, outputs, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found["head.weight"].outputs, head, rtol=1e-12, atol=1e-15)
    apart = [texts(lengths, fill=-2.0)]
    again = factors_of(model, apart, ["layer.weight"])["layer.weight"]
    torch.testing.assert_close(again, found["layer.weight"], rtol=0, atol=0)


def test_with_one_position_the_product_is_the_fisher(model: Pooled) -> None:
    batch = texts([1], fill=0.0)
    found = factors_of(model, [batch], ["layer.weight"])["layer.weight"]
    ends = model.layer.weight, model.layer.bias
    log_p = model(**batch[0]).logits[0].log_softmax(0)
    fisher = torch.zeros(16, 16, dtype=torch.float64)
    for chance in log_p:
        weight, bias = torch.autograd.grad(chance, ends, retain_graph=True)
        joined = torch.cat([weight, bias[:, None]], 1).flatten()
        fisher += chance.detach().exp() * torch.outer(joined, joined)
    product = torch.kron(found.outputs, found.inputs)
    torch.testing.assert_close(product, fisher, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("structure", [one for one in STRUCTURES if one.startswith("a")])
def test_the_penalty_is_that_of_the_written_out_matrix(model: Pooled, structure: str) -> None:
    generator = torch.Generator().manual_seed(2)

    def square(n: int) -> Tensor:
        root = torch.randn(n, n, generator=generator, dtype=torch.float64)
        return root @ root.T

    diagonal = {
        name: torch.rand(p.shape, generator=generator, dtype=torch.float64)
        for name, p in model.named_parameters()
    }
    block = Block("R", (1,), ("layer.weight", "layer.bias"))
    pair = Factors(square(4), square(4))
    penalty = StructuredPenalty(model, diagonal, {"layer.weight": pair}, [block], structure, 3.0)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    change = {name: p.detach() - start[name] for name, p in model.named_parameters()}

    rows = diagonal["layer.weight"].sum(1) + diagonal["layer.bias"]
    left = {
        "a": torch.eye(4, dtype=torch.float64),
        "a_rows": torch.diag(rows),
        "a_diagonal": torch.diag(torch.diag(pair.outputs)),
        "a_g": pair.outputs,
    }[structure]
    matrix = torch.kron(left, pair.inputs)
    matrix *= rows.sum() / matrix.trace()
    layer = torch.cat([change["layer.weight"], change["layer.bias"][:, None]], 1).flatten()
    head = [(diagonal[name] * change[name] ** 2).sum() for name in ("head.weight", "head.bias")]
    expected = 1.5 * (layer @ matrix @ layer + head[0] + head[1])
    assert penalty.value() == pytest.approx(float(expected), rel=1e-12)

    penalty.add_gradient_()
    pull = 3 * (matrix @ layer).view(4, 4)
    torch.testing.assert_close(model.layer.weight.grad, pull[:, :3], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.layer.bias.grad, pull[:, 3], rtol=1e-10, atol=1e-12)
    of_head = 3 * diagonal["head.weight"] * change["head.weight"]
    torch.testing.assert_close(model.head.weight.grad, of_head, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_a_quick_run_makes_every_curve_and_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.experiments.lib import kept

    monkeypatch.setattr(kept, "FOLDER", tmp_path / "kept")
    experiment, folder = structures.EXPERIMENT, tmp_path / "records"
    sittings.run([experiment], folder, quick=True)
    sittings.write_pages([experiment], folder, quick=True, table=None, page=structures.PAGE)
    records = read_records(folder / "structures.jsonl")
    assert len(records) == 2 * sum(map(len, structures.STRENGTHS.values()))
    page = (folder / "structures.md").read_text(encoding="utf-8")
    assert "its figures mean nothing" in page
    for name, title in STRUCTURES.items():
        assert page.count(f"\n| {title} |") == 2 + len(structures.STRENGTHS[name])
    assert sittings.undone(experiment, folder, True) == []
