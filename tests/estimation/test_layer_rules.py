import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from consolidate.estimation.example_gradients import (
    FEW_POSITIONS,
    PATCHED_POSITIONS,
    SMALL,
    Gradients,
    Rows,
)
from consolidate.estimation.fisher_diagonal import fisher_diagonal
from consolidate.estimation.layer_rules import RULES, convolution, linear
from support.modules import Checkpointed, Experts, Images, Tagger, assert_close, cut, network, tiny
from support.one_at_a_time import (
    F64,
    Mean,
    agrees_with_one_at_a_time,
    all_by,
    goes_by_rule,
    labelled,
)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_an_mlp(size):
    methods = agrees_with_one_at_a_time(network(), labelled(10, 5, size=size), "softmax")
    assert methods == all_by("loop" if size == 1 else "rule", network())


def test_further_vectors_of_single_positions_only_add_squares(monkeypatch):
    kind, calls = "torch.nn.modules.linear.Linear", 0

    def counting(*arguments: Any) -> dict[str, Gradients]:
        nonlocal calls
        calls += 1
        return linear(*arguments)

    monkeypatch.setitem(RULES, kind, counting)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    counts = {}
    for classes in (3, 4):
        model, labels = network(classes), torch.zeros(6, dtype=torch.long)
        calls = 0
        fisher_diagonal(model, cut(x, labels, 2), "softmax", estimator="exact")
        counts[classes] = calls
    assert counts[3] == counts[4] > 0


def test_whole_batches_are_run():
    model = network()
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    fisher_diagonal(model, labelled(10, 5), "softmax")
    # The check: two examples, one of them alone, and the two by rules; then all batches.
    assert sizes == [2, 1, 2, 4, 4, 2]


@pytest.mark.parametrize("shape", [(10, 1, 5), (10, 6, 5), (10, 2, 3, 5)])
def test_linear_with_positions(shape):
    body = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5, bias=False))
    goes_by_rule(Mean(body), labelled(*shape))


def test_layer_norm():
    body = nn.Sequential(
        nn.LayerNorm(5), nn.Linear(5, 5), nn.LayerNorm((6, 5), bias=False), nn.Tanh()
    )
    goes_by_rule(Mean(body), labelled(7, 6, 5))


def images(*shape: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    return labelled(7, *shape, size=size)


class Pooled(nn.Module):
    """A body over channels, then the mean over places, then a head."""

    def __init__(self, body: nn.Module, channels: int):
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        self.head = nn.Linear(channels, 3)
        for name, buffer in body.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh().flatten(2).mean(2))


PADDINGS = ["zeros", "circular", "reflect", "replicate"]


@pytest.mark.parametrize("mode", PADDINGS)
@pytest.mark.parametrize(
    "options",
    [
        {"padding": "same", "dilation": 2},
        {"padding": "valid", "groups": 2, "bias": False},
        {"padding": 1, "stride": 2, "groups": 4},
        {"padding": 2},
    ],
)
def test_convolutions_over_lines(mode, options):
    body = nn.Conv1d(4, 8, 3, padding_mode=mode, **options)
    goes_by_rule(Pooled(body, 8), images(4, 9))


@pytest.mark.parametrize("mode", PADDINGS)
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 2), {"padding": "same", "dilation": (1, 2)}),
        (3, {"padding": "valid", "groups": 2, "bias": False}),
        ((2, 3), {"padding": (0, 1), "stride": (2, 1), "groups": 4}),
        (1, {"stride": 2}),
        (4, {"padding": (1, 2), "stride": 3, "dilation": 1}),
        ((3, 3), {"padding": (1, 2), "stride": (4, 5), "dilation": 2}),
    ],
)
def test_convolutions_over_planes(mode, kernel, options):
    body = nn.Conv2d(4, 8, kernel, padding_mode=mode, **options)
    goes_by_rule(Pooled(body, 8), images(4, 7, 6))


def test_convolutions_with_many_and_few_positions():
    body = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(12),
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 2),
    )
    goes_by_rule(Pooled(body, 4), images(1, 24, 24, size=3))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
@pytest.mark.parametrize(
    ("kernel", "options", "places"),
    [
        (3, {"padding": 1}, (1, 1)),
        (3, {"padding": 1}, (2, 2)),
        (3, {"padding": (2, 1), "stride": (3, 2)}, (2, 3)),
        ((2, 4), {"padding": "same"}, (2, 1)),  # More zeros after the inputs than before.
        (5, {"padding": 4, "stride": 3}, (1, 1)),  # Of each five offsets two see an input.
        (3, {"padding": 2, "dilation": 2, "stride": 2}, (3, 3)),
        (3, {"padding": 1, "groups": 2}, (2, 2)),
        (2, {"stride": 2}, (4, 4)),
        (1, {"stride": 3}, (4, 4)),
        (1, {}, (2, 1)),
    ],
)
def test_convolutions_of_few_positions(kernel, options, places):
    body = nn.Conv2d(4, 6, kernel, **options)
    with torch.no_grad():
        assert body(torch.ones(1, 4, *places))[0, 0].numel() <= FEW_POSITIONS
    goes_by_rule(Pooled(body, 6), images(4, *places, size=3))


@pytest.mark.parametrize("channels", [3, 60])
@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({"padding": 1}, (2, 2)),  # Pairs at each offset.
        ({"stride": 2}, (5, 4)),  # Pairs over patches.
        ({"padding": 1}, (3, 4)),  # Patches.
        ({"padding": 1, "groups": 3}, (3, 4)),
    ],
)
def test_each_examples_share_of_a_convolution(options, places, channels):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels + 3, 3, **options, dtype=torch.float64)
    a = torch.randn(7, channels, *places, dtype=torch.float64)
    outputs = conv(a)
    g = torch.randn_like(outputs)
    squares = torch.stack(
        [
            torch.autograd.grad(outputs[b], conv.weight, g[b], retain_graph=True)[0].square()
            for b in range(len(a))
        ]
    )
    total = torch.zeros_like(squares[0])
    shares = convolution(conv, a, g)["weight"].add_squares(total, first=1)
    torch.testing.assert_close(total, squares.sum(0))
    measured = shares >= 0
    assert measured.nonzero().flatten().tolist() in ([1, 5], [*range(7)])
    torch.testing.assert_close(shares[measured], squares.flatten(1).sum(1)[measured])


@pytest.mark.parametrize("places", [PATCHED_POSITIONS, PATCHED_POSITIONS + 1])
def test_convolutions_of_many_positions(places):
    goes_by_rule(Pooled(nn.Conv1d(2, 3, 3, padding=1), 3), images(2, places))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("places", [(1, 1), (2, 2), (3, 3)])
def test_wide_convolutions_in_float32(places, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(192, 160, 3, padding=1, bias=bias)
    assert conv.weight.numel() > SMALL
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(160 * math.prod(places), 3))
    batches = images(192, *places, size=5)
    expected = fisher_diagonal(copy.deepcopy(model).double(), batches, "softmax", **F64)
    found = fisher_diagonal(model, [(x.float(), y) for x, y in batches], "softmax")
    assert found.methods == all_by("rule", model)
    for name, values in expected.items():
        assert (found[name] - values).abs().max() <= 1e-6 * values.max()
    others = cut(*(torch.cat(part) for part in zip(*batches, strict=True)), 3)
    again = fisher_diagonal(copy.deepcopy(model).double(), others, "softmax", **F64)
    assert_close(again, expected, 1e-12)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(5), (5,)),
        (nn.BatchNorm1d(5), (5, 3)),
        (nn.BatchNorm2d(5), (5, 3, 2)),
        (nn.GroupNorm(5, 5), (5, 3, 2)),
        (nn.GroupNorm(1, 5), (5, 4)),
    ],
)
def test_normalised_channels(norm, shape):
    model = Pooled(
        nn.Sequential(norm, nn.Flatten(2) if len(shape) > 1 else nn.Unflatten(1, (5, 1))), 5
    )
    goes_by_rule(model, images(*shape))


def test_rms_norms():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    for norm in (LlamaRMSNorm(5), GemmaRMSNorm(5), T5LayerNorm(5)):
        model = Mean(nn.Sequential(norm, nn.Linear(5, 5)))
        methods = agrees_with_one_at_a_time(model, labelled(7, 6, 5), "softmax", 1e-5)
        assert methods == all_by("rule", model)
    for shape in (5, (6, 5)):
        goes_by_rule(Mean(nn.Sequential(nn.RMSNorm(shape), nn.Tanh())), labelled(7, 6, 5))


class Words(nn.Module):
    """Embeddings: a padding row, position ids shared by the batch, ids that occur several times."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(6, 5, padding_idx=0)
        self.places = nn.Embedding(9, 5)
        self.kinds = nn.Embedding(2, 5, sparse=True)
        self.head = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])[None]
        x = self.words(ids) + self.places(places) + self.kinds(torch.zeros_like(ids))
        return self.head(x.tanh().mean(1))


def test_embeddings():
    ids = torch.tensor([[1, 1, 2, 0], [5, 4, 1, 1], [2, 0, 0, 0], [3, 3, 3, 3], [4, 4, 0, 0]])
    batches = cut(ids, torch.tensor([0, 1, 2, 0, 1]), 3)
    goes_by_rule(Words(), batches)


def test_an_embedding_of_one_id_an_example():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 5, padding_idx=0), nn.Tanh(), nn.Linear(5, 3))
    batches = cut(torch.tensor([1, 4, 1, 0, 5]), torch.tensor([0, 1, 2, 0, 1]), 3)
    goes_by_rule(model, batches)


def test_scaled_embeddings():
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    ids = torch.tensor([[1, 1, 2, 0], [5, 4, 1, 1], [2, 0, 0, 0], [3, 3, 3, 3], [4, 4, 0, 0]])
    for kind in (BartScaledWordEmbedding, Gemma3TextScaledWordEmbedding):
        model = Mean(nn.Sequential(kind(6, 5, 0, embed_scale=2.5), nn.Tanh()))
        goes_by_rule(model, cut(ids, torch.tensor([0, 1, 2, 0, 1]), 3))


def test_layers_called_several_times_and_tied_ones():
    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(3, 4, padding_idx=0)
            self.layer = nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4)
            self.head = nn.Linear(4, 3, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            for _ in range(3):
                x = self.norm(x + self.layer(x).tanh())
            return self.head(x)

    ids = torch.tensor([[1, 2, 0], [2, 2, 1], [1, 0, 0], [2, 1, 2], [1, 1, 1]])
    labels = torch.tensor([[1, 2, -100], [2, 2, 1], [-100, 0, 0], [2, 1, 2], [1, 1, 1]])
    goes_by_rule(Repeated(), cut(ids, labels, 3), "token-softmax")


@pytest.mark.parametrize("shape", [(7, 5), (7, 6, 5)])
def test_layers_that_the_next_one_writes_into(shape):
    body = nn.Sequential(
        nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3), nn.ELU(inplace=True)
    )
    model = body if len(shape) == 2 else Mean(body, 3)
    goes_by_rule(model, labelled(*shape))


def test_frozen_layers_and_parameters():
    model = network()
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    goes_by_rule(model, labelled(7, 5))


def test_bfloat16_layers():
    model = network().bfloat16()
    batches = [(x.bfloat16(), y) for x, y in labelled(7, 5)]
    alone = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(y))]
    expected = fisher_diagonal(model, alone, "softmax")
    found = fisher_diagonal(model, batches, "softmax")
    assert found.methods == all_by("rule", model)
    assert_close(found, expected, 0.05)
    exact = fisher_diagonal(copy.deepcopy(model).double(), alone, "softmax", **F64)
    assert_close(found, exact, 0.05)


# What the rules cannot do goes to the loop, and nothing is wrong.


class TimeFirst(nn.Module):
    """Rows are positions inside: with as many positions as examples only squares tell."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inside = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inside(x.transpose(0, 1)).tanh().transpose(0, 1).mean(1))


def test_rows_that_are_not_examples():
    methods = agrees_with_one_at_a_time(TimeFirst(), labelled(12, 4, 5), "softmax")
    assert methods["inside.weight"] == methods["inside.bias"] == "module"
    assert methods["head.weight"] == "rule"


def test_rows_that_happen_to_be_as_many_as_examples_in_a_later_batch():
    # 5 examples of 3 positions, then 3 of 3: the first batch did not show that rows are positions.
    agrees_with_one_at_a_time(TimeFirst(), labelled(8, 3, 5, size=5), "softmax")


class Unbatched(nn.Module):
    """A layer that is given one vector, as long as there are examples."""

    def __init__(self, inside: nn.Module, *shape: int):
        super().__init__()
        torch.manual_seed(0)
        self.inside = inside
        self.shape = shape
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * self.inside(x.new_ones(self.shape)).mean()


@pytest.mark.parametrize(
    ("inside", "shape"),
    [
        (nn.Linear(4, 4), (4,)),
        (nn.Conv1d(4, 4, 2), (4, 3)),
        (nn.Conv2d(4, 4, 2), (4, 3, 3)),
        (nn.LayerNorm((4, 3)), (4, 3)),
        (nn.RMSNorm(4), (4,)),
    ],
)
def test_as_many_channels_as_examples(inside: nn.Module, shape: tuple[int, ...]):
    methods = agrees_with_one_at_a_time(
        Unbatched(copy.deepcopy(inside), *shape), labelled(8, 5), "softmax"
    )
    assert methods["head.weight"] == "rule"
    assert methods["inside.weight"] == "rule"  # As what all examples share, not by its layer.


class Outside(nn.Module):
    """A layer that is called, and whose weight is used once more outside of its call."""

    def __init__(self, size: float = 1.0):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).tanh() + self.size * (x @ self.first.weight))


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_weights_used_outside_their_layer(size):
    methods = agrees_with_one_at_a_time(Outside(size), labelled(7, 5), "softmax")
    assert methods == all_by("rule", Outside()) | {"first.weight": "loop"}


class Named(nn.Module):
    """A layer called by keyword."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(input=x).tanh())


class MyLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.weight


@pytest.mark.parametrize(
    "make",
    [
        Named,
        lambda: Mean(nn.Sequential(MyLinear(5, 5), nn.Tanh())),
        lambda: Mean(nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))),
        lambda: Mean(nn.TransformerEncoderLayer(5, 1, 8, batch_first=True)),
    ],
)
@pytest.mark.parametrize("shape", [(9, 6, 5), (8, 4, 5)])
def test_layers_that_are_not_what_they_seem(make: Callable[[], nn.Module], shape):
    model = make()
    batches = labelled(shape[0], 5) if isinstance(model, Named) else labelled(*shape)
    agrees_with_one_at_a_time(model, batches, "softmax")


def test_other_models():
    agrees_with_one_at_a_time(Experts(), labelled(9, 5), "softmax")
    agrees_with_one_at_a_time(Checkpointed(), labelled(9, 5), "softmax")
    agrees_with_one_at_a_time(Images(), labelled(7, 2, 5, 4), "softmax")
    ids = torch.tensor([[1, 2, 1, 2], [2, 1, 0, 0], [1, 1, 2, 0]])
    labels = torch.tensor([[2, 1, 0, 1], [1, 2, -100, -100], [-100, 1, 0, -100]])
    for recurrent in (False, True):
        batches = [({"ids": ids, "keep": ids > 0}, labels)]
        agrees_with_one_at_a_time(Tagger(recurrent), batches, "next-token-softmax")


# What has no rule goes by its module, run again by itself.


def goes_by_module(model: nn.Module, batches: list, *patterns: str) -> None:
    methods = agrees_with_one_at_a_time(model, batches, "softmax")
    for name, method in methods.items():
        expected = "module" if any(pattern in name for pattern in patterns) else "rule"
        assert method == expected, name


class Scaled(nn.Module):
    """A bare parameter, whose module takes more than rows: a mask and a number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Parameter(torch.randn(1, 1, 5))
        self.scale = nn.Parameter(torch.rand(5))
        self.unused = nn.Parameter(torch.rand(2))
        self.inside = nn.Linear(5, 5)

    def forward(self, x: Tensor, mask: Tensor, factor: float = 1.0) -> tuple[Tensor, int]:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.inside(x)], 1)
        return (mask @ x).tanh() * self.scale * factor, 7


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.scaled = Scaled()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1] + 1, x.shape[1] + 1, dtype=x.dtype).tril()
        return self.head(self.scaled(x, mask, factor=0.5)[0].mean(1))


@pytest.mark.parametrize("size", [1, 3, 4, 8])
def test_bare_parameters(size):
    batches = labelled(10, 3, 5, size=size)  # A mask of 4 by 4 is not 4 examples.
    methods = agrees_with_one_at_a_time(Bare(), batches, "softmax")
    assert "scaled.unused" not in methods
    if size > 1:
        assert methods == dict.fromkeys(methods, "rule")


def test_weights_of_other_layers():
    weight_norm = nn.utils.parametrizations.weight_norm
    goes_by_module(
        Mean(nn.Sequential(weight_norm(nn.Linear(5, 5)), nn.Tanh())),
        labelled(7, 6, 5),
        "parametrizations",
        "body.0.bias",
    )
    goes_by_module(Pooled(nn.ConvTranspose2d(2, 4, 3, stride=2), 4), images(2, 3, 4), "body")
    goes_by_module(Pooled(nn.Conv3d(2, 4, 2), 4), images(2, 3, 4, 2), "body")
    goes_by_module(Pooled(nn.PReLU(5), 5), images(5, 3), "body")
    goes_by_module(Mean(MyLinear(5, 5)), labelled(7, 6, 5), "body")


def test_transformer_encoder():
    layer = nn.TransformerEncoderLayer(5, 1, 8, batch_first=True)
    model = Mean(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    goes_by_rule(model, labelled(7, 6, 5))
    assert torch.backends.mha.get_fastpath_enabled()


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        torch.manual_seed(0)
        self.inside = kind(5, 4, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind):
    goes_by_module(Mean(Recurrent(kind), 8), labelled(7, 6, 5), "body")


def test_recurrent_layers_are_measured_without_their_dropout_and_come_back_as_they_were():
    model, batches = Mean(Recurrent(nn.LSTM), 8), labelled(7, 6, 5)
    model.body.inside = layer = nn.LSTM(5, 4, 2, batch_first=True, bidirectional=True)
    expected = fisher_diagonal(model.eval(), batches, "softmax")
    layer.dropout = 0.5
    found = fisher_diagonal(model.train(), batches, "softmax")
    assert (layer.training, layer.dropout) == (True, 0.5)
    for name, values in expected.items():
        assert torch.equal(found[name], values)


class Shared(nn.Module):
    """A bare parameter tied to a layer's, in a module that is called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 5)
        self.other = MyLinear(5, 5)
        self.other.weight = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.layer(self.other(x).tanh())).tanh()


class Turned(nn.Module):
    """A module whose gradients of single examples are strided, not contiguous."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btm,mt->bmt", x, self.weight).tanh().mT


def test_gradients_that_are_not_contiguous():
    goes_by_module(Mean(nn.Sequential(nn.Linear(5, 5), Turned())), labelled(7, 6, 5), "body.1")


def test_an_error_in_adding_squares_is_of_its_own_layer_only(monkeypatch):
    def refuse(*args: object) -> None:
        raise RuntimeError("view size is not compatible")

    monkeypatch.setattr(Rows, "add_squares", refuse)
    model = nn.Sequential(nn.Embedding(6, 5), nn.Tanh(), nn.Linear(5, 3))
    batches = cut(torch.tensor([1, 4, 1, 0, 5]), torch.tensor([0, 1, 2, 0, 1]), 3)
    notes: list[str] = []
    found = fisher_diagonal(model, batches, "softmax", note=notes.append)
    assert found.methods == all_by("rule", model) | {"0.weight": "module"}
    assert notes
    assert all(note.startswith("by rule, the gradients of 0 cannot be computed") for note in notes)


def test_weights_tied_between_rules_and_modules():
    goes_by_module(Mean(Shared()), labelled(7, 6, 5), "layer.weight", "other")


class Sometimes(nn.Module):
    """A layer that the first batch does not reach."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 5)
        self.rare = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).tanh()
        if (x[:, 0] > 2).any():
            y = y + self.rare(x) * (x[:, :1] > 2)
        return self.head(y)


def test_what_the_first_batch_does_not_reach():
    batches = labelled(9, 5, size=3)
    batches[0][0][:, 0] = 0
    batches[1][0][1, 0] = 3
    methods = agrees_with_one_at_a_time(Sometimes(), batches, "softmax")
    assert methods["first.weight"] == "rule"
    assert "rare.weight" in methods


class Halves(nn.Module):
    """In a short batch a layer gets one example less than there are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inside = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(1) if len(x) == 2 else [x]
        return self.head(torch.cat([self.inside(part) for part in parts]).tanh())


def test_calls_that_stop_having_a_row_for_each_example():
    agrees_with_one_at_a_time(Halves(), labelled(5, 5, size=3), "softmax")


class OneAtATime(nn.Module):
    """Takes no more than one example."""

    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.view(1, 5))


def test_a_model_that_takes_one_example_only():
    methods = agrees_with_one_at_a_time(OneAtATime(), labelled(5, 5), "softmax")
    assert set(methods.values()) == {"loop"}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixtral", "t5", "vit"])
def test_transformers(name):
    model, inputs, labels, likelihood = tiny(name)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    methods = agrees_with_one_at_a_time(model, [(inputs, labels)], likelihood, 1e-5)
    assert getattr(model.config, "use_cache", True)
    by_module = {
        "mixtral": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    }.get(name, [])
    for parameter, method in methods.items():
        assert method == ("module" if any(n in parameter for n in by_module) else "rule"), parameter


# Networks nobody thought of.


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """Draw a small network out of all layers with a rule, and the shape of its examples."""
    places = draw(st.lists(st.integers(3, 5), min_size=1, max_size=2))
    channels = draw(st.integers(1, 3)) * 2
    shape = (channels, *places)
    conv, norm = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d)}[len(places)]
    layers: list[nn.Module] = []
    for kind in draw(
        st.lists(st.sampled_from(["conv", "batch", "group", "tanh", "relu"]), max_size=4)
    ):
        if kind == "conv":
            out = draw(st.integers(1, 3)) * 2
            layers.append(
                conv(
                    channels,
                    out,
                    draw(st.integers(1, 3)),
                    padding="same",
                    padding_mode=draw(st.sampled_from(["zeros", "circular", "replicate"])),
                    dilation=draw(st.integers(1, 2)),
                    groups=draw(st.integers(1, 2)),
                    bias=draw(st.booleans()),
                )
            )
            channels = out
        else:
            make = {
                "batch": norm,
                "group": lambda width: nn.GroupNorm(2, width),
                "tanh": lambda width: nn.Tanh(),
                "relu": lambda width: nn.ReLU(),
            }
            layers.append(make[kind](channels))
    layers.append(nn.Flatten(2))
    width = math.prod(places)
    for kind in draw(st.lists(st.sampled_from(["linear", "layer", "rms", "tanh"]), max_size=4)):
        if kind == "linear":
            out = draw(st.integers(3, 6))  # Normalised, two numbers would have no slope.
            layers.append(nn.Linear(width, out, bias=draw(st.booleans())))
            width = out
        else:
            make = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "tanh": lambda width: nn.Tanh()}
            layers.append(make[kind](width))
    layers += [nn.Flatten(1), nn.Linear(channels * width, 3)]
    return nn.Sequential(*layers), shape


@settings(max_examples=25)
@given(networks(), st.integers(2, 5), st.integers(0, 99))
def test_random_networks(drawn, size, seed):
    model, shape = drawn
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, y = torch.randn(5, *shape).double(), torch.randint(3, (5,))
    model = model.double()
    alone = fisher_diagonal(model, cut(x, y, 1), "softmax", **F64)
    found = fisher_diagonal(model, cut(x, y, size), "softmax", **F64)
    assert_close(found, alone, 1e-9)
    assert set(found.methods.values()) == {"rule"}
