"""The sequence of games: what is played when, what is remembered at a switch, what is measured."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
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
    Recognising,
    fit,
    highest_channel,
    pixels_of,
    recognition,
    values_of,
)
from scripts.experiments.paper.weight_noise import SHAPED, UNIFORM, with_noise

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
    looks: int = 60
    look_copies: int = 10
    look_steps: int = 500  # of an episode, at most
    random_copies: int = 200  # episodes of random actions
    noise: tuple[float, ...] = ()  # sizes of weight noise on an agent of a single game
    noise_draws: int = 3
    recognising: Recognising | None = None  # of the recogniser, where there is one


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
            "recognising": own["recognising"] and Recognising(**own["recognising"]),
        }
    )


class Stretch(NamedTuple):
    """A while of one game."""

    game: int
    steps: int


def schedule(settings: Settings, seed: int) -> list[Stretch]:
    """Draw the stretches: every game as often and as long as any other, in a random order.

    Each round has all games once; a round does not begin with the game that ended the one before.
    A game's lengths are drawn within a quarter of the mean, then scaled to the sum of all games.

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
    """What was played and what was taken for it, at each step that recognisers have seen."""

    def __init__(self, settings: Settings):
        """Begin with the recogniser that the agent follows, and others that only watch."""
        assert settings.recognising is not None
        self._recognising = settings.recognising
        self._view = view = settings.view
        self.leading = _recogniser(view, self._recognising)
        self._watching: dict[str, tuple[str, slice, Recogniser]] = {}
        self._found: dict[str, list[int]] = {view: []}
        if view != GREY:
            self._watch(f"{view}, one copy", view, slice(1))
            self._found[f"{view}, highest channel in use"] = []
        if view == CHANNELS:
            self._watch(OCCUPIED, OCCUPIED, slice(None))
        self._highest: deque[int] = deque(maxlen=self._recognising.window)
        self._games: list[int] = []

    def _watch(self, name: str, view: str, copies: slice) -> None:
        self._watching[name] = view, copies, _recogniser(view, self._recognising)
        self._found[name] = []

    def observe(self, frames: Frame, game: int) -> bool:
        """Take in what all copies show, (copies, channels, height, width).

        Returns:
            Whether a window has ended, and with it the context may be another.
        """
        ended = self.leading.observe(pixels_of(frames, self._view))
        self._games.append(game)
        self._found[self._view].append(self.leading.context)
        for name, (view, copies, one) in self._watching.items():
            seen = frames.max(1, keepdims=True) if view != self._view else frames
            one.observe(pixels_of(seen[copies], view))
            self._found[name].append(one.context)
        if self._view != GREY:
            self._highest.append(highest_channel(frames))
            self._found[f"{self._view}, highest channel in use"].append(max(self._highest))
        return ended

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


def _recogniser(view: str, recognising: Recognising) -> Recogniser:
    pixels = pixels_of(np.zeros(VIEWS[view].shape, np.uint8), view).size
    return Recogniser(pixels, values_of(view), recognising)


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
        recognising = settings.recognising
        assert (recognising is not None) == (method == RECOGNISED)
        slots = len(settings.games) if recognising is None else recognising.most
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
        self.recognised = None if recognising is None else Recognised(settings)
        self.contexts: dict[int, Context] = {}
        self.context = -1
        self.steps = 0
        self.looks: list[list[float]] = []
        self._waiting: list[tuple[Any, ...] | None] = []  # steps of no context yet; None: a cut

    def _game(self, game: int, seed: Sequence[int]) -> Any:
        number = int(np.random.SeedSequence(list(seed)).generate_state(1)[0] >> 1)
        return make_game(self.settings.suite, self.settings.games[game], self.settings.view, number)

    def play(self, stretches: Sequence[Stretch]) -> None:
        """Play all stretches, with looks at the scores from time to time."""
        for game, steps in stretches:
            self.games[game].restart()
            self._waiting.append(None)
            if self.recognised is None:
                self._enter(game)
            for _ in self._looking(steps):
                self._step(game)
        self._keep()
        self._remember()

    def play_jointly(self, steps: int) -> None:
        """Play all games in turn, a step of each, which makes their minibatches alternate."""
        for number in self._looking(steps):
            self.context = game = number % len(self.games)
            if game not in self.contexts:
                self.contexts[game] = self._new_context()
            self.agent.enter(game)
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
        """Play one step of all copies, and learn from one minibatch.

        With the recogniser a step belongs to the context of its window, once that has ended; those
        after the last window to the present one.
        """
        if self.context < 0:  # the recogniser's first window
            self._enter(0)
        copies = self.games[game]
        frames, fresh = copies.frames.copy(), copies.fresh
        epsilon = self.agent.epsilon(self.contexts[self.context].steps)
        actions = self.agent.act(copies.states, epsilon)
        self._waiting.append((frames, fresh, actions, *copies.act(actions)))
        if self.recognised is None:
            self._keep()
        elif self.recognised.observe(frames, game):
            self._enter(self.recognised.leading.context)
            self._keep()
        self.agent.learn(self.contexts[self.context].buffer)

    def _keep(self) -> None:
        """Store the steps that wait in the buffer of the present context."""
        context = self.contexts[self.context]
        for step in self._waiting:
            if step is None:
                context.buffer.cut()
            else:
                context.buffer.add(*step)
                context.steps += self.settings.copies
        self._waiting.clear()

    def _new_context(self) -> Context:
        settings = self.settings
        history = self.view.history
        return Context(Buffer(settings.capacity, settings.copies, self.view.shape, history))

    def _enter(self, context: int) -> None:
        """Go over to a context: remember the one before, protect all others."""
        if context == self.context:
            return
        if self.context in self.contexts:
            self.contexts[self.context].buffer.cut()
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
        shared = self.agent.network.shared()
        if self.method == L2:
            context.fisher = {name: torch.ones_like(p) for name, p in shared.items()}
        else:
            context.fisher = self.fisher(context)
        context.anchor = weights_of(shared)
        context.measured = context.steps

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
        found = [self.score(game) for game in range(len(self.games))]
        self.looks.append([self.steps, *found])
        if self.context >= 0:
            self.agent.network.enter(self.context)

    def score(self, game: int, *, random: bool = False) -> float:
        """Return a game's mean return over episodes with the best actions, or with random ones.

        With the recogniser each episode takes the context that its frames so far fit best, of those
        that have had as many steps as one must have to be remembered: the window in which a game
        comes back may be a context by itself, which knows the first frames best and has learned
        nothing.
        """
        settings = self.settings
        count = settings.random_copies if random else settings.look_copies
        copies = Copies(
            [self._game(game, [self.seed, 3, self.steps, game, i]) for i in range(count)],
            self.view.history,
        )
        chance = np.random.default_rng([self.seed, 4, self.steps, game])
        if self.recognised is None:
            self.agent.network.enter(game)
        else:
            known = self.recognised.leading.log_frequencies()
            fits = np.zeros((count, len(known)))
            least = settings.least_steps
            brief = [k for k, one in self.contexts.items() if one.steps < least]
            if len(brief) < len(known):
                fits[:, brief] = -np.inf
        running, returns = np.ones(count, bool), np.zeros(count)
        for _ in range(settings.look_steps):
            if random:
                actions = chance.integers(self.view.actions, size=count)
            else:
                if self.recognised is not None:
                    fits += fit(known, pixels_of(copies.frames, settings.view))
                    self.agent.network.enter(torch.from_numpy(fits.argmax(1)))
                actions = self.agent.best(copies.states)
            rewards, ended = copies.act(actions)
            returns += rewards * running
            running &= ~ended
            if not running.any():
                break
        return float(returns.mean())


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
    return {"looks": run.looks, "steps": run.steps, "updates": run.agent.updates}


def _noisy(run: Run) -> Figures:
    """Measure returns with noise on the shared weights, uniform and shaped by the Fisher."""
    settings = run.settings
    return with_noise(
        run.agent.network.shared(),
        run.fisher(run.contexts[0]),
        (UNIFORM, SHAPED),
        settings.noise,
        settings.noise_draws,
        run.seed,
        lambda: run.score(0),
    )
