"""Where the numbers of a chunk stand in the token axis, for heads that predict a class for each number.

per_step: one token a step, D parallel classifiers on it. The suffix stays at H tokens; within a step the
    dimensions are independent given the state of the chunk.
per_scalar: one token a number, step by step. H*D tokens, one classifier (the papers' layout).
"""

from typing import Literal

import torch
from torch import Tensor, nn

Layout = Literal["per_step", "per_scalar"]


class ScalarTokens(nn.Module):
    """Embeddings of D numbers a step -> expert tokens, and hidden states -> logits (B, G, H, D, K)."""

    def __init__(self, layout: Layout, dims: int, bins: int, width: int) -> None:
        super().__init__()
        self.layout, self.dims, self.bins = layout, dims, bins
        self.dim_embedding = nn.Parameter(0.02 * torch.randn(dims, width))
        self.classifier = nn.Linear(width, dims * bins if layout == "per_step" else bins)

    def count(self, chunk: int) -> int:
        return chunk * (1 if self.layout == "per_step" else self.dims)

    def tokens(self, numbers: Tensor) -> Tensor:
        """(B, G, H, D, W) -> (B, G, H or H*D, W)."""
        named = numbers + self.dim_embedding
        return named.sum(dim=3) if self.layout == "per_step" else named.flatten(2, 3)

    def spread(self, per_step: Tensor) -> Tensor:
        """A value for each step (B, G, H) -> for each token."""
        return per_step if self.layout == "per_step" else per_step.repeat_interleave(self.dims, dim=2)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, G, H or H*D, W) -> (B, G, H, D, K) float32."""
        out = self.classifier(hidden).float()
        if self.layout == "per_step":
            return out.unflatten(-1, (self.dims, self.bins))
        return out.unflatten(2, (-1, self.dims))


def draws_of(logits: Tensor, uniform: Tensor) -> Tensor:
    """Classes drawn from softmax(logits) (..., K) by inverting the distribution at uniform (...)."""
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    return (cumulative < uniform[..., None] * cumulative[..., -1:]).sum(dim=-1).clamp(max=logits.shape[-1] - 1)
