"""The decoded-once cache: equal to decoding, bound to the content, bounded in size."""

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from train import frame_cache
from train.dataset import LeRobotSource, View
from train.frame_cache import CacheConfig, cached
from train.recipe import Recipe, Split
from vla.errors import DataError, TandemError, UsageError

CAMERAS = ["top", "wrist"]
BOTH, TOP = View(("top", "wrist"), 32), View(("top",), 32)
ONE = 46 * 32 * 32 * 3 / 1e9  # GB of one camera at 32 px


@pytest.fixture
def copied(tmp_path: Path, video_recipe: Recipe) -> Recipe:
    assert video_recipe.root is not None
    shutil.copytree(video_recipe.root, tmp_path / "copy")
    return replace(video_recipe, root=tmp_path / "copy")


def folders(config: CacheConfig) -> set[str]:
    return {p.name for p in config.folder.iterdir() if p.is_dir()}


@pytest.mark.parametrize("kind", ["video_recipe", "image_recipe"])
def test_equals_decoding(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    recipe: Recipe = request.getfixturevalue(kind)
    source = LeRobotSource(recipe, 4, "train")
    view = View((*recipe.cameras, "absent"), 32)
    mapped = cached(source, [view], CacheConfig(tmp_path, 1.0))
    indices = np.random.default_rng(0).integers(0, len(source), 50)
    (a, has), (b, also) = (s.pictures(indices, view) for s in (source, mapped))
    assert np.array_equal(a, b)
    assert has.tolist() == also.tolist() == [True] * len(recipe.cameras) + [False]
    assert np.array_equal(source.steps(indices).actions, mapped.steps(indices).actions)
    assert a[:, 0].any()


@pytest.fixture
def tall_recipe(image_recipe: Recipe, tmp_path: Path, write_lerobot: Callable[..., Path]) -> Recipe:
    cameras = dict.fromkeys(image_recipe.cameras.values(), (40, 24))
    return replace(image_recipe, root=write_lerobot(tmp_path / "tall", "image", fps=15, cameras=cameras))


@pytest.mark.parametrize("kind", ["video_recipe", "tall_recipe"])
def test_where_the_bars_are_makes_another_cache(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = LeRobotSource(request.getfixturevalue(kind), 4, "train")
    config, indices = CacheConfig(tmp_path / "cache", 1.0), np.arange(8)
    centred, aside = TOP, replace(TOP, bars="top_left")
    first, second = (cached(source, [view], config).pictures(indices, view)[0] for view in (centred, aside))
    assert np.array_equal(second, source.pictures(indices, aside)[0])
    assert len(folders(config)) == 2
    filled = [np.any(pictures[:, 0], axis=(0, 3)) for pictures in (first, second)]
    assert filled[1][-1, -1], "the picture ends in the last corner"
    assert filled[0].sum() == filled[1].sum()


def test_is_made_once_and_shared_by_both_splits(
    video_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, config = replace(video_recipe, split=Split(0.3, 0, (0,))), CacheConfig(tmp_path, 1.0)
    train = LeRobotSource(recipe, 4, "train")
    cached(train, [BOTH], config)
    monkeypatch.setattr(frame_cache, "_build", lambda *_: pytest.fail("decoded again"))
    held = LeRobotSource(recipe, 4, "validation")
    mapped = cached(held, [BOTH], config)
    indices = np.arange(len(held))
    assert np.array_equal(mapped.pictures(indices, BOTH)[0], held.pictures(indices, BOTH)[0])


def test_content_that_changed_is_decoded_anew(copied: Recipe, tmp_path: Path) -> None:
    config = CacheConfig(tmp_path / "cache", 1.0)
    cached(LeRobotSource(copied, 4, "train"), [BOTH], config)
    before = folders(config)
    assert copied.root is not None
    top, wrist = (next((copied.root / "videos" / key).rglob("*.mp4")) for key in copied.cameras.values())
    top.write_bytes(wrist.read_bytes())
    source = LeRobotSource(copied, 4, "train")
    mapped = cached(source, [BOTH], config)
    assert len(folders(config) - before) == 2
    indices = np.arange(len(source))
    assert np.array_equal(mapped.pictures(indices, BOTH)[0], source.pictures(indices, BOTH)[0])


@pytest.mark.parametrize("damage", ["short", "foreign", "unfinished"])
def test_a_damaged_cache_is_made_again(video_recipe: Recipe, tmp_path: Path, damage: str) -> None:
    config, source = CacheConfig(tmp_path, 1.0), LeRobotSource(video_recipe, 4, "train")
    cached(source, [TOP], config)
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    if damage == "short":
        (folder / "frames.u8").write_bytes(b"short")
    elif damage == "foreign":
        about = json.loads((folder / "about.json").read_text())
        (folder / "about.json").write_text(json.dumps(about | {"revision": "another"}))
    else:
        (folder / "about.json").unlink()
    (folder / "mark").touch()
    mapped = cached(source, [TOP], config)
    assert not (folder / "mark").exists()
    indices = np.arange(len(source))
    assert np.array_equal(mapped.pictures(indices, TOP)[0], source.pictures(indices, TOP)[0])


def test_a_failed_build_leaves_nothing(copied: Recipe, tmp_path: Path) -> None:
    assert copied.root is not None
    source, config = LeRobotSource(copied, 4, "train"), CacheConfig(tmp_path / "cache", 1.0)
    next((copied.root / "videos/observation.images.wrist").rglob("*.mp4")).write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"wrist.*mp4"):
        cached(source, [View(("wrist",), 32)], config)
    assert not folders(config)


def test_a_budget_that_is_too_small_is_refused_before_anything_is_written(video_recipe: Recipe, tmp_path: Path) -> None:
    config = CacheConfig(tmp_path / "cache", 1.5 * ONE)
    with pytest.raises(TandemError, match=r"46 frames of 'top' at 32 px, 'wrist' at 32 px .* cache.budget_gb"):
        cached(LeRobotSource(video_recipe, 4, "train"), [BOTH], config)
    assert not config.folder.exists()


def test_the_disk_must_have_room(video_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    config = CacheConfig(tmp_path, 1.0)
    with pytest.raises(TandemError, match=r"0\.00 GB are free"):
        cached(LeRobotSource(video_recipe, 4, "train"), [TOP], config)
    assert not folders(config)


def test_the_longest_unused_makes_room(video_recipe: Recipe, tmp_path: Path) -> None:
    source, config = LeRobotSource(video_recipe, 4, "train"), CacheConfig(tmp_path, 2.1 * ONE)
    names = {}
    for camera in CAMERAS:
        before = folders(config)
        cached(source, [View((camera,), 32)], config)
        (names[camera],) = folders(config) - before
    cached(source, [TOP], config)  # used again, so the other one is older
    cached(source, [View(("top",), 30)], config)
    assert names["top"] in folders(config)
    assert names["wrist"] not in folders(config)
    assert len(folders(config)) == 2


def test_another_size_is_decoded(video_recipe: Recipe, tmp_path: Path) -> None:
    source, indices, other = LeRobotSource(video_recipe, 4, "train"), np.arange(2), View(("top",), 48)
    mapped = cached(source, [TOP], CacheConfig(tmp_path, 1.0))
    assert np.array_equal(mapped.pictures(indices, other)[0], source.pictures(indices, other)[0])


def test_one_camera_is_kept_at_two_sizes(video_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, indices, small = LeRobotSource(video_recipe, 4, "train"), np.arange(40), View(("top",), 16)
    with pytest.raises(TandemError, match=r"'top' at 32 px, 'wrist' at 32 px, 'top' at 16 px take"):
        cached(source, [BOTH, small], CacheConfig(tmp_path, 2.2 * ONE))
    mapped = cached(source, [BOTH, small], CacheConfig(tmp_path, 2.3 * ONE))
    assert len(folders(CacheConfig(tmp_path, 1.0))) == 3
    expected = [source.pictures(indices, view)[0] for view in (BOTH, small)]
    monkeypatch.setattr("train.video.VideoFrames.read", lambda *_: pytest.fail("decoded again"))
    for view, pictures in zip((BOTH, small), expected, strict=True):
        assert np.array_equal(mapped.pictures(indices, view)[0], pictures)


def test_those_who_ask_at_once_wait_for_one_build(
    video_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    build = frame_cache._build
    monkeypatch.setattr(frame_cache, "_build", lambda *a: (built.append(a[1]), build(*a)))
    sources = [LeRobotSource(video_recipe, 4, "train") for _ in range(3)]
    threads = [threading.Thread(target=cached, args=(source, [BOTH], CacheConfig(tmp_path, 1.0))) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(built) == CAMERAS


def test_a_budget_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="positive"):
        CacheConfig(tmp_path, 0.0)
