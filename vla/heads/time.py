"""How the diffusion time reaches the expert: mixed into the tokens, or through its norms.

What depends on the time alone is a `Clock`, so that a sampler makes it once for all of its steps.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.layers import time_embedding


@dataclass(frozen=True)
class Clock:
    """What a head's tokens need to know of noise levels (...), and nothing else of the state."""

    rows: Tensor | None = None  # (..., W), of `TimeInput`
    scale: Tensor | None = None  # (...), size of a noisy state at each level

    def at(self, index: int) -> "Clock":
        """The entry at a place of the first axis."""
        return Clock(*(None if x is None else x[index] for x in (self.rows, self.scale)))

    def where(self, held: Tensor, other: "Clock") -> "Clock":
        """`other` where `held` (B, G, H) bool is true; both clocks are of one level."""
        rows, scale = self.rows, self.scale
        if rows is not None and other.rows is not None:
            rows = torch.where(held[..., None], other.rows, rows)
        if scale is not None and other.scale is not None:
            scale = torch.where(held, other.scale, scale)
        return Clock(rows, scale)


class TimeInput(nn.Module):
    """concat: an MLP over [token, time] (pi0, SmolVLA). adarms: a condition for every norm (pi0.5)."""

    def __init__(self, kind: Literal["concat", "adarms"], width: int) -> None:
        super().__init__()
        self.kind, self.width = kind, width
        self.mlp_in = nn.Linear(2 * width if kind == "concat" else width, width)
        self.mlp_out = nn.Linear(width, width)

    def rows(self, time: Tensor) -> Tensor:
        """Times (...) -> (..., W): the time's share of the MLP's first layer (concat), or the condition (adarms)."""
        embedding = time_embedding(time, self.width).to(self.mlp_in.weight.dtype)
        if self.kind == "adarms":
            return F.silu(self.mlp_out(F.silu(self.mlp_in(embedding))))
        return F.linear(embedding, self.mlp_in.weight[:, self.width :], self.mlp_in.bias)

    def forward(self, tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (..., W) and their rows -> the expert's tokens (..., W) and condition or None."""
        if self.kind == "adarms":
            return tokens, rows
        hidden = F.linear(tokens, self.mlp_in.weight[:, : self.width]) + rows
        return self.mlp_out(F.silu(hidden)), None

    def of_data(self, fresh: Tensor) -> Tensor | None:
        """Condition of tokens that carry no noise: time 0."""
        return self.rows(fresh.new_zeros(fresh.shape[:-1])) if self.kind == "adarms" else None
