"""Tokens are drawn from the model's own distribution, with a cache or without."""

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
import transformers

from consolidate.models.sampling import Distribution, continued, has_cache, reread, up_to_end
from formats.errors import NonFiniteError

VOCABULARY = 4
SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1}


def causal(kind: str = "gpt2", vocabulary: int = VOCABULARY) -> Any:
    """A small model in float64, whose distribution is far from uniform."""
    config: Any
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=8, n_layer=2, n_head=2, n_positions=16, **TOKENS
        )  # fmt: skip
    elif kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=vocabulary, num_key_value_heads=1, **SIZES, **TOKENS
        )
    elif kind == "opt":  # positions from the attention mask
        config = transformers.OPTConfig(
            vocab_size=vocabulary, hidden_size=8, ffn_dim=8, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=16, word_embed_proj_dim=8,
            pad_token_id=None, **TOKENS,
        )  # fmt: skip
    else:  # gemma: two kinds of layers in one cache
        config = transformers.Gemma2Config(
            vocab_size=vocabulary, num_key_value_heads=1, head_dim=4, sliding_window=3,
            pad_token_id=None, **SIZES, **TOKENS,
        )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = transformers.AutoModelForCausalLM.from_config(config).double().eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.4 * torch.randn_like(parameter)
    return module


def probabilities(module: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return module(torch.tensor([ids])).logits[0, -1].softmax(-1)


def test_texts_are_as_frequent_as_the_model_says() -> None:
    module, count = causal(), 8000
    plain = Distribution(seed=1, ends=frozenset(), most=2)
    texts = continued(module, [[0]] * count, range(count), plain, cached=True)
    found = Counter(map(tuple, texts.ids[:, 1:].tolist()))
    for pair in itertools.product(range(VOCABULARY), repeat=2):
        p = float(
            probabilities(module, [0])[pair[0]] * probabilities(module, [0, pair[0]])[pair[1]]
        )
        error = math.sqrt(p * (1 - p) / count)
        assert abs(found[pair] / count - p) < 4 * error, pair
    assert len(found) > 8


@pytest.mark.parametrize(("temperature", "top_p"), [(0.5, 1.0), (1.0, 0.6), (2.0, 0.8)])
def test_temperature_and_top_p_change_the_distribution(temperature: float, top_p: float) -> None:
    module, count = causal(), 4000
    changed = Distribution(2, frozenset(), 1, temperature, top_p)
    texts = continued(module, [[0]] * count, range(count), changed, cached=True)
    logits = probabilities(module, [0]).log()
    p = (logits / temperature).softmax(-1)
    kept, total = set(), 0.0
    for token in p.argsort(descending=True).tolist():  # the fewest that have the probability
        if total < top_p:
            kept.add(token)
            total += float(p[token])
    found = Counter(texts.ids[:, 1].tolist())
    assert set(found) <= kept
    for token in kept:
        share = float(p[token]) / total
        assert abs(found[token] / count - share) < 4 * math.sqrt(share * (1 - share) / count) + 1e-9
    # the model's own log p, whatever the texts are drawn from
    expected = logits[texts.ids[:, 1]]
    torch.testing.assert_close(texts.log_p[:, 0], expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "gemma"])
def test_a_cache_changes_nothing(kind: str) -> None:
    module = causal(kind, vocabulary=12)
    plain = Distribution(seed=5, ends=frozenset({1}), most=9)
    prompts, indices = [[0, 3, 7]] * 4, range(4)
    cached = continued(module, prompts, indices, plain, cached=has_cache(module))
    whole = continued(module, prompts, indices, plain, cached=False)
    assert torch.equal(cached.ids, whole.ids)
    torch.testing.assert_close(cached.log_p, whole.log_p)
    again = reread(module, cached, plain)
    assert again.difference < 1e-9
    assert again.changed < 1e-9
    assert has_cache(module)


def test_a_model_that_reads_ahead_is_noticed() -> None:
    config = transformers.BertConfig(vocab_size=12, **SIZES)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = transformers.BertLMHeadModel(config).double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.4 * torch.randn_like(parameter)
    plain = Distribution(seed=5, ends=frozenset(), most=9)
    texts = continued(module, [[0]] * 4, range(4), plain, cached=False)
    assert reread(module, texts, plain).difference > 0.01


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.9)])
def test_the_share_of_changed_texts_is_foreseen(temperature: float, top_p: float) -> None:
    # Weights that differ a little stand for other rounding, of which the first texts tell little.
    module, other, count = causal(vocabulary=12), causal(vocabulary=12), 2000
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in other.parameters():
            parameter += 1e-3 * torch.randn_like(parameter)
    plain = Distribution(4, frozenset({1}), 9, temperature, top_p)
    ours, theirs = (
        continued(one, [[0]] * count, range(count), plain, cached=True) for one in (module, other)
    )
    foreseen = reread(other, ours, plain).changed
    pairs = zip(ours.ids[:, 1:].tolist(), theirs.ids[:, 1:].tolist(), strict=True)
    found = sum(up_to_end(a, {1}) != up_to_end(b, {1}) for a, b in pairs) / count
    assert 0.01 < found < 0.7
    assert abs(foreseen - found) < 4 * math.sqrt(found / count)
    assert reread(module, ours, plain).changed < 1e-9


def test_a_token_depends_on_seed_text_and_position_alone() -> None:
    module = causal(vocabulary=12)

    def texts(seed: int, indices: list[int], most: int = 6) -> list[list[int]]:
        plain = Distribution(seed, frozenset(), most)
        return continued(module, [[0]] * len(indices), indices, plain, cached=True).ids.tolist()

    together = texts(0, [0, 1, 2, 3])
    assert together == texts(0, [0, 1, 2, 3])
    assert [texts(0, [i])[0] for i in range(4)] == together
    assert texts(0, [3, 1]) == [together[3], together[1]]
    assert [ids[:4] for ids in together] == texts(0, [0, 1, 2, 3], most=3)
    assert texts(1, [0, 1, 2, 3]) != together
    state = torch.random.get_rng_state()
    texts(0, [0])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_text_ends_with_its_first_end_token() -> None:
    assert up_to_end([4, 1, 2, 1], {1}) == [4, 1]
    assert up_to_end([4, 3, 2], {1}) == [4, 3, 2]
    assert up_to_end([1], {0, 1}) == [1]


def test_it_stops_once_all_have_ended() -> None:
    module = causal()
    everything = Distribution(seed=0, ends=frozenset(range(VOCABULARY)), most=9)
    assert continued(module, [[0]] * 3, range(3), everything, cached=True).ids.shape == (3, 2)


def test_outputs_that_are_not_finite_are_refused_with_their_place() -> None:
    module = causal()
    end = Distribution(seed=0, ends=frozenset(), most=5)
    with torch.no_grad():
        module.transformer.wpe.weight[2] = math.nan
    with pytest.raises(NonFiniteError, match=r"generated text 7, token 3: the model's outputs"):
        continued(module, [[0]] * 2, [6, 7], end, cached=True)
