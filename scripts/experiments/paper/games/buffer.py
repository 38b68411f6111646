"""What an agent remembers of a game: the last transitions, each frame stored once."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scripts.experiments.paper.games.environments import Frame


class Transitions(NamedTuple):
    """A minibatch of B transitions."""

    states: Frame  # (B, history · channels, height, width)
    actions: NDArray[np.int64]  # (B,)
    rewards: NDArray[np.float32]  # (B,)
    following: Frame  # like the states; of no account where the episode ended
    ended: NDArray[np.bool_]  # (B,)


class Buffer:
    """A ring of transitions for each of several copies of a game, which step together.

    The state at a step is the frames up to it, blank before the first of an episode or after a cut;
    the next state is that of the step after it. So the newest step of a copy is no transition yet.
    """

    def __init__(self, capacity: int, copies: int, shape: tuple[int, int, int], history: int):
        """Make an empty buffer.

        Args:
            capacity: Steps of all copies together.
            copies: How many step together.
            shape: Of a frame: channels, height, width.
            history: Frames of a state.

        Raises:
            ValueError: The capacity has no room for a state and its successor.
        """
        self._length = capacity // copies
        if self._length < history + 2:
            raise ValueError(f"a buffer of {capacity} steps is too small for {copies} copies")
        self._history = history
        self._frames = np.zeros((self._length, copies, *shape), np.uint8)
        self._actions = np.zeros((self._length, copies), np.int64)
        self._rewards = np.zeros((self._length, copies), np.float32)
        self._ended = np.zeros((self._length, copies), bool)
        self._age = np.zeros((self._length, copies), np.int64)  # frames before in the episode
        self._cut = np.zeros(self._length, bool)  # steps that the next one does not follow
        self._count = 0  # steps that were ever stored, of each copy

    def __len__(self) -> int:
        whole = self._count - 1 - self._oldest() - int(self._cut.sum())
        return max(0, whole) * self._frames.shape[1]

    def add(
        self,
        frames: Frame,
        fresh: NDArray[np.bool_],
        actions: NDArray[np.int64],
        rewards: NDArray[np.float32],
        ended: NDArray[np.bool_],
    ) -> None:
        """Store one step of each copy.

        Args:
            frames: What each showed, (copies, channels, height, width).
            fresh: Whether that was the first frame of an episode, (copies,).
            actions: What was done, (copies,).
            rewards: What came of it, (copies,).
            ended: Whether the episode ended with it, (copies,).
        """
        at = self._count % self._length
        begins = fresh | self._cut[at - 1] | (self._count == 0)
        self._frames[at], self._cut[at] = frames, False
        self._actions[at], self._rewards[at], self._ended[at] = actions, rewards, ended
        self._age[at] = np.where(begins, 0, np.minimum(self._age[at - 1] + 1, self._history))
        self._count += 1

    def cut(self) -> None:
        """Leave the newest step out, for its successor never comes: the next is of another time."""
        if self._count:
            self._cut[(self._count - 1) % self._length] = True

    def sample(self, count: int, random: np.random.Generator) -> Transitions:
        """Draw transitions, each as likely as any other, with replacement."""
        steps = random.integers(self._oldest(), self._count - 1, count)
        while (cut := self._cut[steps % self._length]).any():
            steps[cut] = random.integers(self._oldest(), self._count - 1, int(cut.sum()))
        copies = random.integers(self._frames.shape[1], size=count)
        at = steps % self._length
        return Transitions(
            self._states(steps, copies),
            self._actions[at, copies],
            self._rewards[at, copies],
            self._states(steps + 1, copies),
            self._ended[at, copies],
        )

    def _oldest(self) -> int:
        return max(0, self._count - self._length + self._history - 1)

    def _states(self, steps: NDArray[np.int64], copies: NDArray[np.int64]) -> Frame:
        at = steps % self._length
        if self._history == 1:
            return self._frames[at, copies]
        age = self._age[at, copies]
        parts = []
        for back in range(self._history - 1, -1, -1):
            frames = self._frames[(steps - back) % self._length, copies]
            frames[age < back] = 0
            parts.append(frames)
        return np.concatenate(parts, 1)
