"""The fast path: an older encoding, the newest state, pictures of its own, and what steers it."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vla.conditions import Conditions, Steering
from vla.errors import UsageError
from vla.policy import VLAPolicy
from vla.policy_config import (
    ConditionConfig,
    ConsensusConfig,
    ContinuationConfig,
    FastSlowConfig,
    MixtureConfig,
)
from vla.types import UnderWay

FAST = FastSlowConfig(2, 9, 0.2, 1, (), 16)


def build(policies: SimpleNamespace, **changes: Any) -> VLAPolicy:
    return VLAPolicy.build(replace(policies.CONFIG, **changes), policies.STATISTICS, seed=0).eval()


def touched(policy: VLAPolicy) -> VLAPolicy:
    """With what starts at zero moved away from it, so that it has an effect."""
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if name.startswith(("conditions.", "fresh.fast_images.out_proj")):
                p.copy_(0.5 * torch.randn(p.shape, generator=g))
    return policy


def answer(policy: VLAPolicy, observation: Any, cache: Any = None) -> np.ndarray:
    policy.reset(0)
    return policy.sample_n(observation, 1, cache)[0]


def test_new_conditions_have_no_effect_at_first(policies: SimpleNamespace) -> None:
    plain, steered = build(policies), build(policies, fast_slow=FAST, conditions=ConditionConfig(3, 4, 0.1))
    missing = steered.load_state_dict(plain.state_dict(), strict=False).missing_keys  # noqa: F841 (the rest is new)
    steered.mode = 2
    observation = policies.observation()
    np.testing.assert_allclose(answer(steered, observation), answer(plain, observation), atol=1e-6)


def test_the_age_of_the_encoding_reaches_the_actions(policies: SimpleNamespace) -> None:
    policy, observation = touched(build(policies, fast_slow=FAST)), policies.observation()
    cache = policy.encode_observation(observation)
    chunks = [answer(policy, observation, replace(cache, stamp_s=observation.stamp_s - s / 20)) for s in (0, 4, 9, 40)]
    assert not np.allclose(chunks[0], chunks[1])
    assert not np.allclose(chunks[1], chunks[2])
    np.testing.assert_allclose(chunks[2], chunks[3], atol=1e-6, err_msg="older than trained counts as the oldest")


def test_the_newest_state_is_used_whatever_the_encoding(policies: SimpleNamespace) -> None:
    for state in ("suffix", "prefix"):
        policy, observation = build(policies, state=state), policies.observation()
        cache = policy.encode_observation(observation)
        moved = replace(observation, state=observation.state + 1)
        assert not np.allclose(answer(policy, moved, cache), answer(policy, observation, cache)), state
        np.testing.assert_allclose(answer(policy, moved, cache), answer(policy, moved), atol=1e-5)


def test_a_policy_without_a_state_does_not_see_it(policies: SimpleNamespace) -> None:
    policy, observation = build(policies, state="none"), policies.observation()
    moved = replace(observation, state=observation.state + 1)
    assert np.array_equal(answer(policy, moved), answer(policy, observation))


def test_fast_pictures_are_seen_when_there_are_any(policies: SimpleNamespace) -> None:
    plain = build(policies)
    policy = build(policies, fast_slow=replace(FAST, cameras=("wrist",)))
    observation = policies.observation()
    cache = policy.encode_observation(observation)
    other = replace(observation, images={**observation.images, "wrist": observation.images["wrist"] // 2})
    assert np.array_equal(answer(policy, other, cache), answer(policy, observation, cache)), "no effect at first"
    policy = touched(policy)
    assert not np.allclose(answer(policy, other, cache), answer(policy, observation, cache))
    assert plain.fresh.fast_images is None


def test_several_rows_of_one_encoding(policies: SimpleNamespace) -> None:
    """Two states trained on each encoding count as if each had brought its own."""
    policy = build(policies, fast_slow=replace(FAST, frames=2))
    batch = policies.batch(policy, range(6))
    pairs = torch.arange(6) // 2 * 2
    seen = {name: getattr(batch, name)[pairs] for name in ("images", "image_mask", "tokens", "token_mask")}
    shared = {name: getattr(batch, name)[::2] for name in seen}
    apart = policy.loss(replace(batch, **seen)).total
    together = policy.loss(replace(batch, **shared, observation=torch.arange(6) // 2)).total
    torch.testing.assert_close(together, apart)


def test_steering_by_mode_and_intent() -> None:
    conditions = Conditions(ConditionConfig(3, 2, 0.1), None, 8)
    for p in conditions.parameters():
        torch.nn.init.normal_(p)
    plain = conditions(Steering(), 2, 3)
    assert plain is not None
    assert plain.shape == (2, 3, 8)
    hidden = conditions(Steering(mode=torch.zeros(2, dtype=torch.long), intent=torch.full((2, 3), -1)), 2, 3)
    assert hidden is not None
    assert torch.equal(plain, hidden), "forward and no intent are the defaults"
    each = conditions(Steering(intent=torch.tensor([[0, 1, -1]] * 2)), 2, 3)
    assert each is not None
    assert not torch.allclose(each[:, 0], each[:, 1])
    torch.testing.assert_close(each[:, 2], plain[:, 2])
    with pytest.raises(UsageError, match=r"intent in -1\.\.intents-1"):
        ConditionConfig(0, 2, 0.1, intent=2)


def test_a_chunk_says_how_much_of_it_to_execute(policies: SimpleNamespace) -> None:
    mixture = MixtureConfig((1, 3, 5), "none", 1.0, 1e-3, ConsensusConfig(2, 1e9, 1))
    policy = build(policies, mixture=mixture)
    chunk = policy.infer(policies.observation())
    assert chunk.execute == 5, "nothing reaches the limit"
    assert "disagreement" in chunk.diagnostics
    policy.config = replace(policy.config, mixture=replace(mixture, consensus=ConsensusConfig(2, 0.0, 1)))
    assert policy.infer(policies.observation()).execute == 2, "everything does"
    policy.config = replace(policy.config, mixture=replace(mixture, consensus=None))
    assert policy.infer(policies.observation()).execute == policies.CONFIG.execute


def test_what_is_under_way_is_continued(policies: SimpleNamespace) -> None:
    """Frame shift: after 3 of 8 executed steps, row 0 of what is under way is the old chunk's row 3."""
    policy = build(policies, committed=3, continuation=ContinuationConfig("trained", "hard", 0.0))
    observation = policies.observation()
    policy.reset(0)
    first = policy.infer(observation).actions
    rest = first[2:]  # two steps were executed since
    chunk = policy.infer(observation, UnderWay(rest, fixed=2)).actions
    np.testing.assert_allclose(chunk[:2], rest[:2], atol=1e-5)
    policy.reset(1)
    plain = policy.infer(observation).actions
    policy.reset(1)
    np.testing.assert_array_equal(policy.infer(observation, UnderWay(rest, fixed=0)).actions, plain)


@pytest.mark.parametrize("method", ["vjp", "identity"])
def test_a_flow_policy_is_drawn_to_what_is_under_way(policies: SimpleNamespace, method: Any) -> None:
    policy = build(policies, continuation=ContinuationConfig(method, "linear", 5.0))
    observation = policies.observation()
    rest = np.full((3, 2), 4.0, np.float32)
    policy.reset(0)
    free = policy.infer(observation).actions
    policy.reset(0)
    drawn = policy.infer(observation, UnderWay(rest, fixed=2)).actions
    assert np.abs(drawn[:2] - 4.0).mean() < 0.6 * np.abs(free[:2] - 4.0).mean()


def test_gradients_pass_through_an_older_encoding(policies: SimpleNamespace) -> None:
    policy = build(policies, fast_slow=FAST).train()
    policy.loss(replace(policies.batch(policy, range(6)), age=torch.full((6,), 7.0))).total.backward()
    idle = [n for n, p in policy.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    assert policy.conditions.age is not None
    assert policy.conditions.age.weight.grad is not None
    assert policy.conditions.age.weight.grad.any()


def test_another_intent_counts_at_once(policies: SimpleNamespace) -> None:
    conditions = ConditionConfig(0, 2, 0.1)
    policy, observation = touched(build(policies, conditions=conditions)), policies.observation()
    chunks = []
    for intent, scale in ((-1, 1.0), (0, 1.0), (1, 1.0), (1, 3.0)):
        policy.config = replace(policy.config, conditions=replace(conditions, intent=intent, scale=scale))
        chunks.append(answer(policy, observation))
    for i, one in enumerate(chunks):
        assert not any(np.allclose(one, other) for other in chunks[i + 1 :])
