"""Drawing chunks: init, then `steps` times predict and advance, then decode; the same for every head.

Axes: B batch, G groups (samples), N horizons, H steps, A action dims, D dimensions that the head predicts.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vla.denoiser import Prediction, Predictor
from vla.heads.base import ActionHead, Noise
from vla.horizons import disagreement
from vla.rtc import Committed, Guidance, guided


@dataclass(frozen=True)
class Sampled:
    """Chunks in model units, and what the horizons thought of them."""

    actions: Tensor  # (B, G, H, A)
    disagreement: Tensor | None  # (B, G, H), of the horizons, summed over the sampler's steps
    branches: Tensor | None  # (B, G, N, H, ...), each horizon's word in the last step


@dataclass(frozen=True)
class Start:
    """All that is random about a call, drawn before its loop."""

    state: Tensor  # of the head's own form
    noise: tuple[Noise, ...]  # one entry for each sampler step


class Step(Protocol):
    """Answers the state of a sampler step. `held` (B, G, H) bool: clean steps; None: there are none."""

    def __call__(self, state: Tensor, index: int, held: Tensor | None) -> Prediction: ...


def draw(
    head: ActionHead,
    shape: tuple[int, int, int, int],
    generator: torch.Generator,
    device: torch.device,
    source: Tensor | None = None,
) -> Start:
    """What sampling chunks of `shape` (B, G, H, A) starts from, on `device`.

    Args:
        source: (B, H, A) of `ActionHead.source`, which the head's own start is then around.
    """
    state = head.init(shape, generator, device)
    if source is not None:
        state = source[:, None] + state
    noise = [head.noise(state.shape, index, generator) for index in range(head.steps)]
    return Start(state, tuple(tuple(x.to(device) for x in numbers) for numbers in noise))


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
    start = draw(head, shape, generator, device)
    return follow(head, predictor, start, real_dim=real_dim, committed=committed, guidance=guidance)


def follow(
    head: ActionHead,
    predictor: Predictor,
    start: Start,
    *,
    real_dim: int,
    committed: Committed | None = None,
    guidance: Guidance | None = None,
) -> Sampled:
    """As `sample`, from a start that was drawn already."""

    def step(state: Tensor, index: int, held: Tensor | None) -> Prediction:
        if guidance is not None:
            return guided(head, predictor, state, index, guidance)
        times = torch.full(state.shape[:3], head.time(index), device=state.device)
        return predictor(state, times if held is None else times.masked_fill(held, 0))

    return denoise(head, step, start, real_dim, committed)


def denoise(head: ActionHead, step: Step, start: Start, real_dim: int, committed: Committed | None) -> Sampled:
    """The loop: no randomness, no copy from the host, nothing that depends on what the tensors hold."""
    state, groups = start.state, start.state.shape[1]
    held = None if committed is None else committed.held(groups)
    fixed = torch.zeros(state.shape[:3], dtype=torch.bool, device=state.device) if held is None else held
    differing, prediction = None, None
    for index, noise in enumerate(start.noise):
        if committed is not None:
            state = head.hold(state, committed.actions[:, None], fixed)
        prediction = step(state, index, held)
        if prediction.branches is not None and prediction.weights is not None:
            moves, fused = (head.movement(x)[..., :real_dim] for x in (prediction.branches, prediction.out))
            apart = disagreement(moves, fused, prediction.weights)
            differing = apart if differing is None else differing + apart
        state = head.advance(state, prediction.out, index, fixed, noise)
    actions = head.decode(state)
    if committed is not None:
        actions = torch.where(fixed[..., None], committed.actions[:, None], actions)
    return Sampled(actions, differing, prediction.branches if prediction else None)
