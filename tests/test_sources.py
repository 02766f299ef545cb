"""The doors of a run: data sets against one another and the policy."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.dataset import LeRobotSource, View
from train.frame_cache import CacheConfig
from train.recipe import Recipe, Split
from train.sources import Sources, open_sources
from train.train_config import DataConfig, MemberConfig
from vla import config
from vla.errors import DataError, UsageError
from vla.policy_config import FastSlowConfig, PolicyConfig

ROOT = Path(__file__).parents[1]
Open = Callable[..., Sources]


@pytest.fixture
def open_with(tmp_path: Path, video_recipe: Recipe) -> Open:
    """Opens the small data set (episodes of 13, 7, 10 and 16 frames) for the default policy with changes.

    With a count of 2 a mixture of it with itself without its camera `wrist`.
    """
    members = []
    for recipe in (video_recipe, replace(video_recipe, cameras={"top": video_recipe.cameras["top"]})):
        path = tmp_path / f"recipe{len(members)}.yaml"
        path.write_text(config.dump(recipe))
        members.append(MemberConfig(path, 1.0))
    given = config.read(ROOT / "configs/sft_metaworld_flow.yaml")["policy"]

    def make(count: int = 1, cache: CacheConfig | None = None, **changes: Any) -> Sources:
        policy = config.build(PolicyConfig, given | {"cameras": ["top"]})
        data = DataConfig(tuple(members[:count]), cache, 0, 1)
        return open_sources(data, replace(policy, **changes), held_out=False)

    return make


def fast_slow(**changes: Any) -> FastSlowConfig:
    return replace(FastSlowConfig(2, 7, 0.2, 1, ("wrist",), 32), **changes)


def test_sources_read_what_the_policy_asks_for(open_with: Open, tmp_path: Path) -> None:
    cache = CacheConfig(tmp_path / "cache", 1.0)
    (source,) = open_with(cache=cache, past=2, history=3, fast_slow=fast_slow()).train
    steps = source.steps(np.arange(5))
    assert steps.actions.shape == (5, 2 + 8, 2)
    assert steps.history.shape == (5, 3, 3)
    assert {path.name.split("-")[2] for path in cache.folder.glob("frames-*")} == {"64px", "32px"}
    assert source.pictures(np.arange(5), View(("wrist",), 32))[0].any()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"chunk": 17}, r"policy.chunk 17 need 17 steps .*longest episode of 'small' has 16 frames"),
        ({"chunk": 9, "past": 8}, r"policy.past 8 and policy.chunk 9 need 17 steps .* has 16"),
        ({"history": 16}, r"policy.history 16 needs 17 steps .* has 16"),
        ({"fast_slow": fast_slow(max_age=16)}, r"policy.fast_slow.max_age 16 needs 17 steps .* has 16"),
        ({"fast_slow": fast_slow(cameras=("left",))}, r"policy.fast_slow.cameras names 'left', .*Valid: top, wrist"),
    ],
)
def test_what_the_data_cannot_give_is_refused(open_with: Open, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        open_with(**changes)


def test_what_the_longest_episode_can_give_is_not_refused(open_with: Open) -> None:
    open_with(chunk=9, past=7, history=15, fast_slow=fast_slow(max_age=15))


def test_a_recipe_of_a_mixture_may_lack_a_fast_camera(open_with: Open) -> None:
    assert len(open_with(2, fast_slow=fast_slow()).train) == 2


def test_a_policy_without_any_camera_of_the_recipe_is_refused(open_with: Open) -> None:
    with pytest.raises(DataError, match=r"'small' has none of policy.cameras \['left'\].*Valid: top, wrist"):
        open_with(cameras=("left",))


def test_chunks_longer_than_most_episodes_are_noted(open_with: Open, video_recipe: Recipe) -> None:
    assert not open_with(chunk=10, past=3).notes(), "two of four episodes are long enough"
    (note,) = open_with(chunk=10, past=4).notes()
    assert "3 of 4 episodes of recipe 'small' are shorter than the 14 steps" in note
    assert "median is 11.5 frames" in note
    only_short = LeRobotSource(replace(video_recipe, split=Split(0.0, 0, (0, 2, 3))), 8, "train")
    assert len(Sources((only_short, only_short), (), (), ()).notes()) == 1, "read by two members, noted once"
