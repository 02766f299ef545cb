"""Continuized discrete diffusion (E0, arXiv 2511.21542): Gaussian noise on one-hot bins, categorical prediction.

With tau = 1 clean and tau = 0 noise, x_tau = tau alpha onehot(k) + (1 - tau) eps. The network names the bin;
sampling re-noises its answer for the next level. Where the released code departs from the equation this does
not: alpha is the same in training and sampling, every level gets fresh noise, bins are drawn rather than
taken as the most probable until the last level, decoding gives bin centres, and padding enters no loss.
Levels are uniform in log(tau / (1 - tau)), in training and in sampling: a one-hot among K becomes visible only
within a narrow band of it.

Axes: B batch, G groups, H steps, D real action dims, A padded action dims, K bins, W width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.bins import Bins
from vla.head_config import E0Config
from vla.heads.base import Corrupted, Draws, Noise, Target, grouped
from vla.heads.time import Clock, TimeInput
from vla.heads.tokens import CategoricalHead, ScalarTokens, draws_of

FIRST, LAST = 0.02, 0.995  # cleanest and noisiest tau that carry information


def level(position: Tensor) -> Tensor:
    """Position in [0, 1] -> tau between FIRST and LAST, uniform in log(tau / (1 - tau))."""
    ends = torch.tensor([FIRST, LAST], device=position.device).logit()
    return torch.sigmoid(ends[0] + position * (ends[1] - ends[0]))


def noised(ids: Tensor, tau: Tensor, eps: Tensor, alpha: float) -> Tensor:
    """x_tau (..., K) for bins (...) at tau (...) with noise (..., K)."""
    clean = alpha * F.one_hot(ids, eps.shape[-1])
    return tau[..., None] * clean + (1 - tau[..., None]) * eps


class E0Head(CategoricalHead):
    """The state is noisy one-hots (B, G, H, D, K); time is 1 - tau."""

    def __init__(self, config: E0Config, real_dim: int, action_dim: int, width: int) -> None:
        scalars = ScalarTokens(config.layout, real_dim, config.bins, width)
        super().__init__(Bins(config.bins, real_dim), scalars, action_dim)
        self.config, self.steps, self.draws = config, config.steps, config.draws
        self.noisy_in_proj = nn.Linear(config.bins, width)
        self.time_input = TimeInput(config.time, width)

    def fresh_condition(self, fresh: Tensor) -> Tensor | None:
        return self.time_input.of_data(fresh)

    def corrupt(self, target: Target, draws: Draws, held: Tensor) -> Corrupted:
        generator = draws.generator()
        ids = self.bins.encode(target.actions[..., : self.real_dim])[:, None].expand(-1, self.draws, -1, -1)
        steps, dims = ids.shape[2:]
        tau = level(draws.uniform((self.draws, 1), generator)).to(ids.device).expand(-1, -1, steps)
        tau = tau.masked_fill(held, 1)
        eps = draws.normal((self.draws, steps, dims, self.config.bins), generator).to(ids.device)
        noisy = noised(ids, tau[..., None].expand(ids.shape), eps, self.config.alpha)
        asked = (target.valid[:, None] & ~held)[..., None] & target.dim_mask[:, None, None, : self.real_dim]
        return Corrupted(state=noisy, time=1 - tau, answer=ids, asked=asked)

    def clock(self, time: Tensor) -> Clock:
        scale = torch.sqrt(((1 - time) * self.config.alpha) ** 2 + time**2)
        return Clock(self.time_input.rows(time), scale)

    def tokens(self, state: Tensor, clock: Clock) -> tuple[Tensor, Tensor | None]:
        assert clock.rows is not None
        assert clock.scale is not None
        noisy = state / clock.scale[..., None, None]  # inputs of one size at every level
        return self.time_input(self.scalars.tokens(self.noisy_in_proj(noisy)), self.scalars.spread(clock.rows))

    def init(self, shape: tuple[int, int, int, int], generator: torch.Generator, device: torch.device) -> Tensor:
        """The first level is all but pure noise, so that it stands in for it."""
        return grouped(torch.randn, (*shape[:3], self.real_dim, self.config.bins), generator).to(device)

    def noise(self, shape: Sequence[int], index: int, generator: torch.Generator) -> Noise:
        if index + 1 == self.steps:
            return ()
        return grouped(torch.rand, shape[:4], generator), grouped(torch.randn, shape, generator)

    def time(self, index: int) -> float:
        return 1 - float(level(torch.tensor(index / self.steps)))

    def hold(self, state: Tensor, actions: Tensor, held: Tensor) -> Tensor:
        clean = self.config.alpha * F.one_hot(self.bins.encode(actions[..., : self.real_dim]), self.config.bins)
        return torch.where(held[..., None, None], clean.to(state.dtype), state)

    def advance(self, state: Tensor, out: Tensor, index: int, held: Tensor, noise: Noise) -> Tensor:
        """Draw bins and re-noise them at the next level; the last step names the most probable ones."""
        if index + 1 == self.steps:
            return F.one_hot(out.argmax(-1), self.config.bins).float()
        uniform, eps = noise
        tau = state.new_full(state.shape[:4], 1 - self.time(index + 1))
        return noised(draws_of(out, uniform), tau, eps, self.config.alpha)

    def decode(self, state: Tensor) -> Tensor:
        """Bin centres; padded dimensions are 0."""
        return F.pad(self.bins.decode(state.argmax(-1)), (0, self.action_dim - self.real_dim))
