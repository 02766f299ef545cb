"""What the runtime needs of an arm, simulated or real. numpy only; parses on Python 3.10."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from vla.types import ActionSpec, Observation


@runtime_checkable
class Robot(Protocol):
    """An arm with cameras. `command` moves it for one control step; nothing else does."""

    @property
    def action_spec(self) -> ActionSpec: ...

    @property
    def state_spec(self) -> ActionSpec: ...

    @property
    def cameras(self) -> tuple[str, ...]: ...

    def observe(self) -> Observation:
        """The newest state and pictures. In a simulator this renders, which is the expensive part."""
        ...

    def command(self, action: np.ndarray) -> np.ndarray:
        """Send one action (A,) float32 in the units of `action_spec`; return what was really sent."""
        ...

    def hold(self) -> None:
        """Stay where it is. Never implemented as sending zeros to an absolute interface."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class SimulatedRobot(Robot, Protocol):
    """A robot with a task that can be set up again and judged."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names that `reset` accepts."""
        ...

    @property
    def step_limit(self) -> int:
        """Control steps an episode may take."""
        ...

    def reset(self, task: str, seed: int) -> str:
        """Set `task` up from `seed` (same seed: bit-identical) and return its instruction."""
        ...

    def success(self) -> bool:
        """Whether the task was solved at any step since `reset` (latched)."""
        ...

    def render(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB for films; not a policy camera and free to be prettier."""
        ...


@runtime_checkable
class FeelingRobot(Protocol):
    """A robot that feels contact: by force, by touch, or because it is simulated."""

    def contact(self) -> bool:
        """Whether the hand touches something that is not its own, now."""
        ...


@runtime_checkable
class InstructedRobot(Protocol):
    """A robot that may be told something else in the middle of an episode."""

    @property
    def instruction(self) -> str:
        """What it is told now; its observations carry the same."""
        ...


@runtime_checkable
class SharedScene(SimulatedRobot, Protocol):
    """A simulated robot that can go on with another task in the scene of the present one."""

    def switch(self, task: str) -> str:
        """Judge `task` from now on, everything staying where it is; return its instruction."""
        ...
