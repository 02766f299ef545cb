"""Time for the control loop: passed in, monotonic, with absolute deadlines. Parses on Python 3.10."""

from __future__ import annotations

import math
import time
from typing import Protocol

from vla.errors import TandemError


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since an arbitrary moment; never goes back."""
        ...

    def sleep_until(self, deadline_s: float) -> None:
        """Return at `deadline_s`, or at once if it has passed."""
        ...


class MonotonicClock:
    """Real time. Not the wall clock, which steps when the computer's time is corrected."""

    def now(self) -> float:
        return time.monotonic()

    def sleep_until(self, deadline_s: float) -> None:
        while (left := deadline_s - time.monotonic()) > 0:
            time.sleep(left)


class LockstepClock:
    """Simulated time: it advances by waiting and by nothing else, so thinking costs no time."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now = start_s

    def now(self) -> float:
        return self._now

    def sleep_until(self, deadline_s: float) -> None:
        self._now = max(self._now, deadline_s)


class Rate:
    """Ticks at `start + k * period`: errors do not add up, and a tick that was missed is counted.

    Args:
        clock: what is waited on; the first tick is now.
        rate_hz: ticks per second.
    """

    def __init__(self, clock: Clock, rate_hz: float) -> None:
        if not (rate_hz > 0 and math.isfinite(rate_hz)):
            raise TandemError(f"rate_hz must be a positive number, got {rate_hz}.")
        self.period_s = 1.0 / rate_hz
        self.overruns = 0  # ticks that passed before anybody came to serve them
        self._clock = clock
        self._start_s = clock.now()
        self._ticks = 0

    @property
    def tick_s(self) -> float:
        """The time the current tick is meant for, on the clock."""
        return self._start_s + self._ticks * self.period_s

    def wait(self) -> None:
        """Go to the next tick: sleep until it, or return at once if it has begun."""
        self._ticks += 1
        self._clock.sleep_until(self.tick_s)

    def skip_missed(self) -> int:
        """Make the newest tick that has begun the current one; return how many were missed on the way."""
        late_s = self._clock.now() - self.tick_s
        missed = max(0, math.floor(late_s / self.period_s + 1e-6))
        self._ticks += missed
        self.overruns += missed
        return missed
