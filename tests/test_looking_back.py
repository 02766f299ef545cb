"""Policies that look back: earlier states as tokens, paths that start at them, past-token prediction."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vla import checkpoint
from vla.denoiser import Prediction
from vla.errors import UsageError
from vla.fresh import Fresh
from vla.heads.base import Draws
from vla.heads.flow import FlowHead, source_time
from vla.objective import policy_loss
from vla.observed import closest_past, executed
from vla.policy import VLAPolicy
from vla.policy_config import ContinuationConfig, MixtureConfig
from vla.sampling import Start, follow
from vla.types import ActionChunk, Observation, Recalling

HEADS = ("flow", "flow_adarms", "regression_l1", "discrete_scalar", "e0_scalar_adarms")


def build(policies: SimpleNamespace, head: dict[str, Any] | None = None, **changes: Any) -> VLAPolicy:
    config = replace(policies.CONFIG, head=replace(policies.CONFIG.head, **(head or {})), **changes)
    return VLAPolicy.build(config, policies.STATISTICS, seed=0).eval()


def looking(policies: SimpleNamespace, **rows: np.ndarray) -> Observation:
    return replace(policies.observation(), **rows)


def answer(policy: VLAPolicy, observation: Observation, seed: int = 0) -> ActionChunk:
    policy.reset(seed)
    return policy.infer(observation)


def states(count: int, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)


def test_earlier_states_are_tokens_before_the_newest(policies: SimpleNamespace) -> None:
    policy = build(policies, history=3)
    given = Fresh(torch.randn(2, 4), history=torch.randn(2, 3, 4))
    tokens, newest = policy.fresh.tokens(given), policy.fresh.state_proj
    assert newest is not None
    assert tokens.shape == (2, 4, 24)
    assert given.history is not None
    torch.testing.assert_close(tokens, newest(torch.cat((given.history, given.state[:, None]), 1)))
    assert policy.fresh.history_position is not None
    with torch.no_grad():
        policy.fresh.history_position[1] = 1.0
    torch.testing.assert_close(policy.fresh.tokens(given)[:, 1], newest(given.history[:, 1]) + 1)


def test_the_policy_acts_on_earlier_states_and_says_when_it_has_none(policies: SimpleNamespace) -> None:
    policy = build(policies, history=3)
    assert isinstance(policy, Recalling)
    assert (policy.history, policy.past) == (3, 0)
    rows = states(5)
    chunk = answer(policy, looking(policies, history=rows[2:]))
    assert np.array_equal(chunk.actions, answer(policy, looking(policies, history=rows)).actions), (
        "the last three count"
    )
    for i in range(2, 5):
        moved = rows.copy()
        moved[i] += 1
        assert not np.allclose(chunk.actions, answer(policy, looking(policies, history=moved)).actions, atol=1e-7)
    with pytest.raises(UsageError, match=r"needs 3 rows of Observation\.history \(policy\.history\).* was given 0"):
        policy.infer(policies.observation())
    with pytest.raises(UsageError, match="was given 2"):
        policy.infer(looking(policies, history=rows[:2]))


def test_training_and_acting_read_history_alike(policies: SimpleNamespace) -> None:
    """The loop's physical states become the rows that the data side makes."""
    policy = build(policies, history=3)
    rows, seen = states(3), []
    original = policy.fresh.tokens
    policy.fresh.tokens = lambda fresh: seen.append(fresh) or original(fresh)  # pyright: ignore[reportAttributeAccessIssue]
    answer(policy, looking(policies, history=rows))
    torch.testing.assert_close(seen[0].history[0], torch.from_numpy(policy.processor.codec.encode_state(rows)))


@pytest.mark.parametrize("options", [{"history": 2}, {"history": 2, "head": {"source": "history"}}, {"past": 2}])
def test_every_weight_learns(policies: SimpleNamespace, options: dict[str, Any]) -> None:
    policy = build(policies, **options).train()
    policy.loss(rows_of(policies, policy)).total.backward()
    idle = [n for n, p in policy.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    named = {id(p) for group in policy.parameter_groups().values() for p in group}
    assert named == {id(p) for p in policy.parameters() if p.requires_grad}


def rows_of(policies: SimpleNamespace, policy: VLAPolicy) -> Any:
    """A batch with what `policy` looks back at."""
    plain, config = policies.batch(policy, list(range(6))), policy.config
    g = torch.Generator().manual_seed(3)
    before = torch.arange(6)[:, None] >= torch.arange(config.past, 0, -1)
    return replace(
        plain,
        history=torch.randn(6, config.history, 4, generator=g),
        actions=torch.cat((torch.randn(6, config.past, 3, generator=g), plain.actions), dim=1),
        valid=torch.cat((before, plain.valid), dim=1),
    )


def test_a_source_that_is_the_target_leaves_nothing_to_learn(kit: SimpleNamespace) -> None:
    head, plain = kit.make(replace(kit.FLOW, noise_scale=0.0)).head, kit.target()
    draws, held = Draws(7, kit.BATCH, torch.arange(kit.BATCH)), torch.zeros(kit.BATCH, 2, kit.STEPS, dtype=torch.bool)
    shown = head.corrupt(replace(plain, source=plain.actions), draws, held)
    assert not shown.answer.any()
    torch.testing.assert_close(shown.state, plain.actions[:, None].expand(-1, 2, -1, -1))
    apart = head.corrupt(replace(plain, source=plain.actions + 2), draws, held)
    torch.testing.assert_close(apart.answer, torch.full_like(apart.answer, 2.0))
    torch.testing.assert_close(apart.state - shown.state, 2 * apart.time[..., None].expand(apart.state.shape))


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_noise_around_the_source_is_as_large_as_it_is_said(kit: SimpleNamespace, scale: float) -> None:
    parts, plain = kit.make(replace(kit.FLOW, noise_scale=scale, draws=64)), kit.target()
    held = torch.zeros(kit.BATCH, 64, kit.STEPS, dtype=torch.bool)
    shown = parts.head.corrupt(replace(plain, source=plain.actions), Draws(7, kit.BATCH, torch.arange(kit.BATCH)), held)
    assert float(shown.answer.std()) == pytest.approx(scale, rel=0.05)


@pytest.mark.parametrize("velocity", [0.0, 0.7])
def test_one_step_of_a_constant_velocity_is_six(kit: SimpleNamespace, velocity: float) -> None:
    source, ends = torch.randn(kit.BATCH, kit.STEPS, kit.PADDED), []
    for steps in (1, 6):
        head = kit.make(replace(kit.FLOW, steps=steps, noise_scale=0.0)).head

        def constant(state: Tensor, time: Tensor, noise: Tensor | None = None) -> Prediction:
            return Prediction(torch.full_like(state, velocity))

        start = Start(source[:, None], ((),) * steps)
        ends.append(follow(head, constant, start, real_dim=kit.REAL).actions[:, 0])
    torch.testing.assert_close(ends[0], source - velocity)
    torch.testing.assert_close(ends[1], ends[0])


def test_half_of_the_times_are_the_source_itself() -> None:
    time = source_time(torch.rand(100_000, generator=torch.Generator().manual_seed(0)))
    assert float((time == 1).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert float(time[time < 1].mean()) == pytest.approx(0.6004, abs=0.005)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_sampling_starts_at_what_is_made_of_the_states(policies: SimpleNamespace, mode: str) -> None:
    """With velocity 0 a chunk is its source."""
    policy = build(policies, {"source": "history", "noise_scale": 0.0}, history=2).train(mode == "train")
    policy.load_state_dict({k: v * ("action_out_proj" not in k) for k, v in policy.state_dict().items()})
    assert isinstance(policy.head, FlowHead)
    assert policy.head.history_source is not None
    torch.nn.init.normal_(policy.head.history_source.mlp_out.weight)
    here = looking(policies, history=states(2))
    codec = policy.processor.codec
    seen = np.concatenate((codec.encode_state(states(2)), codec.encode_state(here.state)[None]))
    source = policy.head.source(torch.from_numpy(seen)[None])
    assert source is not None
    expected = codec.decode_actions(source[0].detach().numpy())
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(answer(policy, here).actions, expected, atol=1e-5)


def test_without_noise_a_history_makes_one_chunk(policies: SimpleNamespace) -> None:
    here = looking(policies, history=states(2))
    still = build(policies, {"source": "history", "noise_scale": 0.0}, history=2)
    assert np.array_equal(answer(still, here, 1).actions, answer(still, here, 2).actions)
    noisy = build(policies, {"source": "history", "noise_scale": 0.3}, history=2)
    assert not np.allclose(answer(noisy, here, 1).actions, answer(noisy, here, 2).actions, atol=1e-3)
    with pytest.raises(UsageError, match=r"source 'history' needs policy\.history"):
        build(policies, {"source": "history"})


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_on_the_past_leaves_the_chunk_alone(kit: SimpleNamespace, name: str) -> None:
    parts, target = kit.make(kit.HEADS[name]), kit.target()
    target = replace(target, valid=torch.ones_like(target.valid))
    words: list[Tensor] = []

    def said(state: Tensor, time: Tensor, noise: Tensor | None = None) -> Prediction:
        words.append(parts.denoiser(parts.head.draws)(state, time).out.detach().requires_grad_())
        return Prediction(words[-1])

    totals, draws = [], Draws(3, kit.BATCH, torch.arange(kit.BATCH))
    for weight in (0.0, 1.0, 2.0):
        loss = policy_loss(parts.head, said, target, draws, committed=0, mixture=None, past=2, past_weight=weight)
        loss.total.backward()
        grad = words[-1].grad
        assert grad is not None
        assert bool(grad[:, :, :2].any()) == (weight > 0)
        assert torch.equal(grad[:, :, 2:], words[0].grad[:, :, 2:])  # pyright: ignore[reportOptionalSubscript]
        assert grad[:, :, 2:].any()
        assert ("past" in loss.terms) == (weight > 0)
        totals.append(loss.total.detach())
    assert totals[1] > totals[0]
    torch.testing.assert_close(totals[2] - totals[1], totals[1] - totals[0])


def test_the_policy_weighs_the_loss_on_its_past(policies: SimpleNamespace) -> None:
    terms = []
    for weight in (1.0, 3.0):
        policy = build(policies, past=2, past_weight=weight)
        terms.append(policy.loss(rows_of(policies, policy)).terms)
    torch.testing.assert_close(terms[1]["past"], 3 * terms[0]["past"])
    torch.testing.assert_close(terms[1]["flow"], terms[0]["flow"])


def test_error_entropy_is_of_the_chunk_alone(kit: SimpleNamespace) -> None:
    parts, target = kit.make(kit.HEADS["flow_entropy"]), kit.target()
    target, draws = replace(target, valid=torch.ones_like(target.valid)), Draws(3, kit.BATCH, torch.arange(kit.BATCH))
    terms = []
    for wrong in (0.0, 50.0):

        def said(state: Tensor, time: Tensor, noise: Tensor | None = None, wrong: float = wrong) -> Prediction:
            return Prediction(torch.nn.functional.pad(state[:, :, 2:], (0, 0, 2, 0), value=wrong))

        loss = policy_loss(parts.head, said, target, draws, committed=0, mixture=None, past=2)
        terms.append(loss.terms)
    assert terms[0]["past"] < terms[1]["past"]
    assert torch.equal(terms[0]["error_entropy"], terms[1]["error_entropy"])


def test_accumulated_losses_are_the_big_batch_s(policies: SimpleNamespace) -> None:
    policy = build(policies, past=2, history=2)
    whole = rows_of(policies, policy)
    parts = []
    for rows in ([0, 1, 2], [3, 4, 5]):
        cut = {f: getattr(whole, f)[rows] for f in ("history", "actions", "valid")}
        parts.append(replace(policies.batch(policy, rows), **cut))
    scaled = [policy.loss(p).total * p.valid.sum() / whole.valid.sum() for p in parts]
    torch.testing.assert_close(sum(scaled), policy.loss(whole).total, atol=1e-6, rtol=0)


def test_a_chunk_begins_at_the_observation(policies: SimpleNamespace) -> None:
    policy, here = build(policies, past=2), policies.observation()
    cache = policy.encode_observation(here)
    drawn = policy.sample(cache, policy.fresh_inputs(here, cache), 3, torch.Generator().manual_seed(0)).actions
    assert drawn.shape == (1, 3, 7, 3)
    policy.reset(0)
    chunks = policy.sample_n(here, 3)
    np.testing.assert_allclose(chunks, policy.processor.codec.decode_actions(drawn[0, :, 2:].numpy()), atol=1e-6)
    assert np.array_equal(answer(policy, here).actions.shape, (5, 2))


def test_candidates_are_ranked_by_their_past() -> None:
    """Equal futures do not matter; rows that were not executed do not either."""
    pasts = np.stack([np.full((3, 2), value) for value in (0.5, 0.1, -0.2)])
    sent = np.zeros((3, 2))
    assert closest_past(pasts, sent) == 1
    assert closest_past(pasts, sent - 0.3) == 2
    pasts[1, 0] = 9.0
    assert closest_past(pasts, sent) == 2
    sent[0] = np.nan
    assert closest_past(pasts, sent) == 1
    assert closest_past(pasts, np.full((3, 2), np.nan)) == 0


def test_the_candidate_that_explains_what_was_executed_is_kept(policies: SimpleNamespace) -> None:
    policy, here = build(policies, past=2, candidates=4), policies.observation()
    assert (policy.history, policy.past) == (0, 2)
    cache = policy.encode_observation(here)
    drawn = policy.sample(cache, policy.fresh_inputs(here, cache), 4, torch.Generator().manual_seed(0)).actions[0]
    physical = policy.processor.codec.decode_actions(drawn.numpy())
    assert len(np.unique(physical[:, 2, 0])) == 4
    for i, (past, chunk) in enumerate(zip(physical[:, :2], physical[:, 2:], strict=True)):
        seen = looking(policies, executed=past)
        np.testing.assert_allclose(answer(policy, seen).actions, chunk, atol=1e-5)
        np.testing.assert_allclose(executed(policy.processor, seen), drawn[i, :2, :2], atol=1e-6)
    first = answer(policy, looking(policies, executed=np.full((2, 2), np.nan, np.float32))).actions
    np.testing.assert_allclose(first, physical[0, 2:], atol=1e-5)
    with pytest.raises(UsageError, match=r"needs 2 rows of Observation\.executed"):
        policy.infer(here)


def test_candidates_are_a_decode_setting(policies: SimpleNamespace, tmp_path: Path) -> None:
    checkpoint.save(build(policies, past=2, history=1), tmp_path / "policy")
    loaded = checkpoint.load(tmp_path / "policy", settings={"candidates": 3})
    assert (loaded.config.candidates, loaded.history, loaded.past) == (3, 1, 2)


def test_settings_that_do_not_go_together_are_refused(policies: SimpleNamespace) -> None:
    for wrong, match in (
        ({"past": 1, "mixture": MixtureConfig((1, 5), "none", 1.0, 0.0, None)}, "does not go together"),
        ({"past": 1, "continuation": ContinuationConfig("vjp", "linear", 5.0)}, "does not go together"),
        ({"past": 1, "committed": 1}, "does not go together"),
        ({"candidates": 2}, "told apart by policy.past"),
        ({"past": 1, "past_weight": -1.0}, "0 or more"),
        ({"history": 1, "state": "prefix"}, "needs policy.state 'suffix'"),
    ):
        with pytest.raises(UsageError, match=match):
            replace(policies.CONFIG, **wrong)
