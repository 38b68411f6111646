"""Which game is being played, from its frames alone: the flat Forget-me-not process.

After Kirkpatrick et al. 2017 and Milan et al. 2016: a hidden Markov model over contexts whose rate
of switches decays, and in each context a distribution of frames in which all pixels are
independent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from scripts.experiments.paper.games.environments import GREY, VIEWS, Frame

GREY_VALUES = 16
SIDE = 42  # of what the recogniser sees of a grey frame


def pixels_of(frame: Frame, view: str) -> NDArray[np.int64]:
    """Return what the recogniser sees: a colour for each cell, or 42 × 42 pixels of 16 grey values.

    The colour is the highest channel that the cell is in, from 1, or 0 where it is in none.

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
    colours = np.arange(1, frame.shape[-3] + 1)[:, None, None]
    return (frame * colours).max(-3).reshape(*ahead, -1)


def values_of(view: str) -> int:
    """Return how many values a pixel of the recogniser has."""
    return GREY_VALUES if view == GREY else VIEWS[view].shape[0] + 1


@dataclass(frozen=True)
class Recognising:
    """How contexts are told apart."""

    window: int = 128  # steps of each copy
    alike: float = 12.0  # frames of a window that count as one
    prior: float = 4.0  # β, in counts
    most: int = 20  # contexts


class Recogniser:
    """A flat Forget-me-not process.

    A window has counts c of each pixel's values in its frames, and context k has n_k, the sum of
    those of its windows; N_k and w are the counts of all values of a pixel. In a context each pixel
    has a Dirichlet prior of weight β, whose mean is q, the frequency of the values over all pixels
    and windows before this one, each value once more. With a = n_k + β q and A = N_k + β,

        p(window | k) = Π_i Γ(A) / Γ(A + w) Π_v Γ(a[i, v] + c[i, v]) / Γ(a[i, v]),

    which, for whole counts, is what one gets where each frame is predicted from all before it,
    those of its own window among them. One more, the hold-out, has no counts: beside q it knows of
    a window what it learns in it. The most likely takes in the window; where that is the hold-out,
    it is a context from then on, and there is a new hold-out, of probability 1/(t + 1), t the
    number of windows so far. Over contexts and hold-out there is a hidden Markov model that leaves
    its state with probability 1/(t + 1) a window, for each of the others alike.

    This differs from what is published. A count is the number of frames over `alike`: frames that
    follow each other are no independent draws, and pixels that stay the same for a while would make
    a new context win in the middle of a game. (A value that is new to a context then weighs more
    than its share of a frame.) The published prior is uniform: of few occupied cells it knows too
    little. The Markov model moves from window to window, not from frame to frame.

    Attributes:
        context: The present one, as of the last window's end.
        contexts: How many there are.
    """

    def __init__(self, pixels: int, values: int, settings: Recognising):
        """Begin without any context.

        Args:
            pixels: Of a frame.
            values: V, of a pixel.
            settings: Where there are the most contexts, there is no hold-out any more.
        """
        self.context = 0
        self.contexts = 0
        self._settings = settings
        self._counts = np.zeros((settings.most, pixels, values))
        self._often = np.ones(values)  # in all windows: q, not normalized
        self._weights = np.zeros(1)  # log posterior of contexts and hold-out
        self._windows = 0
        self._steps = 0  # of the present window
        self._seen = np.zeros((pixels, values))  # its frames, not divided

    @property
    def states(self) -> int:
        """Contexts, and the hold-out while there is room for another."""
        return self.contexts + (self.contexts < self._settings.most)

    def log_frequencies(self) -> NDArray[np.float64]:
        """Return the log of how often each context shows a value, (contexts, pixels, values).

        Before the first window has ended there is the hold-out alone.
        """
        known = self._known()[: max(1, self.contexts)]
        return np.log(known / known.sum(2, keepdims=True))

    def observe(self, frames: NDArray[np.int64]) -> bool:
        """Take in the frames of one step; return whether a window has ended with it.

        Args:
            frames: The pixels of each copy of the game, (copies, pixels).
        """
        pixels, values = self._seen.shape
        cells = np.arange(pixels) * values + frames
        self._seen += np.bincount(cells.ravel(), minlength=pixels * values).reshape(pixels, values)
        self._steps += 1
        if self._steps < self._settings.window:
            return False
        self._end_window(self._seen / self._settings.alike)
        self._steps = 0
        self._seen[:] = 0
        return True

    def _end_window(self, counts: NDArray[np.float64]) -> None:
        self._windows += 1
        share = 1 / (self._windows + 1)
        self._weights = _normalized(_moved(self._weights, share) + self._log_evidence(counts))
        best = int(self._weights.argmax())
        self._counts[best] += counts
        self._often += counts.sum(0)
        self.context = best
        if best == self.contexts:  # the hold-out
            self.contexts += 1
            if self.contexts < self._settings.most:
                known = self._weights + np.log1p(-share)
                self._weights = _normalized(np.append(known, np.log(share)))

    def _known(self) -> NDArray[np.float64]:
        """Return a = n_k + β q of each state, (states, pixels, values)."""
        return self._counts[: self.states] + self._settings.prior * self._often / self._often.sum()

    def _log_evidence(self, counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return log p of a window's counts, (pixels, values), in each state."""
        known = self._known()
        at = counts.nonzero()
        some = known[:, at[0], at[1]]
        whole, weight = known[:, 0].sum(1), counts[0].sum()  # the same for all pixels
        return (_lgamma(some + counts[at]) - _lgamma(some)).sum(1) - len(counts) * (
            _lgamma(whole + weight) - _lgamma(whole)
        )


def _lgamma(values: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = torch.lgamma(torch.from_numpy(values)).numpy()
    return found


def _normalized(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log weights of the sum 1."""
    return weights - np.logaddexp.reduce(weights)


def _moved(weights: NDArray[np.float64], rate: float) -> NDArray[np.float64]:
    """Return log weights after one step of the Markov model."""
    if len(weights) == 1:
        return weights
    here = np.exp(weights)
    elsewhere = (1 - here).clip(0) * (rate / (len(weights) - 1))
    return np.log((1 - rate) * here + elsewhere)


def fit(log_frequencies: NDArray[np.float64], frames: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return log p of each frame, (B, pixels), in each context: (B, contexts)."""
    return log_frequencies[:, np.arange(frames.shape[1]), frames].sum(2).T


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
