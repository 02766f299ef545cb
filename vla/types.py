"""The values that cross a seam. numpy only; parses on Python 3.10.

All arrays are made read-only when they enter one of these: whoever needs to change one copies it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from enum import Enum
from types import MappingProxyType
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np

from vla.errors import SpecMismatch, TandemError, choose_from

Reference = Literal["absolute", "delta"]
Rotation = Literal["none", "axis_angle", "euler_xyz", "quaternion_xyzw", "rot6d"]
Gripper = Literal["none", "open_high", "close_high"]


def frozen(array: np.ndarray) -> np.ndarray:
    """A read-only view of `array`."""
    view = array.view()
    view.flags.writeable = False
    return view


@dataclass(frozen=True)
class ActionSpec:
    """What each number of a state or an action vector means.

    Recipe, checkpoint and robot each carry one; they are compared at every connection
    (`require_same`). Used for state vectors as well as for actions.
    """

    names: tuple[str, ...]  # (dim,), e.g. "shoulder_pan.pos"
    units: tuple[str, ...]  # (dim,), "rad", "m", "m/s", "1" for a dimensionless command
    reference: tuple[Reference, ...]  # (dim,), a target, or a change from the current value
    low: tuple[float, ...]  # (dim,), in `units`
    high: tuple[float, ...]  # (dim,), in `units`
    rate_hz: float  # control steps per second at which one row is one step
    rotation: Rotation = "none"  # form of the rotation dimensions
    gripper: Gripper = "none"  # which end of the gripper dimension's range is which

    def __post_init__(self) -> None:
        if not self.names:
            raise TandemError("ActionSpec needs at least one dimension; names is empty.")
        for name in ("units", "reference", "low", "high"):
            if len(getattr(self, name)) != len(self.names):
                raise TandemError(
                    f"ActionSpec.{name} has {len(getattr(self, name))} entries, but there are "
                    f"{len(self.names)} names: {self.names}."
                )
        if len(set(self.names)) != len(self.names):
            raise TandemError(f"ActionSpec.names must differ from one another, got {self.names}.")
        if not self.rate_hz > 0:
            raise TandemError(f"ActionSpec.rate_hz must be positive, got {self.rate_hz}.")
        for name, value, valid in (
            *(("reference", r, get_args(Reference)) for r in self.reference),
            ("rotation", self.rotation, get_args(Rotation)),
            ("gripper", self.gripper, get_args(Gripper)),
        ):
            if value not in valid:
                raise TandemError(f"ActionSpec.{name} is {value!r}.{choose_from(value, valid)}")
        for name, low, high in zip(self.names, self.low, self.high, strict=True):
            if not low < high:
                raise TandemError(f"ActionSpec limits of {name!r}: low {low} is not below high {high}.")

    @property
    def dim(self) -> int:
        return len(self.names)

    def clip(self, values: np.ndarray) -> np.ndarray:
        """`values` (..., dim) inside [low, high]."""
        return np.clip(values, np.asarray(self.low, values.dtype), np.asarray(self.high, values.dtype))

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ActionSpec:
        known = {f.name for f in fields(cls)}
        required = {f.name for f in fields(cls) if f.default is MISSING}
        if set(data) - known or required - set(data):
            raise TandemError(
                f"ActionSpec: unknown keys {sorted(set(data) - known)}, missing keys {sorted(required - set(data))}; "
                f"valid: {sorted(known)}."
            )
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)


def require_same(given: ActionSpec, expected: ActionSpec, what: str) -> None:
    """Raise `SpecMismatch`, naming every field that differs, unless both are equal.

    `what` names the two sides, e.g. "action of recipe x and of checkpoint y".
    """
    different = [
        f"  {f.name}: {getattr(given, f.name)!r} and {getattr(expected, f.name)!r}"
        for f in fields(ActionSpec)
        if getattr(given, f.name) != getattr(expected, f.name)
    ]
    if different:
        raise SpecMismatch(
            f"The {what} differ:\n" + "\n".join(different) + "\n"
            "Numbers that mean different things are never passed on. Use data, checkpoint and robot "
            "that share one ActionSpec, or correct the side that is described wrongly."
        )


@dataclass(frozen=True)
class Observation:
    """What the robot sees, feels and is told at one moment."""

    stamp_s: float  # monotonic clock, capture time of the oldest part
    images: Mapping[str, np.ndarray]  # camera name -> (H, W, 3) uint8 RGB, upright
    state: np.ndarray  # (S,) float32, units of the state's ActionSpec
    instruction: str
    history: np.ndarray | None = None  # (p, S) float32, the states at the p control steps before, oldest first; the
    # episode's first one repeats. None where nobody asked (`Recalling`)
    executed: np.ndarray | None = None  # (p, A) float32, the commands sent at the p control steps before, oldest first;
    # NaN where there was none: before the episode, or where the arm held. None where nobody asked

    def __post_init__(self) -> None:
        for name, image in self.images.items():
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise TandemError(
                    f"Image of camera {name!r} must be (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}."
                )
        if self.state.ndim != 1:
            raise TandemError(f"State must be a vector (S,), got shape {self.state.shape}.")
        object.__setattr__(self, "images", MappingProxyType({k: frozen(v) for k, v in self.images.items()}))
        object.__setattr__(self, "state", frozen(self.state))
        for name in ("history", "executed"):
            rows = getattr(self, name)
            if rows is None:
                continue
            if rows.ndim != 2:
                raise TandemError(f"Observation.{name} must be rows of vectors, got shape {rows.shape}.")
            object.__setattr__(self, name, frozen(rows))


@dataclass(frozen=True)
class ActionChunk:
    """A plan: one action per control step, counted from the observation it was computed from.

    Row k is meant for time `stamp_s + (k + 1) * period_s` at the latest, that is for the
    k-th control step after the observation.
    """

    stamp_s: float  # monotonic clock, `Observation.stamp_s` it answers
    period_s: float  # one control step
    actions: np.ndarray  # (H, A) float32, physical units of the action's ActionSpec
    execute: int  # how many steps the policy recommends to execute before planning anew, 1..H
    diagnostics: Mapping[str, float] = field(default_factory=dict)  # e.g. "encode_ms", "denoise_ms"

    def __post_init__(self) -> None:
        if self.actions.ndim != 2:
            raise TandemError(f"A chunk's actions must be (H, A), got shape {self.actions.shape}.")
        if not 1 <= self.execute <= len(self.actions):
            raise TandemError(f"execute must be 1..{len(self.actions)} for this chunk, got {self.execute}.")
        object.__setattr__(self, "actions", frozen(self.actions))


@dataclass(frozen=True)
class UnderWay:
    """What of the previous chunk is not executed yet when an observation is taken, in the new chunk's frame."""

    actions: np.ndarray  # (K, A) float32, physical units; row 0 is for the first control step after the observation
    fixed: int  # rows that will be executed whatever the answer is (the inference delay), 0..K

    def __post_init__(self) -> None:
        if self.actions.ndim != 2 or not 0 <= self.fixed <= len(self.actions):
            raise TandemError(
                f"UnderWay needs actions (K, A) and fixed in 0..K, got {self.actions.shape} and {self.fixed}."
            )
        object.__setattr__(self, "actions", frozen(self.actions))


class Decision(Enum):
    """What safety does with a command, from harmless to final."""

    PASS = "pass"
    CLAMP = "clamp"
    HOLD = "hold"
    STOP = "stop"


@dataclass(frozen=True)
class Verdict:
    """Safety's answer to one command."""

    decision: Decision
    command: np.ndarray | None  # (A,) float32, what may be sent; None for HOLD and STOP
    rule: str  # the rule that caused it; "" for PASS


@dataclass(frozen=True)
class Result:
    """One evaluated episode. One line of `results.jsonl`."""

    suite: str
    task: str
    instruction: str
    seed: int
    success: bool
    steps: int  # control steps executed
    first_success_step: int | None
    chunks: int  # how often the policy was asked
    latency_ms: tuple[float, ...]  # (chunks,), wall time of each policy call
    wall_s: float
    policy: str  # checkpoint path or policy name
    config_digest: str  # digest of the evaluation's configuration
    versions: Mapping[str, str]  # package -> version
    video: str | None = None  # path relative to the results' folder
    error: str | None = None  # set when the simulator or the policy failed: such an episode has no verdict

    def to_json(self) -> dict[str, Any]:
        return {"version": 1} | asdict(self)


class Policy(Protocol):
    """Anything that answers an observation with a chunk: a model, a remote server, a scripted expert."""

    @property
    def action_spec(self) -> ActionSpec: ...

    @property
    def state_spec(self) -> ActionSpec: ...

    @property
    def cameras(self) -> tuple[str, ...]:
        """Camera names it wants in `Observation.images`; others are ignored."""
        ...

    def reset(self, seed: int) -> None:
        """Begin an episode. The same seed and the same observations give the same chunks."""
        ...

    def infer(self, observation: Observation) -> ActionChunk: ...


@runtime_checkable
class Watcher(Protocol):
    """A policy that also wants what is seen at the control steps between two of its chunks."""

    def watch(self, observation: Observation) -> None:
        """Called once at each control step at which `infer` is not, in the order of time."""
        ...


@runtime_checkable
class Recalling(Protocol):
    """A policy that also wants what lies before an observation: `Observation.history` and `.executed`."""

    @property
    def history(self) -> int:
        """States at the control steps before; 0: none. With more the runtime looks at every step."""
        ...

    @property
    def past(self) -> int:
        """Commands sent at the control steps before; 0: none."""
        ...
