"""Masked diffusion over action tokens (Discrete Diffusion VLA, arXiv 2508.20072, section 3; MaskGIT).

Every number of a chunk is a bin, and MASK is one more symbol. Training hides a share cos(pi/2 u) of the
tokens and asks for them; decoding starts with all hidden and commits the surest ones round by round.

Axes: B batch, G groups, H steps, D real action dims, A padded action dims, K bins, L = H*D, W width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.bins import Bins
from vla.expert import ActionExpert, Context
from vla.head_config import DiscreteDiffusionConfig
from vla.heads.base import ActionHead, Draws, ExpertCall, Target, grouped_uniform
from vla.heads.tokens import ScalarTokens, draws_of
from vla.losses import LossOut


def masked_after(length: int, rounds: int) -> list[int]:
    """How many of `length` tokens are still hidden after each round: clamp(floor(L cos(pi/2 (j+1)/T)), 1, L-1)."""
    cosines = (math.cos(math.pi / 2 * (j + 1) / rounds) for j in range(rounds))
    return [max(1, min(length - 1, math.floor(length * c))) for c in cosines]


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


class DiscreteDiffusionHead(ActionHead):
    def __init__(self, config: DiscreteDiffusionConfig, real_dim: int, action_dim: int, width: int) -> None:
        super().__init__()
        self.config, self.steps = config, config.steps
        self.real_dim, self.action_dim = real_dim, action_dim
        self.bins = Bins(config.bins, real_dim, config.binary_dims)
        self.scalars = ScalarTokens(config.layout, real_dim, config.bins, width)
        self.embedding = nn.Embedding(config.bins + 1, width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    @property
    def mask_id(self) -> int:
        return self.config.bins

    def token_count(self, chunk: int) -> int:
        return self.scalars.count(chunk)

    def fresh_condition(self, fresh: Tensor) -> Tensor | None:
        return None

    def predict(self, state: Tensor, index: int, call: ExpertCall) -> Tensor:
        """Logits (B, G, H, D, K) for ids (B, G, H, D); bins a dimension cannot take are at -inf."""
        tokens = self.scalars.tokens(self.embedding(state))
        logits = self.scalars.logits(call(tokens, None))
        return logits.masked_fill(~self.bins.allowed().to(logits.device), -torch.inf)

    def loss(self, expert: ActionExpert, context: Context, target: Target, draws: Draws) -> LossOut:
        """Cross-entropy on hidden tokens only: a mean for each chunk, weighted by its number of valid steps.

        So that the sum over micro-batches is the global batch's, whatever was hidden where.
        """
        groups, generator = self.config.draws, draws.generator()
        ids = self.bins.encode(target.actions[..., : self.real_dim])[:, None].expand(-1, groups, -1, -1)
        real = target.valid[:, None, :, None].expand(ids.shape)
        share = torch.cos(torch.pi / 2 * draws.uniform((groups,), generator)).to(ids.device)
        order = draws.uniform((groups, ids[0, 0].numel()), generator).to(ids.device)
        hidden = hide(real.flatten(2), share, order).view(ids.shape)
        call = ExpertCall(expert, context, groups, self.token_count(ids.shape[2]))
        logits = self.predict(ids.masked_fill(hidden, self.mask_id), 0, call)
        entropy = F.cross_entropy(logits.flatten(0, 3), ids.flatten(), reduction="none").view(ids.shape)
        per_chunk = (entropy * hidden).sum((2, 3)) / hidden.sum((2, 3)).clamp(min=1)
        steps = target.valid.sum(1).float()
        total = (per_chunk.mean(1) * steps).sum() / steps.sum().clamp(min=1)
        return LossOut(total=total, terms={"cross_entropy": total.detach()})

    def init(self, shape: tuple[int, int, int, int], generator: torch.Generator, device: torch.device) -> Tensor:
        return torch.full((*shape[:3], self.real_dim), self.mask_id, device=device)

    def advance(self, state: Tensor, out: Tensor, index: int, generator: torch.Generator) -> Tensor:
        """One round: draw candidates for hidden tokens, then hide the least sure again."""
        uniform = grouped_uniform((*state.shape, 2), generator).to(state.device)
        hidden = state == self.mask_id
        drawn = draws_of(out / self.config.temperature, uniform[..., 0]) if self.config.temperature else out.argmax(-1)
        candidates = torch.where(hidden, drawn, state)
        if index + 1 == self.steps:
            return candidates
        confidence = self.confidence(out, candidates)
        scores = confidence
        if self.config.remask == "decay":  # the released code's rule for committed tokens
            scores = torch.where(hidden, scores, scores * (1 - (index + 1) / self.steps))
        heat = self.config.choice_temperature * (1 - (index + 1) / self.steps)
        gumbel = -(-uniform[..., 1].clamp(1e-9, 1 - 1e-7).log()).log()
        ranking = scores.clamp(min=1e-9).log() + heat * gumbel
        if self.config.remask != "decay":
            ranking = ranking.masked_fill(~hidden, torch.inf)  # what is committed stays ...
        count = masked_after(state[0, 0].numel(), self.steps)[index]
        lowest = ranking.flatten(2).argsort(dim=-1)[..., :count]
        again = torch.zeros_like(hidden.flatten(2)).scatter(2, lowest, value=True).view(hidden.shape)
        if self.config.remask == "threshold":  # ... unless it has become doubtful
            again = again | (~hidden & (confidence < remask_threshold(index, self.steps)))
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
