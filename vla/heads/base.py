"""What every action head offers.

A head says what the expert's action tokens are: how a chunk is corrupted for training, how the corrupted
chunk becomes tokens, what the hidden states say, and how sampling advances. How often the expert is run on it,
for how many horizons, and what guides it, is the same for all (`vla.denoiser`, `vla.objective`, `vla.sampling`).

Axes: B batch, G groups (draws or samples sharing one prefix), N horizons, H steps, A action dims, D dimensions
that the head predicts (A, or the real ones), T = tokens_per_step * H, W width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla.heads.time import Clock

Noise = tuple[Tensor, ...]


@dataclass(frozen=True)
class Target:
    """The chunk to learn, in model units."""

    actions: Tensor  # (B, H, A) float32
    valid: Tensor  # (B, H) bool, false beyond the episode's end
    dim_mask: Tensor  # (B, A) bool, false for padded dimensions
    source: Tensor | None = None  # (B, H, A), where the path to the actions starts, of heads that say so

    def entries(self) -> Tensor:
        """(B,) float32, supervised numbers of each row: its weight in the mean over a batch."""
        return self.valid.sum(1).float() * self.dim_mask.sum(1)


@dataclass(frozen=True)
class Draws:
    """Where a training step's randomness comes from.

    Numbers are drawn for the whole global batch and each rank or accumulation step takes its own rows, so a
    step does not depend on how the global batch was divided.
    """

    seed: int
    global_size: int
    rows: Tensor  # (B,) int64

    def generator(self, purpose: int = 0) -> torch.Generator:
        """A stream of its own for each purpose, so that an option does not shift the draws of another."""
        return torch.Generator().manual_seed(self.seed + 7_919 * purpose)

    def normal(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """(B, *shape) standard normal draws of these rows, on the CPU."""
        return torch.randn((self.global_size, *shape), generator=generator)[self.rows.cpu()]

    def uniform(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """(B, *shape) draws from [0, 1) of these rows, on the CPU."""
        return torch.rand((self.global_size, *shape), generator=generator)[self.rows.cpu()]


def grouped(draw: Callable[..., Tensor], shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """(B, G, ...) numbers from `draw` (torch.randn, torch.rand), group by group.

    So the first of n samples is the one sample of n = 1.
    """
    batch, groups, *rest = shape
    return torch.stack([draw((batch, *rest), generator=generator) for _ in range(groups)], dim=1)


@dataclass(frozen=True)
class Corrupted:
    """What the network is shown in training, and what is asked of it."""

    state: Tensor  # (B, G, H, ...) of the head's own form
    time: Tensor  # (B, G, H) float32, how noisy each step is: 1 noise, 0 data
    answer: Tensor  # (B, G, H, D) what `errors` compares with
    asked: Tensor  # (B, G, H, D) bool, entries that count


class ActionHead(ABC, nn.Module):
    """Primitives of training and sampling; a state is whatever the head denoises (actions, token ids, ...)."""

    steps: int  # sampler steps
    draws: int  # corruptions per prefix and training step
    tokens_per_step: int  # expert tokens of one control step
    error_name: str  # of its loss in the log

    @abstractmethod
    def fresh_condition(self, fresh: Tensor) -> Tensor | None:
        """Condition of the fresh tokens (B, F, W), or None if the expert's norms take none."""

    @abstractmethod
    def corrupt(self, target: Target, draws: Draws, held: Tensor) -> Corrupted:
        """`draws` corruptions of each chunk; steps in `held` (B, G, H) bool stay clean and are not asked for."""

    def source(self, states: Tensor) -> Tensor | None:
        """Where paths to actions start (B, H, A), given the states up to now (B, p + 1, S); None: at noise alone."""
        del states
        return None

    @abstractmethod
    def clock(self, time: Tensor) -> Clock:
        """All that `tokens` needs to know of noise levels (...)."""

    @abstractmethod
    def tokens(self, state: Tensor, clock: Clock) -> tuple[Tensor, Tensor | None]:
        """State (B, G, H, ...) -> tokens (B, G, T, W) and their condition or None.

        Args:
            clock: of levels (B, G, H), or of one level () for all.
        """

    @abstractmethod
    def read(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., T, W) -> what the network says of each step (..., H, ...)."""

    @abstractmethod
    def errors(self, out: Tensor, answer: Tensor) -> Tensor:
        """(..., H, D) float32, the loss of each entry of `out` (..., H, ...)."""

    @abstractmethod
    def fuse(self, outs: Tensor, weights: Tensor) -> Tensor:
        """Several networks' words (B, G, N, H, ...) as one (B, G, H, ...); weights (B, G, N, H) sum to 1 over N."""

    @abstractmethod
    def extrapolate(self, reference: Tensor, out: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance (Ho and Salimans 2022): 0 gives `reference`, 1 gives `out`, more goes beyond."""

    @abstractmethod
    def init(self, shape: tuple[int, int, int, int], generator: torch.Generator, device: torch.device) -> Tensor:
        """The state that sampling starts from, for chunks of `shape` (B, G, H, A)."""

    def noise(self, shape: Sequence[int], index: int, generator: torch.Generator) -> Noise:
        """The random numbers that sampler step `index` uses on a state of `shape`, on the CPU."""
        del shape, index, generator
        return ()

    @abstractmethod
    def time(self, index: int) -> float:
        """Noise level of the state in sampler step `index`, counted from 0."""

    @abstractmethod
    def hold(self, state: Tensor, actions: Tensor, held: Tensor) -> Tensor:
        """`state` with the steps in `held` (B, G, H) bool set to clean `actions` (B, G, H, A)."""

    @abstractmethod
    def advance(self, state: Tensor, out: Tensor, index: int, held: Tensor, noise: Noise) -> Tensor:
        """`state` after sampler step `index`, with the numbers of `noise`; the caller holds the `held` steps again."""

    @abstractmethod
    def movement(self, out: Tensor) -> Tensor:
        """(..., H, D) in model units: how far this step's word moves the chunk; horizons are compared by it."""

    @abstractmethod
    def decode(self, state: Tensor) -> Tensor:
        """The final state as actions (B, G, H, A) in model units."""

    def penalties(self, out: Tensor, corrupted: Corrupted) -> dict[str, Tensor]:
        """Terms added to the loss besides `errors`, by name."""
        del out, corrupted
        return {}
