"""Mixture of horizons (arXiv 2511.19433): one expert predicts chunks of several lengths, a gate mixes them.

Horizon i predicts steps k < h_i. All horizons of a chunk see the same noise at the same time; only how far
they may look differs. They are packed side by side in the token axis, each at its own length, on one shared
prefix: nothing is padded and no key or value is repeated (the released code does both).

Axes: B batch, G groups, N horizons, H steps, W width.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.losses import batch_mean, chunk_mean
from vla.policy_config import ConsensusConfig, MixtureConfig


def support(horizons: Sequence[int]) -> Tensor:
    """(N, H) bool, true where horizon i predicts step k."""
    return torch.arange(horizons[-1]) < torch.tensor(horizons)[:, None]


def gate_weights(logits: Tensor, reach: Tensor) -> Tensor:
    """Logits (B, G, N, H), `support` (N, H) -> weights that sum to 1 over the horizons that predict a step."""
    return logits.masked_fill(~reach, -torch.inf).softmax(dim=2)


def squared_variation(p: Tensor) -> Tensor:
    """Squared coefficient of variation, Var(p) / (Mean(p)^2 + 1e-10), with the unbiased variance; 0 for one value."""
    return p.var() / (p.mean() ** 2 + 1e-10) if p.numel() > 1 else p.sum() * 0


def balance(weights: Tensor, horizons: Sequence[int]) -> Tensor:
    """Balance loss of gate weights (B, G, N, H): how unevenly the horizons share each interval of steps.

    Intervals lie between consecutive horizons; those that only one horizon reaches have nothing to balance.
    """
    starts = (0, *horizons[:-1])
    terms = [
        squared_variation(weights[:, :, first:, start:end].mean((0, 1, 3)))
        for first, (start, end) in enumerate(zip(starts, horizons, strict=True))
        if first < len(horizons) - 1
    ]
    return torch.stack(terms).mean() if terms else weights.sum() * 0


def disagreement(movements: Tensor, fused: Tensor, weights: Tensor) -> Tensor:
    """(B, G, H): sum_i alpha_i sum_a |m_i - m| of movements (B, G, N, H, D) about the fused (B, G, H, D)."""
    return ((movements - fused[:, :, None]).abs().sum(-1) * weights).sum(2)


def consensus(disagreement: np.ndarray, horizons: Sequence[int], config: ConsensusConfig) -> int:
    """How many steps to execute (arXiv 2511.19433, algorithm 1): while enough horizons predict and agree.

    Args:
        disagreement: (H,) of one chunk, summed over the sampler's steps.

    Returns:
        Steps in shortest..H. It ends before the first step k >= shortest where fewer than `active` horizons
        predict, or where the disagreement reaches `ratio` times its mean over the first `shortest` steps.
    """
    first = min(config.shortest, len(disagreement))
    limit = config.ratio * float(disagreement[:first].mean())
    for step in range(first, len(disagreement)):
        active = sum(h > step for h in horizons)
        if active < config.active or float(disagreement[step]) >= limit:
            return step
    return len(disagreement)


class HorizonGate(nn.Module):
    """Gate over horizons, read from the expert's hidden states of each step (2 W weights at most)."""

    def __init__(self, config: MixtureConfig, width: int) -> None:
        super().__init__()
        self.horizons = config.horizons
        self.gate_out_proj = nn.Linear(width, 1)
        self.gate_noise_layer = nn.Linear(width, 1) if config.gate_noise == "learned" else None
        self.register_buffer("reach", support(config.horizons), persistent=False)
        self.reach: Tensor

    def forward(self, hidden: Tensor, noise: Tensor | None) -> Tensor:
        """Hidden (B, G, N, H, W), standard normal noise (B, G, N, H) or None -> weights (B, G, N, H)."""
        logits = self.scores(hidden)
        if noise is not None and self.gate_noise_layer is not None:
            logits = logits + noise * (F.softplus(self.gate_noise_layer(hidden)[..., 0].float()) + 0.01)
        return gate_weights(logits, self.reach)

    def scores(self, hidden: Tensor) -> Tensor:
        """(..., W) -> logits (...) float32, without noise."""
        return self.gate_out_proj(hidden)[..., 0].float()


def independent(errors: Tensor, asked: Tensor, horizons: Sequence[int], entries: Tensor) -> Tensor:
    """Sum over horizons of each one's own loss on the steps it predicts.

    Args:
        errors: (B, G, N, H, D).
        asked: (B, G, H, D) bool.
        entries: (B,), weight of each row.
    """
    losses = [batch_mean(chunk_mean(errors[:, :, i, :h], asked[:, :, :h]), entries) for i, h in enumerate(horizons)]
    return torch.stack(losses).sum()
