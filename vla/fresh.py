"""What the fast path adds to the cache: the newest state, those before it, and pictures if it looks for itself.

Axes: B batch, F fresh tokens, S state dims, p earlier states, Vf fast cameras, W expert width, E backbone width.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.conditions import Steering
from vla.policy_config import PolicyConfig

SIDE = 4  # one fast picture becomes SIDE * SIDE tokens


@dataclass(frozen=True)
class Fresh:
    """What the fast path knows beside the cache."""

    state: Tensor  # (B, S) float32, model units
    images: Tensor | None = None  # (B, Vf, h, w, 3) uint8 RGB
    image_mask: Tensor | None = None  # (B, Vf) bool
    steering: Steering = field(default_factory=Steering)
    history: Tensor | None = None  # (B, p, S) float32, the states before, oldest first


class FastImages(nn.Module):
    """A light picture encoder. Its output starts at zero, so a trained policy can be given one."""

    def __init__(self, cameras: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width // 4, 8, stride=4, padding=2)
        self.body = nn.Conv2d(width // 4, width, 4, stride=2, padding=1)
        self.position = nn.Parameter(0.02 * torch.randn(cameras, SIDE * SIDE, width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """(B, Vf, h, w, 3) uint8, (B, Vf) -> (B, Vf * 16, W); absent cameras are zeros."""
        pixels = images.flatten(0, 1).permute(0, 3, 1, 2).to(self.stem.weight.dtype) / 127.5 - 1
        features = F.gelu(self.body(F.gelu(self.stem(pixels))))
        pooled = F.adaptive_avg_pool2d(features, SIDE).flatten(2).transpose(1, 2).unflatten(0, mask.shape)
        tokens = self.out_proj(F.gelu(pooled + self.position))
        return (tokens * mask[..., None, None]).flatten(1, 2)


class FreshInputs(nn.Module):
    """Fresh tokens (B, F, W) of the expert, and the state token of the prefix (B, 1, E) if it belongs there."""

    def __init__(self, config: PolicyConfig, prefix_width: int) -> None:
        super().__init__()
        widths = {"suffix": config.expert.width, "prefix": prefix_width}
        self.state = config.state
        self.state_proj = nn.Linear(config.state_dim, widths[config.state]) if config.state in widths else None
        self.history_position = nn.Parameter(torch.zeros(config.history, widths["suffix"])) if config.history else None
        cameras = len(config.fast_slow.cameras) if config.fast_slow else 0
        self.width = config.expert.width
        self.fast_images = FastImages(cameras, config.expert.width) if cameras else None

    def tokens(self, fresh: Fresh) -> Tensor:
        """(B, F, W); F may be 0."""
        parts = [fresh.state.new_zeros(len(fresh.state), 0, self.width)]
        if self.history_position is not None:
            assert fresh.history is not None
            parts.append(self._project(fresh.history) + self.history_position)
        if self.state == "suffix":
            parts.append(self._project(fresh.state[:, None]))
        if self.fast_images is not None:
            assert fresh.images is not None
            assert fresh.image_mask is not None
            parts.append(self.fast_images(fresh.images, fresh.image_mask))
        return torch.cat([p.to(parts[-1].dtype) for p in parts], dim=1)

    def prefix_token(self, fresh: Fresh) -> Tensor | None:
        """(B, 1, E) to be run through the backbone after images and text (SmolVLA), or None."""
        return self._project(fresh.state[:, None]) if self.state == "prefix" else None

    def _project(self, states: Tensor) -> Tensor:
        assert self.state_proj is not None
        return self.state_proj(states.to(self.state_proj.weight.dtype))
