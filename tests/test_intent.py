"""Following an intent: what training hides, and classifier-free guidance (Ho and Salimans 2022)."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vla.conditions import trained_intent
from vla.denoiser import Guided, Prediction
from vla.errors import UsageError
from vla.heads.base import Draws
from vla.policy import VLAPolicy
from vla.policy_config import ConditionConfig


def build(policies: SimpleNamespace, **changes: Any) -> VLAPolicy:
    conditions = ConditionConfig(0, 3, 0.25, **changes)
    policy = VLAPolicy.build(replace(policies.CONFIG, conditions=conditions), policies.STATISTICS, seed=0)
    for weight in policy.conditions.parameters():
        nn.init.normal_(weight, std=0.5)  # they start at zero
    return policy.eval()


def answer(policies: SimpleNamespace, policy: VLAPolicy) -> np.ndarray:
    policy.reset(0)
    return policy.infer(policies.observation()).actions


def alike(policies: SimpleNamespace, policy: VLAPolicy, other: VLAPolicy) -> bool:
    return bool(np.allclose(answer(policies, policy), answer(policies, other), atol=1e-5))


def weights_of(policy: VLAPolicy, other: VLAPolicy) -> VLAPolicy:
    policy.load_state_dict(other.state_dict())
    return policy


def test_scale_zero_ignores_the_intent_and_one_follows_it_plainly(policies: SimpleNamespace) -> None:
    free, plain = build(policies), build(policies, intent=1)
    weights_of(plain, free)
    assert not alike(policies, free, plain)
    nothing = weights_of(build(policies, intent=1, scale=0.0), free)
    almost = weights_of(build(policies, intent=1, scale=1 + 1e-6), free)  # through both branches, unlike scale 1
    assert alike(policies, nothing, free)
    assert alike(policies, almost, plain)
    assert not alike(policies, weights_of(build(policies, intent=2, scale=2.0), free), plain)


@pytest.mark.parametrize("name", ["flow", "regression_l1"])
def test_the_scale_enters_linearly_at_each_step(kit: SimpleNamespace, name: str) -> None:
    parts = kit.make(kit.HEADS[name])
    generator = torch.Generator().manual_seed(0)
    state = parts.head.init((kit.BATCH, 1, kit.STEPS, kit.PADDED), generator, torch.device("cpu"))
    time = torch.full(state.shape[:3], 0.4)
    without, with_it = torch.randn(2, kit.BATCH, 1, kit.STEPS, kit.PADDED)

    def both(state: Tensor, time: Tensor, noise: Tensor | None = None) -> Prediction:
        assert torch.equal(*state.chunk(2, dim=1)), "the same trajectory"
        return Prediction(torch.cat((without, with_it), dim=1))

    for scale in (0.0, 1.0, 0.5, 3.0, -1.0):
        out = Guided(parts.head, both, scale)(state, time).out
        torch.testing.assert_close(out, without + scale * (with_it - without))


@pytest.mark.parametrize("name", ["discrete_scalar", "e0_scalar_adarms"])
def test_bins_are_guided_in_log_probability(kit: SimpleNamespace, name: str) -> None:
    head = kit.make(kit.HEADS[name]).head
    without, with_it = torch.randn(2, 4, 1, kit.STEPS, kit.REAL, 16)
    expected = (3 * with_it.log_softmax(-1) - 2 * without.log_softmax(-1)).softmax(-1)
    torch.testing.assert_close(head.extrapolate(without, with_it, 3.0).softmax(-1), expected)


def test_training_hides_the_intent_of_a_share_of_chunks() -> None:
    config, intent = ConditionConfig(0, 3, 0.25), torch.arange(3).repeat(2000)
    draws = Draws(1, 6000, torch.arange(6000))
    given = trained_intent(config, intent, draws, 2)
    assert given is not None
    assert given.shape == (6000, 2)
    hidden = given == -1
    assert float(hidden.float().mean()) == pytest.approx(0.25, abs=0.02)
    together = float(hidden.all(1).float().mean())
    assert together == pytest.approx(0.0625, abs=0.015), "each chunk by itself"
    assert torch.equal(given[~hidden], intent[:, None].expand(-1, 2)[~hidden])
    rows = torch.arange(100, 200)
    part = trained_intent(config, intent[rows], Draws(1, 6000, rows), 2)
    assert part is not None
    assert torch.equal(part, given[rows]), "however the global batch is divided"
    assert trained_intent(ConditionConfig(3, 0, 0.1), None, draws, 2) is None
    with pytest.raises(UsageError, match=r"conditions\.intents is 3, and the rows of this data say nothing"):
        trained_intent(config, None, draws, 2)


def test_the_loss_sees_the_intents_of_the_rows(policies: SimpleNamespace) -> None:
    policy = build(policies).train()
    batch = policies.batch(policy, range(6))
    for intent in (torch.zeros(6, dtype=torch.long), torch.arange(6) % 3):
        policy.zero_grad()
        policy.loss(replace(batch, intent=intent)).total.backward()
        assert policy.conditions.intent is not None
        grad = policy.conditions.intent.weight.grad
        assert grad is not None
        touched = grad.abs().sum(1) > 0
        assert touched[:3].tolist() == [bool((intent == i).any()) for i in range(3)]
    with pytest.raises(UsageError, match=r"Batch\.intent"):
        policy.loss(batch)
