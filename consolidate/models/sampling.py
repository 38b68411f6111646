"""Texts that a causal language model generates, token by token."""

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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


class Continued(NamedTuple):
    """A batch of texts of one length, with tokens after an end that belong to none."""

    ids: Tensor  # (B, prompt + steps)
    log_p: Tensor  # of each token after the prompt, (B, steps)


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
        The texts with their prompts, and log p of the tokens in the model's own distribution.

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
    found = []
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
            tokens = _sampled(p, logits, numbers[:, t], distribution)
            found.append(p.gather(1, tokens[:, None]).log())
            ids = torch.cat([ids, tokens[:, None]], 1)
            ended |= torch.isin(tokens, ends)
            if ended.all():
                break
    return Continued(ids, torch.cat(found, 1))


@torch.no_grad()
def disagreement(module: nn.Module, texts: Continued) -> float:
    """Return the mean |Δ log p| of tokens between texts read step by step and read whole."""
    with eval_mode(module), quiet():
        outputs: Any = module(input_ids=texts.ids, attention_mask=torch.ones_like(texts.ids))
    steps = texts.log_p.shape[1]
    log_p = outputs.logits[:, -steps - 1 : -1].to(texts.log_p.dtype).log_softmax(-1)
    whole = log_p.gather(2, texts.ids[:, -steps:, None])[:, :, 0]
    return float((whole - texts.log_p).abs().mean())


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


def _sampled(p: Tensor, logits: Tensor, numbers: Tensor, distribution: Distribution) -> Tensor:
    """Draw a token for each row, (B,)."""
    if distribution.temperature != 1:
        most = logits.amax(-1, keepdim=True)  # first, so that no quotient overflows to infinity
        p = ((logits - most) / distribution.temperature).softmax(-1)
    if distribution.top_p == 1:
        return draw(p, numbers)
    likely, tokens = p.sort(dim=-1, descending=True, stable=True)
    before = likely.cumsum(-1) - likely
    drawn = draw(likely.masked_fill(before >= distribution.top_p, 0), numbers)
    return tokens.gather(1, drawn[:, None])[:, 0]


def _check_finite(p: Tensor, indices: Sequence[int], t: int) -> None:
    wrong = ~p.sum(-1).isfinite()
    if wrong.any():
        text = indices[int(wrong.nonzero()[0])] + 1
        raise NonFiniteError(
            f"generated text {text}, token {t + 1}: the model's outputs are not finite; look for "
            "NaN or infinite weights, or use a wider --dtype"
        )
