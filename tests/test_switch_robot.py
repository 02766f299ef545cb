"""Switching tasks in the middle of an episode: the robot that is told two, its evaluation, who feels contact."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from robot import evaluate as evaluation
from robot import results
from robot.clock import LockstepClock
from robot.demonstrate import spans
from robot.eval_config import EvalConfig, Films, PolicySource
from robot.registry import MetaWorldConfig, PointArmConfig, SwitchConfig, make_expert, make_robot
from robot.runtime import run_episode
from robot.sims.metaworld import MetaWorld
from robot.sims.metaworld_experts import Expert
from robot.sims.point_arm import PointArm, PointExpert
from robot.switching import RobotContact, Switched, SwitchingRun, contact_of, names
from vla.errors import TandemError, UsageError
from vla.switching import GripperContact, SwitchingRules
from vla.types import ActionChunk, Observation

TASKS = ("reach-red", "reach-blue")
POINT = PointArmConfig("point_arm", TASKS, 64, 40)
CONFIG = SwitchConfig("switch", POINT, (TASKS, TASKS[::-1]), {"early": 2, "late": 5})
EARLY = "reach-red+reach-blue@early"


class Asked:
    """The expert, noting what it is told at which step, with long chunks."""

    def __init__(self, robot: Switched) -> None:
        scene = robot.scene
        assert isinstance(scene, PointArm)
        self._expert, self.told = PointExpert(scene), []
        self.action_spec, self.state_spec, self.cameras = scene.action_spec, scene.state_spec, scene.cameras

    def reset(self, seed: int) -> None:
        self.told.clear()

    def infer(self, observation: Observation) -> ActionChunk:
        self.told.append((round(observation.stamp_s * 10), observation.instruction))
        return replace(self._expert.infer(observation), execute=4)


def switched(config: SwitchConfig = CONFIG) -> Switched:
    robot = make_robot(config)
    assert isinstance(robot, Switched)
    return robot


def test_tasks_are_named_by_moment() -> None:
    assert CONFIG.tasks == switched().tasks
    assert CONFIG.tasks == (
        EARLY,
        "reach-blue+reach-red@early",
        "reach-red+reach-blue@late",
        "reach-blue+reach-red@late",
    )


def test_the_second_task_is_told_at_its_step_and_what_was_planned_is_dropped() -> None:
    robot = switched()
    policy = Asked(robot)
    episode = run_episode(robot, policy, LockstepClock(), EARLY, 3)
    steps = [step for step, _ in policy.told]
    assert policy.told[0] == (0, "go to the red square")
    assert policy.told[1] == (2, "go to the blue square"), "not after the four steps that the chunk was good for"
    assert steps[2:] == [6 + 4 * i for i in range(len(steps) - 2)]
    assert episode.success
    assert episode.instruction == "go to the red square, then from step 2: reach-blue"


def test_only_the_second_task_counts() -> None:
    robot = switched(replace(CONFIG, switches={"never": 30}))
    name = "reach-red+reach-blue@never"
    robot.reset(name, 3)
    expert = PointExpert(PointArm(TASKS, image_size=64, step_limit=9))
    for _ in range(29):
        robot.command(expert.infer(robot.observe()).actions[0])
        assert not robot.success()
    assert robot.scene.success(), "the first task was solved long ago"
    assert robot.instruction == "go to the red square"
    robot.hold()
    assert robot.instruction == robot.observe().instruction == "go to the blue square"
    assert not robot.success()
    assert robot.step_limit == 30 + 40


def test_an_instruction_that_the_evaluation_gives_holds_throughout() -> None:
    robot = switched()
    policy = Asked(robot)
    run_episode(robot, policy, LockstepClock(), EARLY, 3, "go to the red square")
    assert {told for _, told in policy.told} == {"go to the red square"}


def test_an_episode_repeats_itself() -> None:
    one, other = (run_episode(r := switched(), Asked(r), LockstepClock(), EARLY, 7) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one.commands, other.commands, strict=True))  # pyright: ignore
    robot = switched()
    robot.reset(EARLY, 7)
    for command in one.commands:
        assert command is not None
        robot.command(command)
    assert robot.success() == one.success, "its commands are enough to film it"


def config(folder: Path, robot: SwitchConfig = CONFIG, path: str = "expert", **changes: object) -> EvalConfig:
    given = EvalConfig(
        policy=PolicySource(path, "cpu", {}),
        robot=robot,
        episodes=2,
        first_seed=5,
        instructions={},
        clock="lockstep",
        workers=1,
        threads=1,
        timeout_s=60,
        films=Films(0, 0),
        output=folder / "out",
    )
    return replace(given, **changes)


def test_rates_are_told_by_moment(tmp_path: Path) -> None:
    summary = evaluation.evaluate(config(tmp_path))
    assert summary["suite"] == "switch"
    assert list(summary["switches"]) == ["early", "late"]
    for rate in summary["switches"].values():
        assert (rate["successes"], rate["episodes"]) == (4, 4)
        assert 0 < rate["low"] < rate["high"] == 1
    assert {row.task for row in results.read(tmp_path / "out")} == set(CONFIG.tasks)
    shown = evaluation.show(config(tmp_path), summary)
    assert "switch early" in shown
    assert "4/4 = 100 %" in shown


def test_a_policy_without_modes_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    run = SwitchingRun(RobotContact("robot"), SwitchingRules(1, 6, 8, "forward"))
    with pytest.raises(UsageError, match=r"policy\.conditions\.modes of 3"):
        evaluation.evaluate(config(tmp_path, switching=run))
    assert not (tmp_path / "out").exists()


def test_configurations_without_switching_keep_their_digest(tmp_path: Path) -> None:
    plain = config(tmp_path, POINT)  # pyright: ignore[reportArgumentType]
    assert "switching" not in plain.deciding()
    run = SwitchingRun(RobotContact("robot"), SwitchingRules(1, 6, 8, "forward"))
    assert plain.digest() != replace(plain, switching=run).digest()


def test_pairs_that_cannot_be_are_refused() -> None:
    for pairs, switches, message in (
        (((TASKS[0], TASKS[0]),), {"a": 1}, "two different tasks"),
        (((TASKS[0],),), {"a": 1}, "two different tasks"),
        ((), {"a": 1}, "one entry or more"),
        ((TASKS,), {}, "one entry or more"),
        ((TASKS,), {"a": -1}, "steps of 0 or more"),
        ((TASKS,), {"a@b": 1}, "without '@'"),
    ):
        with pytest.raises(UsageError, match=message):
            names(pairs, switches)
    with pytest.raises(UsageError, match="'reach-green'"):
        switched(replace(CONFIG, pairs=(("reach-red", "reach-green"),)))
    with pytest.raises(UsageError, match="not set up for task"):
        switched().reset("reach-red", 0)


def test_contact_is_felt_or_read_from_the_gripper() -> None:
    robot = switched()
    felt = contact_of(RobotContact("robot"), robot)
    seen = set()
    robot.reset("reach-red+reach-blue@late", 3)
    for _ in range(12):
        observation = robot.observe()
        assert felt(observation) == robot.contact()
        seen.add(robot.contact())
        robot.command(PointExpert(PointArm(TASKS, image_size=64, step_limit=9)).infer(observation).actions[0])
    spec = MetaWorld(["drawer-close-v3"], image_size=8, film_size=8, step_limit=1)
    closed = contact_of(GripperContact("gripper", "state", "gripper.opening", 0.4), spec)
    observation = Observation(0.0, {}, np.array([0, 0, 0, 0.3], np.float32), "")
    assert closed(observation)
    assert not closed(replace(observation, state=np.array([0, 0, 0, 0.5], np.float32)))
    with pytest.raises(UsageError, match=r"contact\.vector=state"):
        contact_of(GripperContact("gripper", "action", "gripper.effort", 0.0), spec)
    with pytest.raises(UsageError, match="must be one of the state's"):
        contact_of(GripperContact("gripper", "state", "hand", 0.0), spec)


def test_spans_of_contact() -> None:
    assert spans([False, True, True, False, True]) == [(1, 2), (4, 4)]
    assert spans([True]) == [(0, 0)]
    assert spans([False, False]) == []


FAUCETS = ("faucet-open-v3", "faucet-close-v3")


@pytest.mark.sim
def test_the_faucets_share_a_scene_and_go_on_where_they_were() -> None:
    robot = MetaWorld(FAUCETS, image_size=64, film_size=64, step_limit=75)
    robot.reset(FAUCETS[0], 4)
    expert = Expert(robot, 0.0)
    touched = []
    for _ in range(24):
        touched.append(robot.contact())
        robot.command(expert.clean())
    assert touched[0] is False
    assert touched[-1] is True
    before, state = robot.observe().images["front"], robot.privileged[:4]
    assert robot.switch(FAUCETS[1]) == "close the faucet"
    assert robot.task == FAUCETS[1]
    assert np.allclose(robot.privileged[:4], state)
    assert np.array_equal(robot.observe().images["front"], before), "nothing has moved"
    assert not robot.success()
    mirrored = MetaWorld(FAUCETS[:1], image_size=64, film_size=64, step_limit=75)
    mirrored.reset(FAUCETS[0], 4)
    again = Expert(mirrored, 0.0)
    for _ in range(24):
        mirrored.command(again.clean())
    push = np.array([0.3, -0.2, 0.1, 0.0], np.float32)
    for _ in range(5):
        robot.command(push)
        mirrored.command(push)
    assert np.allclose(robot.privileged[:4], mirrored.privileged[:4], atol=1e-6), "it goes on from the same state"
    robot.close()
    mirrored.close()


@pytest.mark.sim
def test_tasks_without_a_common_scene_are_refused() -> None:
    robot = MetaWorld([*FAUCETS, "drawer-close-v3"], image_size=64, film_size=64, step_limit=75)
    robot.reset(FAUCETS[0], 4)
    with pytest.raises(TandemError, match="share no scene"):
        robot.switch("drawer-close-v3")
    robot.close()


@pytest.mark.sim
def test_the_expert_solves_a_task_that_it_is_told_before_it_has_touched() -> None:
    scene = MetaWorldConfig("metaworld", FAUCETS, 64, 64, 75)
    settings = SwitchConfig("switch", scene, (FAUCETS, FAUCETS[::-1]), {"early": 8})
    robot = switched(settings)
    for task in settings.tasks:
        episode = run_episode(robot, make_expert(settings, robot), LockstepClock(), task, 20001)
        assert episode.success, task
        assert episode.first_success_step is not None
        assert episode.first_success_step > 20
    robot.close()


@pytest.mark.sim
def test_recorded_demonstrations_say_where_they_touch(tmp_path: Path) -> None:
    from robot import record

    scene = MetaWorldConfig("metaworld", (FAUCETS[0],), 32, 32, 75)
    settings = record.RecordConfig(scene, 1, 10001, 0.25, 4, "leave_out", "image", tmp_path / "data", 1)
    record.record(settings)
    (episode,) = json.loads((tmp_path / "data" / record.RECORD).read_text())["episodes"]
    first, last = episode["contacts"][0]
    assert 10 < first <= last < episode["frames"]
