import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from robot.clock import LockstepClock, MonotonicClock
from robot.policies import Zeros
from robot.runtime import Episode, connect, run_episode
from robot.sims.point_arm import ACTION_SPEC, CAMERA, STATE_SPEC, PointArm, PointExpert
from vla.cli import Interrupted
from vla.errors import SpecMismatch, TandemError
from vla.types import ActionChunk, Observation

TASKS = ("reach-red", "reach-blue")
FAR = 3  # a seed whose expert needs more than a chunk


class WatchedArm(PointArm):
    """Keeps what it was asked to do."""

    def __init__(self, step_limit: int = 40) -> None:
        super().__init__(TASKS, image_size=64, step_limit=step_limit)
        self.calls: list[str] = []

    def observe(self) -> Observation:
        self.calls.append("observe")
        return super().observe()

    def command(self, action: np.ndarray) -> np.ndarray:
        self.calls.append("command")
        return super().command(action)

    def hold(self) -> None:
        self.calls.append("hold")
        super().hold()


class Wrapped(PointExpert):
    """The expert, with its answer changed by `change`."""

    def __init__(self, change: Callable[[ActionChunk], Any]) -> None:
        self._change = change

    def infer(self, observation: Observation) -> Any:
        return self._change(super().infer(observation))


def episode(robot: PointArm, policy: Any, **changes: Any) -> Episode:
    given: dict[str, Any] = {"clock": LockstepClock(), "task": "reach-red", "seed": FAR} | changes
    return run_episode(robot, policy, **given)


def same(one: Episode, other: Episode) -> bool:
    keys = ("instruction", "success", "steps", "first_success_step", "overruns", "verdicts", "error")
    sent = np.array_equal(np.array(one.commands), np.array(other.commands))
    return sent and all(getattr(one, k) == getattr(other, k) for k in keys)


def test_the_expert_solves_every_start_and_a_wrong_instruction_none() -> None:
    robot, wrong = WatchedArm(), dict(zip(TASKS, ("go to the blue square", "go to the red square"), strict=True))
    policy = PointExpert(robot)
    for seed in range(20):
        for task in TASKS:
            assert episode(robot, policy, task=task, seed=seed).success
            told = episode(robot, policy, task=task, seed=seed, instruction=wrong[task])
            assert (told.success, told.steps, told.instruction) == (False, 40, wrong[task])


class Watching(PointExpert):
    """Notes when it was asked and what it was shown."""

    def __init__(self, robot: PointArm) -> None:
        super().__init__(robot)
        self.notes: list[tuple[str, float, str]] = []

    def watch(self, observation: Observation) -> None:
        self.notes.append(("watch", observation.stamp_s, observation.instruction))

    def infer(self, observation: Observation) -> ActionChunk:
        self.notes.append(("infer", observation.stamp_s, observation.instruction))
        return super().infer(observation)


def test_a_policy_that_watches_sees_every_control_step_once() -> None:
    robot = WatchedArm()
    policy = Watching(robot)
    done = episode(robot, policy, instruction="go to the red square")
    assert done.steps > 4
    what, when, told = zip(*policy.notes, strict=True)
    assert what == (("infer", "watch", "watch", "watch") * 10)[: done.steps]
    np.testing.assert_allclose(np.diff(when), 0.1)
    assert set(told) == {"go to the red square"}
    assert same(done, episode(WatchedArm(), PointExpert(robot), instruction="go to the red square"))


def test_a_policy_that_fails_while_watching_is_held() -> None:
    robot = WatchedArm()
    policy = Watching(robot)
    policy.watch = lambda observation: 1 / 0  # pyright: ignore[reportAttributeAccessIssue]
    done = episode(robot, policy)
    assert done.error == "policy: ZeroDivisionError: division by zero"
    assert (done.steps, robot.calls[-1]) == (1, "hold")


def test_it_looks_only_when_a_chunk_is_wanted() -> None:
    robot = WatchedArm()
    done = episode(robot, PointExpert(robot))
    assert done.steps > 4
    assert robot.calls == (["observe", *["command"] * 4] * 10)[: len(robot.calls)]
    assert robot.calls.count("observe") == len(done.latency_ms) == -(-done.steps // 4)
    assert done.steps == done.first_success_step == len(done.commands) == done.verdicts["pass"]


def test_rows_are_executed_in_their_order() -> None:
    def count(chunk: ActionChunk) -> ActionChunk:
        rows = np.arange(len(chunk.actions), dtype=np.float32)[:, None] * np.float32(0.01)
        return dataclasses.replace(chunk, actions=np.repeat(rows, 2, 1), execute=5)

    done = episode(WatchedArm(step_limit=12), Wrapped(count))
    sent = [round(100 * float(c[0])) for c in done.commands if c is not None]
    assert sent == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_an_episode_does_not_depend_on_what_ran_before() -> None:
    robot = WatchedArm()
    policy = PointExpert(robot)
    first = [episode(robot, policy, seed=s) for s in (1, 2, 3)]
    again = [episode(robot, policy, seed=s) for s in (3, 1, 2)]
    assert all(same(first[i - 1], again[k]) for k, i in enumerate((3, 1, 2)))


def test_commands_repeat_the_episode() -> None:
    robot = WatchedArm()
    done = episode(robot, PointExpert(robot))
    robot.reset("reach-red", FAR)
    for step, command in enumerate(done.commands):
        assert not robot.success(), step
        assert command is not None
        robot.command(command)
    assert robot.success()


def test_the_policy_is_reset_with_the_seed_before_it_is_asked() -> None:
    class Noted(PointExpert):
        def __init__(self) -> None:
            self.notes: list[Any] = []

        def reset(self, seed: int) -> None:
            self.notes.append(seed)

        def infer(self, observation: Observation) -> ActionChunk:
            self.notes.append(observation.stamp_s)
            return super().infer(observation)

    policy = Noted()
    episode(WatchedArm(step_limit=8), policy, seed=17)
    assert policy.notes == [17, pytest.approx(0.0), pytest.approx(0.4)]


def poisoned(chunk: ActionChunk) -> ActionChunk:
    actions = chunk.actions.copy()
    actions[7, 1] = np.nan
    return dataclasses.replace(chunk, actions=actions)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (poisoned, "not_finite"),
        (lambda c: dataclasses.replace(c, actions=np.zeros((8, 3), np.float32)), "shape"),
        (lambda c: dataclasses.replace(c, stamp_s=c.stamp_s - 1), "stale"),
        (lambda c: dataclasses.replace(c, period_s=0.02), "period"),
        (lambda c: None, "not_a_chunk"),
    ],
)
def test_a_refused_chunk_ends_in_a_held_arm_and_an_error(change: Any, rule: str) -> None:
    robot = WatchedArm()
    done = episode(robot, Wrapped(change))
    assert robot.calls == ["observe", "hold"]
    assert done.error is not None
    assert done.error.startswith("policy: ")
    assert rule in done.error
    assert done.verdicts == {f"hold:{rule}": 1}
    assert (done.success, done.steps, done.robot_failed) == (False, 0, False)


def test_a_policy_that_raises_ends_in_a_held_arm_and_an_error() -> None:
    def fail(chunk: ActionChunk) -> ActionChunk:
        if chunk.stamp_s > 0.3:
            raise RuntimeError("out of memory")
        return chunk

    robot = WatchedArm()
    done = episode(robot, Wrapped(fail))
    assert robot.calls[-2:] == ["observe", "hold"]
    assert done.error == "policy: RuntimeError: out of memory"
    assert (done.steps, len(done.latency_ms), done.robot_failed) == (4, 2, False)
    assert done.traceback is not None
    assert "in fail" in done.traceback


def test_too_large_actions_are_clamped_and_counted() -> None:
    done = episode(WatchedArm(), Wrapped(lambda c: dataclasses.replace(c, actions=c.actions * 3)))
    assert done.verdicts["clamp:limits"] > 0
    assert max(float(np.abs(c).max()) for c in done.commands if c is not None) == 1.0


def test_a_robot_that_breaks_costs_the_episode() -> None:
    class Breaking(WatchedArm):
        def command(self, action: np.ndarray) -> np.ndarray:
            if self.calls.count("command") == 2:
                raise OSError("bus error")
            return super().command(action)

    done = episode(Breaking(), Wrapped(lambda c: c))
    assert done.error == "robot: OSError: bus error"
    assert (done.robot_failed, done.steps, done.success) == (True, 2, False)


def test_a_robot_that_breaks_after_its_success_gives_no_verdict() -> None:
    clock = LockstepClock()

    class Breaking(WatchedArm):
        def command(self, action: np.ndarray) -> np.ndarray:
            sent = super().command(action)
            if self.success():  # so late that ticks are missed, through which it is to hold
                clock.sleep_until(clock.now() + 0.35)
            return sent

        def hold(self) -> None:
            if self.success():
                raise OSError("bus error")

    done = episode(Breaking(), Wrapped(lambda c: c), clock=clock)
    assert done.error == "robot: OSError: bus error"
    assert (done.success, done.first_success_step) == (False, None)


def test_an_interruption_is_not_swallowed() -> None:
    def interrupt(chunk: ActionChunk) -> ActionChunk:
        raise Interrupted("SIGINT")

    with pytest.raises(Interrupted):
        episode(WatchedArm(), Wrapped(interrupt))


class Thinking(PointExpert):
    """Needs `seconds` of the clock's time for every answer."""

    def __init__(self, clock: LockstepClock, seconds: float) -> None:
        self._clock, self._seconds = clock, seconds

    def infer(self, observation: Observation) -> ActionChunk:
        self._clock.sleep_until(self._clock.now() + self._seconds)
        return super().infer(observation)


def test_while_a_late_chunk_is_computed_the_arm_holds() -> None:
    robot, clock = WatchedArm(step_limit=12), LockstepClock(50.0)
    done = episode(robot, Thinking(clock, 0.25), clock=clock, instruction="go to the blue square")
    # Time starts with the first command; each later answer takes two and a half ticks of 0.1 s.
    kinds = ["hold" if c is None else "command" for c in done.commands]
    assert kinds == [*["command"] * 4, "hold", "hold", *["command"] * 4, "hold", "hold"]
    assert (done.overruns, done.steps) == (4, 12)
    assert clock.now() == pytest.approx(50.0 + 0.25 + 1.2 + 0.05, abs=0.06)


def test_after_holding_the_chunk_starts_at_its_first_row() -> None:
    robot, clock = WatchedArm(), LockstepClock()
    late = episode(robot, Thinking(clock, 0.25), clock=clock)
    prompt = episode(robot, PointExpert(robot))
    assert late.success
    moved = [c for c in late.commands if c is not None]
    assert np.array_equal(np.array(moved), np.array(prompt.commands))
    assert late.steps == prompt.steps + late.overruns


def test_thinking_within_the_period_costs_nothing() -> None:
    robot, clock = WatchedArm(), LockstepClock()
    done = episode(robot, Thinking(clock, 0.08), clock=clock)
    assert (done.overruns, done.success) == (0, True)


def test_real_time_keeps_the_rate() -> None:
    robot = WatchedArm(step_limit=6)
    began = time.monotonic()
    done = episode(robot, PointExpert(robot), clock=MonotonicClock(), instruction="go to the blue square")
    assert done.steps == 6
    assert time.monotonic() - began == pytest.approx(0.6, abs=0.35)


def other(**changes: Any) -> Any:
    policy = Zeros(ACTION_SPEC, STATE_SPEC)
    for name, value in changes.items():
        setattr(policy, name, value)
    return policy


def test_connecting_checks_both_specs_and_prints_both_sides() -> None:
    robot = WatchedArm()
    connect(robot, Zeros(ACTION_SPEC, STATE_SPEC))
    slower = dataclasses.replace(ACTION_SPEC, rate_hz=5.0, units=("m", "m"))
    with pytest.raises(SpecMismatch, match=r"(?s)action of the policy and of the robot.*units.*rate_hz: 5.0 and 10.0"):
        connect(robot, other(action_spec=slower))
    with pytest.raises(SpecMismatch, match="state of the policy"):
        connect(robot, other(state_spec=dataclasses.replace(STATE_SPEC, low=(-2.0, -1.0))))


def test_a_missing_camera_lists_what_both_have() -> None:
    with pytest.raises(TandemError, match=rf"\['wrist', '{CAMERA}'\].*\['{CAMERA}'\].*\['wrist'\] missing"):
        connect(WatchedArm(), other(cameras=("wrist", CAMERA)))
