import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vla.errors import SpecMismatch, TandemError
from vla.stats import Moments, Statistics
from vla.types import ActionSpec

NAMES = ("mean", "std", "min", "max", "q01", "q10", "q50", "q90", "q99")


def spec(dim: int) -> ActionSpec:
    return ActionSpec(
        names=tuple("abcdef"[:dim]),
        units=("m",) * dim,
        reference=("absolute",) * dim,
        low=(-1.0,) * dim,
        high=(1.0,) * dim,
        rate_hz=10.0,
    )


def moments(dim: int, **changes: Any) -> Moments:
    values: dict[str, Any] = {name: np.arange(dim) + i / 3 for i, name in enumerate(NAMES)}
    return Moments(count=7, **(values | changes))


STATISTICS = Statistics(spec(3), spec(2), moments(3), moments(2), source="set@1")


def test_statistics_survive_json_bit_for_bit() -> None:
    again = Statistics.from_json(json.loads(json.dumps(STATISTICS.to_json())))
    assert again.to_json() == STATISTICS.to_json()
    assert again.action.q99.dtype == np.float64
    np.testing.assert_array_equal(again.state.std, STATISTICS.state.std)


@pytest.mark.parametrize("name", NAMES)
def test_a_number_that_is_not_finite_is_refused(name: str) -> None:
    with pytest.raises(TandemError, match=f"'{name}' hold a number that is not finite"):
        moments(2, **{name: np.array([0.0, np.nan])})


def test_shapes_must_agree() -> None:
    with pytest.raises(TandemError, match=r"'q50' have shape \(3,\), expected \(2,\)"):
        moments(2, q50=np.zeros(3))
    with pytest.raises(TandemError, match=r"'mean' have shape \(1, 2\)"):
        moments(2, mean=np.zeros((1, 2)))
    with pytest.raises(TandemError, match="Statistics of state have 2 dimensions, its ActionSpec has 3"):
        replace(STATISTICS, state=moments(2))
    with pytest.raises(TandemError, match="Statistics of action have 3 dimensions, its ActionSpec has 2"):
        replace(STATISTICS, action=moments(3))


def test_arrays_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        STATISTICS.state.mean[0] = 1


def test_they_are_refused_for_foreign_numbers() -> None:
    STATISTICS.require_for(spec(3), spec(2), "recipe b")
    with pytest.raises(SpecMismatch, match=r"action of statistics from set@1 and of recipe b.*\n  units"):
        STATISTICS.require_for(spec(3), replace(spec(2), units=("rad", "m")), "recipe b")
    with pytest.raises(SpecMismatch, match=r"state of statistics from set@1 and of recipe b.*\n  rate_hz"):
        STATISTICS.require_for(replace(spec(3), rate_hz=20.0), spec(2), "recipe b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2; this release reads 1"),
        ({"version": None}, "version None"),
        ({"surplus": 1}, "surplus"),
        ({"state": {"count": 1}}, "expected.*q01"),
    ],
)
def test_a_damaged_file_is_an_error_that_says_so(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TandemError, match=message):
        Statistics.from_json(STATISTICS.to_json() | change)
    with pytest.raises(TandemError, match="expected"):
        Statistics.from_json({k: v for k, v in STATISTICS.to_json().items() if k != "source"})
