"""Texts that a causal language model generates, token by token."""

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from consolidate.estimation.batches import eval_mode, place_of
from consolidate.estimation.likelihoods import draw
from consolidate.runtime.quiet import quiet
from consolidate.runtime.randomness import uniforms
from formats.errors import NonFiniteError

STREAM = 4
"""Of the uniforms that tokens are drawn with; 0 samples labels, 1 to 3 mask tokens."""

_CACHES = ("cache", "past_key_values", "cache_params", "state")
"""The names that transformers gives what a model keeps of earlier tokens, by its version."""


@dataclass(frozen=True)
class Distribution:
    """What tokens are drawn from, and where a text ends."""

    seed: int
    ends: frozenset[int]  # tokens that end a text, and are its last
    most: int  # tokens of a text, those of its prompt not counted
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass
class Written:
    """Texts that were generated so far, without their prompts, in the order of their batches."""

    texts: list[list[int]] = field(default_factory=list)
    most: int | None = None  # texts at a time that fit into memory; None while a batch does
    halvings: int = 0
    changed: float | None = None  # share of texts that other rounding changes, as far as is known


class Continued(NamedTuple):
    """A batch of texts of one length, with tokens after an end that belong to none."""

    ids: Tensor  # (B, prompt + steps)
    log_p: Tensor  # of each token after the prompt, (B, steps)
    bounds: Tensor  # of the uniform numbers that give this token, (B, steps, 2)

    def first(self, count: int) -> "Continued":
        """Give the first few texts."""
        return Continued(*(tensor[:count] for tensor in self))


class Reread(NamedTuple):
    """How texts that were generated step by step differ from what the model reads in them whole."""

    difference: float  # mean |Δ log p| of the tokens
    changed: float  # share of the texts of which some token would be another


@torch.no_grad()
def continued(
    module: nn.Module,
    prompts: Sequence[Sequence[int]],
    indices: Sequence[int],
    distribution: Distribution,
    *,
    cached: bool,
) -> Continued:
    """Continue prompts of one length until each text has ended.

    Token t of text i is the class in which the inverse distribution function at u(seed, i, t)
    falls, in float64.

    Args:
        module: A causal language model of transformers.
        prompts: Token ids, B of one length.
        indices: The number i of each text.
        distribution: What tokens are drawn from.
        cached: Whether what the model keeps of earlier tokens is used, and not computed again.

    Returns:
        The texts with their prompts, log p of the tokens in the model's own distribution, and
        between which numbers u these tokens are drawn.

    Raises:
        NonFiniteError: If an output is NaN or infinite, with the text and the token.
    """
    device = place_of(module).device
    ids = torch.tensor(prompts, device=device)
    numbers = uniforms(
        distribution.seed, torch.tensor(indices), distribution.most, stream=STREAM
    ).to(device, torch.float32 if device.type == "mps" else torch.float64)
    ends = torch.tensor(sorted(distribution.ends), dtype=torch.long, device=device)
    last = {"logits_to_keep": 1} if "logits_to_keep" in _accepted(module) else {}
    name = _cache_of(module) or ""
    ended = torch.zeros(len(ids), dtype=torch.bool, device=device)
    kept: Any = None
    found, bounds = [], []
    with eval_mode(module), quiet():
        for t in range(distribution.most):
            memory = {"use_cache": True, name: kept} if cached else {}
            read = ids if kept is None else ids[:, -1:]
            outputs: Any = module(
                input_ids=read, attention_mask=torch.ones_like(ids), **memory, **last
            )
            kept = getattr(outputs, name, None) if cached else None
            logits = outputs.logits[:, -1].to(numbers.dtype)
            p = logits.softmax(-1)
            _check_finite(p, indices, t)
            weights = _weights(p, logits, distribution)
            drawn = draw(weights.of, numbers[:, t])
            tokens = weights.token(drawn)
            found.append(p.gather(1, tokens[:, None]).log())
            bounds.append(weights.bounds(drawn))
            ids = torch.cat([ids, tokens[:, None]], 1)
            ended |= torch.isin(tokens, ends)
            if ended.all():
                break
    return Continued(ids, torch.cat(found, 1), torch.stack(bounds, 1))


@torch.no_grad()
def reread(module: nn.Module, texts: Continued, distribution: Distribution) -> Reread:
    """Compare texts that were generated step by step with the model's outputs for them whole.

    Both differ by rounding, at least as much as the outputs for another batch size do. Token t,
    drawn from the interval I_t of u, would be another with the probability 1 − |I_t ∩ I'_t| / |I_t|
    and its text with 1 − Π_t |I_t ∩ I'_t| / |I_t|; their mean estimates the share of all texts.
    """
    with eval_mode(module), quiet():
        outputs: Any = module(input_ids=texts.ids, attention_mask=torch.ones_like(texts.ids))
    steps, ends = texts.log_p.shape[1], distribution.ends
    logits = outputs.logits[:, -steps - 1 : -1].to(texts.log_p.dtype)
    tokens = texts.ids[:, -steps:]
    log_p = logits.log_softmax(-1).gather(2, tokens[:, :, None])[:, :, 0]
    same = []
    for i, text in enumerate(tokens.tolist()):
        count = len(up_to_end(text, ends))
        weights = _weights(logits[i, :count].softmax(-1), logits[i, :count], distribution)
        low, high = texts.bounds[i, :count].unbind(-1)
        again_low, again_high = weights.bounds(weights.place(tokens[i, :count])).unbind(-1)
        both = torch.minimum(high, again_high) - torch.maximum(low, again_low)
        same.append((both / (high - low)).clamp(0, 1).nan_to_num(0).prod())  # 0/0: too narrow
    return Reread(float((log_p - texts.log_p).abs().mean()), 1 - float(torch.stack(same).mean()))


def has_cache(module: nn.Module) -> bool:
    """Return whether a model can keep what it needs of earlier tokens."""
    return _cache_of(module) is not None


def up_to_end(ids: Sequence[int], ends: Collection[int]) -> list[int]:
    """Return the tokens up to the first end token, which is the last."""
    at = next((n for n, token in enumerate(ids, 1) if token in ends), len(ids))
    return list(ids[:at])


def _cache_of(module: nn.Module) -> str | None:
    """Name the argument, and field of the outputs, with a model's cache."""
    return next((name for name in _CACHES if name in _accepted(module)), None)


def _accepted(module: nn.Module) -> Collection[str]:
    return inspect.signature(module.forward).parameters


class _Weights(NamedTuple):
    """What tokens are drawn with, in the order in which they are numbered for it."""

    of: Tensor  # (B, V), of a sum that need not be 1
    order: Tensor | None  # the tokens, (B, V); None in the order of the vocabulary

    def token(self, drawn: Tensor) -> Tensor:
        """Return the tokens at places in the order, both (B,)."""
        return drawn if self.order is None else self.order.gather(1, drawn[:, None])[:, 0]

    def place(self, tokens: Tensor) -> Tensor:
        """Return the places of tokens in the order, both (B,)."""
        return tokens if self.order is None else (self.order == tokens[:, None]).int().argmax(1)

    def bounds(self, drawn: Tensor) -> Tensor:
        """Return between which numbers u these places are drawn, (B, 2)."""
        sums = functional.pad(self.of.cumsum(-1), (1, 0))
        return sums.gather(1, torch.stack([drawn, drawn + 1], 1)) / sums[:, -1:]


def _weights(p: Tensor, logits: Tensor, distribution: Distribution) -> _Weights:
    """Give what tokens are drawn with, from logits (B, V) and p = softmax(logits)."""
    if distribution.temperature != 1:
        most = logits.amax(-1, keepdim=True)  # first, so that no quotient overflows to infinity
        p = ((logits - most) / distribution.temperature).softmax(-1)
    if distribution.top_p == 1:
        return _Weights(p, None)
    likely, tokens = p.sort(dim=-1, descending=True, stable=True)
    before = likely.cumsum(-1) - likely
    return _Weights(likely.masked_fill(before >= distribution.top_p, 0), tokens)


def _check_finite(p: Tensor, indices: Sequence[int], t: int) -> None:
    wrong = ~p.sum(-1).isfinite()
    if wrong.any():
        text = indices[int(wrong.nonzero()[0])] + 1
        raise NonFiniteError(
            f"generated text {text}, token {t + 1}: the model's outputs are not finite; look for "
            "NaN or infinite weights, or use a wider --dtype"
        )
