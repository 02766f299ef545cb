"""Observations older than the rows that answer them: which moments a batch brings together, and how often.

The index data set tells every number's and every picture's episode and step, so a wrong moment shows.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.dataset import LeRobotSource, views
from train.frame_cache import CacheConfig, cached
from train.loader import Loader, Member
from train.recipe import Language, Recipe, Split, Vector
from train.sampler import MixtureSampler, observe
from vla import config
from vla.batch import Batch
from vla.codec import Codec
from vla.policy_config import FastSlowConfig, PolicyConfig
from vla.processor import Processor
from vla.stats import Moments, Statistics
from vla.tokenizer import byte_level
from vla.types import ActionSpec

ROOT = Path(__file__).parents[1]
LENGTHS = (24, 12, 18)  # frames of the episodes; in the last one the task changes with the tenth frame
SPEC = ActionSpec(("episode", "step"), ("1",) * 2, ("absolute",) * 2, (0.0,) * 2, (99.0,) * 2, 10.0)
Made = Callable[..., Loader]


def write(root: Path, mode: str) -> Path:
    """state[t] = action[t] = (episode, t); the picture at t is of one colour: red 10 t, green 80 episode."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features: dict[str, Any] = {
        key: {"dtype": "float32", "shape": (2,), "names": None} for key in ("observation.state", "action")
    }
    features["observation.images.top"] = {"dtype": mode, "shape": (32, 32, 3), "names": ["height", "width", "channels"]}
    data = LeRobotDataset.create("test/index", 10, features, root=root, use_videos=mode == "video")
    for episode, length in enumerate(LENGTHS):
        for step in range(length):
            picture = np.empty((32, 32, 3), np.uint8)
            picture[:] = (10 * step, 80 * episode, 0)
            numbers = np.array([episode, step], np.float32)
            row: dict[str, Any] = {"observation.images.top": picture, "observation.state": numbers, "action": numbers}
            data.add_frame(row | {"task": task(episode, step)})
        data.save_episode()
    data.finalize()
    return root


def task(episode: int, step: int) -> str:
    return "the other way" if episode == 2 and step >= 9 else f"go {episode}"


@pytest.fixture(scope="session")
def index_roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("index")
    return {mode: write(folder / mode, mode) for mode in ("video", "image")}


def policy_config(law: FastSlowConfig | None, **changes: Any) -> PolicyConfig:
    data = config.read(ROOT / "configs/sft_metaworld_flow.yaml")["policy"]
    changes = {"cameras": ("top",), "image_size": 32, "state_dim": 2, "action_dim": 2, "chunk": 5} | changes
    return replace(config.build(PolicyConfig, data), fast_slow=law, **changes)


@pytest.fixture
def made(index_roots: dict[str, Path], tmp_path: Path) -> Made:
    """A loader of the index data set; its numbers stay as they are."""

    def make(policy: PolicyConfig, pictures: str = "image", **changes: int) -> Loader:
        root = index_roots["video" if pictures == "video" else "image"]
        vectors = Vector("observation.state", SPEC), Vector("action", SPEC)
        names, everything = {"top": "observation.images.top"}, Split(0.0, 0, ())
        recipe = Recipe("index", None, root, None, "none", names, *vectors, Language("task", None), everything)
        source = LeRobotSource(recipe, policy.chunk, "train", policy.past, policy.history)
        if pictures == "cached":
            source = cached(source, views(policy), CacheConfig(tmp_path, 1.0))
        unused = Moments(1, *[np.ones(2)] * 9)
        codec = Codec(Statistics(SPEC, SPEC, unused, unused, "none"), "identity", 2, 2)
        member = Member(source, Processor(policy, byte_level(), codec), 1.0)
        division = {"global_batch": 54, "accumulation": 1, "rank": 0, "world_size": 1, "seed": 3, "prefetch": 0}
        return Loader([member], **(division | changes))

    return make


def where(pictures: torch.Tensor) -> np.ndarray:
    """(n, 1, h, w, 3) -> (n, 2) episode and step that the pictures show."""
    colour = pictures.numpy()[:, 0, ..., :2].mean(axis=(1, 2))
    return (colour / (10, 80)).round().astype(int)[:, ::-1]


def rows_of(batch: Batch) -> dict[tuple[int, int], dict[str, Any]]:
    """(episode, step) of the state -> what else is in its row."""
    slow, fast, found = where(batch.images[batch.observation]), where(batch.fast_images), {}
    for i, (episode, step) in enumerate(batch.state.int().tolist()):
        found[episode, step] = {
            "slow": tuple(slow[i].tolist()),
            "fast": tuple(fast[i].tolist()),
            "age": batch.age[i].item(),
            "first": tuple(batch.actions[i, 0].int().tolist()),
        }
    return found


@pytest.mark.parametrize("pictures", ["video", "image", "cached"])
def test_every_index_is_of_its_own_moment(made: Made, pictures: str) -> None:
    policy = policy_config(FastSlowConfig(7, 7, 0.0, 1, ("top",), 16))
    (batch,) = made(policy, pictures).micro_batches(0)
    rows = rows_of(batch)
    assert len(rows) == sum(LENGTHS), "one epoch"
    assert rows[0, 20] == {"slow": (0, 13), "fast": (0, 20), "age": 7.0, "first": (0, 20)}
    assert rows[0, 3] == {"slow": (0, 0), "fast": (0, 3), "age": 3.0, "first": (0, 3)}
    for (episode, step), row in rows.items():
        age = min(step, 7)
        assert row == {
            "slow": (episode, step - age),
            "fast": (episode, step),
            "age": age,
            "first": (episode, step),
        }
    assert batch.fast_images.shape == (54, 1, 16, 16, 3)
    assert batch.fast_image_mask.all()
    assert batch.age.dtype == torch.float32


def test_the_window_begins_before_the_state(made: Made) -> None:
    (batch,) = made(policy_config(None, past=3, history=4)).micro_batches(0)
    assert batch.actions.shape == (54, 8, 2)
    for i, (episode, step) in enumerate(batch.state.int().tolist()):
        steps = np.arange(step - 3, step + 5)
        inside = (steps >= 0) & (steps < LENGTHS[episode])
        assert batch.valid[i].tolist() == inside.tolist()
        assert batch.actions[i, inside].tolist() == [[episode, s] for s in steps[inside]]
        assert batch.history[i].tolist() == [[episode, max(s, 0)] for s in range(step - 4, step)]


def test_an_observation_serves_several_rows_of_its_episode(made: Made) -> None:
    policy = policy_config(FastSlowConfig(2, 9, 0.2, 3, ("top",), 16))
    loader, different = made(policy), 0
    for step in range(6):
        (batch,) = loader.micro_batches(step)
        assert batch.images.shape[0] == batch.tokens.shape[0] == 18
        assert batch.observation.tolist() == np.repeat(np.arange(18), 3).tolist()
        assert batch.rows.tolist() == list(range(54))
        episode, t = batch.state.int().T.numpy()
        slow = where(batch.images)[batch.observation]
        assert np.array_equal(slow[:, 0], episode)
        assert np.array_equal(t - slow[:, 1], batch.age.int().numpy())
        assert np.array_equal(where(batch.fast_images), np.stack([episode, t], -1))
        assert np.array_equal(batch.actions[:, 0].int().numpy(), np.stack([episode, t], -1))
        assert (batch.age >= 0).all()
        assert (batch.age <= 9).all()
        different += sum(len(set(ts)) for ts in t.reshape(18, 3).tolist())
    assert different > 1.7 * 6 * 18, "the rows of an observation are of different moments"


def test_the_instruction_is_that_of_the_rows(made: Made) -> None:
    loader, old = made(policy_config(FastSlowConfig(2, 9, 0.2, 3, (), 16))), 0
    for step in range(6):
        (batch,) = loader.micro_batches(step)
        for i, (episode, t) in enumerate(batch.state.int().tolist()):
            row = batch.observation[i]
            ids, mask = loader._members[0].processor.text(task(episode, t))
            assert batch.tokens[row][batch.token_mask[row]].tolist() == ids[mask].tolist()
            old += task(episode, t) != task(episode, t - int(batch.age[i]))
    assert old > 0, "some observations are from before the task changed"


def test_without_ages_every_row_has_its_own_observation(made: Made) -> None:
    plain, zero = (made(policy_config(law)) for law in (None, FastSlowConfig(0, 0, 0.0, 1, (), 16)))
    for step in (0, 3):
        (a,), (b,) = plain.micro_batches(step), zero.micro_batches(step)
        for name in ("images", "state", "actions", "valid", "tokens", "observation", "age", "rows", "history"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_ages_are_a_function_of_seed_and_step() -> None:
    law = FastSlowConfig(0, 9, 0.2, 2, (), 16)
    first, step, seed, again = (
        MixtureSampler([9], [1.0], seed).ages(step, 50, law) for seed, step in ((3, 0), (3, 1), (4, 0), (3, 0))
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, step)
    assert not np.array_equal(first, seed)


laws = st.builds(
    lambda low, more, share, frames: FastSlowConfig(low, low + more, share, frames, (), 16),
    st.integers(0, 12),
    st.integers(0, 12),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.integers(1, 4),
)


@given(laws, st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 99), st.integers(0, 10**6))
def test_the_law_stays_inside_episodes(law: FastSlowConfig, lengths: list[int], seed: int, step: int) -> None:
    bounds = np.cumsum([0, *lengths])
    episode = np.repeat(np.arange(len(lengths)), lengths)
    start, last = bounds[:-1][episode], bounds[1:][episode] - 1
    frame = np.arange(len(episode))
    drawn = MixtureSampler([len(frame)], [1.0], seed).ages(step, len(frame), law)
    observed, frames = observe(frame, drawn, start, start, last)
    ages = frames - observed[:, None]
    assert np.array_equal(frames[:, 0], frame)
    assert (ages >= 0).all()
    assert (observed >= start).all()
    assert (frames <= last[:, None]).all()
    clipped = np.where(np.arange(law.frames) == 0, observed[:, None] == start[:, None], frames == last[:, None])
    as_drawn = (ages == 0) | ((ages >= law.min_age) & (ages <= law.max_age))
    assert (as_drawn | clipped).all()
    assert (ages <= law.max_age).all()


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_shares_of_the_ages(share: float) -> None:
    ages = MixtureSampler([9], [1.0], 5).ages(0, 20_000, FastSlowConfig(4, 11, share, 2, (), 16))
    assert (ages == 0).mean() == pytest.approx(share, abs=0.012)
    aged = ages[ages > 0]
    assert set(aged.tolist()) == (set(range(4, 12)) if share < 1 else set())
    counts = np.bincount(aged, minlength=12)[4:] / ages.size
    assert np.allclose(counts, (1 - share) / 8, atol=0.006)
    assert abs(np.corrcoef(ages.T)[0, 1]) < 0.03 if share < 1 else True
