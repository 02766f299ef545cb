"""Masked diffusion over bins: bins, the schedule, re-masking, and the law that decoding has."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vla.bins import Bins
from vla.heads.base import Draws
from vla.heads.discrete_diffusion import DiscreteDiffusionHead, hide, masked_after, remask_threshold
from vla.heads.tokens import draws_of


@given(st.floats(-3, 3), st.sampled_from([2, 16, 256, 2048]))
def test_bins_round_trip_within_half_a_bin(value: float, count: int) -> None:
    decoded = float(Bins(count, 1).decode(Bins(count, 1).encode(torch.tensor([value]))))
    assert abs(decoded - min(max(value, -1), 1)) <= 1 / count + 1e-6


def test_bin_centres_are_unbiased() -> None:
    """The released E0 code decodes left edges, which is off by -1/K on average."""
    values = torch.linspace(-1, 1, 200_001)[:-1, None]
    bins = Bins(256, 1)
    assert abs(float((bins.decode(bins.encode(values)) - values).mean())) < 1e-5


def test_a_binary_dimension_is_low_or_high(kit: SimpleNamespace) -> None:
    bins = Bins(16, 2, (1,))
    ids = bins.encode(torch.tensor([[0.3, -0.2], [0.3, 0.4]]))
    assert ids[:, 1].tolist() == [0, 1]
    assert bins.decode(ids)[:, 1].tolist() == [-1.0, 1.0]
    assert bins.allowed().sum(1).tolist() == [16, 2]
    parts = kit.make(replace(kit.DISCRETE, binary_dims=(1,)))
    assert set(parts.sample(4).actions[..., 1].unique().tolist()) <= {-1.0, 1.0}


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(20_000, 3)
    share = torch.bincount(draws_of(logits, torch.rand(20_000, generator=torch.Generator().manual_seed(0)))) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.1, 0.2, 0.7]), atol=0.015, rtol=0)


def test_commit_schedule_known_answer() -> None:
    """L = 56 tokens in T = 12 rounds (arXiv 2508.20072)."""
    left = [int(masked_after(torch.tensor(56), 12, j)) for j in range(12)]
    assert left == [55, 54, 51, 48, 44, 39, 34, 28, 21, 14, 7, 1]
    assert [a - b for a, b in zip([56, *left[:-1]], left, strict=True)] == [1, 1, 3, 3, 4, 5, 5, 6, 7, 7, 7, 6]


def test_remask_thresholds_of_the_paper() -> None:
    assert [round(remask_threshold(j, 12), 3) for j in (0, 1, 11)] == [0.0, 0.042, 0.458]
    assert math.isclose(0.5 * (1 - 1 / 12), remask_threshold(11, 12))


def test_hidden_share_and_support() -> None:
    real = torch.tensor([True] * 8 + [False] * 4).expand(3, -1)
    order = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    hidden = hide(real, torch.tensor([0.5, 1.0, 0.001]), order)
    assert hidden.sum(1).tolist() == [4, 8, 1]
    assert not hidden[:, 8:].any()
    assert hidden[0, order[0, :8].argsort()[:4]].all()


def discrete(kit: SimpleNamespace, **changes: Any) -> DiscreteDiffusionHead:
    head = kit.make(replace(kit.DISCRETE, **changes)).head
    assert isinstance(head, DiscreteDiffusionHead)
    return head


def nothing_held(state: Tensor) -> Tensor:
    return torch.zeros(state.shape[:3], dtype=torch.bool)


def test_only_hidden_tokens_are_asked_for(kit: SimpleNamespace) -> None:
    head, target = discrete(kit), kit.target()
    held = torch.zeros(kit.BATCH, 2, kit.STEPS, dtype=torch.bool)
    held[0, :, :2] = True
    corrupted = head.corrupt(target, Draws(3, kit.BATCH, torch.arange(kit.BATCH)), held)
    assert torch.equal(corrupted.asked, corrupted.state == head.mask_id)
    assert not corrupted.asked[held].any()
    assert not corrupted.asked[3, :, 1:].any(), "beyond the episode's end"
    kept = ~corrupted.asked
    assert torch.equal(corrupted.state[kept], corrupted.answer[kept])


@pytest.mark.parametrize("held_steps", [0, 2])
@pytest.mark.parametrize("remask", ["none", "decay"])
def test_rounds_commit_what_the_schedule_says(kit: SimpleNamespace, remask: str, held_steps: int) -> None:
    head = discrete(kit, remask=remask)
    state = head.init((1, 1, kit.STEPS, kit.PADDED), torch.Generator(), torch.device("cpu"))
    held = nothing_held(state)
    held[..., :held_steps] = True
    state = head.hold(state, kit.target().actions[:1, None], held)
    given = state[held]
    free = torch.tensor((kit.STEPS - held_steps) * kit.REAL)
    generator = torch.Generator().manual_seed(0)
    for index in range(5):
        before = state
        out = torch.randn(1, 1, kit.STEPS, kit.REAL, 16, generator=generator)
        state = head.advance(state, out, index, held, head.noise(state.shape, index, generator))
        assert int((state == head.mask_id).sum()) == int(masked_after(free, 6, index))
        assert torch.equal(state[held], given), "what is held is never hidden"
        if remask == "decay":
            continue
        committed = before != head.mask_id
        assert torch.equal(state[committed], before[committed])
    assert (
        head.advance(state, torch.randn(1, 1, kit.STEPS, kit.REAL, 16), 5, held, head.noise(state.shape, 5, generator))
        != head.mask_id
    ).all()


@pytest.mark.parametrize(("remask", "expected"), [("threshold", True), ("none", False)])
def test_a_doubtful_commitment_is_hidden_again(kit: SimpleNamespace, remask: str, expected: bool) -> None:  # noqa: FBT001
    head = discrete(kit, remask=remask)
    ids = torch.zeros(1, 1, kit.STEPS, kit.REAL, dtype=torch.long)
    ids[0, 0, 4] = head.mask_id
    logits = torch.full((1, 1, kit.STEPS, kit.REAL, 16), -20.0)
    logits[..., 0] = 20.0
    logits[0, 0, 1, 1] = torch.zeros(16)  # 1/16 everywhere: below 0.5 * 4/6
    logits[0, 0, 2, 0, 3] = 30.0  # sure, but of another bin than the committed one
    logits[0, 0, 3] = 0.0
    held = nothing_held(ids)
    held[..., 3] = True  # doubtful, and under way
    after = head.advance(ids, logits, 4, held, head.noise(ids.shape, 4, torch.Generator().manual_seed(0)))
    doubtful = torch.zeros(4, kit.REAL, dtype=torch.bool)
    doubtful[1, 1] = doubtful[2, 0] = expected
    assert torch.equal(after[0, 0, :4] == head.mask_id, doubtful)


def joint_law(kit: SimpleNamespace, score: str, rounds: int) -> Tensor:
    """Histogram over 3^3 outcomes of decoding an exact joint distribution, one token a round."""
    torch.manual_seed(0)
    joint = torch.rand(3, 3, 3) ** 2
    joint /= joint.sum()
    config = replace(kit.DISCRETE, bins=3, steps=rounds, score=score, layout="per_scalar")
    head = DiscreteDiffusionHead(config, 1, 1, 4)
    n = 30_000
    generator = torch.Generator().manual_seed(1)
    state = torch.full((1, n, 3, 1), 3)
    for index in range(rounds):
        # exact conditionals: sum the joint over what is hidden, with what is committed held fixed
        table = joint.expand(n, 3, 3, 3)
        for axis in range(3):
            ids = state[0, :, axis, 0]
            keep = torch.nn.functional.one_hot(ids.clamp(max=2), 3).bool() | (ids == 3)[:, None]
            shape = [n, 1, 1, 1]
            shape[axis + 1] = 3
            table = table * keep.view(shape)
        marginals = [table.sum([d for d in (1, 2, 3) if d != axis + 1]) for axis in range(3)]
        out = torch.stack(marginals, 1)[None, :, :, None].clamp(min=1e-12).log()
        state = head.advance(state, out, index, nothing_held(state), head.noise(state.shape, index, generator))
    flat = (state[0, :, :, 0] * torch.tensor([9, 3, 1])).sum(1)
    return torch.stack([torch.bincount(flat, minlength=27) / n, joint.flatten()])


def test_decoding_an_exact_joint_gives_the_joint(kit: SimpleNamespace) -> None:
    """Choosing the position from the context alone keeps the law; ranking by the drawn token biases it to modes."""
    histogram, joint = joint_law(kit, "max", 3)
    assert float((histogram - joint).abs().sum()) < 0.03
    histogram, joint = joint_law(kit, "sampled", 3)
    assert float((histogram - joint).abs().sum()) > 0.06


@pytest.mark.parametrize("layout", ["per_step", "per_scalar"])
def test_action_tokens_see_one_another_in_both_directions(kit: SimpleNamespace, layout: str) -> None:
    parts = kit.make(replace(kit.DISCRETE, layout=layout))
    ids = torch.zeros(kit.BATCH, 1, kit.STEPS, kit.REAL, dtype=torch.long)
    with torch.no_grad():
        network, time = parts.denoiser(1), torch.zeros(kit.BATCH, 1, kit.STEPS)
        before = network(ids, time).out
        ids[:, :, -1, -1] = 5
        after = network(ids, time).out
    assert (before[:, :, 0, 0] != after[:, :, 0, 0]).any()


def test_a_mixture_of_probabilities(kit: SimpleNamespace) -> None:
    head = discrete(kit)
    outs = torch.randn(2, 1, 3, kit.STEPS, kit.REAL, 16, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(2, 1, 3, kit.STEPS, generator=torch.Generator().manual_seed(1))
    weights[:, :, 0, 3:] = 0
    weights = weights / weights.sum(2, keepdim=True)
    expected = (outs.softmax(-1) * weights[..., None, None]).sum(2)
    torch.testing.assert_close(head.fuse(outs, weights).softmax(-1), expected)


@pytest.mark.parametrize("layout", ["per_step", "per_scalar"])
def test_a_token_tells_which_dimension_holds_which_bin(kit: SimpleNamespace, layout: str) -> None:
    head = discrete(kit, layout=layout)
    ids = torch.zeros(1, 1, kit.STEPS, kit.REAL, dtype=torch.long)
    ids[..., 0], ids[..., 1] = 3, 9
    one, other = (head.scalars.tokens(head.embedding(x)) for x in (ids, ids.flip(-1)))
    assert float((one - other).detach().abs().max()) > 1e-3
