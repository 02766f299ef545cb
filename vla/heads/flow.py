"""Flow matching over action chunks (Lipman et al. 2023; pi0, Black et al. 2024).

Time convention: t = 1 is noise, t = 0 is data. With noise e and actions a,

    x_t = t e + (1 - t) a,    velocity u = e - a,    dx/dt = u,

so sampling starts at t = 1 and takes Euler steps of -1/n.

Source 'history' (A2A, action-to-action flow) puts s + noise_scale e in the place of e, where s is what a small network
makes of the last states. A2A's paths join learned codes, and three more terms keep these codes from collapsing. Ours
join actions. Reconstructing an action from its own code is then the identity and costs nothing. Reconstructing it from
the code that sampling ends at is, for one Euler step, the flow loss at t = 1 itself, |s - u(s, 1) - a|^2. That one is
kept, with A2A's weight of 1 beside the flow loss: half of the draws have t = 1. It is needed, because with little noise
a network that has seen s reads a off any x_t with t < 1, and learns nothing of what sampling starts with.

Axes: B batch, G groups, N horizons, H steps, p earlier states, S state dims, A action dims, W width.
"""

import torch
import torch.nn.functional as F
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


def source_time(uniform: Tensor) -> Tensor:
    """Uniform draws -> 1 for half of them, and pi0's times for the others."""
    return torch.where(uniform < 0.5, 1.0, pi0_time((2 * uniform - 1).clamp(min=0)))


class HistorySource(nn.Module):
    """States (B, p + 1, S), the newest last -> where paths start (B, H, A); the mean until it has learnt."""

    def __init__(self, states: int, state_dim: int, steps: int, action_dim: int, width: int) -> None:
        super().__init__()
        self.steps = steps
        self.mlp_in = nn.Linear(states * state_dim, width)
        self.mlp_out = nn.Linear(width, steps * action_dim)
        nn.init.zeros_(self.mlp_out.weight)
        nn.init.zeros_(self.mlp_out.bias)

    def forward(self, states: Tensor) -> Tensor:
        hidden = F.silu(self.mlp_in(states.flatten(1).to(self.mlp_in.weight.dtype)))
        return self.mlp_out(hidden).unflatten(1, (self.steps, -1)).float()


class FlowHead(ActionHead):
    """Velocity head.

    Args:
        history_source: with source 'history', else None.
    """

    tokens_per_step = 1
    error_name = "flow"

    def __init__(
        self, config: FlowConfig, action_dim: int, width: int, history_source: HistorySource | None = None
    ) -> None:
        super().__init__()
        self.history_source = history_source
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
        if target.source is not None:
            noise = target.source[:, None] + self.config.noise_scale * noise
        law = pi0_time if target.source is None else source_time
        time = law(uniform).expand(-1, -1, steps).masked_fill(held, 0)
        noisy, velocity = interpolate(target.actions[:, None], noise, time)
        asked = (target.valid[:, None] & ~held)[..., None] & target.dim_mask[:, None, None]
        return Corrupted(state=noisy, time=time, answer=velocity, asked=asked)

    def source(self, states: Tensor) -> Tensor | None:
        return None if self.history_source is None else self.history_source(states)

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
