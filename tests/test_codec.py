from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from vla.codec import CONSTANT, Codec, Normalization, scale_and_shift
from vla.errors import TandemError
from vla.stats import Moments, Statistics
from vla.types import ActionSpec

NORMALIZATIONS = get_args(Normalization)


def spec(dim: int) -> ActionSpec:
    return ActionSpec(
        names=tuple("abcdef"[:dim]),
        units=("m",) * dim,
        reference=("absolute",) * dim,
        low=(-1.0,) * dim,
        high=(1.0,) * dim,
        rate_hz=10.0,
    )


def measured(values: np.ndarray) -> Moments:
    """Moments of (N, dim)."""
    x = values.astype(np.float64)
    q = np.quantile(x, [0.01, 0.1, 0.5, 0.9, 0.99], axis=0)
    return Moments(len(x), x.mean(0), x.std(0), x.min(0), x.max(0), *q)


def codec(states: np.ndarray, actions: np.ndarray, normalization: Normalization, dim: int = 6) -> Codec:
    statistics = Statistics(
        spec(states.shape[1]), spec(actions.shape[1]), measured(states), measured(actions), source="test"
    )
    return Codec(statistics, normalization, state_dim=dim, action_dim=dim)


# Each dimension: an offset and a spread from none (constant) to large.
columns = st.lists(
    st.tuples(st.floats(-100, 100), st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 100.0])), min_size=1, max_size=6
)


@given(columns, st.integers(0, 2**32 - 1), st.sampled_from(NORMALIZATIONS))
def test_decoding_undoes_encoding(dims: list[tuple[float, float]], seed: int, normalization: Normalization) -> None:
    offset, spread = np.array(dims).T
    actions = offset + spread * np.random.default_rng(seed).standard_normal((50, len(dims)))
    c = codec(actions, actions, normalization)
    tolerance = 1e-6 * (np.abs(offset) + spread + 1)  # float32 in between
    assert (np.abs(c.decode_actions(c.encode_actions(actions)) - actions) <= tolerance).all()


@given(npst.arrays(np.float32, (4, 5, 6), elements=st.floats(-10, 10, width=32)), st.sampled_from(NORMALIZATIONS))
def test_encoding_undoes_decoding_of_full_width(model: np.ndarray, normalization: Normalization) -> None:
    data = np.random.default_rng(0).normal(3, 2, (100, 6))
    c = codec(data, data, normalization)
    np.testing.assert_allclose(c.encode_actions(c.decode_actions(model)), model, atol=1e-5)


def test_mean_std_gives_zero_mean_and_unit_spread() -> None:
    data = np.random.default_rng(0).normal([5, -3], [0.1, 20], (4000, 2))
    encoded = codec(data, data, "mean_std", dim=2).encode_state(data)
    np.testing.assert_allclose(encoded.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(encoded.std(0), 1, atol=1e-5)


def test_quantiles_go_to_minus_one_and_one_and_beyond_is_not_clipped() -> None:
    data = np.random.default_rng(0).uniform(2, 8, (4000, 1))
    c = codec(data, data, "quantile", dim=1)
    moments = c.statistics.action
    assert c.encode_actions(moments.q01[None])[0, 0] == pytest.approx(-1)
    assert c.encode_actions(moments.q99[None])[0, 0] == pytest.approx(1)
    assert c.encode_actions(np.array([[20.0]]))[0, 0] > 3


def test_identity_changes_nothing() -> None:
    data = np.random.default_rng(0).normal(3, 2, (10, 3)).astype(np.float32)
    np.testing.assert_array_equal(codec(data, data, "identity", dim=3).encode_actions(data), data)


@pytest.mark.parametrize("normalization", ["mean_std", "quantile"])
def test_a_constant_dimension_is_only_shifted(normalization: Normalization) -> None:
    data = np.full((20, 1), 0.7)
    scale, shift = scale_and_shift(measured(data), normalization)
    assert (scale[0], shift[0]) == (1.0, pytest.approx(0.7))
    c = codec(data, data, normalization)
    assert np.abs(c.encode_actions(data)).max() < 1e-6
    assert c.encode_actions(data + 0.1)[0, 0] == pytest.approx(0.1)  # not 0.1 / 1e-8


def test_the_floor_is_where_it_is_documented() -> None:
    data = np.array([[0.0], [1.0]])
    for factor, constant in ((0.5, True), (2.0, False)):
        scale, _ = scale_and_shift(replace(measured(data), std=np.array([CONSTANT * factor])), "mean_std")
        assert bool(scale[0] == 1) is constant


def test_padding_is_zero_and_the_mask_tells_it_apart() -> None:
    data = np.random.default_rng(0).normal(3, 2, (10, 2))
    c = codec(data, data, "mean_std", dim=5)
    encoded = c.encode_actions(np.broadcast_to(data[:, None], (10, 4, 2)))
    assert encoded.shape == (10, 4, 5)
    assert encoded.dtype == np.float32
    assert (encoded[..., 2:] == 0).all()
    assert c.dim_mask().tolist() == [True, True, False, False, False]
    assert c.encode_state(data[0]).shape == (5,)
    noisy = encoded + np.array([0, 0, 9, 9, 9], np.float32)  # what a model may put into padded dimensions
    np.testing.assert_array_equal(c.decode_actions(noisy), c.decode_actions(encoded))
    assert c.decode_actions(encoded).shape == (10, 4, 2)


def test_state_and_action_have_statistics_of_their_own() -> None:
    rng = np.random.default_rng(0)
    c = codec(rng.normal(100, 5, (500, 1)), rng.normal(0, 1, (500, 1)), "mean_std")
    assert abs(c.encode_state(np.array([100.0]))[0]) < 0.5
    assert abs(c.encode_actions(np.array([0.0]))[0]) < 0.5


def test_a_model_that_is_too_narrow_is_refused() -> None:
    data = np.zeros((3, 4)) + np.arange(3)[:, None]
    with pytest.raises(TandemError, match=r"state_dim is 2, but the data has 4.*Raise policy.state_dim"):
        codec(data, data[:, :2], "mean_std", dim=2)
    with pytest.raises(TandemError, match=r"action_dim is 2, but the data has 4.*Raise policy.action_dim"):
        codec(data[:, :2], data, "mean_std", dim=2)
