"""Statistics of success counts: pure functions, scipy. Every interval is two-sided.

success rate of one policy           wilson (good average coverage), clopper_pearson (never below nominal)
two policies on the same episodes    gained_lost, mcnemar_exact, paired_bootstrap
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from vla.errors import TandemError


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Score interval of a success rate; its coverage is near `confidence` on average over rates.

    (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), and (0, 1) without trials.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22
    (1927) 209-212; recommended for n <= 40 by Brown, Cai and DasGupta, Statistical Science 16 (2001) 101.
    """
    _require_counts(successes, trials, confidence)
    if trials == 0:
        return Interval(0.0, 1.0)
    z = float(special.ndtri((1 + confidence) / 2))  # quantile of the normal distribution
    rate = successes / trials
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(rate * (1 - rate) / trials + (z / (2 * trials)) ** 2)
    low = 0.0 if successes == 0 else centre - half  # exactly, where rounding leaves 1e-18
    high = 1.0 if successes == trials else centre + half
    return Interval(low, high)


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Exact interval of a success rate; its coverage is at least `confidence` for every rate.

    Source: C. J. Clopper and E. S. Pearson, The use of confidence or fiducial limits illustrated in the
    case of the binomial, Biometrika 26 (1934) 404-413; as quantiles of the beta distribution.
    """
    _require_counts(successes, trials, confidence)
    tail, failures = (1 - confidence) / 2, trials - successes
    low = 0.0 if successes == 0 else float(special.betaincinv(successes, failures + 1, tail))
    high = 1.0 if failures == 0 else float(special.betaincinv(successes + 1, failures, 1 - tail))
    return Interval(low, high)


def gained_lost(before: Sequence[bool] | np.ndarray, after: Sequence[bool] | np.ndarray) -> tuple[int, int]:
    """How many paired episodes turned from failure to success, and from success to failure.

    Args:
        before, after: (N,) bool, success of the same N episodes under two policies.
    """
    first, second = np.asarray(before, bool), np.asarray(after, bool)
    if first.shape != second.shape or first.ndim != 1:
        raise TandemError(
            f"Paired outcomes must be two vectors of one length, got shapes {first.shape} and {second.shape}."
        )
    return int((second & ~first).sum()), int((first & ~second).sum())


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided p-value that two policies differ, given how many paired episodes changed either way.

    Under the null hypothesis each changed episode went either way with probability 1/2; episodes that
    did not change say nothing. 1.0 when none changed.

    Source: Q. McNemar, Psychometrika 12 (1947) 153-157; exact conditional form, a sign test.
    """
    if gained < 0 or lost < 0:
        raise TandemError(f"gained and lost are counts, got {gained} and {lost}.")
    if gained + lost == 0:
        return 1.0
    return min(1.0, 2 * float(special.bdtr(min(gained, lost), gained + lost, 0.5)))


def paired_bootstrap(gained: int, lost: int, pairs: int, confidence: float = 0.95) -> Interval:
    """Percentile bootstrap interval of `rate(after) - rate(before)`, resampling whole pairs.

    Nothing is drawn. A pair contributes +1, -1 or 0, so that the sum over a resample of n pairs is the
    n-fold convolution of these three frequencies, and its quantiles are those of infinitely many draws.
    With no changed pair the interval has no width: that is the method, not certainty; read
    `mcnemar_exact` and the single rates beside it.

    Source: B. Efron, Bootstrap methods: another look at the jackknife, Annals of Statistics 7 (1979) 1-26
    (section 2, method 1: direct calculation); percentile interval: Efron and Tibshirani, An Introduction
    to the Bootstrap (1993), chapter 13.
    """
    if gained < 0 or lost < 0 or gained + lost > pairs or pairs < 1:
        raise TandemError(f"Need 0 <= gained + lost <= pairs and at least one pair, got {gained}, {lost}, {pairs}.")
    _require_confidence(confidence)
    single = np.array([lost, pairs - gained - lost, gained], np.float64) / pairs  # of -1, 0, +1
    cumulative = np.cumsum(_convolution_power(single, pairs))  # of sums -pairs..pairs
    tail = (1 - confidence) / 2
    low = int(np.searchsorted(cumulative, tail)) - pairs
    high = int(np.searchsorted(cumulative, 1 - tail)) - pairs
    return Interval(low / pairs, min(high, pairs) / pairs)


def _convolution_power(weights: np.ndarray, power: int) -> np.ndarray:
    """`weights` (K,) convolved with itself `power` times, by repeated squaring."""
    result, square = np.ones(1), weights
    while power:
        if power & 1:
            result = np.convolve(result, square)
        power >>= 1
        if power:
            square = np.convolve(square, square)
    return result


def _require_counts(successes: int, trials: int, confidence: float) -> None:
    if not 0 <= successes <= trials:
        raise TandemError(f"Need 0 <= successes <= trials, got {successes} of {trials}.")
    _require_confidence(confidence)


def _require_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise TandemError(f"confidence must lie between 0 and 1, got {confidence}.")
