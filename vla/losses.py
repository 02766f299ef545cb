"""What a loss hands to the trainer, and the mean over what is supervised."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LossOut:
    """The loss of one micro-batch, normalised by the micro-batch's own supervised entries."""

    total: Tensor  # (), what is minimised
    terms: dict[str, Tensor]  # name -> (), its parts, for the log


def masked_mean(x: Tensor, valid: Tensor, dim_mask: Tensor) -> Tensor:
    """Mean of `x` over supervised entries; 0, with zero gradients, when there is none.

    Args:
        x: (..., H, A) float, e.g. squared errors; entries outside the masks may hold anything, NaN too.
        valid: (..., H) bool, false beyond the episode's end.
        dim_mask: (..., A) bool, false for padded action dimensions.

    Returns:
        () of `x`'s dtype.
    """
    mask = (valid.unsqueeze(-1) & dim_mask.unsqueeze(-2)).expand_as(x)
    return x.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)
