"""A recipe's data set as training rows: checked at the door, read in batches.

Rows are arrays in memory, an action chunk is a slice of them, and pictures are decoded for a whole batch
at once. What comes out equals LeRobot's own tensors, pictures as uint8 at the model's size. Numbers and
pictures are read apart: a policy with a slow and a fast path takes them from different moments.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from train import dataset_checks
from train.lerobot_folder import RECOPY, Folder, locate, open_folder
from train.recipe import Recipe
from train.stored_images import ImageFrames
from train.video import Decoder, DecoderPool, VideoFrames
from vla.errors import DataError, UsageError
from vla.images import Bars
from vla.policy_config import PolicyConfig

BOOKKEEPING = ("index", "episode_index", "frame_index", "timestamp", "task_index")


@dataclass(frozen=True)
class Episode:
    """One episode of a source. `start` counts the source's own frames, `row` the data set's."""

    index: int  # its number in the data set
    start: int
    row: int
    length: int  # frames


@dataclass(frozen=True)
class View:
    """Pictures that a model looks at."""

    cameras: tuple[str, ...]  # the recipe's names, V
    size: int  # pixels, side of the square
    bars: Bars = "centred"  # where pictures that are not square are black


def views(policy: PolicyConfig) -> tuple[View, View]:
    """What a policy looks at in the observation, and together with each state (fast-slow training)."""
    fast_slow = policy.fast_slow
    fast = View(fast_slow.cameras, fast_slow.image_size, policy.bars) if fast_slow else View((), 0)
    return View(policy.cameras, policy.image_size, policy.bars), fast


@dataclass(frozen=True)
class RawSteps:
    """The numbers around B frames as they were recorded: S and A dimensions, H steps ahead."""

    state: np.ndarray  # (B, S) float32, units of the recipe's state spec
    history: np.ndarray  # (B, p, S) float32, the p states before, oldest first; before the start the first repeats
    actions: np.ndarray  # (B, past + H, A) float32, units of its action spec; outside the episode its end rows repeat
    valid: np.ndarray  # (B, past + H) bool, false outside the episode


@dataclass(frozen=True)
class Around:
    """Where B frames are, all as frames of the split."""

    start: np.ndarray  # (B,) int64, its episode's first frame
    first: np.ndarray  # (B,) int64, first of the frames around it, in its episode, that share its instruction
    last: np.ndarray  # (B,) int64, the last of them


class FrameReader(Protocol):
    """One camera's pictures by row of the data set."""

    def read(self, rows: np.ndarray, size: int, out: np.ndarray, bars: Bars = "centred") -> None:
        """Fill `out` (B, size, size, 3) uint8 with the frames of `rows` (B,) int64."""
        ...


class LeRobotSource:
    """The episodes of one split of a recipe's LeRobot v3 data set.

    Args:
        recipe: which data set, and what its numbers mean.
        horizon: H, actions of a chunk, the frame's own action first.
        split: the training episodes, or those that the recipe holds out.
        past: actions before the frame's own that a chunk begins with.
        history: p, states before the frame's own.

    Raises:
        DataError: there is no data set, it is damaged, or it is not what the recipe says. Episodes in the
            recipe's `split.exclude` are not looked at.
        UsageError: the recipe leaves no episode for this split.
    """

    def __init__(
        self, recipe: Recipe, horizon: int, split: Literal["train", "validation"], past: int = 0, history: int = 0
    ) -> None:
        if horizon < 1 or min(past, history) < 0:
            raise UsageError(
                f"A chunk needs at least one action, and past and history are 0 or more, got a horizon of {horizon}, "
                f"past {past} and history {history}."
            )
        self.recipe, self.horizon, self.split, self.past, self.history = recipe, horizon, split, past, history
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
        lengths = [e.length for e in self.episodes]
        self._rows = np.concatenate([np.arange(e.row, e.row + e.length) for e in self.episodes])  # (n,) of the data set
        self._first = np.repeat([e.row for e in self.episodes], lengths)  # (n,) first row of each frame's episode
        self._last = np.repeat([e.row + e.length - 1 for e in self.episodes], lengths)  # (n,) and its last
        self._frames: dict[tuple[str, int | None], FrameReader] = {
            (name, None): reader for name, reader in self._readers(table).items()
        }  # by camera and size; None: any

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
        rows = self._rows[indices]
        before = np.minimum(rows - self._first[indices], self.past)
        return before + np.minimum(self._last[indices] + 1 - rows, self.horizon)

    def steps(self, indices: np.ndarray) -> RawSteps:
        """States and actions at and around the frames `indices` (B,) int64 of this split."""
        rows, first, last = self._rows[indices], self._first[indices, None], self._last[indices, None]
        chunk = rows[:, None] + np.arange(-self.past, self.horizon)  # (B, past + H)
        inside = np.minimum(np.maximum(chunk, first), last)
        before = np.maximum(rows[:, None] + np.arange(-self.history, 0), first)  # (B, p)
        return RawSteps(
            state=self._state[rows],
            history=self._state[before],
            actions=self._action[inside],
            valid=inside == chunk,
        )

    def pictures(self, indices: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray]:
        """The pictures of the frames `indices` (B,), and which cameras the data set has; the others are black.

        Returns:
            (B, V, size, size, 3) uint8 RGB, aspect kept, black bars; (V,) bool.

        Raises:
            DataError: a picture cannot be decoded.
        """
        present = np.array([name in self.recipe.cameras for name in view.cameras], bool)
        rows = self._rows[indices]
        images = np.empty((len(rows), len(view.cameras), view.size, view.size, 3), np.uint8)
        for v, name in enumerate(view.cameras):
            if present[v]:
                self.frame_reader(name, view.size).read(rows, view.size, images[:, v], view.bars)
            else:
                images[:, v] = 0
        return images, present

    def around(self, indices: np.ndarray) -> Around:
        """Where the frames `indices` (B,) are in their episodes."""
        first, last = self._same_instruction
        start = indices - (self._rows[indices] - self._first[indices])
        return Around(start=start, first=first[indices], last=last[indices])

    def instructions(self, indices: np.ndarray) -> list[str]:
        """(B,) what the robot was told at each frame."""
        language = self.recipe.language
        if language.source == "constant":
            return [language.text or ""] * len(indices)
        return [self.folder.tasks[t] for t in self._task[self._rows[indices]].tolist()]

    def frame_reader(self, camera: str, size: int) -> FrameReader:
        """What reads the pictures of one of the recipe's cameras at `size` pixels, by row of the data set."""
        return self._frames.get((camera, size)) or self._frames[camera, None]

    def with_frames(self, readers: Mapping[tuple[str, int], FrameReader]) -> "LeRobotSource":
        """The same source, with the pictures of some cameras at some sizes read from elsewhere."""
        other = copy.copy(self)
        other._frames = {**self._frames, **readers}
        return other

    @cached_property
    def _same_instruction(self) -> tuple[np.ndarray, np.ndarray]:
        """(n,) first and last frame of the run, inside one episode and with one instruction, that holds each frame."""
        begins = np.zeros(len(self) + 1, bool)
        begins[[0, -1, *(e.start for e in self.episodes)]] = True
        if self.recipe.language.source == "task":
            begins[1:-1] |= np.diff(self._task[self._rows]) != 0
        edges = np.flatnonzero(begins)
        lengths = np.diff(edges)
        return np.repeat(edges[:-1], lengths), np.repeat(edges[1:] - 1, lengths)

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
