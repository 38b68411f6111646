"""Games in sequence: the recogniser, the buffer, the network, the protocol and the games_page."""

import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scripts.experiments.lib import sittings
from scripts.experiments.lib.records import Findings, Mean, Record, Unit
from scripts.experiments.paper.games import games, games_page, games_scores, protocol
from scripts.experiments.paper.games.agent import Agent, Layout, Learning, Network
from scripts.experiments.paper.games.buffer import Buffer
from scripts.experiments.paper.games.environments import (
    CHANNELS,
    GAMES,
    GREY,
    MINATAR,
    OCCUPIED,
    VIEWS,
    Copies,
    make_game,
)
from scripts.experiments.paper.games.recogniser import (
    Recogniser,
    Recognising,
    fit,
    highest_channel,
    pixels_of,
    recognition,
)

# The recogniser


Shown = list[NDArray[np.int64]]


def stream(
    order: Sequence[int], steps: int, *, flips: float = 0.02, pixels: int = 60, copies: int = 2
) -> tuple[list[int], Shown]:
    """Show games one after the other, each a fixed picture of which some pixels flip."""
    random = np.random.default_rng(0)
    pictures = random.integers(2, size=(max(order) + 1, pixels))
    played = [game for game in order for _ in range(steps)]
    return played, [pictures[game] ^ (random.random((copies, pixels)) < flips) for game in played]


def recognise(frames: Shown, **options: Any) -> list[int]:
    chosen = {"window": 4, "alike": 1.0, "prior": 2.0, "most": 6, **options}
    one = Recogniser(frames[0].shape[1], 2, Recognising(**chosen))
    found = []
    for frame in frames:
        one.observe(frame)
        found.append(one.context)
    return found


def slow_posteriors(frames: Shown, *, window: int, prior: float, most: int) -> list[list[float]]:
    """Do what the recogniser does frame by frame and pixel by pixel, from the frames as they are.

    After each window, before there is a new hold-out.
    """
    kept: list[list[Any]] = []
    seen: list[int] = []  # the values of all pixels
    weights = [1.0]
    posteriors = []
    for number in range(1, len(frames) // window + 1):
        shown = [f for step in frames[(number - 1) * window : number * window] for f in step]
        rate = 1 / (number + 1)
        others = max(1, len(weights) - 1)
        logs = []
        for weight, state in zip(weights, [*kept, []], strict=False):
            stays = 1 - rate if len(weights) > 1 else 1
            log = math.log(stays * weight + rate * (1 - weight) / others)
            before = [*state]
            for frame in shown:
                for i, value in enumerate(frame):
                    count = sum(1 for one in before if one[i] == value)
                    often = (1 + seen.count(value)) / (2 + len(seen))
                    log += math.log((count + prior * often) / (len(before) + prior))
                before.append(frame)
            logs.append(log)
        whole = math.log(sum(math.exp(log - max(logs)) for log in logs)) + max(logs)
        weights = [math.exp(log - whole) for log in logs]
        posteriors.append(weights)
        seen += [value for one in shown for value in one]
        best = weights.index(max(weights))
        if best < len(kept):
            kept[best] += shown
        else:
            kept.append(shown)
            if len(kept) < most:
                weights = [w * (1 - rate) for w in weights] + [rate]
                weights = [w / sum(weights) for w in weights]
    return posteriors


@pytest.mark.parametrize("most", [2, 6])
def test_the_posterior_is_that_of_a_slow_reference(most: int) -> None:
    _, frames = stream([0, 1, 0, 2], 9, flips=0.3, pixels=6)
    slow = slow_posteriors(frames, window=3, prior=1.5, most=most)
    one = Recogniser(6, 2, Recognising(window=3, alike=1.0, prior=1.5, most=most))
    found = []
    for frame in frames:
        before = one.contexts
        if one.observe(frame):
            posterior = np.exp(one._weights)
            if one.contexts > before and one.states > before + 1:  # with the new hold-out
                posterior = posterior[:-1] / posterior[:-1].sum()
            found.append(posterior)
    assert one.contexts > 1
    assert len(found) == len(slow) == 12
    for fast, expected in zip(found, slow, strict=True):
        assert fast.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_frames_that_are_alike_count_as_one() -> None:
    _, frames = stream([0, 1, 0], 20, flips=0.2)
    twice = [np.concatenate([frame, frame]) for frame in frames]
    one = Recogniser(60, 2, Recognising(window=4, alike=1.0, most=6))
    two = Recogniser(60, 2, Recognising(window=4, alike=2.0, most=6))
    for frame, same in zip(frames, twice, strict=True):
        one.observe(frame)
        two.observe(same)
        assert one._weights.tolist() == two._weights.tolist()


def test_the_evidence_of_parts_of_frames_is_the_formula() -> None:
    settings = Recognising(window=5, alike=12.0, prior=4.0, most=3)
    one = Recogniser(7, 3, settings)
    random = np.random.default_rng(0)
    often = [1.0] * 3
    known: list[Any] = [0.0, 0.0]
    for window in range(6):
        frames = [random.integers(1 + window // 2, size=(4, 7)) for _ in range(settings.window)]
        counts = [
            [sum((f[:, i] == v).sum() for f in frames) / 12 for v in range(3)] for i in range(7)
        ]
        evidence = []
        for k in range(one.states):
            log = 0.0
            for i in range(7):
                a = [
                    float(np.asarray(known[k])[i, v]) if k < one.contexts else 0.0 for v in range(3)
                ]
                a = [n + 4.0 * q / sum(often) for n, q in zip(a, often, strict=True)]
                log += math.lgamma(sum(a)) - math.lgamma(sum(a) + 20 / 12)
                log += sum(
                    math.lgamma(x + c) - math.lgamma(x) for x, c in zip(a, counts[i], strict=True)
                )
            evidence.append(log)
        assert one._log_evidence(np.asarray(counts)).tolist() == pytest.approx(evidence)
        for frame in frames:
            one.observe(frame)
        known = [*one._counts]
        often = (1 + one._counts.sum((0, 1))).tolist()
    assert one.contexts == 2


def test_each_new_game_is_a_new_context_and_one_that_returns_is_known() -> None:
    played, frames = stream([0, 1, 0, 2, 1, 2, 0], 80)
    found = recognition(played, recognise(frames), 4)
    assert found.contexts == 3
    assert found.found == found.switches == 6
    assert found.false_alarms == 0
    assert found.purity > 0.95
    assert found.delay is not None
    assert found.delay <= 4 * 4


def test_noise_alone_is_one_context() -> None:
    played, frames = stream([0], 400, flips=0.2)
    assert recognition(played, recognise(frames, window=8), 1)[1:4] == (1, 0, 0)


def test_a_game_that_changes_slowly_is_not_split() -> None:
    random = np.random.default_rng(0)
    places = 0.3 * (random.random((3, 200)) < 0.25)  # where a game shows something, how often
    played = [game for game in (0, 1, 0, 2, 1, 2, 0) for _ in range(640)]
    frames: Shown = []
    for before, game in itertools.pairwise([-1, *played]):
        drawn = (random.random((4, 200)) < places[game]).astype(np.int64)
        kept = (random.random((4, 200)) < 0.9) & (game == before)
        frames.append(np.where(kept, frames[-1] if frames else drawn, drawn))
    found = recognition(played, recognise(frames, window=64, alike=8.0, prior=1.0), 1)
    assert found.purity > 0.9  # a switch is found where the window ends, a tenth of a stretch
    assert found.found == found.switches == 6
    assert found.contexts == 3
    assert found.false_alarms == 0
    draws = recognition(played, recognise(frames, window=64, alike=1.0, prior=1.0), 1)
    assert draws.false_alarms > 0  # frames that are taken for independent draws


def test_games_beyond_the_most_contexts_go_to_known_ones() -> None:
    _, frames = stream([0, 1, 2, 3], 60)
    assert max(recognise(frames, most=2)) == 1


def test_only_the_best_context_keeps_the_frames_of_a_window() -> None:
    _, frames = stream([0, 1, 0], 40)
    one = Recogniser(60, 2, Recognising(window=4, alike=2.0, prior=2.0, most=6))
    for frame in frames:
        one.observe(frame)
    assert one._counts.sum((1, 2))[: one.states].tolist() == [60 * 80, 60 * 40, 0]
    often = one.log_frequencies()
    assert often.shape == (2, 60, 2)
    assert np.exp(often).sum(2) == pytest.approx(1)
    assert fit(often, frames[0]).argmax(1).tolist() == [0, 0]
    assert fit(often, frames[40]).argmax(1).tolist() == [1, 1]


def test_measures_of_recognition() -> None:
    #         0  1  2  3  4  5  6  7  8  9
    played = [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]
    found = [0, 0, 2, 0, 0, 1, 1, 1, 1, 1]
    one = recognition(played, found, 4)
    assert one.purity == 0.7  # context 0: game 0; 1: game 1; 2: game 0
    assert (one.contexts, one.switches, one.found) == (3, 2, 1)
    assert one.delay == 4.0
    assert one.false_alarms == 2


def test_the_baseline_and_the_pixels_of_frames() -> None:
    frames = np.zeros((3, 10, 4, 4), np.uint8)
    frames[1, 6, 2, 2] = 1
    assert highest_channel(frames) == 6
    frames[1, 3, 2, 2] = frames[1, 0, 3, 3] = 1
    colours = [0] * 10 + [7, 0, 0, 0, 0, 1]
    assert pixels_of(frames, CHANNELS).tolist() == [[0] * 16, colours, [0] * 16]
    assert pixels_of(frames[:, :1], OCCUPIED)[1].tolist() == [0] * 15 + [1]
    grey = np.full((1, 84, 84), 255, np.uint8)
    grey[0, 0, 0] = 0
    assert pixels_of(grey, GREY)[:2].tolist() == [11, 15]


# The buffer


@pytest.mark.parametrize("history", [1, 3])
@pytest.mark.parametrize("steps", [9, 40])
def test_transitions_are_what_was_played(history: int, steps: int) -> None:
    buffer = Buffer(24, 2, (1, 1, 1), history)
    random = np.random.default_rng(0)
    episodes: list[list[int]] = [[], []]
    before: list[tuple[int, ...]] = [(), ()]  # the states whose successors come now
    cut = [0, 0]
    follows: dict[tuple[int, ...], tuple[int, ...]] = {}
    for step in range(steps):
        fresh = np.array([not episode for episode in episodes])
        ended = random.random(2) < 0.2
        numbers = np.array([10 + 2 * step, 11 + 2 * step])
        for copy, number in enumerate(numbers.tolist()):
            episodes[copy].append(number)
            state = tuple(([0] * history + episodes[copy][cut[copy] :])[-history:])
            if before[copy]:
                follows[before[copy]] = state
            before[copy] = () if ended[copy] else state
            if ended[copy]:
                episodes[copy], cut[copy] = [], 0
        frames = numbers.astype(np.uint8).reshape(2, 1, 1, 1)
        buffer.add(frames, fresh, numbers, np.ones(2, np.float32), ended)
        if step in (7, 20):  # of the newest step the successor never comes
            buffer.cut()
            before = [(), ()]
            cut = [*map(len, episodes)]  # what follows begins without the frames before
    found = buffer.sample(500, random)
    assert 4 <= len(buffer) <= 24
    oldest = 10 + 2 * (steps - 12)
    for row, action in enumerate(found.actions.tolist()):
        state = tuple(found.states[row, :, 0, 0].tolist())
        assert action == state[-1] >= oldest
        if not found.ended[row]:
            assert tuple(found.following[row, :, 0, 0].tolist()) == follows[state]


def test_a_buffer_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="a buffer of 10 steps is too small for 4 copies"):
        Buffer(10, 4, (1, 2, 2), 4)


# The network


def network(**options: Any) -> Network:
    torch.manual_seed(0)
    return Network(VIEWS[CHANNELS], Layout(((4, 3, 1),), 8), 3, **options)


@pytest.mark.parametrize("heads", [False, True])
def test_contexts_by_row_are_those_of_the_whole_batch(heads: bool) -> None:
    one = network(own_heads=heads)
    with torch.no_grad():
        for p in one.own_parameters():
            p.normal_()
    states = torch.rand(4, 10, 10, 10)
    rows = torch.tensor([0, 2, 1, 2])
    one.enter(rows)
    together = one(states)
    for row, context in enumerate(rows.tolist()):
        one.enter(context)
        torch.testing.assert_close(one(states[row : row + 1])[0], together[row])


@pytest.mark.parametrize(
    ("options", "shared", "own"),
    [
        ({}, 3, 3 * 2 * 3),
        ({"shared_gains": True}, 3 + 2 * 3, 0),
        ({"own_heads": True}, 2, 3 * 2 * 3 + 3),
    ],
)
def test_what_is_shared_and_what_is_a_game_s_own(
    options: dict[str, bool], shared: int, own: int
) -> None:
    one = network(**options)
    assert (len(one.shared()), len(one.own_parameters())) == (shared, own)


def filled(copies: int = 2) -> Buffer:
    random = np.random.default_rng(0)
    buffer = Buffer(100, copies, VIEWS[CHANNELS].shape, 1)
    for _ in range(30):
        buffer.add(
            (random.random((copies, 10, 10, 10)) < 0.1).astype(np.uint8), np.zeros(copies, bool),
            random.integers(6, size=copies), random.random(copies, np.float32) * 3 - 1,
            random.random(copies) < 0.1,
        )  # fmt: skip
    return buffer


def test_learning_leaves_the_gains_of_other_games_alone() -> None:
    one = network()
    agent = Agent(one, Learning(least=10, target_updates=5), 1.0, 0)
    before = {name: p.clone() for name, p in one.named_parameters()}
    for context in (1, 2):
        agent.enter(context)
        for _ in range(7):
            agent.learn(filled())
    for name, p in one.named_parameters():
        changed = not p.equal(before[name])
        assert changed == (not name.startswith("gains") or name[-1] != "0"), name


def test_what_is_wanted_is_that_of_double_dqn() -> None:
    agent = Agent(network(), Learning(), 1.0, 0)
    with torch.no_grad():
        for p in agent.target.parameters():
            p.add_(0.1 * torch.randn_like(p))
    some = filled().sample(20, agent.random)
    wanted = agent._wanted(some)
    for row in range(20):
        following = torch.from_numpy(some.following[row : row + 1]).float()
        with torch.no_grad():
            best = int(agent.network(following)[0].argmax())
            later = 0.0 if some.ended[row] else float(agent.target(following)[0, best])
        assert float(wanted[row]) == pytest.approx(
            max(-1.0, min(1.0, float(some.rewards[row]))) + 0.99 * later, rel=1e-4, abs=1e-6
        )


def test_epsilon_falls_with_the_steps_of_a_game() -> None:
    agent = Agent(network(), Learning(epsilon=0.1, epsilon_steps=100), 1.0, 0)
    found = [agent.epsilon(steps) for steps in (0, 50, 100, 1000)]
    assert found == pytest.approx([1.0, 0.55, 0.1, 0.1])


# The games


@pytest.mark.parametrize("name", GAMES[MINATAR])
@pytest.mark.parametrize("view", [CHANNELS, OCCUPIED])
def test_frames_have_the_shape_that_the_view_says(name: str, view: str) -> None:
    copies = Copies(
        [make_game(MINATAR, name, view, seed) for seed in range(2)], VIEWS[view].history
    )
    again = Copies([make_game(MINATAR, name, view, seed) for seed in range(2)], VIEWS[view].history)
    shape = VIEWS[view].shape
    random = np.random.default_rng(0)
    for _ in range(100):
        actions = random.integers(6, size=2)
        copies.act(actions)
        again.act(actions)
        assert copies.frames.shape == (2, *shape)
        assert copies.states.shape == (2, shape[0] * VIEWS[view].history, *shape[1:])
        assert copies.frames.max() == 1
        assert (copies.states == again.states).all()
        assert (copies.states[:, -shape[0] :] == copies.frames).all()


def test_an_unknown_game_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown game 'chess': expected one of asterix, breakout"):
        make_game(MINATAR, "chess", CHANNELS, 0)


# The protocol


@pytest.mark.parametrize("seed", range(5))
def test_all_games_come_back_as_often_and_as_long(seed: int) -> None:
    settings = replace(games.BASE, stretch=1000)
    found = protocol.schedule(settings, seed)
    assert found == protocol.schedule(replace(settings, view=OCCUPIED), seed)
    for game in range(5):
        own = [steps for other, steps in found if other == game]
        assert len(own) == 3
        assert sum(own) == 3000
        assert all(700 < steps < 1400 and steps % 4 == 0 for steps in own)
    assert all(a.game != b.game for a, b in itertools.pairwise(found))


def test_settings_survive_a_record() -> None:
    for one in (games.BASE, games.ATARI_BASE, recognised()):
        stored = json.loads(json.dumps(protocol.settings_of(one)))
        assert protocol.from_record(stored) == one


@pytest.mark.parametrize("settings", [games.BASE, games.ATARI_BASE, games.MACHINERY, games.SMALL])
def test_a_full_buffer_has_enough_to_learn_from(settings: protocol.Settings) -> None:
    copies, view = settings.copies, VIEWS[settings.view]
    buffer = Buffer(settings.capacity, copies, (1, 1, 1), view.history)
    frames, nothing = np.zeros((copies, 1, 1, 1), np.uint8), np.zeros(copies, int)
    for _ in range(settings.capacity // copies + 10):
        buffer.add(frames, nothing > 0, nothing, nothing.astype(np.float32), nothing > 0)
    assert len(buffer) >= settings.learning.least


def tiny(**options: Any) -> protocol.Settings:
    chosen = {"stretch": 120, "noise": (), "ewc_lambda": 10.0, "look_steps": 8, "looks": 3}
    return replace(games.SMALL, **{**chosen, **options})


def recognised(**options: Any) -> protocol.Settings:
    return tiny(recognising=games.SHORT, **options)


@pytest.mark.parametrize("likelihood", [protocol.GAUSSIAN, protocol.SOFTMAX])
def test_the_penalty_is_the_sum_over_all_other_games(likelihood: str) -> None:
    games_ = ("breakout", "space_invaders", "asterix")
    run = protocol.Run(tiny(likelihood=likelihood, games=games_), protocol.EWC, 0)
    run.play(protocol.schedule(run.settings, 0))
    assert set(run.contexts) == {0, 1, 2}
    shared = run.agent.network.shared()
    assert all(set(one.fisher) == set(shared) for one in run.contexts.values())
    assert all(
        max(float(f.max()) for f in one.fisher.values()) > 0 for one in run.contexts.values()
    )
    penalty = run.agent.penalty
    others = [one for number, one in run.contexts.items() if number != run.context]
    assert penalty is not None
    expected = 5.0 * sum(
        float((other.fisher[name] * (p.detach() - other.anchor[name]).square()).sum())
        for name, p in shared.items()
        for other in others
    )
    assert penalty.value() == pytest.approx(expected, rel=1e-4)


def test_a_fisher_is_measured_again_when_its_game_is_left_again() -> None:
    run = protocol.Run(tiny(), protocol.EWC, 0)
    stretches = protocol.schedule(run.settings, 0)
    run.play(stretches[:2])
    first = run.contexts[stretches[0].game]
    fisher, anchor = dict(first.fisher), dict(first.anchor)
    run.play(stretches[2:])
    assert not any(first.fisher[name].equal(values) for name, values in fisher.items())
    assert not any(first.anchor[name].equal(values) for name, values in anchor.items())


def test_a_run_with_the_recogniser_measures_all_that_the_page_needs() -> None:
    found = protocol.measure_sequence(recognised(), protocol.RECOGNISED, 0)
    assert found["steps"] == 480
    assert [len(look) for look in found["looks"]] == [3] * len(found["looks"])
    assert set(found["recognition"]) == {
        CHANNELS, "channels, one copy", OCCUPIED, "channels, highest channel in use",
    }  # fmt: skip
    assert found["recognition"][CHANNELS]["switches"] == 3
    assert found["contexts"][0] == [0, 0]


def test_a_look_takes_the_context_that_the_episode_so_far_fits_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = protocol.Run(recognised(look_copies=4), protocol.RECOGNISED, 0)
    stretches = [protocol.Stretch(0, 400), protocol.Stretch(1, 400)]
    run.play(stretches)
    entered: list[torch.Tensor] = []
    monkeypatch.setattr(run.agent.network, "enter", entered.append)
    for game in (0, 1):
        run.score(game)
    assert run.recognised is not None
    own = [run.recognised._found[CHANNELS][at] for at in (60, 199)]
    assert own == [0, 1]
    halves = np.array_split([rows.tolist() for rows in entered], 2)
    for context, found in zip(own, halves, strict=True):
        assert (found == context).all()
    run.contexts[1].steps = run.settings.least_steps - 4  # too few to be remembered
    entered.clear()
    run.score(1)
    assert {row for rows in entered for row in rows.tolist()} == {0}


@pytest.mark.parametrize("view", [CHANNELS, OCCUPIED])
def test_a_window_is_remembered_in_the_context_that_it_is_found_to_be_of(
    view: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = protocol.Run(recognised(view=view), protocol.RECOGNISED, 0)
    shown: list[NDArray[np.uint8]] = []
    assert run.recognised is not None
    observe = run.recognised.observe

    def watched(frames: NDArray[np.uint8], game: int) -> bool:
        shown.append(frames)
        return observe(frames, game)

    monkeypatch.setattr(run.recognised, "observe", watched)
    # the windows of 4 steps do not end where the stretches of 27 to 29 do
    run.play([protocol.Stretch(0, 108), protocol.Stretch(1, 116), protocol.Stretch(0, 112)])
    found = run.recognised._found[view]
    window = games.SHORT.window
    of_step = [found[min(len(found) - 1, at // window * window + window - 1)] for at in range(84)]
    assert len({*of_step}) > 1
    for number, context in run.contexts.items():
        own = [at for at in range(84) if of_step[at] == number]
        assert context.steps == 4 * len(own)
        assert (context.buffer._frames[: len(own)] == np.stack([shown[at] for at in own])).all()
        follows = [
            a + 1 == b and b not in (27, 56) for a, b in zip(own, [*own[1:], None], strict=True)
        ]
        assert (~context.buffer._cut[: len(own)]).tolist() == follows or number == run.context


@pytest.mark.parametrize("method", [protocol.EWC, protocol.RECOGNISED])
def test_looks_leave_the_training_as_it_is(method: str) -> None:
    settings = recognised if method == protocol.RECOGNISED else tiny
    one, other = (protocol.Run(settings(looks=looks), method, 0) for looks in (1, 12))
    for run in (one, other):
        run.play(protocol.schedule(run.settings, 0))
    assert len(one.looks) < len(other.looks)
    for name, p in one.agent.network.named_parameters():
        assert torch.equal(p, other.agent.network.get_parameter(name)), name


def test_joint_training_plays_all_games_in_turn() -> None:
    run = protocol.Run(tiny(), protocol.JOINT, 0)
    run.play_jointly(240)
    assert {game: one.steps for game, one in run.contexts.items()} == {0: 120, 1: 120}
    assert run.agent.penalty is None


def test_the_same_seed_gives_the_same_figures() -> None:
    one, other = (protocol.measure_sequence(tiny(), protocol.EWC, 3) for _ in range(2))
    assert one["looks"] == other["looks"]
    assert one["overlaps"] == other["overlaps"]


# The experiment


def done(unit: Unit, **figures: Any) -> Record:
    return Record(unit, {"validation": 0.0, **figures}, 1.0, {})


def test_rows_wait_for_the_search_and_take_what_it_has_found() -> None:
    records: dict[str, Record] = {}
    while new := [
        unit for unit in games.plan([*records.values()], False) if unit.digest not in records
    ]:
        for unit in new:
            value = 0.5 if unit.settings["ewc_lambda"] in (100.0, 0.01) else 0.1
            if unit.settings["likelihood"] == protocol.SOFTMAX:
                value += 0.1
            records[unit.digest] = done(unit, validation=value, random=1.0, end=4.0)
    units = games.plan([*records.values()], False)
    assert len(units) == len({unit.digest for unit in units})
    rows = {unit.method: unit.settings for unit in units if unit.method in protocol.PROTECTED}
    assert {rows[m]["ewc_lambda"] for m in protocol.PROTECTED if m != protocol.L2} == {100.0}
    assert rows[protocol.EWC]["likelihood"] == protocol.SOFTMAX
    assert rows[protocol.L2]["ewc_lambda"] == 0.01
    searched = [unit for unit in units if unit.method == protocol.SEARCH]
    assert all(unit.settings["references"] == [[1.0, 4.0]] * 2 for unit in searched)
    hours = sum(games.cost(unit) for unit in units) / 3600
    assert hours < 2 * 10  # of two cores


def test_the_search_goes_beyond_an_end_where_the_best_is() -> None:
    records: dict[str, Record] = {}
    while new := [
        unit for unit in games.plan([*records.values()], False) if unit.digest not in records
    ]:
        for unit in new:
            value = unit.settings["ewc_lambda"] / 1e6
            records[unit.digest] = done(unit, validation=value, random=1.0, end=4.0)
    tried = [one.unit for one in records.values() if one.unit.method == protocol.SEARCH]
    assert {one.seed for one in tried} == {games.SEARCH_SEED}
    strengths = {
        (one.settings["searched"], one.settings["likelihood"], one.settings["ewc_lambda"])
        for one in tried
    }
    first = {(*key, x) for key, values in games.STRENGTHS.items() for x in values}
    assert strengths - first == {
        (protocol.EWC, protocol.GAUSSIAN, 1e4), (protocol.EWC, protocol.GAUSSIAN, 1e5),
        (protocol.EWC, protocol.SOFTMAX, 1e4), (protocol.EWC, protocol.SOFTMAX, 1e5),
        (protocol.L2, protocol.GAUSSIAN, 1.0), (protocol.L2, protocol.GAUSSIAN, 10.0),
    }  # fmt: skip


def test_a_game_that_is_not_played_counts_more_in_the_search() -> None:
    figures = {
        "stretches": [[0, 100], [1, 100]],
        "looks": [[50, 9.0, 9.0], [100, 9.0, 9.0], [150, 1.0, 3.0], [200, 2.0, 5.0]],
    }
    found = games.searched_score(figures, [(1.0, 5.0), (1.0, 5.0)])
    weighted = games.ABSENT * 0.0 + 0.5 + games.ABSENT * 0.25 + 1.0
    assert found == pytest.approx(weighted / (2 * games.ABSENT + 2))


def test_scores_are_clipped_and_games_that_are_not_learned_stand_apart() -> None:
    assert games_scores.scores([-1.0, 2.0, 3.0, 9.0], 1.0, 5.0).tolist() == [0.0, 0.25, 0.5, 1.0]
    assert games_scores.learned(1.0, 3.0)
    assert not games_scores.learned(1.0, 2.9)
    assert not games_scores.learned(0.1, 0.9)
    assert not games_scores.learned(0.0, 0.0)
    assert games_scores.scores([1.0], 2.0, 1.0).tolist() == [0.0]


def played(returns: dict[str, float], seeds: int = 3) -> list[Record]:
    """Records of single agents, whose return is 10 (random: 1), and of rows with these returns."""
    games_ = ("breakout", "freeway", "seaquest")
    settings = replace(games.BASE, games=games_, noise=(0.01, 0.1))
    records = []
    for seed in range(seeds):
        for game in games_:
            one = protocol.settings_of(replace(settings, games=(game,)))
            end = 2.0 if game == "seaquest" else 10.0  # that one is not learned
            noisy = {games_page.UNIFORM: [9.0, 1.0], games_page.SHAPED: [10.0, 5.0 + seed]}
            looks = [[4, 1.0], [8, 1.0], [12, end]]
            figures = {"random": 1.0, "end": 99.0, "looks": looks, "noise": noisy}
            records.append(done(Unit("games", protocol.SINGLE, seed, one), **figures))
        for method, value in returns.items():
            recognising = games.SHORT if method == protocol.RECOGNISED else None
            one = protocol.settings_of(replace(settings, noise=(), recognising=recognising))
            looks = [[step, value, value + seed, 50.0] for step in (4, 8)]
            stretches = [[0, 3], [1, 2], [2, 3]]
            figures = {"looks": looks, "stretches": stretches, "steps a second": 1000.0}
            if method == protocol.RECOGNISED:
                found = recognition([0, 0, 1, 1], [0, 0, 0, 1], 4)._asdict()
                figures |= {"contexts": [[0, 0], [12, 1]], "recognition": {CHANNELS: found}}
            records.append(done(Unit("games", method, seed, one), **figures))
    return records


def row(looks: list[list[float]], stretches: list[list[int]], **figures: Any) -> Record:
    one = protocol.settings_of(replace(games.BASE, games=("breakout", "freeway")))
    unit = Unit("games", protocol.EWC, 0, one)
    return done(unit, looks=looks, stretches=stretches, **figures)


def singles(curves: dict[str, list[float]]) -> list[Record]:
    """Records of single agents with these returns at the steps 4, 8 and 12; random: 0."""
    return [
        done(
            Unit(
                "games", protocol.SINGLE, 0, protocol.settings_of(replace(games.BASE, games=(g,)))
            ),
            random=0.0,
            end=99.0,
            looks=[[step, value] for step, value in zip((4, 8, 12), values, strict=True)],
        )
        for g, values in curves.items()
    ]


def test_a_single_agent_is_its_last_third() -> None:
    records = singles({"breakout": [2.0, 4.0, 8.0], "freeway": [5.0, 5.0, 1.0]})
    found = games_scores.references(records, CHANNELS)
    assert found == {"breakout": (0.0, 8.0), "freeway": (0.0, 1.0)}
    assert games_scores.views(records) == []  # without a row
    stretches = [[0, 6], [1, 6]]
    records.append(row([[6, 8.0, 0.5], [12, 4.0, 1.0]], stretches))
    assert games_scores.ceiling(records, CHANNELS) == pytest.approx(2.0)
    # at the last look breakout has had 6 steps, and freeway too
    at_once = games_scores.after_as_many_steps(records, CHANNELS)
    assert at_once == {"breakout": pytest.approx(3.0), "freeway": pytest.approx(5.0)}
    del records[1]
    assert games_scores.views(records) == []  # without freeway's single agent


def test_what_is_kept_while_a_game_is_away() -> None:
    records = singles({"breakout": [10.0] * 3, "freeway": [10.0] * 3})
    looks = [
        [2, 4.0, 0.0],
        [4, 8.0, 0.0],
        [6, 6.0, 3.0],
        [8, 5.0, 9.0],
        [10, 7.0, 2.0],
        [12, 9.0, 1.0],
    ]
    records.append(row(looks, [[0, 4], [1, 4], [0, 4]]))
    found = games_scores.kept(records, CHANNELS, protocol.EWC)
    assert found is not None
    assert [one.value for one in found] == pytest.approx([0.8, 0.15, 0.8, 0.5])
    assert games_scores.kept(records, CHANNELS, protocol.NONE) is None


def test_visits_to_known_games_are_in_the_context_of_the_first() -> None:
    stretches = [[0, 10], [1, 10], [0, 10], [1, 10]]
    contexts = [[0, 0], [12, 1], [21, 0], [30, 2]]
    assert games_scores.known_again(row([], stretches, contexts=contexts)) == (1, 2)
    assert games_scores.known_again(row([], stretches, contexts=[[0, 0]])) == (2, 2)


@pytest.mark.parametrize(
    ("value", "error", "seeds", "said"),
    [(0.3, 0.1, 3, "holds"), (-0.3, 0.1, 3, "does not hold"), (0.1, 0.1, 3, "undecided"),
     (0.3, 0.1, 2, "–"), (0.3, math.nan, 1, "–")],
)  # fmt: skip
def test_a_claim_is_decided_by_two_standard_errors(
    value: float, error: float, seeds: int, said: str
) -> None:
    assert games_scores.verdict(Mean(value, error, seeds), 3) == said


def test_the_page_says_what_holds(tmp_path: Path) -> None:
    records = played({protocol.NONE: 2.0, protocol.EWC: 7.0, protocol.RECOGNISED: 6.2})
    found = games.EXPERIMENT.report(records, tmp_path)
    verdicts = {row.figure.removeprefix("games: "): row.difference for row in found.rows}
    assert verdicts == {
        "no protection, sum of scores in the last third": "holds",
        "L2, sum of scores in the last third": "–",
        "EWC, true labels, sum of scores in the last third": "holds",
        "EWC, recogniser, sum of scores in the last third": "does not hold",
        "noise shaped by the Fisher harms less than uniform": "holds",
    }
    assert "| EWC, true labels (ten channels) | 1.44 ± 0.06 | 1.44 ± 0.06 |" in found.text
    assert "Sums over 2 games, by the same measure 2.00 for the agents" in found.text
    assert "or one point above it: seaquest (ten channels);" in found.text
    assert "| EWC is at least 2 times no protection (ten channels) | 4.33 |" in found.text
    assert "L2 (ten channels; 0 of 3 seeds done)" in found.text
    assert "no protection (ten channels;" not in found.text
    assert "| channels | 3 | 0.750 | 2.0 | 3 of 3 | 4 | 0.0 |" in found.text
    assert "{" not in found.text
    for part in ("", "-each", "-noise", "-contexts"):
        assert f"](games{part}.png)" in found.text
        assert (tmp_path / f"games{part}.png").stat().st_size > 1000


def test_a_claim_waits_for_all_seeds(tmp_path: Path) -> None:
    records = played({protocol.NONE: 2.0, protocol.EWC: 7.0}, seeds=2)
    found = games.EXPERIMENT.report(records, tmp_path)
    assert {line.difference for line in found.rows[:-1]} == {"–"}
    assert "no protection (ten channels; 2 of 3 seeds done)" in found.text


def test_a_claim_waits_for_the_single_agents_of_what_counts(tmp_path: Path) -> None:
    records = played({protocol.NONE: 2.0, protocol.EWC: 7.0})

    def without(game: str) -> Findings:
        some = [r for r in records if (r.unit.seed, *r.unit.settings["games"]) != (2, game)]
        return games.EXPERIMENT.report(some, tmp_path)

    for game, held in (("breakout", "–"), ("seaquest", "holds")):
        found = without(game)
        assert found.rows[0].difference == held
        assert "single agents (ten channels; 8 of 9 done)" in found.text


def test_without_records_there_is_no_page(tmp_path: Path) -> None:
    found = games.EXPERIMENT.report([], tmp_path)
    assert not found.text
    assert not list(tmp_path.iterdir())
    assert {row.here for row in found.rows} == {"not run yet"}


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "minatar":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(sittings, "version", version)
    with pytest.raises(SystemExit) as ended:
        sittings.run([games.EXPERIMENT], tmp_path, quick=True)
    assert str(ended.value) == (
        "not done:\ngames: the package minatar is not installed; in the root of the repository "
        "run scripts/environment dev"
    )
    assert not list(tmp_path.iterdir())


def test_an_unknown_suite_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="--suite: expected minatar or atari, found 'chess'"):
        games.suite_of(["games.py", "--suite", "chess"])
    arguments = ["games.py", "--suite", "atari", "--plan"]
    assert games.suite_of(arguments) == "atari"
    assert arguments == ["games.py", "--plan"]


def test_a_full_disk_is_one_line_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    one = games.EXPERIMENT._replace(
        plan=lambda records, quick: [Unit("games", protocol.SINGLE, 0, {})],
        measure=lambda unit: {},
        packages=(),
    )
    monkeypatch.setattr(sittings, "append_record", full)
    monkeypatch.setattr(sittings, "QUICK", tmp_path)
    monkeypatch.setattr(sys, "argv", ["games.py", "--quick", "--jobs=1"])
    with pytest.raises(
        SystemExit, match=r"\A\[Errno 28\] No space left .*; what is done is kept\Z"
    ):
        sittings.main(one)
