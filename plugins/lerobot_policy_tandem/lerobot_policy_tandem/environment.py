"""`--env.type=tandem`: the simulated robots of `robot.registry` as gymnasium environments.

--env.type=tandem --env.robot=metaworld --env.task=drawer-close-v3,button-press-topdown-v3 --env.image_size=96
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig
from lerobot.envs.utils import freeze_after_episode_end
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from robot.registry import MetaWorldConfig, PointArmConfig, SceneConfig, make_robot
from vla import config as settings
from vla.types import ActionSpec


@dataclass(frozen=True)
class _Choice:
    """As an evaluation's `robot` block."""

    robot: SceneConfig


DEFAULTS: dict[str, dict[str, Any]] = {
    "point_arm": {"tasks": ["reach-red", "reach-blue"], "image_size": 64, "step_limit": 40},
    "metaworld": {"tasks": ["drawer-close-v3"], "image_size": 96, "film_size": 240, "step_limit": 75},
}


@EnvConfig.register_subclass("tandem")
@dataclass
class TandemEnv(EnvConfig):
    robot: str = "point_arm"  # or metaworld
    task: str | None = None  # one or more of the robot's tasks, with commas between; each is a task_id
    image_size: int | None = None  # pixels
    step_limit: int | None = None  # control steps of an episode
    features: dict[str, PolicyFeature] = field(default_factory=dict)  # filled in from the robot
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        robot = make_robot(self.robot_config)
        size = self.robot_config.image_size
        self.fps = round(robot.action_spec.rate_hz)
        self.features = {
            ACTION: PolicyFeature(FeatureType.ACTION, (robot.action_spec.dim,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (robot.state_spec.dim,)),
        }
        self.features_map = {ACTION: ACTION, "agent_pos": OBS_STATE}
        for camera in robot.cameras:
            self.features[f"pixels/{camera}"] = PolicyFeature(FeatureType.VISUAL, (size, size, 3))
            self.features_map[f"pixels/{camera}"] = f"{OBS_IMAGES}.{camera}"
        robot.close()

    @property
    def robot_config(self) -> PointArmConfig | MetaWorldConfig:
        """The robot as our own configuration.

        Raises:
            UsageError: no such robot, or settings it does not take.
        """
        given: dict[str, Any] = {"kind": self.robot} | DEFAULTS.get(self.robot, {})
        given |= {k: v for k in ("image_size", "step_limit") if (v := getattr(self, k)) is not None}
        if self.task:
            given["tasks"] = [name.strip() for name in self.task.split(",")]
        return settings.build(_Choice, {"robot": given}, "env").robot

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {"config": self.robot_config}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, gym.vector.VectorEnv]]:  # noqa: FBT001, FBT002 (LeRobot's signature)
        config = self.robot_config
        vector = gym.vector.AsyncVectorEnv if use_async_envs and n_envs > 1 else gym.vector.SyncVectorEnv
        made: dict[int, gym.vector.VectorEnv] = {}
        for number, task in enumerate(config.tasks):
            one: Callable[[], gym.Env] = freeze_after_episode_end(partial(RobotEnvironment, config, task))
            made[number] = vector([one] * n_envs, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)
        return {self.robot: made}


class RobotEnvironment(gym.Env):
    """One task of a simulated robot of ours. An action is in the robot's units; the reward is 1 at success."""

    def __init__(self, config: PointArmConfig | MetaWorldConfig, task: str) -> None:
        self._robot = make_robot(config)
        self._max_episode_steps, self._steps = self._robot.step_limit, 0
        self.task, self.task_description = task, task
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": round(self._robot.action_spec.rate_hz)}
        self.render_mode = "rgb_array"
        size = config.image_size
        picture = gym.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(
            {
                "pixels": gym.spaces.Dict(dict.fromkeys(self._robot.cameras, picture)),
                "agent_pos": _box(self._robot.state_spec),
            }
        )
        self.action_space = _box(self._robot.action_spec)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed, options=options)
        chosen = int(self.np_random.integers(2**31)) if seed is None else seed
        self._steps, self.task_description = 0, self._robot.reset(self.task, chosen)
        return self._observation(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self._robot.command(np.asarray(action, np.float32))
        self._steps += 1
        success = self._robot.success()
        truncated = not success and self._steps >= self._max_episode_steps
        return self._observation(), float(success), success, truncated, {"is_success": success}

    def render(self) -> np.ndarray:
        return self._robot.render()

    def close(self) -> None:
        self._robot.close()

    def _observation(self) -> dict[str, Any]:
        seen = self._robot.observe()
        return {"pixels": {k: np.array(v) for k, v in seen.images.items()}, "agent_pos": np.array(seen.state)}


def _box(spec: ActionSpec) -> gym.spaces.Box:
    return gym.spaces.Box(np.array(spec.low, np.float32), np.array(spec.high, np.float32))
