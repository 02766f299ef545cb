"""Flow matching over action chunks (Lipman et al. 2023; pi0, Black et al. 2024).

Time convention: t = 1 is noise, t = 0 is data. With noise e and actions a,

    x_t = t e + (1 - t) a,    velocity u = e - a,    dx/dt = u,

so sampling starts at t = 1 and takes Euler steps of -1/n.

Axes: B batch, G groups, N horizons, H steps, A action dims, W width.
"""

import torch
from torch import Tensor, nn

from vla.head_config import FlowConfig
from vla.heads.base import ActionHead, Corrupted, Draws, Noise, Target, grouped
from vla.heads.time import Clock, TimeInput
from vla.losses import error_entropy, weighted


def interpolate(actions: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and the velocity at `time` (..., H), for actions and noise (..., H, A)."""
    t = time[..., None]
    return t * noise + (1 - t) * actions, noise - actions


def pi0_time(uniform: Tensor) -> Tensor:
    """Uniform draws -> 0.999 Beta(1.5, 1) + 0.001: more weight on the noisy end (pi0). Beta(1.5, 1) is U^(2/3)."""
    return 0.999 * uniform ** (2 / 3) + 0.001


class FlowHead(ActionHead):
    """Velocity head."""

    tokens_per_step = 1
    error_name = "flow"

    def __init__(self, config: FlowConfig, action_dim: int, width: int) -> None:
        super().__init__()
        self.config, self.steps, self.draws = config, config.steps, config.draws
        self.action_in_proj = nn.Linear(action_dim, width)
        self.action_out_proj = nn.Linear(width, action_dim)
        self.time_input = TimeInput(config.time, width)

    def fresh_condition(self, fresh: Tensor) -> Tensor | None:
        return self.time_input.of_data(fresh)

    def corrupt(self, target: Target, draws: Draws, held: Tensor) -> Corrupted:
        steps, dims = target.actions.shape[1:]
        generator, device = draws.generator(), target.actions.device
        noise = draws.normal((self.draws, steps, dims), generator).to(device)
        uniform = draws.uniform((self.draws, 1), generator).to(device)
        time = pi0_time(uniform).expand(-1, -1, steps).masked_fill(held, 0)
        noisy, velocity = interpolate(target.actions[:, None], noise, time)
        asked = (target.valid[:, None] & ~held)[..., None] & target.dim_mask[:, None, None]
        return Corrupted(state=noisy, time=time, answer=velocity, asked=asked)

    def clock(self, time: Tensor) -> Clock:
        return Clock(self.time_input.rows(time))

    def tokens(self, state: Tensor, clock: Clock) -> tuple[Tensor, Tensor | None]:
        assert clock.rows is not None
        return self.time_input(self.action_in_proj(state), clock.rows)

    def read(self, hidden: Tensor) -> Tensor:
        return self.action_out_proj(hidden).float()

    def errors(self, out: Tensor, answer: Tensor) -> Tensor:
        return (out - answer) ** 2

    def penalties(self, out: Tensor, corrupted: Corrupted) -> dict[str, Tensor]:
        if self.config.error_entropy == 0:
            return {}
        kept = corrupted.asked.any(-1)
        difference = ((out - corrupted.answer) * corrupted.asked)[kept]
        return {"error_entropy": self.config.error_entropy * error_entropy(difference)}

    def fuse(self, outs: Tensor, weights: Tensor) -> Tensor:
        return weighted(outs, weights)

    def extrapolate(self, reference: Tensor, out: Tensor, scale: float) -> Tensor:
        return torch.lerp(reference, out, scale)

    def init(self, shape: tuple[int, int, int, int], generator: torch.Generator, device: torch.device) -> Tensor:
        return self.config.noise_scale * grouped(torch.randn, shape, generator).to(device)

    def time(self, index: int) -> float:
        return 1 - index / self.steps

    def hold(self, state: Tensor, actions: Tensor, held: Tensor) -> Tensor:
        return torch.where(held[..., None], actions, state)

    def advance(self, state: Tensor, out: Tensor, index: int, held: Tensor, noise: Noise) -> Tensor:
        return state.add(out, alpha=-1 / self.steps)

    def movement(self, out: Tensor) -> Tensor:
        return -out / self.steps

    def decode(self, state: Tensor) -> Tensor:
        return state
