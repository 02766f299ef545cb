"""Continuized discrete diffusion (E0, arXiv 2511.21542): Gaussian noise on one-hot bins, categorical prediction.

With tau = 1 clean and tau = 0 noise, x_tau = tau alpha onehot(k) + (1 - tau) eps. The network names the bin;
sampling re-noises its answer for the next level. Where the released code departs from the equation this does
not: alpha is the same in training and sampling, every level gets fresh noise, bins are drawn rather than
taken as the most probable until the last level, decoding gives bin centres, and padding enters no loss.
Levels are uniform in log(tau / (1 - tau)), in training and in sampling: a one-hot among K becomes visible only
within a narrow band of it.

Axes: B batch, G groups, H steps, D real action dims, A padded action dims, K bins, W width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.bins import Bins
from vla.expert import ActionExpert, Context
from vla.head_config import E0Config
from vla.heads.base import ActionHead, Draws, ExpertCall, Target, grouped_normal, grouped_uniform
from vla.heads.time import TimeInput
from vla.heads.tokens import ScalarTokens, draws_of
from vla.losses import LossOut, masked_mean

FIRST, LAST = 0.02, 0.995  # cleanest and noisiest tau that carry information


def level(position: Tensor) -> Tensor:
    """Position in [0, 1] -> tau between FIRST and LAST, uniform in log(tau / (1 - tau))."""
    ends = torch.tensor([FIRST, LAST], device=position.device).logit()
    return torch.sigmoid(ends[0] + position * (ends[1] - ends[0]))


def noised(ids: Tensor, tau: Tensor, eps: Tensor, alpha: float) -> Tensor:
    """x_tau (..., K) for bins (...) at tau (...) with noise (..., K)."""
    clean = alpha * F.one_hot(ids, eps.shape[-1])
    return tau[..., None] * clean + (1 - tau[..., None]) * eps


class E0Head(ActionHead):
    def __init__(self, config: E0Config, real_dim: int, action_dim: int, width: int) -> None:
        super().__init__()
        self.config, self.steps = config, config.steps
        self.real_dim, self.action_dim = real_dim, action_dim
        self.bins = Bins(config.bins, real_dim)
        self.scalars = ScalarTokens(config.layout, real_dim, config.bins, width)
        self.noisy_in_proj = nn.Linear(config.bins, width)
        self.time = TimeInput(config.time, width)

    def token_count(self, chunk: int) -> int:
        return self.scalars.count(chunk)

    def fresh_condition(self, fresh: Tensor) -> Tensor | None:
        return self.time.of_data(fresh)

    def logits(self, noisy: Tensor, tau: Tensor, call: ExpertCall) -> Tensor:
        """(B, G, H, D, K) for noisy one-hots (B, G, H, D, K) at per-step levels (B, G, H)."""
        scale = torch.sqrt((tau * self.config.alpha) ** 2 + (1 - tau) ** 2)[..., None, None]
        tokens = self.scalars.tokens(self.noisy_in_proj(noisy / scale))  # inputs of one size at every level
        return self.scalars.logits(call(*self.time(tokens, self.scalars.spread(1 - tau))))

    def loss(self, expert: ActionExpert, context: Context, target: Target, draws: Draws) -> LossOut:
        groups, generator = self.config.draws, draws.generator()
        ids = self.bins.encode(target.actions[..., : self.real_dim])[:, None].expand(-1, groups, -1, -1)
        steps, dims = ids.shape[2:]
        tau = level(draws.uniform((groups, 1), generator)).to(ids.device).expand(-1, -1, steps)
        eps = draws.normal((groups, steps, dims, self.config.bins), generator).to(ids.device)
        noisy = noised(ids, tau[..., None].expand(ids.shape), eps, self.config.alpha)
        call = ExpertCall(expert, context, groups, self.token_count(steps))
        out = self.logits(noisy, tau, call)
        entropy = F.cross_entropy(out.flatten(0, 3), ids.flatten(), reduction="none").view(ids.shape)
        mean = masked_mean(entropy, target.valid[:, None], target.dim_mask[:, None, : self.real_dim])
        return LossOut(total=mean, terms={"cross_entropy": mean.detach()})

    def _tau(self, index: int) -> float:
        return float(level(torch.tensor(index / self.steps)))

    def init(self, shape: tuple[int, int, int, int], generator: torch.Generator, device: torch.device) -> Tensor:
        """The first level is all but pure noise, so that it stands in for it."""
        return grouped_normal((*shape[:3], self.real_dim, self.config.bins), generator).to(device)

    def predict(self, state: Tensor, index: int, call: ExpertCall) -> Tensor:
        return self.logits(state, state.new_full(state.shape[:3], self._tau(index)), call)

    def advance(self, state: Tensor, out: Tensor, index: int, generator: torch.Generator) -> Tensor:
        """Draw bins and re-noise them at the next level; the last step names the most probable ones."""
        if index + 1 == self.steps:
            return F.one_hot(out.argmax(-1), self.config.bins).float()
        uniform = grouped_uniform(state.shape[:4], generator).to(state.device)
        eps = grouped_normal(state.shape, generator).to(state.device)
        tau = state.new_full(state.shape[:4], self._tau(index + 1))
        return noised(draws_of(out, uniform), tau, eps, self.config.alpha)

    def decode(self, state: Tensor) -> Tensor:
        """Bin centres; padded dimensions are 0."""
        return F.pad(self.bins.decode(state.argmax(-1)), (0, self.action_dim - self.real_dim))
