"""Meta-World 3.1 (a simulated Sawyer arm with 50 manipulation tasks) as a robot.

A thin environment around Meta-World's own classes. What it adds, and why:

* pictures at the size and quality asked for (5 to 7 CPU-ms instead of 90, see `offscreen`);
* real seeds: Meta-World's `reset(seed=...)` ignores its argument;
* success is latched at every simulator step: Meta-World's flag is per step and may fall again;
* an action is repeated for two simulator steps of 1/80 s, so that one control step is 1/40 s;
* goal markers can be hidden, and the faucet pair starts from the same places (see `TASKS`).

Camera `front` is Meta-World's `corner2`, moved to (0.75, 0.075, 0.7) m as LeRobot does, with a
vertical field of view of 40 degrees (60 in the model; at 96 px objects would be a few pixels wide).
It is mounted upside down; pictures are returned upright.
"""

import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robot.sims import metaworld_scene
from robot.sims.offscreen import Look, Renderer, load_mujoco
from vla.errors import MissingDependency, TandemError, UsageError, choose_from
from vla.types import ActionSpec, Observation

ACTION_REPEAT = 2
RATE_HZ = 40.0  # 1 / (ACTION_REPEAT * 0.0125 s); the constructor of an environment checks it
CAMERA = "front"
_CAMERA_IN_MODEL, _CAMERA_POSITION_M, _CAMERA_FOV_DEG = "corner2", (0.75, 0.075, 0.7), 40.0

STATE_SPEC = ActionSpec(
    names=("hand.x", "hand.y", "hand.z", "gripper.opening"),
    units=("m", "m", "m", "1"),  # the opening is a share of 0.1 m
    reference=("absolute",) * 4,
    low=(-0.525, 0.348, -0.0525, 0.0),
    high=(0.525, 1.025, 0.7, 1.0),
    rate_hz=RATE_HZ,
    gripper="open_high",
)
ACTION_SPEC = ActionSpec(
    names=("hand.dx", "hand.dy", "hand.dz", "gripper.effort"),
    units=("2 cm", "2 cm", "2 cm", "1"),  # +1 moves the hand's target by 2 cm per control step
    reference=("delta", "delta", "delta", "absolute"),
    low=(-1.0,) * 4,
    high=(1.0,) * 4,
    rate_hz=RATE_HZ,
    gripper="close_high",
)


@dataclass(frozen=True)
class Task:
    instruction: str
    hidden_sites: tuple[str, ...] = ()  # markers of the model that are made transparent
    start_low_m: tuple[float, float, float] | None = None  # None: Meta-World's own range of starts
    start_high_m: tuple[float, float, float] | None = None


# The faucet pair shares its model and its start pose. Without goal markers and with faucet-open's
# range of starts for both (Meta-World lets faucet-close start up to 5 cm further to either side), the
# same seed gives the same picture bit for bit: only the instruction says which way to turn.
_FAUCET: dict[str, Any] = {
    "hidden_sites": ("goal_open", "goal_close"),
    "start_low_m": (-0.05, 0.8, 0.0),
    "start_high_m": (0.05, 0.85, 0.0),
}
TASKS = {
    "faucet-open-v3": Task("open the faucet", **_FAUCET),
    "faucet-close-v3": Task("close the faucet", **_FAUCET),
    "drawer-close-v3": Task("close the drawer"),
    "button-press-topdown-v3": Task("press the button from above"),
}


def describe(name: str) -> Task:
    """The table's entry, or for the other tasks of Meta-World the name in words."""
    return TASKS.get(name) or Task(name.removesuffix("-v3").replace("-", " "))


def metaworld() -> types.ModuleType:
    """Import `metaworld`, its environments and its scripted policies.

    Raises:
        MissingDependency: the package, or the system library it draws with, is not installed.
    """
    load_mujoco()
    try:
        import metaworld.env_dict
        import metaworld.policies
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"{error}. The Meta-World simulator is an extra: pip install 'tandem-vla[metaworld]'."
        ) from error
    return metaworld


class MetaWorld:
    """`robot.robot.SimulatedRobot` over Meta-World.

    One environment per task is made when it is first reset, and kept. State: hand position (m) and
    gripper opening (0..1). Action: hand displacement and gripper effort, clipped to [-1, 1], see
    `STATE_SPEC` and `ACTION_SPEC`. Use it from one thread: GL contexts belong to one.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        image_size: int,
        film_size: int,
        step_limit: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            tasks: Meta-World names such as "drawer-close-v3".
            image_size: height and width of the policy camera's pictures, pixels.
            film_size: the same of `render`.
            step_limit: control steps an episode may take (scripted experts need 20 to 45).
            clock: seconds, stamps the observations.

        Raises:
            UsageError: a task that Meta-World does not have.
            MissingDependency: Meta-World is not installed.
        """
        self._mujoco = load_mujoco()
        self._environments = metaworld().env_dict.ALL_V3_ENVIRONMENTS
        if not tasks:
            raise UsageError(f"Meta-World needs at least one task.{choose_from('', self._environments)}")
        for name in tasks:
            if name not in self._environments:
                raise UsageError(f"Meta-World has no task {name!r}.{choose_from(name, self._environments)}")
        for what, number in (("image_size", image_size), ("film_size", film_size), ("step_limit", step_limit)):
            if number < 1:
                raise UsageError(f"Meta-World's {what} must be at least 1, got {number}.")
        self._tasks, self._step_limit, self._clock = tuple(tasks), step_limit, clock
        self._sizes: dict[Look, int] = {"policy": image_size, "film": film_size}
        self._envs: dict[str, Any] = {}
        self._renderers: dict[tuple[str, Look], Renderer] = {}
        self._task: str | None = None
        self._seed = 0
        self._obs = np.zeros(39)  # Meta-World's observation; hand and gripper first, the goal last
        self._gripper = -1.0  # last effort sent
        self._success = False

    @property
    def action_spec(self) -> ActionSpec:
        return ACTION_SPEC

    @property
    def state_spec(self) -> ActionSpec:
        return STATE_SPEC

    @property
    def cameras(self) -> tuple[str, ...]:
        return (CAMERA,)

    @property
    def tasks(self) -> tuple[str, ...]:
        return self._tasks

    @property
    def step_limit(self) -> int:
        return self._step_limit

    @property
    def task(self) -> str:
        """Name of the task set up last."""
        if self._task is None:
            raise TandemError("Meta-World has no task set up yet: call reset(task, seed) first.")
        return self._task

    @property
    def privileged(self) -> np.ndarray:
        """(39,) float64, Meta-World's whole observation (m): what a scripted expert may see.

        0:3 hand, 3 gripper opening, 4:7 object, 7:11 its orientation, 11:18 a second object,
        18:36 the same one simulator step earlier, 36:39 the goal.
        """
        return self._obs.copy()

    def reset(self, task: str, seed: int) -> str:
        self._seed = seed
        self._begin(task, self._set_up(task))
        self._gripper = -1.0
        return describe(task).instruction

    def switch(self, task: str) -> str:
        """Go on with `task` in the present scene, which both tasks must set up alike from one seed.

        Raises:
            TandemError: they do not.
        """
        now, then = self._envs[self.task], self._set_up(task)
        if not metaworld_scene.same_scene(now, then):
            raise TandemError(f"{self.task} and {task} share no scene: one cannot follow in the middle of the other.")
        metaworld_scene.copy_state(self._mujoco, now, then)
        self._begin(task, then)
        return describe(task).instruction

    def contact(self) -> bool:
        return metaworld_scene.touching(self._envs[self.task])

    def _set_up(self, task: str) -> Any:
        """The environment of `task`, reset."""
        if task not in self._tasks:
            raise UsageError(f"This robot was not set up for task {task!r}.{choose_from(task, self._tasks)}")
        if task not in self._envs:
            self._envs[task] = self._make(task)
        env = self._envs[task]
        env.seed(self._seed)
        env.reset()
        return env

    def _begin(self, task: str, env: Any) -> None:
        """Let `env` be the present one, as it stands."""
        # Some tasks move the object last and compute nothing after: the picture and the object's
        # position would be those of the draw before.
        self._mujoco.mj_forward(env.model, env.data)
        env._prev_obs = env._get_curr_obs_combined_no_goal()
        self._obs = env._get_obs()
        self._task, self._success = task, False

    def _make(self, name: str) -> Any:
        env = self._environments[name]()
        assert abs(env.dt * ACTION_REPEAT * RATE_HZ - 1) < 1e-9, env.dt
        env._set_task_called = True
        env._freeze_rand_vec, env.seeded_rand_vec = False, True
        env.max_path_length = 2**31  # the caller ends episodes; Meta-World would raise after 500 steps
        env._partially_observable = False  # experts of some tasks need the goal; policies never see it
        env.__dict__.pop("sawyer_observation_space", None)  # cached, and says that the goal is zero
        task = describe(name)
        if task.start_low_m is not None:
            box = type(env._random_reset_space)
            env._random_reset_space = box(np.array(task.start_low_m), np.array(task.start_high_m), dtype=np.float64)
        for site in task.hidden_sites:
            env.model.site(site).rgba[3] = 0.0
        camera = env.model.camera(_CAMERA_IN_MODEL)
        camera.pos[:], camera.fovy[:] = _CAMERA_POSITION_M, _CAMERA_FOV_DEG
        return env

    def observe(self) -> Observation:
        stamp_s = self._clock()
        return Observation(
            stamp_s=stamp_s,
            images={CAMERA: self._picture("policy")},
            state=self._obs[:4].astype(np.float32),
            instruction=describe(self.task).instruction,
        )

    def render(self) -> np.ndarray:
        return self._picture("film")

    def _picture(self, look: Look) -> np.ndarray:
        key = (self.task, look)
        env = self._envs[self.task]
        if key not in self._renderers:
            self._renderers[key] = Renderer(env.model, _CAMERA_IN_MODEL, self._sizes[look], look)
        # Rows are upright as they come, because the camera hangs upside down; columns are mirrored.
        return np.ascontiguousarray(self._renderers[key].render(env.data)[:, ::-1])

    def command(self, action: np.ndarray) -> np.ndarray:
        """Execute `action` (4,) for one control step; returns it clipped to [-1, 1], float32.

        Raises:
            TandemError: wrong shape, or a number that is not finite.
        """
        action = np.asarray(action, np.float32)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise TandemError(f"Meta-World takes four finite numbers {ACTION_SPEC.names}, got {action}.")
        sent = ACTION_SPEC.clip(action)
        env = self._envs[self.task]
        for _ in range(ACTION_REPEAT):
            self._obs, _, _, _, info = env.step(sent)
            self._success = self._success or bool(info["success"])
        self._gripper = float(sent[3])
        return sent

    def hold(self) -> None:
        """Let one control step pass with the hand's target where it is and the gripper's last effort.

        The interface is a displacement, so that zero is really "stay".
        """
        self.command(np.array([0, 0, 0, self._gripper], np.float32))

    def success(self) -> bool:
        return self._success

    def close(self) -> None:
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        self._envs.clear()
        self._task = None
