"""Data-set statistics that belong to one meaning of the numbers. numpy only.

`train.compute_stats` makes them; the codec uses them; a checkpoint carries them. They name the
`ActionSpec` they were computed for and are refused for any other.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from vla.errors import TandemError
from vla.types import ActionSpec, frozen, require_same

VERSION = 1


@dataclass(frozen=True)
class Moments:
    """Statistics of one vector feature over all frames; every array is (dim,) float64."""

    count: int  # frames
    mean: np.ndarray
    std: np.ndarray  # population standard deviation
    min: np.ndarray
    max: np.ndarray
    q01: np.ndarray  # true quantiles over all frames, not means of episode quantiles
    q10: np.ndarray
    q50: np.ndarray
    q90: np.ndarray
    q99: np.ndarray

    def __post_init__(self) -> None:
        dim = np.shape(self.mean)
        for name, value in asdict(self).items():
            if name == "count":
                continue
            if value.shape != dim or len(dim) != 1:
                raise TandemError(f"Statistics {name!r} have shape {value.shape}, expected {dim}.")
            if not np.isfinite(value).all():
                raise TandemError(f"Statistics {name!r} hold a number that is not finite: {value}.")
            object.__setattr__(self, name, frozen(value))

    def to_json(self) -> dict[str, Any]:
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Moments":
        _require_keys("Statistics of a vector", data, {f.name for f in fields(cls)})
        values: dict[str, Any] = {k: np.asarray(v, np.float64) for k, v in data.items() if k != "count"}
        return cls(count=data["count"], **values)


@dataclass(frozen=True)
class Statistics:
    """Moments of state and action, with the meaning of both."""

    state_spec: ActionSpec
    action_spec: ActionSpec
    state: Moments
    action: Moments
    source: str  # data set and revision they were computed from

    def __post_init__(self) -> None:
        for name in ("state", "action"):
            dim, expected = len(getattr(self, name).mean), getattr(self, f"{name}_spec").dim
            if dim != expected:
                raise TandemError(f"Statistics of {name} have {dim} dimensions, its ActionSpec has {expected}.")

    def require_for(self, state_spec: ActionSpec, action_spec: ActionSpec, what: str) -> None:
        """Raise `SpecMismatch` unless these are statistics of exactly this state and action."""
        require_same(self.state_spec, state_spec, f"state of statistics from {self.source} and of {what}")
        require_same(self.action_spec, action_spec, f"action of statistics from {self.source} and of {what}")

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "source": self.source,
            "state_spec": self.state_spec.to_json(),
            "action_spec": self.action_spec.to_json(),
            "state": self.state.to_json(),
            "action": self.action.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Statistics":
        if data.get("version") != VERSION:
            raise TandemError(f"Statistics have version {data.get('version')!r}; this release reads {VERSION}.")
        _require_keys("Statistics", data, {"version", *(f.name for f in fields(cls))})
        return cls(
            state_spec=ActionSpec.from_json(data["state_spec"]),
            action_spec=ActionSpec.from_json(data["action_spec"]),
            state=Moments.from_json(data["state"]),
            action=Moments.from_json(data["action"]),
            source=data["source"],
        )


def _require_keys(what: str, data: Mapping[str, Any], keys: set[str]) -> None:
    if set(data) != keys:
        raise TandemError(f"{what} hold the keys {sorted(data)}, expected {sorted(keys)}. Compute them anew.")
