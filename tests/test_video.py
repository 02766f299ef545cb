"""Decoders: damage, order, processes and threads. That frames are the right ones is in test_dataset.py."""

import copy
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from train.dataset import LeRobotSource, View
from train.recipe import Recipe
from train.video import Decoder, DecoderPool
from vla.errors import DataError

CAMERAS = ["top", "wrist"]


def video_file(recipe: Recipe, camera: str) -> Path:
    assert recipe.root is not None
    return next((recipe.root / "videos" / recipe.cameras[camera]).rglob("*.mp4"))


def decoded(path: Path) -> list[np.ndarray]:
    """All frames of a file, read from its beginning to its end."""
    container = av.open(str(path))
    frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    container.close()
    return frames


@pytest.fixture
def copied(tmp_path: Path, video_recipe: Recipe) -> Recipe:
    assert video_recipe.root is not None
    shutil.copytree(video_recipe.root, tmp_path / "copy")
    return replace(video_recipe, root=tmp_path / "copy")


@pytest.mark.parametrize("order", ["forward", "backward", "random", "ends"])
def test_any_order_gives_the_frames_of_a_straight_read(video_recipe: Recipe, order: str) -> None:
    path = video_file(video_recipe, "wrist")
    straight = decoded(path)
    n = len(straight)
    wanted = {
        "forward": list(range(n)),
        "backward": list(range(n))[::-1],
        "random": np.random.default_rng(0).integers(0, n, 80).tolist(),
        "ends": [n - 1, 0, n - 1, n - 1, 0, 0, n - 2, n - 1],
    }[order]
    decoder = Decoder(path)
    for i in wanted:
        assert np.array_equal(decoder.rgb(i / 10), straight[i]), i


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"g": "8", "x264-params": "open-gop=1:bframes=3:scenecut=0:log-level=none"}),
        ("mpeg4", {"g": "10", "bf": "2"}),
    ],
)
def test_reordered_frames_that_lie_before_their_key_frame(tmp_path: Path, codec: str, options: dict[str, str]) -> None:
    """A seek may then land on a key frame behind the time asked for."""
    container = av.open(str(tmp_path / "x.mp4"), "w")
    stream = container.add_stream(codec, rate=10)
    assert isinstance(stream, av.VideoStream)
    stream.width = stream.height = 64
    stream.pix_fmt, stream.options = "yuv420p", dict[str, object](options)
    for i in range(60):
        picture = np.full((64, 64, 3), i * 4, np.uint8)
        picture[i] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode())
    container.close()
    straight, decoder = decoded(tmp_path / "x.mp4"), Decoder(tmp_path / "x.mp4")
    for i in np.random.default_rng(1).integers(0, len(straight), 100).tolist():
        assert np.array_equal(decoder.rgb(i / 10), straight[i]), i


def test_no_frame_at_a_time_is_refused(video_recipe: Recipe) -> None:
    decoder = Decoder(video_file(video_recipe, "top"))
    for time_s in (0.25, 99.0):
        with pytest.raises(DataError, match="has no frame at"):
            decoder.rgb(time_s)
    assert decoder.rgb(0.2).shape == (48, 64, 3)


def test_a_file_that_is_no_video_is_refused_at_the_door(copied: Recipe) -> None:
    path = video_file(copied, "wrist")
    path.write_bytes(b"no video at all" * 20)
    with pytest.raises(DataError, match=str(path)):
        LeRobotSource(copied, 1, "train")


@pytest.mark.parametrize("damage", ["cut in half", "overwritten"])
def test_a_corrupt_file_is_named(copied: Recipe, damage: str) -> None:
    path = video_file(copied, "wrist")
    content = bytearray(path.read_bytes())
    if damage == "cut in half":
        del content[len(content) // 2 :]
    else:
        start = content.index(b"mdat") + 8  # the frames, after the index
        content[start:] = bytes(len(content) - start)
    path.write_bytes(content)
    source = LeRobotSource(copied, 1, "train")
    assert source.pictures(np.arange(len(source)), View(("top",), 32))[0].any()
    with pytest.raises(DataError, match=str(path)):
        source.pictures(np.arange(len(source)), View(tuple(CAMERAS), 32))


def test_repeated_rows_are_decoded_once(video_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    source = LeRobotSource(video_recipe, 1, "train")
    calls: list[float] = []
    rgb = Decoder.rgb
    monkeypatch.setattr(Decoder, "rgb", lambda self, time_s: calls.append(time_s) or rgb(self, time_s))
    images, _ = source.pictures(np.array([5, 9, 5, 5]), View(("top",), 32))
    assert calls == [0.5, pytest.approx(0.9)]
    assert np.array_equal(images[0], images[2])
    assert not np.array_equal(images[0], images[1])


def test_a_pool_closes_the_longest_unused(video_recipe: Recipe, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.mp4" for i in range(3)]
    for path in paths:
        shutil.copy(video_file(video_recipe, "top"), path)
    pool = DecoderPool(max_open=2)
    first, second = pool.get(paths[0]), pool.get(paths[1])
    assert pool.get(paths[0]) is first
    pool.get(paths[2])
    assert pool.get(paths[0]) is first
    assert pool.get(paths[1]) is not second


def test_threads_have_decoders_of_their_own(video_recipe: Recipe) -> None:
    pool, path = DecoderPool(), video_file(video_recipe, "top")
    mine, theirs = pool.get(path), []
    thread = threading.Thread(target=lambda: theirs.append(pool.get(path)))
    thread.start()
    thread.join()
    assert theirs[0] is not mine
    assert pool.get(path) is mine


def test_copies_begin_with_closed_files(video_recipe: Recipe) -> None:
    pool, path = DecoderPool(max_open=1), video_file(video_recipe, "top")
    assert copy.copy(pool).get(path) is not pool.get(path)


FORK = """
import os, sys
import numpy as np
from train.recipe import load
from train.dataset import LeRobotSource, View

source = LeRobotSource(load(sys.argv[1]), 2, "train")
indices = np.arange(0, len(source), 3)
view = View(("top", "wrist"), 48)
before = source.pictures(indices, view)[0]
children = []
for _ in range(2):
    child = os.fork()
    if child == 0:
        same = np.array_equal(source.pictures(indices, view)[0], before)
        os._exit(0 if same else 1)
    children.append(child)
assert np.array_equal(source.pictures(indices, view)[0], before)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def test_a_forked_child_reads_what_its_parent_has_read(video_recipe: Recipe, tmp_path: Path) -> None:
    from vla.config import dump

    (tmp_path / "recipe.yaml").write_text(dump(video_recipe))
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(tmp_path / "recipe.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.strip() == "[0, 0]", done.stderr


def test_a_spawned_child_can_be_given_an_open_source(video_recipe: Recipe) -> None:
    source = LeRobotSource(video_recipe, 2, "train")
    view = View(("top",), 48)
    here, _ = source.pictures(np.arange(4), view)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there, _ = pool.submit(source.pictures, np.arange(4), view).result(timeout=120)
    assert np.array_equal(here, there)


def test_decoders_are_keyed_by_process(video_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, path = DecoderPool(), video_file(video_recipe, "top")
    parents = pool.get(path)
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    childs = pool.get(path)
    assert childs is not parents


def test_odd_sizes(write_lerobot: Callable[..., Path], recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    """Rows of a decoded frame are padded in memory when the width is no multiple of the decoder's."""
    root = write_lerobot(tmp_path / "odd", "video", fps=10, cameras={"observation.images.c": (66, 50)})
    source = LeRobotSource(recipe_of(root, {"c": "observation.images.c"}, 10.0), 1, "train")
    straight = decoded(video_file(source.recipe, "c"))
    assert np.array_equal(source.pictures(np.array([3]), View(("c",), 66))[0][0, 0, :, 8:58], straight[3])
