"""Residual vector quantisation of whole-body chunks (DuoCore-FS; residual form as CARP): few tokens, coarse first.

An encoder turns a chunk into T latents, one for `stride` actions. Each is written as a sum of L codes: level 1
quantises the latent, level l what the levels before it left (SoundStream, arXiv 2107.03312, algorithm 1):
    r_0 = z,   e_l = nearest code of r_(l-1),   r_l = r_(l-1) - e_l,   so   z = e_1 + ... + e_L + r_L.
A decoder turns the sum back into the chunk. Tokens are level by level, all T latents of one level together:
the first k * T tokens of a chunk are the chunk at k levels, and `decode` accepts them.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vla.action_tokens.base import ActionTokenizer, ChunkShape, Manifest
from vla.config import build
from vla.errors import CheckpointError, DataError, UsageError

WEIGHTS = "model.safetensors"
BLOCK = 4096  # chunks that pass the network at once


@dataclass(frozen=True)
class ResidualVQConfig:
    """Sizes of a residual-VQ tokenizer."""

    levels: int  # L
    codes: int  # K, of each level
    stride: int  # actions that share a latent; tokens per chunk: L * ceil(H / stride)
    latent: int  # C, width of a latent and of a code
    width: int  # W, of the encoder and the decoder
    blocks: int  # mixing blocks in each of them

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise UsageError(f"A residual-VQ tokenizer's {name} must be at least 1, got {value}.")


@dataclass(frozen=True)
class Quantised:
    """What the quantiser makes of latents (B, T, C)."""

    ids: Tensor  # (B, L, T) int64 in 0..K-1
    sums: Tensor  # (L, B, T, C) e_1 + ... + e_l for l = 1..L; no gradient
    commitment: Tensor  # () mean squared distance of the residuals from their codes; gradient to the latents


class ResidualQuantiser(nn.Module):
    """L codebooks, moved by exponential averages of what they quantise (VQ-VAE, arXiv 1711.00937, appendix A.1)."""

    DECAY = 0.98
    DEAD = 0.05  # a code used less than this share of the average is put where data is

    codebooks: Tensor  # (L, K, C)
    counts: Tensor  # (L, K) averaged uses per update
    totals: Tensor  # (L, K, C) averaged sums of the residuals that chose the code

    def __init__(self, levels: int, codes: int, latent: int) -> None:
        super().__init__()
        self.register_buffer("codebooks", torch.zeros(levels, codes, latent))
        self.register_buffer("counts", torch.zeros(levels, codes))
        self.register_buffer("totals", torch.zeros(levels, codes, latent))

    def forward(self, latents: Tensor) -> Quantised:
        """In training mode the codebooks follow the latents, starting from samples of the first batch."""
        residual, ids, sums, commitment = latents, [], [], latents.new_zeros(())
        total = torch.zeros_like(latents)
        for level in range(len(self.codebooks)):
            points = residual.detach().flatten(0, 1)  # (B * T, C)
            if self.training and not self.counts[level].any():
                self._revive(level, points, torch.ones(self.codebooks.shape[1], dtype=torch.bool, device=points.device))
            nearest = torch.cdist(points, self.codebooks[level]).argmin(dim=-1)
            code = self.codebooks[level][nearest].view_as(residual)
            commitment = commitment + F.mse_loss(residual, code)
            if self.training:
                self._follow(level, points, nearest)
            residual, total = residual - code, total + code
            ids.append(nearest.view(residual.shape[:2]))
            sums.append(total)
        return Quantised(torch.stack(ids, dim=1), torch.stack(sums), commitment)

    def sums_of(self, ids: Tensor) -> Tensor:
        """(B, k, T) codes of the first k levels -> their sum (B, T, C)."""
        return sum((self.codebooks[level][ids[:, level]] for level in range(ids.shape[1])), torch.zeros(()))

    def _follow(self, level: int, points: Tensor, nearest: Tensor) -> None:
        hot = F.one_hot(nearest, self.codebooks.shape[1]).to(points.dtype)  # (N, K)
        self.counts[level].lerp_(hot.sum(dim=0), 1 - self.DECAY)
        self.totals[level].lerp_(hot.T @ points, 1 - self.DECAY)
        used = self.counts[level] > 0
        self.codebooks[level][used] = self.totals[level][used] / self.counts[level][used, None]
        self._revive(level, points, self.counts[level] < self.DEAD * self.counts[level].mean())

    def _revive(self, level: int, points: Tensor, dead: Tensor) -> None:
        """Put the codes of `dead` (K,) bool on points drawn from (N, C), as if used as often as the average."""
        drawn = points[torch.randint(len(points), (int(dead.sum()),), device=points.device)]
        uses = torch.full_like(self.counts[level], len(points) / len(dead))
        self.codebooks[level][dead] = drawn
        self.counts[level][dead] = uses[dead]
        self.totals[level][dead] = drawn * uses[dead, None]


class ChunkAutoencoder(nn.Module):
    """Chunk (B, H, A) -> latents (B, T, C) -> chunk."""

    def __init__(self, chunk: ChunkShape, config: ResidualVQConfig) -> None:
        super().__init__()
        self.length, self.dim, self.stride = chunk.length, chunk.dim, config.stride
        self.latents = -(-chunk.length // config.stride)  # T
        patch, width = config.stride * chunk.dim, config.width
        self.encoder = nn.Sequential(
            nn.Linear(patch, width), *(Mix(width) for _ in range(config.blocks)), nn.Linear(width, config.latent)
        )
        self.quantiser = ResidualQuantiser(config.levels, config.codes, config.latent)
        self.decoder = nn.Sequential(
            nn.Linear(config.latent, width), *(Mix(width) for _ in range(config.blocks)), nn.Linear(width, patch)
        )

    def encode(self, actions: Tensor) -> Tensor:
        """(B, H, A) -> (B, T, C); a last patch that is not full repeats the last action."""
        missing = self.latents * self.stride - self.length
        whole = torch.cat([actions, actions[:, -1:].expand(-1, missing, -1)], dim=1)
        return self.encoder(whole.reshape(len(actions), self.latents, -1))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, T, C) -> (B, H, A)."""
        patches = self.decoder(latents)
        return patches.reshape(len(latents), -1, self.dim)[:, : self.length]

    def loss(self, actions: Tensor, kept: Tensor, beta: float) -> Tensor:
        """Mean squared error of chunks (B, H, A) rebuilt from their first `kept` (B,) levels, 1..L, plus beta times
        the commitment (VQ-VAE, equation 3; codes move by averages). Gradients pass the quantiser straight through.
        """
        latents = self.encode(actions)
        quantised = self.quantiser(latents)
        chosen = quantised.sums[kept - 1, torch.arange(len(actions), device=actions.device)]  # (B, T, C)
        through = latents + (chosen - latents).detach()
        return F.mse_loss(self.decode(through), actions) + beta * quantised.commitment


class Mix(nn.Module):
    """x + MLP of each latent with its two neighbours, of x (B, T, W): a convolution as one matrix product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(3 * width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(self.norm(x), (0, 0, 1, 1))
        return x + self.mlp(torch.cat([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]], dim=-1))


class ResidualVQTokenizer(ActionTokenizer):
    """The autoencoder's codes as tokens: level l's code c has id (l - 1) * K + c."""

    KIND = "residual_vq"

    def __init__(self, chunk: ChunkShape, config: ResidualVQConfig, net: ChunkAutoencoder) -> None:
        super().__init__(chunk)
        self.config, self.net = config, net.eval()

    @property
    def vocab_size(self) -> int:
        return self.config.levels * self.config.codes

    @property
    def tokens(self) -> int:
        return self.config.levels * self.net.latents

    @torch.no_grad()
    def codes(self, actions: Tensor) -> Tensor:
        """(B, H, A) float32 -> (B, L, T) int64 in 0..K-1."""
        return self.net.quantiser(self.net.encode(actions)).ids

    @torch.no_grad()
    def actions(self, codes: Tensor) -> Tensor:
        """(B, k, T) codes of the first k levels -> (B, H, A) float32."""
        return self.net.decode(self.net.quantiser.sums_of(codes))

    def _encode(self, actions: np.ndarray) -> list[np.ndarray]:
        blocks = torch.from_numpy(np.ascontiguousarray(actions, np.float32)).split(BLOCK)
        codes = torch.cat([self.codes(block.to(self._device)).cpu() for block in blocks])
        return list((codes + self._offsets()).flatten(1).numpy())

    def _decode(self, ids: list[np.ndarray]) -> np.ndarray:
        depths = np.array([self._depth(i, sequence) for i, sequence in enumerate(ids)])
        out = np.zeros((len(ids), self.chunk.length, self.chunk.dim), np.float32)
        for depth in np.unique(depths):
            rows = np.flatnonzero(depths == depth)
            tokens = torch.from_numpy(np.stack([ids[row] for row in rows]))
            codes = tokens.view(len(rows), depth, self.net.latents) - self._offsets()[:depth]
            out[rows] = torch.cat([self.actions(block.to(self._device)).cpu() for block in codes.split(BLOCK)])
        return out

    def _depth(self, i: int, sequence: np.ndarray) -> int:
        """The levels of a sequence, whole ones and in order."""
        latents, levels, codes = self.net.latents, self.config.levels, self.config.codes
        depth, rest = divmod(len(sequence), latents)
        if rest or not 1 <= depth <= levels:
            raise DataError(
                f"Sequence {i} has {len(sequence)} ids; a chunk has {latents} for each level, 1 to {levels} levels."
            )
        wrong = np.flatnonzero(sequence // codes != np.repeat(np.arange(depth), latents))
        if len(wrong):
            place = int(wrong[0])
            level = place // latents
            raise DataError(
                f"Sequence {i} has id {sequence[place]} of level {sequence[place] // codes + 1} at place {place}; "
                f"there stand ids of level {level + 1}, {level * codes}..{(level + 1) * codes - 1}."
            )
        return depth

    @property
    def _device(self) -> torch.device:
        return self.net.quantiser.codebooks.device

    def _offsets(self) -> Tensor:
        return (torch.arange(self.config.levels) * self.config.codes)[:, None]

    def _settings(self) -> dict[str, Any]:
        return asdict(self.config)

    def _write(self, folder: Path) -> None:
        save_file({k: v.detach().cpu().contiguous() for k, v in self.net.state_dict().items()}, folder / WEIGHTS)


def read(folder: Path, manifest: Manifest) -> ResidualVQTokenizer:
    """The tokenizer that `save` wrote. Raises `CheckpointError`."""
    try:
        config = build(ResidualVQConfig, manifest.settings, "settings")
        with torch.random.fork_rng(devices=[]):  # building draws random weights that are then overwritten
            net = ChunkAutoencoder(manifest.chunk, config)
        net.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, OSError, RuntimeError, UsageError) as error:
        raise CheckpointError(f"The residual-VQ tokenizer in {folder} is damaged: {error}. Fit it anew.") from error
    return ResidualVQTokenizer(manifest.chunk, config, net)
