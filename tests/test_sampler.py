"""Epochs, mixtures and purity of the order in which samples come."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.sampler import BLOCK, MixtureSampler, _shares
from vla.errors import UsageError


@given(n=st.integers(1, 60), seed=st.integers(0, 2**40), epoch=st.integers(0, 200))
def test_each_epoch_visits_every_frame_once(n: int, seed: int, epoch: int) -> None:
    _, frame = MixtureSampler([n], [1.0], seed).draw(epoch * n, n)
    assert sorted(frame.tolist()) == list(range(n))


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    cut=st.integers(1, 99),
    first=st.integers(0, 3 * BLOCK),
)
def test_any_division_draws_the_same_samples(lengths: list[int], seed: int, cut: int, first: int) -> None:
    weights = [1.0 + i for i in range(len(lengths))]
    whole = MixtureSampler(lengths, weights, seed).draw(first, 100)
    other = MixtureSampler(lengths, weights, seed)
    late = other.draw(first + cut, 100 - cut)
    early = other.draw(first, cut)
    for field in (0, 1):
        assert np.array_equal(whole[field], np.concatenate([early[field], late[field]]))


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.01, 100), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_members_of_a_mixture_have_epochs_of_their_own(lengths: list[int], weights: list[float], seed: int) -> None:
    member, frame = MixtureSampler(lengths, weights[: len(lengths)], seed).draw(0, 2 * BLOCK)
    for m, n in enumerate(lengths):
        visits = frame[member == m]
        for start in range(0, len(visits) - n + 1, n):
            assert len(set(visits[start : start + n].tolist())) == n


@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8))
def test_shares_keep_the_weights(weights: list[float]) -> None:
    shares = _shares(np.array(weights))
    exact = np.array(weights) / sum(weights) * BLOCK
    assert shares.sum() == BLOCK
    assert shares.min() >= 1
    large = exact >= 1
    assert np.all(np.abs(shares - exact)[large] <= len(weights))


def test_weights_are_exact_in_every_block() -> None:
    member, _ = MixtureSampler([50, 70, 9], [1.0, 2.0, 5.0], 0).draw(BLOCK, BLOCK)
    assert np.bincount(member).tolist() == [512, 1024, 2560]


def test_order_depends_on_seed_and_epoch() -> None:
    orders = [MixtureSampler([100], [1.0], seed).draw(100 * e, 100)[1] for seed in (0, 1) for e in (0, 1)]
    assert len({o.tobytes() for o in orders}) == 4
    assert not np.array_equal(orders[0], np.arange(100))


def test_noise_seeds_differ_and_repeat() -> None:
    seeds = [MixtureSampler([5], [1.0], seed).noise_seed(step) for seed in (0, 1) for step in range(50)]
    assert len(set(seeds)) == 100
    assert all(0 <= s < 2**63 for s in seeds)
    assert MixtureSampler([5], [1.0], 1).noise_seed(49) == seeds[-1]


@pytest.mark.parametrize(
    ("lengths", "weights", "seed"),
    [
        ([], [], 0),
        ([3], [1.0, 1.0], 0),
        ([3, 0], [1.0, 1.0], 0),
        ([3], [0.0], 0),
        ([3], [float("nan")], 0),
        ([3], [1.0], -1),
    ],
)
def test_impossible_mixtures_are_refused(lengths: list[int], weights: list[float], seed: int) -> None:
    with pytest.raises(UsageError):
        MixtureSampler(lengths, weights, seed)
