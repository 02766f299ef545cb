"""Frames out of video files: each batch opens, seeks and decodes a file at most once for each run of frames.

A frame is found by its presentation time, as LeRobot finds it. Decoders are opened when first needed and
belong to one thread of one process: what a forked child inherits is left alone and opened anew.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from vla.errors import DataError
from vla.images import Bars, resize_with_pad

TOLERANCE_S = 1e-4  # LeRobot's: how far a frame's time may be from the row's
MAX_OPEN = 32  # decoders one thread keeps open; one holds a few MB
REPLACE = "Replace the file with an undamaged copy, or list the episodes it holds in the recipe's split.exclude."


class Decoder:
    """One open file. Times may be asked for in any order; rising order is fast."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._container: InputContainer = av.open(str(path))
        except (FFmpegError, OSError) as error:
            raise DataError(f"Cannot open the video {path}: {error}. {REPLACE}") from error
        if not self._container.streams.video:
            raise DataError(f"{path} holds no video stream. {REPLACE}")
        self._stream = self._container.streams.video[0]
        # With frame threads a decoder answers several packets late: each seek would decode them for nothing.
        self._stream.codec_context.thread_count = 1
        time_base = self._stream.time_base
        if time_base is None:
            raise DataError(f"{path} states no time base. {REPLACE}")
        self._time_base = float(time_base)
        self._to_rgb = VideoReformatter()
        self._frames: Iterator[VideoFrame] = iter(())
        self._frame: VideoFrame | None = None
        self._time_s = 0.0  # of `_frame`
        self._key_s = 0.0  # of the newest key frame
        self._key_gap_s = 1.5 / float(self._stream.average_rate or 30)  # longest run of frames seen to hang on one key

    def rgb(self, time_s: float) -> np.ndarray:
        """The frame at `time_s`, (H, W, 3) uint8; valid until the next call.

        Raises:
            DataError: no frame within `TOLERANCE_S`, or the file is damaged.
        """
        tolerance = TOLERANCE_S + 4 * float(np.spacing(np.float32(time_s)))  # rows keep time as float32
        try:
            frame = self._find(time_s, tolerance)
        except (FFmpegError, OSError) as error:
            raise DataError(f"Cannot decode {self.path} at {time_s:.3f} s: {error}. {REPLACE}") from error
        if frame is None:
            raise DataError(
                f"{self.path} has no frame at {time_s:.4f} s (nearest before the search ended: {self._time_s:.4f} s): "
                f"it is cut short, or was encoded at another rate than meta/info.json says. {REPLACE}"
            )
        picture = self._to_rgb.reformat(frame, format="rgb24")
        plane = picture.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(picture.height, plane.line_size)  # pyright: ignore[reportArgumentType]
        return rows[:, : 3 * picture.width].reshape(picture.height, picture.width, 3)

    def _find(self, time_s: float, tolerance: float) -> VideoFrame | None:
        ahead = time_s - self._time_s
        if self._frame is None or ahead < -tolerance or ahead > self._key_gap_s:
            self._seek(time_s, tolerance)
        while self._frame is not None and self._time_s < time_s - tolerance:
            self._advance()
        return self._frame if self._frame is not None and self._time_s <= time_s + tolerance else None

    def _seek(self, time_s: float, tolerance: float) -> None:
        """Decode the first frame of the key frame's run that holds `time_s`."""
        back = 0.0
        while True:
            target = max(0.0, time_s + tolerance - back)
            self._container.seek(int(target / self._time_base), stream=self._stream, backward=True)
            self._frames = self._container.decode(self._stream)
            self._advance()
            early = self._frame is not None and self._time_s <= time_s + tolerance
            if early or target == 0.0:
                return
            back = max(1.0, 2 * back)  # reordered frames: the key frame found may lie behind the time asked for

    def _advance(self) -> None:
        self._frame = next((f for f in self._frames if f.pts is not None), None)
        if self._frame is None:
            return
        self._time_s = float(self._frame.pts) * self._time_base
        if self._frame.key_frame:
            self._key_s = self._time_s
        self._key_gap_s = max(self._key_gap_s, self._time_s - self._key_s)


class DecoderPool:
    """Open decoders, the least recently used closed first. Copies and children begin empty."""

    def __init__(self, max_open: int = MAX_OPEN) -> None:
        self._max_open = max_open
        self._local = threading.local()
        self._inherited: list[object] = []

    def get(self, path: Path) -> Decoder:
        decoders = self._decoders()
        decoder = decoders.pop(path, None) or Decoder(path)
        decoders[path] = decoder
        if len(decoders) > self._max_open:
            decoders.popitem(last=False)
        return decoder

    def forget(self, path: Path) -> None:
        """Close the file's decoder, if it is open in this thread."""
        self._decoders().pop(path, None)

    def _decoders(self) -> "OrderedDict[Path, Decoder]":
        if getattr(self._local, "process", None) != os.getpid():
            # Closing what was opened before a fork could wait for the parent's threads, so it is only kept.
            self._inherited.append(getattr(self._local, "decoders", None))
            self._local.process, self._local.decoders = os.getpid(), OrderedDict()
        return self._local.decoders

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return DecoderPool, (self._max_open,)


class VideoFrames:
    """The frames of one camera of a data set, by row.

    Args:
        files: (E,) the file of each episode.
        episode: (N,) int64, the place in `files` of each row's episode.
        times: (N,) float64 s, each row's time in its file.
    """

    def __init__(self, pool: DecoderPool, files: list[Path], episode: np.ndarray, times: np.ndarray) -> None:
        self._paths = sorted(set(files))
        place = {path: i for i, path in enumerate(self._paths)}
        self._file = np.array([place[path] for path in files], np.int64)[episode]  # (N,)
        self._times, self._pool = times, pool

    def read(self, rows: np.ndarray, size: int, out: np.ndarray, bars: Bars = "centred") -> None:
        """Fill `out` (B, size, size, 3) uint8 with the frames of `rows` (B,)."""
        file, times = self._file[rows], self._times[rows]
        before: tuple[int, float] | None = None
        picture = np.empty(0)
        for i in np.lexsort((times, file)):
            here = (int(file[i]), float(times[i]))
            if here != before:
                picture = resize_with_pad(self._rgb(self._paths[here[0]], here[1]), size, bars)
                before = here
            out[i] = picture

    def _rgb(self, path: Path, time_s: float) -> np.ndarray:
        try:
            return self._pool.get(path).rgb(time_s)
        except DataError:
            self._pool.forget(path)  # its state after an error is unknown
            raise
