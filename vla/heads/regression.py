"""Actions in one parallel pass from learned queries (OpenVLA-OFT, Kim et al. 2025).

Axes: B batch, G groups, N horizons, H steps, A action dims, W width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.head_config import RegressionConfig
from vla.heads.base import ActionHead, Corrupted, Draws, Noise, Target
from vla.heads.time import Clock
from vla.losses import weighted


class RegressionHead(ActionHead):
    """One learned query, told apart by its position, becomes every step's action. Deterministic.

    The state is (B, G, H, A + 1): the actions so far, and whether a step is held. With committed steps in
    training, held actions enter their query through a projection (policy.committed).
    """

    steps = 1
    draws = 1
    tokens_per_step = 1

    def __init__(self, config: RegressionConfig, action_dim: int, width: int, *, committed: int) -> None:
        super().__init__()
        self.config, self.error_name, self.action_dim = config, config.error, action_dim
        self.query = nn.Parameter(0.02 * torch.randn(width))
        self.action_out_proj = nn.Linear(width, action_dim)
        self.held_proj = nn.Linear(action_dim + 1, width, bias=False) if committed else None

    def fresh_condition(self, fresh: Tensor) -> Tensor | None:
        return None

    def corrupt(self, target: Target, draws: Draws, held: Tensor) -> Corrupted:
        actions = target.actions[:, None]
        asked = (target.valid[:, None] & ~held)[..., None] & target.dim_mask[:, None, None]
        state = self.hold(F.pad(torch.zeros_like(actions), (0, 1)), actions, held)
        return Corrupted(state=state, time=held.float() * 0, answer=actions, asked=asked)

    def clock(self, time: Tensor) -> Clock:
        return Clock()

    def tokens(self, state: Tensor, clock: Clock) -> tuple[Tensor, Tensor | None]:
        queries = self.query.expand(*state.shape[:3], -1)
        return (queries if self.held_proj is None else queries + self.held_proj(state)), None

    def read(self, hidden: Tensor) -> Tensor:
        return self.action_out_proj(hidden).float()

    def errors(self, out: Tensor, answer: Tensor) -> Tensor:
        difference = out - answer
        return difference.abs() if self.config.error == "l1" else difference**2

    def fuse(self, outs: Tensor, weights: Tensor) -> Tensor:
        return weighted(outs, weights)

    def extrapolate(self, reference: Tensor, out: Tensor, scale: float) -> Tensor:
        return torch.lerp(reference, out, scale)

    def init(self, shape: tuple[int, int, int, int], generator: torch.Generator, device: torch.device) -> Tensor:
        return torch.zeros((*shape[:3], shape[3] + 1), device=device)

    def time(self, index: int) -> float:
        return 0.0

    def hold(self, state: Tensor, actions: Tensor, held: Tensor) -> Tensor:
        flagged = F.pad(actions, (0, 1), value=1.0).expand_as(state)
        return torch.where(held[..., None], flagged, state)

    def advance(self, state: Tensor, out: Tensor, index: int, held: Tensor, noise: Noise) -> Tensor:
        return F.pad(out, (0, 1))

    def movement(self, out: Tensor) -> Tensor:
        return out

    def decode(self, state: Tensor) -> Tensor:
        return state[..., : self.action_dim]
