"""Batches: division over ranks and accumulation, purity, prefetching, mixtures."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import fields, replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from train.dataset import Around, LeRobotSource, RawSteps, View, views
from train.loader import Loader, Member
from train.recipe import Recipe, Vector
from vla.backbone_config import SmolVLMConfig, TinyVLM
from vla.batch import Batch
from vla.codec import Codec
from vla.errors import DataError, SpecMismatch, UsageError
from vla.head_config import FlowConfig
from vla.policy_config import ExpertConfig, FastSlowConfig, PolicyConfig
from vla.processor import Processor
from vla.stats import Moments, Statistics
from vla.tokenizer import byte_level
from vla.types import ActionSpec

CONFIG = PolicyConfig(
    chunk=5,
    execute=2,
    state_dim=6,
    action_dim=4,
    cameras=("top", "wrist"),
    image_size=32,
    max_tokens=12,
    normalization="mean_std",
    state="suffix",
    backbone=SmolVLMConfig("smolvlm", None, TinyVLM(8, 1, 1, 1, 8, 16, 2), None, ()),
    expert=ExpertConfig(8, 1, 8, ("joint",), "rms", "bidirectional"),
    head=FlowConfig("flow", "concat", 2, 0.0, 1),
)

FAST_SLOW = replace(CONFIG, past=2, history=3, fast_slow=FastSlowConfig(1, 6, 0.25, 2, ("wrist",), 16))


def moments(values: np.ndarray) -> Moments:
    quantiles = np.quantile(values, [0.01, 0.1, 0.5, 0.9, 0.99], axis=0)
    return Moments(len(values), values.mean(0), values.std(0), values.min(0), values.max(0), *quantiles)


def processor_for(source: LeRobotSource, config: PolicyConfig = CONFIG) -> Processor:
    states, actions = (a.astype(np.float64) for a in source.statistics_arrays())
    recipe = source.recipe
    statistics = Statistics(recipe.state.spec, recipe.action.spec, moments(states), moments(actions), "test")
    return Processor(config, byte_level(), Codec(statistics, "mean_std", config.state_dim, config.action_dim))


def mixture(recipes: Sequence[Recipe], config: PolicyConfig) -> list[Member]:
    """Two data sets that share the camera `top`; only the first has `wrist`."""
    sources = [LeRobotSource(recipe, 5, "train", config.past, config.history) for recipe in recipes]
    return [Member(s, processor_for(s, config), w) for s, w in zip(sources, (3.0, 1.0), strict=True)]


@pytest.fixture
def members(video_recipe: Recipe, image_recipe: Recipe) -> list[Member]:
    return mixture((video_recipe, image_recipe), CONFIG)


@pytest.fixture(params=[CONFIG, FAST_SLOW], ids=["plain", "fast-slow"])
def either(request: pytest.FixtureRequest, video_recipe: Recipe, image_recipe: Recipe) -> list[Member]:
    return mixture((video_recipe, image_recipe), request.param)


def loader(members: Sequence[Member], **changes: int) -> Loader:
    given = {"global_batch": 12, "accumulation": 1, "rank": 0, "world_size": 1, "seed": 7, "prefetch": 0}
    return Loader(members, **(given | changes))


def assert_equal(a: Batch, b: Batch) -> None:
    for f in fields(Batch):
        x, y = getattr(a, f.name), getattr(b, f.name)
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y, f.name


def test_the_prompt_tells_the_state_of_the_picture(video_recipe: Recipe) -> None:
    config = replace(FAST_SLOW, state="prompt", history=0, max_tokens=60)
    source = LeRobotSource(video_recipe, 5, "train", config.past, 0)
    processor = processor_for(source, config)
    reader = loader([Member(source, processor, 1.0)])
    samples, batch = reader._draw(3), reader.micro_batches(3)[0]
    assert (samples.frames != samples.observed[:, None]).any(), "or the test shows nothing"
    texts, states = source.instructions(samples.frames[:, 0]), source.steps(samples.observed).state
    expected = [processor.text(text, state)[0] for text, state in zip(texts, states, strict=True)]
    assert np.array_equal(batch.tokens.numpy(), np.stack(expected)[:, : batch.tokens.shape[1]])


OBSERVED = ("images", "image_mask", "tokens", "token_mask")  # with an entry for each observation


def by_row(batch: Batch) -> dict[str, Tensor]:
    """Every tensor with an entry for each row."""
    given = {f.name: v for f in fields(Batch) if isinstance(v := getattr(batch, f.name), Tensor)}
    observation = given.pop("observation")
    return {name: value[observation] if name in OBSERVED else value for name, value in given.items()}


def test_a_batch_is_what_the_source_and_the_processor_say(members: list[Member]) -> None:
    source, processor = members[0].source, members[0].processor
    (batch,) = loader(members[:1]).micro_batches(3)
    assert isinstance(source, LeRobotSource)
    _, frame = loader(members[:1])._sampler.draw(36, 12)
    raw, (images, _) = source.steps(frame), source.pictures(frame, views(CONFIG)[0])
    assert batch.images.dtype == torch.uint8
    assert np.array_equal(batch.images.numpy(), images)
    assert batch.image_mask.all()
    assert np.allclose(batch.actions.numpy()[..., :2], processor.codec.encode_actions(raw.actions)[..., :2])
    assert not batch.actions[..., 2:].any()
    assert np.array_equal(processor.codec.decode_actions(batch.actions.numpy()).round(4), raw.actions.round(4))
    assert np.array_equal(batch.state.numpy(), processor.codec.encode_state(raw.state))
    assert np.array_equal(batch.valid.numpy(), raw.valid)
    assert batch.dim_mask.tolist() == [[True, True, False, False]] * 12
    ids = [t[m].tolist() for t, m in zip(batch.tokens, batch.token_mask, strict=True)]
    assert ids == [processor.tokenizer.encode(text + "\n") for text in source.instructions(frame)]
    assert len({tuple(i) for i in ids}) == 3
    assert batch.tokens.shape[1] == max(map(len, ids)), "no column is padding alone"
    assert batch.tokens.dtype == torch.int64
    assert batch.rows.tolist() == batch.observation.tolist() == list(range(12))
    assert batch.age.tolist() == [0.0] * 12
    assert batch.history.shape == (12, 0, 6)
    assert batch.fast_images.shape[:2] == batch.fast_image_mask.shape == (12, 0)
    assert (batch.global_size, batch.loss_scale) == (12, 1.0)


def parts_of(members: Sequence[Member], step: int, accumulation: int, world_size: int) -> list[Batch]:
    """The micro-batches of all processes."""
    division = {"global_batch": 24, "accumulation": accumulation, "world_size": world_size}
    return [b for rank in range(world_size) for b in loader(members, rank=rank, **division).micro_batches(step)]


@pytest.mark.parametrize(("accumulation", "world_size"), [(2, 1), (1, 3), (2, 2), (4, 3)])
def test_parts_are_the_global_batch(either: list[Member], accumulation: int, world_size: int) -> None:
    (whole,) = loader(either, global_batch=24).micro_batches(5)
    parts = [
        batch
        for rank in range(world_size)
        for batch in loader(
            either, global_batch=24, accumulation=accumulation, rank=rank, world_size=world_size
        ).micro_batches(5)
    ]
    assert len(parts) == accumulation * world_size
    order = torch.cat([p.rows for p in parts])
    assert sorted(order.tolist()) == list(range(24))
    for name, value in by_row(whole).items():
        pieces = [by_row(p)[name] for p in parts]
        if name in ("tokens", "token_mask"):  # each part is as wide as its own longest prompt
            pieces = [pad(p, (0, value.shape[1] - p.shape[1])) for p in pieces]
        assert torch.equal(torch.cat(pieces), value[order]), name
    assert {(p.global_size, p.noise_seed) for p in parts} == {(24, whole.noise_seed)}


@pytest.mark.parametrize(("accumulation", "world_size"), [(1, 1), (2, 1), (3, 2), (12, 1)])
def test_loss_scale_makes_the_mean_of_means_the_global_mean(
    either: list[Member], accumulation: int, world_size: int
) -> None:
    """Over the entries that count: valid steps of real dimensions."""

    def entries(batch: Batch) -> Tensor:
        counted = batch.valid[:, :, None] & batch.dim_mask[:, None, :]
        return batch.actions[counted].double() ** 2

    (whole,) = loader(either, global_batch=24).micro_batches(0)
    assert not whole.valid.all()
    parts = parts_of(either, 0, accumulation, world_size)
    total = sum(b.loss_scale * entries(b).mean().item() for b in parts) / len(parts)
    assert total == pytest.approx(entries(whole).mean().item(), rel=1e-12)


def test_a_step_is_a_pure_function_of_seed_and_step(either: list[Member]) -> None:
    a, b = loader(either, global_batch=24), loader(either, global_batch=24)
    for step in (9, 0, 400, 3):
        for x, y in zip(a.micro_batches(step), b.micro_batches(step), strict=True):
            assert_equal(x, y)
    other = loader(either, global_batch=24, seed=8).micro_batches(3)[0]
    again = a.micro_batches(3)[0]
    assert other.noise_seed != again.noise_seed
    assert not torch.equal(other.state, again.state)
    assert a.micro_batches(4)[0].noise_seed != again.noise_seed


@pytest.mark.parametrize(("prefetch", "threads"), [(1, 1), (3, 1), (4, 3)])
def test_prefetching_changes_nothing(either: list[Member], prefetch: int, threads: int) -> None:
    ahead = Loader(either, 24, 2, 0, 1, 7, prefetch, threads)
    plain = loader(either, global_batch=24, accumulation=2)
    with closing(ahead.stream(6)) as a, closing(plain.stream(6)) as b:
        for step, ((i, x), (j, y)) in enumerate(islice(zip(a, b, strict=True), 7)):
            assert i == j == 6 + step
            assert len(x) == len(y) == 2
            for p, q in zip(x, y, strict=True):
                assert_equal(p, q)


def test_mixture_shares_follow_the_weights(members: list[Member]) -> None:
    stream = loader(members, global_batch=64)
    with_wrist = torch.cat([stream.micro_batches(step)[0].image_mask[:, 1] for step in range(12)])
    assert with_wrist.float().mean().item() == pytest.approx(0.75, abs=0.06)


def test_members_without_a_camera_are_masked(members: list[Member]) -> None:
    (batch,) = loader(members).micro_batches(0)
    absent = ~batch.image_mask[:, 1]
    assert absent.any()
    assert not absent.all()
    assert not batch.images[absent, 1].any()
    assert batch.image_mask[:, 0].all()


class Slow:
    """A source that counts its reads, waits and may fail."""

    def __init__(self, source: LeRobotSource, fail_at: int, wait_s: float) -> None:
        self._source, self._fail_at, self._wait_s = source, fail_at, wait_s
        self.recipe, self.horizon, self.past, self.history = source.recipe, source.horizon, source.past, source.history
        self.reads = 0

    def __len__(self) -> int:
        return len(self._source)

    def valid_steps(self, indices: np.ndarray) -> np.ndarray:
        return self._source.valid_steps(indices)

    def around(self, indices: np.ndarray) -> Around:
        return self._source.around(indices)

    def steps(self, indices: np.ndarray) -> RawSteps:
        return self._source.steps(indices)

    def instructions(self, indices: np.ndarray) -> list[str]:
        return self._source.instructions(indices)

    def pictures(self, indices: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray]:
        if not view.cameras:
            return self._source.pictures(indices, view)
        self.reads += 1
        time.sleep(self._wait_s)
        if self.reads == self._fail_at:
            raise DataError("this row is broken")
        return self._source.pictures(indices, view)


@pytest.fixture
def slow(image_recipe: Recipe) -> Callable[[int, float], tuple[Slow, Member]]:
    def make(fail_at: int, wait_s: float) -> tuple[Slow, Member]:
        source = LeRobotSource(image_recipe, 5, "train")
        made = Slow(source, fail_at, wait_s)
        return made, Member(made, processor_for(source), 1.0)

    return make


def loader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("loader")]


def test_an_error_reaches_the_consumer_at_its_step(slow: Callable[[int, float], tuple[Slow, Member]]) -> None:
    _, member = slow(3, 0.0)
    stream = loader([member], prefetch=4).stream(0)
    assert [next(stream)[0], next(stream)[0]] == [0, 1]
    with pytest.raises(DataError, match="this row is broken"):
        next(stream)
    assert not loader_threads()


def test_closing_stops_the_threads(slow: Callable[[int, float], tuple[Slow, Member]]) -> None:
    source, member = slow(-1, 0.02)
    stream = loader([member], prefetch=50).stream(0)
    next(stream)
    assert loader_threads()
    stream.close()
    assert not loader_threads()
    assert source.reads < 25


@pytest.mark.parametrize("prefetch", [1, 3])
def test_steps_are_prepared_while_the_consumer_works(
    slow: Callable[[int, float], tuple[Slow, Member]], prefetch: int
) -> None:
    _, member = slow(-1, 0.1)
    waited_s = 0.0
    with closing(loader([member], prefetch=prefetch).stream(0)) as stream:
        next(stream)
        for _ in range(3):
            time.sleep(0.3)
            before = time.monotonic()
            next(stream)
            waited_s += time.monotonic() - before
    assert waited_s < 0.15


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"global_batch": 10, "accumulation": 3}, "multiple of 3"),
        ({"global_batch": 12, "accumulation": 5, "world_size": 2}, "multiple of 10"),
        ({"rank": 2, "world_size": 2}, r"rank must be 0\.\.1"),
        ({"accumulation": 0}, "evenly"),
        ({"prefetch": -1}, "prefetch"),
    ],
)
def test_impossible_divisions_are_refused(members: list[Member], changes: dict[str, int], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        loader(members, **changes)


def test_rows_that_share_an_observation_are_not_divided(video_recipe: Recipe, image_recipe: Recipe) -> None:
    members = mixture((video_recipe, image_recipe), FAST_SLOW)
    with pytest.raises(UsageError, match=r"2 rows to an observation \(policy.fast_slow.frames\).* multiple of 8"):
        loader(members, accumulation=4)
    with pytest.raises(UsageError, match="multiple of 2"):
        loader(members, global_batch=9)


def test_members_must_fit_the_policy(members: list[Member], video_recipe: Recipe) -> None:
    with pytest.raises(UsageError, match="at least one data set"):
        loader([])
    short = Member(LeRobotSource(video_recipe, 4, "train"), members[0].processor, 1.0)
    with pytest.raises(UsageError, match=r"reads with a chunk of 4 steps, policy\.chunk is 5"):
        loader([short])
    source = LeRobotSource(video_recipe, 5, "train")
    for name in ("past", "history"):
        with pytest.raises(UsageError, match=rf"reads with a {name} of 0 steps, policy\.{name} is 1"):
            loader([Member(source, processor_for(source, replace(CONFIG, **{name: 1})), 1.0)])
    blind = replace(CONFIG, cameras=("left",))
    with pytest.raises(DataError, match=r"none of policy.cameras \['left'\].*Valid: top, wrist"):
        loader([Member(source, processor_for(source, blind), 1.0)])
    with pytest.raises(UsageError, match="same policy configuration"):
        loader([members[0], Member(source, processor_for(source, replace(CONFIG, image_size=48)), 1.0)])


def test_numbers_of_another_meaning_are_refused(members: list[Member], video_recipe: Recipe) -> None:
    spec: ActionSpec = replace(video_recipe.action.spec, reference=("delta", "delta"))
    foreign = LeRobotSource(replace(video_recipe, action=Vector("action", spec)), 5, "train")
    with pytest.raises(SpecMismatch, match="reference"):
        loader([Member(foreign, members[0].processor, 1.0)])
