"""Chunks that retrace a way or go to another place, followed by an integrator that moves exactly as it is told."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation as SO3

from train.switching_moves import (
    CommandMove,
    Course,
    LinearMove,
    Move,
    RotationMove,
    approach,
    check,
    retrace,
    steps_needed,
    to_actions,
)
from vla import rotations
from vla.errors import UsageError
from vla.types import ActionSpec, Reference, Rotation

XYZ, TURN, HAND = ("x", "y", "z"), ("rx", "ry", "rz"), ("hand",)
STATE = ActionSpec(
    (*XYZ, *TURN), ("m",) * 3 + ("rad",) * 3, ("absolute",) * 6, (-9.0,) * 6, (9.0,) * 6, 10.0, rotation="axis_angle"
)
UNIT_M, UNIT_RAD = 0.05, 0.5


def action_spec(reference: Reference, limit: float = 99.0) -> ActionSpec:
    return ActionSpec(
        (*XYZ, *TURN, *HAND),
        ("1",) * 7,
        (reference,) * 6 + ("absolute",),
        (-limit,) * 7,
        (limit,) * 7,
        10.0,
        rotation="axis_angle",
        gripper="close_high",
    )


def moves(reference: Reference, frame: str = "world") -> tuple[Move, ...]:
    units = (UNIT_M, UNIT_RAD) if reference == "delta" else (1.0, 1.0)
    return (
        LinearMove("linear", XYZ, XYZ, units[0]),
        RotationMove("rotation", TURN, TURN, units[1], "body" if frame == "body" else "world"),
        CommandMove("command", HAND),
    )


def integrate(state: np.ndarray, actions: np.ndarray, reference: Reference, frame: str = "world") -> np.ndarray:
    """(6,) and (H, 7) -> (H + 1, 6): a robot that is after each step exactly where it was told to be."""
    way: list[np.ndarray] = [state.astype(np.float64)]
    for k in range(len(actions)):
        action = actions[k].astype(np.float64)
        if reference == "absolute":
            way.append(action[:6])
            continue
        now, turn = SO3.from_rotvec(way[-1][3:]), SO3.from_rotvec(action[3:6] * UNIT_RAD)
        turned = turn * now if frame == "world" else now * turn
        way.append(np.concatenate((way[-1][:3] + action[:3] * UNIT_M, turned.as_rotvec())))
    return np.stack(way)


def distance(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """m and rad between two states."""
    apart = SO3.from_rotvec(a[3:].astype(float)).inv() * SO3.from_rotvec(b[3:].astype(float))
    return float(np.linalg.norm(a[:3] - b[:3])), float(apart.magnitude())


def recorded(seed: int, length: int, grasp: int) -> tuple[np.ndarray, np.ndarray]:
    """States (T, 6) of a smooth way and actions (T, 7); the hand closes with step `grasp`."""
    rng = np.random.default_rng(seed)
    states = np.cumsum(rng.normal(scale=0.04, size=(length, 6)), axis=0)
    actions = rng.normal(size=(length, 7))
    actions[:, 6] = np.where(np.arange(length) < grasp, -1.0, 1.0)
    return states.astype(np.float32), actions.astype(np.float32)


def frames(*numbers: int) -> np.ndarray:
    return np.array(numbers)


@pytest.mark.parametrize("frame", ["world", "body"])
@pytest.mark.parametrize("reference", ["absolute", "delta"])
@settings(max_examples=25)
@given(st.integers(0, 999), st.integers(2, 12))
def test_forward_then_back_ends_where_it_began(reference: Reference, frame: str, seed: int, steps: int) -> None:
    """A chunk from state p to state q, then the rollback from q: p again, for either action type."""
    states, actions = recorded(seed, 20, 5)
    spec = action_spec(reference)
    forward = Course(states[None, : steps + 1].astype(np.float64), actions[None, :steps])
    there = integrate(states[0], to_actions(forward, moves(reference, frame), STATE, spec)[0], reference, frame)
    assert max(distance(there[-1], states[steps])) < 1e-5, "the integrator follows the forward chunk"
    course = retrace(states, actions, frames(steps), frames(0), frames(0), steps)
    chunk = to_actions(course, moves(reference, frame), STATE, spec)[0]
    back = integrate(there[-1], chunk, reference, frame)
    for k in range(steps + 1):
        assert max(distance(back[k], states[steps - k])) < 1e-5


@pytest.mark.parametrize("reference", ["absolute", "delta"])
def test_rollback_stops_and_stays(reference: Reference) -> None:
    states, actions = recorded(1, 20, 8)
    course = retrace(states, actions, frames(10, 6), frames(6, 6), frames(0, 0), 9)
    chunks = to_actions(course, moves(reference), STATE, action_spec(reference))
    for chunk, begin in zip(chunks, (10, 6), strict=True):
        way = integrate(states[begin], chunk, reference)
        assert max(distance(way[begin - 6], states[6])) < 1e-5
        assert max(distance(way[-1], states[6])) < 1e-5
    if reference == "delta":
        assert not chunks[0, 4:, :6].any()
        assert not chunks[1, :, :6].any()


def test_changes_are_the_negative_of_the_next_ones_in_reverse_order() -> None:
    states, actions = recorded(2, 20, 8)
    spec, to = action_spec("delta"), moves("delta")
    forward = to_actions(Course(states[None, 3:10].astype(np.float64), actions[None, 3:9]), to, STATE, spec)[0]
    back = to_actions(retrace(states, actions, frames(9), frames(3), frames(0), 6), to, STATE, spec)[0]
    assert np.allclose(back[:, :6], -forward[::-1, :6], atol=1e-4)


@given(st.integers(1, 18), st.integers(0, 18), st.integers(0, 6))
def test_release_is_at_the_mirrored_grasp(grasp: int, hold: int, margin: int) -> None:
    """State g is reached after t - g steps back: then, and not before, the hand opens."""
    t = min(grasp + 1 + hold, 20)
    states, actions = recorded(3, 21, grasp)
    horizon = 30
    stop = max(grasp - margin, 0)
    course = retrace(states, actions, frames(t), frames(stop), frames(0), horizon)
    hand = to_actions(course, moves("delta"), STATE, action_spec("delta"))[0, :, 6]
    release = int(np.flatnonzero(hand < 0)[0])
    assert release == t - grasp
    assert (hand[:release] > 0).all()
    assert (hand[release:] < 0).all()
    assert np.allclose(course.states[0, release], states[grasp]), "the hand is where it had closed"


def test_nothing_is_taken_from_the_episode_before() -> None:
    states, actions = recorded(4, 20, 0)
    actions[9, 6], actions[10:, 6] = -5.0, 5.0
    course = retrace(states, actions, frames(12), frames(10), frames(10), 6)  # an episode that begins with frame 10
    assert (course.commands[0, :, 6] == 5.0).all()
    assert np.allclose(course.states[0, -1], states[10])


@pytest.mark.parametrize("reference", ["absolute", "delta"])
@settings(max_examples=25)
@given(st.integers(0, 999), st.integers(1, 15))
def test_approach_arrives_after_its_steps_along_straight_line_and_geodesic(
    reference: Reference, seed: int, steps: int
) -> None:
    rng = np.random.default_rng(seed)
    start, goal = rng.uniform(-1.5, 1.5, (2, 6)).astype(np.float32)
    command = np.array([[9, 9, 9, 9, 9, 9, -1.0]])
    course = approach((start[None], goal[None]), command, np.array([steps]), moves(reference), STATE, 16)
    chunk = to_actions(course, moves(reference), STATE, action_spec(reference))[0]
    way = integrate(start, chunk, reference)
    total = distance(start, goal)
    for k, state in enumerate(way):
        share = min(k / steps, 1.0)
        assert distance(start, state) == pytest.approx((share * total[0], share * total[1]), abs=1e-4)
        assert distance(state, goal) == pytest.approx(((1 - share) * total[0], (1 - share) * total[1]), abs=1e-4)
    assert (chunk[:, 6] == -1).all()


def test_rotations_are_not_interpolated_component_by_component() -> None:
    epsilon = 0.02
    start, goal = np.zeros((2, 1, 6), np.float32)
    start[0, 3], goal[0, 3] = np.pi - epsilon / 2, -(np.pi - epsilon / 2)
    course = approach((start, goal), np.zeros((1, 7)), np.array([2]), moves("absolute"), STATE, 2)
    chunk = to_actions(course, moves("absolute"), STATE, action_spec("absolute"))[0]
    middle = SO3.from_rotvec(chunk[0, 3:6].astype(float))
    assert (SO3.from_rotvec([np.pi, 0, 0]).inv() * middle).magnitude() < 1e-5
    assert np.allclose(chunk[1, 3], np.pi + epsilon / 2, atol=1e-5), "the numbers go on instead of jumping"


@pytest.mark.parametrize("form", ["euler_xyz", "quaternion_xyzw", "rot6d"])
def test_targets_are_said_in_the_actions_own_form(form: Rotation) -> None:
    names = tuple(f"r{i}" for i in range(rotations.WIDTH[form]))
    dim = 3 + len(names)
    spec = ActionSpec((*XYZ, *names), ("1",) * dim, ("absolute",) * dim, (-9.0,) * dim, (9.0,) * dim, 10.0, form)
    to = (LinearMove("linear", XYZ, XYZ, 1.0), RotationMove("rotation", names, TURN, 1.0, "world"))
    check(to, STATE, spec)
    states, _ = recorded(5, 20, 0)
    actions = np.zeros((20, dim), np.float32)
    chunk = to_actions(retrace(states, actions, frames(9), frames(4), frames(0), 5), to, STATE, spec)[0]
    due = SO3.from_rotvec(states[8:3:-1, 3:].astype(float))
    assert rotations.parse(chunk[:, 3:], form).approx_equal(due, atol=1e-5).all()


def test_limits_slow_an_approach_and_clip_a_chunk() -> None:
    spec = action_spec("delta", limit=1.0)
    start, goal = np.zeros((1, 6)), np.array([[0.2, -0.41, 0, 0, 0, 0]])
    assert steps_needed(start, goal, moves("delta"), STATE, spec).tolist() == [9]  # 0.41 m at 0.05 m a step
    assert steps_needed(start, start, moves("delta"), STATE, spec).tolist() == [1]
    assert steps_needed(start, goal, moves("absolute"), STATE, action_spec("absolute", 1.0)).tolist() == [1]
    lopsided = replace(spec, low=(-0.5,) * 7)
    assert steps_needed(start, goal, moves("delta"), STATE, lopsided).tolist() == [17]
    way = np.zeros((1, 2, 6))
    way[0, 1, 0] = 7
    assert to_actions(Course(way, np.zeros((1, 1, 7))), moves("delta"), STATE, spec)[0, 0].tolist() == [1] + [0] * 6


def test_moves_that_do_not_fit_are_refused() -> None:
    spec, good = action_spec("delta"), moves("delta")
    check(good, STATE, spec)
    linear, rotation, command = good
    assert isinstance(linear, LinearMove)
    assert isinstance(rotation, RotationMove)
    for wrong, message in (
        ((linear, rotation), "each action dimension once"),
        ((linear, rotation, command, command), "each action dimension once"),
        ((replace(linear, state=("x", "y", "up")), rotation, command), "state must be of"),
        ((replace(linear, state=("x", "y")), rotation, command), "as many action as state"),
        ((replace(linear, unit=0.0), rotation, command), "unit positive"),
        ((replace(linear, action=(*XYZ, "hand"), state=(*XYZ, "x")), rotation), "all 'delta'"),
        ((linear, replace(rotation, state=("rx", "ry")), command), "2 dimensions cannot be a rotation"),
    ):
        with pytest.raises(UsageError, match=message):
            check(wrong, STATE, spec)
    with pytest.raises(UsageError, match="of form 'none'"):
        check(good, replace(STATE, rotation="none"), spec)
