import time

import pytest

from robot.clock import LockstepClock, MonotonicClock, Rate
from vla.errors import TandemError


class OversleepingClock(LockstepClock):
    """Wakes 3 ms late, as real ones do."""

    def sleep_until(self, deadline_s: float) -> None:
        super().sleep_until(deadline_s + 0.003)


def test_lockstep_time_passes_by_waiting_only_and_never_back() -> None:
    clock = LockstepClock(5.0)
    assert clock.now() == clock.now() == 5.0
    clock.sleep_until(6.5)
    clock.sleep_until(6.0)
    assert clock.now() == 6.5


def test_monotonic_clock_wakes_at_the_deadline_not_before() -> None:
    clock = MonotonicClock()
    deadline = clock.now() + 0.03
    clock.sleep_until(deadline)
    assert clock.now() >= deadline
    before = time.perf_counter()
    clock.sleep_until(deadline)
    assert time.perf_counter() - before < 0.02


def test_deadlines_are_absolute_late_waking_does_not_add_up() -> None:
    clock = OversleepingClock(100.0)
    rate = Rate(clock, 40.0)
    for k in range(1, 1001):
        rate.wait()
        assert rate.tick_s == pytest.approx(100.0 + k / 40.0, abs=1e-9)
    assert clock.now() == pytest.approx(125.003, abs=1e-9)
    assert rate.skip_missed() == 0
    assert rate.overruns == 0


@pytest.mark.parametrize(("late_s", "missed"), [(0.0, 0), (0.099, 0), (0.1, 1), (0.35, 3)])
def test_missed_ticks_are_counted_and_the_grid_is_kept(late_s: float, missed: int) -> None:
    clock = LockstepClock()
    rate = Rate(clock, 10.0)
    rate.wait()
    clock.sleep_until(rate.tick_s + late_s)
    assert rate.skip_missed() == missed
    assert rate.skip_missed() == 0
    assert rate.tick_s == pytest.approx(0.1 * (1 + missed))
    rate.wait()
    assert rate.tick_s == pytest.approx(0.1 * (2 + missed))
    assert rate.overruns == missed


@pytest.mark.parametrize("rate_hz", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_must_be_positive(rate_hz: float) -> None:
    with pytest.raises(TandemError, match="positive"):
        Rate(LockstepClock(), rate_hz)
