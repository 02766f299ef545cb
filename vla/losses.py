"""What a loss hands to the trainer, and how errors are reduced."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossOut:
    """The loss of one micro-batch, normalised by the micro-batch's own supervised entries."""

    total: Tensor  # (), what is minimised
    terms: dict[str, Tensor]  # name -> (), its parts, for the log


def chunk_mean(errors: Tensor, asked: Tensor) -> Tensor:
    """Mean over the entries of each chunk that are asked for; 0, with zero gradients, where there is none.

    Args:
        errors: (B, G, H, D) float; entries that are not asked for may hold anything, NaN too.
        asked: (B, G, H, D) bool.

    Returns:
        (B, G).
    """
    total = errors.masked_fill(~asked, 0).sum((2, 3))
    return total / asked.sum((2, 3)).clamp(min=1)


def batch_mean(per_chunk: Tensor, entries: Tensor) -> Tensor:
    """Mean of (B, G) over groups and then over rows, each row weighted by its number of `entries` (B,).

    Weights that do not depend on what a step happens to ask for make the sum over micro-batches the global
    batch's, however it was divided.
    """
    return (per_chunk.mean(1) * entries).sum() / entries.sum().clamp(min=1)


def weighted(outs: Tensor, weights: Tensor) -> Tensor:
    """(B, G, N, H, ...) summed over N with weights (B, G, N, H)."""
    return (outs * weights.reshape(*weights.shape, *[1] * (outs.dim() - 4))).sum(2)


def error_entropy(difference: Tensor, sigma: float = 0.5) -> Tensor:
    """Minimum-error-entropy term of T-MEE (arXiv 2602.04228): -log mean_ij exp(-|e_i - e_j|^2 / (2 sigma^2)).

    Zero for equal errors whatever their size, so it is only ever added to another loss.

    Args:
        difference: (R, D), one error vector for each step. Memory is quadratic in R.
    """
    if not len(difference):
        return difference.sum()
    squared = torch.cdist(difference, difference, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    return -torch.log(torch.exp(-squared / (2 * sigma**2)).mean() + 1e-8)
