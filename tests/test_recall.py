"""What the control loop remembers for policies that look back."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from robot.clock import LockstepClock
from robot.recall import Recall
from robot.runtime import run_episode
from robot.sims.point_arm import PointArm, PointExpert
from vla.types import ActionChunk, Observation

NAN = float("nan")


def seen(state: float) -> Observation:
    return Observation(0.0, {}, np.array([state], np.float32), "go")


def test_the_first_state_repeats_and_a_step_nobody_looked_at_counts_as_the_one_before() -> None:
    recall, command = Recall(history=3, past=0, action_dim=2), np.zeros(2, np.float32)
    given = []
    for step, state in ((0, 10.0), (1, 11.0), (2, 12.0), (5, 15.0), (5, 15.5), (6, 16.0)):
        history = recall.complete(seen(state), [command] * step).history
        assert history is not None
        assert (history.shape, history.dtype) == ((3, 1), np.float32)
        given.append(history[:, 0].tolist())
    assert given == [[10, 10, 10], [10, 10, 10], [10, 10, 11], [12, 12, 12], [12, 12, 12], [12, 12, 15.5]]


def test_commands_are_the_last_ones_and_what_was_not_sent_is_nan() -> None:
    recall = Recall(history=0, past=3, action_dim=1)
    commands = [None if i == 2 else np.array([i], np.float32) for i in range(5)]
    for step, expected in ((0, [NAN] * 3), (1, [NAN, NAN, 0]), (3, [0, 1, NAN]), (5, [NAN, 3, 4])):
        executed = recall.complete(seen(0.0), commands[:step]).executed
        assert executed is not None
        np.testing.assert_array_equal(executed[:, 0], expected)


def test_those_who_do_not_ask_get_nothing() -> None:
    plain: Any = SimpleNamespace(action_spec=SimpleNamespace(dim=2))
    given = Recall.of(plain).complete(seen(1.0), [])
    assert (given.history, given.executed) == (None, None)


class Looking(PointExpert):
    """Keeps what it was given."""

    history, past = 3, 2

    def __init__(self, robot: PointArm) -> None:
        super().__init__(robot)
        self.given: list[Observation] = []

    def infer(self, observation: Observation) -> ActionChunk:
        self.given.append(observation)
        return super().infer(observation)


def test_the_loop_gives_states_and_commands_of_the_last_steps() -> None:
    """Every state that a chunk is asked with must later be found behind it, and commands must be those recorded."""
    robot = PointArm(("reach-red",), image_size=64, step_limit=40)
    states: list[np.ndarray] = []
    command = robot.command

    def noted(action: np.ndarray) -> np.ndarray:
        states.append(robot.observe().state.copy())
        return command(action)

    robot.command = noted
    policy = Looking(robot)
    done = run_episode(robot, policy, LockstepClock(), "reach-red", 3)
    assert done.success
    assert len(policy.given) > 1
    for i, given in enumerate(policy.given):
        step = 4 * i  # the expert's chunks have four steps
        behind = [states[max(k, 0)] for k in range(step - 3, step)] if step else [given.state] * 3
        assert given.history is not None
        np.testing.assert_array_equal(given.history, np.stack(behind))
        before = [None, None, *done.commands[:step]][-2:]
        sent = [np.full(2, np.nan, np.float32) if command is None else command for command in before]
        np.testing.assert_array_equal(given.executed, np.stack(sent))
    first = policy.given[0]
    policy.given.clear()
    run_episode(robot, policy, LockstepClock(), "reach-red", 3)
    assert policy.given[0].history is not None
    assert first.history is not None
    np.testing.assert_array_equal(policy.given[0].history, first.history, "a new episode remembers nothing")
