"""What the slow path leaves for the fast path: the encoded observation.

Axes: B batch, K key-value heads, P prefix tokens, D head size.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values of every backbone layer over images and text. Immutable; shared by all readers.

    Nothing in it depends on actions, on the diffusion time or on the state, so one encoding serves any
    number of denoising steps, samples and control steps.
    """

    keys: tuple[Tensor, ...]  # one per layer, (B, K, P, D), already rotated to their positions
    values: tuple[Tensor, ...]  # one per layer, (B, K, P, D)
    valid: Tensor  # (B, P) bool, false for padding and absent cameras
    next_position: Tensor  # (B,) int64, rotary position of the first token after the prefix
    stamp_s: float = 0.0  # monotonic clock, capture time of the observation
    task_version: int = 0  # grows with every new instruction; an entry of an old task is never used
    sequence: int = 0  # grows with every encoding

    @property
    def batch(self) -> int:
        return self.valid.shape[0]

    def detach(self) -> "PrefixCache":
        """The same values without the graph: losses on it do not reach the backbone (knowledge insulation)."""
        return replace(self, keys=tuple(k.detach() for k in self.keys), values=tuple(v.detach() for v in self.values))

    def select(self, rows: Tensor) -> "PrefixCache":
        """The entries of `rows` (R,) int64, in that order."""
        return replace(
            self,
            keys=tuple(k[rows] for k in self.keys),
            values=tuple(v[rows] for v in self.values),
            valid=self.valid[rows],
            next_position=self.next_position[rows],
        )


@dataclass(frozen=True)
class CacheShape:
    """What an expert has to know of the backbone whose cache it reads."""

    layers: int
    heads: int  # query heads of the backbone's attention; joint expert layers have as many
    kv_heads: int
    head_dim: int
    rope_theta: float
    scale: float | None = None  # of attention scores; None: head_dim ** -0.5
    softcap: float | None = None  # attention scores are bent to softcap * tanh(score / softcap) (Gemma 2)


def positions_of(valid: Tensor) -> Tensor:
    """(B, P) bool -> (B, P) int64: valid tokens are numbered from 0, padding repeats the last number."""
    return (valid.long().cumsum(dim=1) - 1).clamp(min=0)


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each (B, T, D) float32, for positions (B, T); Su et al. 2021, half-split form."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None].float() * theta**-exponent
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate heads (B, N, T, D) by tables (B, T, D)."""
    cos, sin = (t.unsqueeze(1).to(x.dtype) for t in tables)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
