"""Flow head: equations, known answers, and what the loss must and must not see."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vla.denoiser import Prediction
from vla.heads.base import Draws
from vla.heads.flow import FlowHead, interpolate, pi0_time
from vla.losses import error_entropy

DIMS = 3


def test_interpolation_is_noise_at_one_and_data_at_zero() -> None:
    a, e = torch.randn(2, 4, DIMS), torch.randn(2, 4, DIMS)
    time = torch.tensor([[1.0, 0.0, 0.25, 0.5]] * 2)
    x, u = interpolate(a, e, time)
    torch.testing.assert_close(x[:, 0], e[:, 0])
    torch.testing.assert_close(x[:, 1], a[:, 1])
    torch.testing.assert_close(x[:, 2], 0.25 * e[:, 2] + 0.75 * a[:, 2])
    torch.testing.assert_close(u, e - a)


def test_time_law() -> None:
    """E[Beta(1.5, 1)] = 0.6 and P(t < 0.2) = 0.2^1.5 = 0.0894, both through 0.999 t + 0.001."""
    time = pi0_time(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    assert float(time.mean()) == pytest.approx(0.6004, abs=0.002)
    assert float((time < 0.2).float().mean()) == pytest.approx(0.0889, abs=0.002)
    assert float(time.min()) >= 0.001
    assert float(time.max()) <= 1.0


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_sampling_follows_the_field_to_the_data(kit: SimpleNamespace, steps: int) -> None:
    """The exact straight-line field is integrated without error by any number of Euler steps."""
    parts = kit.make(replace(kit.FLOW, steps=steps))
    goal = torch.randn(kit.BATCH, 2, kit.STEPS, kit.PADDED)

    def exact(state: Tensor, time: Tensor, noise: Tensor | None = None) -> Prediction:
        """The velocity towards one known chunk: (x - a) / t."""
        return Prediction((state - goal) / time[..., None])

    torch.testing.assert_close(parts.sample(2, predictor=exact).actions, goal, atol=1e-5, rtol=0)


def test_noise_scale_zero_starts_at_the_mean(kit: SimpleNamespace) -> None:
    zero = FlowHead(replace(kit.FLOW, noise_scale=0.0), DIMS, 8)
    assert not zero.init((1, 2, 5, DIMS), torch.Generator(), torch.device("cpu")).any()


@pytest.mark.parametrize("name", ["flow", "flow_adarms"])
def test_loss_ignores_padding(kit: SimpleNamespace, name: str) -> None:
    head, full = kit.make(kit.HEADS[name]).head, kit.target()
    held = torch.zeros(kit.BATCH, 2, kit.STEPS, dtype=torch.bool)
    asked = head.corrupt(full, Draws(7, kit.BATCH, torch.arange(kit.BATCH)), held).asked
    assert not asked[..., 2].any(), "a padded dimension"
    assert torch.equal(asked[..., 0], full.valid[:, None].expand(-1, 2, -1))


@pytest.mark.parametrize("name", ["flow", "flow_adarms"])
def test_per_token_time_reaches_its_token(kit: SimpleNamespace, name: str) -> None:
    parts = kit.make(kit.HEADS[name])
    x = torch.randn(kit.BATCH, 1, kit.STEPS, kit.PADDED)
    t = torch.full((kit.BATCH, 1, kit.STEPS), 0.5)
    with torch.no_grad():
        before = parts.denoiser(1)(x, t).out
        t[..., 2] = 0.0
        changed = (parts.denoiser(1)(x, t).out - before).abs().amax(dim=(0, 1, 3))
    assert changed[2] > 1e-4


@pytest.mark.parametrize(("distance", "expected"), [(0.0, 0.0), (1.0, 0.5662), (100.0, 0.6931)])
def test_error_entropy_known_answers(distance: float, expected: float) -> None:
    """-log of the mean kernel of two errors at a distance; equal errors cost nothing."""
    errors = torch.tensor([[7.0, 0.0], [7.0 + distance, 0.0]])
    assert float(error_entropy(errors)) == pytest.approx(expected, abs=1e-4)
