"""The cached, packed expert against one joint forward pass written out plainly."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vla.cache import CacheShape, PrefixCache, rope_tables, rotate
from vla.denoiser import pack, unpack
from vla.expert import ActionExpert, Context, CrossLayer, JointLayer
from vla.layers import attend
from vla.policy_config import ExpertConfig

SHAPE_LAYERS, HEADS, KV_HEADS, DIM, WIDTH = 3, 4, 2, 8, 24
BATCH, PREFIX, STEPS = 2, 5, 6


def make(attention: tuple[str, ...] = ("joint",), norm: str = "rms", causal: bool = False) -> ActionExpert:  # noqa: FBT001, FBT002
    torch.manual_seed(0)
    config = ExpertConfig(
        width=WIDTH,
        layers=3,
        mlp=32,
        attention=attention,  # pyright: ignore[reportArgumentType]
        norm=norm,  # pyright: ignore[reportArgumentType]
        action_attention="causal" if causal else "bidirectional",
    )
    expert = ActionExpert(config, CacheShape(SHAPE_LAYERS, HEADS, KV_HEADS, DIM, 100.0))
    for name, p in expert.named_parameters():  # zero-initialised gates would hide a broken condition
        if "dense" in name:
            torch.nn.init.normal_(p, std=0.3)
    return expert.double()


def make_cache(batch: int = BATCH) -> PrefixCache:
    g = torch.Generator().manual_seed(1)
    shape = (SHAPE_LAYERS, batch, KV_HEADS, PREFIX, DIM)
    keys, values = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    valid = torch.arange(PREFIX) < torch.tensor([PREFIX, 3, 4])[:batch, None]
    return PrefixCache(tuple(keys), tuple(values), valid, valid.sum(1))


def tokens(groups: int, steps: int = STEPS, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, groups, steps, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def fresh() -> Tensor:
    return torch.randn(BATCH, 1, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def run(expert: ActionExpert, context: Context, x: Tensor, cond: Tensor | None = None) -> Tensor:
    """Groups of tokens (B, G, T, W), packed, through the expert and apart again."""
    lengths = [x.shape[2]]
    layout = expert.layout(context, lengths * x.shape[1])
    hidden = expert(pack(x, lengths), None if cond is None else pack(cond, lengths), context, layout)
    return unpack(hidden, x.shape[1], lengths)[:, :, 0]


def joint_forward(expert: ActionExpert, cache: PrefixCache, state: Tensor, actions: Tensor, *, causal: bool) -> Tensor:
    """State and actions as one sequence beside the prefix; attention by explicit softmax; no cache of the state."""
    x = torch.cat((state, actions), 1)
    count = x.shape[1]
    sees = torch.ones(count, count, dtype=torch.bool)
    sees[0, 1:] = False
    if causal:
        sees = sees.tril()
    mask = torch.cat((cache.valid[:, None].expand(-1, count, -1), sees.expand(len(x), -1, -1)), -1)[:, None]
    positions = cache.valid.sum(1)[:, None] + torch.arange(count)
    tables = rope_tables(positions, DIM, 100.0)
    for layer, keys, values in zip(expert.layers, cache.keys, cache.values, strict=True):
        assert isinstance(layer, JointLayer)
        normed, _ = layer.input_layernorm(x, None)
        q = rotate(layer.heads(layer.q_proj(normed)), tables)
        k = torch.cat((keys, rotate(layer.heads(layer.k_proj(normed)), tables)), 2).repeat_interleave(2, 1)
        v = torch.cat((values, layer.heads(layer.v_proj(normed))), 2).repeat_interleave(2, 1)
        scores = (q @ k.transpose(2, 3) / DIM**0.5).masked_fill(~mask, float("-inf"))
        x = x + layer.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x, None)[0])
    return expert.norm(x, None)[0][:, 1:]


@pytest.mark.parametrize("causal", [False, True])
def test_joint_equals_cached(causal: bool) -> None:  # noqa: FBT001
    expert, cache, actions = make(causal=causal), make_cache(), tokens(1)
    context = expert.context(cache, fresh(), None)
    cached = run(expert, context, actions)[:, 0]
    joint = joint_forward(expert, cache, fresh(), actions[:, 0], causal=causal)
    torch.testing.assert_close(cached, joint, atol=1e-10, rtol=0)


@pytest.mark.parametrize("norm", ["rms", "adarms"])
@pytest.mark.parametrize("attention", [("joint",), ("joint", "cross")])
def test_packed_groups_equal_separate_calls(attention: tuple[str, ...], norm: str) -> None:
    expert, cache, actions = make(attention, norm), make_cache(), tokens(3)
    cond = torch.randn(actions.shape, dtype=torch.float64) if norm == "adarms" else None
    state_cond = torch.randn(BATCH, 1, WIDTH, dtype=torch.float64) if norm == "adarms" else None
    context = expert.context(cache, fresh(), state_cond)
    packed = run(expert, context, actions, cond)
    for g in range(3):
        one = run(expert, context, actions[:, g : g + 1], None if cond is None else cond[:, g : g + 1])
        torch.testing.assert_close(packed[:, g], one[:, 0], atol=1e-10, rtol=0)


def test_cross_layers_read_projected_keys_with_positions_from_zero() -> None:
    """SmolVLA's rule: keys and values are projections of the cached ones, queries are numbered from 0."""
    expert, cache, actions = make(("cross", "joint")), make_cache(), tokens(1)
    layer = expert.layers[0]
    assert isinstance(layer, CrossLayer)
    context = expert.context(cache, fresh(), None)
    keys, values = layer.context(cache.keys[0], cache.values[0])
    flat = cache.keys[0].permute(0, 2, 1, 3).reshape(BATCH, PREFIX, KV_HEADS * DIM)
    torch.testing.assert_close(keys, layer.heads(layer.k_proj(flat)))
    x = actions[:, 0]
    normed, _ = layer.input_layernorm(x, None)
    query = rotate(layer.heads(layer.q_proj(normed)), rope_tables(torch.arange(STEPS).expand(BATCH, -1), DIM, 100.0))
    mask = cache.valid[:, None, None]
    x = x + layer.o_proj(attend(query, keys, values, mask))
    x = x + layer.mlp(layer.post_attention_layernorm(x, None)[0])
    ours, _, _ = layer(actions[:, 0], None, context.keys[0], context.values[0], expert.layout(context, [STEPS]))
    torch.testing.assert_close(ours, x, atol=1e-10, rtol=0)


def test_rows_do_not_see_one_another() -> None:
    expert, cache, actions = make(("joint", "cross")), make_cache(), tokens(2)
    both = run(expert, expert.context(cache, fresh(), None), actions)
    row = torch.tensor([1])
    alone = run(expert, expert.context(cache.select(row), fresh()[row], None), actions[row])
    torch.testing.assert_close(both[row], alone, atol=1e-10, rtol=0)


def test_padding_is_not_attended() -> None:
    expert, cache, actions = make(("joint", "cross")), make_cache(), tokens(1)

    def answer(c: PrefixCache) -> Tensor:
        return run(expert, expert.context(c, fresh(), None), actions)

    before = answer(cache)
    for x in (*cache.keys, *cache.values):
        x[~cache.valid[:, None].expand(-1, KV_HEADS, -1)] = 1e3
    assert torch.equal(answer(cache), before)


def test_attention_among_actions_is_as_configured() -> None:
    for causal, expected in ((True, False), (False, True)):
        expert, actions = make(causal=causal), tokens(1)
        context = expert.context(make_cache(), fresh(), None)
        before = run(expert, context, actions)
        actions[:, :, -1] += 1
        after = run(expert, context, actions)
        assert bool((before[:, :, 0] != after[:, :, 0]).any()) is expected


class KeyShapes(TorchFunctionMode):
    """Notes the shape of the keys of every attention call."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.shapes.add(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


def test_the_context_is_shared_not_copied() -> None:
    """What many samples read is the one prefix, of batch size 1; only their own tokens are many."""
    expert = make()
    context = expert.context(make_cache(1), fresh()[:1], None)
    with KeyShapes() as seen:
        run(expert, context, tokens(16, batch=1))
    assert seen.shapes == {(1, KV_HEADS, PREFIX + 1 + 16 * STEPS, DIM)}


def test_taps_end_at_the_last_backbone_layer() -> None:
    for expert_layers, backbone_layers, expected in ((3, 3, [0, 1, 2]), (8, 16, [1, 3, 5, 7, 9, 11, 13, 15])):
        config = ExpertConfig(WIDTH, expert_layers, 32, ("joint",), "rms", "bidirectional")
        assert ActionExpert(config, CacheShape(backbone_layers, HEADS, KV_HEADS, DIM, 100.0)).taps == expected


def test_a_context_without_fresh_tokens_is_the_prefix() -> None:
    expert, cache = make(), make_cache()
    context = expert.context(cache, fresh()[:, :0], None)
    assert isinstance(context, Context)
    assert torch.equal(context.keys[0], cache.keys[0])
    assert torch.equal(context.next_position, cache.next_position)


def test_joint_layers_score_as_the_backbone_does() -> None:
    """Scale and soft cap come with the cache; cross layers project it and use their own."""
    shape = CacheShape(SHAPE_LAYERS, HEADS, KV_HEADS, DIM, 100.0, scale=0.9, softcap=0.8)
    expert = make(("joint", "cross"))
    own = ActionExpert(expert.config, shape).double()
    own.load_state_dict(expert.state_dict())
    joint, cross = own.layers[0], own.layers[1]
    assert isinstance(joint, JointLayer)
    assert isinstance(cross, CrossLayer)
    cache = make_cache()
    context = own.context(cache, fresh(), None)
    layout = own.layout(context, [STEPS])
    x = pack(tokens(1), [STEPS])
    out, keys, values = joint(x, None, context.keys[0], context.values[0], layout)
    query = rotate(joint.heads(joint.q_proj(joint.input_layernorm(x, None)[0])), layout.joint_rope)
    after = x + joint.o_proj(attend(query, keys, values, layout.joint_mask, 0.9, 0.8))
    torch.testing.assert_close(out, joint.feed_forward(after, None))
    plain = expert.layers[1]
    assert isinstance(plain, CrossLayer)
    pair = cross.context(cache.keys[1], cache.values[1])
    assert torch.equal(cross(x, None, *pair, layout)[0], plain(x, None, *pair, layout)[0])
    rounded = cross.context(cache.keys[1].bfloat16(), cache.values[1].bfloat16())
    assert rounded[0].dtype == torch.float64
