"""What the data side hands to the loss."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A micro-batch, already in model units. B rows, V cameras, T text tokens, H steps, A action dims."""

    images: Tensor  # (B, V, h, w, 3) uint8 RGB, resized; normalised on the device by the backbone
    image_mask: Tensor  # (B, V) bool, false where the data set has no such camera
    tokens: Tensor  # (B, T) int64
    token_mask: Tensor  # (B, T) bool
    state: Tensor  # (B, S) float32
    actions: Tensor  # (B, H, A) float32
    valid: Tensor  # (B, H) bool, false beyond the episode's end
    dim_mask: Tensor  # (B, A) bool, false for padded action dimensions
    rows: Tensor  # (B,) int64, this row's place in the global batch
    global_size: int  # rows of the global batch over all ranks and accumulation steps
    noise_seed: int  # all random draws for the global batch come from this seed
    loss_scale: float  # weight that makes the mean of micro-batch means the mean of the global batch

    def to(self, device: torch.device | str) -> "Batch":
        tensors = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **tensors)
