"""Episodes -> a LeRobot v3 data set, through LeRobot's own API. The only writer; LeRobot comes in lazily.

Measured on one slow core at 96x96: 4 CPU-ms a frame in video mode (h264 encoded while frames are fed,
no PNG files in between), 7 in image mode; LeRobot's default for video (PNG files, then AV1) takes 8.
"""

import importlib.util
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from robot.journal import Episode
from vla.errors import DataError, MissingDependency, TandemError
from vla.types import ActionSpec

Mode = Literal["video", "image"]
STATE_KEY, ACTION_KEY = "observation.state", "action"
_LONGEST_EPISODE = 100_000  # frames
# LeRobot copies a whole video file each time it appends an episode to it. At its own 200 MB that is
# quadratic, and a third of the time to write 160 small episodes.
_VIDEO_FILE_MB = 1


def camera_key(name: str) -> str:
    """The data set's key of a camera."""
    return f"observation.images.{name}"


@dataclass(frozen=True)
class Layout:
    """What a data set's columns are."""

    robot_type: str
    cameras: Mapping[str, tuple[int, int]]  # name -> height and width, pixels
    state: ActionSpec
    action: ActionSpec
    mode: Mode  # videos, or pictures without loss inside the Parquet files

    @property
    def fps(self) -> int:
        """Frames per second: one frame is one control step. LeRobot takes whole numbers only."""
        fps = round(self.action.rate_hz)
        if fps != self.action.rate_hz or self.state.rate_hz != self.action.rate_hz:
            raise TandemError(
                f"A LeRobot data set has one whole number of frames per second, but the robot's state "
                f"comes at {self.state.rate_hz} Hz and its actions at {self.action.rate_hz} Hz."
            )
        return fps

    def features(self) -> dict[str, dict[str, Any]]:
        vectors = {
            key: {"dtype": "float32", "shape": (spec.dim,), "names": list(spec.names)}
            for key, spec in ((STATE_KEY, self.state), (ACTION_KEY, self.action))
        }
        axes = ["height", "width", "channels"]
        return vectors | {
            camera_key(name): {"dtype": self.mode, "shape": (*size, 3), "names": axes}
            for name, size in self.cameras.items()
        }


class EpisodeWriter:
    """Writes a new data set at `root`, which must not exist. Not readable before `close` has returned.

    Raises:
        MissingDependency: LeRobot is not installed.
        DataError: an episode that does not fit the layout.
    """

    def __init__(self, root: Path, layout: Layout) -> None:
        self._layout = layout
        self._dataset: Any = _lerobot().create(
            repo_id=f"local/{root.name}",
            fps=layout.fps,
            features=layout.features(),
            root=root,
            robot_type=layout.robot_type,
            use_videos=layout.mode == "video",
            rgb_encoder=_encoder(),
            encoder_threads=1,  # frames are small: threads cost more than they bring
            video_files_size_in_mb=_VIDEO_FILE_MB,
            streaming_encoding=layout.mode == "video",
            # A full queue drops frames with nothing but a line in the log, so it must never be full.
            encoder_queue_maxsize=_LONGEST_EPISODE,
        )

    def add(self, episode: Episode) -> None:
        sizes = {name: images.shape[1:3] for name, images in episode.images.items()}
        if sizes != dict(self._layout.cameras):
            raise DataError(f"The episode's pictures {sizes} do not fit the data set's {dict(self._layout.cameras)}.")
        if len(episode.state) > _LONGEST_EPISODE:
            raise DataError(f"An episode may have {_LONGEST_EPISODE} frames, this one has {len(episode.state)}.")
        for t in range(len(episode.state)):
            frame = {camera_key(name): images[t] for name, images in episode.images.items()}
            frame |= {
                STATE_KEY: episode.state[t].astype(np.float32),
                ACTION_KEY: episode.action[t].astype(np.float32),
                "task": episode.instruction,
            }
            self._dataset.add_frame(frame)
        from lerobot.utils.utils import SuppressProgressBars

        try:
            with SuppressProgressBars():  # one bar per episode would bury our own
                self._dataset.save_episode(parallel_encoding=False)
        except RuntimeError as error:  # what its encoder's thread makes of any failure, a full disk included
            raise DataError(f"LeRobot could not encode an episode: {error}. Is the disk full?") from error

    def close(self) -> None:
        """Write what is pending and the footers of all files."""
        self._dataset.finalize()


def require_lerobot() -> None:
    """Raise `MissingDependency` unless LeRobot is installed, without its ten seconds of imports."""
    if importlib.util.find_spec("lerobot") is None:
        raise MissingDependency("Writing a data set needs LeRobot: pip install 'tandem-vla[train]'.")


def _lerobot() -> Any:
    require_lerobot()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of LeRobot's own imports; nothing of ours runs in here
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    return LeRobotDataset


def _encoder() -> Any:
    """h264 with every second frame a key frame, so that any frame is at most one away from one."""
    import av.logging
    from lerobot.configs import RGBEncoderConfig

    # LeRobot resets FFmpeg's log to standard error after each file; this is the level it keeps.
    av.logging.set_libav_level(av.logging.ERROR)
    logging.getLogger("libav").setLevel(logging.ERROR)
    return RGBEncoderConfig(vcodec="h264", g=2, crf=18, preset="veryfast")
