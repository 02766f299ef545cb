"""Head, expert and gate bound to one context: what sampling and the loss call.

Several chunks for one observation (noise draws, samples) and the horizons of each are packed in the token axis.

Axes: B batch, G groups, N horizons, H steps, T = tokens_per_step * H, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vla.expert import ActionExpert, Context
from vla.heads.base import ActionHead
from vla.horizons import HorizonGate


@dataclass(frozen=True)
class Prediction:
    """What the network says of a state."""

    out: Tensor  # (B, G, H, ...), the horizons fused
    branches: Tensor | None = None  # (B, G, N, H, ...), each horizon's word; beyond its reach it means nothing
    weights: Tensor | None = None  # (B, G, N, H), 0 beyond a horizon's reach


class Predictor(Protocol):
    """Anything that answers a state: one network, a guided one, several composed."""

    def __call__(self, state: Tensor, time: Tensor, noise: Tensor | None = None) -> Prediction: ...


class Denoiser:
    """One policy's network for `groups` chunks of `chunk` steps.

    Masks and rotary tables are made here, once for all denoising steps.

    Args:
        condition: (B, G, W) added to every action token, or None.
    """

    def __init__(
        self,
        head: ActionHead,
        expert: ActionExpert,
        gate: HorizonGate | None,
        context: Context,
        groups: int,
        chunk: int,
        condition: Tensor | None = None,
    ) -> None:
        self.head, self.expert, self.gate, self.context = head, expert, gate, context
        self.groups, self.condition = groups, condition
        horizons = (chunk,) if gate is None else gate.horizons
        self.lengths = [h * head.tokens_per_step for h in horizons]
        self.layout = expert.layout(context, self.lengths * groups)

    def __call__(self, state: Tensor, time: Tensor, noise: Tensor | None = None) -> Prediction:
        """State (B, G, H, ...) at noise levels (B, G, H); `noise` (B, G, N, H) perturbs the gate in training."""
        tokens, cond = self.head.tokens(state, self.head.clock(time))
        if self.condition is not None:
            tokens = tokens + self.condition[:, :, None]
        packed_cond = None if cond is None else pack(cond, self.lengths)
        hidden = self.expert(pack(tokens, self.lengths), packed_cond, self.context, self.layout)
        hidden = unpack(hidden, self.groups, self.lengths)
        if self.gate is None:
            return Prediction(self.head.read(hidden[:, :, 0]))
        per_step = hidden.unflatten(3, (-1, self.head.tokens_per_step)).mean(4)
        weights = self.gate(per_step, noise)
        branches = self.head.read(hidden)
        return Prediction(self.head.fuse(branches, weights), branches, weights)


def pack(tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """(B, G, T, W) -> (B, G * sum(lengths), W): for each group the first tokens of every length."""
    if len(lengths) == 1:
        return tokens.flatten(1, 2)
    return torch.cat([tokens[:, :, :length] for length in lengths], dim=2).flatten(1, 2)


def unpack(packed: Tensor, groups: int, lengths: Sequence[int]) -> Tensor:
    """The inverse of `pack`: (B, G, N, T, W), zeros beyond each length."""
    parts = packed.unflatten(1, (groups, -1)).split(list(lengths), dim=2)
    longest = lengths[-1]
    return torch.stack([F.pad(p, (0, 0, 0, longest - p.shape[2])) for p in parts], dim=2)


class Guided:
    """Classifier-free guidance: reference + scale * (conditional - reference).

    Args:
        both: the network for twice the groups, those without the condition first; they share one prefix.
    """

    def __init__(self, head: ActionHead, both: Predictor, scale: float) -> None:
        self.head, self.both, self.scale = head, both, scale

    def __call__(self, state: Tensor, time: Tensor, noise: Tensor | None = None) -> Prediction:
        twice = self.both(torch.cat((state, state), dim=1), torch.cat((time, time), dim=1), noise)
        reference, conditional = twice.out.chunk(2, dim=1)
        return Prediction(self.head.extrapolate(reference, conditional, self.scale))


class Composed:
    """Several policies on one trajectory, their words weighted at every step (GPC, arXiv 2510.01068).

    Args:
        head: any of theirs; all share the head's settings and the model units.
        weights: one for each predictor, summing to 1.
    """

    def __init__(self, head: ActionHead, predictors: Sequence[Predictor], weights: Sequence[float]) -> None:
        self.head, self.predictors, self.weights = head, predictors, weights

    def __call__(self, state: Tensor, time: Tensor, noise: Tensor | None = None) -> Prediction:
        outs = torch.stack([p(state, time, noise).out for p in self.predictors], dim=2)
        shares = time.new_tensor(self.weights)[:, None].expand(*time.shape[:2], -1, time.shape[2])
        return Prediction(self.head.fuse(outs, shares))
