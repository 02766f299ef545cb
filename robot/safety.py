"""The last word before the arm: pure checks of what the policy wants. numpy only, Python 3.10.

The policy is not trusted. What is malformed is refused whole, and the arm holds its position; what is
well formed but too large is clamped. A stop is never a command of zeros: for an absolute interface
zeros are a place to go to. Every verdict names its rule:

    rule           decision   when
    type           HOLD       not an array of numbers
    shape          HOLD       not exactly (A,)
    not_finite     HOLD       a NaN or an infinity anywhere
    limits         CLAMP      outside the ActionSpec's limits
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import numpy as np

from vla.types import ActionChunk, ActionSpec, Decision, Verdict, frozen


def check(action: object, spec: ActionSpec) -> Verdict:
    """Whether one action (A,) may be sent to a robot with this `spec`. Raises nothing."""
    rule = _malformed(action, (spec.dim,))
    if rule:
        return Verdict(Decision.HOLD, None, rule)
    wanted = np.array(action, np.float32)
    low, high = _limits(spec)
    command = np.clip(wanted, low, high)
    if np.array_equal(command, wanted):
        return Verdict(Decision.PASS, frozen(command), "")
    return Verdict(Decision.CLAMP, frozen(command), "limits")


def refuse_chunk(chunk: object, spec: ActionSpec, stamp_s: float) -> str:
    """The rule by which a whole chunk is refused, or "" if its rows may be tried one by one.

    Rows that would never be executed count as well: a policy that plans a NaN is broken now.

    Args:
        chunk: the policy's answer.
        spec: the robot's actions; rows must be (A,), one per control step.
        stamp_s: stamp of the observation that was asked about; an answer to another one is stale.
    """
    if not isinstance(chunk, ActionChunk):
        return "not_a_chunk"
    rule = _malformed(chunk.actions, (len(chunk.actions), spec.dim))
    if rule:
        return rule
    if not abs(chunk.period_s * spec.rate_hz - 1) < 1e-6:  # also refuses a NaN
        return "period"
    return "" if chunk.stamp_s == stamp_s else "stale"


def count(tally: Counter[str], verdict: Verdict) -> None:
    """Add `verdict` to `tally` as "pass" or "<decision>:<rule>"."""
    tally[f"{verdict.decision.value}:{verdict.rule}" if verdict.rule else verdict.decision.value] += 1


def _malformed(values: object, shape: tuple[int, ...]) -> str:
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        return "type"
    if values.shape != shape:
        return "shape"
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes an infinity, and is refused
        return "" if np.isfinite(values.astype(np.float32)).all() else "not_finite"


@lru_cache(maxsize=16)
def _limits(spec: ActionSpec) -> tuple[np.ndarray, np.ndarray]:
    """The limits as float32, rounded inwards: 0.1 as float32 is more than 0.1."""
    low, high = np.asarray(spec.low, np.float64), np.asarray(spec.high, np.float64)
    low32, high32 = low.astype(np.float32), high.astype(np.float32)
    low32 = np.where(low32 < low, np.nextafter(low32, np.float32(np.inf)), low32)
    high32 = np.where(high32 > high, np.nextafter(high32, np.float32(-np.inf)), high32)
    return frozen(low32), frozen(high32)
