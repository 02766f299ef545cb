"""Known answers, independent implementations, and coverage by simulation."""

import numpy as np
import pytest
from scipy import stats

from robot.statistics import Interval, clopper_pearson, gained_lost, mcnemar_exact, paired_bootstrap, wilson
from vla.errors import TandemError

DRAWS = 10_000


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 40, 0.0, 0.0876), (78, 80, 0.9134, 0.9931), (0, 0, 0.0, 1.0), (5, 5, 0.5655, 1.0)],
)
def test_wilson_known_answers(successes: int, trials: int, low: float, high: float) -> None:
    interval = wilson(successes, trials)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(8, 10, 0.4439, 0.9748), (0, 20, 0.0, 0.1684), (20, 20, 0.8316, 1.0), (0, 0, 0.0, 1.0)],
)
def test_clopper_pearson_known_answers(successes: int, trials: int, low: float, high: float) -> None:
    interval = clopper_pearson(successes, trials)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("trials", [1, 7, 80])
def test_intervals_agree_with_scipy(trials: int, confidence: float) -> None:
    for k in range(trials + 1):
        for ours, method in ((wilson, "wilson"), (clopper_pearson, "exact")):
            theirs = stats.binomtest(k, trials).proportion_ci(confidence, method=method)
            interval = ours(k, trials, confidence)
            assert (interval.low, interval.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
            assert 0 <= interval.low <= k / trials <= interval.high <= 1


def coverage(table: list[Interval], draws: np.ndarray, truth: np.ndarray | float) -> float:
    """Share of `draws`, indices into `table`, whose interval holds `truth`."""
    low, high = np.array([i.low for i in table]), np.array([i.high for i in table])
    return float(((low[draws] <= truth) & (truth <= high[draws])).mean())


def test_wilson_covers_its_nominal_share_on_average_over_rates() -> None:
    rng = np.random.default_rng(0)
    rates = rng.uniform(0.02, 0.98, DRAWS)
    table = [wilson(k, 80) for k in range(81)]
    assert coverage(table, rng.binomial(80, rates), rates) == pytest.approx(0.95, abs=0.01)


def test_clopper_pearson_never_covers_less_than_nominal() -> None:
    rng = np.random.default_rng(1)
    table = [clopper_pearson(k, 20) for k in range(21)]
    shares = [coverage(table, rng.binomial(20, p, DRAWS), p) for p in np.linspace(0.02, 0.98, 25)]
    assert min(shares) > 0.95 - 0.005  # the simulation's own error
    rates = rng.uniform(0, 1, DRAWS)
    assert 0.95 < coverage(table, rng.binomial(20, rates), rates) < 0.99


def test_gained_and_lost_count_the_changed_pairs() -> None:
    before = [True, True, False, False, False]
    after = [True, False, True, True, False]
    assert gained_lost(before, after) == (2, 1)
    with pytest.raises(TandemError, match="one length"):
        gained_lost(before, after[:3])


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [(0, 0, 1.0), (5, 0, 2 / 32), (9, 2, 2 * (1 + 11 + 55) / 2048), (3, 3, 1.0), (7, 19, 0.0290)],
)
def test_mcnemar_known_answers(gained: int, lost: int, p: float) -> None:
    assert mcnemar_exact(gained, lost) == pytest.approx(p, abs=5e-5)
    assert mcnemar_exact(lost, gained) == mcnemar_exact(gained, lost)


def test_mcnemar_agrees_with_scipy() -> None:
    for changed in range(1, 30):
        for gained in range(changed + 1):
            theirs = stats.binomtest(gained, changed, 0.5).pvalue
            assert mcnemar_exact(gained, changed - gained) == pytest.approx(theirs, abs=1e-12)


def test_mcnemar_rejects_equal_policies_no_more_often_than_it_says() -> None:
    rng = np.random.default_rng(2)
    changed = rng.binomial(80, 0.3, DRAWS)
    gained = rng.binomial(changed, 0.5)
    p = np.array([[mcnemar_exact(g, n - g) if g <= n else 1.0 for g in range(81)] for n in range(81)])
    assert (p[changed, gained] <= 0.05).mean() <= 0.05


def test_bootstrap_agrees_with_resampling() -> None:
    gained, lost, pairs = 12, 4, 80
    differences = np.repeat([1, -1, 0], [gained, lost, pairs - gained - lost])
    rng = np.random.default_rng(3)
    resampled = differences[rng.integers(0, pairs, (20_000, pairs))].mean(1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    interval = paired_bootstrap(gained, lost, pairs)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1 / pairs + 1e-9)
    assert interval.low == pytest.approx(0.0125, abs=0.0126)


def test_bootstrap_is_antisymmetric_and_nests() -> None:
    interval, mirrored = paired_bootstrap(12, 4, 80), paired_bootstrap(4, 12, 80)
    assert (mirrored.low, mirrored.high) == pytest.approx((-interval.high, -interval.low), abs=1 / 80 + 1e-12)
    wide = paired_bootstrap(12, 4, 80, confidence=0.99)
    assert wide.low < interval.low < (12 - 4) / 80 < interval.high < wide.high


def test_bootstrap_at_the_edges() -> None:
    assert paired_bootstrap(0, 0, 40) == Interval(0.0, 0.0)
    assert paired_bootstrap(40, 0, 40) == Interval(1.0, 1.0)
    assert paired_bootstrap(0, 40, 40) == Interval(-1.0, -1.0)


def test_bootstrap_coverage() -> None:
    """Percentile intervals of a discrete sum: within a point and a half of nominal at 80 pairs."""
    rng, pairs = np.random.default_rng(4), 80
    draws = rng.multinomial(pairs, [0.15, 0.05, 0.80], DRAWS)  # gained, lost, same: true difference 0.10
    kinds, which = np.unique(draws[:, :2], axis=0, return_inverse=True)
    table = [paired_bootstrap(int(g), int(n), pairs) for g, n in kinds]
    assert coverage(table, which.ravel(), 0.10) == pytest.approx(0.95, abs=0.015)


def test_impossible_counts_are_refused() -> None:
    for call in (
        lambda: wilson(3, 2),
        lambda: clopper_pearson(-1, 2),
        lambda: wilson(1, 2, confidence=1.0),
        lambda: mcnemar_exact(-1, 0),
        lambda: paired_bootstrap(3, 2, 4),
        lambda: paired_bootstrap(0, 0, 0),
        lambda: paired_bootstrap(1, 0, 4, confidence=0.0),
    ):
        with pytest.raises(TandemError):
            call()
