"""The expert's weights, laid out for the loop: fewer and larger matrices, norms folded in, time in tables.

Rotary positions turn pairs (i, i + D/2) of a head. Here the rows of query and key projections are reordered so that
a pair is adjacent: then a rotation is one complex product. Scores do not change, as keys are reordered alike.

Axes: W width, N query heads, K key-value heads, D head size, M hidden size of the MLP, L layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla.expert import ActionExpert, CrossLayer, JointLayer
from vla.layers import AdaRMSNorm, RMSNorm


@dataclass(frozen=True)
class FusedLayer:
    """Matrices that multiply rows from the right."""

    projection: Tensor  # (W, N*D), of queries; joint layers: (W, (N+2K)*D), of queries, keys and values
    output: Tensor  # (N*D, W)
    gate_up: Tensor  # (W, 2M)
    down: Tensor  # (M, W)
    eps: tuple[float, float]  # of the norms before attention and MLP
    prefix: tuple[Tensor, Tensor] | None  # (K*D, K*D) twice, cross layers' projections of cached keys and values


def paired(weight: Tensor, head_dim: int) -> Tensor:
    """Rows (heads*D, ...) with a rotary pair's two adjacent."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def matrix(linear: nn.Module, width: int) -> Tensor:
    """(out, in) of a linear map without bias; of one with adapters by what it does to the unit vectors."""
    if type(linear) is nn.Linear:
        return linear.weight
    parameter = next(linear.parameters())
    return linear(torch.eye(width, dtype=parameter.dtype, device=parameter.device)).T


def fuse(expert: ActionExpert) -> list[FusedLayer]:
    """One for each layer of the expert: a copy of its weights."""
    fused = []
    for layer in expert.layers:
        assert isinstance(layer, JointLayer | CrossLayer)
        width, head_dim, joint = expert.config.width, expert.shape.head_dim, isinstance(layer, JointLayer)
        inner = width if joint else expert.shape.kv_heads * head_dim
        query = paired(matrix(layer.q_proj, width), head_dim)
        key, value = paired(matrix(layer.k_proj, inner), head_dim), matrix(layer.v_proj, inner)
        mlp, hidden = layer.mlp, expert.config.mlp
        before, between = layer.input_layernorm, layer.post_attention_layernorm
        gate_up = torch.cat((matrix(mlp.gate_proj, width), matrix(mlp.up_proj, width)))
        fused.append(
            FusedLayer(
                projection=_after_norm(torch.cat((query, key, value)) if joint else query, before),
                output=matrix(layer.o_proj, query.shape[0]).detach().clone().T,
                gate_up=_after_norm(gate_up, between),
                down=matrix(mlp.down_proj, hidden).detach().clone().T,
                eps=(before.eps, between.eps),
                prefix=None if joint else (key.detach().T, value.detach().clone().T),
            )
        )
    return fused


def _after_norm(weight: Tensor, norm: nn.Module) -> Tensor:
    """(in, out), with the norm's own weight folded in."""
    return (weight * norm.weight if isinstance(norm, RMSNorm) else weight).detach().clone().T


def modulations(expert: ActionExpert, condition: Tensor) -> Tensor:
    """1 + scale, shift and gate of every norm at conditions (S, W): (S, 2L+1, 3, W); the last norm is the final one."""
    norms = [n for layer in expert.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
    rows = []
    for norm in (*norms, expert.norm):
        assert isinstance(norm, AdaRMSNorm)
        scale, shift, gate = norm.dense(condition).chunk(3, dim=-1)
        rows.append(torch.stack((1 + scale, shift, gate), dim=1))
    return torch.stack(rows, dim=1).detach()
