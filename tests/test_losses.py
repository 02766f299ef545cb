"""The mean over what is supervised."""

import torch

from vla.losses import masked_mean


def test_mean_over_supervised_entries_only() -> None:
    x = torch.arange(24.0).view(2, 3, 4)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    dims = torch.tensor([[True, True, False, False], [False, True, True, True]])
    chosen = [x[b, h, a] for b in range(2) for h in range(3) for a in range(4) if valid[b, h] and dims[b, a]]
    assert len(chosen) == 7
    torch.testing.assert_close(masked_mean(x, valid, dims), torch.stack(chosen).mean())


def test_what_is_masked_may_be_broken() -> None:
    x = torch.tensor([[[1.0, torch.nan], [torch.inf, torch.nan]]], requires_grad=True)
    loss = masked_mean(x, torch.tensor([[True, False]]), torch.tensor([[True, False]]))
    loss.backward()
    assert loss == 1
    assert x.grad is not None
    assert torch.equal(x.grad, torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]))


def test_nothing_supervised_is_zero_with_zero_gradients() -> None:
    x = torch.ones(1, 2, 2, requires_grad=True)
    loss = masked_mean(x, torch.zeros(1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert x.grad is not None
    assert (x.grad == 0).all()


def test_masks_broadcast_over_leading_axes() -> None:
    x = torch.rand(2, 5, 3, 4)  # B, groups, H, A
    valid = torch.rand(2, 1, 3) > 0.3
    dims = torch.rand(2, 1, 4) > 0.3
    mask = (valid.unsqueeze(-1) & dims.unsqueeze(-2)).expand_as(x)
    torch.testing.assert_close(masked_mean(x, valid, dims), x[mask].mean())
