import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robot import chunks
from robot.chunks import Plan
from vla.types import ActionChunk

H = 6


def chunk(stamp_s: float = 0.0, period_s: float = 0.1, execute: int = 4) -> ActionChunk:
    """Row k of the chunk holds stamp_s + k."""
    return ActionChunk(stamp_s, period_s, np.arange(H, dtype=np.float32)[:, None] + stamp_s, execute)


@given(
    start_s=st.floats(0, 1e6),
    period_s=st.floats(1e-3, 1.0),
    row=st.integers(-3, H + 3),
    late=st.floats(0, 0.99),
)
def test_the_row_is_the_one_meant_for_the_time(start_s: float, period_s: float, row: int, late: float) -> None:
    plan = chunks.insert(Plan(), chunk(0.0, period_s), start_s)
    action = chunks.action_at(plan, start_s + (row + late) * period_s)
    if 0 <= row < H:
        assert action is not None
        assert action.tolist() == [row]
    else:
        assert action is None


def test_anchored_at_the_observation_a_late_chunk_skips_what_is_past() -> None:
    late = chunk(stamp_s=1.0)
    action = chunks.action_at(chunks.insert(Plan(), late, late.stamp_s), 1.3)
    assert action is not None
    assert action.tolist() == [1.0 + 3]


def test_a_newer_chunk_replaces_and_an_overtaken_one_is_dropped() -> None:
    plan = chunks.insert(chunks.insert(Plan(), chunk(0.0), 0.0), chunk(0.4), 0.4)
    assert [e.chunk.stamp_s for e in plan.entries] == [0.4]
    assert chunks.insert(plan, chunk(0.2), 0.5) is plan


def test_used_up_after_the_recommended_steps_and_expired_after_the_last() -> None:
    plan = chunks.insert(Plan(), chunk(execute=4), 0.0)
    assert [chunks.used_up(plan, 0.1 * k) for k in range(6)] == [False] * 4 + [True] * 2
    assert chunks.expire(plan, 0.1 * (H - 1)) == plan
    assert chunks.expire(plan, 0.1 * H) == Plan()


def test_an_empty_plan_wants_a_chunk_and_has_no_action() -> None:
    assert chunks.used_up(Plan(), 0.0)
    assert chunks.action_at(Plan(), 0.0) is None


def test_nothing_is_changed_in_place() -> None:
    plan = chunks.insert(Plan(), chunk(), 0.0)
    chunks.insert(plan, chunk(1.0), 1.0)
    assert plan.entries[0].chunk.stamp_s == 0.0
    action = chunks.action_at(plan, 0.0)
    assert action is not None
    with pytest.raises(ValueError, match="read-only"):
        action[0] = 1.0
