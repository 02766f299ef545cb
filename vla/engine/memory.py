"""Static keys and values of one prefix and what is run after it, and the masks and rotary tables that go with them.

A joint layer's buffer is [prefix, padded to a bucket | fresh tokens | action tokens]. The prefix is written once per
encoding; a denoising step overwrites its own tokens in place, so nothing is joined or copied to attend to all.

Axes: B rows, K key-value heads, Q query heads of each, S keys, P prefix tokens, F fresh tokens, T action tokens,
D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vla.cache import PrefixCache
from vla.engine.weights import FusedLayer
from vla.expert import ActionExpert, Context, Layout

ALIGNED = 8  # fused kernels on GPUs take masks whose rows start at multiples of this many entries


@dataclass(frozen=True)
class Sizes:
    """What decides the shapes of all buffers."""

    rows: int  # B
    bucket: int  # prefix tokens there is room for
    fresh: int  # F
    blocks: tuple[int, ...]  # lengths of the blocks of action tokens; their sum is T


@dataclass(frozen=True)
class Span:
    """A stretch of tokens that are run together, and what they may see.

    Masks are added to the scores (0 or -inf): a boolean one would be converted in every attention call. A query
    head's rows are followed by those of the other heads that share its keys, so that keys are never repeated.
    """

    start: int  # in the joint layers' buffers
    stop: int
    joint_mask: Tensor  # (B, 1, T*Q, stop)
    cross_mask: Tensor  # (B, 1, 1, P)
    joint_turn: Tensor  # (B, 1, T, 1, D/2) complex rotations
    cross_turn: Tensor  # (B, 1, T, 1, D/2)
    query: Tensor  # (B, K, T*Q, D), overwritten by every layer

    def arrange(self, layout: Layout, shared: int) -> None:
        """Write another layout's masks and rotations in place; `shared` is Q."""
        _exclude(self.joint_mask, layout.joint_mask.repeat_interleave(shared, dim=2))
        _exclude(self.cross_mask, layout.cross_mask)
        for turn, tables in ((self.joint_turn, layout.joint_rope), (self.cross_turn, layout.cross_rope)):
            cos, sin = (x[:, None, :, None, : x.shape[-1] // 2] for x in tables)
            turn.copy_(torch.complex(cos, sin))


def _exclude(target: Tensor, mask: Tensor) -> None:
    target.zero_().masked_fill_(~mask, -torch.inf)


class Memory:
    """Buffers of one set of sizes, used again by every call of those sizes."""

    def __init__(self, expert: ActionExpert, layers: Sequence[FusedLayer], sizes: Sizes) -> None:
        self.expert, self.layers, self.sizes = expert, layers, sizes
        shape = expert.shape
        self.shared = shape.heads // shape.kv_heads
        self._like = layers[0].output
        first, end = sizes.bucket + sizes.fresh, sizes.bucket + sizes.fresh + sum(sizes.blocks)
        lengths = [end if layer.prefix is None else sizes.bucket for layer in layers]
        self.keys, self.values = (
            [self._zeros(sizes.rows, shape.kv_heads, length, shape.head_dim) for length in lengths] for _ in range(2)
        )
        self.fresh, self.actions = self._span(sizes.bucket, first), self._span(first, end)
        self._loaded: tuple[PrefixCache, int] | None = None  # with how many tokens there were in all

    def _zeros(self, *shape: int) -> Tensor:
        return self._like.new_zeros(shape)

    def _span(self, start: int, stop: int) -> Span:
        rows, heads, dim = self.sizes.rows, self.expert.shape.kv_heads, self.expert.shape.head_dim
        count, room = stop - start, -(-stop // ALIGNED) * ALIGNED
        turns = [self._zeros(rows, 1, count, 1, dim).float() for _ in range(2)]
        joint, cross = (torch.view_as_complex(x.unflatten(-1, (-1, 2))) for x in turns)
        return Span(
            start=start,
            stop=stop,
            joint_mask=self._zeros(rows, 1, count * self.shared, room)[..., :stop],
            cross_mask=self._zeros(rows, 1, 1, self.sizes.bucket),
            joint_turn=joint,
            cross_turn=cross,
            query=self._zeros(rows, heads, count * self.shared, dim),
        )

    def load(self, base: PrefixCache, cache: PrefixCache) -> None:
        """Take in what the action tokens attend to.

        Args:
            base: an encoded observation. While it stays the one that was loaded last, only what follows is written.
            cache: `base`, or `base` with tokens behind that are valid in every row.
        """
        end, last = cache.valid.shape[1], self._loaded
        known = last is not None and base.keys is last[0].keys and base.valid is last[0].valid and end == last[1]
        first = base.valid.shape[1] if known else 0
        if first == end:
            return
        self._loaded = None  # should anything fail half-way
        for i, (layer, tap) in enumerate(zip(self.layers, self.expert.taps, strict=True)):
            self._write(i, layer, slice(first, end), cache.keys[tap][:, :, first:], cache.values[tap][:, :, first:])
        if not known:
            for buffer in (*self.keys, *self.values):  # a number that is not finite would reach through any mask
                buffer[:, :, end : self.sizes.bucket] = 0
            self._arrange(cache)
        self._loaded = base, end

    def _write(self, i: int, layer: FusedLayer, at: slice, keys: Tensor, values: Tensor) -> None:
        """Keys with rotary pairs adjacent, as the fused projections have them."""
        target = self.keys[i][:, :, at]
        if layer.prefix is None:
            target.unflatten(-1, (-1, 2)).copy_(keys.unflatten(-1, (2, -1)).transpose(-1, -2))
            self.values[i][:, :, at] = values
            return
        for buffer, x, weight in zip((target, self.values[i][:, :, at]), (keys, values), layer.prefix, strict=True):
            projected = x.transpose(1, 2).flatten(2).to(weight.dtype) @ weight
            buffer.copy_(projected.unflatten(-1, (-1, buffer.shape[-1])).transpose(1, 2))

    def _arrange(self, cache: PrefixCache) -> None:
        sizes, count = self.sizes, cache.valid.shape[1]
        valid = cache.valid.new_zeros(sizes.rows, sizes.bucket + sizes.fresh)
        valid[:, :count] = cache.valid
        start = self.expert.first_position(cache)
        if sizes.fresh:
            layout = self.expert.fresh_layout(valid[:, : sizes.bucket], start, sizes.fresh)
            self.fresh.arrange(layout, self.shared)
            valid[:, sizes.bucket :] = True
        context = Context((), (), valid, sizes.bucket, start + sizes.fresh)
        self.actions.arrange(self.expert.layout(context, sizes.blocks), self.shared)
