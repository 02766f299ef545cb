"""Episodes -> journal -> LeRobot data set."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robot.dataset_writer import EpisodeWriter, Layout, Mode, camera_key
from robot.journal import Episode, Journal
from vla.errors import DataError, TandemError
from vla.types import ActionSpec


def spec(prefix: str, dim: int, rate_hz: float = 20.0) -> ActionSpec:
    names = tuple(f"{prefix}{i}" for i in range(dim))
    return ActionSpec(names, ("m",) * dim, ("absolute",) * dim, (-9.0,) * dim, (9.0,) * dim, rate_hz)


CAMERAS = {"front": (32, 48), "wrist": (32, 32)}


def layout(mode: Mode = "video", **changes: Any) -> Layout:
    return Layout(
        **{"robot_type": "arm", "cameras": CAMERAS, "state": spec("s", 3), "action": spec("a", 2)} | changes, mode=mode
    )


def episode(length: int, seed: int, instruction: str = "lift it") -> Episode:
    """Smooth pictures, as cameras give: compression keeps them nearly as they are."""
    rng = np.random.default_rng(seed)
    images = {}
    for name, (height, width) in CAMERAS.items():
        y, x = np.mgrid[0:height, 0:width]
        t = np.arange(length)[:, None, None]
        images[name] = np.stack([3 * y + 5 * t + seed, 4 * x + 0 * t, 0 * x + 20 * t], -1).astype(np.uint8)
    numbers = rng.standard_normal((length, 5)).astype(np.float32)
    return Episode(images, numbers[:, :3], numbers[:, 3:], instruction)


@pytest.mark.parametrize("mode", ["video", "image"])
def test_lerobot_reads_what_was_written(mode: Mode, tmp_path: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    written = [episode(4, 0), episode(7, 1, "put it down"), episode(2, 2)]
    writer = EpisodeWriter(tmp_path / "data", layout(mode))
    for e in written:
        writer.add(e)
    writer.close()
    read = LeRobotDataset("local/data", root=tmp_path / "data", video_backend="pyav")
    assert (read.num_episodes, read.num_frames, read.fps) == (3, 13, 20)
    assert read.meta.robot_type == "arm"
    assert read.features["action"]["names"] == ["a0", "a1"]
    assert set(read.meta.stats or {}) >= {"action", "observation.state", *map(camera_key, CAMERAS)}
    rows = [(e, t) for e in written for t in range(len(e.state))]
    for i, (e, t) in enumerate(rows):
        item: Any = read[i]
        assert item["task"] == e.instruction
        assert item["observation.state"].numpy().tolist() == e.state[t].tolist()
        assert item["action"].numpy().tolist() == e.action[t].tolist()
        assert item["timestamp"] == pytest.approx(t / 20)
        for name in CAMERAS:
            picture = item[camera_key(name)].numpy().transpose(1, 2, 0) * 255
            assert np.abs(picture - e.images[name][t]).mean() < (6 if mode == "video" else 0.01)


def test_frames_that_encode_slowly_are_all_kept(tmp_path: Path) -> None:
    # LeRobot's encoder drops frames without an error when its queue is full for a tenth of a second.
    writer = EpisodeWriter(tmp_path / "data", layout(cameras={"front": (1200, 1600)}))
    pictures = np.random.default_rng(0).integers(0, 255, (12, 1200, 1600, 3), np.uint8)
    writer.add(Episode({"front": pictures}, np.zeros((12, 3), np.float32), np.zeros((12, 2), np.float32), "x"))
    writer.close()
    import av

    with av.open(str(next((tmp_path / "data").rglob("*.mp4")))) as video:
        assert sum(1 for _ in video.decode(video=0)) == 12


def test_writing_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    writer = EpisodeWriter(tmp_path / "data", layout())
    capfd.readouterr()
    writer.add(episode(5, 0))
    writer.add(episode(5, 1))
    writer.close()
    assert capfd.readouterr() == ("", "")


def test_a_picture_of_another_size_is_refused(tmp_path: Path) -> None:
    writer = EpisodeWriter(tmp_path / "data", layout(cameras={"front": (16, 16)}))
    with pytest.raises(DataError, match="do not fit"):
        writer.add(episode(3, 0))


@pytest.mark.parametrize(("state_hz", "action_hz"), [(12.5, 12.5), (20.0, 40.0)])
def test_rates_a_data_set_cannot_tell_are_refused(state_hz: float, action_hz: float) -> None:
    with pytest.raises(TandemError, match="Hz"):
        _ = layout(state=spec("s", 3, state_hz), action=spec("a", 2, action_hz)).fps


def test_an_episode_is_refused_if_it_cannot_be_learned_from() -> None:
    good = episode(3, 0)
    with pytest.raises(DataError, match="at least one frame"):
        Episode({}, good.state[:0], good.action[:0], "")
    with pytest.raises(DataError, match="equally long"):
        Episode(good.images, good.state[:2], good.action, "")
    with pytest.raises(DataError, match="action holds"):
        Episode(good.images, good.state, np.full_like(good.action, np.nan), "")


def test_the_journal_gives_back_what_it_was_given(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    given = episode(4, 3)
    journal.add("task/1", {"seed": 1}, given)
    journal.add("task/2", {"seed": 2}, None)
    read = journal.episode("task/1")
    assert read.instruction == given.instruction
    assert read.images.keys() == given.images.keys()
    assert all((read.images[k] == given.images[k]).all() for k in given.images)
    assert (read.state == given.state).all()
    assert (read.action == given.action).all()
    assert journal.facts("task/1") == {"seed": 1}
    assert journal.facts("task/2") == {"seed": 2}
    assert journal.facts("task/3") is None
    journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_journal_belongs_to_one_configuration_and_one_process(tmp_path: Path) -> None:
    given = {"noise": 0.1, "seed": 1}
    with (
        Journal(tmp_path / "journal").recording(given),
        pytest.raises(TandemError, match="Another process"),
        Journal(tmp_path / "journal").recording(given),
    ):
        pass
    with (
        pytest.raises(TandemError, match=r"noise \(0.1 then, 0.2 now\)"),
        Journal(tmp_path / "journal").recording(given | {"noise": 0.2}),
    ):
        pass
    with Journal(tmp_path / "journal").recording(given):
        pass
