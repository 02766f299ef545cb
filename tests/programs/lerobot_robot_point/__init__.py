"""A robot plugin for LeRobot: the point arm, which writes down what it was sent. Found by `discover_packages_path`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.robots.config import RobotConfig
from lerobot.robots.robot import Robot

from robot.sims.point_arm import PointArm

STATE, ACTION = ("point.x.pos", "point.y.pos"), ("point.dx.vel", "point.dy.vel")


@RobotConfig.register_subclass("point")
@dataclass(kw_only=True)
class LerobotPointConfig(RobotConfig):
    log: Path  # one line for each action
    seed: int = 0


class LerobotPoint(Robot):
    config_class = LerobotPointConfig
    name = "point"

    def __init__(self, config: LerobotPointConfig) -> None:
        config.calibration_dir = config.log.parent
        super().__init__(config)
        self.log, self.seed = config.log, config.seed
        self.arm: PointArm | None = None

    @property
    def observation_features(self) -> dict[str, Any]:
        return dict.fromkeys(STATE, float) | {"top": (64, 64, 3)}

    @property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(ACTION, float)

    @property
    def is_connected(self) -> bool:
        return self.arm is not None

    @property
    def is_calibrated(self) -> bool:
        return True

    def connect(self, calibrate: bool = True) -> None:  # noqa: FBT001, FBT002 (LeRobot's signature)
        self.arm = PointArm(("reach-red",), image_size=64, step_limit=10_000)
        self.arm.reset("reach-red", self.seed)

    def calibrate(self) -> None:
        """Nothing to calibrate."""

    def configure(self) -> None:
        """Nothing to configure."""

    def get_observation(self) -> dict[str, Any]:
        assert self.arm is not None
        seen = self.arm.observe()
        return dict(zip(STATE, seen.state.tolist(), strict=True)) | {"top": np.array(seen.images["top"])}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        assert self.arm is not None
        sent = self.arm.command(np.array([float(action[name]) for name in ACTION], np.float32))
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps([float(action[name]) for name in ACTION]) + "\n")
        return dict(zip(ACTION, sent.tolist(), strict=True))

    def disconnect(self) -> None:
        self.arm = None
