"""One episode: observe -> policy -> chunk -> safety -> command. The same loop for every clock.

With `LockstepClock` thinking costs no time (the usual way to evaluate in simulation). With
`MonotonicClock` the ticks are absolute deadlines of real time: an answer that comes late costs the
ticks it took, during which the arm holds, and an episode has as many ticks as in lock-step.

Pictures are taken only when a new chunk is wanted: rendering is nearly the whole cost of a simulated step.
A policy that also looks at what lies between (`vla.types.Watcher`) is shown one at every step; for one that wants
earlier states (`vla.types.Recalling`) they are taken at every step too.
Failures end in a held arm and an `Episode` with an error, never in an exception.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from robot import chunks, safety
from robot.clock import Clock, Rate
from robot.recall import Recall
from robot.robot import InstructedRobot, Robot, SimulatedRobot
from vla.errors import TandemError
from vla.types import ActionChunk, Decision, Observation, Policy, Watcher, require_same

T = TypeVar("T")


@dataclass(frozen=True)
class Episode:
    """What happened, in full: `commands` sent to the same robot after the same reset repeat it."""

    instruction: str  # what the policy was told
    success: bool
    steps: int  # control steps executed, held ones included
    first_success_step: int | None
    commands: tuple[np.ndarray | None, ...]  # (steps,) of (A,) float32; None where the arm held
    latency_ms: tuple[float, ...]  # (chunks,), wall time of each policy call
    overruns: int  # control ticks missed; 0 in lock-step
    verdicts: Mapping[str, int]  # "pass" or "<decision>:<rule>" -> how often
    wall_s: float
    error: str | None = None  # who failed, and how; such an episode has no verdict
    traceback: str | None = None
    robot_failed: bool = False  # its state is unknown: make a new one


class _Refused(Exception):
    """The policy failed, or its answer may not be executed."""


@dataclass
class _Log:
    instruction: str = ""
    recall: Recall = field(default_factory=Recall)
    told: str | None = None  # to the policy, whatever the robot says
    last_told: str = ""  # by the robot, when it was looked at last
    success: bool = False
    first_success_step: int | None = None
    commands: list[np.ndarray | None] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    overruns: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)


def connect(robot: Robot, policy: Policy) -> None:
    """Check that `policy` speaks of the same numbers and cameras as `robot`.

    Raises:
        SpecMismatch: an ActionSpec differs; both values of each differing field are printed.
        TandemError: the policy wants a camera that the robot does not have.
    """
    require_same(policy.action_spec, robot.action_spec, "action of the policy and of the robot")
    require_same(policy.state_spec, robot.state_spec, "state of the policy and of the robot")
    missing = [name for name in policy.cameras if name not in robot.cameras]
    if missing:
        raise TandemError(
            f"The policy wants cameras {list(policy.cameras)}, the robot has {list(robot.cameras)}: "
            f"{missing} missing. Use the policy on a robot with these cameras, or train it on the robot's own "
            "(policy.cameras, and the camera map of the recipe)."
        )


def run_episode(
    robot: SimulatedRobot,
    policy: Policy,
    clock: Clock,
    task: str,
    seed: int,
    instruction: str | None = None,
) -> Episode:
    """Set `task` up from `seed` and let `policy` try it until success or the robot's step limit.

    `connect` must have passed. The same arguments give the same episode in lock-step, whatever ran before.

    Args:
        instruction: said to the policy instead of the task's own; None leaves that.
    """
    began, log = time.perf_counter(), _Log()
    error, trace, robot_failed = None, None, False
    try:
        _drive(robot, policy, clock, log, (task, seed, instruction))
    except _Refused as refused:
        error, trace = f"policy: {refused}", traceback.format_exc()
    except Exception as failure:  # noqa: BLE001 (the runtime's edge: a robot's failure costs one episode)
        error, trace = f"robot: {_describe(failure)}", traceback.format_exc()
        robot_failed = True
    return Episode(
        instruction=log.instruction,
        success=log.success,
        steps=len(log.commands),
        first_success_step=log.first_success_step,
        commands=tuple(log.commands),
        latency_ms=tuple(log.latency_ms),
        overruns=log.overruns,
        verdicts=dict(log.verdicts),
        wall_s=time.perf_counter() - began,
        error=error,
        traceback=trace,
        robot_failed=robot_failed,
    )


def _drive(
    robot: SimulatedRobot, policy: Policy, clock: Clock, log: _Log, episode: tuple[str, int, str | None]
) -> None:
    task, seed, told = episode
    given = robot.reset(task, seed)
    log.instruction, log.told = given if told is None else told, told
    try:
        _guard(lambda: policy.reset(seed))
        log.recall = _guard(lambda: Recall.of(policy))
        chunk = _ask(robot, policy, clock, log)
        rate = Rate(clock, robot.action_spec.rate_hz)  # time starts when there is something to do
        plan, began_s = chunks.insert(chunks.Plan(), chunk, rate.tick_s), rate.tick_s
        while not _ended(robot, log):
            if chunks.used_up(plan, rate.tick_s) or _told_anew(robot, log):
                chunk = _ask(robot, policy, clock, log)
                _hold_missed(robot, rate, log)
                plan = chunks.insert(plan, chunk, rate.tick_s)  # the arm held: row 0 is due now
            elif isinstance(policy, Watcher) and rate.tick_s > began_s:
                _show(robot, policy, clock, log)
            elif log.recall.history and rate.tick_s > began_s:
                _look(robot, clock, log)
            if _ended(robot, log):
                return
            _send(robot, chunks.action_at(plan, rate.tick_s), log)
            rate.wait()
            _hold_missed(robot, rate, log)
            plan = chunks.expire(plan, rate.tick_s)
    except _Refused:
        robot.hold()
        raise


def _ended(robot: SimulatedRobot, log: _Log) -> bool:
    if robot.success() and not log.success:
        log.success, log.first_success_step = True, len(log.commands)
    return log.success or len(log.commands) >= robot.step_limit


def _ask(robot: Robot, policy: Policy, clock: Clock, log: _Log) -> ActionChunk:
    """A new chunk for what the robot sees now."""
    observation = _look(robot, clock, log)
    began = time.perf_counter()
    try:
        chunk = _guard(lambda: policy.infer(observation))
    finally:
        log.latency_ms.append(1e3 * (time.perf_counter() - began))
    rule = safety.refuse_chunk(chunk, robot.action_spec, observation.stamp_s)
    if rule:
        log.verdicts[f"{Decision.HOLD.value}:{rule}"] += 1
        raise _Refused(f"chunk refused by safety rule {rule!r}: {_shown(chunk)}")
    return chunk


def _show(robot: Robot, watcher: Watcher, clock: Clock, log: _Log) -> None:
    observation = _look(robot, clock, log)
    _guard(lambda: watcher.watch(observation))


def _look(robot: Robot, clock: Clock, log: _Log) -> Observation:
    """What the robot sees now.

    A simulator stands still while its picture is taken, so that the moment before is the capture time
    on the loop's own clock, whichever clock the simulator stamped with.
    """
    stamp_s = clock.now()
    seen = robot.observe()
    log.last_told = seen.instruction
    told = seen.instruction if log.told is None else log.told
    return log.recall.complete(dataclasses.replace(seen, stamp_s=stamp_s, instruction=told), log.commands)


def _told_anew(robot: Robot, log: _Log) -> bool:
    """Whether the robot is told something else than at its last chunk, which is then not carried on."""
    return isinstance(robot, InstructedRobot) and robot.instruction != log.last_told


def _hold_missed(robot: SimulatedRobot, rate: Rate, log: _Log) -> None:
    """Let the robot hold through every tick that real time has taken from us meanwhile."""
    missed = rate.skip_missed()
    log.overruns += missed
    for _ in range(min(missed, robot.step_limit - len(log.commands))):
        robot.hold()
        log.commands.append(None)


def _send(robot: Robot, action: np.ndarray | None, log: _Log) -> None:
    if action is None:  # nothing is planned for now
        robot.hold()
        log.commands.append(None)
        return
    verdict = safety.check(action, robot.action_spec)
    safety.count(log.verdicts, verdict)
    if verdict.command is None:
        raise _Refused(f"action refused by safety rule {verdict.rule!r}: {action}")
    robot.command(verdict.command)
    log.commands.append(verdict.command)


def _guard(call: Callable[[], T]) -> T:  # noqa: UP047 (Python 3.10 has no other form)
    try:
        return call()
    except Exception as failure:
        raise _Refused(_describe(failure)) from failure


def _describe(failure: BaseException) -> str:
    return str(failure) if isinstance(failure, TandemError) else f"{type(failure).__name__}: {failure}"


def _shown(chunk: object) -> str:
    if not isinstance(chunk, ActionChunk):
        return f"got {type(chunk).__name__}"
    return (
        f"actions {chunk.actions.shape} {chunk.actions.dtype}, {np.isnan(chunk.actions).sum()} NaN, "
        f"period {chunk.period_s} s, stamp {chunk.stamp_s} s"
    )
