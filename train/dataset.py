"""A recipe's data set as training rows: checked at the door, read in batches.

Rows are arrays in memory, an action chunk is a slice of them, and pictures are decoded for a whole batch
at once. What comes out equals LeRobot's own tensors, pictures as uint8 at the model's size.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from train import dataset_checks
from train.lerobot_folder import RECOPY, Folder, locate, open_folder
from train.recipe import Recipe
from train.stored_images import ImageFrames
from train.video import Decoder, DecoderPool, VideoFrames
from vla.errors import DataError, UsageError, choose_from

BOOKKEEPING = ("index", "episode_index", "frame_index", "timestamp", "task_index")


@dataclass(frozen=True)
class Episode:
    """One episode of a source. `start` counts the source's own frames, `row` the data set's."""

    index: int  # its number in the data set
    start: int
    row: int
    length: int  # frames


@dataclass(frozen=True)
class RawBatch:
    """B frames as they were recorded: V cameras, H steps ahead, S and A dimensions."""

    images: np.ndarray  # (B, V, size, size, 3) uint8 RGB, aspect kept, black bars
    image_mask: np.ndarray  # (V,) bool, false where the data set has no such camera
    state: np.ndarray  # (B, S) float32, units of the recipe's state spec
    actions: np.ndarray  # (B, H, A) float32, units of its action spec; beyond the end the last row repeats
    valid: np.ndarray  # (B, H) bool, false beyond the episode's end
    instructions: list[str]  # (B,)


class FrameReader(Protocol):
    """One camera's pictures by row of the data set."""

    def read(self, rows: np.ndarray, size: int, out: np.ndarray) -> None:
        """Fill `out` (B, size, size, 3) uint8 with the frames of `rows` (B,) int64."""
        ...


class LeRobotSource:
    """The episodes of one split of a recipe's LeRobot v3 data set.

    Args:
        recipe: which data set, and what its numbers mean.
        horizon: H, actions of a chunk, the frame's own action first.
        split: the training episodes, or those that the recipe holds out.

    Raises:
        DataError: there is no data set, it is damaged, or it is not what the recipe says. Episodes in the
            recipe's `split.exclude` are not looked at.
        UsageError: the recipe leaves no episode for this split.
    """

    def __init__(self, recipe: Recipe, horizon: int, split: Literal["train", "validation"]) -> None:
        if horizon < 1:
            raise UsageError(f"A chunk needs at least one action, got a horizon of {horizon}.")
        self.recipe, self.horizon, self.split = recipe, horizon, split
        self.folder = open_folder(locate(recipe))
        dataset_checks.declared(recipe, self.folder)
        table = self.folder.read([*BOOKKEEPING, recipe.state.key, recipe.action.key])
        self._state = _matrix(table[recipe.state.key])  # (N, S)
        self._action = _matrix(table[recipe.action.key])  # (N, A)
        self._task = table["task_index"]  # (N,)
        kept = _kept_episodes(recipe, self.folder)
        dataset_checks.episodes(self.folder, table, kept)
        self.kept_rows = np.concatenate([np.arange(*self.folder.bounds(e)) for e in kept])  # of both splits
        for key, values in ((recipe.state.key, self._state), (recipe.action.key, self._action)):
            dataset_checks.finite(key, values, table, self.kept_rows)
        if recipe.language.source == "task":
            dataset_checks.tasks(self.folder, table, self.kept_rows)
        self.episodes = self._choose(kept)
        bounds = [(e.row, e.row + e.length) for e in self.episodes]
        self._rows = np.concatenate([np.arange(a, b) for a, b in bounds])  # (n,) rows of the data set
        self._stop = np.repeat([b for _, b in bounds], [b - a for a, b in bounds])  # (n,) end of each's episode
        self._frames = self._readers(table)

    def __len__(self) -> int:
        """Frames of this split; each can be a sample."""
        return len(self._rows)

    @property
    def fps(self) -> float:
        return self.folder.fps

    @cached_property
    def revision(self) -> str:
        """16 hexadecimal digits of the content that this recipe uses."""
        return self.folder.revision(list(self.recipe.cameras.values()))

    def statistics_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """States (n, S) and actions (n, A), float32, of all frames of this split."""
        return self._state[self._rows], self._action[self._rows]

    def valid_steps(self, indices: np.ndarray) -> np.ndarray:
        """(B,) int64, how many actions of each frame's chunk lie inside its episode."""
        return np.minimum(self._stop[indices] - self._rows[indices], self.horizon)

    def read(self, indices: np.ndarray, cameras: Sequence[str], size: int) -> RawBatch:
        """The frames `indices` (B,) int64 of this split, with pictures of `cameras` at `size` pixels.

        Raises:
            DataError: none of `cameras` is in the recipe, or a picture cannot be decoded.
        """
        present = np.array([name in self.recipe.cameras for name in cameras])
        if not present.any():
            raise DataError(
                f"The policy's cameras {list(cameras)} are not in recipe {self.recipe.name!r}."
                f"{choose_from(cameras[0], self.recipe.cameras)}"
            )
        rows = self._rows[indices]
        images = np.empty((len(rows), len(cameras), size, size, 3), np.uint8)
        for v, name in enumerate(cameras):
            if present[v]:
                self._frames[name].read(rows, size, images[:, v])
            else:
                images[:, v] = 0
        ahead = np.arange(self.horizon)
        last = self._stop[indices] - 1
        chunk = np.minimum(rows[:, None] + ahead, last[:, None])  # (B, H)
        return RawBatch(
            images=images,
            image_mask=present,
            state=self._state[rows],
            actions=self._action[chunk],
            valid=rows[:, None] + ahead <= last[:, None],
            instructions=self.instructions(indices),
        )

    def instructions(self, indices: np.ndarray) -> list[str]:
        """(B,) what the robot was told at each frame."""
        language = self.recipe.language
        if language.source == "constant":
            return [language.text or ""] * len(indices)
        return [self.folder.tasks[t] for t in self._task[self._rows[indices]].tolist()]

    def frame_reader(self, camera: str) -> FrameReader:
        """What reads the pictures of one of the recipe's cameras, by row of the data set."""
        return self._frames[camera]

    def with_frames(self, readers: Mapping[str, FrameReader]) -> "LeRobotSource":
        """The same source, with the pictures of some cameras read from elsewhere."""
        other = copy.copy(self)
        other._frames = {**self._frames, **readers}
        return other

    def _choose(self, kept: np.ndarray) -> list[Episode]:
        """This split's episodes; which ones depends on the recipe's seed alone."""
        rule = self.recipe.split
        order = np.random.default_rng(rule.seed).permutation(kept)
        held_out = round(rule.validation_fraction * len(kept))
        if rule.validation_fraction > 0:
            held_out = min(max(1, held_out), len(kept) - 1)
        chosen = np.sort(order[:held_out] if self.split == "validation" else order[held_out:])
        if not len(chosen):
            raise UsageError(
                f"Recipe {self.recipe.name!r} leaves no {self.split} episode of {len(kept)}: correct its "
                f"split.exclude and split.validation_fraction ({rule.validation_fraction})."
            )
        episodes, start = [], 0
        for e in chosen:
            row, stop = self.folder.bounds(e)
            episodes.append(Episode(int(self.folder.episodes["episode_index"][e]), start, row, stop - row))
            start += stop - row
        return episodes

    def _readers(self, table: Mapping[str, np.ndarray]) -> dict[str, FrameReader]:
        episode = np.searchsorted(self.folder.episodes["episode_index"], table["episode_index"])
        pool, readers = DecoderPool(), {}
        for name, key in self.recipe.cameras.items():
            if self.folder.features[key]["dtype"] == "image":
                readers[name] = ImageFrames(self.folder.data_files, key)
                continue
            files = self.folder.video_files(key)
            used = {files[e] for e in _kept_episodes(self.recipe, self.folder)}
            missing = sorted(str(path) for path in used if not path.is_file())
            if missing:
                raise DataError(f"{len(missing)} of {len(used)} video files are missing, first {missing[0]}. {RECOPY}")
            for path in sorted(used):
                Decoder(path)  # a file that is no video is refused now, not in the middle of an epoch
            times = self.folder.video_starts(key)[episode] + table["timestamp"]
            readers[name] = VideoFrames(pool, files, episode, times)
        return readers


def _matrix(values: np.ndarray) -> np.ndarray:
    """(N, dim) float32; a column of scalars has one dimension."""
    return np.ascontiguousarray(values.reshape(len(values), -1), np.float32)


def _kept_episodes(recipe: Recipe, folder: Folder) -> np.ndarray:
    """Places in `folder.episodes` that the recipe does not exclude."""
    index = folder.episodes["episode_index"]
    unknown = sorted(set(recipe.split.exclude) - set(index.tolist()))
    if unknown:
        raise UsageError(
            f"Recipe {recipe.name!r} excludes episodes {unknown}, but {folder.root} has {index.min()}..{index.max()}."
        )
    return np.flatnonzero(~np.isin(index, recipe.split.exclude))
