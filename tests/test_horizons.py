"""Mixture of horizons: packing, gate, losses and consensus (arXiv 2511.19433), with known answers."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vla.denoiser import Denoiser, Prediction, pack, unpack
from vla.errors import UsageError
from vla.horizons import balance, consensus, disagreement, gate_weights, squared_variation, support
from vla.policy_config import ConsensusConfig, ExpertConfig, MixtureConfig

MIXTURE = MixtureConfig((1, 3, 5), "none", 1.0, 1e-3, None)
HEADS = ("flow", "flow_adarms", "regression_l1", "discrete_scalar", "e0_scalar_adarms")


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True), st.integers(1, 3))
def test_unpacking_undoes_packing(lengths: list[int], groups: int) -> None:
    lengths = sorted(lengths)
    tokens = torch.randn(2, groups, lengths[-1], 4)
    packed = pack(tokens, lengths)
    assert packed.shape == (2, groups * sum(lengths), 4)
    apart = unpack(packed, groups, lengths)
    for i, length in enumerate(lengths):
        assert torch.equal(apart[:, :, i, :length], tokens[:, :, :length])
        assert not apart[:, :, i, length:].any()


@pytest.mark.parametrize("name", HEADS)
def test_each_horizon_equals_its_own_call(kit: SimpleNamespace, name: str) -> None:
    """Truncation equivalence: horizon h says what a network that gets only the first h steps would say."""
    parts = kit.make(kit.HEADS[name], mixture=MIXTURE)
    state = parts.head.init(
        (kit.BATCH, 2, kit.STEPS, kit.PADDED), torch.Generator().manual_seed(0), torch.device("cpu")
    )
    time = torch.full(state.shape[:3], 0.4)
    with torch.no_grad():
        branches = parts.denoiser(2)(state, time).branches
        assert branches is not None
        for i, h in enumerate(MIXTURE.horizons):
            alone = Denoiser(parts.head, parts.expert, None, parts.context(), 2, h)
            out = alone(state[:, :, :h], time[:, :, :h]).out
            torch.testing.assert_close(branches[:, :, i, :h], out, atol=1e-5, rtol=1e-4)


def test_packed_horizons_have_the_tokens_they_need_and_no_more(kit: SimpleNamespace) -> None:
    parts = kit.make(kit.FLOW, mixture=MIXTURE)
    mask = parts.denoiser(2).layout.joint_mask
    assert mask.shape[2] == 2 * (1 + 3 + 5)


@given(st.integers(0, 10**6))
def test_gate_support(seed: int) -> None:
    horizons = (2, 3, 7)
    weights = gate_weights(
        torch.randn(2, 2, 3, 7, generator=torch.Generator().manual_seed(seed)) * 5, support(horizons)
    )
    assert not weights[:, :, ~support(horizons)].any()
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 2, 7))
    assert torch.equal(weights[:, :, 2, 3:], torch.ones(2, 2, 4)), "only the longest horizon predicts the last steps"


@pytest.mark.parametrize("count", [2, 3, 10])
def test_squared_variation_known_answers(count: int) -> None:
    one_hot = torch.zeros(count)
    one_hot[0] = 1
    assert float(squared_variation(one_hot)) == pytest.approx(count, rel=1e-4)
    assert float(squared_variation(torch.full((count,), 1 / count))) == pytest.approx(0, abs=1e-6)


def test_balance_is_over_the_intervals_that_several_horizons_reach() -> None:
    even = gate_weights(torch.zeros(2, 1, 3, 5), support((1, 3, 5)))
    assert float(balance(even, (1, 3, 5))) == pytest.approx(0, abs=1e-6)
    logits = torch.zeros(2, 1, 3, 5)
    logits[:, :, 2] = 50.0  # everything to the longest: 3 over three active horizons, 2 over two
    assert float(balance(gate_weights(logits, support((1, 3, 5))), (1, 3, 5))) == pytest.approx(2.5, rel=1e-3)


@pytest.mark.parametrize("name", HEADS)
def test_one_horizon_counts_twice_and_has_nothing_to_balance(kit: SimpleNamespace, name: str) -> None:
    alone = kit.make(kit.HEADS[name])
    base = float(alone.loss(kit.target()).total.detach())
    mixed = kit.make(kit.HEADS[name], mixture=MixtureConfig((5,), "learned", 1.0, 1e-3, None))
    mixed.head.load_state_dict(alone.head.state_dict())
    mixed.expert.load_state_dict(alone.expert.state_dict())
    out = mixed.loss(kit.target())
    assert float(out.total.detach()) == pytest.approx(2 * base, rel=1e-5)
    assert float(out.terms["balance"]) == 0


@pytest.mark.parametrize("name", ["flow", "regression_l2", "discrete", "e0"])
def test_equal_branches_fuse_to_themselves_whatever_the_gate(kit: SimpleNamespace, name: str) -> None:
    head = kit.make(kit.HEADS[name]).head
    g = torch.Generator().manual_seed(0)
    branch = head.read(torch.randn(2, 1, kit.STEPS * head.tokens_per_step, kit.WIDTH, generator=g))
    outs = branch[:, :, None].expand(-1, -1, 3, *[-1] * (branch.dim() - 2))
    fused = head.fuse(outs, gate_weights(torch.randn(2, 1, 3, kit.STEPS, generator=g), support((1, 3, 5))))
    apart = disagreement(head.movement(outs), head.movement(fused), torch.ones(2, 1, 3, kit.STEPS))
    assert float(apart.detach().max()) < 1e-5
    if branch.dim() == 5:
        fused, branch = fused.softmax(-1), branch.softmax(-1)
    torch.testing.assert_close(fused, branch)


def test_only_the_mixed_loss_teaches_the_gate(kit: SimpleNamespace) -> None:
    for weight, learns in ((0.0, True), (1.0, True)):
        parts = kit.make(kit.FLOW, mixture=replace(MIXTURE, independent=weight, balance=0.0))
        parts.loss(kit.target()).total.backward()
        assert bool(parts.gate.gate_out_proj.weight.grad.any()) is learns
    parts = kit.make(kit.FLOW, mixture=replace(MIXTURE, balance=0.0))
    prediction = parts.denoiser(1)(torch.randn(4, 1, 5, 3), torch.full((4, 1, 5), 0.5))
    (gradient,) = torch.autograd.grad(
        prediction.branches.sum(), parts.gate.gate_out_proj.weight, allow_unused=True, materialize_grads=True
    )
    assert not gradient.any(), "a horizon's own prediction does not pass through the gate"


def test_gate_noise_is_for_training_only(kit: SimpleNamespace) -> None:
    parts = kit.make(kit.FLOW, mixture=replace(MIXTURE, gate_noise="learned"))
    state, time = torch.randn(4, 1, 5, 3), torch.full((4, 1, 5), 0.5)
    network = parts.denoiser(1)
    with torch.no_grad():
        plain, noisy = network(state, time).weights, network(state, time, torch.randn(4, 1, 3, 5)).weights
        assert torch.equal(plain, network(state, time).weights)
    assert not torch.allclose(plain, noisy)


# horizons (2, 4, 8) predict step k: 3 for k < 2, 2 for k < 4, 1 from 4 on
CONSENSUS = ConsensusConfig(shortest=2, ratio=1.5, active=2)


@pytest.mark.parametrize(
    ("apart", "active", "expected"),
    [
        ([1, 1, 1, 1, 1, 1, 1, 1], 2, 4),  # from step 4 on fewer than 2 horizons predict
        ([1, 1, 1, 1, 1, 1, 1, 1], 1, 8),  # the paper's rule: stop when active < m; the code's stops at active <= m
        ([1, 1, 1, 1, 1, 1, 1, 1], 3, 2),
        ([1, 1, 1.4, 1.5, 0, 0, 0, 0], 1, 3),  # the limit itself stops
        ([1, 1, 1.5, 0, 0, 0, 0, 0], 1, 2),
        ([9, 9, 9, 9, 9, 9, 9, 99], 1, 7),
        ([50, 0, 37, 0, 0, 0, 0, 0], 1, 8),  # the first steps are executed whatever they are
    ],
)
def test_consensus_truth_table(apart: list[float], active: int, expected: int) -> None:
    assert consensus(np.array(apart, np.float32), (2, 4, 8), replace(CONSENSUS, active=active)) == expected


def test_consensus_never_exceeds_the_chunk() -> None:
    assert consensus(np.ones(3, np.float32), (3,), ConsensusConfig(5, 1.0, 1)) == 3


def test_disagreement_counts_real_dimensions_and_adds_up_over_the_steps(kit: SimpleNamespace) -> None:
    parts = kit.make(replace(kit.FLOW, steps=4), mixture=MIXTURE)
    plain = parts.denoiser(2)

    def apart(state: Tensor, time: Tensor, noise: Tensor | None = None) -> Prediction:
        """Branches that differ by 1 in a real dimension and by much in a padded one, mixed half and half."""
        out = torch.zeros(4, 2, 5, 3)
        offset = torch.tensor([1.0, 0.0, 50.0])
        branches = torch.stack((out + offset / 2, out - offset / 2), dim=2)
        return Prediction(out, branches, torch.full((4, 2, 2, 5), 0.5))

    assert plain.gate is not None
    found = parts.sample(2, predictor=apart).disagreement
    torch.testing.assert_close(found, torch.full((4, 2, 5), 0.5))  # 4 steps of dt 1/4, each 0.5 from the fused one


def test_horizons_that_make_no_sense_are_refused(kit: SimpleNamespace) -> None:
    for horizons in ((), (3, 1, 5), (1, 1, 5), (0, 5)):
        with pytest.raises(UsageError, match="must be positive and increasing"):
            MixtureConfig(horizons, "none", 1.0, 1e-3, None)
    with pytest.raises(UsageError, match=r"\[1, 3\] must end with policy.chunk, 5"):
        kit.policy_config(kit.FLOW, mixture=replace(MIXTURE, horizons=(1, 3)))
    with pytest.raises(UsageError, match="every horizon would predict the same"):
        kit.policy_config(kit.FLOW, mixture=MIXTURE, expert=ExpertConfig(24, 2, 32, ("joint",), "rms", "causal"))
