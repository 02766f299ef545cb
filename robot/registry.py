"""The simulated robots there are: their configuration, how one is made, who demonstrates on it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from robot import switching
from robot.robot import SharedScene, SimulatedRobot
from robot.sims.metaworld import MetaWorld
from robot.sims.metaworld_experts import Expert, ExpertPolicy
from robot.sims.point_arm import PointArm, PointDemonstrator, PointExpert
from vla.types import Policy


@dataclass(frozen=True)
class MetaWorldConfig:
    kind: Literal["metaworld"]
    tasks: tuple[str, ...]  # Meta-World names, e.g. "drawer-close-v3"
    image_size: int  # height and width of the policy camera's pictures, pixels
    film_size: int  # the same for films
    step_limit: int  # control steps (1/40 s) an episode may take


@dataclass(frozen=True)
class PointArmConfig:
    kind: Literal["point_arm"]
    tasks: tuple[str, ...]  # of "reach-red", "reach-blue"
    image_size: int  # height and width of the camera's pictures, pixels
    step_limit: int  # control steps (1/10 s) an episode may take


SceneConfig = MetaWorldConfig | PointArmConfig


@dataclass(frozen=True)
class SwitchConfig:
    """Episodes that begin with one task and are told another one in the middle; only the second counts."""

    kind: Literal["switch"]
    scene: SceneConfig
    pairs: tuple[tuple[str, ...], ...]  # (first, second), tasks of `scene` that share a scene
    switches: dict[str, int]  # name, such as early -> control step before which the second task is told

    @property
    def tasks(self) -> tuple[str, ...]:
        """ "first+second@name"."""
        return switching.names(self.pairs, self.switches)


RobotConfig = MetaWorldConfig | PointArmConfig | SwitchConfig


class Demonstrator(Protocol):
    """Someone who can do the robot's tasks."""

    def reset(self) -> None:
        """Begin an episode."""
        ...

    def action(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(executed, label), each (A,) float32: what to send now, and what would have been right."""
        ...


@dataclass(frozen=True)
class Kind:
    make: Callable[..., Any]  # (config's fields but `kind`, clock=...) -> SimulatedRobot
    demonstrator: Callable[[Any, float], Demonstrator]  # (robot, noise) -> Demonstrator
    expert: Callable[[Any], Policy]  # (robot) -> the demonstrator as a policy, without noise
    licence: str  # of data recorded on it


ROBOTS = {
    "metaworld": Kind(MetaWorld, Expert, ExpertPolicy, "MIT (Meta-World)"),
    "point_arm": Kind(PointArm, PointDemonstrator, PointExpert, "Apache-2.0"),
}


def make_robot(config: RobotConfig, clock: Callable[[], float] = time.monotonic) -> SimulatedRobot:
    """The robot that `config` describes. `clock` (s) stamps its observations.

    Raises:
        UsageError: a task or a number that the robot does not accept.
        MissingDependency: its simulator is not installed.
    """
    if isinstance(config, SwitchConfig):
        scene = make_robot(config.scene, clock)
        return switching.Switched(_shared(scene), config.pairs, config.switches, config.scene.step_limit)
    options = {k: v for k, v in vars(config).items() if k != "kind"}
    return ROBOTS[config.kind].make(**options, clock=clock)


def make_demonstrator(config: SceneConfig, robot: SimulatedRobot, noise: float) -> Demonstrator:
    """Who shows the tasks of `robot`; `noise` pushes it off the ideal path (see the class)."""
    return ROBOTS[config.kind].demonstrator(robot, noise)


def make_expert(config: RobotConfig, robot: SimulatedRobot) -> Policy:
    """The demonstrator as a policy, for comparison."""
    if isinstance(config, SwitchConfig):
        assert isinstance(robot, switching.Switched)
        return make_expert(config.scene, robot.scene)
    return ROBOTS[config.kind].expert(robot)


def _shared(robot: SimulatedRobot) -> SharedScene:
    assert isinstance(robot, SharedScene), robot  # every robot of the table is one
    return robot
