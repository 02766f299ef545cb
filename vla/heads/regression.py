"""Actions in one parallel pass from learned queries (OpenVLA-OFT, Kim et al. 2025).

Axes: B batch, G groups, H steps, A action dims, W width.
"""

import torch
from torch import Tensor, nn

from vla.expert import ActionExpert, Context
from vla.head_config import RegressionConfig
from vla.heads.base import ActionHead, Draws, ExpertCall, Target
from vla.losses import LossOut, masked_mean


class RegressionHead(ActionHead):
    """One learned query, told apart by its position, becomes every step's action. Deterministic."""

    steps = 1

    def __init__(self, config: RegressionConfig, action_dim: int, width: int) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Parameter(0.02 * torch.randn(width))
        self.action_out_proj = nn.Linear(width, action_dim)

    def token_count(self, chunk: int) -> int:
        return chunk

    def fresh_condition(self, fresh: Tensor) -> Tensor | None:
        return None

    def predict(self, state: Tensor, index: int, call: ExpertCall) -> Tensor:
        return self.action_out_proj(call(self.query.expand(*state.shape[:3], -1), None))

    def loss(self, expert: ActionExpert, context: Context, target: Target, draws: Draws) -> LossOut:
        steps = target.actions.shape[1]
        call = ExpertCall(expert, context, 1, steps)
        difference = self.predict(target.actions[:, None], 0, call).float()[:, 0] - target.actions
        error = difference.abs() if self.config.error == "l1" else difference**2
        mean = masked_mean(error, target.valid, target.dim_mask)
        return LossOut(total=mean, terms={self.config.error: mean.detach()})

    def init(self, shape: tuple[int, int, int, int], generator: torch.Generator, device: torch.device) -> Tensor:
        return torch.zeros(shape, device=device)

    def advance(self, state: Tensor, out: Tensor, index: int, generator: torch.Generator) -> Tensor:
        return out.float()

    def decode(self, state: Tensor) -> Tensor:
        return state
