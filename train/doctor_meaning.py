"""The doctor's checks of what actions mean: do the numbers behave as the recipe says they do?

All of this is concluded from how actions and states move together, so each finding is a `warning`.
"""

from collections.abc import Iterator

import numpy as np

from train.doctor_numbers import MIN_FRAMES, columns_of, finite_rows
from train.findings import Finding
from train.raw_table import RawTable, Span
from vla.codec import CONSTANT
from vla.types import ActionSpec

LAGS = range(4)  # frames by which a state may follow its action
GRIPPER_LAGS = range(12)  # a gripper takes longer to open
GRIPPER_NAMES = ("grip", "jaw", "finger")


def references(table: RawTable) -> Iterator[Finding]:
    """Absolute actions that look like deltas of the state, the reverse, and other units than the state's."""
    pair = list(columns_of(table))
    if len(pair) != 2:
        return
    state, action = pair
    for a, s in _matches(action.spec, state.spec):
        now, then, follow = _transitions(table.spans, state.values[:, s], action.values[:, a])
        if len(now) < MIN_FRAMES or min(np.ptp(now), np.ptp(then), np.ptp(follow)) < CONSTANT:
            continue
        declared, spread = action.spec.reference[a], float(np.std(then))
        level = _correlation(follow, then)
        apart = float(np.sqrt(np.mean(np.square(follow - then)))) / spread  # action against the state it leads to
        change = max(_lagged(table.spans, action.values[:, a], state.values[:, s], lag) for lag in LAGS)
        evidence = f"correlation with the next state {level:.2f}, with the state's change {change:.2f}"
        scale = float(np.polyfit(then, follow, 1)[0])
        if declared == "absolute" and change > 0.6 and change > abs(level) + 0.2 and apart > 0.5:
            found, why = "declared absolute, but looks like a delta", "the robot would drive to a point near zero"
        elif declared == "delta" and level > 0.9 and change < level - 0.2 and apart < 0.5:
            found, why = "declared a delta, but looks like an absolute target", "the robot would run to its limits"
        elif declared == "absolute" and level > 0.95 and not 0.5 < scale < 2:
            found, why = f"follows the state times {scale:.3g}", "state and action seem to have different units"
        else:
            continue
        yield Finding(
            "warning", "action meaning", f"{found} ({evidence}).", f"If so, {why}.",
            "Look at one episode; correct reference or units in the recipe's action.spec.", column=action.name(a),
        )  # fmt: skip


def grippers(table: RawTable) -> Iterator[Finding]:
    """The sign of the gripper against the state's, and how much of its range is used."""
    pair = list(columns_of(table))
    if len(pair) != 2:
        return
    state, action = pair
    hands = [[d for d, n in enumerate(c.spec.names) if any(g in n.lower() for g in GRIPPER_NAMES)] for c in pair]
    for d in hands[1]:
        low, high = action.spec.low[d], action.spec.high[d]
        used = finite_rows(table, action)[:, d]
        one_sided = low < 0 < high and (used.min() >= 0 or used.max() <= 0)
        if np.ptp(used) > CONSTANT and (one_sided or np.ptp(used) < 0.1 * (high - low)):
            yield Finding(
                "warning",
                "gripper range",
                f"the commands lie in [{used.min():.3g}, {used.max():.3g}], the limits are [{low:g}, {high:g}].",
                "A gripper that uses half of its range seems never to open or never to close.",
                "Check whether the data means 0..1 where the robot wants -1..1 (or 0..100), and correct the limits.",
                column=action.name(d),
            )
        if action.spec.gripper == "none":
            yield Finding("info", "gripper convention", "action.spec.gripper is 'none'.",
                          "Nobody can tell whether a high value opens or closes it.",
                          "Set it to open_high or close_high.", column=action.name(d))  # fmt: skip
    if len(hands[0]) != len(hands[1]) or "none" in (state.spec.gripper, action.spec.gripper):
        return
    for s, d in zip(*hands, strict=True):
        follows = [_lagged_level(table.spans, action.values[:, d], state.values[:, s], lag) for lag in GRIPPER_LAGS]
        found = max(follows, key=abs)
        expected = 1 if state.spec.gripper == action.spec.gripper else -1
        if found * expected < -0.4:
            yield Finding(
                "warning",
                "gripper sign",
                f"a high command leads to a {'high' if found > 0 else 'low'} state (correlation {found:.2f}), but the "
                f"recipe says action {action.spec.gripper}, state {state.spec.gripper}.",
                "The gripper would open where it should close.",
                "Correct 'gripper' in the recipe's action.spec or state.spec.",
                column=action.name(d),
            )


def _matches(action: ActionSpec, state: ActionSpec) -> list[tuple[int, int]]:
    """(action dimension, state dimension) that describe the same joint or axis; grippers left out."""

    def plain(name: str) -> str:
        group, _, last = name.rpartition(".")
        return f"{group}.{last.removeprefix('delta_').removeprefix('target_')}"

    places = {plain(name): i for i, name in enumerate(state.names)}
    found = []
    for a, name in enumerate(action.names):
        group, _, last = plain(name).rpartition(".")
        s = places.get(plain(name), places.get(f"{group}.{last.removeprefix('d')}"))
        if s is not None and not any(g in name.lower() for g in GRIPPER_NAMES):
            found.append((a, s))
    return found


def _transitions(spans: tuple[Span, ...], state: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, ...]:
    """(n,) state, next state and action of all frames that have a next one, finite ones only."""
    inside = [slice(s.start, s.stop - 1) for s in spans if s.length > 1]
    rows = np.concatenate([np.arange(i.start, i.stop) for i in inside] or [np.arange(0)])
    triples = np.stack([state[rows], state[rows + 1], action[rows]])
    return tuple(triples[:, np.isfinite(triples).all(axis=0)])


def _lagged(spans: tuple[Span, ...], action: np.ndarray, state: np.ndarray, lag: int) -> float:
    """Correlation of actions with the state's change `lag` frames later."""
    pairs = [(action[s.rows][: s.length - 1 - lag], np.diff(state[s.rows])[lag:]) for s in spans if s.length > lag + 1]
    return _correlation_of(pairs)


def _lagged_level(spans: tuple[Span, ...], action: np.ndarray, state: np.ndarray, lag: int) -> float:
    """Correlation of actions with the state `lag` frames later."""
    pairs = [(action[s.rows][: s.length - lag], state[s.rows][lag:]) for s in spans if s.length > lag]
    return _correlation_of(pairs)


def _correlation_of(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    if not pairs:
        return 0.0
    return _correlation(*(np.concatenate(side) for side in zip(*pairs, strict=True)))


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; 0 when there is too little to say."""
    good = np.isfinite(x) & np.isfinite(y)
    x, y = x[good], y[good]
    if len(x) < MIN_FRAMES or np.ptp(x) < CONSTANT or np.ptp(y) < CONSTANT:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


CHECKS = (references, grippers)
