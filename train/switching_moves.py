"""The chunks of task switching, made from recorded states: retracing a way, and going to another place.

What moves is the state; it is then said in the data's own action type. An absolute target is the state to be in after
the step, a change is the difference of two states (rotations: on SO(3)), and a command such as a gripper's is the one
that was given on the same stretch of the way.

Axes: B rows, T frames of a data set, S state and A action dimensions, H steps of a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vla import rotations
from vla.errors import UsageError
from vla.types import ActionSpec


@dataclass(frozen=True)
class LinearMove:
    """Action dimensions that move state dimensions one by one: positions, joints."""

    kind: Literal["linear"]
    action: tuple[str, ...]
    state: tuple[str, ...]
    unit: float  # what 1 of the action is, in units of the state, such as 0.02 where it is given in 2 cm


@dataclass(frozen=True)
class RotationMove:
    """Action dimensions that turn a rotation of the state; each in the form that its spec says."""

    kind: Literal["rotation"]
    action: tuple[str, ...]
    state: tuple[str, ...]
    unit: float  # what 1 of the action is, rad; 1 for forms that are no angles
    frame: Literal["world", "body"]  # where the axes of a change are fixed


@dataclass(frozen=True)
class CommandMove:
    """Action dimensions that are given, not reached: a gripper's command or effort."""

    kind: Literal["command"]
    action: tuple[str, ...]


Move = LinearMove | RotationMove | CommandMove


@dataclass(frozen=True)
class Course:
    """The way of B chunks through recorded frames. Step k goes from `states[:, k]` to `states[:, k + 1]`."""

    states: np.ndarray  # (B, H + 1, S) float64
    commands: np.ndarray  # (B, H, A) the recorded actions whose commands are given on the way


def check(moves: Sequence[Move], state: ActionSpec, action: ActionSpec) -> None:
    """Raise `UsageError` unless `moves` say of every action dimension, once, what it does."""
    named = [name for move in moves for name in move.action]
    if sorted(named) != sorted(action.names):
        raise UsageError(f"moves must name each action dimension once: {list(action.names)}, got {named}.")
    for move in moves:
        references = {action.reference[i] for i in _places(action, move.action)}
        if isinstance(move, CommandMove):
            continue
        unknown = [name for name in move.state if name not in state.names]
        if unknown or len(references) > 1 or move.unit <= 0:
            raise UsageError(
                f"{move}: state must be of {list(state.names)}, all action dimensions 'absolute' or all 'delta' (they "
                f"are {sorted(references)}), and unit positive."
            )
        if isinstance(move, LinearMove) and len(move.action) != len(move.state):
            raise UsageError(f"{move}: as many action as state dimensions.")
        if isinstance(move, RotationMove):
            for spec, names in ((state, move.state), (action, move.action)):
                if rotations.WIDTH[spec.rotation] != len(names) or not names:
                    raise UsageError(
                        f"{move}: {len(names)} dimensions cannot be a rotation of form {spec.rotation!r}, which has "
                        f"{rotations.WIDTH[spec.rotation]}."
                    )


def retrace(
    states: np.ndarray, actions: np.ndarray, frame: np.ndarray, stop: np.ndarray, begin: np.ndarray, horizon: int
) -> Course:
    """From each `frame` back along the recorded states until `stop`, then stay there.

    Step k goes from state frame - k to state frame - k - 1 and is the mirror of recorded step frame - k - 1, whose
    command it gives: a gripper that closed with step g opens when state g is reached, not before.

    Args:
        states, actions: (T, S) and (T, A).
        frame, stop, begin: (B,) frames of one episode, whose first is `begin`; begin <= stop <= frame.
    """
    ahead = np.arange(horizon + 1)
    way = np.maximum(frame[:, None] - ahead, stop[:, None])  # (B, H + 1)
    last = np.maximum(stop - 1, begin)[:, None]  # staying, the command of the step that once led here
    given = np.maximum(frame[:, None] - 1 - ahead[:-1], last)
    return Course(states[way].astype(np.float64), actions[given])


def approach(
    ends: tuple[np.ndarray, np.ndarray],
    commands: np.ndarray,
    steps: np.ndarray,
    moves: Sequence[Move],
    spec: ActionSpec,
    horizon: int,
) -> Course:
    """The straight way between two states in `steps` steps, then stay; rotations go along the geodesic.

    Args:
        ends: states (B, S) where it starts, and (B, S) where it goes.
        commands: (B, A), given all the way.
        steps: (B,) how many steps the whole way takes; a chunk is its first H.
        spec: of the states.
    """
    shares = np.minimum(np.arange(horizon + 1) / steps[:, None], 1.0)  # (B, H + 1)
    start, goal = (end.astype(np.float64)[:, None] for end in ends)
    states = start + shares[..., None] * (goal - start)
    for move in moves:
        if isinstance(move, RotationMove):
            at, form = _places(spec, move.state), spec.rotation
            begin, end = (rotations.parse(state[:, 0, at], form) for state in (start, goal))
            for b in range(len(start)):
                turned = rotations.interpolate(begin[b], end[b], shares[b])
                states[b][:, at] = rotations.express(turned, form, start[b, 0, at])
    return Course(states, np.repeat(commands[:, None], horizon, axis=1))


def to_actions(course: Course, moves: Sequence[Move], state: ActionSpec, action: ActionSpec) -> np.ndarray:
    """(B, H, A) float32 actions that follow `course`, inside the limits of `action`."""
    out = course.commands.astype(np.float64)
    for move in moves:
        at = _places(action, move.action)
        if isinstance(move, CommandMove):
            continue
        way, delta = course.states[..., _places(state, move.state)], action.reference[at[0]] == "delta"
        if isinstance(move, LinearMove):
            out[..., at] = (np.diff(way, axis=1) if delta else way[:, 1:]) / move.unit
        else:
            turn = _turns if delta else _orientations
            out[..., at] = np.stack([turn(row, move, state, action) for row in way]) / move.unit
    return action.clip(out.astype(np.float32))


def steps_needed(
    start: np.ndarray, goal: np.ndarray, moves: Sequence[Move], state: ActionSpec, action: ActionSpec
) -> np.ndarray:
    """(B,) int64, the fewest steps from `start` to `goal` (B, S) that the limits of linear changes allow."""
    needed = np.ones(len(start))
    for move in moves:
        if isinstance(move, LinearMove):
            at = _places(action, move.action)
            if action.reference[at[0]] == "delta":
                places = _places(state, move.state)
                way = (goal[:, places].astype(np.float64) - start[:, places]) / move.unit
                limit = np.where(way > 0, np.asarray(action.high)[at], -np.asarray(action.low)[at])
                needed = np.maximum(needed, (np.abs(way) / limit).max(axis=1))
    return np.ceil(needed).astype(np.int64)


def _orientations(way: np.ndarray, move: RotationMove, state: ActionSpec, action: ActionSpec) -> np.ndarray:
    """(H + 1, n) rotations of a state -> (H, m) the targets of the steps."""
    del move
    if state.rotation == action.rotation:
        return way[1:]
    return rotations.express(rotations.parse(way[1:], state.rotation), action.rotation)


def _turns(way: np.ndarray, move: RotationMove, state: ActionSpec, action: ActionSpec) -> np.ndarray:
    """(H + 1, n) rotations of a state -> (H, m) the turns from each to the next."""
    along = rotations.parse(way, state.rotation)
    before, after = along[:-1], along[1:]
    turns = after * before.inv() if move.frame == "world" else before.inv() * after
    return rotations.express(turns, action.rotation)


def _places(spec: ActionSpec, names: Sequence[str]) -> list[int]:
    return [spec.names.index(name) for name in names]
