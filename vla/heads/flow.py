"""Flow matching over action chunks (Lipman et al. 2023; pi0, Black et al. 2024).

Time convention: t = 1 is noise, t = 0 is data. With noise e and actions a,

    x_t = t e + (1 - t) a,    velocity u = e - a,    dx/dt = u,

so sampling starts at t = 1 and takes Euler steps of -1/n.

Axes: B batch, G groups, H steps, A action dims, W width.
"""

import torch
from torch import Tensor, nn

from vla.expert import ActionExpert, Context
from vla.head_config import FlowConfig
from vla.heads.base import ActionHead, Draws, ExpertCall, Target, grouped_normal
from vla.heads.time import TimeInput
from vla.losses import LossOut, masked_mean


def interpolate(actions: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and the velocity at `time` (..., H), for actions and noise (..., H, A)."""
    t = time[..., None]
    return t * noise + (1 - t) * actions, noise - actions


def pi0_time(uniform: Tensor) -> Tensor:
    """Uniform draws -> 0.999 Beta(1.5, 1) + 0.001: more weight on the noisy end (pi0). Beta(1.5, 1) is U^(2/3)."""
    return 0.999 * uniform ** (2 / 3) + 0.001


class FlowHead(ActionHead):
    """Velocity head."""

    def __init__(self, config: FlowConfig, action_dim: int, width: int) -> None:
        super().__init__()
        self.config, self.steps = config, config.steps
        self.action_in_proj = nn.Linear(action_dim, width)
        self.action_out_proj = nn.Linear(width, action_dim)
        self.time = TimeInput(config.time, width)

    def token_count(self, chunk: int) -> int:
        return chunk

    def fresh_condition(self, fresh: Tensor) -> Tensor | None:
        return self.time.of_data(fresh)

    def velocity(self, noisy: Tensor, time: Tensor, call: ExpertCall) -> Tensor:
        """(B, G, H, A) at noisy actions (B, G, H, A) and per-token times (B, G, H)."""
        return self.action_out_proj(call(*self.time(self.action_in_proj(noisy), time)))

    def loss(self, expert: ActionExpert, context: Context, target: Target, draws: Draws) -> LossOut:
        """Mean squared velocity error over `draws` noise and time draws for each prefix."""
        steps, dims = target.actions.shape[1:]
        groups, generator = self.config.draws, draws.generator()
        noise = draws.normal((groups, steps, dims), generator).to(target.actions.device)
        uniform = draws.uniform((groups, 1), generator).to(target.actions.device)
        time = pi0_time(uniform).expand(-1, -1, steps)
        noisy, velocity = interpolate(target.actions[:, None], noise, time)
        predicted = self.velocity(noisy, time, ExpertCall(expert, context, groups, steps))
        error = (predicted.float() - velocity) ** 2
        flow = masked_mean(error, target.valid[:, None], target.dim_mask[:, None])
        return LossOut(total=flow, terms={"flow": flow.detach()})

    def init(self, shape: tuple[int, int, int, int], generator: torch.Generator, device: torch.device) -> Tensor:
        return self.config.noise_scale * grouped_normal(shape, generator).to(device)

    def predict(self, state: Tensor, index: int, call: ExpertCall) -> Tensor:
        return self.velocity(state, state.new_full(state.shape[:3], 1 - index / self.steps), call)

    def advance(self, state: Tensor, out: Tensor, index: int, generator: torch.Generator) -> Tensor:
        return state - out.float() / self.steps

    def decode(self, state: Tensor) -> Tensor:
        return state
