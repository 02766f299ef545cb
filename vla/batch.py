"""What the data side hands to the loss."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A micro-batch, already in model units.

    R observations, each encoded once, and B rows, each a state and a chunk answered from one of them. Without
    fast-slow training row and observation are the same: R == B, `observation` counts 0, 1, 2 ..., `age` is 0.
    V cameras, T text tokens, S state and A action dimensions, H steps ahead, Vf cameras of the fast path.
    """

    images: Tensor  # (R, V, h, w, 3) uint8 RGB, resized; normalised on the device by the backbone
    image_mask: Tensor  # (R, V) bool, false where the data set has no such camera
    tokens: Tensor  # (R, T) int64
    token_mask: Tensor  # (R, T) bool
    observation: Tensor  # (B,) int64 in 0..R-1, the observation that this row answers
    age: Tensor  # (B,) float32, control steps from the observation to this row's state
    fast_images: Tensor  # (B, Vf, h, w, 3) uint8 RGB taken together with the state; Vf may be 0
    fast_image_mask: Tensor  # (B, Vf) bool
    state: Tensor  # (B, S) float32
    history: Tensor  # (B, p, S) float32, the p states before `state`, oldest first; the episode's first one repeats
    actions: Tensor  # (B, past + H, A) float32, beginning `past` steps before the state
    valid: Tensor  # (B, past + H) bool, false outside the episode
    dim_mask: Tensor  # (B, A) bool, false for padded action dimensions
    rows: Tensor  # (B,) int64, this row's place in the global batch
    global_size: int  # rows of the global batch over all ranks and accumulation steps
    noise_seed: int  # all random draws for the global batch come from this seed
    loss_scale: float  # weight that makes the mean of micro-batch means the mean of the global batch
    mode: Tensor | None = None  # (B,) int64, the behaviour that the row shows: 0 forward, 1 rollback, 2 advance
    intent: Tensor | None = None  # (B,) int64 in 0..intents-1, what the row is an example of (policy.conditions)

    def to(self, device: torch.device | str) -> "Batch":
        tensors = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **tensors)
