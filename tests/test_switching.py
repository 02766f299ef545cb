"""Phases of contact, the table of behaviours, and the machine that goes from one to the next."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla import switching
from vla.errors import UsageError
from vla.switching import (
    ADVANCE,
    FORWARD,
    ROLLBACK,
    GripperContact,
    Switching,
    SwitchingRules,
    begin,
    mode_of,
    onsets,
    phases,
    settle,
    step,
)
from vla.types import ActionSpec

RULES = SwitchingRules(enter=2, leave=3, approach=4, before_contact="forward")
contacts = st.lists(st.booleans(), min_size=1, max_size=40).map(np.array)


def text(contact: np.ndarray) -> str:
    return "".join("#" if c else "." for c in contact)


def signal(drawn: str) -> np.ndarray:
    return np.array([c == "#" for c in drawn])


def run(state: Switching, instruction: str, contact: str, rules: SwitchingRules = RULES) -> list[Switching]:
    states = []
    for c in contact:
        state = step(state, instruction, c == "#", rules)
        states.append(state)
    return states


def grasped(instruction: str = "A") -> Switching:
    """In the middle of a task, something in the hand."""
    state = run(begin(instruction), instruction, "..##")[-1]
    assert state.phase == "in"
    return state


NINE = [
    (None, "A", "pre", FORWARD),
    (None, "A", "in", FORWARD),
    (None, "A", "post", FORWARD),
    ("A", "A", "pre", FORWARD),
    ("A", "A", "in", FORWARD),
    ("A", "A", "post", FORWARD),
    ("A", "B", "pre", FORWARD),
    ("A", "B", "in", ROLLBACK),
    ("A", "B", "post", ADVANCE),
]


@pytest.mark.parametrize(("previous", "current", "phase", "mode"), NINE)
def test_table(previous: str | None, current: str, phase: switching.Phase, mode: int) -> None:
    assert mode_of(previous, current, phase, "forward") == mode
    option = ADVANCE if (previous, current, phase) == ("A", "B", "pre") else mode
    assert mode_of(previous, current, phase, "advance") == option, "the option changes one cell"


def test_table_is_whole() -> None:
    assert len(switching.TABLE) == len(NINE) == 9


def test_phases_of_an_episode() -> None:
    contact = signal("..##..##.")
    assert phases(contact).tolist() == [0, 0, 1, 1, 2, 2, 1, 1, 2]
    assert onsets(contact).tolist() == [-1, -1, 2, 2, -1, -1, 6, 6, -1]
    assert onsets(signal("##")).tolist() == [0, 0]


@given(contacts)
def test_phases_follow_the_contact(contact: np.ndarray) -> None:
    found, began = phases(contact), onsets(contact)
    assert ((found == 1) == contact).all()
    for t, phase in enumerate(found.tolist()):
        assert (phase == 0) == (not contact[: t + 1].any())
        if contact[t]:
            assert contact[began[t] : t + 1].all()
            assert began[t] == 0 or not contact[began[t] - 1]


@pytest.mark.parametrize(
    ("given_", "settled"),
    [
        ("...##.####...", "...#######..."),  # a gap of one in a grasp
        ("...#......", ".........."),  # a touch of one frame
        (".##..##", ".######"),  # gaps are closed before short runs are dropped
        ("##...##", "##...##"),
        ("......#", "......."),
        (".....##", ".....##"),
        ("..", ".."),
    ],
)
def test_flicker_is_settled(given_: str, settled: str) -> None:
    assert text(settle(signal(given_), enter=2, leave=3)) == settled


@given(contacts, st.integers(1, 4), st.integers(1, 4))
def test_settled_contact_has_no_short_runs(contact: np.ndarray, enter: int, leave: int) -> None:
    settled = settle(contact, enter, leave)
    runs = text(settled).replace(".#", ". #").replace("#.", "# .").split()
    assert all(len(r) >= enter for r in runs if "#" in r)
    assert all(len(r) >= leave for r in runs[1:-1] if "." in r)
    assert (settle(settled, enter, leave) == settled).all()


def test_first_instruction_goes_forward_through_all_phases() -> None:
    states = run(begin("A"), "A", "..####.....#")
    assert {s.mode for s in states} == {FORWARD}
    assert [s.phase for s in states] == ["pre"] * 3 + ["in"] * 5 + ["post"] * 4
    assert {(s.instruction, s.task_version) for s in states} == {("A", 0)}


def test_switch_before_contact_goes_forward_at_once_and_is_not_undone_later() -> None:
    states = run(begin("A"), "B", "..######")
    assert {s.mode for s in states} == {FORWARD}, "its own contact must not roll the new task back"
    assert states[-1].phase == "in"
    assert {(s.instruction, s.task_version) for s in states} == {("B", 1)}


def test_switch_in_contact_rolls_back_under_the_old_instruction_until_contact_has_ended() -> None:
    states = run(grasped(), "B", "###.....")
    assert [s.mode for s in states] == [ROLLBACK] * 5 + [FORWARD] * 3, "release is believed after `leave` steps"
    assert [s.instruction for s in states] == ["A"] * 5 + ["B"] * 3
    assert [s.task_version for s in states] == [0] * 5 + [1] * 3
    assert states[-1].phase == "pre", "the new task begins without contact of its own"
    assert run(states[-1], "B", "#####")[-1].mode == FORWARD


def test_rollback_does_not_flicker() -> None:
    states = run(grasped(), "B", "#.#..#.##..#")
    assert {s.mode for s in states} == {ROLLBACK}


def test_switch_after_contact_advances_to_the_new_start_and_then_goes_forward() -> None:
    released = run(grasped(), "A", "....")[-1]
    assert released.phase == "post"
    states = run(released, "B", ".......")
    assert [s.mode for s in states] == [ADVANCE] * 4 + [FORWARD] * 3
    assert {(s.instruction, s.task_version) for s in states} == {("B", 1)}
    assert states[-1].phase == "pre"
    again = run(states[-1], "B", "#######")
    assert again[-1].phase == "in"
    assert {s.mode for s in again} == {FORWARD}


def test_option_advances_before_contact_too() -> None:
    rules = replace(RULES, before_contact="advance")
    assert [s.mode for s in run(begin("A"), "B", "......", rules)] == [ADVANCE] * 4 + [FORWARD] * 2
    assert run(begin("A"), "A", "..", rules)[-1].mode == FORWARD


def test_third_instruction_during_a_rollback_changes_only_what_comes_after() -> None:
    rolling = run(grasped(), "B", "#")[-1]
    states = run(rolling, "C", "#....")
    assert [(s.mode, s.instruction) for s in states] == [(ROLLBACK, "A")] * 3 + [(FORWARD, "C")] * 2
    assert [s.task_version for s in states] == [0] * 3 + [2] * 2


def test_back_to_the_task_that_is_being_undone() -> None:
    rolling = run(grasped(), "B", "#")[-1]
    states = run(rolling, "A", "##")
    assert [(s.mode, s.instruction, s.phase) for s in states] == [(FORWARD, "A", "in")] * 2
    assert {s.task_version for s in states} == {2}, "every new instruction is a new version"


def test_several_control_steps_at_once_count_as_many() -> None:
    rolling = step(grasped(), "B", contact=False, rules=RULES)
    assert rolling.mode == ROLLBACK
    assert step(rolling, "B", contact=False, rules=RULES, steps=2).mode == FORWARD
    assert step(rolling, "B", contact=False, rules=RULES, steps=1).mode == ROLLBACK


@given(st.lists(st.tuples(st.sampled_from("AB"), st.booleans()), min_size=1, max_size=60))
def test_whatever_happens(events: list[tuple[str, bool]]) -> None:
    state = begin("A")
    for instruction, contact in events:
        before, state = state, step(state, instruction, contact, RULES)
        assert state.current == instruction
        assert (state.version > before.version) == (instruction != before.current)
        if state.mode == ROLLBACK:
            assert state.phase == "in"
            assert state.task_version < state.version
            assert state.instruction != instruction
        else:
            assert (state.instruction, state.task_version) == (instruction, state.version)


SPEC = ActionSpec(("x", "hand"), ("m", "1"), ("absolute",) * 2, (0.0,) * 2, (1.0,) * 2, 10.0, gripper="open_high")


def test_gripper_is_read_the_way_its_spec_says() -> None:
    gripper = GripperContact("gripper", "state", "hand", 0.4)
    values = np.array([[0.0, 0.9], [0.9, 0.3], [0.9, 0.4]])
    assert gripper.read(values, SPEC).tolist() == [False, True, False]
    assert gripper.read(values, replace(SPEC, gripper="close_high")).tolist() == [True, False, False]
    assert bool(gripper.read(values[1], SPEC))
    with pytest.raises(UsageError, match="'hand' must be one of"):
        gripper.read(values, replace(SPEC, gripper="none"))
    with pytest.raises(UsageError, match="'y' must be one of"):
        replace(gripper, dimension="y").read(values, SPEC)


def test_rules_count_steps() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        replace(RULES, leave=0)
