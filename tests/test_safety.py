from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from robot import safety
from vla.types import ActionChunk, ActionSpec, Decision

# 0.1 and 0.7 are not float32 numbers: rounding them outwards would break the limit.
SPEC = ActionSpec(("a", "b", "c"), ("rad",) * 3, ("absolute",) * 3, (-0.1, -2.0, 0.3), (0.1, 2.0, 0.7), rate_hz=50.0)
INSIDE = np.array([0.05, -1.0, 0.5], np.float32)

anything = st.one_of(
    arrays.arrays(np.float32, 3, elements=st.floats(width=32)),
    arrays.arrays(np.float64, 3, elements=st.floats()),
    arrays.arrays(np.int64, 3),
    arrays.arrays(st.sampled_from([np.float32, np.complex64, np.bool_]), arrays.array_shapes(min_dims=0, max_dims=3)),
    st.none(),
    st.text(),
    st.lists(st.floats(), max_size=4),
)


@given(anything)
def test_whatever_comes_no_command_leaves_the_limits(action: Any) -> None:
    verdict = safety.check(action, SPEC)
    if verdict.command is None:
        assert verdict.decision is Decision.HOLD
        assert verdict.rule in ("type", "shape", "not_finite")
        return
    assert verdict.decision in (Decision.PASS, Decision.CLAMP)
    command = verdict.command.astype(np.float64)
    assert verdict.command.dtype == np.float32
    assert (command >= SPEC.low).all()
    assert (command <= SPEC.high).all()
    assert (verdict.rule == "") == (verdict.decision is Decision.PASS)
    if verdict.decision is Decision.PASS:
        assert np.array_equal(command, np.asarray(action, np.float32))


def test_well_formed_actions_inside_pass_unchanged() -> None:
    verdict = safety.check(INSIDE, SPEC)
    assert (verdict.decision, verdict.rule) == (Decision.PASS, "")
    assert verdict.command is not None
    assert np.array_equal(verdict.command, INSIDE)


def test_too_large_is_clamped_dimension_by_dimension() -> None:
    verdict = safety.check(np.array([5.0, -1.0, 0.0], np.float32), SPEC)
    assert (verdict.decision, verdict.rule) == (Decision.CLAMP, "limits")
    assert verdict.command is not None
    assert verdict.command == pytest.approx([0.1, -1.0, 0.3])


@pytest.mark.parametrize(
    ("action", "rule"),
    [
        (np.array([0.0, np.nan, 0.5], np.float32), "not_finite"),
        (np.array([0.0, np.inf, 0.5], np.float32), "not_finite"),
        (np.array([0.0, 1e300, 0.5]), "not_finite"),
        (np.zeros(2, np.float32), "shape"),
        (np.zeros((1, 3), np.float32), "shape"),
        (np.array(["1", "2", "3"]), "type"),
        ([0.0, 0.0, 0.5], "type"),
        (None, "type"),
    ],
)
def test_malformed_is_refused_whole_and_never_becomes_zeros(action: Any, rule: str) -> None:
    verdict = safety.check(action, SPEC)
    assert (verdict.decision, verdict.command, verdict.rule) == (Decision.HOLD, None, rule)


def chunk(**changes: Any) -> ActionChunk:
    given = {"stamp_s": 2.0, "period_s": 0.02, "actions": np.tile(INSIDE, (4, 1)), "execute": 2} | changes
    return ActionChunk(**given)


def test_a_sound_chunk_is_accepted() -> None:
    assert safety.refuse_chunk(chunk(), SPEC, 2.0) == ""


def test_a_chunk_is_refused_for_rows_that_would_not_be_executed() -> None:
    actions = np.tile(INSIDE, (4, 1))
    actions[3, 1] = np.nan
    assert safety.refuse_chunk(chunk(actions=actions), SPEC, 2.0) == "not_finite"


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        (None, "not_a_chunk"),
        (INSIDE, "not_a_chunk"),
        (chunk(actions=np.zeros((4, 2), np.float32)), "shape"),
        (chunk(period_s=0.025), "period"),
        (chunk(period_s=float("nan")), "period"),
        (chunk(stamp_s=1.9), "stale"),
    ],
)
def test_other_chunks_are_refused_by_rule(answer: Any, rule: str) -> None:
    assert safety.refuse_chunk(answer, SPEC, 2.0) == rule


def test_every_verdict_is_counted_under_its_rule() -> None:
    tally: Counter[str] = Counter()
    for action in (INSIDE, INSIDE, INSIDE + 9, INSIDE * np.float32("nan")):
        safety.count(tally, safety.check(action, SPEC))
    assert tally == {"pass": 2, "clamp:limits": 1, "hold:not_finite": 1}
