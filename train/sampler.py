"""Which frames make up each global batch: a pure function of the seed and the sample's number.

Every member of a mixture is visited in shuffled epochs without replacement. How members take turns is
shuffled inside blocks, each of which holds every member exactly as often as its weight says. In fast-slow
training a sample is a frame with an older observation, which serves other frames near it too.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from vla.errors import UsageError
from vla.policy_config import FastSlowConfig

BLOCK = 4096  # samples; weights are kept to one part in this many
_TURNS, _EPOCH, _NOISE, _AGES = 0, 1, 2, 3  # separate the streams of random numbers


class MixtureSampler:
    """Samples 0, 1, 2, ... of an endless stream over members of the given lengths.

    Args:
        lengths: (M,) frames of each member.
        weights: (M,) positive, relative shares of the samples.
        seed: not negative.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int) -> None:
        if not lengths or len(lengths) != len(weights):
            raise UsageError(f"A mixture needs as many weights as members, got {len(lengths)} and {len(weights)}.")
        if min(lengths) < 1:
            raise UsageError(f"Every member of a mixture needs frames, got lengths {list(lengths)}.")
        if not all(0 < w < float("inf") for w in weights):
            raise UsageError(f"Weights of a mixture must be positive numbers, got {list(weights)}.")
        if seed < 0:
            raise UsageError(f"The seed must not be negative, got {seed}.")
        self._lengths, self._seed = tuple(int(n) for n in lengths), seed
        self._shares = _shares(np.asarray(weights, np.float64))
        self._turns = lru_cache(4)(self._make_turns)
        self._order = lru_cache(4 * len(lengths))(self._make_order)

    def draw(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples `first` to `first + count - 1`: which member, and which of its frames, each (count,) int64."""
        numbers = np.arange(first, first + count)
        member, visit = np.empty(count, np.int64), np.empty(count, np.int64)
        for block in np.unique(numbers // BLOCK).tolist():
            here = numbers // BLOCK == block
            turns, place = self._turns(block)
            member[here] = turns[numbers[here] % BLOCK]
            visit[here] = block * self._shares[member[here]] + place[numbers[here] % BLOCK]
        frame = np.empty(count, np.int64)
        for m in np.unique(member).tolist():
            epoch, position = np.divmod(visit, self._lengths[m])
            for e in np.unique(epoch[member == m]).tolist():
                here = (member == m) & (epoch == e)
                frame[here] = self._order(m, e)[position[here]]
        return member, frame

    def noise_seed(self, step: int) -> int:
        """The seed of all random draws for the global batch of `step`, in [0, 2^63)."""
        state = np.random.SeedSequence([self._seed, _NOISE, step]).generate_state(1, np.uint64)
        return int(state[0] >> np.uint64(1))

    def ages(self, step: int, count: int, law: FastSlowConfig) -> np.ndarray:
        """(count, K) int64 control steps from each observation of `step` to the K frames it is drawn for."""
        draw, shape = self._generator(_AGES, step), (count, law.frames)
        fresh = draw.random(shape) < law.fresh_share
        return np.where(fresh, 0, draw.integers(law.min_age, law.max_age + 1, shape))

    def _make_turns(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(BLOCK,) the member of each sample, and how many of its samples in this block came before."""
        members = np.repeat(np.arange(len(self._shares)), self._shares)
        turns = self._generator(_TURNS, block).permutation(members)
        place = np.empty(BLOCK, np.int64)
        for m, share in enumerate(self._shares):
            place[turns == m] = np.arange(share)
        return turns, place

    def _make_order(self, member: int, epoch: int) -> np.ndarray:
        """(length,) the member's frames in the order of one epoch."""
        return self._generator(_EPOCH, member, epoch).permutation(self._lengths[member])

    def _generator(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *stream])


def observe(
    frame: np.ndarray, ages: np.ndarray, start: np.ndarray, first: np.ndarray, last: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Each sampled frame's observation, and the frames that it serves.

    Args:
        frame: (R,) the sampled frames.
        ages: (R, K) control steps, the sampled frames' own first.
        start: (R,) the first frame of each one's episode; no observation is older.
        first, last: (R,) bounds of the frames that an observation may serve.

    Returns:
        (R,) the observation; (R, K) the frames, the sampled one first. A true age is frame minus observation.
    """
    observed = np.maximum(frame - ages[:, 0], start)
    frames = np.clip(observed[:, None] + ages, first[:, None], last[:, None])
    frames[:, 0] = frame
    return observed, frames


def _shares(weights: np.ndarray) -> np.ndarray:
    """(M,) int64 samples of each member in a block: at least one, largest remainders first, sum BLOCK."""
    exact = weights / weights.sum() * BLOCK
    shares = np.maximum(1, np.floor(exact).astype(np.int64))
    while shares.sum() != BLOCK:
        step = 1 if shares.sum() < BLOCK else -1
        gap = (exact - shares) * step
        gap[(shares == 1) & (step < 0)] = -np.inf
        shares[np.argmax(gap)] += step
    return shares
