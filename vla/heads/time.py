"""How the diffusion time reaches the expert: mixed into the tokens, or through its norms."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.layers import time_embedding


class TimeInput(nn.Module):
    """concat: an MLP over [token, time] (pi0, SmolVLA). adarms: a condition for every norm (pi0.5)."""

    def __init__(self, kind: Literal["concat", "adarms"], width: int) -> None:
        super().__init__()
        self.kind, self.width = kind, width
        self.mlp_in = nn.Linear(2 * width if kind == "concat" else width, width)
        self.mlp_out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, time: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (..., W) at times (...) -> the expert's tokens (..., W) and condition (..., W) or None."""
        embedding = time_embedding(time, self.width).to(tokens.dtype)
        if self.kind == "adarms":
            return tokens, F.silu(self.mlp_out(F.silu(self.mlp_in(embedding))))
        return self.mlp_out(F.silu(self.mlp_in(torch.cat((tokens, embedding), dim=-1)))), None

    def of_data(self, fresh: Tensor) -> Tensor | None:
        """Condition of tokens that carry no noise: time 0."""
        return self(fresh, fresh.new_zeros(fresh.shape[:-1]))[1] if self.kind == "adarms" else None
