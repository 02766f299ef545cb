"""Masked diffusion over action tokens (Discrete Diffusion VLA, arXiv 2508.20072, section 3; MaskGIT).

Every number of a chunk is a bin, and MASK is one more symbol. Training hides a share cos(pi/2 u) of the
tokens and asks for them; decoding starts with all hidden and commits the surest ones round by round.

Axes: B batch, G groups, H steps, D real action dims, A padded action dims, K bins, L = H*D, W width.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.bins import Bins
from vla.head_config import DiscreteDiffusionConfig
from vla.heads.base import Corrupted, Draws, Noise, Target, grouped
from vla.heads.time import Clock
from vla.heads.tokens import CategoricalHead, ScalarTokens, draws_of


def masked_after(tokens: Tensor, rounds: int, index: int) -> Tensor:
    """How many of L `tokens` (...) int64 are hidden after round `index`: clamp(floor(L cos(pi/2 (j+1)/T)), 1, L-1)."""
    share = math.cos(math.pi / 2 * (index + 1) / rounds)
    return (tokens.double() * share).floor().long().clamp(min=1).minimum(tokens - 1)


def remask_threshold(index: int, rounds: int) -> float:
    """Secondary re-masking, paper's rule: eta = 0.5 (1 - t/T), t counting down from T, in round `index` from 0."""
    return 0.5 * index / rounds


def hide(real: Tensor, share: Tensor, order: Tensor) -> Tensor:
    """Which tokens to hide: max(1, round(share * n)) of the n real ones, the lowest in `order`.

    Args:
        real: (..., L) bool.
        share: (...) in (0, 1].
        order: (..., L) random numbers.
    """
    count = (share * real.sum(-1)).round().clamp(min=1)
    rank = order.masked_fill(~real, torch.inf).argsort(dim=-1).argsort(dim=-1)
    return real & (rank < count[..., None])


class DiscreteDiffusionHead(CategoricalHead):
    """The state is bin ids (B, G, H, D), or MASK."""

    def __init__(self, config: DiscreteDiffusionConfig, real_dim: int, action_dim: int, width: int) -> None:
        bins = Bins(config.bins, real_dim, config.binary_dims)
        super().__init__(bins, ScalarTokens(config.layout, real_dim, config.bins, width), action_dim)
        self.config, self.steps, self.draws = config, config.steps, config.draws
        self.embedding = nn.Embedding(config.bins + 1, width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    @property
    def mask_id(self) -> int:
        return self.config.bins

    def fresh_condition(self, fresh: Tensor) -> Tensor | None:
        return None

    def corrupt(self, target: Target, draws: Draws, held: Tensor) -> Corrupted:
        """Only hidden tokens are asked for."""
        generator = draws.generator()
        ids = self.bins.encode(target.actions[..., : self.real_dim])[:, None].expand(-1, self.draws, -1, -1)
        real = (target.valid[:, None] & ~held)[..., None].expand(ids.shape)
        share = torch.cos(torch.pi / 2 * draws.uniform((self.draws,), generator)).to(ids.device)
        order = draws.uniform((self.draws, ids[0, 0].numel()), generator).to(ids.device)
        hidden = hide(real.flatten(2), share, order).view(ids.shape)
        state = ids.masked_fill(hidden, self.mask_id)
        return Corrupted(state=state, time=hidden.float().mean(-1), answer=ids, asked=hidden)

    def clock(self, time: Tensor) -> Clock:
        return Clock()

    def tokens(self, state: Tensor, clock: Clock) -> tuple[Tensor, Tensor | None]:
        return self.scalars.tokens(self.embedding(state)), None

    def init(self, shape: tuple[int, int, int, int], generator: torch.Generator, device: torch.device) -> Tensor:
        return torch.full((*shape[:3], self.real_dim), self.mask_id, device=device)

    def noise(self, shape: Sequence[int], index: int, generator: torch.Generator) -> Noise:
        return (grouped(torch.rand, (*shape, 2), generator),)

    def time(self, index: int) -> float:
        return 0.0  # the network sees how much is hidden

    def hold(self, state: Tensor, actions: Tensor, held: Tensor) -> Tensor:
        return torch.where(held[..., None], self.bins.encode(actions[..., : self.real_dim]), state)

    def advance(self, state: Tensor, out: Tensor, index: int, held: Tensor, noise: Noise) -> Tensor:
        """One round: draw candidates for hidden tokens, then hide the least sure again."""
        (uniform,) = noise
        hidden = state == self.mask_id
        drawn = draws_of(out / self.config.temperature, uniform[..., 0]) if self.config.temperature else out.argmax(-1)
        candidates = torch.where(hidden, drawn, state)
        if index + 1 == self.steps:
            return candidates
        confidence = self.confidence(out, candidates)
        heat = self.config.choice_temperature * (1 - (index + 1) / self.steps)
        gumbel = -(-uniform[..., 1].clamp(1e-9, 1 - 1e-7).log()).log()
        scores, free = confidence, ~held[..., None].expand(hidden.shape)
        rankable = hidden
        if self.config.remask == "decay":  # the released code's rule: committed tokens compete, at a discount
            scores = torch.where(hidden, scores, scores * (1 - (index + 1) / self.steps))
            rankable = free
        ranking = (scores.clamp(min=1e-9).log() + heat * gumbel).masked_fill(~rankable, torch.inf)
        rank = ranking.flatten(2).argsort(dim=-1).argsort(dim=-1).view(hidden.shape)
        again = rankable & (rank < masked_after(free.sum((2, 3)), self.steps, index)[..., None, None])
        if self.config.remask == "threshold":  # what is committed stays, unless it has become doubtful
            own = out.softmax(-1).gather(-1, candidates[..., None])[..., 0]
            again = again | (free & ~hidden & (own < remask_threshold(index, self.steps)))
        return candidates.masked_fill(again, self.mask_id)

    def confidence(self, logits: Tensor, candidates: Tensor) -> Tensor:
        """(B, G, H, D): how sure the network is at each position, given what is committed."""
        probabilities = logits.softmax(dim=-1)
        if self.config.score == "sampled":
            return probabilities.gather(-1, candidates[..., None])[..., 0]
        best = probabilities.topk(2, dim=-1).values
        return best[..., 0] if self.config.score == "max" else best[..., 0] - best[..., 1]

    def decode(self, state: Tensor) -> Tensor:
        """Bin centres; padded dimensions are 0."""
        return F.pad(self.bins.decode(state), (0, self.action_dim - self.real_dim))
