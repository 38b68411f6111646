"""Double DQN with weights that all games share, and gains and biases of each game's own."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from consolidate.ewc.penalty import WeightPenalty
from scripts.experiments.paper.games.buffer import Buffer, Transitions
from scripts.experiments.paper.games.environments import Frame, View

Rows = int | Tensor
"""The context of a whole batch, or of each row, (B,) int64."""


@dataclass(frozen=True)
class Layout:
    """The layers of a network: convolutions of (outputs, kernel, stride), then a hidden layer."""

    convolutions: tuple[tuple[int, int, int], ...] = ((16, 3, 1),)
    hidden: int = 128


PUBLISHED = Layout(((32, 8, 4), (64, 4, 2), (128, 3, 1)), 1024)


class Gains(nn.Module):
    """y = gain_k ⊙ x + bias_k, with a gain and a bias of each context k, or one for all."""

    def __init__(self, width: int, contexts: int):
        super().__init__()
        self.gains = nn.ParameterList(torch.ones(width) for _ in range(contexts))
        self.biases = nn.ParameterList(torch.zeros(width) for _ in range(contexts))
        self.context: Rows = 0

    def forward(self, inputs: Tensor) -> Tensor:
        """Scale and shift the channels, the second axis."""
        gain, bias = _of(self.gains, self.context), _of(self.biases, self.context)
        if inputs.ndim == 4:
            gain, bias = gain[..., None, None], bias[..., None, None]
        return torch.addcmul(bias, inputs, gain)


def _of(values: nn.ParameterList, context: Rows) -> Tensor:
    if len(values) == 1:
        return values[0]
    return values[context] if isinstance(context, int) else torch.stack(list(values))[context]


class Network(nn.Module):
    """Convolutions, a hidden layer and one output for each action, gains and biases in each.

    Parameters of one context alone are in `own_parameters`; all others are shared.
    """

    def __init__(
        self,
        view: View,
        layout: Layout,
        contexts: int,
        *,
        shared_gains: bool = False,
        own_heads: bool = False,
    ):
        super().__init__()
        channels, height, width = view.shape
        channels *= view.history
        slots = 1 if shared_gains else contexts
        self.layers = nn.ModuleDict()
        self.gains = nn.ModuleDict()
        for number, (outputs, kernel, stride) in enumerate(layout.convolutions, 1):
            name = f"convolution{number}"
            self.layers[name] = nn.Conv2d(channels, outputs, kernel, stride, bias=False)
            self.gains[name] = Gains(outputs, slots)
            channels = outputs
            height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
        self.layers["hidden"] = nn.Linear(channels * height * width, layout.hidden, bias=False)
        self.gains["hidden"] = Gains(layout.hidden, slots)
        heads = contexts if own_heads else 1
        self.heads = nn.ModuleList(
            nn.Linear(layout.hidden, view.actions, bias=False) for _ in range(heads)
        )
        self.gains["head"] = Gains(view.actions, slots)
        self.context: Rows = 0
        self._own = ([] if shared_gains else [self.gains]) + ([self.heads] if own_heads else [])

    def enter(self, context: Rows) -> None:
        """Use the parameters of a context from now on, or those of each row's."""
        self.context = context
        for gains in self.gains.values():
            assert isinstance(gains, Gains)
            gains.context = context

    def own_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of which each context has its own."""
        return [p for module in self._own for p in module.parameters()]

    def shared(self) -> dict[str, nn.Parameter]:
        """Return the parameters that all contexts use, by name."""
        own = {id(p) for p in self.own_parameters()}
        return {name: p for name, p in self.named_parameters() if id(p) not in own}

    def forward(self, states: Tensor) -> Tensor:
        """Return Q of all actions, (B, actions)."""
        x = states
        for name, layer in self.layers.items():
            if name == "hidden":
                x = x.flatten(1)
            x = torch.relu(self.gains[name](layer(x)))
        return self.gains["head"](self._head(x))

    def _head(self, x: Tensor) -> Tensor:
        if len(self.heads) == 1:
            return self.heads[0](x)
        if isinstance(self.context, int):
            return self.heads[self.context](x)
        every = torch.stack([head(x) for head in self.heads])  # (contexts, B, actions)
        return every[self.context, torch.arange(len(x))]


@dataclass(frozen=True)
class Learning:
    """How an agent learns."""

    learning_rate: float = 5e-4
    adam_epsilon: float = 1e-5
    batch_size: int = 32
    discount: float = 0.99
    target_updates: int = 250  # between copies to the target network
    least: int = 1000  # transitions before it learns of a game
    epsilon: float = 0.02  # share of random actions at the end
    epsilon_steps: int = 30_000  # of a game, until then; from 1


class Agent:
    """A network, its target network, and the optimizer.

    Attributes:
        network: What acts and learns.
        target: Its copy, which says what later rewards are worth.
        penalty: Added to the loss's gradients, where there is one.
        updates: Steps of the optimizer so far.
    """

    def __init__(self, network: Network, learning: Learning, scale: float, seed: int):
        """Make an agent of a network.

        Args:
            network: Of any weights.
            learning: How it learns.
            scale: A pixel's value in a frame times this is what the network is given.
            seed: Of random actions and minibatches.
        """
        self.network = network
        self.penalty: WeightPenalty | None = None
        self.updates = 0
        self._learning = learning
        self._scale = scale
        self.target = deepcopy(network).requires_grad_(False)
        self._optimizer = torch.optim.Adam(
            network.parameters(), learning.learning_rate, eps=learning.adam_epsilon, fused=True
        )
        self.random = np.random.default_rng(seed)

    def enter(self, context: int) -> None:
        """Play and learn in a context from now on."""
        self.network.enter(context)
        self.target.enter(context)

    def epsilon(self, steps: int) -> float:
        """Return the share of random actions after so many steps of a game."""
        learning = self._learning
        share = min(1.0, steps / learning.epsilon_steps)
        return 1 + share * (learning.epsilon - 1)

    def act(self, states: Frame, epsilon: float) -> NDArray[np.int64]:
        """Return the best action of each state, or with probability ε any."""
        actions = self.best(states)
        chance = self.random.random(len(states)) < epsilon
        if chance.any():
            some = self.random.integers(self.actions, size=len(states))
            actions = np.where(chance, some, actions)
        return actions

    @property
    def actions(self) -> int:
        """How many actions there are."""
        head = self.network.heads[0]
        assert isinstance(head, nn.Linear)
        return head.out_features

    @torch.inference_mode()
    def best(self, states: Frame) -> NDArray[np.int64]:
        """Return the action with the largest Q in each state."""
        return self.network(self.given(states)).argmax(1).numpy()

    def given(self, states: Frame) -> Tensor:
        """Return states as the network is given them."""
        given = torch.from_numpy(states).float()
        return given if self._scale == 1 else given.mul_(self._scale)

    def learn(self, buffer: Buffer) -> None:
        """Take one step on a minibatch, once the buffer has enough."""
        learning = self._learning
        if len(buffer) < learning.least:
            return
        some = buffer.sample(learning.batch_size, self.random)
        wanted = self._wanted(some)
        values = self.network(self.given(some.states))
        taken = values.gather(1, torch.from_numpy(some.actions)[:, None])[:, 0]
        loss = functional.smooth_l1_loss(taken, wanted)
        self._optimizer.zero_grad()
        loss.backward()
        if self.penalty is not None:
            self.penalty.add_gradient_()
        self._optimizer.step()
        self.updates += 1
        if self.updates % learning.target_updates == 0:
            self.target.load_state_dict(self.network.state_dict())

    @torch.no_grad()
    def _wanted(self, some: Transitions) -> Tensor:
        """Return r + γ Q'(s', argmax Q(s', ·)), r alone where the episode ended."""
        following = self.given(some.following)
        best = self.network(following).argmax(1, keepdim=True)
        later = self.target(following).gather(1, best)[:, 0]
        goes_on = torch.from_numpy(~some.ended)
        rewards = torch.from_numpy(some.rewards).clamp(-1, 1)
        return torch.addcmul(rewards, later, goes_on, value=self._learning.discount)

    def minibatches(
        self, buffer: Buffer, count: int, size: int, *, classes: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield states of a buffer as batches for the Fisher, with labels that are not used."""
        labels = torch.zeros(size, dtype=torch.int64)
        if not classes:
            labels = torch.zeros(size, self.actions)
        for _ in range(count):
            yield self.given(buffer.sample(size, self.random).states), labels


def weights_of(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return copies of parameters."""
    return {name: p.detach().clone() for name, p in parameters.items()}
