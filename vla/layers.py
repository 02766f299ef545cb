"""Building blocks of the expert.

Axes: B batch, T tokens, W width, N heads, K key-value heads, S keys, D head size.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019). `cond` is accepted and ignored."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, T, W) -> the normed x, and no gate."""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps), None


class AdaRMSNorm(nn.Module):
    """RMS norm whose scale, shift and residual gate come from a condition (pi0.5; Peebles and Xie 2023).

    The projection starts at zero, so at first every branch is closed by its gate.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.dense, self.eps = nn.Linear(width, 3 * width), eps
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def forward(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, T, W), cond (B, T, W) -> the modulated x and the gate (B, T, W) of its branch."""
        if cond is None:
            raise ValueError("AdaRMSNorm needs a condition")
        scale, shift, gate = self.dense(cond).chunk(3, dim=-1)
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift, gate


NORMS: dict[str, type[RMSNorm] | type[AdaRMSNorm]] = {"rms": RMSNorm, "adarms": AdaRMSNorm}


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class GatedMLP(nn.Module):
    """SwiGLU or GEGLU feed-forward (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int, activation: Literal["silu", "gelu_tanh"] = "silu") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


def residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return x + (branch if gate is None else branch * gate)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """(B, N, T, D), (B, K, S, D) twice, mask (B, 1, T or 1, S) bool -> (B, T, N*D).

    Args:
        scale: of the scores; None: D ** -0.5.
        softcap: scores are bent to `softcap * tanh(score / softcap)` (Gemma 2); None: they are not.
    """
    if softcap is None:
        grouped = keys.shape[1] != query.shape[1]
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(2)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    folded = query.unflatten(1, (keys.shape[1], -1))  # (B, K, N/K, T, D)
    scores = torch.einsum("bkgtd,bksd->bkgts", folded, keys) * factor
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask[:, :, None], float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    return torch.einsum("bkgts,bksd->btkgd", weights, values).flatten(2)


def time_embedding(time: Tensor, width: int, min_period: float = 4e-3, max_period: float = 4.0) -> Tensor:
    """(...) diffusion times in [0, 1] -> (..., width) [sin, cos] with geometric periods (pi0).

    Computed in float64: at the shortest period float32 is off by 1e-4.
    """
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time.device)
    period = min_period * (max_period / min_period) ** fraction
    angle = time.double()[..., None] * (2 * math.pi / period)
    return torch.cat((angle.sin(), angle.cos()), dim=-1).float()
