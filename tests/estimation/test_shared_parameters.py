"""Parameters that all examples share until they meet activations, outside of layers with a rule."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from consolidate.estimation.fisher_diagonal import fisher_diagonal
from support.modules import assert_close, cut
from support.one_at_a_time import (
    F64,
    Mean,
    agrees_with_one_at_a_time,
    all_by,
    goes_by_rule,
    labelled,
)


class Relative(nn.Module):
    """Attention whose scores get a bias by relative position, from one table for all layers."""

    def __init__(self, how: str = "add"):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.table = nn.Embedding(5, 2)
        self.layers = nn.ModuleList(nn.Linear(4, 12) for _ in range(2))
        self.embedding = nn.Linear(4, 4)

    def bias(self, x: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        found = self.table((places[:, None] - places).clamp(-2, 2) + 2)  # (T, T, heads)
        found = found.permute(2, 0, 1).unsqueeze(0)
        if self.how == "expand":
            found = found.expand((len(x), -1, -1, -1)).contiguous()
        if self.how == "mask":
            found = found + mask[:, None, None]
        return found

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.where(x[..., 0] > 1, -1.0, 0.0).to(x)
        x = self.embedding(x)
        bias = self.bias(x, mask)
        for layer in self.layers:
            q, k, v = layer(x).view(*x.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4)
            if self.how == "sdpa":
                y = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            else:
                scores = q @ k.mT
                scores += bias
                y = scores.softmax(-1) @ v
            x = x + y.transpose(1, 2).flatten(2).tanh()
        return x


@pytest.mark.parametrize("how", ["add", "expand", "mask", "sdpa"])
@pytest.mark.parametrize(("positions", "size"), [(3, 4), (4, 4), (5, 2), (1, 3), (8, 4), (2, 5)])
def test_one_bias_by_position_for_all_layers(how, positions, size):
    goes_by_rule(Mean(Relative(how), 4), labelled(7, positions, 4, size=size))


def test_as_many_positions_as_examples_in_a_later_batch():
    # 5 examples of 3 positions, then 3 of 3: ids of shape (3, 3) are no ids of three examples.
    goes_by_rule(Mean(Relative(), 4), labelled(8, 3, 4, size=5))
    goes_by_rule(Mean(Relative("expand"), 4), labelled(8, 2, 4, size=6))


class Windows(nn.Module):
    """Windows of a line as rows, with a bias by position in the window, some of them masked."""

    def __init__(self, shifted: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.shifted = shifted
        self.first = nn.Linear(4, 4)
        self.qkv, self.norm = nn.Linear(4, 12), nn.LayerNorm(4)
        self.table = nn.Parameter(torch.randn(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        windows = self.norm(self.first(x).reshape(-1, 3, 4))  # (B · windows, 3, 4)
        q, k, v = self.qkv(windows).view(-1, 3, 3, 2, 2).permute(2, 0, 3, 1, 4)
        places = torch.arange(3)
        index = (places[:, None] - places + 2).flatten()
        bias = (16 * self.table[index].view(3, 3, 2).sigmoid()).permute(2, 0, 1).contiguous()[None]
        if self.shifted:
            mask = torch.zeros(x.shape[1] // 3, 3, 3, dtype=x.dtype)
            mask[-1, :, -1] = -9
            mask = mask[None, :, None].expand(len(x), -1, -1, -1, -1)
            bias = bias + mask.reshape(-1, 1, 3, 3)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return (windows + y.transpose(1, 2).flatten(2)).view(x.shape).tanh()


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("positions", "size"), [(6, 3), (3, 4), (9, 2), (6, 6)])
def test_windows_are_no_examples(shifted, positions, size):
    # Rows that are windows could be those of any example, so they are not taken for theirs.
    agrees_with_one_at_a_time(
        Mean(Windows(shifted), 4), labelled(7, positions, 4, size=size), "softmax"
    )


class Packed(nn.Module):
    """Layers that see the tokens of all examples as rows, without the padding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.up, self.norm, self.head = nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        used = ids != 0
        rows = self.head(self.norm(self.up(self.embedding(ids)[used].tanh()).tanh()))
        return rows.new_zeros(*ids.shape, 3).masked_scatter(used[..., None], rows).sum(1)


@pytest.mark.parametrize("lengths", [[[4, 4, 4, 4], [2, 6, 3, 5]], [[4, 2, 6, 4]]])
def test_tokens_without_padding_are_no_examples(lengths):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for batch in lengths:
        ids = torch.zeros(len(batch), 6, dtype=torch.long)
        for row, length in zip(ids, batch, strict=True):
            row[:length] = torch.randint(1, 20, (length,), generator=generator)
        batches.append((ids, torch.randint(3, (len(batch),), generator=generator)))
    agrees_with_one_at_a_time(Packed(), batches, "softmax")


class Routed(nn.Module):
    """Tokens that an expert takes, as in a mixture of experts; the others skip it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.expert, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        taken = (tokens[:, 0] > 0).nonzero()[:, 0]
        made = torch.zeros_like(tokens).index_add(0, taken, self.expert(tokens[taken]).tanh())
        return self.head(made.view(x.shape).sum(1) + x.sum(1))


@pytest.mark.parametrize("giver", range(6))
def test_as_many_routed_tokens_as_examples(giver):
    x = torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(0)).double()
    x[..., 0] = -x[..., 0].abs()
    x[:, 0, 0] = 1.0  # the expert takes one token of each example,
    x[giver, 0, 0], x[giver + 1, 1, 0] = -1.0, 1.0  # but two of one, and none of its neighbour
    agrees_with_one_at_a_time(Routed(), [(x, torch.arange(8) % 3)], "softmax")


class TimeFirst(nn.Module):
    """An embedding whose rows are positions, and examples its columns."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(40, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids.T).cumsum(0).tanh().sum(0))


def test_as_many_positions_as_examples_with_repeated_tokens_between():
    # The first and the last example are the same either way: only weights tell the others apart.
    ids = torch.tensor([[12, 13, 14, 15], [7, 7, 7, 8], [9, 9, 9, 9], [16, 17, 18, 19]])
    agrees_with_one_at_a_time(TimeFirst(), [(ids, torch.tensor([0, 1, 2, 0]))], "softmax")


def test_an_attention_over_chunks_is_not_followed():
    class Chunks(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            chunks = self.first(x).reshape(-1, 4, 8)
            y = self.attention(chunks, chunks, chunks)[0].reshape(len(x), -1, 8)
            return self.head(y.tanh().mean(1))

    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(size, 4 * chunks, 5, generator=generator).double(), torch.arange(size) % 3)
        for size, chunks in ((4, 1), (4, 2), (3, 3))
    ]
    agrees_with_one_at_a_time(Chunks(), batches, "softmax")


class Bare(nn.Module):
    """Tokens in front, positions, scales, a projection, and an embedding of each example's ids."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 5)
        self.token = nn.Parameter(torch.randn(5))
        self.places = nn.Parameter(torch.randn(1, 9, 5))
        self.scale = nn.Parameter(torch.randn(5))
        self.size = nn.Parameter(torch.tensor(0.3))
        self.hidden = nn.Parameter(torch.randn(1, 1, 5))
        self.matrix = nn.Parameter(torch.randn(5, 5))
        self.weight, self.bias = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = (x[..., :1] > 1).to(x)
        y = self.first(x)
        tokens = self.hidden.expand(*x.shape[:2], -1)
        y = y * (1 - hidden) + tokens * hidden
        y = torch.cat([self.token.expand(len(x), 1, -1), y], dim=1)
        y = y + self.places[:, : y.shape[1]]
        y = functional.linear(y, self.weight, self.bias).tanh() @ self.matrix
        y = torch.where(y > 0, y, y * self.size.exp())
        y = y - self.scale.reshape(1, 1, -1) * y.square()
        return y.tanh()


@pytest.mark.parametrize(("positions", "size"), [(3, 4), (4, 5), (4, 4), (2, 3)])
def test_tokens_positions_scales_and_projections(positions, size):
    goes_by_rule(Mean(Bare()), labelled(7, positions, 5, size=size))


class Both(nn.Module):
    """A layer for the activations and for what they are compared with, as in DeBERTa."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.table = nn.Embedding(6, 4)
        self.other = nn.Linear(4, 4, bias=False)
        self.other.weight = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        heads = self.layer(x).view(*x.shape[:2], 2, 2).transpose(1, 2).flatten(0, 1)
        table = self.layer(self.norm(self.table.weight)[None]).view(1, 6, 2, 2)
        table = table.transpose(1, 2).flatten(0, 1)  # (heads, 6, 2)
        scores = torch.bmm(heads, table.repeat(len(heads) // 2, 1, 1).transpose(-1, -2))
        scores = scores.view(len(x), 2, x.shape[1], 6).transpose(1, 2).flatten(2)
        return x + self.other(x) + scores.tanh().mean(-1, keepdim=True)


@pytest.mark.parametrize(("positions", "size"), [(3, 4), (6, 5), (2, 2)])
def test_a_layer_that_is_shared_and_applied(positions, size):
    # Heads of all examples in one dimension are not followed.
    agrees_with_one_at_a_time(Mean(Both(), 4), labelled(7, positions, 4, size=size), "softmax")


class Places(nn.Embedding):
    """Learned positions, looked up for each example."""

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(x.shape[1]).expand(x.shape[:2])
        return super().forward(ids + (x[..., 0] > 0).long())


class Indexed(nn.Embedding):
    """The same by an index, some from the end."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[torch.arange(x.shape[1]).repeat(len(x), 1) - (x[..., 0] > 0).long()]


@pytest.mark.parametrize(
    ("kind", "padding"), [(Places, None), (Places, 1), (Places, -4), (Indexed, None)]
)
def test_lookups_for_each_example(kind, padding):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.places = nn.Linear(5, 5), kind(6, 5, padding_idx=padding)

        def forward(self, x: Tensor) -> Tensor:
            return (self.first(x) + self.places(x).to(x)).tanh()

    for positions, size in ((3, 4), (4, 4), (5, 2)):
        goes_by_rule(Mean(Model()), labelled(7, positions, 5, size=size))


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_of_torch(batch_first):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(4, 4)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            keep = x[..., 0] > 1.5
            x = self.first(x)
            y = x if batch_first else x.transpose(0, 1)
            y = self.attention(y, y, y, key_padding_mask=keep)[0]
            return x + (y if batch_first else y.transpose(0, 1))

    for positions, size in ((3, 4), (4, 4), (6, 3), (3, 5)):
        goes_by_rule(Mean(Model(), 4), labelled(8, positions, 4, size=size))


class Unknown(nn.Module):
    """Uses that are not followed: by functions that are not known, or beside the examples."""

    def __init__(self, how: str):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.first = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.rand(5))
        self.table = nn.Parameter(torch.rand(20, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.how == "lerp":
            return torch.lerp(y, y.square(), self.scale) * self.table[:1]
        if self.how == "stack":
            scale = self.scale.expand_as(y)
            return torch.stack([y, scale]).prod(0) * self.table[:1]
        return torch.cat([self.table[:2].expand(2, x.shape[1], 5), y])[2:] * self.scale


@pytest.mark.parametrize("how", ["lerp", "stack", "cat"])
def test_what_is_not_followed_goes_by_its_module(how):
    methods = agrees_with_one_at_a_time(Mean(Unknown(how)), labelled(7, 3, 5, size=4), "softmax")
    slower = {"lerp": {"body.scale"}, "stack": {"body.scale"}, "cat": {"body.table"}}[how]
    assert {name for name, method in methods.items() if method != "rule"} == slower


def test_in_bfloat16():
    for body, width in ((Relative(), 4), (Bare(), 5)):
        model = Mean(body, width).bfloat16()
        batches = [(x.bfloat16(), y) for x, y in labelled(7, 6, width)]
        found = fisher_diagonal(model, batches, "softmax")
        assert found.methods == all_by("rule", model)
        wide = [(x.double(), y) for x, y in batches]
        exact = fisher_diagonal(copy.deepcopy(model).double(), wide, "softmax", **F64)
        assert_close(found, exact, 0.1)


def test_the_parameters_come_back():
    model = Mean(Bare())
    before = dict(model.named_parameters())
    fisher_diagonal(model, [(x.float(), y) for x, y in labelled(7, 3, 5)], "softmax")
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())


BART = ("layers", "attention_heads")


@pytest.mark.parametrize("name", ["mpnet", "bart", "deberta", "swin"])
def test_transformers(name):
    import transformers

    torch.manual_seed(0)
    ids, labels = torch.randint(3, 9, (5, 4)), torch.randint(3, (5,))
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 9, "intermediate_size": 8, "num_labels": 3}
    if name == "mpnet":
        config = transformers.MPNetConfig(**sizes, max_position_embeddings=9)
    elif name == "deberta":
        config = transformers.DebertaV2Config(
            **sizes,
            relative_attention=True,
            position_buckets=3,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            max_position_embeddings=9,
        )
    elif name == "bart":
        both = {f"{side}_{of}": 2 for side in ("encoder", "decoder") for of in BART}
        config = transformers.BartConfig(
            **both, d_model=8, vocab_size=9, max_position_embeddings=8, num_labels=3
        )
        ids[:, -1] = config.eos_token_id
    else:
        config = transformers.SwinConfig(
            image_size=16, patch_size=2, embed_dim=4, depths=[2, 1], num_heads=[1, 2],
            window_size=4, num_labels=3,
        )  # fmt: skip
        ids = torch.randn(5, 3, 16, 16).double()
    head, key = "ForSequenceClassification", "input_ids"
    if name == "swin":
        head, key = "ForImageClassification", "pixel_values"
    model = getattr(transformers, type(config).__name__.removesuffix("Config") + head)(config)
    batches = [({key: x}, y) for x, y in cut(ids, labels, 3)]
    methods = agrees_with_one_at_a_time(model, batches, "softmax", 1e-5)
    if name not in ("deberta", "swin"):  # heads or windows of all examples in one dimension
        assert set(methods.values()) == {"rule"}
