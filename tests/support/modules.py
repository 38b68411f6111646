"""Modules whose layers need every rule, and comparisons of their Fishers."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from consolidate.estimation.fisher_diagonal import fisher_diagonal


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, outputs))


def cut(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    """Relative to each tensor's largest value, so that true zeros have a floor."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        error = (found[name].double() - value.double()).abs().max()
        assert error <= rtol * value.double().abs().max() + 1e-24, (name, error.item())


class TimeFirst(nn.Module):
    """Its inner layer sees positions where examples are expected."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x.transpose(0, 1)).tanh().sum(0))


class OneAtATime(nn.Module):
    """Takes no more than one example."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.view(1, 5))


class Tagger(nn.Module):
    """An embedding tied to the head, learned positions shared by the batch, and a mask."""

    def __init__(self, recurrent: bool = False):
        super().__init__()
        torch.manual_seed(2)
        self.embedding = nn.Embedding(3, 4, padding_idx=0)
        self.positions = nn.Embedding(6, 4)
        self.block = (
            nn.GRU(4, 4, batch_first=True)
            if recurrent
            else nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.5)
        )
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(4, 3)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, keep: Tensor) -> SimpleNamespace:
        x = self.embedding(ids) + self.positions(torch.arange(ids.shape[1])[None])
        if isinstance(self.block, nn.GRU):
            x = self.block(x)[0]
        else:
            mask = torch.zeros(keep.shape, dtype=x.dtype).masked_fill(~keep, -1e9)
            causal = torch.full((ids.shape[1], ids.shape[1]), -1e9, dtype=x.dtype).triu(1)
            x = self.block(x, src_mask=causal, src_key_padding_mask=mask)
        return SimpleNamespace(logits=self.head(x * self.scale), loss="not ours")


class Images(nn.Module):
    """Convolutions, every batch statistic, dropout, a layer called twice, a parametrization."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.group = nn.GroupNorm(2, 4)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
        self.unused = nn.Linear(2, 2)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).tanh()
        x = self.twice(self.twice(x).tanh())
        x = nn.functional.dropout(self.group(x).mean((2, 3)), 0.5, self.training)
        return self.head(x)


class Experts(nn.Module):
    """Each row goes to one expert: rows of the batch are regrouped on the way."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 3)
        for k, expert in enumerate(self.experts):
            rows = ((x[:, 0] > 0).long() == k).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(x[rows]).to(out.dtype))
        return out


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)


def tiny(name: str) -> tuple[nn.Module, dict[str, Tensor], Tensor, str]:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 5}
    ids = torch.tensor([[1, 2, 3], [4, 2, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    text = {"input_ids": ids, "attention_mask": mask}
    tokens = ids.masked_fill(mask == 0, -100)
    if name == "bert":
        config = transformers.BertConfig(**sizes, intermediate_size=8, num_labels=3)
        model = transformers.BertForSequenceClassification(config)
        return model, text, torch.tensor([0, 2]), "softmax"
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=5, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        return transformers.GPT2LMHeadModel(config), text, tokens, "next-token-softmax"
    if name == "llama":
        config = transformers.LlamaConfig(
            **sizes, intermediate_size=8, num_key_value_heads=1, tie_word_embeddings=True
        )
        return transformers.LlamaForCausalLM(config), text, tokens, "next-token-softmax"
    if name == "mixtral":
        config = transformers.MixtralConfig(
            **sizes,
            intermediate_size=8,
            num_key_value_heads=1,
            num_local_experts=3,
            experts_implementation="eager",
        )
        return transformers.MixtralForCausalLM(config), text, tokens, "next-token-softmax"
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=5, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.5,
            decoder_start_token_id=0,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config), text, tokens, "token-softmax"
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        image_size=4, patch_size=2, num_channels=1, num_labels=3,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    return model, {"pixel_values": torch.randn(2, 1, 4, 4)}, torch.tensor([0, 2]), "softmax"


def is_right_on_one_batch(
    model: nn.Module, x: Tensor, change: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """Compare a batch, after a change, with its examples alone; return the methods."""
    x, y = x.double() if x.is_floating_point() else x, torch.arange(len(x)) % 3
    alone = cut(x, y, 1)
    expected = fisher_diagonal(
        copy.deepcopy(model), alone, "softmax", accumulate_dtype=torch.float64
    )
    change()
    found = fisher_diagonal(model, [(x, y)], "softmax", accumulate_dtype=torch.float64)
    assert_close(found, expected, 1e-9)
    return found.methods
