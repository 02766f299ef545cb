"""Drawing chunks: init, then `steps` times predict and advance, then decode; the same for every head.

Axes: B batch, G groups (samples), N horizons, H steps, A action dims, D dimensions that the head predicts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vla.denoiser import Predictor
from vla.heads.base import ActionHead
from vla.horizons import disagreement
from vla.rtc import Committed, Guidance, guided


@dataclass(frozen=True)
class Sampled:
    """Chunks in model units, and what the horizons thought of them."""

    actions: Tensor  # (B, G, H, A)
    disagreement: Tensor | None  # (B, G, H), of the horizons, summed over the sampler's steps
    branches: Tensor | None  # (B, G, N, H, ...), each horizon's word in the last step


def sample(
    head: ActionHead,
    predictor: Predictor,
    shape: tuple[int, int, int, int],
    generator: torch.Generator,
    device: torch.device,
    *,
    real_dim: int,
    committed: Committed | None = None,
    guidance: Guidance | None = None,
) -> Sampled:
    """Chunks of `shape` (B, G, H, A).

    Args:
        real_dim: action dimensions that are not padding; only they count in the horizons' disagreement.
        committed: steps that the chunks begin with, exactly (for policies trained with policy.committed).
        guidance: an earlier chunk that the new ones are drawn to; not together with `committed`.
    """
    state = head.init(shape, generator, device)
    held = torch.zeros(shape[:3], dtype=torch.bool, device=device) if committed is None else committed.held(shape[1])
    differing, prediction = None, None
    for index in range(head.steps):
        if committed is not None:
            state = head.hold(state, committed.actions[:, None], held)
        if guidance is None:
            times = torch.full(shape[:3], head.time(index), device=device).masked_fill(held, 0)
            prediction = predictor(state, times)
        else:
            prediction = guided(head, predictor, state, index, guidance)
        if prediction.branches is not None and prediction.weights is not None:
            moves, fused = (head.movement(x)[..., :real_dim] for x in (prediction.branches, prediction.out))
            apart = disagreement(moves, fused, prediction.weights)
            differing = apart if differing is None else differing + apart
        state = head.advance(state, prediction.out, index, held, generator)
    actions = head.decode(state)
    if committed is not None:
        actions = torch.where(held[..., None], committed.actions[:, None], actions)
    return Sampled(actions, differing, prediction.branches if prediction else None)
