"""Real-time chunking: a new chunk that continues the one that is under way while it is computed.

Two families. Trained (arXiv 2512.05964): the committed steps are given clean, with time 0 for their tokens, in
training and in sampling; nothing is added to a denoising step. Inference-time (arXiv 2506.07339): any flow policy
is drawn towards the earlier chunk while sampling, by a correction through the network's Jacobian (`vjp`) or with
the identity in its place (`identity`, what LeRobot does: cheaper, but what is committed does not spread).

Axes: B batch, G groups, H steps, A action dims.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vla.denoiser import Prediction, Predictor
from vla.errors import UsageError
from vla.heads.base import ActionHead, Draws
from vla.heads.flow import FlowHead
from vla.heads.tokens import CategoricalHead

Schedule = Literal["hard", "linear", "exponential"]


@dataclass(frozen=True)
class Committed:
    """Steps that will be executed whatever the new chunk says."""

    actions: Tensor  # (B, H, A) model units, in the new chunk's frame; beyond `length` they may hold anything
    length: Tensor  # (B,) int64

    def held(self, groups: int) -> Tensor:
        """(B, G, H) bool."""
        ahead = torch.arange(self.actions.shape[1], device=self.length.device) < self.length[:, None]
        return ahead[:, None].expand(-1, groups, -1)


@dataclass(frozen=True)
class Guidance:
    """The earlier chunk, and how strongly each step of the new one is drawn to it."""

    previous: Tensor  # (B, H, A) model units, in the new chunk's frame; where the weight is 0 it may hold anything
    weights: Tensor  # (H,) in [0, 1]
    strength: float  # largest guidance weight (beta); for bins, logits added to the earlier one
    method: Literal["vjp", "identity", "prior"]


def prefix_weights(delay: int, end: int, steps: int, schedule: Schedule) -> Tensor:
    """(H,) weights: 1 for the first `delay` steps, falling to 0 at `end`, 0 from there on.

    `end` is the chunk length less the steps executed between two chunks (H - s). A delay beyond `end` is `end`.
    """
    delay = min(delay, end)
    step = torch.arange(steps, dtype=torch.float64)
    linear = ((delay - 1 - step) / (end - delay + 1) + 1).clamp(0, 1)
    match schedule:
        case "hard":
            weights = (step < delay).double()
        case "linear":
            weights = linear
        case "exponential":
            weights = linear * linear.expm1() / (math.e - 1)
    return torch.where(step < end, weights, 0).float()


def guidance_weight(time: float, largest: float) -> float:
    """min(beta, (1-tau)/tau * (tau^2 + (1-tau)^2) / (1-tau)^2) with tau = 1 - time; beta at tau = 0."""
    tau = 1 - time
    if tau <= 0:
        return largest
    return min(largest, (tau**2 + time**2) / (tau * time)) if time > 0 else largest


def guided(head: ActionHead, predictor: Predictor, state: Tensor, index: int, guidance: Guidance) -> Prediction:
    """The prediction in sampler step `index`, drawn towards the earlier chunk.

    Raises:
        UsageError: the head cannot be guided by this method.
    """
    time = head.time(index)
    times = torch.full(state.shape[:3], time, device=state.device)
    match head, guidance.method:
        case FlowHead(), "vjp" | "identity":
            return _corrected(predictor, state, times, time, guidance)
        case CategoricalHead(), "prior":
            prediction = predictor(state, times)
            drawn = head.prefer(prediction.out, guidance.previous, guidance.strength * guidance.weights, index)
            return Prediction(drawn, prediction.branches, prediction.weights)
        case _:
            raise UsageError(
                f"policy.continuation.method {guidance.method!r} does not fit {type(head).__name__}: flow heads take "
                "'vjp' or 'identity', heads over bins take 'prior', and any head takes 'trained'."
            )


def _corrected(predictor: Predictor, state: Tensor, times: Tensor, time: float, guidance: Guidance) -> Prediction:
    """x1 = x - t v is the chunk that v points at; v is corrected by -g J^T (w (y - x1)), J = d x1 / d x."""
    weights = guidance.weights[:, None].to(state.device)
    with torch.set_grad_enabled(guidance.method == "vjp"):
        point = state.detach().requires_grad_(guidance.method == "vjp")
        prediction = predictor(point, times)
        estimate = point - time * prediction.out
        error = ((guidance.previous[:, None] - estimate) * weights).detach().nan_to_num()
        if guidance.method == "vjp":
            (error,) = torch.autograd.grad(estimate, point, error)
    out = prediction.out.detach() - guidance_weight(time, guidance.strength) * error
    return Prediction(out, prediction.branches, prediction.weights)


def draw_committed(draws: Draws, groups: int, limit: int, valid: Tensor) -> Tensor:
    """(B, G, H) bool, the steps that are given in training: none in a fifth of the chunks, else 0..limit evenly.

    At least one valid step (B, H) of each chunk is left to learn.
    """
    rows, steps = valid.shape
    if not limit:
        return torch.zeros(rows, groups, steps, dtype=torch.bool, device=valid.device)
    chance = draws.uniform((groups, 2), draws.generator(purpose=1)).to(valid.device)
    length = (chance[..., 1] * (limit + 1)).long() * (chance[..., 0] >= 0.2)
    length = length.minimum((valid.sum(1) - 1).clamp(min=0)[:, None])
    return torch.arange(steps, device=valid.device) < length[..., None]


def reanchored(actions: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Actions (..., H, D) given relative to state `old` (..., D), relative to state `new` instead.

    A leftover of a chunk whose actions are offsets from the state at its beginning is wrong in the next frame.
    """
    return actions + (old - new)[..., None, :]
