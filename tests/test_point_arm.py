import numpy as np
import pytest

from robot.registry import PointArmConfig, make_demonstrator, make_expert, make_robot
from robot.robot import SimulatedRobot
from robot.sims.point_arm import CAMERA, INSTRUCTIONS, PointArm
from vla.errors import TandemError, UsageError

CONFIG = PointArmConfig("point_arm", ("reach-red", "reach-blue"), image_size=64, step_limit=40)


def test_it_is_a_robot_of_the_registry_with_expert_and_demonstrator() -> None:
    robot = make_robot(CONFIG)
    assert isinstance(robot, SimulatedRobot)
    assert make_expert(CONFIG, robot).action_spec == robot.action_spec
    robot.reset("reach-red", 0)
    executed, label = make_demonstrator(CONFIG, robot, 0.3).action(np.random.default_rng(0))
    assert not np.array_equal(executed, label)
    assert executed.dtype == label.dtype == np.float32


def test_only_the_instruction_tells_the_tasks_apart() -> None:
    robot = PointArm(CONFIG.tasks, image_size=64, step_limit=40)
    seen = []
    for task in CONFIG.tasks:
        assert robot.reset(task, 3) == INSTRUCTIONS[task]
        seen.append(robot.observe())
    assert np.array_equal(seen[0].images[CAMERA], seen[1].images[CAMERA])
    assert np.array_equal(seen[0].state, seen[1].state)
    robot.reset("reach-red", 4)
    assert not np.array_equal(robot.observe().images[CAMERA], seen[0].images[CAMERA])


def test_commands_move_by_ten_centimetres_and_are_clipped() -> None:
    robot = PointArm(CONFIG.tasks, image_size=64, step_limit=40)
    robot.reset("reach-red", 0)
    before = robot.observe().state
    sent = robot.command(np.array([5.0, -0.5], np.float32))
    assert sent.tolist() == [1.0, -0.5]
    assert robot.observe().state - before == pytest.approx([0.1, -0.05], abs=1e-6)
    robot.hold()
    assert robot.observe().state - before == pytest.approx([0.1, -0.05], abs=1e-6)


def test_success_is_latched() -> None:
    robot = PointArm(("reach-red",), image_size=64, step_limit=100)
    robot.reset("reach-red", 0)
    demonstrator = make_demonstrator(CONFIG, robot, 0.0)
    while not robot.success():
        robot.command(demonstrator.action(np.random.default_rng(0))[0])
    for _ in range(15):
        robot.command(np.ones(2, np.float32))
    assert robot.success()
    robot.reset("reach-red", 0)
    assert not robot.success()


def test_wrong_use_is_named() -> None:
    robot = PointArm(("reach-red",), image_size=64, step_limit=40)
    with pytest.raises(UsageError, match="reach-red"):
        robot.reset("reach-rad", 0)
    with pytest.raises(UsageError, match="Did you mean 'reach-blue'"):
        PointArm(("reach-blu",), image_size=64, step_limit=40)
    with pytest.raises(UsageError, match="image_size"):
        PointArm(("reach-red",), image_size=4, step_limit=40)
    with pytest.raises(TandemError, match="finite"):
        robot.command(np.array([np.nan, 0], np.float32))
