"""The engine: equal to the plain path, and cheap in the ways that it promises."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vla.cache import CacheShape, PrefixCache
from vla.engine.current import Current
from vla.engine.engine import BUCKET, PLANS, Engine
from vla.expert import ActionExpert
from vla.head_config import FlowConfig
from vla.heads.flow import FlowHead
from vla.policy import VLAPolicy
from vla.policy_config import (
    ConditionConfig,
    ContinuationConfig,
    ExpertConfig,
    FastSlowConfig,
    MixtureConfig,
)
from vla.rtc import Committed
from vla.sampling import Sampled
from vla.types import Observation, UnderWay

HEADS = (
    "flow",
    "flow_adarms",
    "flow_entropy",
    "regression_l1",
    "regression_l2",
    "discrete",
    "discrete_scalar",
    "discrete_gap",
    "discrete_code",
    "e0",
    "e0_scalar_adarms",
)
MIXTURE = MixtureConfig((1, 3, 5), "none", 1.0, 1e-3, None)
VARIANTS = {
    "joint": (("joint",), "bidirectional", None),
    "cross": (("joint", "cross"), "causal", None),
    "mixture": (("joint", "cross"), "bidirectional", MIXTURE),
}
every_head = pytest.mark.parametrize("name", HEADS)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def make(kit: SimpleNamespace, name: str, variant: str, shape: CacheShape | None = None, **expert: Any) -> Any:
    """Small parts whose norms and gates all have an effect."""
    attention, among, mixture = VARIANTS[variant]
    head = kit.HEADS[name]
    norm = "adarms" if getattr(head, "time", "") == "adarms" else "rms"
    config = replace(ExpertConfig(kit.WIDTH, 2, 32, attention, norm, among), **expert)
    parts = kit.make(head, mixture=mixture, committed=3, expert=config)
    if shape is not None:
        parts = replace(parts, expert=ActionExpert(config, shape))
    for key, weight in parts.expert.named_parameters():
        if "norm" in key and "dense" not in key:
            nn.init.normal_(weight, 1.0, 0.3)
    return parts


def prefix(kit: SimpleNamespace, length: int, seed: int = 1) -> PrefixCache:
    """Rows of different lengths, padded."""
    g = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, kit.BATCH, 2, length, 8, generator=g) for _ in range(2))
    valid = torch.arange(length) < torch.tensor([length, length - 2, length - 1, length])[:, None]
    return PrefixCache(tuple(keys), tuple(values), valid, valid.sum(1))


def state_tokens(kit: SimpleNamespace, count: int = 1) -> Tensor:
    return torch.randn(kit.BATCH, count, kit.WIDTH, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def plain(kit: SimpleNamespace, parts: Any, cache: PrefixCache, fresh: Tensor, groups: int, **options: Any) -> Sampled:
    from vla.denoiser import Denoiser

    context = parts.expert.context(cache, fresh, parts.head.fresh_condition(fresh))
    condition = options.pop("condition", None)
    predictor = Denoiser(parts.head, parts.expert, parts.gate, context, groups, kit.STEPS, condition)
    return parts.sample(groups, predictor=predictor, **options)


def fast(
    kit: SimpleNamespace, engine: Engine, cache: PrefixCache, fresh: Tensor, groups: int, **options: Any
) -> Sampled:
    shape = (kit.BATCH, groups, kit.STEPS, kit.PADDED)
    generator = torch.Generator().manual_seed(0)
    return engine.sample(cache, cache, fresh, options.get("condition"), shape, generator, options.get("committed"))


def build(kit: SimpleNamespace, parts: Any) -> Engine:
    return Engine(parts.head, parts.expert, parts.gate, kit.REAL)


def assert_equal(got: Sampled, wanted: Sampled, reach: Tensor | None = None) -> None:
    torch.testing.assert_close(got.actions, wanted.actions, atol=1e-5, rtol=0)
    assert (got.disagreement is None) == (wanted.disagreement is None) == (reach is None)
    if reach is not None and got.branches is not None and wanted.branches is not None:
        torch.testing.assert_close(got.disagreement, wanted.disagreement, atol=1e-5, rtol=0)
        torch.testing.assert_close(got.branches[:, :, reach], wanted.branches[:, :, reach], atol=2e-5, rtol=0)


@every_variant
@every_head
@pytest.mark.parametrize("given", ["nothing", "committed"])
def test_it_equals_the_plain_path(kit: SimpleNamespace, name: str, variant: str, given: str) -> None:
    parts = make(kit, name, variant)
    engine, reach = build(kit, parts), None if parts.gate is None else parts.gate.reach
    actions = kit.target().actions
    options = {"committed": Committed(actions, torch.tensor([0, 1, 3, 2]))} if given == "committed" else {}
    for groups, length in ((1, 6), (3, 9)):
        cache, fresh = prefix(kit, length), state_tokens(kit)
        wanted = plain(kit, parts, cache, fresh, groups, **options)
        assert_equal(fast(kit, engine, cache, fresh, groups, **options), wanted, reach)


@pytest.mark.parametrize(
    ("shape", "expert"),
    [
        (CacheShape(2, 2, 2, 8, 100.0), {"activation": "gelu_tanh", "norm_eps": 0.1}),
        (CacheShape(2, 2, 2, 8, 100.0), {"first_position": 50}),
        (CacheShape(2, 4, 2, 8, 100.0), {}),
        (CacheShape(2, 6, 2, 8, 100.0, 0.9, 2.0), {}),
    ],
    ids=["activation", "first_position", "shared_keys", "softcap"],
)
def test_every_option_of_the_expert_counts(kit: SimpleNamespace, shape: CacheShape, expert: dict[str, Any]) -> None:
    for variant in VARIANTS:
        parts = make(kit, "flow", variant, shape, **expert)
        cache, reach = prefix(kit, 7), None if parts.gate is None else parts.gate.reach
        for count in (0, 3):
            fresh = state_tokens(kit, count)
            wanted = plain(kit, parts, cache, fresh, 2)
            assert_equal(fast(kit, build(kit, parts), cache, fresh, 2), wanted, reach)


def test_a_condition_reaches_every_action_token(kit: SimpleNamespace) -> None:
    parts, cache, fresh = make(kit, "flow", "mixture"), prefix(kit, 7), state_tokens(kit)
    condition = torch.randn(kit.BATCH, 2, kit.WIDTH, generator=torch.Generator().manual_seed(3))
    wanted = plain(kit, parts, cache, fresh, 2, condition=condition)
    got = fast(kit, build(kit, parts), cache, fresh, 2, condition=condition)
    assert_equal(got, wanted, parts.gate.reach)
    assert not torch.equal(got.actions, fast(kit, build(kit, parts), cache, fresh, 2).actions)


def test_buffers_keep_nothing_of_earlier_calls(kit: SimpleNamespace) -> None:
    parts, fresh = make(kit, "flow", "cross"), state_tokens(kit)
    engine = build(kit, parts)
    first = fast(kit, engine, prefix(kit, 20), fresh, 2)
    kept = first.actions.clone()
    broken = prefix(kit, 30)
    fast(kit, engine, replace(broken, keys=tuple(k * torch.nan for k in broken.keys)), fresh * torch.nan, 2)
    for length in (3, 30, BUCKET, BUCKET + 1, 3):
        cache = prefix(kit, length, seed=length)
        for groups in (2, 1):
            assert_equal(fast(kit, engine, cache, fresh, groups), plain(kit, parts, cache, fresh, groups))
    assert torch.equal(first.actions, kept), "a result belongs to its caller"
    for groups in range(1, PLANS + 3):
        fast(kit, engine, prefix(kit, 3), fresh, groups)
    assert len(engine._plans) == PLANS


def current(kit: SimpleNamespace, currently: Current, parts: Any) -> Engine:
    engine = currently.of(parts.head, parts.expert, parts.gate, kit.REAL)
    assert engine is not None
    return engine


def test_it_follows_weights_and_settings(kit: SimpleNamespace) -> None:
    import peft

    parts, cache, fresh, currently = make(kit, "flow", "mixture"), prefix(kit, 6), state_tokens(kit), Current()

    def check(what: str) -> Engine:
        engine = current(kit, currently, parts)
        assert engine is current(kit, currently, parts), "it is built once"
        assert_equal(fast(kit, engine, cache, fresh, 1), plain(kit, parts, cache, fresh, 1), parts.gate.reach)
        assert engine not in seen, what
        seen.append(engine)
        return engine

    seen: list[Engine] = []
    check("first")
    parts.head.steps = 3
    check("steps")
    optimizer = torch.optim.Adam([p for _, p in parts.parameters()], 0.05)
    parts.loss(kit.target()).total.backward()
    optimizer.step()
    check("a training step")
    parts.expert.load_state_dict({k: v * 1.5 for k, v in parts.expert.state_dict().items()})
    check("load_state_dict")
    parts.expert.layers[1].mlp.down_proj = nn.Linear(32, kit.WIDTH, bias=False)
    check("another module")
    settings = peft.LoraConfig(target_modules=["q_proj", "k_proj", "down_proj"], r=2, init_lora_weights=False)
    peft.inject_adapter_in_model(settings, parts.expert)
    check("adapters")
    assert Current().of(parts.head, parts.expert.double(), parts.gate, kit.REAL) is None, "float32 only"


class Operators(TorchDispatchMode):
    """Counts the operators that do work; remembers copies and matrix products."""

    VIEWS = frozenset(
        {"view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "select"}
        | {"slice", "split", "split_with_sizes", "unbind", "detach", "alias", "as_strided", "view_as_complex"}
        | {"view_as_real", "empty", "empty_like", "new_empty", "empty_strided"}
    )
    COPIES = frozenset({"clone", "copy_", "cat", "_to_copy", "stack", "index_select"})

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.copied: list[int] = []  # bytes
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        if name in self.VIEWS:
            return out
        self.counts[name] += 1
        if isinstance(out, Tensor):
            self.shapes.add(tuple(out.shape))
            if name in self.COPIES:
                self.copied.append(out.numel() * out.element_size())
        return out


LAYERS, CHUNK, HEAD = 16, 5, 8


@pytest.fixture(scope="module")
def smolvla_shaped() -> tuple[FlowHead, ActionExpert]:
    """SmolVLA's layout and depth; the counts do not depend on widths."""
    torch.manual_seed(0)
    config = ExpertConfig(24, LAYERS, 32, ("joint", "cross"), "rms", "causal")
    expert = ActionExpert(config, CacheShape(LAYERS, 6, 2, HEAD, 100.0))
    return FlowHead(FlowConfig("flow", "concat", 10, 1.0, 1), 7, 24), expert


def long_prefix(length: int) -> PrefixCache:
    keys, values = (tuple(torch.randn(1, 2, length, HEAD) for _ in range(LAYERS)) for _ in range(2))
    return PrefixCache(keys, values, torch.ones(1, length, dtype=torch.bool), torch.tensor([length]))


def draw(engine: Engine, cache: PrefixCache) -> Sampled:
    fresh, generator = torch.zeros(1, 0, 24), torch.Generator().manual_seed(0)
    return engine.sample(cache, cache, fresh, None, (1, 1, CHUNK, 7), generator)


def test_a_step_costs_what_it_should(smolvla_shaped: tuple[FlowHead, ActionExpert]) -> None:
    head, expert = smolvla_shaped
    counts = {}
    for steps in (10, 11):
        head.steps = steps
        engine, cache = Engine(head, expert, None, 7), long_prefix(150)
        draw(engine, cache)
        with Operators() as counts[steps]:
            draw(engine, cache)
    step = counts[11].counts - counts[10].counts
    assert step.total() <= 335, f"LeRobot's SmolVLA has 997 of them: {step}"
    assert not step.keys() & {"cat", "_to_copy", "stack", "lift_fresh", "scalar_tensor", "where", "sin", "cos"}
    assert step["mm"] + step["addmm"] == 4 * LAYERS + 3
    assert step["copy_"] == LAYERS // 2, "values of joint layers; their keys are written by the rotation"


def test_nothing_of_the_prefix_is_copied_in_the_loop(smolvla_shaped: tuple[FlowHead, ActionExpert]) -> None:
    head, expert = smolvla_shaped
    copied = {}
    for length in (BUCKET, 16 * BUCKET):
        engine, cache = Engine(head, expert, None, 7), long_prefix(length)
        draw(engine, cache)
        with Operators() as counter:
            draw(engine, cache)
        copied[length] = counter.copied
    assert copied[BUCKET] == copied[16 * BUCKET], "it does not depend on the prefix"
    assert max(copied[BUCKET]) <= 4 * CHUNK * 6 * HEAD, "the queries of one layer"


def test_an_unchanged_prefix_is_not_projected_again(smolvla_shaped: tuple[FlowHead, ActionExpert]) -> None:
    head, expert = smolvla_shaped
    engine, cache = Engine(head, expert, None, 7), long_prefix(91)
    with Operators() as first:
        draw(engine, cache)
    with Operators() as second:
        draw(engine, replace(cache, stamp_s=3.0))
    with Operators() as other:
        draw(engine, long_prefix(91))
    first_products, again, others = (c.counts["mm"] + c.counts["bmm"] for c in (first, second, other))
    assert first_products - again == others - again == LAYERS, "keys and values of the eight cross layers"
    assert any(91 in shape for shape in first.shapes)
    assert not any(91 in shape for shape in second.shapes)


POLICIES = {
    "suffix": {"continuation": ContinuationConfig("trained", "hard", 0.0)},
    "prefix": {"state": "prefix"},
    "none": {"state": "none"},
    "fast images": {"fast_slow": FastSlowConfig(0, 4, 0.2, 2, ("wrist",), 16)},
    "intent": {"conditions": ConditionConfig(0, 3, 0.1, 2, 1.0)},
    "guided intent": {"conditions": ConditionConfig(0, 3, 0.1, 2, 1.5)},
    "guided": {"continuation": ContinuationConfig("vjp", "exponential", 5.0)},
}


def policy_of(policies: SimpleNamespace, **changes: Any) -> VLAPolicy:
    config = replace(policies.CONFIG, mixture=MIXTURE, committed=2, **changes)
    policy = VLAPolicy.build(config, policies.STATISTICS, seed=0)
    for key, weight in policy.named_parameters():
        if "conditions" in key or "fast_images.out_proj" in key:
            nn.init.normal_(weight, std=0.3)  # they start at zero
    return policy.eval()


def seen(policies: SimpleNamespace, state: float) -> Observation:
    return replace(policies.observation(), state=np.full(4, state, np.float32))


@pytest.mark.parametrize("kind", POLICIES)
def test_a_policy_acts_by_it(policies: SimpleNamespace, kind: str) -> None:
    policy = policy_of(policies, **POLICIES[kind])
    cache = policy.encode_observation(policies.observation())
    under_way = UnderWay(np.full((3, 2), 0.5, np.float32), 2) if policy.config.continuation else None
    chunks = {}
    for training in (True, False):  # in training mode it is the plain path
        policy.train(training)
        for state in (0.5, -0.5):
            policy.reset(0)
            chunks[training, state] = policy.sample_n(seen(policies, state), 2, cache, under_way)
    for state in (0.5, -0.5):
        np.testing.assert_allclose(chunks[False, state], chunks[True, state], atol=5e-5)
    by_engine = policy._fast.engine._engine is not None
    assert by_engine == (not kind.startswith("guided")), "guidance is the plain path's"
    assert (np.abs(chunks[False, 0.5] - chunks[False, -0.5]).max() > 1e-4) == (kind != "none"), "the state is fresh"


def test_a_second_chunk_runs_no_vision_and_no_prefill(policies: SimpleNamespace) -> None:
    for state, tokens in (("suffix", 0), ("prefix", 1)):
        policy = policy_of(policies, state=state)
        ran: Counter[str] = Counter()
        vision, text = policy.backbone.parts()["vision"], policy.backbone.text.layers[0]
        vision.register_forward_hook(lambda *_, ran=ran: ran.update(vision=1))
        text.register_forward_hook(lambda _module, given, _out, ran=ran: ran.update(text=given[0].shape[1]))
        cache = policy.encode_observation(policies.observation())
        assert ran["vision"] > 0
        assert ran["text"] == cache.valid.shape[1]
        policy.act(cache, seen(policies, 0.5))
        ran.clear()
        with Operators() as counter:
            policy.act(cache, seen(policies, -0.5))
        assert ran == Counter(text=tokens) - Counter(), "only the state's own token"
        prefill = {shape for shape in counter.shapes if cache.valid.shape[1] in shape}
        assert not prefill or state == "prefix", "the state's token is put behind the prefix, which copies it once"


def test_it_is_built_outside_of_inference_mode(policies: SimpleNamespace) -> None:
    policy = policy_of(policies)
    with torch.inference_mode():
        inside = policy.infer(policies.observation()).actions
    policy.reset(0)
    outside = policy.infer(policies.observation()).actions
    assert inside.shape == outside.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_variant
@every_head
def test_the_recorded_loop_equals_the_eager_one(kit: SimpleNamespace, name: str, variant: str) -> None:
    parts, device = make(kit, name, variant), torch.device("cuda")
    on_cpu, parts = build(kit, parts), make(kit, name, variant)
    on_gpu = Engine(parts.head.to(device), parts.expert.to(device), parts.gate and parts.gate.to(device), kit.REAL)
    for length in (6, 9, 6):
        cache, fresh = prefix(kit, length), state_tokens(kit)
        moved = PrefixCache(
            tuple(k.to(device) for k in cache.keys),
            tuple(v.to(device) for v in cache.values),
            cache.valid.to(device),
            cache.next_position.to(device),
        )
        wanted = fast(kit, on_cpu, cache, fresh, 2)
        with torch.profiler.profile() as profile:
            got = fast(kit, on_gpu, moved, fresh.to(device), 2)
        torch.testing.assert_close(got.actions.cpu(), wanted.actions, atol=1e-3, rtol=0)
    assert sum(event.count for event in profile.key_averages() if event.key == "cudaGraphLaunch") == 1
