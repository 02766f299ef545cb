"""Flow matching over action chunks (Lipman et al. 2023; pi0, Black et al. 2024).

Time convention: t = 1 is noise, t = 0 is data. With noise e and actions a,

    x_t = t e + (1 - t) a,    velocity u = e - a,    dx/dt = u,

so sampling starts at t = 1 and takes Euler steps of -1/n.

Axes: B batch, G groups, H steps, A action dims, W width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.expert import ActionExpert, Context
from vla.heads.base import ActionHead, Draws, ExpertCall, Target
from vla.layers import time_embedding
from vla.losses import LossOut, masked_mean
from vla.policy_config import FlowConfig


def interpolate(actions: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and the velocity at `time` (..., H), for actions and noise (..., H, A)."""
    t = time[..., None]
    return t * noise + (1 - t) * actions, noise - actions


def draw_time(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """0.999 Beta(1.5, 1) + 0.001: more weight on the noisy end (pi0). Beta(1.5, 1) is U^(2/3)."""
    return 0.999 * torch.rand(shape, generator=generator) ** (2 / 3) + 0.001


def euler_times(steps: int, device: torch.device) -> Tensor:
    """(steps + 1,) from 1 to 0."""
    return torch.linspace(1.0, 0.0, steps + 1, device=device)


class FlowHead(ActionHead):
    """Velocity head. The time enters the action tokens ('concat') or the expert's norms ('adarms')."""

    def __init__(self, config: FlowConfig, action_dim: int, width: int) -> None:
        super().__init__()
        self.config, self.steps, self.width = config, config.steps, width
        self.action_in_proj = nn.Linear(action_dim, width)
        self.action_out_proj = nn.Linear(width, action_dim)
        self.time_in = nn.Linear(2 * width if config.time == "concat" else width, width)
        self.time_out = nn.Linear(width, width)

    def fresh_condition(self, fresh: Tensor) -> Tensor | None:
        """Fresh tokens are data, so their time is 0."""
        if self.config.time == "concat":
            return None
        return self._time_condition(fresh.new_zeros(fresh.shape[:2])).to(fresh.dtype)

    def _time_condition(self, time: Tensor) -> Tensor:
        embedding = time_embedding(time, self.width).to(self.time_in.weight.dtype)
        return F.silu(self.time_out(F.silu(self.time_in(embedding))))

    def predict(self, state: Tensor, time: Tensor, run: ExpertCall) -> Tensor:
        """Velocity (B, G, H, A) at noisy actions (B, G, H, A) and per-token times (B, G, H)."""
        tokens = self.action_in_proj(state)
        if self.config.time == "adarms":
            return self.action_out_proj(run(tokens, self._time_condition(time)))
        mixed = torch.cat((tokens, time_embedding(time, self.width).to(tokens.dtype)), dim=-1)
        return self.action_out_proj(run(self.time_out(F.silu(self.time_in(mixed))), None))

    def loss(self, expert: ActionExpert, context: Context, target: Target, draws: Draws) -> LossOut:
        """Mean squared velocity error over `draws` noise and time draws for each prefix."""
        steps, dims = target.actions.shape[1:]
        groups, generator = self.config.draws, draws.generator()
        noise = torch.randn((draws.global_size, groups, steps, dims), generator=generator)
        time = draw_time((draws.global_size, groups, 1), generator)
        rows, device = draws.rows.cpu(), target.actions.device
        noise, time = noise[rows].to(device), time[rows].to(device).expand(-1, -1, steps)
        noisy, velocity = interpolate(target.actions[:, None], noise, time)
        predicted = self.predict(noisy, time, ExpertCall(expert, context, groups, steps))
        error = (predicted.float() - velocity) ** 2
        flow = masked_mean(error, target.valid[:, None], target.dim_mask[:, None])
        return LossOut(total=flow, terms={"flow": flow.detach()})

    def init(self, shape: tuple[int, int, int, int], generator: torch.Generator, device: torch.device) -> Tensor:
        batch, groups, *rest = shape  # group by group, so that the first of n samples is the one sample of n = 1
        noise = torch.stack([torch.randn((batch, *rest), generator=generator) for _ in range(groups)], dim=1)
        return self.config.noise_scale * noise.to(device)

    def times(self, device: torch.device) -> Tensor:
        return euler_times(self.steps, device)

    def advance(self, state: Tensor, out: Tensor, time: Tensor, next_time: Tensor) -> Tensor:
        return state + (next_time - time) * out.float()

    def decode(self, state: Tensor) -> Tensor:
        return state
