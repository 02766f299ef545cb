"""Switching tasks in the middle of an episode: a robot that is told another task, and who senses contact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from robot.robot import FeelingRobot, Robot, SharedScene
from vla.errors import UsageError, choose_from
from vla.switching import GripperContact, SwitchingRules
from vla.types import ActionSpec, Observation


@dataclass(frozen=True)
class RobotContact:
    """The robot feels contact itself: a simulator, or a sensor behind `FeelingRobot`."""

    kind: Literal["robot"]


@dataclass(frozen=True)
class SwitchingRun:
    """How a policy that was trained with behaviour modes is run."""

    contact: GripperContact | RobotContact
    rules: SwitchingRules


def contact_of(contact: GripperContact | RobotContact, robot: Robot) -> Callable[[Observation], bool]:
    """What tells a policy whether `robot` is in contact.

    Raises:
        UsageError: the robot cannot feel contact, or has no such gripper.
    """
    if isinstance(contact, GripperContact):
        spec = robot.state_spec
        if contact.vector != "state":
            raise UsageError("While a robot runs, contact is read from its state: switching.contact.vector=state.")
        contact.read(np.zeros(spec.dim, np.float32), spec)
        return lambda observation: bool(contact.read(observation.state, spec))
    if not isinstance(robot, FeelingRobot):
        raise UsageError("This robot feels no contact. Give switching.contact a gripper's threshold.")
    return lambda observation: robot.contact()


class Switched:
    """`robot.robot.SimulatedRobot`: each episode begins with one task and is told another one in the middle.

    Only the second task counts as success, from the moment it is told; the scene is as the first one left it. Its
    tasks are named "first+second@when".

    Args:
        scene: sets up the tasks.
        pairs: (first, second) tasks that share a scene.
        switches: name -> control step before which the second task is told.
        steps: control steps an episode may go on after the switch.
    """

    def __init__(
        self, scene: SharedScene, pairs: tuple[tuple[str, ...], ...], switches: Mapping[str, int], steps: int
    ) -> None:
        for name in {task for pair in pairs for task in pair}:
            if name not in scene.tasks:
                raise UsageError(f"robot.pairs names {name!r}.{choose_from(name, scene.tasks)}")
        self._scene, self._switches, self._limit = scene, dict(switches), steps
        self._pairs = {name: split(name) for name in names(pairs, switches)}
        self._second, self._at, self._done, self._instruction = "", 0, 0, ""

    @property
    def action_spec(self) -> ActionSpec:
        return self._scene.action_spec

    @property
    def state_spec(self) -> ActionSpec:
        return self._scene.state_spec

    @property
    def cameras(self) -> tuple[str, ...]:
        return self._scene.cameras

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self._pairs)

    @property
    def step_limit(self) -> int:
        return self._at + self._limit

    @property
    def instruction(self) -> str:
        """What the robot is told now."""
        return self._instruction

    @property
    def scene(self) -> SharedScene:
        return self._scene

    def reset(self, task: str, seed: int) -> str:
        if task not in self._pairs:
            raise UsageError(f"This robot was not set up for task {task!r}.{choose_from(task, self._pairs)}")
        first, self._second, when = self._pairs[task]
        self._at, self._done = self._switches[when], 0
        self._instruction = self._scene.reset(first, seed)
        said = self._instruction
        self._switch_if_due()
        return f"{said}, then from step {self._at}: {self._second}"

    def observe(self) -> Observation:
        return self._scene.observe()

    def render(self) -> np.ndarray:
        return self._scene.render()

    def command(self, action: np.ndarray) -> np.ndarray:
        sent = self._scene.command(action)
        self._passed()
        return sent

    def hold(self) -> None:
        self._scene.hold()
        self._passed()

    def contact(self) -> bool:
        if not isinstance(self._scene, FeelingRobot):
            raise UsageError("The robot that is told two tasks feels no contact.")
        return self._scene.contact()

    def success(self) -> bool:
        return self._done >= self._at and self._scene.success()

    def close(self) -> None:
        self._scene.close()

    def _passed(self) -> None:
        self._done += 1
        self._switch_if_due()

    def _switch_if_due(self) -> None:
        if self._done == self._at:
            self._instruction = self._scene.switch(self._second)


def names(pairs: tuple[tuple[str, ...], ...], switches: Mapping[str, int]) -> tuple[str, ...]:
    """The tasks of a robot that switches, those of one moment together."""
    for pair in pairs:
        if len(pair) != 2 or pair[0] == pair[1]:
            raise UsageError(f"robot.pairs holds pairs of two different tasks, got {list(pair)}.")
    if not pairs or not switches or min(switches.values()) < 0 or any("@" in when for when in switches):
        raise UsageError(
            f"robot.pairs and robot.switches need one entry or more, names without '@' and steps of 0 or more, got "
            f"{list(pairs)} and {dict(switches)}."
        )
    return tuple(f"{first}+{second}@{when}" for when in switches for first, second in pairs)


def split(name: str) -> tuple[str, str, str]:
    """ "a+b@early" -> ("a", "b", "early")."""
    tasks, _, when = name.rpartition("@")
    first, _, second = tasks.partition("+")
    return first, second, when
