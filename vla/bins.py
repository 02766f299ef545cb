"""Actions in model units <-> bins: the tokens of the discrete heads.

With normalisation 'quantile' the data's 1 % and 99 % quantiles are -1 and 1; K equal bins lie between them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Bins(nn.Module):
    """K bins on [-1, 1] for each dimension; dimensions in `binary` have two values, the ends.

    Args:
        count: K.
        dims: number of dimensions D.
        binary: dimensions that are low or high and nothing between, such as a gripper command.
    """

    def __init__(self, count: int, dims: int, binary: Sequence[int] = ()) -> None:
        super().__init__()
        self.count, self.dims = count, dims
        two = torch.zeros(dims, dtype=torch.bool)
        two[list(binary)] = True
        self.register_buffer("binary", two, persistent=False)  # a buffer: on the model's device in every step
        self.binary: Tensor

    def encode(self, actions: Tensor) -> Tensor:
        """(..., D) -> (..., D) int64 in 0..K-1; what lies outside [-1, 1] goes to the outermost bin."""
        ids = ((actions + 1) / 2 * self.count).floor().long().clamp(0, self.count - 1)
        return torch.where(self.binary, (actions > 0).long(), ids)

    def decode(self, ids: Tensor) -> Tensor:
        """(..., D) int64 -> bin centres (..., D) float32: off by half a bin at most, without bias."""
        centres = (2 * ids.float() + 1) / self.count - 1
        return torch.where(self.binary, 2.0 * ids - 1, centres)

    def allowed(self) -> Tensor:
        """(D, K) bool, the bins a dimension may take."""
        ids = torch.arange(self.count, device=self.binary.device)
        return torch.where(self.binary[:, None], ids < 2, ids >= 0)
