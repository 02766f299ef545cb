"""Physical units <-> the model's units, exactly invertible. numpy only."""

from typing import Literal

import numpy as np

from vla.errors import TandemError
from vla.stats import Moments, Statistics
from vla.types import ActionSpec

Normalization = Literal["mean_std", "quantile", "identity"]
CONSTANT = 1e-6  # a dimension whose spread is below this is only shifted: dividing would blow noise up


def scale_and_shift(moments: Moments, normalization: Normalization) -> tuple[np.ndarray, np.ndarray]:
    """(scale, shift), each (dim,) float64, of `model = (physical - shift) / scale`.

    mean_std: zero mean, unit standard deviation. quantile: q01 -> -1, q99 -> 1, not clipped (pi0.5).
    """
    if normalization == "identity":
        return np.ones_like(moments.mean), np.zeros_like(moments.mean)
    if normalization == "mean_std":
        scale, shift = moments.std, moments.mean
    else:
        scale, shift = (moments.q99 - moments.q01) / 2, (moments.q99 + moments.q01) / 2
    return np.where(scale < CONSTANT, 1.0, scale), shift


class Codec:
    """Normalises and pads states and actions for the model, and undoes it.

    Args:
        statistics: of the data the model learns from, with the specs of both vectors.
        normalization: how physical values become model values.
        state_dim, action_dim: the model's padded widths, at least the specs' dimensions.
    """

    def __init__(self, statistics: Statistics, normalization: Normalization, state_dim: int, action_dim: int) -> None:
        for name, dim, spec in (
            ("state_dim", state_dim, statistics.state_spec),
            ("action_dim", action_dim, statistics.action_spec),
        ):
            if spec.dim > dim:
                raise TandemError(
                    f"The model's {name} is {dim}, but the data has {spec.dim}: {spec.names}. Raise policy.{name}."
                )
        self.statistics = statistics
        self.state_dim, self.action_dim = state_dim, action_dim
        self._state_scale, self._state_shift = scale_and_shift(statistics.state, normalization)
        self._action_scale, self._action_shift = scale_and_shift(statistics.action, normalization)

    @property
    def state_spec(self) -> ActionSpec:
        return self.statistics.state_spec

    @property
    def action_spec(self) -> ActionSpec:
        return self.statistics.action_spec

    def encode_state(self, state: np.ndarray) -> np.ndarray:
        """(..., S) physical -> (..., state_dim) float32 model units, zero-padded."""
        return _pad((state - self._state_shift) / self._state_scale, self.state_dim)

    def encode_actions(self, actions: np.ndarray) -> np.ndarray:
        """(..., A) physical -> (..., action_dim) float32 model units, zero-padded."""
        return _pad((actions - self._action_shift) / self._action_scale, self.action_dim)

    def decode_actions(self, actions: np.ndarray) -> np.ndarray:
        """(..., action_dim) model units -> (..., A) float32 physical. Not clipped to the limits."""
        real = actions[..., : self.action_spec.dim].astype(np.float64)
        return (real * self._action_scale + self._action_shift).astype(np.float32)

    def dim_mask(self) -> np.ndarray:
        """(action_dim,) bool, true for real action dimensions."""
        return np.arange(self.action_dim) < self.action_spec.dim


def _pad(values: np.ndarray, dim: int) -> np.ndarray:
    padded = np.zeros((*values.shape[:-1], dim), np.float32)
    padded[..., : values.shape[-1]] = values
    return padded
