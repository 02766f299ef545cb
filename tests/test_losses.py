import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vla.losses import batch_mean, chunk_mean, weighted


def test_only_what_is_asked_for_counts() -> None:
    errors = torch.tensor([[[[1.0, 9.0], [3.0, float("nan")]]]], requires_grad=True)
    asked = torch.tensor([[[[True, False], [True, False]]]])
    mean = chunk_mean(errors, asked)
    assert mean.tolist() == [[2.0]]
    mean.sum().backward()
    assert errors.grad is not None
    assert errors.grad.flatten().tolist() == [0.5, 0.0, 0.5, 0.0]


def test_nothing_asked_is_zero_with_zero_gradient() -> None:
    errors = torch.full((1, 1, 2, 2), float("inf"), requires_grad=True)
    loss = batch_mean(chunk_mean(errors, torch.zeros(1, 1, 2, 2, dtype=torch.bool)), torch.zeros(1))
    assert float(loss.detach()) == 0
    loss.backward()
    assert errors.grad is not None
    assert not errors.grad.any()


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 10**6))
def test_equals_the_plain_mean_over_supervised_entries(rows: int, groups: int, steps: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    errors = torch.rand(rows, groups, steps, 2, generator=g)
    valid = torch.rand(rows, steps, generator=g) < 0.6
    asked = valid[:, None, :, None].expand(errors.shape)
    loss = batch_mean(chunk_mean(errors, asked), asked[:, 0].sum((1, 2)).float())
    expected = errors[asked].mean() if asked.any() else torch.tensor(0.0)
    torch.testing.assert_close(loss, expected)


def test_weighted_sum_over_horizons() -> None:
    outs = torch.arange(12.0).view(1, 1, 3, 2, 2)
    weights = torch.tensor([[[[1.0, 0.0], [0.0, 0.5], [0.0, 0.5]]]])
    assert weighted(outs, weights).flatten().tolist() == pytest.approx([0.0, 1.0, 8.0, 9.0])
