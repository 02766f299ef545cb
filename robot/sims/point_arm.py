"""A point that must reach the square it is told to: a robot small enough for tests. numpy only.

Everything a large simulator has, in microseconds and without a graphics library: a camera, a state, a
displacement action with limits, tasks told apart by the instruction alone (the same seed gives the same
picture for both), latched success. `PointExpert` solves it from the picture and the words, so that
a wrong instruction must make it fail.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from vla.errors import TandemError, UsageError, choose_from
from vla.types import ActionChunk, ActionSpec, Observation

RATE_HZ = 10.0
STEP_M = 0.1  # an action of 1 moves the point by this much in one control step
REACHED_M = 0.1  # distance at which a square counts as reached
SQUARE_M = 0.08  # half the side of a square
CAMERA = "top"
COLOURS = {"reach-red": (220, 40, 40), "reach-blue": (40, 80, 220)}  # task -> RGB of its square
INSTRUCTIONS = {"reach-red": "go to the red square", "reach-blue": "go to the blue square"}
POINT, FLOOR = (240, 240, 240), (30, 30, 30)  # RGB

STATE_SPEC = ActionSpec(
    names=("point.x", "point.y"),
    units=("m", "m"),
    reference=("absolute", "absolute"),
    low=(-1.0, -1.0),
    high=(1.0, 1.0),
    rate_hz=RATE_HZ,
)
ACTION_SPEC = ActionSpec(
    names=("point.dx", "point.dy"),
    units=("10 cm", "10 cm"),
    reference=("delta", "delta"),
    low=(-1.0, -1.0),
    high=(1.0, 1.0),
    rate_hz=RATE_HZ,
)


class PointArm:
    """`robot.robot.SimulatedRobot`: a point in the square [-1, 1]² m, and two coloured squares.

    Args:
        tasks: any of "reach-red", "reach-blue".
        image_size: height and width of the camera's pictures, pixels.
        step_limit: control steps an episode may take (the expert needs 5 to 20).
        clock: seconds, stamps the observations.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        image_size: int,
        step_limit: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name in tasks:
            if name not in COLOURS:
                raise UsageError(f"The point arm has no task {name!r}.{choose_from(name, COLOURS)}")
        if not tasks or image_size < 16 or step_limit < 1:
            raise UsageError(
                "The point arm needs at least one task, image_size >= 16 and step_limit >= 1, got "
                f"{tuple(tasks)}, {image_size}, {step_limit}."
            )
        self._tasks, self._size, self._step_limit, self._clock = tuple(tasks), image_size, step_limit, clock
        self._task = self._tasks[0]
        self._point = np.zeros(2)  # (2,) m
        self._squares = {name: np.zeros(2) for name in COLOURS}  # centres, (2,) m
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

    def reset(self, task: str, seed: int) -> str:
        if task not in self._tasks:
            raise UsageError(f"This robot was not set up for task {task!r}.{choose_from(task, self._tasks)}")
        rng = np.random.default_rng(seed)
        while True:  # until nothing overlaps; one draw in three will do
            places = rng.uniform(-0.85, 0.85, (3, 2))
            gaps = np.linalg.norm(places - np.roll(places, 1, axis=0), axis=1)
            if gaps.min() > 0.5:
                break
        self._point, *squares = places
        self._squares = dict(zip(COLOURS, squares, strict=True))
        self._task, self._success = task, False
        return INSTRUCTIONS[task]

    def observe(self) -> Observation:
        return Observation(
            stamp_s=self._clock(),
            images={CAMERA: self.render()},
            state=self._point.astype(np.float32),
            instruction=INSTRUCTIONS[self._task],
        )

    def render(self) -> np.ndarray:
        picture = np.full((self._size, self._size, 3), FLOOR, np.uint8)
        for name, centre in self._squares.items():
            self._fill(picture, centre, SQUARE_M, COLOURS[name])
        self._fill(picture, self._point, 0.04, POINT)
        return picture

    def _fill(self, picture: np.ndarray, centre: np.ndarray, half_m: float, colour: tuple[int, ...]) -> None:
        (left, bottom), (right, top) = _pixel(centre - half_m, self._size), _pixel(centre + half_m, self._size)
        picture[max(top, 0) : bottom + 1, max(left, 0) : right + 1] = colour

    def command(self, action: np.ndarray) -> np.ndarray:
        """Move by `action` (2,) for one control step; returns it clipped to [-1, 1], float32.

        Raises:
            TandemError: wrong shape, or a number that is not finite.
        """
        action = np.asarray(action, np.float32)
        if action.shape != (2,) or not np.isfinite(action).all():
            raise TandemError(f"The point arm takes two finite numbers {ACTION_SPEC.names}, got {action}.")
        sent = ACTION_SPEC.clip(action)
        self._point = STATE_SPEC.clip(self._point + STEP_M * sent.astype(np.float64))
        distance = np.linalg.norm(self._point - self._squares[self._task])
        self._success = self._success or bool(distance < REACHED_M)
        return sent

    def switch(self, task: str) -> str:
        if task not in self._tasks:
            raise UsageError(f"This robot was not set up for task {task!r}.{choose_from(task, self._tasks)}")
        self._task, self._success = task, False
        return INSTRUCTIONS[task]

    def contact(self) -> bool:
        """Whether the point is inside a square."""
        return any(np.abs(self._point - centre).max() < SQUARE_M for centre in self._squares.values())

    def hold(self) -> None:
        """Nothing moves the point but `command`."""

    def success(self) -> bool:
        return self._success

    def close(self) -> None:
        """Nothing is held open."""


def _pixel(place: np.ndarray, size: int) -> np.ndarray:
    """(column, row) of a place (2,) m; y points up, as on paper."""
    return np.array([np.rint((place[0] + 1) / 2 * (size - 1)), np.rint((1 - place[1]) / 2 * (size - 1))], int)


class PointExpert:
    """`vla.types.Policy`: looks for the colour that the instruction names, and goes there straight."""

    CHUNK, EXECUTE = 8, 4

    action_spec = ACTION_SPEC
    state_spec = STATE_SPEC
    cameras: tuple[str, ...] = (CAMERA,)

    def __init__(self, robot: PointArm) -> None:
        del robot  # an expert may look inside its robot; this one does well with the camera

    def reset(self, seed: int) -> None:
        """Nothing is drawn, and nothing is remembered."""

    def infer(self, observation: Observation) -> ActionChunk:
        name = "reach-red" if "red" in observation.instruction.split() else "reach-blue"
        picture = observation.images[CAMERA]
        rows, columns = np.nonzero((picture == COLOURS[name]).all(-1))
        here = observation.state.astype(np.float64)
        way = np.zeros(2)
        if len(rows):  # else the point covers the square: it is there
            side = picture.shape[0] - 1
            way = np.array([columns.mean() / side * 2 - 1, 1 - rows.mean() / side * 2]) - here
        steps_taken = np.arange(self.CHUNK)[:, None]
        total = max(np.abs(way).max() / STEP_M, 1e-9)  # steps at full speed along the longer axis
        share = np.clip(total - steps_taken, 0, 1) / total  # of the way, for each step
        actions = (share * way / STEP_M).astype(np.float32)
        return ActionChunk(observation.stamp_s, 1 / RATE_HZ, actions, self.EXECUTE)


class PointDemonstrator:
    """The expert one step at a time, with white noise of standard deviation `noise` on what is executed."""

    def __init__(self, robot: PointArm, noise: float) -> None:
        if not 0 <= noise <= 1:
            raise UsageError(f"Noise of the point arm's demonstrator must be 0..1, got {noise}.")
        self._robot, self._noise, self._expert = robot, noise, PointExpert(robot)

    def reset(self) -> None:
        """Nothing is remembered."""

    def action(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(executed, label), each (2,) float32 in [-1, 1]."""
        label = ACTION_SPEC.clip(self._expert.infer(self._robot.observe()).actions[0])
        return ACTION_SPEC.clip(label + rng.normal(scale=self._noise, size=2).astype(np.float32)), label
