"""Building blocks against their equations."""

import math

import torch

from vla.layers import AdaRMSNorm, GatedMLP, RMSNorm, attend, residual, time_embedding


def test_time_embedding_known_answers() -> None:
    """[sin, cos] of 2 pi t / period, periods from 4e-3 to 4 in geometric steps (pi0)."""
    out = time_embedding(torch.tensor([0.0, 0.001, 1.0]), 4)
    assert out[0].tolist() == [0.0, 0.0, 1.0, 1.0]
    torch.testing.assert_close(out[1, [0, 2]], torch.tensor([1.0, 0.0]), atol=1e-6, rtol=0)  # a quarter period
    expected = [math.sin(2 * math.pi / 4), math.cos(2 * math.pi / 4)]
    torch.testing.assert_close(out[2, [1, 3]], torch.tensor(expected), atol=1e-6, rtol=0)


def test_rms_norm() -> None:
    x = torch.randn(2, 3, 8)
    norm = RMSNorm(8)
    torch.nn.init.normal_(norm.weight)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    out, gate = norm(x, None)
    assert gate is None
    torch.testing.assert_close(out, expected)


def test_adaptive_norm_scales_shifts_and_gates() -> None:
    x, cond = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    norm = AdaRMSNorm(8)
    assert not norm(x, cond)[1].any(), "every branch starts closed"
    torch.nn.init.normal_(norm.dense.weight)
    out, gate = norm(x, cond)
    scale, shift, expected_gate = (cond @ norm.dense.weight.T).split(8, dim=-1)
    normed = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(out, normed * (1 + scale) + shift)
    torch.testing.assert_close(gate, expected_gate)
    branch = torch.randn_like(x)
    torch.testing.assert_close(residual(x, branch, gate), x + branch * expected_gate)
    torch.testing.assert_close(residual(x, branch, None), x + branch)


def test_gated_mlp() -> None:
    mlp, x = GatedMLP(6, 10), torch.randn(2, 6)
    gate = mlp.gate_proj(x)
    torch.testing.assert_close(mlp(x), mlp.down_proj(gate * torch.sigmoid(gate) * mlp.up_proj(x)))


def test_attention_with_grouped_heads() -> None:
    """Query head n reads key-value head n // (N / K)."""
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.rand(2, 1, 3, 5) > 0.3
    mask[..., 0] = True
    scores = (q @ k.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5).masked_fill(~mask, float("-inf"))
    expected = (scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend(q, k, v, mask), expected, atol=1e-6, rtol=0)


def test_attention_with_its_own_scale_and_capped_scores() -> None:
    """Gemma 2: cap * tanh(score / cap), two query heads to a key head; the mask is not bent."""
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.arange(5).expand(2, 1, 3, 5) < torch.tensor([5, 3])[:, None, None, None]
    scores = torch.einsum("bntd,bnsd->bnts", q, k.repeat_interleave(2, 1)) * 0.7
    expected = (1.5 * torch.tanh(scores / 1.5)).masked_fill(~mask, -1e9).softmax(-1) @ v.repeat_interleave(2, 1)
    out = attend(q, k, v, mask, scale=0.7, softcap=1.5)
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2), atol=1e-6, rtol=0)
    plain = attend(q, k, v, mask, scale=0.7)
    torch.testing.assert_close(attend(q, k, v, mask, scale=0.7, softcap=1e4), plain, atol=1e-5, rtol=0)
