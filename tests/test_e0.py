"""Continuized diffusion: moments of the noise, levels, and the law that sampling has."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vla.heads.e0 import E0Head, level, noised
from vla.heads.tokens import draws_of


def test_noised_one_hots_have_the_stated_moments() -> None:
    ids, tau, alpha = torch.full((40_000,), 3), torch.full((40_000,), 0.7), 0.5
    x = noised(ids, tau, torch.randn(40_000, 8, generator=torch.Generator().manual_seed(0)), alpha)
    expected = torch.zeros(8)
    expected[3] = 0.7 * alpha
    torch.testing.assert_close(x.mean(0), expected, atol=0.01, rtol=0)
    torch.testing.assert_close(x.std(0), torch.full((8,), 0.3), atol=0.01, rtol=0)


def test_levels_are_even_in_log_odds() -> None:
    tau = level(torch.linspace(0, 1, 5))
    torch.testing.assert_close(tau[[0, -1]], torch.tensor([0.02, 0.995]))
    gaps = tau.logit().diff()
    torch.testing.assert_close(gaps, gaps[:1].expand(4), atol=1e-4, rtol=0)


def oracle_histogram(kit: SimpleNamespace, steps: int, scheme: str) -> Tensor:
    """Decode with the exact posterior of a known prior; the law that comes out."""
    prior, n, alpha = torch.tensor([0.5, 0.3, 0.15, 0.05]), 40_000, 1.0
    head = E0Head(replace(kit.E0, bins=4, steps=steps, alpha=alpha), 1, 1, 4)
    generator = torch.Generator().manual_seed(0)
    state = head.init((1, n, 1, 1), generator, torch.device("cpu"))
    for index in range(steps):
        tau = 1 - head.time(index)
        given = 0.0 if index == 0 else tau * alpha / (1 - tau) ** 2  # the first level is pure noise
        posterior = prior.log() + given * state
        if scheme == "argmax":
            posterior = posterior + 1e4 * torch.nn.functional.one_hot(posterior.argmax(-1), 4)
        if index + 1 == steps:  # the last answer is drawn here, to compare laws
            ids = draws_of(posterior, torch.rand(posterior.shape[:-1], generator=generator))
            return torch.bincount(ids.flatten(), minlength=4) / n - prior
        held = torch.zeros(state.shape[:3], dtype=torch.bool)
        state = head.advance(state, posterior, index, held, head.noise(state.shape, index, generator))
    raise AssertionError


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_an_exact_denoiser_gives_the_prior(kit: SimpleNamespace, steps: int) -> None:
    assert float(oracle_histogram(kit, steps, "draw").abs().sum()) < 0.02


def test_taking_the_most_probable_bin_does_not(kit: SimpleNamespace) -> None:
    assert float(oracle_histogram(kit, 3, "argmax").abs().sum()) > 0.3
