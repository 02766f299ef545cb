"""Meta-World as a robot: contract, pictures, seeds, success, experts."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from robot.registry import ROBOTS, MetaWorldConfig, PointArmConfig, SceneConfig, make_expert, make_robot
from robot.robot import SimulatedRobot
from robot.sims.metaworld import ACTION_REPEAT, ACTION_SPEC, STATE_SPEC, TASKS, MetaWorld, describe
from robot.sims.metaworld_experts import Expert
from vla.errors import TandemError, UsageError

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.sim

CONFIGS = [
    MetaWorldConfig("metaworld", tuple(TASKS), image_size=96, film_size=64, step_limit=75),
    PointArmConfig("point_arm", ("reach-red", "reach-blue"), image_size=32, step_limit=30),
]
OPEN, CLOSE, DRAWER, BUTTON = TASKS


def make(*tasks: str, image_size: int = 96) -> MetaWorld:
    return MetaWorld(tasks, image_size=image_size, film_size=64, step_limit=75)


@pytest.fixture(scope="module")
def robot() -> Iterator[MetaWorld]:
    robot = make(*TASKS)
    yield robot
    robot.close()


def front(robot: MetaWorld) -> np.ndarray:
    return robot.observe().images["front"]


def move(robot: MetaWorld, action: tuple[float, ...], steps: int) -> None:
    for _ in range(steps):
        robot.command(np.array(action))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_a_registered_robot_keeps_the_contract(config: SceneConfig) -> None:
    assert {c.kind for c in CONFIGS} == set(ROBOTS), "a registered robot without a configuration here is untested"
    stamps = iter(range(100))
    robot = make_robot(config, clock=lambda: float(next(stamps)))
    try:
        assert isinstance(robot, SimulatedRobot)
        assert robot.tasks == config.tasks
        assert robot.step_limit == config.step_limit
        assert robot.state_spec.rate_hz == robot.action_spec.rate_hz
        instruction = robot.reset(config.tasks[0], 0)
        observation = robot.observe()
        assert observation.stamp_s == 0.0
        assert robot.observe().stamp_s == 1.0, "stamps come from the clock that was given"
        assert observation.instruction == instruction != ""
        assert tuple(observation.images) == robot.cameras
        assert all(i.shape == (config.image_size,) * 2 + (3,) for i in observation.images.values())
        assert all(i.flags.c_contiguous for i in observation.images.values())
        assert observation.state.shape == (robot.state_spec.dim,)
        assert observation.state.dtype == np.float32
        assert (robot.state_spec.clip(observation.state) == observation.state).all()
        film = robot.render()
        assert (film.ndim, film.shape[2], film.dtype) == (3, 3, np.uint8)
        assert not robot.success()
        before = observation.state.copy()
        sent = robot.command(np.full(robot.action_spec.dim, 0.5))
        assert sent.dtype == np.float32
        assert (robot.observe().state != before).any()
        robot.hold()
        assert (observation.state == before).all(), "an observation does not change when the robot moves"
        with pytest.raises(TandemError, match="finite"):
            robot.command(np.full(robot.action_spec.dim, np.nan))
        with pytest.raises(TandemError, match="finite"):
            robot.command(np.zeros(robot.action_spec.dim + 1))
        with pytest.raises(UsageError, match="Valid"):
            robot.reset("no-such-task", 0)
    finally:
        robot.close()
        robot.close()


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'drawer-close-v3'"):
        make("drawer-closed-v3")


def test_nothing_works_before_the_first_reset() -> None:
    with pytest.raises(TandemError, match="reset"):
        make(DRAWER).observe()


def test_pictures_survive_another_environment(robot: MetaWorld) -> None:
    robot.reset(DRAWER, 0)
    before = front(robot)
    other = make(BUTTON)
    other.reset(BUTTON, 0)
    front(other)
    try:
        assert (front(robot) == before).all()

        # The trap itself, so that the line above is known to catch it: without its own context made
        # current, a renderer draws with the meshes and textures of whichever was used last.
        front(other)
        renderer = robot._renderers[DRAWER, "policy"]
        context, renderer._gl = renderer._gl, SimpleNamespace(make_current=lambda: None)
        try:
            wrong = np.abs(front(robot).astype(int) - before).mean()
        finally:
            renderer._gl = context
        assert wrong > 10
        front(robot)  # its context is current now
    finally:
        other.close()
    assert (front(robot) == before).all(), "closing one robot leaves the other's pictures alone"


def test_a_seed_is_a_scene(robot: MetaWorld) -> None:
    def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
        robot.reset(DRAWER, seed)
        return robot.privileged, front(robot)

    obs, picture = scene(7)
    move(robot, (1, 1, -1, 1), 5)  # an episode abandoned half-way
    robot.reset(BUTTON, 7)
    other_obs, other_picture = scene(8)
    assert (other_obs != obs).any()
    assert (other_picture != picture).any()
    again_obs, again_picture = scene(7)
    assert (again_obs == obs).all()
    assert (again_picture == picture).all()
    fresh = make(DRAWER)
    fresh.reset(DRAWER, 7)
    try:
        assert (fresh.privileged == obs).all()
        assert (front(fresh) == picture).all()
    finally:
        fresh.close()


@pytest.mark.parametrize("task", TASKS)
def test_the_first_observation_is_of_the_present_scene(robot: MetaWorld, task: str) -> None:
    # Meta-World leaves the object of the draw before in its first observation and picture.
    for seed in (3, 4):
        robot.reset(task, seed)
        first = robot.privileged[4:7]
        robot.hold()
        assert np.abs(robot.privileged[4:7] - first).max() < 5e-3


@pytest.mark.parametrize("seed", range(3))
def test_only_the_instruction_tells_the_faucets_apart(robot: MetaWorld, seed: int) -> None:
    told, pictures, states = [], [], []
    for task in (OPEN, CLOSE):
        told.append(robot.reset(task, seed))
        pictures.append([front(robot)])
        move(robot, (0.2, 0.4, -0.4, 0), 5)  # goal markers move only once the simulation runs
        pictures[-1].append(front(robot))
        states.append(robot.observe().state)
    assert told[0] != told[1]
    assert np.array_equal(*pictures)
    assert np.array_equal(*states)
    assert (pictures[0][0] != pictures[0][1]).any()


def test_pictures_are_upright_and_not_mirrored(robot: MetaWorld) -> None:
    def finger() -> np.ndarray:
        r, g, b = front(robot).astype(int).transpose(2, 0, 1)
        cyan = (r < 80) & (g > 150) & (b > 150)
        assert cyan.sum() > 10
        return np.argwhere(cyan).mean(0)  # (row, column)

    def displacement(action: tuple[float, ...]) -> np.ndarray:
        robot.reset(OPEN, 0)
        start = finger()
        move(robot, action, 10)
        return finger() - start

    assert displacement((0, 0, 1, -1))[0] < -5, "up is up"
    # The camera stands at +x and looks along -x and +y: both +x and +y are to the right.
    assert displacement((1, 0, 0, -1))[1] > 5
    assert displacement((-1, 0, 0, -1))[1] < -5


def test_the_camera_stands_where_the_docstring_says(robot: MetaWorld) -> None:
    robot.reset(OPEN, 0)
    model = robot._envs[OPEN].model
    assert model.camera("corner2").pos.tolist() == pytest.approx([0.75, 0.075, 0.7])
    assert model.camera("corner2").fovy.tolist() == [40]
    small = make(OPEN, image_size=32)
    small.reset(OPEN, 0)
    try:
        assert front(small).shape == (32, 32, 3)
        shrunk = front(robot).reshape(32, 3, 32, 3, 3).mean((1, 3))
        assert np.abs(shrunk - front(small)).mean() < 15, "the same view at another size"
    finally:
        small.close()


def test_rate_is_what_the_simulator_runs_at(robot: MetaWorld) -> None:
    robot.reset(DRAWER, 0)
    data = robot._envs[DRAWER].data
    before = data.time
    robot.command(np.zeros(4))
    assert data.time - before == pytest.approx(1 / ACTION_SPEC.rate_hz)


def test_actions_are_clipped_and_what_was_sent_is_told(robot: MetaWorld) -> None:
    def after(action: tuple[float, ...]) -> tuple[list[float], np.ndarray]:
        robot.reset(DRAWER, 0)
        sent = robot.command(np.array(action)).tolist()
        move(robot, action, 3)
        return sent, robot.privileged

    sent, far = after((7.0, -7.0, 0.5, -3.0))
    assert sent == [1.0, -1.0, 0.5, -1.0]
    assert (after((1.0, -1.0, 0.5, -1.0))[1] == far).all()


def test_one_control_step_moves_the_target_by_two_centimetres(robot: MetaWorld) -> None:
    robot.reset(DRAWER, 0)
    data = robot._envs[DRAWER].data
    before = data.mocap_pos[0].copy()
    robot.command(np.array([1, 0, 0, 0]))
    assert data.mocap_pos[0] - before == pytest.approx([0.02, 0, 0])


def test_holding_stays_and_keeps_the_grip(robot: MetaWorld) -> None:
    robot.reset(BUTTON, 0)
    move(robot, (0, 0, 0, 1), 15)
    closed = robot.observe().state
    for _ in range(10):
        robot.hold()
    held = robot.observe().state
    assert np.abs(held - closed)[:3].max() < 0.005
    assert held[3] == pytest.approx(closed[3], abs=0.02)
    move(robot, (0, 0, 0, -1), 15)
    assert robot.observe().state[3] > held[3] + 0.2, "the gripper would have opened"


class Flicker:
    """Solved for one simulator step only."""

    def __init__(self, at: int) -> None:
        self.at, self.steps = at, 0

    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        self.steps += 1
        return np.zeros(39), 0.0, False, False, {"success": float(self.steps == self.at)}


@pytest.mark.parametrize("at", range(1, 2 * ACTION_REPEAT + 1))
def test_success_is_latched_at_every_simulator_step(at: int) -> None:
    robot = make(DRAWER)
    robot.reset(DRAWER, 0)
    robot._envs[DRAWER] = Flicker(at)
    seen = []
    for _ in range(4):
        robot.command(np.zeros(4))
        seen.append(robot.success())
    first = (at - 1) // ACTION_REPEAT
    assert seen == [False] * first + [True] * (4 - first)


def test_reset_forgets_success(robot: MetaWorld) -> None:
    assert solve(robot, DRAWER, 0, noise=0.0)
    robot.reset(DRAWER, 0)
    assert not robot.success()


def solve(robot: MetaWorld, task: str, seed: int, noise: float) -> bool:
    robot.reset(task, seed)
    expert = Expert(robot, noise)
    rng = np.random.default_rng(seed)
    for _ in range(robot.step_limit):
        robot.command(expert.action(rng)[0])
        if robot.success():
            return True
    return False


@pytest.mark.parametrize("noise", [0.0, 0.25])
@pytest.mark.parametrize("task", TASKS)
def test_experts_solve_the_default_tasks(robot: MetaWorld, task: str, noise: float) -> None:
    assert sum(solve(robot, task, seed, noise) for seed in range(5)) >= 4


def test_labels_are_clean_and_pushes_are_coloured(robot: MetaWorld) -> None:
    pushes = []
    for seed in range(6):
        robot.reset(BUTTON, seed)
        expert, rng = Expert(robot, 0.2), np.random.default_rng(seed)
        for _ in range(12):
            executed, label = expert.action(rng)
            assert (label == expert.clean()).all()
            assert (np.abs(executed) <= 1).all()
            assert executed[3] == label[3], "the gripper is never pushed"
            pushes.append(expert._push.copy())
            robot.command(executed)
    noise = np.array(pushes).reshape(6, 12, 3)
    assert 0.1 < noise.std() < 0.3
    assert (noise[:, 1:] * noise[:, :-1]).mean() > 0.5 * noise.var(), "each push resembles the one before"


def test_pushes_end_with_the_approach(robot: MetaWorld) -> None:
    robot.reset(DRAWER, 0)
    expert, rng = Expert(robot, 0.25), np.random.default_rng(0)
    start = robot.privileged[4:7]
    pushed = {False: 0, True: 0}
    for _ in range(60):
        moved = bool(np.linalg.norm(robot.privileged[4:7] - start) > 0.01)
        executed, label = expert.action(rng)
        pushed[moved] += int((executed != label).any())
        robot.command(executed)
    assert pushed[False] > 5
    assert pushed[True] == 0


def test_more_noise_than_experts_can_bear_is_refused(robot: MetaWorld) -> None:
    with pytest.raises(UsageError, match=r"0\.25"):
        Expert(robot, 0.4)


def test_the_expert_is_a_policy(robot: MetaWorld) -> None:
    policy = make_expert(CONFIGS[0], robot)
    assert (policy.action_spec, policy.state_spec, policy.cameras) == (ACTION_SPEC, STATE_SPEC, robot.cameras)
    robot.reset(CLOSE, 3)
    policy.reset(0)
    for _ in range(robot.step_limit):
        chunk = policy.infer(robot.observe())
        assert chunk.actions.shape == (1, 4)
        robot.command(chunk.actions[0])
    assert robot.success()


def test_other_tasks_get_their_name_as_instruction() -> None:
    assert describe("peg-insert-side-v3").instruction == "peg insert side"
    assert len({describe(name).instruction for name in TASKS}) == len(TASKS)


@pytest.mark.parametrize("task", ["reach-v3", "pick-place-v3"])
def test_experts_that_need_the_goal_see_it(task: str) -> None:
    robot = make(task)
    assert sum(solve(robot, task, seed, noise=0.0) for seed in range(3)) >= 2


@pytest.mark.slow
def test_every_task_of_meta_world_can_be_set_up_and_moved() -> None:
    names = list(make(DRAWER)._environments)
    assert len(names) == 50
    for name in names:
        robot = make(name)
        robot.reset(name, 1)
        command = Expert(robot, 0.25).action(np.random.default_rng(0))[0]
        assert (robot.command(command) == command).all(), name


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


MAKE = "from robot.sims.metaworld import MetaWorld as M; r = M(['drawer-close-v3'], image_size=32, film_size=32, "
MAKE += "step_limit=9); r.reset('drawer-close-v3', 0); r.observe(); r.render()"


@pytest.mark.parametrize("missing", ["metaworld", "mujoco"])
def test_a_missing_simulator_is_named(missing: str) -> None:
    done = python(f"import sys; sys.modules['{missing}'] = None; {MAKE}")
    assert "MissingDependency" in done.stderr
    assert "pip install 'tandem-vla[metaworld]'" in done.stderr


def test_a_missing_display_library_is_named() -> None:
    done = python(MAKE, MUJOCO_GL="egl", MUJOCO_EGL_DEVICE_ID="99")
    assert "MissingDependency" in done.stderr
    assert "apt-get install --no-install-recommends libegl1 libegl-mesa0 libgl1-mesa-dri" in done.stderr


def test_it_draws_whoever_imported_mujoco_first() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import mujoco; {MAKE}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_leaving_without_closing_is_quiet() -> None:
    done = python(f"{MAKE}; s = r; {MAKE}; del r")
    assert (done.returncode, done.stderr) == (0, "")
