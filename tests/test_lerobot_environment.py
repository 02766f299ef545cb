"""The plugin's environment: our simulated robots behind gymnasium and LeRobot's configuration."""

from pathlib import Path
from typing import Any

import draccus
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from lerobot.configs import FeatureType
from lerobot.envs import EnvConfig, make_env, preprocess_observation
from lerobot.envs.utils import env_to_policy_features

from lerobot_policy_tandem.environment import RobotEnvironment, TandemEnv
from robot.registry import PointArmConfig
from robot.sims.point_arm import INSTRUCTIONS, PointArm
from vla.errors import UsageError

CONFIG = PointArmConfig("point_arm", ("reach-red",), image_size=32, step_limit=5)


def test_gymnasium_accepts_it() -> None:
    env = RobotEnvironment(CONFIG, "reach-red")
    check_env(env, skip_render_check=True)
    assert env.render().shape == (32, 32, 3)
    env.close()


def test_an_episode_is_the_robots_own() -> None:
    env, arm = RobotEnvironment(CONFIG, "reach-red"), PointArm(("reach-red",), image_size=32, step_limit=5)
    seen, info = env.reset(seed=9)
    arm.reset("reach-red", 9)
    assert info == {"is_success": False}
    assert env.task_description == INSTRUCTIONS["reach-red"]
    ended = []
    for step in range(5):
        np.testing.assert_array_equal(seen["pixels"]["top"], arm.observe().images["top"])
        np.testing.assert_array_equal(seen["agent_pos"], arm.observe().state)
        action = np.array([0.5, -0.25 * step])
        seen, reward, terminated, truncated, info = env.step(action)
        arm.command(action)
        ended.append((reward, terminated, truncated, info["is_success"]))
    assert ended == [(0.0, False, False, False)] * 4 + [(0.0, False, True, False)]


def test_success_ends_an_episode() -> None:
    env = RobotEnvironment(CONFIG, "reach-red")
    env.reset(seed=9)
    arm: Any = env._robot
    arm._point = arm._squares["reach-red"] + 0.05
    _, reward, terminated, truncated, info = env.step(np.zeros(2))
    assert (reward, terminated, truncated, info) == (1.0, True, False, {"is_success": True})


def test_starts_without_a_seed_differ() -> None:
    env = RobotEnvironment(CONFIG, "reach-red")
    starts = [env.reset(seed=seed)[0]["agent_pos"] for seed in (3, None, None, 3)]
    np.testing.assert_array_equal(starts[0], starts[3])
    assert not np.array_equal(starts[1], starts[2])


def test_lerobot_sees_each_task_as_one(tmp_path: Path) -> None:
    made = TandemEnv(robot="point_arm", image_size=32, step_limit=7)
    envs: Any = make_env(made, n_envs=2)["point_arm"]
    assert [envs[i].call("task") for i in envs] == [("reach-red",) * 2, ("reach-blue",) * 2]
    seen, _ = envs[1].reset(seed=[4, 5])
    assert envs[1].call("task_description") == (INSTRUCTIONS["reach-blue"],) * 2
    assert envs[1].call("_max_episode_steps") == (7, 7)
    batch = preprocess_observation(seen)
    features = env_to_policy_features(made)
    assert batch.keys() == features.keys() - {"action"} == {"observation.images.top", "observation.state"}
    for key, value in batch.items():
        assert value.shape == (2, *features[key].shape), key
    assert features["action"].type is FeatureType.ACTION
    assert made.fps == 10
    for env in envs.values():
        env.close()


def test_the_configuration_survives_being_saved_and_loaded() -> None:
    made = TandemEnv(robot="point_arm", task="reach-blue", image_size=48, step_limit=9, max_parallel_tasks=2)
    again: Any = draccus.decode(EnvConfig, draccus.encode(made, EnvConfig))
    assert again == made
    assert again.robot_config == PointArmConfig("point_arm", ("reach-blue",), 48, 9)


@pytest.mark.sim
def test_metaworld_is_there_too() -> None:
    made = TandemEnv(robot="metaworld", task="drawer-close-v3, faucet-open-v3")
    made_envs: Any = make_env(made, n_envs=1)["metaworld"]
    first, second = made_envs.values()
    seen, _ = second.reset(seed=[1])
    assert seen["pixels"]["front"].shape == (1, 96, 96, 3)
    assert second.call("task_description") == ("open the faucet",)
    _, reward, *_ = second.step(np.zeros((1, 4), np.float32))
    assert reward.tolist() == [0.0]
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"robot": "point_harm"}, "Did you mean 'point_arm'"),
        ({"task": "reach-green"}, "no task 'reach-green'"),
        ({"image_size": 3}, "image_size >= 16"),
    ],
)
def test_what_the_robot_does_not_take_is_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TandemEnv(**changes)
