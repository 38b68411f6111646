"""The games: MinAtar's of 10 × 10 cells, and Atari's of 84 × 84 grey pixels."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]

MINATAR, ATARI = "minatar", "atari"
CHANNELS, OCCUPIED, GREY = "channels", "occupied", "grey"
PACKAGES = {MINATAR: "minatar", ATARI: "ale-py"}
GAMES = {
    MINATAR: ("asterix", "breakout", "freeway", "seaquest", "space_invaders"),
    ATARI: (
        "asterix", "beam_rider", "boxing", "breakout", "freeway",
        "pong", "qbert", "road_runner", "seaquest", "space_invaders",
    ),
}  # fmt: skip
NO_OPERATIONS = 30  # at most, at the start of an episode of Atari
REPEATS = 4  # of each action in Atari; a frame is the maximum of the last two pictures


class View(NamedTuple):
    """What an agent sees of a suite.

    Attributes:
        shape: Of one frame: channels, height, width.
        values: Of a pixel, 0 … values − 1.
        history: Frames that the network is given, the newest last.
        actions: The same for all games of a suite.
    """

    shape: tuple[int, int, int]
    values: int
    history: int
    actions: int


VIEWS = {
    CHANNELS: View((10, 10, 10), 2, 1, 6),
    OCCUPIED: View((1, 10, 10), 2, 4, 6),  # motion is in the frames before
    GREY: View((1, 84, 84), 256, 4, 18),
}


class Game(Protocol):
    """One copy of a game."""

    def reset(self) -> Frame:
        """Begin an episode; return its first frame."""

    def act(self, action: int) -> tuple[Frame, float, bool]:
        """Take an action; return the frame after it, the reward and whether the episode ended."""


class MinAtar:
    """A game of MinAtar, with its sticky actions and growing difficulty."""

    def __init__(self, name: str, view: str, seed: int):
        from minatar import Environment

        self._game = Environment(name)
        self._game.seed(seed)
        self._view = view

    def reset(self) -> Frame:
        """Begin an episode."""
        self._game.reset()
        return self._frame()

    def act(self, action: int) -> tuple[Frame, float, bool]:
        """Take an action."""
        reward, ended = self._game.act(action)
        return self._frame(), float(reward), bool(ended)

    def _frame(self) -> Frame:
        state: NDArray[np.bool_] = self._game.state()  # (10, 10, n)
        if self._view == OCCUPIED:
            return np.asarray(state.any(2), np.uint8)[None]
        frame = np.zeros(VIEWS[CHANNELS].shape, np.uint8)
        frame[: state.shape[2]] = state.transpose(2, 0, 1)
        return frame


class Atari:
    """A game of Atari: no-operations at the start, an action four times, grey, 84 × 84."""

    def __init__(self, name: str, seed: int):
        import ale_py
        from ale_py import roms

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self._game = ale_py.ALEInterface()
        self._game.setInt("random_seed", seed)
        self._game.setFloat("repeat_action_probability", 0.0)
        path = roms.get_rom_path(name)
        if path is None:
            raise ValueError(f"unknown game {name!r}: ale-py has no such ROM")
        self._game.loadROM(path)
        self._actions = self._game.getLegalActionSet()
        self._random = np.random.default_rng(seed)

    def reset(self) -> Frame:
        """Begin an episode."""
        self._game.reset_game()
        for _ in range(self._random.integers(NO_OPERATIONS + 1)):
            self._game.act(self._actions[0])
            if self._game.game_over():
                self._game.reset_game()
        return self._small(self._game.getScreenGrayscale())

    def act(self, action: int) -> tuple[Frame, float, bool]:
        """Take an action."""
        reward = 0.0
        before = picture = self._game.getScreenGrayscale()
        for _ in range(REPEATS):
            reward += self._game.act(self._actions[action])
            before, picture = picture, self._game.getScreenGrayscale()
            if self._game.game_over():
                break
        return self._small(np.maximum(before, picture)), reward, self._game.game_over()

    def _small(self, picture: Frame) -> Frame:
        from PIL import Image

        small = Image.fromarray(picture).resize((84, 84), Image.Resampling.BILINEAR)
        return np.asarray(small)[None]


def make_game(suite: str, name: str, view: str, seed: int) -> Game:
    """Make a copy of a game.

    Args:
        suite: MINATAR or ATARI.
        name: One of its GAMES.
        view: What is seen of it.
        seed: Of all that is random in the game.

    Raises:
        ValueError: There is no such game.
    """
    if name not in GAMES[suite]:
        raise ValueError(f"unknown game {name!r}: expected one of {', '.join(GAMES[suite])}")
    return MinAtar(name, view, seed) if suite == MINATAR else Atari(name, seed)


class Copies:
    """Several copies of one game that are played at the same time, each with its own chance.

    Attributes:
        frames: What each copy shows now, (copies, channels, height, width).
        fresh: Which copies are at the first frame of an episode.
        states: Their last frames, the newest last, (copies, history · channels, height, width);
            blank before the first of an episode.
    """

    def __init__(self, games: Sequence[Game], history: int):
        self._games = games
        self._history = history
        self.restart()

    def restart(self) -> None:
        """Begin a new episode in each copy."""
        self.frames = np.stack([game.reset() for game in self._games])
        self.fresh = np.ones(len(self._games), bool)
        self.states = np.zeros_like(self.frames).repeat(self._history, 1)
        self._see()

    def act(self, actions: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Take one action in each copy; return the rewards and which episodes ended."""
        rewards = np.empty(len(self._games), np.float32)
        ended = np.empty(len(self._games), bool)
        for i, (game, action) in enumerate(zip(self._games, actions.tolist(), strict=True)):
            frame, rewards[i], ended[i] = game.act(action)
            if ended[i]:
                frame = game.reset()
            self.frames[i] = frame
        self.fresh = ended.copy()
        self._see()
        return rewards, ended

    def _see(self) -> None:
        if self._history == 1:
            self.states = self.frames
            return
        channels = self.frames.shape[1]
        self.states[self.fresh] = 0
        self.states[:, :-channels] = self.states[:, channels:].copy()
        self.states[:, -channels:] = self.frames
