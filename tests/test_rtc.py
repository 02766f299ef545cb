"""Real-time chunking: weights, guidance, known answers of a linear-Gaussian world, committed steps."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from vla.denoiser import Prediction
from vla.errors import UsageError
from vla.head_config import FlowConfig
from vla.heads.base import Draws
from vla.heads.flow import FlowHead
from vla.policy_config import ContinuationConfig
from vla.rtc import Committed, Guidance, draw_committed, guidance_weight, prefix_weights, reanchored
from vla.sampling import sample


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0]),
        ("exponential", [1, 1, 0.5706, 0.2871, 0.1145, 0.0258, 0, 0, 0, 0]),
        ("hard", [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_prefix_weights_known_answers(
    schedule: Literal["linear", "exponential", "hard"], expected: list[float]
) -> None:
    torch.testing.assert_close(prefix_weights(2, 6, 10, schedule), torch.tensor(expected).float(), atol=1e-4, rtol=0)


def kinetix(start: int, end: int, total: int, schedule: str) -> np.ndarray:
    """The formula of the paper's own simulation code, written from its description in numpy."""
    start = min(start, end)
    w = np.clip((start - 1 - np.arange(total)) / (end - start + 1) + 1, 0, 1)
    if schedule == "exponential":
        w = w * np.expm1(w) / (math.e - 1)
    if schedule == "hard":
        w = (np.arange(total) < start).astype(float)
    return np.where(np.arange(total) >= end, 0, w)


@pytest.mark.parametrize("total", [5, 8, 10])
def test_prefix_weights_for_every_delay_and_end(total: int) -> None:
    for start in range(total + 1):
        for end in range(total + 1):
            for schedule in ("linear", "exponential", "hard"):
                found = prefix_weights(start, end, total, schedule)  # pyright: ignore[reportArgumentType]
                np.testing.assert_allclose(found, kinetix(start, end, total, schedule), atol=1e-6)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(5, [5, 4.25, 2.1667, 2.1667, 4.25]), (10, [10, 9.111, 4.25, 2.762, 2.167, 2.0, 2.167, 2.762, 4.25, 9.111])],
)
def test_guidance_weight_known_answers(steps: int, expected: list[float]) -> None:
    found = [guidance_weight(1 - i / steps, float(steps)) for i in range(steps)]
    assert found == pytest.approx(expected, abs=1e-3)


# --- a linear-Gaussian world: the exact velocity is known in closed form -------------------------

STEPS, DELAY = 8, 3
COVARIANCE = 0.95 ** (torch.arange(STEPS)[:, None] - torch.arange(STEPS)).abs().double()
GIVEN = torch.tensor([1.0, 1.2, 1.4], dtype=torch.float64)


def exact_velocity(state: Tensor, time: Tensor, noise: Tensor | None = None) -> Prediction:
    """u = E[e - a | x_t] for a ~ N(0, C): with S = t^2 I + (1-t)^2 C, (t I - (1-t) C) S^-1 x."""
    t = float(time.flatten()[0])
    eye = torch.eye(STEPS, dtype=torch.float64)
    operator = (t * eye - (1 - t) * COVARIANCE) @ torch.linalg.inv(t**2 * eye + (1 - t) ** 2 * COVARIANCE)
    return Prediction((state.double()[..., 0] @ operator.T)[..., None].to(state.dtype))


def guided_mean(method: Literal["vjp", "identity"] | None, steps: int, largest: float = 5.0) -> tuple[Tensor, float]:
    """Mean of the steps after the given ones, and the mean jump between them."""
    head = FlowHead(FlowConfig("flow", "concat", steps, 1.0, 1), 1, 8)
    previous = torch.zeros(1, STEPS, 1)
    previous[0, :DELAY, 0] = GIVEN.float()
    guidance = None if method is None else Guidance(previous, prefix_weights(3, 3, STEPS, "hard"), largest, method)
    with torch.no_grad():
        chunks = sample(
            head,
            exact_velocity,
            (1, 4000, STEPS, 1),
            torch.Generator().manual_seed(0),
            torch.device("cpu"),
            real_dim=1,
            guidance=guidance,
        ).actions[0, :, :, 0]
    return chunks[:, DELAY:].mean(0), float((chunks[:, DELAY] - float(GIVEN[-1])).abs().mean())


def test_guidance_in_a_linear_gaussian_world() -> None:
    """The Jacobian spreads what is given to the steps that are not; the identity pins the prefix alone."""
    given, rest = COVARIANCE[:DELAY, :DELAY], COVARIANCE[DELAY:, :DELAY]
    exact = (rest @ torch.linalg.solve(given, GIVEN)).float()
    assert exact.tolist() == pytest.approx([1.330, 1.264, 1.200, 1.140, 1.083], abs=1e-3)
    vjp, jump = guided_mean("vjp", 50)
    assert float((vjp - exact).abs().max()) < 0.06
    identity, identity_jump = guided_mean("identity", 50)
    assert float((identity - exact).abs().max()) > 0.15
    assert float((vjp - identity).abs().max()) > 0.2
    assert jump < identity_jump < guided_mean(None, 10)[1]


@pytest.mark.parametrize(
    ("method", "steps", "expected"),
    [
        ("vjp", 5, [1.286, 1.241, 1.192, 1.141, 1.087]),
        ("identity", 5, [1.251, 1.025, 0.879, 0.781, 0.717]),
        ("identity", 50, [1.126, 0.942, 0.822, 0.741, 0.685]),
    ],
)
def test_guidance_known_answers(method: Literal["vjp", "identity"], steps: int, expected: list[float]) -> None:
    assert guided_mean(method, steps)[0].tolist() == pytest.approx(expected, abs=0.04)


def test_nothing_to_follow_is_the_plain_sampler_bit_for_bit(kit: SimpleNamespace) -> None:
    for name in ("flow", "discrete", "e0"):
        parts = kit.make(kit.HEADS[name])
        assert torch.equal(parts.sample(2, guidance=None, committed=None).actions, parts.sample(2).actions)


@pytest.mark.parametrize("name", ["flow", "flow_adarms"])
def test_guidance_through_a_network_pulls_the_prefix(kit: SimpleNamespace, name: str) -> None:
    parts = kit.make(kit.HEADS[name])
    previous = torch.full((kit.BATCH, kit.STEPS, kit.PADDED), 0.9)
    previous[:, 3:] = float("nan")  # there is no earlier chunk that far
    free = parts.sample(2).actions
    for method in ("vjp", "identity"):
        guidance = Guidance(previous, prefix_weights(2, 3, kit.STEPS, "linear"), 5.0, method)
        drawn = parts.sample(2, guidance=guidance).actions
        assert drawn.isfinite().all()
        assert float((drawn[:, :, :2] - 0.9).abs().mean()) < 0.5 * float((free[:, :, :2] - 0.9).abs().mean())


@pytest.mark.parametrize("name", ["discrete", "e0"])
def test_heads_over_bins_are_drawn_to_the_earlier_bins(kit: SimpleNamespace, name: str) -> None:
    parts = kit.make(kit.HEADS[name])
    previous = kit.target().actions
    free = parts.sample(8).actions[..., : kit.REAL]
    guidance = Guidance(previous, prefix_weights(2, 4, kit.STEPS, "linear"), 8.0, "prior")
    drawn = parts.sample(8, guidance=guidance).actions[..., : kit.REAL]
    aim = previous[:, None, :, : kit.REAL]
    assert float((drawn - aim)[:, :, :2].abs().mean()) < 0.7 * float((free - aim)[:, :, :2].abs().mean())


def test_methods_that_do_not_fit_the_head_are_refused(kit: SimpleNamespace) -> None:
    guidance = Guidance(torch.zeros(4, 5, 3), torch.ones(5), 1.0, "vjp")
    with pytest.raises(UsageError, match="does not fit DiscreteDiffusionHead"):
        kit.make(kit.DISCRETE).sample(1, guidance=guidance)
    with pytest.raises(UsageError, match=r"'vjp' does not fit head 'e0'.*\['prior'\] do"):
        kit.policy_config(kit.E0, continuation=ContinuationConfig("vjp", "linear", 5.0))
    with pytest.raises(UsageError, match=r"policy\.committed > 0"):
        kit.policy_config(kit.FLOW, continuation=ContinuationConfig("trained", "hard", 0.0))


# --- committed steps -----------------------------------------------------------------------------

HEADS = ("flow", "flow_adarms", "regression_l1", "discrete", "discrete_scalar", "e0", "e0_scalar_adarms")


@pytest.mark.parametrize("name", HEADS)
def test_no_delay_is_the_plain_loss_bit_for_bit(kit: SimpleNamespace, name: str) -> None:
    head, target = kit.make(kit.HEADS[name], committed=2).head, kit.target()
    plain = kit.make(kit.HEADS[name]).head
    draws = Draws(3, kit.BATCH, torch.arange(kit.BATCH))
    none = torch.zeros(kit.BATCH, head.draws, kit.STEPS, dtype=torch.bool)
    one, other = head.corrupt(target, draws, none), plain.corrupt(target, draws, none)
    for field in ("state", "time", "answer", "asked"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field


@pytest.mark.parametrize("name", HEADS)
def test_committed_steps_are_clean_and_not_asked_for(kit: SimpleNamespace, name: str) -> None:
    head, target = kit.make(kit.HEADS[name], committed=2).head, kit.target()
    held = torch.zeros(kit.BATCH, head.draws, kit.STEPS, dtype=torch.bool)
    held[:, :, :2] = True
    corrupted = head.corrupt(target, Draws(3, kit.BATCH, torch.arange(kit.BATCH)), held)
    assert not corrupted.asked[:, :, :2].any()
    assert not corrupted.time[:, :, :2].any(), "their time is data"
    clean = head.hold(corrupted.state, target.actions[:, None], held)
    torch.testing.assert_close(corrupted.state, clean)
    assert corrupted.asked[:2].any(-1)[:, :, 2:].any(), "the rest still is"


def test_delays_are_drawn_as_stated() -> None:
    rows = 20_000
    valid = torch.ones(rows, 8, dtype=torch.bool)
    length = draw_committed(Draws(0, rows, torch.arange(rows)), 1, 3, valid).sum(2)[:, 0]
    share = torch.bincount(length, minlength=4) / rows
    torch.testing.assert_close(share, torch.tensor([0.4, 0.2, 0.2, 0.2]), atol=0.015, rtol=0)
    short = torch.arange(8) < torch.tensor([[2], [1]])
    held = draw_committed(Draws(0, 2, torch.arange(2)), 50, 7, short)
    assert held[0].sum(1).max() == 1, "one valid step of two is left to learn"
    assert not held[1].any()


def test_the_continuation_of_a_policy_follows_its_own_start(kit: SimpleNamespace) -> None:
    """A head trained with committed steps answers differently to different beginnings, at data's own time."""
    parts = kit.make(replace(kit.FLOW, draws=16), committed=3)
    actions = kit.target().actions
    network = parts.denoiser(1)
    held = Committed(actions, torch.tensor([2, 2, 2, 2])).held(1)
    assert torch.equal(held[0, 0], torch.tensor([True, True, False, False, False]))
    state = parts.head.hold(torch.randn(4, 1, 5, 3), actions[:, None], held)
    time = torch.full((4, 1, 5), 0.7).masked_fill(held, 0)
    with torch.no_grad():
        one = network(state, time).out
        other = network(parts.head.hold(state, actions[:, None] + 1, held), time).out
    assert float((one - other)[:, :, 2:].abs().min(-1).values.max()) > 1e-5


def test_reanchoring_keeps_the_target() -> None:
    old, new, leftover = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0]), torch.randn(4, 2)
    torch.testing.assert_close(reanchored(leftover, old, new) + new, leftover + old)
