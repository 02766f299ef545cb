"""Policies that fail, for the tests of evaluation: named in a configuration as `hostile_policies:<name>`."""

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from robot.sims.point_arm import PointArm, PointExpert
from vla.types import ActionChunk, Observation

HARMED = 51  # the seed of the episodes that go wrong
Settings = Mapping[str, Any]


class Hostile(PointExpert):
    """The expert, that does `harm` to its answers in episodes of seed `HARMED`."""

    def __init__(self, robot: PointArm, harm: Callable[[ActionChunk], ActionChunk]) -> None:
        super().__init__(robot)
        self._harm, self._seed = harm, -1

    def reset(self, seed: int) -> None:
        self._seed = seed

    def infer(self, observation: Observation) -> ActionChunk:
        chunk = super().infer(observation)
        return self._harm(chunk) if self._seed == HARMED else chunk


def nan(robot: PointArm, settings: Settings) -> PointExpert:
    return Hostile(robot, lambda chunk: dataclasses.replace(chunk, actions=chunk.actions * np.float32("nan")))


def die(robot: PointArm, settings: Settings) -> PointExpert:
    def harm(chunk: ActionChunk) -> ActionChunk:
        os.kill(os.getpid(), signal.SIGKILL)
        return chunk

    return Hostile(robot, harm)


def hang(robot: PointArm, settings: Settings) -> PointExpert:
    def harm(chunk: ActionChunk) -> ActionChunk:
        time.sleep(600)
        return chunk

    return Hostile(robot, harm)


def mended(robot: PointArm, settings: Settings) -> PointExpert:
    return PointExpert(robot)


class Broken(PointExpert):
    def infer(self, observation: Observation) -> ActionChunk:
        raise RuntimeError("no weights")


class Slow(PointExpert):
    def infer(self, observation: Observation) -> ActionChunk:
        time.sleep(0.1)
        return super().infer(observation)


class BreaksItsRobot(PointExpert):
    """Breaks the robot itself in episodes of seed `HARMED`, for as long as that robot lives."""

    def __init__(self, robot: PointArm) -> None:
        super().__init__(robot)
        self._robot = robot

    def reset(self, seed: int) -> None:
        def command(action: np.ndarray) -> np.ndarray:
            raise OSError("bus error")

        if seed == HARMED:
            self._robot.command = command


def broken(robot: PointArm, settings: Settings) -> PointExpert:
    return Broken(robot)


def slow(robot: PointArm, settings: Settings) -> PointExpert:
    return Slow(robot)


def breaks_its_robot(robot: PointArm, settings: Settings) -> PointExpert:
    return BreaksItsRobot(robot)


def other_units(robot: PointArm, settings: Settings) -> PointExpert:
    policy = PointExpert(robot)
    policy.action_spec = dataclasses.replace(policy.action_spec, units=("m", "m"))
    return policy
