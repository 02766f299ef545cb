"""Meta-World's scripted policies as demonstrators, and as a policy for comparison.

They read the simulator's own state (object and goal positions), which no camera policy sees, and they
are re-queried at every control step: what they answer is right wherever noise has pushed the hand.
"""

import warnings
from typing import Any

import numpy as np

from robot.sims.metaworld import ACTION_SPEC, CAMERA, STATE_SPEC, MetaWorld, metaworld
from vla.errors import UsageError
from vla.types import ActionChunk, ActionSpec, Observation

NOISE_CORRELATION = 0.9  # of one control step (1/40 s) with the next: pushes last about a quarter second
APPROACH_M = 0.01  # the approach ends when the object has moved this far from where it stood
MAX_NOISE = 0.25  # at 0.4 the experts of push and pick-place miss half of their episodes


class Expert:
    """The scripted policy of whatever task `robot` is set up for, clean or with pushes.

    `noise` is the standard deviation of the pushes in units of the action, 0..0.25. They are coloured
    (AR(1), `NOISE_CORRELATION`), so that the hand really leaves the ideal path instead of trembling on
    it, and act on the approach only: noise while the object moves makes failures, not better data.
    """

    def __init__(self, robot: MetaWorld, noise: float) -> None:
        if not 0 <= noise <= MAX_NOISE:
            raise UsageError(f"Noise of the scripted expert must be 0..{MAX_NOISE}, got {noise}.")
        self._robot, self._noise = robot, noise
        self._policies: dict[str, Any] = {}
        self.reset()

    def reset(self) -> None:
        """Begin an episode: forget the last push and where the object stood."""
        self._push = np.zeros(3)
        self._pushed = False
        self._start_m: np.ndarray | None = None

    def clean(self) -> np.ndarray:
        """(4,) float32, the script's action for the robot's present state, inside [-1, 1]."""
        task = self._robot.task
        if task not in self._policies:
            self._policies[task] = metaworld().policies.ENV_POLICY_MAP[task]()
        with warnings.catch_warnings():
            # "Constant(s) may be too high": answers reach 19 and are clipped here.
            warnings.simplefilter("ignore", UserWarning)
            action = self._policies[task].get_action(self._robot.privileged)
        return ACTION_SPEC.clip(np.asarray(action, np.float32))

    def action(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(executed, label), each (4,) float32 in [-1, 1].

        The label is what the expert would do here; what is executed is that plus the push.
        """
        label = self.clean()
        object_m = self._robot.privileged[4:7]
        if self._start_m is None:
            self._start_m = object_m
        if self._noise == 0 or np.linalg.norm(object_m - self._start_m) > APPROACH_M:
            return label, label
        fresh = rng.normal(scale=self._noise, size=3)
        a = NOISE_CORRELATION
        # Stationary from the first step on: every push has standard deviation `noise`.
        self._push = a * self._push + np.sqrt(1 - a * a) * fresh if self._pushed else fresh
        self._pushed = True
        pushed = label + np.append(self._push, 0).astype(np.float32)
        return ACTION_SPEC.clip(pushed), label


class ExpertPolicy:
    """`vla.types.Policy`: answers every observation with the script's next action, one step long.

    It looks at the simulator rather than at the observation, so it works only on the robot it is given.
    """

    def __init__(self, robot: MetaWorld) -> None:
        self._expert = Expert(robot, noise=0.0)

    @property
    def action_spec(self) -> ActionSpec:
        return ACTION_SPEC

    @property
    def state_spec(self) -> ActionSpec:
        return STATE_SPEC

    @property
    def cameras(self) -> tuple[str, ...]:
        return (CAMERA,)

    def reset(self, seed: int) -> None:
        del seed  # nothing is drawn
        self._expert.reset()

    def infer(self, observation: Observation) -> ActionChunk:
        return ActionChunk(
            stamp_s=observation.stamp_s,
            period_s=1 / ACTION_SPEC.rate_hz,
            actions=self._expert.clean()[None],
            execute=1,
        )
