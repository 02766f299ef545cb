"""Task switching (SwitchVLA): from contact and instructions to how the robot is to behave. Pure, no torch.

A new instruction that comes in the middle of a task cannot be begun at once: a robot that holds something must
first let go of it the way it took it. The phase of contact and the two instructions decide:

    instruction        before contact     in contact    after contact
    first, or same     forward            forward       forward
    another            forward (or        rollback      advance
                       advance)

rollback retraces the previous task, whose instruction stays in effect until contact has ended; advance goes to where
the new task begins. Source: SwitchVLA (arXiv 2506.03574); the three-valued phase is ours, since its summaries disagree
about a switch before the first contact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np

from vla.errors import UsageError
from vla.types import ActionSpec

Phase = Literal["pre", "in", "post"]  # no contact so far in this attempt, contact, contact has ended
Told = Literal["first", "same", "another"]  # the instruction, against the one before it
PHASES: tuple[Phase, ...] = ("pre", "in", "post")  # their place is their number in arrays
FORWARD, ROLLBACK, ADVANCE = 0, 1, 2  # the numbers of `Conditions.mode`
MODES = ("forward", "rollback", "advance")

TABLE: dict[tuple[Told, Phase], int] = {
    ("first", "pre"): FORWARD,
    ("first", "in"): FORWARD,
    ("first", "post"): FORWARD,
    ("same", "pre"): FORWARD,
    ("same", "in"): FORWARD,
    ("same", "post"): FORWARD,
    ("another", "pre"): FORWARD,
    ("another", "in"): ROLLBACK,
    ("another", "post"): ADVANCE,
}


@dataclass(frozen=True)
class SwitchingRules:
    """When a phase begins and a behaviour ends, in control steps."""

    enter: int  # steps of contact in a row that begin the phase `in`
    leave: int  # steps without contact in a row that end it: also how long a rollback goes on after release
    approach: int  # steps of an advance, after which the new task goes forward
    before_contact: Literal["forward", "advance"]  # a switch before the first contact

    def __post_init__(self) -> None:
        if min(self.enter, self.leave, self.approach) < 1:
            raise UsageError(f"switching rules count control steps, each at least 1, got {self}.")


@dataclass(frozen=True)
class GripperContact:
    """Contact is a gripper that is closed further than a threshold."""

    kind: Literal["gripper"]
    vector: Literal["state", "action"]  # where the gripper is read: its opening, or its command
    dimension: str  # name of the gripper's dimension there
    closed_beyond: float  # in that dimension's units; which side is closed says the spec's `gripper`

    def read(self, values: np.ndarray, spec: ActionSpec) -> np.ndarray:
        """(..., dim) states or actions of `spec` -> (...) bool, whether the gripper is closed.

        Raises:
            UsageError: there is no such dimension, or the spec does not say which way it closes.
        """
        if self.dimension not in spec.names or spec.gripper == "none":
            raise UsageError(
                f"contact.dimension {self.dimension!r} must be one of the {self.vector}'s {list(spec.names)}, and its "
                f"spec must say which way it closes; it says gripper: {spec.gripper}."
            )
        opening = values[..., spec.names.index(self.dimension)]
        return opening < self.closed_beyond if spec.gripper == "open_high" else opening > self.closed_beyond


def told(previous: str | None, current: str) -> Told:
    """`previous` is None when `current` is the first instruction of all."""
    if previous is None:
        return "first"
    return "same" if previous == current else "another"


def mode_of(previous: str | None, current: str, phase: Phase, before_contact: Literal["forward", "advance"]) -> int:
    """`TABLE`, with the choice that it leaves."""
    cell = told(previous, current), phase
    return ADVANCE if cell == ("another", "pre") and before_contact == "advance" else TABLE[cell]


def settle(contact: np.ndarray, enter: int, leave: int) -> np.ndarray:
    """(T,) bool without flicker: gaps shorter than `leave` frames are closed, then runs shorter than `enter` dropped.

    What is known of a whole episode; nothing comes late, as it does while one happens (`step`).
    """
    filled = _turn_short(contact, leave, value=False)
    return _turn_short(np.pad(filled, 1), enter, value=True)[1:-1]


def _turn_short(contact: np.ndarray, shortest: int, *, value: bool) -> np.ndarray:
    """`contact` (T,) with those runs of `value` between two others that are shorter than `shortest` turned over."""
    edges, turned = np.flatnonzero(np.diff(contact)) + 1, contact.copy()
    for begin, end in pairwise(edges.tolist()):
        if contact[begin] == value and end - begin < shortest:
            turned[begin:end] = not value
    return turned


def phases(contact: np.ndarray) -> np.ndarray:
    """(T,) bool, one episode's contact -> (T,) int64, numbers of `PHASES`."""
    so_far = np.logical_or.accumulate(contact)
    return np.where(contact, PHASES.index("in"), np.where(so_far, PHASES.index("post"), PHASES.index("pre")))


def onsets(contact: np.ndarray) -> np.ndarray:
    """(T,) bool -> (T,) int64, the frame at which the contact of each frame began; -1 where there is none."""
    begins = contact & ~np.concatenate(([False], contact[:-1]))
    latest = np.maximum.accumulate(np.where(begins, np.arange(len(contact)), -1))
    return np.where(contact, latest, -1)


@dataclass(frozen=True)
class Switching:
    """Where a robot is between two tasks. `step` makes the next one; nothing else is remembered."""

    previous: str | None  # the task that is left; None before there were two
    current: str  # the newest instruction
    previous_version: int  # task versions of the two: they grow with every new instruction
    version: int
    phase: Phase  # of the task in effect
    streak: int  # control steps in a row whose contact speaks against `phase`
    advanced: int  # control steps of the advance under way
    mode: int  # FORWARD, ROLLBACK or ADVANCE

    @property
    def instruction(self) -> str:
        """What the policy is to be told: a rollback belongs to the task that is left."""
        return self.previous if self.mode == ROLLBACK and self.previous is not None else self.current

    @property
    def task_version(self) -> int:
        """Of the instruction in effect: encodings of another version must not be used."""
        return self.previous_version if self.mode == ROLLBACK else self.version


def begin(instruction: str, version: int = 0) -> Switching:
    """The first instruction, before anything has been touched."""
    return Switching(None, instruction, version, version, "pre", 0, 0, FORWARD)


def step(before: Switching, instruction: str, contact: bool, rules: SwitchingRules, steps: int = 1) -> Switching:  # noqa: FBT001 (a measurement, not an option)
    """What follows when `instruction` holds and `contact` is measured, `steps` control steps later."""
    state = before if instruction == before.current else _told_anew(before, instruction)
    state = _felt(state, contact, rules, steps)
    if before.mode == ROLLBACK and state.phase != "in":  # it is undone: the new task begins
        state = replace(state, previous=state.current, phase="pre", streak=0)
    mode = mode_of(state.previous, state.current, state.phase, rules.before_contact)
    advanced = state.advanced + steps if mode == before.mode == ADVANCE else 0
    if mode == ADVANCE and advanced >= rules.approach:  # at its start: the new task begins
        state, mode, advanced = replace(state, phase="pre", streak=0), FORWARD, 0
    if mode == FORWARD and state.previous is not None:  # later contact is the new task's own
        state = replace(state, previous=state.current)
    return replace(state, mode=mode, advanced=advanced)


def _told_anew(before: Switching, instruction: str) -> Switching:
    """The task in effect is left for `instruction`."""
    return replace(
        before,
        previous=before.instruction,
        previous_version=before.task_version,
        current=instruction,
        version=before.version + 1,
        advanced=0,
    )


def _felt(state: Switching, contact: bool, rules: SwitchingRules, steps: int) -> Switching:  # noqa: FBT001
    """The phase after a measurement that may be flicker."""
    if contact == (state.phase == "in"):
        return replace(state, streak=0)
    streak = state.streak + steps
    if streak < (rules.leave if state.phase == "in" else rules.enter):
        return replace(state, streak=streak)
    return replace(state, phase="in" if contact else "post", streak=0)
