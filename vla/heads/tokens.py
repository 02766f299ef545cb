"""What the heads share that name a class for each number of a chunk.

per_step: one token a step, D parallel classifiers on it. The suffix stays at H tokens; within a step the
    dimensions are independent given the state of the chunk.
per_scalar: one token a number, step by step. H*D tokens, one classifier (the papers' layout).

Axes: B batch, G groups, N horizons, H steps, D real action dims, A padded ones, K bins, W width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.bins import Bins
from vla.heads.base import ActionHead

FORBIDDEN = -1e4  # a logit whose probability is exactly 0 and whose gradient is finite
TINY = torch.finfo(torch.float32).tiny


class ScalarTokens(nn.Module):
    """Embeddings of D numbers a step -> expert tokens, and hidden states -> logits (..., H, D, K)."""

    def __init__(self, layout: Literal["per_step", "per_scalar"], dims: int, bins: int, width: int) -> None:
        super().__init__()
        self.layout, self.dims, self.bins = layout, dims, bins
        self.per_step = 1 if layout == "per_step" else dims
        self.dim_embedding = nn.Parameter(0.02 * torch.randn(dims, width))
        # A sum forgets which number came from which dimension; random signs keep it (Plate 1995, holographic binding).
        signs = torch.randint(0, 2, (dims, width)) * 2.0 - 1
        self.dim_scale = nn.Parameter(signs) if layout == "per_step" else None
        self.classifier = nn.Linear(width, dims * bins if layout == "per_step" else bins)

    def tokens(self, numbers: Tensor) -> Tensor:
        """(B, G, H, D, W) -> (B, G, H or H*D, W)."""
        if self.dim_scale is None:
            return (numbers + self.dim_embedding).flatten(2, 3)
        return (numbers * self.dim_scale + self.dim_embedding).sum(dim=3)

    def spread(self, rows: Tensor) -> Tensor:
        """Rows of steps (B, G, H, W) -> of their tokens; one row (W,) for all stays as it is."""
        if rows.dim() == 1 or self.per_step == 1:
            return rows
        return rows[:, :, :, None].expand(-1, -1, -1, self.per_step, -1).flatten(2, 3)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H or H*D, W) -> (..., H, D, K) float32."""
        out = self.classifier(hidden).float()
        if self.layout == "per_step":
            return out.unflatten(-1, (self.dims, self.bins))
        return out.unflatten(-2, (-1, self.dims))


class CategoricalHead(ActionHead):
    """A head whose word is a distribution over bins for each number: logits (B, G, H, D, K)."""

    error_name = "cross_entropy"

    def __init__(self, bins: Bins, scalars: ScalarTokens, action_dim: int) -> None:
        super().__init__()
        self.bins, self.scalars = bins, scalars
        self.real_dim, self.action_dim = bins.dims, action_dim
        self.tokens_per_step = scalars.per_step

    def read(self, hidden: Tensor) -> Tensor:
        logits = self.scalars.logits(hidden)
        return logits.masked_fill(~self.bins.allowed(), FORBIDDEN)

    def errors(self, out: Tensor, answer: Tensor) -> Tensor:
        flat = F.cross_entropy(out.flatten(0, -2), answer.flatten(), reduction="none")
        return flat.view(answer.shape)

    def fuse(self, outs: Tensor, weights: Tensor) -> Tensor:
        """Log of the weighted mean of the probabilities."""
        log_weights = weights.clamp(min=TINY).log()[..., None, None]
        return (outs.log_softmax(-1) + log_weights).logsumexp(2)

    def extrapolate(self, reference: Tensor, out: Tensor, scale: float) -> Tensor:
        mixed = torch.lerp(reference.log_softmax(-1), out.log_softmax(-1), scale)
        return mixed.masked_fill(~self.bins.allowed(), FORBIDDEN)

    def movement(self, out: Tensor) -> Tensor:
        """A share of the expected action."""
        ids = torch.arange(self.bins.count, device=out.device)
        values = self.bins.decode(ids[:, None].expand(-1, self.real_dim)).T  # (D, K)
        return (out.softmax(-1) * values).sum(-1) / self.steps

    def prefer(self, out: Tensor, actions: Tensor, weights: Tensor, index: int) -> Tensor:
        """Adds to the logit of the earlier chunk's bin, less in every round: a prior that fades."""
        ids = self.bins.encode(actions[..., : self.real_dim])
        bonus = F.one_hot(ids, self.bins.count) * weights[:, None, None] * (1 - index / self.steps)
        return out + bonus[:, None]


def draws_of(logits: Tensor, uniform: Tensor) -> Tensor:
    """Classes drawn from softmax(logits) (..., K) by inverting the distribution at uniform (...)."""
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    return (cumulative < uniform[..., None] * cumulative[..., -1:]).sum(dim=-1).clamp(max=logits.shape[-1] - 1)
