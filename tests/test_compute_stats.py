from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train import compute_stats
from train.compute_stats import QUANTILES, Running, summarise
from train.dataset import LeRobotSource
from train.recipe import Recipe, Vector
from vla.errors import DataError, SpecMismatch, TandemError
from vla.stats import Moments


def by_numpy(x: np.ndarray) -> dict[str, np.ndarray]:
    """The definition, on (N, dim) float64."""
    moments = {"mean": x.mean(0), "std": x.std(0), "min": x.min(0), "max": x.max(0)}
    return moments | {name: np.quantile(x, q, axis=0) for name, q in QUANTILES.items()}


def assert_same(found: Moments, expected: dict[str, np.ndarray], rtol: float = 1e-12) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=rtol, atol=1e-12, err_msg=name)


def test_known_answers() -> None:
    x = np.arange(101, dtype=np.float32)[:, None] * [1, -2]
    found = summarise([x])
    assert found.count == 101
    assert found.mean.tolist() == [50, -100]
    np.testing.assert_allclose(found.std, np.sqrt((101**2 - 1) / 12) * np.array([1, 2]))
    assert (found.min.tolist(), found.max.tolist()) == ([0, -200], [100, 0])
    np.testing.assert_allclose(found.q01, [1, -198])
    np.testing.assert_allclose(found.q10, [10, -180])
    np.testing.assert_allclose(found.q50, [50, -100])
    np.testing.assert_allclose(found.q90, [90, -20])
    np.testing.assert_allclose(found.q99, [99, -2])


lengths = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)


@given(lengths, st.integers(1, 4), st.integers(0, 2**32 - 1), st.sampled_from([np.float32, np.float64]))
def test_parts_give_what_numpy_gives_of_the_whole(sizes: list[int], dim: int, seed: int, dtype: type) -> None:
    rng = np.random.default_rng(seed)
    parts = [(rng.normal(rng.normal(0, 50), 3, (n, dim))).astype(dtype) for n in sizes]
    assert_same(summarise(parts), by_numpy(np.concatenate(parts).astype(np.float64)), rtol=1e-9)


@given(lengths, st.integers(0, 2**32 - 1))
def test_the_order_of_parts_does_not_matter(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.normal(rng.normal(0, 50), 3, (n, 2)) for n in sizes]
    shuffled = [parts[i] for i in rng.permutation(len(parts))]
    found, other = summarise(parts), summarise(shuffled)
    for name in ("count", "min", "max", *QUANTILES):
        np.testing.assert_array_equal(getattr(found, name), getattr(other, name))
    np.testing.assert_allclose(found.mean, other.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.std, other.std, rtol=1e-12)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_merging_is_associative(a: int, b: int, c: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y, z = (Running.of(rng.normal(0, 10, (n, 2))) for n in (a, b, c))
    left, right = x.merge(y).merge(z), x.merge(y.merge(z))
    for f in fields(Running):
        np.testing.assert_allclose(getattr(left, f.name), getattr(right, f.name), rtol=1e-12, atol=1e-12)


def test_a_large_offset_costs_no_precision() -> None:
    """The textbook formula E[x^2] - E[x]^2 gives 0 or a negative variance here."""
    x = 1e9 + np.random.default_rng(0).normal(0, 1e-3, (3000, 1))
    assert_same(summarise(np.array_split(x, 30)), by_numpy(x), rtol=1e-4)


def test_float32_rows_are_summed_in_float64() -> None:
    x = np.full((200_000, 1), 0.1, np.float32)  # float32 sums drift by 1e-4 here
    found = summarise([x])
    assert found.mean[0] == pytest.approx(float(np.float32(0.1)), rel=1e-12)
    assert found.std[0] < 1e-9


def test_episode_quantiles_are_not_averaged() -> None:
    """200 episodes at different places: a mean of their q01 and q99 leaves most frames outside the range."""
    rng = np.random.default_rng(0)
    episodes = [rng.normal(rng.normal(0, 0.30), 0.05, (150, 1)) for _ in range(200)]
    whole = np.concatenate(episodes)
    averaged = [np.mean([np.quantile(e, q) for e in episodes]) for q in (0.01, 0.99)]

    def outside(low: float, high: float) -> float:
        return float(np.mean((whole < low) | (whole > high)))

    found = summarise(episodes)
    assert outside(float(averaged[0]), float(averaged[1])) > 0.6  # what must not be inherited
    assert outside(found.q01[0], found.q99[0]) == pytest.approx(0.02, abs=1e-3)


def test_a_gripper_that_seldom_closes_keeps_its_range() -> None:
    episodes = [np.zeros((150, 1)) for _ in range(70)] + [np.ones((150, 1)) for _ in range(30)]
    found = summarise(episodes)
    assert (found.q01[0], found.q50[0], found.q99[0]) == (0, 0, 1)  # a mean of episode quantiles says q99 = 0.30


def test_blocks_are_cut_without_losing_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(0, 1, (103, 2))
    whole = summarise([x])
    monkeypatch.setattr(compute_stats, "BLOCK", 10)
    assert_same(summarise([x]), {name: getattr(whole, name) for name in ("mean", "std", "min", "max", "q01")})


@pytest.mark.parametrize("parts", [[], [np.zeros((0, 2))]])
def test_no_frames_is_an_error(parts: list[np.ndarray]) -> None:
    with pytest.raises(DataError, match="at least one frame"):
        summarise(parts)


def test_different_widths_are_an_error() -> None:
    with pytest.raises(DataError, match=r"one width, got \[2, 3\]"):
        summarise([np.zeros((1, 2)), np.zeros((1, 3))])


def test_a_number_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(TandemError, match="not finite"):
        summarise([np.array([[1.0], [np.nan]])])


def test_of_a_data_set_and_back_from_its_file(video_recipe: Recipe, tmp_path: Path) -> None:
    source = LeRobotSource(video_recipe, 1, "train")
    found = compute_stats.compute([source])
    states, actions = source.statistics_arrays()
    assert_same(found.state, by_numpy(states.astype(np.float64)))
    assert_same(found.action, by_numpy(actions.astype(np.float64)))
    assert found.source == f"small@{source.revision}"
    compute_stats.write(found, tmp_path / "a" / "statistics.json")
    assert compute_stats.read(tmp_path / "a" / "statistics.json").to_json() == found.to_json()


def test_several_data_sets_count_as_one(video_recipe: Recipe) -> None:
    source = LeRobotSource(video_recipe, 1, "train")
    one, two = compute_stats.compute([source]), compute_stats.compute([source, source])
    assert two.state.count == 2 * one.state.count
    np.testing.assert_allclose(two.state.std, one.state.std)


def test_foreign_numbers_are_not_mixed(video_recipe: Recipe, recipe_of: Callable[..., Recipe]) -> None:
    action = replace(video_recipe.action.spec, units=("rad", "rad"))
    other = replace(video_recipe, name="other", action=Vector("action", action))
    with pytest.raises(SpecMismatch, match="actions of recipes other and small differ"):
        compute_stats.compute([LeRobotSource(r, 1, "train") for r in (video_recipe, other)])


@pytest.mark.parametrize("content", [None, "{", '{"version": 1}'])
def test_a_damaged_file_is_an_error_with_advice(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "statistics.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TandemError, match=r"vla-data stats|Compute them anew"):
        compute_stats.read(path)
