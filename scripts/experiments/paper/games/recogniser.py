"""Which game is being played, from its frames alone: the flat Forget-me-not process.

After Kirkpatrick et al. 2017 and Milan et al. 2016: a hidden Markov model over contexts whose rate
of switches decays, and in each context a distribution of frames in which all pixels are
independent.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scripts.experiments.paper.games.environments import GREY, VIEWS, Frame

GREY_VALUES = 16
SIDE = 42  # of what the recogniser sees of a grey frame


def pixels_of(frame: Frame, view: str) -> NDArray[np.int64]:
    """Return what the recogniser sees: all cells, or 42 × 42 pixels of 16 grey values.

    Args:
        frame: One or more, (…, channels, height, width).
        view: Of which they are.

    Returns:
        (…, pixels), each 0 … `values_of(view)` − 1.
    """
    ahead = frame.shape[:-3]
    if view == GREY:
        whole = frame.reshape(*ahead, SIDE, 2, SIDE, 2).astype(np.int64).sum((-3, -1)) // 4
        return (whole * GREY_VALUES // 256).reshape(*ahead, -1)
    return frame.reshape(*ahead, -1).astype(np.int64)


def values_of(view: str) -> int:
    """Return how many values a pixel of the recogniser has."""
    return GREY_VALUES if view == GREY else VIEWS[view].values


class Recogniser:
    """A flat Forget-me-not process.

    Context k has counts n_k of each pixel's values in its N_k frames, with a Dirichlet prior that
    weighs as much as β frames. Its mean is q, the frequency of the values over all pixels and
    frames so far:

        p_k(x) = Π_i (n_k[i, x_i] + β q[x_i]) / (N_k + β)

    One more, the hold-out, has no counts: it knows how often a value is seen, and not where. At the
    end of a window its most likely context takes in the frames. Where that is the hold-out, it is a
    context from then on, and there is a new hold-out. Over contexts and hold-out there is a hidden
    Markov model that leaves its state with probability 1/(t + 1), t the number of frames so far,
    for each of the others alike.

    This differs from what is published, for frames of few occupied pixels. A uniform hold-out would
    never be the most likely there. Contexts do not learn within a window: a new one would win in
    the middle of a game, by pixels that stay the same for a while. And a window can be joined into
    one frame, since the frames within it are much alike.

    Attributes:
        context: The present one, as of the last window's end.
        contexts: How many there are.
    """

    def __init__(
        self,
        pixels: int,
        values: int,
        *,
        window: int,
        prior: float,
        most: int,
        joined: bool = False,
    ):
        """Begin without any context.

        Args:
            pixels: Of a frame.
            values: V, of a pixel.
            window: Frames.
            prior: β, in frames.
            most: Contexts; once there are so many, the hold-out is not considered any more.
            joined: Whether a window is one frame, the largest value of each pixel in it.
        """
        self.context = 0
        self.contexts = 0
        self._counts = np.zeros((most + 1, pixels, values))
        self._frames = np.zeros(most + 1)  # N
        self._often = np.ones(values)  # q, not normalized
        self._weights = np.zeros(1)  # log posterior of contexts and hold-out
        self._window, self._prior, self._most, self._joined = window, prior, most, joined
        self._at = np.arange(pixels)
        self._seen = 0
        self._pending: list[NDArray[np.int64]] = []

    @property
    def states(self) -> int:
        """Contexts, and the hold-out while there is room for another."""
        return self.contexts + (self.contexts < self._most)

    def posterior(self) -> NDArray[np.float64]:
        """Return the probability of each context, and of the hold-out while there is one."""
        return np.exp(self._weights)

    def log_probabilities(self, frames: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return log p of each frame, (B, pixels), in each state, as if each came next: (B, K)."""
        k = self.states
        counts = self._counts[:k, self._at, frames]  # (K, B, pixels)
        expected = self._prior * (self._often / self._often.sum())[frames]
        whole = np.log(self._frames[:k] + self._prior)
        return np.log(counts + expected).sum(2).T - len(self._at) * whole

    def observe(self, frame: NDArray[np.int64]) -> bool:
        """Take in a frame; return whether a window has ended with it.

        Args:
            frame: Its pixels, (pixels,).
        """
        self._seen += 1
        self._pending.append(frame)
        ended = len(self._pending) == self._window
        if self._joined:
            if not ended:
                return False
            frame = np.max(self._pending, 0)
            self._pending = [frame]
        [found] = self.log_probabilities(frame[None])
        weights = _moved(self._weights, 1 / (self._seen + 1)) + found
        self._weights = weights - np.logaddexp.reduce(weights)
        if ended:
            self._end_window()
        return ended

    def _end_window(self) -> None:
        best = int(self._weights.argmax())
        for frame in self._pending:
            self._counts[best, self._at, frame] += 1
            self._often += np.bincount(frame, minlength=len(self._often))
        self._frames[best] += len(self._pending)
        self._pending = []
        self.context = best
        if best == self.contexts:  # the hold-out
            self.contexts += 1
            if self.contexts < self._most:
                share = 1 / (self._seen + 1)
                weights = np.append(self._weights + np.log1p(-share), np.log(share))
                self._weights = weights - np.logaddexp.reduce(weights)


def _moved(weights: NDArray[np.float64], rate: float) -> NDArray[np.float64]:
    """Return log weights after one step of the Markov model."""
    if len(weights) == 1:
        return weights
    here = np.exp(weights)
    elsewhere = (1 - here).clip(0) * (rate / (len(weights) - 1))
    return np.log((1 - rate) * here + elsewhere)


def highest_channel(frames: Frame) -> int:
    """Return the highest channel in use in some frames: the baseline, in one line."""
    return int(np.flatnonzero(frames.any((0, 2, 3))).max(initial=0))


class Recognition(NamedTuple):
    """How well contexts follow the games.

    Attributes:
        purity: The share of time in which the game is the one that its context has seen most.
        contexts: How many were used.
        switches: Of the game.
        found: Those after which the context changes before the next.
        delay: Steps from these to that change, on average; None where none is found.
        false_alarms: All other changes of the context.
    """

    purity: float
    contexts: int
    switches: int
    found: int
    delay: float | None
    false_alarms: int


def recognition(games: Sequence[int], contexts: Sequence[int], steps: int) -> Recognition:
    """Compare contexts with games.

    Args:
        games: What was played, at each moment.
        contexts: What was recognised, at the same moments.
        steps: From one moment to the next.
    """
    played, seen = np.asarray(games), np.asarray(contexts)
    table = np.zeros((played.max() + 1, seen.max() + 1), np.int64)
    np.add.at(table, (played, seen), 1)
    switches = np.flatnonzero(np.diff(played)) + 1
    changes = np.flatnonzero(np.diff(seen)) + 1
    delays = []
    for begin, end in pairwise([*switches, len(played)]):
        after = changes[(changes >= begin) & (changes < end)]
        if len(after):
            delays.append(int(after[0] - begin) * steps)
    return Recognition(
        purity=float(table.max(0).sum() / len(played)),
        contexts=int((table.sum(0) > 0).sum()),
        switches=len(switches),
        found=len(delays),
        delay=float(np.mean(delays)) if delays else None,
        false_alarms=len(changes) - len(delays),
    )
