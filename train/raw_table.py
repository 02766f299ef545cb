"""A data set as it lies on disk, before anything is demanded of it: what the doctor and the inspector read.

`train.dataset` refuses a broken data set at the door; here whatever can be read is, and what cannot is told.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from train.dataset import BOOKKEEPING, FrameReader
from train.lerobot_folder import Folder, locate, open_folder
from train.recipe import Recipe
from train.stored_images import ImageFrames
from train.video import DecoderPool, VideoFrames
from vla.errors import DataError, choose_from


@dataclass(frozen=True)
class Span:
    """One episode. Rows count through the whole data set."""

    episode: int  # its number in the data set
    place: int  # in `folder.episodes`
    start: int  # first row
    stop: int  # the row after its last

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class RawTable:
    """Rows and episodes of a data set; N rows. Episodes in the recipe's `split.exclude` are left out of `spans`."""

    recipe: Recipe
    folder: Folder
    columns: dict[str, np.ndarray]  # (N,) bookkeeping columns and (N, dim) vectors that could be read
    unreadable: dict[str, str]  # column -> why it could not be read
    spans: tuple[Span, ...]

    @cached_property
    def state(self) -> np.ndarray | None:
        """(N, S) float64, or None if it cannot be read."""
        return self._vector(self.recipe.state.key)

    @cached_property
    def action(self) -> np.ndarray | None:
        """(N, A) float64, or None if it cannot be read."""
        return self._vector(self.recipe.action.key)

    def _vector(self, key: str) -> np.ndarray | None:
        if key not in self.columns:
            return None
        return self.columns[key].reshape(len(self.columns[key]), -1).astype(np.float64)

    @cached_property
    def kept(self) -> np.ndarray:
        """(n,) int64, rows of all spans."""
        return np.concatenate([np.arange(s.start, s.stop) for s in self.spans] or [np.arange(0)])

    def text(self, span: Span) -> str:
        """The instruction at an episode's first frame; "" if there is none."""
        language = self.recipe.language
        if language.source == "constant":
            return language.text or ""
        tasks = self.columns.get("task_index")
        return (self.folder.tasks.get(int(tasks[span.start])) or "") if tasks is not None and span.length else ""

    def cameras(self) -> Iterator[tuple[str, str]]:
        """(policy's name, data set's key) of the recipe's cameras that the data set has."""
        return ((n, k) for n, k in self.recipe.cameras.items() if k in self.folder.cameras)

    def frames(self, key: str) -> FrameReader:
        """What reads a camera's pictures by row. A row's place in its episode gives its time in the video.

        Raises:
            DataError: the metadata says nothing of this camera's videos, or a parquet file is damaged.
        """
        if self.folder.features[key]["dtype"] == "image":
            return ImageFrames(self.folder.data_files, key)
        rows = len(next(iter(self.columns.values())))
        starts = self.folder.video_starts(key)
        episode, times = np.zeros(rows, np.int64), np.zeros(rows)
        for span in self.spans:
            episode[span.rows] = span.place
            times[span.rows] = starts[span.place] + np.arange(span.length) / self.folder.fps
        return VideoFrames(DecoderPool(), self.folder.video_files(key), episode, times)


def read_raw(recipe: Recipe) -> RawTable:
    """Read all that can be read.

    Raises:
        DataError: there is no data set, or its metadata cannot be read at all.
    """
    folder = open_folder(locate(recipe))
    columns: dict[str, np.ndarray] = {}
    unreadable: dict[str, str] = {}
    for key in (*BOOKKEEPING, recipe.state.key, recipe.action.key):
        if key not in folder.features:
            unreadable[key] = f"{folder.root} has no column {key!r}.{choose_from(key, folder.features)}"
            continue
        try:
            values = folder.read([key])[key]
        except DataError as error:
            unreadable[key] = str(error)
            continue
        if values.dtype.kind in "biuf":
            columns[key] = values
        else:
            unreadable[key] = f"Column {key!r} of {folder.root} does not hold numbers, but {values.dtype}."
    if not columns:
        raise DataError(next(iter(unreadable.values())))
    rows = len(next(iter(columns.values())))
    spans = []
    for place, episode in enumerate(folder.episodes["episode_index"].tolist()):
        if episode not in recipe.split.exclude:
            start, stop = (min(row, rows) for row in folder.bounds(place))
            spans.append(Span(episode, place, start, max(start, stop)))
    return RawTable(recipe, folder, columns, unreadable, tuple(spans))
