"""The check that the rows of a whole batch are those of its examples."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from consolidate.estimation.batches import Alone, near, out_of_memory
from consolidate.estimation.example_gradients import Gradients, Rows, Whole
from consolidate.estimation.layer_hooks import Recording, Unit, UnitError

APART = 2.0**30
FACTORS = tuple(APART**power for power in range(-3, 4))
"""Of examples in a vector for a whole batch, so far apart that a row shows whose it is."""
FLUSHED = 2.0**-102
"""Below it a sum of float32 may lack terms that were flushed to zero, those below 2⁻¹²⁶."""

Run = Callable[[], AbstractContextManager[tuple[Recording, Tensor]]]


class MixedExamplesError(Exception):
    """Rows of a batch are not those of its examples; a slower method may succeed."""

    def __init__(
        self, names: Iterable[str] = (), *, only_loop: bool = False, refusal: str | None = None
    ):
        super().__init__()
        self.names = set(names)  # of parameters
        self.only_loop = only_loop  # whether none but single examples can be measured
        self.refusal = refusal  # what the model raised with so many examples


class Doubt(NamedTuple):
    """Rows that do not look like those of a batch's examples, and what showed it."""

    one: Tensor  # the vector of each example, (…)
    draws: list[Tensor]  # its factors, (B,)


def suspect_rows(
    known: Alone,
    recording: Recording,
    outputs: Tensor,
    number: int,
    units: Iterable[Unit],
    traces: Mapping[str, Tensor],
) -> Doubt | None:
    """Return what shows that rows of a recorded batch are not its examples'; None if nothing does.

    The outputs of one example are those that it has alone. A random vector, the same for each
    example but times one of FACTORS, arrives with these at each marked call; then again with the
    factors reversed, so that of two examples each has the larger factor once. It does not in a
    time-first layout with as many positions as examples, nor where tokens are routed, or examples
    leak into one another. What concerns two examples alone is missed where they have the same
    factor: about once in seven times, and never for neighbours.

    Rows of unlike size may look wrong, and so may what a second backward pass of one graph finds,
    which follows the batch's own: `compare_rows` decides. So it does where nothing arrives.

    Args:
        known: An example of it, and its outputs.
        recording: Of the forward pass.
        outputs: Its outputs, (B, …).
        number: The batch's, which the vector and the factors depend on.
        units: What is marked.
        traces: What the batch's own backward passes added, (B,), by name; negative if unknown.

    Raises:
        MixedExamplesError: The outputs of the known example are others.
    """
    example, expected = known
    if not near(expected, outputs[example : example + 1].detach()):
        raise MixedExamplesError(only_loop=True)
    if not outputs.requires_grad:
        return None
    generator = torch.Generator().manual_seed(number)
    one = torch.randn(outputs.shape[1:], generator=generator).to(outputs)
    ascending = _factors(units, outputs)
    steps = torch.randint(1, len(ascending), (recording.size,), generator=generator)
    places = steps.cumsum(0) % len(ascending)  # never a neighbour's
    draws = [ascending[at].to(outputs.device) for at in (places, len(ascending) - 1 - places)]
    try:
        for factors in draws:
            for name, largest in _arrived(recording, outputs, factors, one, keep=True):
                nothing = not largest.any() and name in traces and bool((traces[name] > 0).any())
                if nothing or _are_mixed(largest, factors):
                    return Doubt(one, draws)
    except UnitError:
        raise
    except Exception as error:  # A graph of functions that can be used once.
        if out_of_memory(error):
            raise
        return Doubt(one, draws)
    return None


def compare_rows(run: Run, run_alone: Callable[[int], Tensor], doubt: Doubt) -> None:
    """Compare the rows of each draw of factors with those of no factors.

    Each is from a forward pass of its own. Where rows differ, the outputs of every example have to
    be those that it has alone.

    Args:
        run: Runs the batch forward, for a block, and gives the recording and the outputs, (B, …).
        run_alone: Runs one of its examples, by its place, and gives the outputs, (1, …).
        doubt: What to decide.

    Raises:
        MixedExamplesError: Those of some parameters differ, or examples change one another.
    """
    one, draws = doubt
    mixed: set[str] = set()
    with run() as (recording, outputs):
        usual = _arrived(recording, outputs, torch.ones_like(draws[0]), one, keep=False)
    for factors in draws:
        with run() as (recording, outputs):
            found = _arrived(recording, outputs, factors, one, keep=False)
        if [name for name, _ in usual] != [name for name, _ in found]:  # Other calls than before.
            raise MixedExamplesError(only_loop=True)
        for (name, before), (_, after) in zip(usual, found, strict=True):
            if _differ(after, before * factors, _least(before.max())):
                mixed.add(name)
        mixed -= recording.mismatched
    if mixed:
        whole = outputs.detach()
        if not all(near(run_alone(i), whole[i : i + 1]) for i in range(len(whole))):
            raise MixedExamplesError(only_loop=True)
        raise MixedExamplesError(mixed)


def _factors(units: Iterable[Unit], outputs: Tensor) -> Tensor:
    """Return the factors that the outputs and the units compute with, in ascending order."""
    dtypes = {p.dtype for unit in units for p in unit.module.parameters()} | {outputs.dtype}
    return torch.tensor((0.0, 1.0) if torch.float16 in dtypes else FACTORS)


def _arrived(
    recording: Recording, outputs: Tensor, factors: Tensor, one: Tensor, *, keep: bool
) -> list[tuple[str, Tensor]]:
    """Return the largest number in each row of each call, (B,), by the parameter's name.

    Args:
        recording: Of the forward pass.
        outputs: Of the batch, (B, …).
        factors: Of the examples, (B,).
        one: The vector for each, (…).
        keep: Whether the graph is used again.
    """
    done: list[tuple[str, Tensor]] = []
    begun: dict[str, Tensor] = {}

    def note(gradients: Mapping[str, Gradients], examples: range) -> None:
        largest: dict[int, Tensor] = {}  # A layer's weight and bias share their rows.
        for name, found in gradients.items():
            rows = _rows_of(found)
            if not rows.numel():
                continue
            if examples.start == 0:
                begun[name] = rows.new_zeros(recording.size)
            if id(rows) not in largest:
                largest[id(rows)] = _largest(rows)
            begun[name][examples.start : examples.stop] = largest[id(rows)]
            if examples.stop == recording.size:
                done.append((name, begun.pop(name)))

    vector = factors.to(one).view(-1, *[1] * one.ndim) * one
    recording.backward(outputs, vector, note, keep=keep)
    return done


def _largest(rows: Tensor) -> Tensor:
    """Return max |x| of each row, (B,); torch's norm takes five times as long."""
    rest = tuple(range(1, rows.ndim))
    return torch.maximum(rows.amax(rest), -rows.amin(rest)) if rest else rows.abs()


def _are_mixed(largest: Tensor, factors: Tensor) -> bool:
    """Return whether a row, by its largest number, does not look as if of its example's factor.

    A row of zeros may be any example's. A NaN is named where it is added.
    """
    usual = (largest / factors)[(factors > 0) & (largest > 0)]
    if not len(usual):
        return False
    middle, between = usual.median(), APART**0.5
    expected, least = middle * factors, _least(middle)
    too_large = largest > (expected * between).clamp(min=least)
    too_small = (largest > 0) & (largest < expected / between) & (expected > least)
    return bool((too_large | too_small).any())


def _least(usual: Tensor) -> Tensor:
    """Return what a row has to exceed to show whose it is, from one of factor 1."""
    return (usual / APART**3.5).clamp(min=FLUSHED)


def _differ(found: Tensor, expected: Tensor, least: Tensor) -> bool:
    """Return whether some of these differ by more than rounding; what is below `least` may."""
    large = torch.maximum(found, expected) > least
    return bool((large & ((found > 2 * expected) | (found < expected / 2))).any())


def _rows_of(found: Gradients) -> Tensor:
    """Return a tensor with a row for each example, which is zero where its gradient is."""
    match found:
        case Whole():
            return found.gradients
        case Rows():
            return found.values
        case _:
            return found.g
