"""The action expert: a transformer over suffix tokens that reads the prefix cache.

Two phases, so that whatever is constant during sampling is computed once:

    context = expert.context(cache, fresh)      once per control step: prefix + fresh tokens (state)
    hidden  = expert(tokens, cond, context)     once per denoising step: action tokens

Attention rule: the prefix sees itself; fresh tokens see the prefix and themselves; action tokens see both and
their own chunk. So nothing before the actions depends on the actions (pi0's blocks).

Several chunks for one observation (noise draws in training, samples, horizons) are packed side by side in
the token axis as blocks. They share the context without a copy and do not see one another.

Axes: B batch, T action tokens of all blocks, F fresh tokens, P prefix tokens, W width,
N query heads, K key-value heads, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vla.cache import CacheShape, PrefixCache, rope_tables, rotate
from vla.layers import NORMS, GatedMLP, attend, residual
from vla.policy_config import ExpertConfig


@dataclass(frozen=True)
class Context:
    """Everything an expert layer attends to that does not change while a chunk is being denoised."""

    keys: tuple[Tensor, ...]  # one per expert layer, (B, K, P+F, D); cross layers: (B, K, P, D)
    values: tuple[Tensor, ...]  # as keys
    valid: Tensor  # (B, P+F) bool
    prefix_len: int  # P
    next_position: Tensor  # (B,) int64, rotary position of the first action


@dataclass(frozen=True)
class Layout:
    """Masks and rotary tables of one block of tokens, the same for every layer and denoising step."""

    joint_mask: Tensor  # (B, 1, T, P+F+T) bool
    cross_mask: Tensor  # (B, 1, 1, P) bool
    joint_rope: tuple[Tensor, Tensor]  # cos, sin (B, T, D): positions continue after the prefix
    cross_rope: tuple[Tensor, Tensor]  # cos, sin (B, T, D): positions restart at 0 (SmolVLA)


class ExpertLayer(nn.Module):
    """Attention and MLP with pre-norms. Subclasses decide what the tokens attend to."""

    def __init__(self, config: ExpertConfig, shape: CacheShape, kv_width: int) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.input_layernorm = NORMS[config.norm](config.width, config.norm_eps)
        self.q_proj = nn.Linear(config.width, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(kv_width, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(kv_width, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, config.width, bias=False)
        self.post_attention_layernorm = NORMS[config.norm](config.width, config.norm_eps)
        self.mlp = GatedMLP(config.width, config.mlp, config.activation)

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, N*D) -> (B, N, T, D)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def feed_forward(self, x: Tensor, cond: Tensor | None) -> Tensor:
        normed, gate = self.post_attention_layernorm(x, cond)
        return residual(x, self.mlp(normed), gate)


class JointLayer(ExpertLayer):
    """Tokens attend to the cache of one backbone layer and to themselves, as one sequence (pi0)."""

    def __init__(self, config: ExpertConfig, shape: CacheShape) -> None:
        super().__init__(config, shape, config.width)
        self.scale, self.softcap = shape.scale, shape.softcap  # keys of the cache are made for these

    def context(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values

    def forward(
        self, x: Tensor, cond: Tensor | None, keys: Tensor, values: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, W) -> x, and the keys and values (B, K, S+T, D) that tokens after these attend to."""
        normed, gate = self.input_layernorm(x, cond)
        query = rotate(self.heads(self.q_proj(normed)), layout.joint_rope)
        own = rotate(self.heads(self.k_proj(normed)), layout.joint_rope)
        keys = torch.cat((keys, own), dim=2)
        values = torch.cat((values, self.heads(self.v_proj(normed))), dim=2)
        attended = attend(query, keys, values, layout.joint_mask, self.scale, self.softcap)
        x = residual(x, self.o_proj(attended), gate)
        return self.feed_forward(x, cond), keys, values


class CrossLayer(ExpertLayer):
    """Tokens attend to learned projections of the cache of one backbone layer, not to themselves (SmolVLA)."""

    def __init__(self, config: ExpertConfig, shape: CacheShape) -> None:
        super().__init__(config, shape, shape.kv_heads * shape.head_dim)

    def context(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        own = self.k_proj.weight.dtype  # a frozen backbone may be held in another
        flat_keys, flat_values = (x.transpose(1, 2).flatten(2).to(own) for x in (keys, values))
        return self.heads(self.k_proj(flat_keys)), self.heads(self.v_proj(flat_values))

    def forward(
        self, x: Tensor, cond: Tensor | None, keys: Tensor, values: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed, gate = self.input_layernorm(x, cond)
        query = rotate(self.heads(self.q_proj(normed)), layout.cross_rope)
        x = residual(x, self.o_proj(attend(query, keys, values, layout.cross_mask)), gate)
        return self.feed_forward(x, cond), keys, values


LAYERS: dict[str, type[JointLayer] | type[CrossLayer]] = {"joint": JointLayer, "cross": CrossLayer}


class ActionExpert(nn.Module):
    """Expert layer i reads backbone layer `taps[i]`; taps are spread evenly and end at the last layer."""

    def __init__(self, config: ExpertConfig, shape: CacheShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        self.taps = [((i + 1) * shape.layers - 1) // config.layers for i in range(config.layers)]
        kinds = [config.attention[i % len(config.attention)] for i in range(config.layers)]
        self.layers = nn.ModuleList(LAYERS[kind](config, shape) for kind in kinds)
        self.norm = NORMS[config.norm](config.width, config.norm_eps)

    def context(self, cache: PrefixCache, fresh: Tensor, cond: Tensor | None) -> Context:
        """Run the fresh tokens once and keep what the action tokens will attend to.

        Args:
            fresh: (B, F, W), F may be 0.
            cond: (B, F, W) condition of the fresh tokens, with norm 'adarms'.
        """
        start, count = self.first_position(cache), fresh.shape[1]
        layout = self.fresh_layout(cache.valid, start, count)
        pairs = []
        for layer, tap in zip(self.layers, self.taps, strict=True):
            assert isinstance(layer, JointLayer | CrossLayer)
            keys, values = layer.context(cache.keys[tap], cache.values[tap])
            if count:
                fresh, keys, values = layer(fresh, cond, keys, values, layout)
            pairs.append((keys, values))
        seen = cache.valid.new_ones(cache.batch, count)
        return Context(
            keys=tuple(k for k, _ in pairs),
            values=tuple(v for _, v in pairs),
            valid=torch.cat((cache.valid, seen), dim=1),
            prefix_len=cache.valid.shape[1],
            next_position=start + count,
        )

    def first_position(self, cache: PrefixCache) -> Tensor:
        """(B,) int64, rotary position of the first fresh token."""
        first = self.config.first_position
        return cache.next_position if first is None else torch.full_like(cache.next_position, first)

    def fresh_layout(self, valid: Tensor, start: Tensor, count: int) -> Layout:
        """Masks and positions of `count` fresh tokens behind a prefix `valid` (B, P); they see it and one another."""
        positions = start[:, None] + torch.arange(count, device=valid.device)
        return self._layout(valid, valid.shape[1], positions, valid.new_ones(count, count))

    def layout(self, context: Context, lengths: Sequence[int]) -> Layout:
        """Masks and positions for blocks of `lengths` tokens side by side; constant over the denoising loop."""
        device = context.valid.device
        positions = context.next_position[:, None] + torch.cat([torch.arange(n, device=device) for n in lengths])
        blocks = [torch.ones(n, n, dtype=torch.bool, device=device) for n in lengths]
        if self.config.action_attention == "causal":
            blocks = [block.tril() for block in blocks]
        return self._layout(context.valid, context.prefix_len, positions, torch.block_diag(*blocks))

    def _layout(self, valid: Tensor, prefix_len: int, positions: Tensor, own: Tensor) -> Layout:
        rows, count = positions.shape
        before = valid[:, None, None, :].expand(rows, 1, count, valid.shape[1])
        among = own.bool().expand(rows, 1, count, count)
        dim, theta = self.shape.head_dim, self.shape.rope_theta
        return Layout(
            joint_mask=torch.cat((before, among), dim=-1),
            cross_mask=valid[:, None, None, :prefix_len],
            joint_rope=rope_tables(positions, dim, theta),
            cross_rope=rope_tables(positions - positions[:, :1], dim, theta),
        )

    def forward(self, tokens: Tensor, cond: Tensor | None, context: Context, layout: Layout) -> Tensor:
        """Action tokens (B, T, W), condition (B, T, W) or None -> hidden states (B, T, W)."""
        x = tokens
        for layer, keys, values in zip(self.layers, context.keys, context.values, strict=True):
            x, _, _ = layer(x, cond, keys, values, layout)
        return self.norm(x, cond)[0]
