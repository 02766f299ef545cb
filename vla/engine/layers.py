"""The expert's layers over static buffers: what one denoising step runs.

Axes: B rows, T tokens, W width, N query heads, K key-value heads, Q = N / K, S keys, D head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vla.engine.memory import Memory, Span

Modulation = tuple[Tensor, Tensor, Tensor]  # 1 + scale, shift and gate of a norm, (W,) or (B*T, W) each


@dataclass(frozen=True)
class Scoring:
    """How joint layers score keys; cross layers score as usual."""

    scale: float | None
    softcap: float | None


def run(
    x: Tensor,
    memory: Memory,
    span: Span,
    modulations: Sequence[Modulation] | None,
    activation: Callable[[Tensor], Tensor],
    scoring: Scoring,
) -> Tensor:
    """Tokens (B*T, W) of `span` through all layers, without the final norm. Overwrites the span's keys and values."""
    for i, layer in enumerate(memory.layers):
        before, between = (None, None) if modulations is None else (modulations[2 * i], modulations[2 * i + 1])
        projected = normed(x, layer.eps[0], before) @ layer.projection
        keys, values = memory.keys[i], memory.values[i]
        if layer.prefix is None:
            query = _place(projected, keys, values, span)
            attended = attend(query, keys[:, :, : span.stop], values[:, :, : span.stop], span.joint_mask, scoring)
        else:
            query = turned(projected, span.cross_turn, span.query)
            attended = attend(query, keys, values, span.cross_mask, Scoring(None, None))
        x = added(x, _rows(attended, memory.shared), layer.output, before)
        gate, up = (normed(x, layer.eps[1], between) @ layer.gate_up).chunk(2, dim=-1)
        x = added(x, activation(gate) * up, layer.down, between)
    return x


def normed(x: Tensor, eps: float, modulation: Modulation | None) -> Tensor:
    """RMS norm of rows; a norm's own weight is part of the matrix behind it."""
    out = F.rms_norm(x, x.shape[-1:], eps=eps)
    return out if modulation is None else torch.addcmul(modulation[1], out, modulation[0])


def added(x: Tensor, branch: Tensor, weight: Tensor, modulation: Modulation | None) -> Tensor:
    """x + gate * (branch @ weight)."""
    if modulation is None:
        return torch.addmm(x, branch, weight)
    return torch.addcmul(x, branch @ weight, modulation[2])


def turned(x: Tensor, turn: Tensor, out: Tensor) -> Tensor:
    """Rotated queries (B*T, N*D) as rows (B, K, T*Q, D), in `out`."""
    rows, heads, _, dim = out.shape
    pairs = torch.view_as_complex(x.view(rows, turn.shape[2], heads, -1, dim // 2, 2)).transpose(1, 2)
    target = torch.view_as_complex(out.view(*pairs.shape, 2))
    torch.mul(pairs, turn, out=target)
    return out


def _place(projected: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
    """Queries (B, K, T*Q, D) of a joint layer; keys and values of these tokens go into the buffers."""
    rows, heads, _, dim = keys.shape
    inner = heads * dim
    query, own_keys, own_values = projected.split([projected.shape[1] - 2 * inner, inner, inner], dim=-1)
    here = slice(span.start, span.stop)
    pairs = torch.view_as_complex(own_keys.unflatten(0, (rows, -1)).unflatten(-1, (heads, dim // 2, 2)))
    target = torch.view_as_complex(keys.unflatten(-1, (-1, 2)))[:, :, here]
    torch.mul(pairs.transpose(1, 2), span.joint_turn[:, :, :, 0], out=target)
    values[:, :, here] = own_values.unflatten(0, (rows, -1)).unflatten(-1, (heads, dim)).transpose(1, 2)
    return turned(query, span.joint_turn, span.query)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scoring: Scoring) -> Tensor:
    """(B, K, T*Q, D), (B, K, S, D) twice, mask of 0 and -inf (B, 1, T*Q or 1, S) -> (B, K, T*Q, D)."""
    if scoring.softcap is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scoring.scale)
    factor = query.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    scores = scoring.softcap * torch.tanh(query @ keys.transpose(-1, -2) * (factor / scoring.softcap))
    return torch.softmax(scores + mask, dim=-1) @ values


def _rows(attended: Tensor, shared: int) -> Tensor:
    """(B, K, T*Q, D) -> (B*T, N*D)."""
    return attended.unflatten(2, (-1, shared)).transpose(1, 2).flatten(0, 1).flatten(1)
