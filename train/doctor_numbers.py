"""The doctor's checks of states and actions one dimension at a time: finite, moving, within the limits."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from train.findings import Finding
from train.raw_table import RawTable
from vla.codec import CONSTANT
from vla.types import ActionSpec

MIN_FRAMES = 20  # fewer say nothing about a distribution
OUTLIER = 10  # times the half range of the central 98 % away from its middle
IDLE_STEP = 0.005  # of a dimension's standard deviation a frame


@dataclass(frozen=True)
class Column:
    """A vector column that fits its spec."""

    key: str
    spec: ActionSpec
    values: np.ndarray  # (N, dim) float64

    def name(self, d: int) -> str:
        return f"{self.key} {self.spec.names[d]!r}"


def columns_of(table: RawTable) -> Iterator[Column]:
    for vector, values in ((table.recipe.state, table.state), (table.recipe.action, table.action)):
        if values is not None and values.shape[1] == vector.spec.dim and len(table.kept):
            yield Column(vector.key, vector.spec, values)


def finite_rows(table: RawTable, column: Column) -> np.ndarray:
    """(n, dim) kept rows that are finite."""
    rows = column.values[table.kept]
    return rows[np.isfinite(rows).all(axis=1)]


def finite(table: RawTable) -> Iterator[Finding]:
    for column in columns_of(table):
        bad = ~np.isfinite(column.values)  # (N, dim)
        spans = [s for s in table.spans if bad[s.rows].any()]
        if spans:
            kept = bad[table.kept]
            dims = np.flatnonzero(kept.any(axis=0))
            yield Finding(
                "error",
                "not finite",
                f"{kept.any(axis=1).sum()} frames hold NaN or infinity, in {[column.spec.names[d] for d in dims]}.",
                "One such number makes every weight of the network NaN.",
                "Repair the data, or list the episodes in the recipe's split.exclude.",
                tuple(s.episode for s in spans),
                frame=int(np.argmax(bad[spans[0].rows].any(axis=1))),
                column=column.key,
            )


def constant(table: RawTable) -> Iterator[Finding]:
    for column in columns_of(table):
        rows = finite_rows(table, column)
        for d in np.flatnonzero(np.ptp(rows, axis=0) < CONSTANT) if len(rows) > 1 else ():
            yield Finding(
                "warning",
                "constant dimension",
                f"it is {rows[0, d]:.6g} in every frame.",
                "A policy learns nothing from it and can never produce another value.",
                "Check the cable, the topic or the conversion. If it is meant to be so, leave it: a constant "
                "dimension is only shifted, never divided by its spread.",
                column=column.name(int(d)),
            )


def limits(table: RawTable) -> Iterator[Finding]:
    for column in columns_of(table):
        rows = finite_rows(table, column)
        for d in range(column.spec.dim):
            low, high = column.spec.low[d], column.spec.high[d]
            slack = 1e-3 * (high - low) if np.isfinite(high - low) else 0.0
            outside = (rows[:, d] < low - slack) | (rows[:, d] > high + slack)
            if outside.any():
                share = outside.mean()
                yield Finding(
                    "error" if share > 0.5 else "warning",
                    "outside the limits",
                    f"{share:.1%} of the frames lie outside [{low:g}, {high:g}] {column.spec.units[d]}; they span "
                    f"[{rows[:, d].min():.4g}, {rows[:, d].max():.4g}].",
                    "The limits are enforced on the robot: it could not do what was demonstrated. Often a wrong unit "
                    "(degrees for radians, millimetres for metres).",
                    "Correct units, low and high in the recipe's spec, or the conversion.",
                    column=column.name(d),
                )


def outliers(table: RawTable) -> Iterator[Finding]:
    for column in columns_of(table):
        rows = finite_rows(table, column)
        if len(rows) < MIN_FRAMES:
            continue
        q01, q99 = np.quantile(rows, [0.01, 0.99], axis=0)
        half, middle = (q99 - q01) / 2, (q99 + q01) / 2
        far = np.abs(rows - middle) / np.where(half < CONSTANT, np.inf, half)
        for d in np.flatnonzero(far.max(axis=0) > OUTLIER):
            yield Finding(
                "warning",
                "outliers",
                f"{int((far[:, d] > OUTLIER).sum())} frames lie over {OUTLIER} times the usual half range from its "
                f"middle, up to {rows[np.argmax(far[:, d]), d]:.4g}; 98 % of the frames lie in "
                f"[{q01[d]:.4g}, {q99[d]:.4g}].",
                "After normalisation they are huge and dominate the loss. Often a sensor that dropped out, or an "
                "angle that wrapped around.",
                "Repair these frames or exclude their episodes.",
                column=column.name(int(d)),
            )


def idle(table: RawTable) -> Iterator[Finding]:
    state = next((c for c in columns_of(table) if c.key == table.recipe.state.key), None)
    if state is None or len(rows := finite_rows(table, state)) < MIN_FRAMES:
        return
    spread = np.where(rows.std(axis=0) < CONSTANT, np.inf, rows.std(axis=0))
    with np.errstate(invalid="ignore"):  # infinities, which have a finding of their own
        steps = np.concatenate([np.abs(np.diff(state.values[s.rows], axis=0)) / spread for s in table.spans])
    share = float((steps.max(axis=1) < IDLE_STEP).sum() / max(1, len(steps)))
    if share > 0.2:
        yield Finding(
            "warning" if share > 0.5 else "info",
            "idle frames",
            f"the robot stands still in {share:.0%} of the frames.",
            "Idle frames teach idleness: the policy hovers at the start.",
            "Cut the waiting at the beginning and the end of the episodes.",
        )


CHECKS = (finite, constant, limits, outliers, idle)
