"""The sequence of games: what is played when, what is remembered at a switch, what is measured."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from consolidate.estimation.fisher_diagonal import fisher_diagonal
from consolidate.ewc.fisher_merging import merge_separate
from consolidate.ewc.overlap import layer_overlaps
from consolidate.ewc.penalty import Penalty
from consolidate.training.loop import seeded
from scripts.experiments.lib.records import Figures
from scripts.experiments.paper.games.agent import Agent, Layout, Learning, Network, weights_of
from scripts.experiments.paper.games.buffer import Buffer
from scripts.experiments.paper.games.environments import (
    CHANNELS,
    GREY,
    MINATAR,
    OCCUPIED,
    VIEWS,
    Copies,
    Frame,
    make_game,
)
from scripts.experiments.paper.games.recogniser import (
    Recogniser,
    highest_channel,
    pixels_of,
    recognition,
    values_of,
)
from scripts.experiments.paper.weight_noise import SHAPED, UNIFORM, deviations

SEARCH = "search"
SINGLE = "a single game"
JOINT = "joint training"
NONE = "no protection"
L2 = "L2"
EWC = "EWC, true labels"
RECOGNISED = "EWC, recogniser"
SHARED = "EWC, shared gains and biases"
HEADS = "EWC, a head for each game"
PROTECTED = (L2, EWC, RECOGNISED, SHARED, HEADS)
GAUSSIAN, SOFTMAX = "gaussian", "softmax"


@dataclass(frozen=True)
class Settings:
    """What is done, apart from the method and the seed."""

    suite: str = MINATAR
    view: str = CHANNELS
    games: tuple[str, ...] = ()
    visits: int = 3
    stretch: int = 100_000  # steps, on average
    copies: int = 4  # of a game that step together, with one minibatch for a step of all
    capacity: int = 50_000  # steps of a context that are remembered
    convolutions: tuple[tuple[int, int, int], ...] = Layout().convolutions
    hidden: int = Layout().hidden
    learning: Learning = field(default_factory=Learning)
    ewc_lambda: float = 0.0
    likelihood: str = GAUSSIAN
    temperature: float = 0.1  # τ of softmax(Q/τ)
    fisher_batches: int = 100
    fisher_states: int = 32
    least_steps: int = 2000  # in a context since its Fisher was measured, to measure it again
    window: int = 16
    joined: bool = True  # whether a window is one frame to the recogniser
    prior: float = 1.0  # frames
    contexts: int = 20  # at most, of the recogniser
    looks: int = 60
    look_copies: int = 10
    look_steps: int = 500  # of an episode, at most
    random_copies: int = 200  # episodes of random actions
    noise: tuple[float, ...] = ()  # sizes of weight noise on an agent of a single game
    noise_draws: int = 3


def settings_of(settings: Settings) -> dict[str, Any]:
    """Return settings as a record has them."""
    return asdict(settings)


def from_record(values: dict[str, Any]) -> Settings:
    """Return the settings of a record, or of a unit; other keys are left out."""
    own = {name: values[name] for name in Settings.__dataclass_fields__}
    return Settings(
        **{
            **own,
            "games": tuple(own["games"]),
            "noise": tuple(own["noise"]),
            "convolutions": tuple(tuple(layer) for layer in own["convolutions"]),
            "learning": Learning(**own["learning"]),
        }
    )


class Stretch(NamedTuple):
    """A while of one game."""

    game: int
    steps: int


def schedule(settings: Settings, seed: int) -> list[Stretch]:
    """Draw the stretches: every game as often and as long as any other, in a random order.

    Each round has all games once; a round does not begin with the game that ended the one before.
    The lengths of a game's stretches differ by up to a quarter of the mean.

    Args:
        settings: Of the games, visits and steps.
        seed: The same stretches for all methods.
    """
    random = np.random.default_rng([seed, 1])
    games, visits, copies = len(settings.games), settings.visits, settings.copies
    parts = random.uniform(0.75, 1.25, (games, visits))
    parts *= visits / parts.sum(1, keepdims=True)
    ends = np.round(parts.cumsum(1) * settings.stretch / copies).astype(int) * copies
    lengths = np.diff(ends, axis=1, prepend=0)
    order: list[int] = []
    for _ in range(visits):
        following = random.permutation(games)
        while games > 1 and order and following[0] == order[-1]:
            following = random.permutation(games)
        order += following.tolist()
    seen = [0] * games
    stretches = []
    for game in order:
        stretches.append(Stretch(game, int(lengths[game, seen[game]])))
        seen[game] += 1
    return stretches


@dataclass
class Context:
    """What is kept of a game, or of what the recogniser takes for one."""

    buffer: Buffer
    steps: int = 0
    measured: int = 0  # steps when the Fisher was measured
    fisher: dict[str, Tensor] = field(default_factory=dict)
    anchor: dict[str, Tensor] = field(default_factory=dict)


class Tempered(nn.Module):
    """Q/τ as logits."""

    def __init__(self, network: Network, temperature: float):
        super().__init__()
        self.network, self._temperature = network, temperature

    def forward(self, states: Tensor) -> Tensor:
        """Return the logits."""
        return self.network(states) / self._temperature


class Recognised:
    """What was played and what was taken for it, at each frame that recognisers have seen."""

    def __init__(self, settings: Settings):
        """Begin with the recogniser that the agent follows, and others that only watch."""

        def new(view: str, window: int) -> Recogniser:
            shape = VIEWS[view].shape
            pixels = pixels_of(np.zeros(shape, np.uint8), view).size
            return Recogniser(
                pixels,
                values_of(view),
                window=window,
                prior=settings.prior,
                most=settings.contexts,
                joined=settings.joined,
            )

        self._view = settings.view
        self.leading = new(settings.view, settings.window)
        self._watching = {}
        if settings.view != GREY:
            name = f"{settings.view}, windows of 4"
            self._watching[name] = (settings.view, new(settings.view, 4))
        if settings.view == CHANNELS:
            self._watching[OCCUPIED] = (OCCUPIED, new(OCCUPIED, settings.window))
        self._last: list[Frame] = []
        self._window = settings.window
        self._games: list[int] = []
        self._found: dict[str, list[int]] = {settings.view: [], **{n: [] for n in self._watching}}
        if settings.view != GREY:
            self._found[f"{settings.view}, highest channel in use"] = []

    def observe(self, frame: Frame, game: int) -> int:
        """Take in a frame, (channels, height, width), and return the context."""
        self.leading.observe(pixels_of(frame, self._view))
        self._games.append(game)
        self._found[self._view].append(self.leading.context)
        for name, (view, one) in self._watching.items():
            seen = frame.max(0, keepdims=True) if view != self._view else frame
            one.observe(pixels_of(seen, view))
            self._found[name].append(one.context)
        if self._view != GREY:
            self._last = [*self._last[1 - self._window :], frame.copy()]
            found = highest_channel(np.stack(self._last))
            self._found[f"{self._view}, highest channel in use"].append(found)
        return self.leading.context

    def figures(self, steps: int) -> Figures:
        """Return how well each did, and when the agent's context changed."""
        contexts = np.asarray(self._found[self._view])
        changes = [0, *(np.flatnonzero(np.diff(contexts)) + 1).tolist()]
        return {
            "recognition": {
                name: recognition(self._games, found, steps)._asdict()
                for name, found in self._found.items()
            },
            "contexts": [[i * steps, int(contexts[i])] for i in changes],
        }


class Run:
    """One method on one sequence of games."""

    def __init__(self, settings: Settings, method: str, seed: int):
        """Make the agent and the games.

        Args:
            settings: What is done.
            method: One of the rows.
            seed: Of weights, games, stretches and all else that is random.
        """
        self.settings, self.method, self.seed = settings, method, seed
        self.view = VIEWS[settings.view]
        slots = settings.contexts if method == RECOGNISED else len(settings.games)
        with seeded(seed):
            network = Network(
                self.view,
                Layout(settings.convolutions, settings.hidden),
                slots,
                shared_gains=method == SHARED,
                own_heads=method == HEADS,
            )
        self.agent = Agent(network, settings.learning, 1 / (self.view.values - 1), seed)
        self.games = [
            Copies(
                [self._game(game, [seed, 2, game, copy]) for copy in range(settings.copies)],
                self.view.history,
            )
            for game in range(len(settings.games))
        ]
        self.recognised = Recognised(settings) if method == RECOGNISED else None
        self.contexts: dict[int, Context] = {}
        self.context = -1
        self.steps = 0
        self.looks: list[list[float]] = []
        self.switches: list[dict[str, Any]] = []  # at each: what was measured, and what holds
        self.seconds = {"looks": 0.0, "Fisher": 0.0}
        self._begun = True  # whether what is shown now follows on nothing that is remembered

    def _game(self, game: int, seed: Sequence[int]) -> Any:
        number = int(np.random.SeedSequence(list(seed)).generate_state(1)[0] >> 1)
        return make_game(self.settings.suite, self.settings.games[game], self.settings.view, number)

    def play(self, stretches: Sequence[Stretch]) -> None:
        """Play all stretches, with looks at the scores from time to time."""
        for game, steps in stretches:
            self._cut()
            self.games[game].restart()
            if self.recognised is None:
                self._enter(game)
            for _ in self._looking(steps):
                self._step(game)
                if self.recognised is not None:
                    self._enter(self.recognised.observe(self.games[game].frames[0], game))
        self._remember()

    def play_jointly(self, steps: int) -> None:
        """Play all games in turn, a step of each, which makes their minibatches alternate."""
        turns = len(self.games)
        for number in self._looking(steps):
            game = number % turns
            self.context = game
            self.agent.enter(game)
            self._begun = number < turns
            self._step(game)

    def _looking(self, steps: int) -> Iterator[int]:
        """Yield the numbers of steps of all copies, and look at the scores in between."""
        every = self.every
        for number in range(steps // self.settings.copies):
            yield number
            self.steps += self.settings.copies
            if self.steps // every > (self.steps - self.settings.copies) // every:
                self.look()

    @property
    def every(self) -> int:
        """Steps between looks."""
        whole = self.settings.visits * self.settings.stretch * len(self.settings.games)
        return max(self.settings.copies, whole // self.settings.looks)

    def _step(self, game: int) -> None:
        """Play one step of all copies, and learn from one minibatch."""
        if self.context not in self.contexts:
            if self.context < 0:  # the recogniser's first window
                self._enter(0)
            else:
                self.contexts[self.context] = self._new_context()
        context, copies = self.contexts[self.context], self.games[game]
        frames, fresh = copies.frames.copy(), copies.fresh | self._begun
        actions = self.agent.act(copies.states, self.agent.epsilon(context.steps))
        rewards, ended = copies.act(actions)
        context.buffer.add(frames, fresh, actions, rewards, ended)
        context.steps += self.settings.copies
        self._begun = False
        self.agent.learn(context.buffer)

    def _new_context(self) -> Context:
        settings = self.settings
        history = self.view.history
        return Context(Buffer(settings.capacity, settings.copies, self.view.shape, history))

    def _cut(self) -> None:
        """Let what comes next follow on nothing."""
        if self.context in self.contexts and not self._begun:
            self.contexts[self.context].buffer.cut()
        self._begun = True

    def _enter(self, context: int) -> None:
        """Go over to a context: remember the one before, protect all others."""
        if context == self.context:
            return
        self._cut()
        self._remember()
        self.context = context
        if context not in self.contexts:
            self.contexts[context] = self._new_context()
        self.agent.penalty = self._penalty()
        self.agent.enter(context)

    def _penalty(self) -> Penalty | None:
        """Return the sum of the penalties of all contexts but the present one."""
        total: dict[str, Tensor] = {}
        anchor: dict[str, Tensor] = {}
        offset = 0.0
        for number, one in self.contexts.items():
            if number != self.context and one.fisher:
                total, anchor, growth = merge_separate(total, anchor, one.fisher, one.anchor)
                offset += growth
        if not total:
            return None
        shared = self.agent.network.shared()
        strength = self.settings.ewc_lambda
        return Penalty(shared.items(), total, anchor, ewc_lambda=strength, offset=offset)

    def _remember(self) -> None:
        """Measure the Fisher of the present context again, in place of what there was."""
        context = self.contexts.get(self.context)
        settings = self.settings
        if self.method not in PROTECTED or context is None:
            return
        if context.steps - context.measured < settings.least_steps or not len(context.buffer):
            return
        began = time.process_time()
        shared = self.agent.network.shared()
        if self.method == L2:
            context.fisher = {name: torch.ones_like(p) for name, p in shared.items()}
        else:
            context.fisher = self.fisher(context)
        context.anchor = weights_of(shared)
        context.measured = context.steps
        self.switches.append(
            {
                "step": self.steps,
                "context": self.context,
                "traces": {name: float(values.sum()) for name, values in context.fisher.items()},
                "penalty": 0.0 if self.agent.penalty is None else self.agent.penalty.value(),
            }
        )
        self.seconds["Fisher"] += time.process_time() - began

    def fisher(self, context: Context) -> dict[str, Tensor]:
        """Measure the Fisher of the shared parameters on minibatches of a buffer."""
        settings, network = self.settings, self.agent.network
        own = network.own_parameters()
        for p in own:
            p.requires_grad_(False)
        soft = settings.likelihood == SOFTMAX
        temperature = settings.temperature if soft else 1.0
        batches = self.agent.minibatches(
            context.buffer, settings.fisher_batches, settings.fisher_states, classes=soft
        )
        try:
            found = fisher_diagonal(Tempered(network, temperature), batches, settings.likelihood)
        finally:
            for p in own:
                p.requires_grad_(True)
        return {name.removeprefix("network."): values for name, values in found.items()}

    def look(self) -> None:
        """Measure the returns of all games."""
        began = time.process_time()
        found = [self.score(game) for game in range(len(self.games))]
        self.looks.append([self.steps, *found])
        if self.context >= 0:
            self.agent.network.enter(self.context)
        self.seconds["looks"] += time.process_time() - began

    def score(self, game: int, *, random: bool = False) -> float:
        """Return a game's mean return over episodes with the best actions, or with random ones.

        With the recogniser each episode takes the context that the frames of its last window fit
        best; in the first window, those so far.
        """
        settings = self.settings
        window = settings.window
        count = settings.random_copies if random else settings.look_copies
        copies = Copies(
            [self._game(game, [self.seed, 3, self.steps, game, i]) for i in range(count)],
            self.view.history,
        )
        chance = np.random.default_rng([self.seed, 4, self.steps, game])
        if self.recognised is None:
            self.agent.network.enter(game)
        seen: list[NDArray[np.int64]] = []
        running, returns = np.ones(count, bool), np.zeros(count)
        for step in range(settings.look_steps):
            if random:
                actions = chance.integers(self.view.actions, size=count)
            else:
                if self.recognised is not None:
                    seen = [*seen, pixels_of(copies.frames, settings.view)][-window:]
                    if step < window or (step + 1) % window == 0:
                        self.agent.network.enter(torch.from_numpy(self._best(seen)))
                actions = self.agent.best(copies.states)
            rewards, ended = copies.act(actions)
            returns += rewards * running
            running &= ~ended
            if not running.any():
                break
        return float(returns.mean())

    def _best(self, seen: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """Return the context that some frames of each copy fit best, (copies,)."""
        assert self.recognised is not None
        leading = self.recognised.leading
        frames = [np.max(seen, 0)] if self.settings.joined else seen
        found = sum(map(leading.log_probabilities, frames), np.zeros(()))
        return found[:, : max(1, leading.contexts)].argmax(1)


def measure_single(settings: Settings, seed: int) -> Figures:
    """Learn one game alone, and add noise to the weights that it has found."""
    run = Run(settings, SINGLE, seed)
    lowest = run.score(0, random=True)
    run.play([Stretch(0, settings.visits * settings.stretch)])
    last = [returns for _, returns in run.looks[-3:]]
    figures = {"random": lowest, "end": float(np.mean(last)), **_common(run)}
    if settings.noise:
        figures["noise"] = _noisy(run)
    return figures


def measure_sequence(settings: Settings, method: str, seed: int) -> Figures:
    """Learn games in sequence, or all at once, by one method."""
    run = Run(settings, method, seed)
    stretches = schedule(settings, seed)
    if method == JOINT:
        run.play_jointly(sum(stretch.steps for stretch in stretches))
    else:
        run.play(stretches)
    figures = {"stretches": [list(stretch) for stretch in stretches], **_common(run)}
    if method == EWC:
        fishers = {number: one.fisher for number, one in run.contexts.items() if one.fisher}
        figures["overlaps"] = {
            f"{settings.games[a]}, {settings.games[b]}": layer_overlaps(fishers[a], fishers[b])
            for a in sorted(fishers)
            for b in sorted(fishers)
            if a < b
        }
    if run.recognised is not None:
        figures |= run.recognised.figures(settings.copies)
    return figures


def _common(run: Run) -> Figures:
    return {
        "looks": run.looks,
        "steps": run.steps,
        "updates": run.agent.updates,
        "seconds of looks": run.seconds["looks"],
        "seconds of Fishers": run.seconds["Fisher"],
        "switches": run.switches,
        "buffers, bytes": sum(one.buffer.memory for one in run.contexts.values()),
    }


def _noisy(run: Run) -> Figures:
    """Measure returns with noise on the shared weights, uniform and shaped by the Fisher."""
    settings = run.settings
    fisher = run.fisher(run.contexts[0])
    shared = run.agent.network.shared()
    weights = weights_of(shared)
    generator = torch.Generator().manual_seed(run.seed)
    found: dict[str, list[float]] = {}
    for kind in (UNIFORM, SHAPED):
        spread = deviations(fisher, kind)
        found[kind] = []
        for size in settings.noise:
            returns = []
            for _ in range(settings.noise_draws):
                with torch.no_grad():
                    for name, p in shared.items():
                        noise = torch.randn(p.shape, generator=generator)
                        p.copy_(weights[name] + size * spread[name] * noise)
                returns.append(run.score(0))
            found[kind].append(math.fsum(returns) / len(returns))
    with torch.no_grad():
        for name, p in shared.items():
            p.copy_(weights[name])
    return found
