"""A robot plugin for LeRobot: a simulated robot of ours, which writes down what it was sent.

Found by `--robot.discover_packages_path=lerobot_robot_simulated`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.robots.config import RobotConfig
from lerobot.robots.robot import Robot

from robot.registry import make_robot
from robot.robot import SimulatedRobot


@RobotConfig.register_subclass("simulated")
@dataclass(kw_only=True)
class SimulatedConfig(RobotConfig):
    log: Path  # one line for each action
    task: str
    seed: int = 0


class Simulated(Robot):
    config_class = SimulatedConfig
    name = "simulated"

    def __init__(self, config: SimulatedConfig) -> None:
        from lerobot_policy_tandem.environment import TandemEnv

        config.calibration_dir = config.log.parent
        super().__init__(config)
        self.config = config
        self.robot_config = TandemEnv(robot="metaworld", task=config.task).robot_config
        self.robot: SimulatedRobot = make_robot(self.robot_config)
        self.connected = False

    @property
    def observation_features(self) -> dict[str, Any]:
        size = self.robot_config.image_size
        vector = {f"{name}.pos": float for name in self.robot.state_spec.names}
        return vector | dict.fromkeys(self.robot.cameras, (size, size, 3))

    @property
    def action_features(self) -> dict[str, Any]:
        return {f"{name}.vel": float for name in self.robot.action_spec.names}

    @property
    def is_connected(self) -> bool:
        return self.connected

    @property
    def is_calibrated(self) -> bool:
        return True

    def connect(self, calibrate: bool = True) -> None:  # noqa: FBT001, FBT002 (LeRobot's signature)
        self.robot.reset(self.config.task, self.config.seed)
        self.connected = True

    def calibrate(self) -> None:
        """Nothing to calibrate."""

    def configure(self) -> None:
        """Nothing to configure."""

    def get_observation(self) -> dict[str, Any]:
        seen = self.robot.observe()
        vector = {f"{n}.pos": float(v) for n, v in zip(self.robot.state_spec.names, seen.state, strict=True)}
        return vector | {name: np.array(image) for name, image in seen.images.items()}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        values = [float(action[name]) for name in self.action_features]
        with self.config.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        sent = self.robot.command(np.array(values, np.float32))
        return dict(zip(self.action_features, sent.tolist(), strict=True))

    def disconnect(self) -> None:
        self.connected = False
        self.robot.close()
