"""The loss of a policy on one batch: the same for every head, with and without a mixture of horizons.

    L = L_mix + independent * L_ind + balance * L_bal + past_weight * L_past + the head's penalties

With past-token prediction (arXiv 2505.09561) a target begins before the observation; L_past is the loss on those
steps, and the other terms see only the steps ahead.

Axes: B batch, G groups, N horizons, H steps, D dimensions that the head predicts.
"""

from dataclasses import replace

import torch
from torch import Tensor

from vla.denoiser import Predictor
from vla.heads.base import ActionHead, Draws, Target
from vla.horizons import balance, independent
from vla.losses import LossOut, batch_mean, chunk_mean
from vla.policy_config import MixtureConfig
from vla.rtc import draw_committed


def policy_loss(
    head: ActionHead,
    predictor: Predictor,
    target: Target,
    draws: Draws,
    *,
    committed: int,
    mixture: MixtureConfig | None,
    past: int = 0,
    past_weight: float = 1.0,
) -> LossOut:
    """Corrupt the target, predict, compare.

    Args:
        committed: most steps that are given as already under way.
        past: steps of the target that lie before the observation; not together with the two others.
    """
    held = draw_committed(draws, head.draws, committed, target.valid)
    corrupted = head.corrupt(target, draws, held)
    noise = None
    if mixture is not None and mixture.gate_noise == "learned":
        shape = (head.draws, len(mixture.horizons), target.actions.shape[1])
        noise = draws.normal(shape, draws.generator(purpose=2)).to(target.actions.device)
    prediction = predictor(corrupted.state, corrupted.time, noise)
    entries = target.entries()
    errors = head.errors(prediction.out, corrupted.answer)
    behind = (torch.arange(errors.shape[2], device=errors.device) < past)[:, None]
    ahead = replace(corrupted, asked=corrupted.asked & ~behind)
    main = batch_mean(chunk_mean(errors, ahead.asked), entries)
    parts: dict[str, Tensor] = {head.error_name: main} | head.penalties(prediction.out, ahead)
    if past and past_weight:
        parts["past"] = past_weight * batch_mean(chunk_mean(errors, corrupted.asked & behind), entries)
    if mixture is not None and prediction.branches is not None and prediction.weights is not None:
        each = prediction.branches.shape[2]
        answer = corrupted.answer[:, :, None].expand(-1, -1, each, *[-1] * (corrupted.answer.dim() - 2))
        branch_errors = head.errors(prediction.branches, answer)
        own = independent(branch_errors, corrupted.asked, mixture.horizons, entries)
        parts["horizons"] = mixture.independent * own
        parts["balance"] = mixture.balance * balance(prediction.weights, mixture.horizons)
    total = sum(parts.values(), main * 0)
    return LossOut(total=total, terms={name: value.detach() for name, value in parts.items()})
