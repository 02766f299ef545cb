"""Which action is due at a given time: pure functions on frozen values. numpy only, Python 3.10.

A `Plan` holds the chunks that still matter, each anchored at the time its row 0 is meant for. Two
anchors make sense, and the caller chooses:

* `chunk.stamp_s`, the time of the observation: rows that passed while the policy was thinking are
  skipped, as they must be when the arm kept moving meanwhile;
* the current tick: the arm was held still since the observation, so that row 0 is still right.

`insert` decides how a new chunk meets the old ones. Here it replaces them; a method that blends keeps
the older entries and reads them in `action_at`, and nothing else changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vla.types import ActionChunk

EARLY = 1e-3  # share of a period by which a tick may come before its row's time (rounding of floats)


@dataclass(frozen=True)
class Entry:
    """A chunk on the time axis: row k is meant for `start_s + k * chunk.period_s`."""

    chunk: ActionChunk
    start_s: float  # clock of the control loop

    def row(self, now_s: float) -> int:
        """The row meant for `now_s`; negative before the chunk, H or more after it."""
        return math.floor((now_s - self.start_s) / self.chunk.period_s + EARLY)


@dataclass(frozen=True)
class Plan:
    """What the arm is about to do."""

    entries: tuple[Entry, ...] = ()  # oldest observation first


def insert(plan: Plan, chunk: ActionChunk, start_s: float) -> Plan:
    """`plan` with `chunk` in place of all older ones, its row 0 at `start_s`.

    An answer to an older observation than the newest one in the plan is dropped: replies may overtake
    one another, and an old one must not undo a new one.
    """
    if plan.entries and chunk.stamp_s < plan.entries[-1].chunk.stamp_s:
        return plan
    return Plan((Entry(chunk, start_s),))


def expire(plan: Plan, now_s: float) -> Plan:
    """`plan` without the chunks whose last row is past."""
    return Plan(tuple(e for e in plan.entries if e.row(now_s) < len(e.chunk.actions)))


def action_at(plan: Plan, now_s: float) -> np.ndarray | None:
    """The action (A,) due at `now_s`, or None if no chunk covers that time."""
    if not plan.entries:
        return None
    newest = plan.entries[-1]
    row = newest.row(now_s)
    return newest.chunk.actions[row] if 0 <= row < len(newest.chunk.actions) else None


def used_up(plan: Plan, now_s: float) -> bool:
    """Whether the newest chunk's recommended `execute` steps are done, so that a new one is wanted."""
    return not plan.entries or plan.entries[-1].row(now_s) >= plan.entries[-1].chunk.execute
