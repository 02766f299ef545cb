"""Micro-batches for the loss: mixtures, ranks and accumulation, prepared ahead by threads.

What a step gets is a pure function of (seed, step, rank), so training resumes exactly where it stopped
and a global batch is the same however it is divided.
"""

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import numpy as np
import torch

from train import dataset_checks
from train.dataset import Around, RawSteps, View, views
from train.recipe import Recipe
from train.sampler import MixtureSampler, observe
from vla.batch import Batch
from vla.errors import UsageError
from vla.processor import Processor
from vla.switching import FORWARD
from vla.types import require_same


class Source(Protocol):
    """What a member reads from; `train.dataset.LeRobotSource` is one."""

    horizon: int
    past: int
    history: int
    recipe: Recipe

    def __len__(self) -> int: ...

    def valid_steps(self, indices: np.ndarray) -> np.ndarray: ...

    def around(self, indices: np.ndarray) -> Around: ...

    def steps(self, indices: np.ndarray) -> RawSteps: ...

    def pictures(self, indices: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray]: ...

    def instructions(self, indices: np.ndarray) -> list[str]: ...


@dataclass(frozen=True)
class Member:
    """One data set of a mixture."""

    source: Source
    processor: Processor  # brings this data set's numbers into the model's units
    weight: float  # relative share of the samples
    mode: int = FORWARD  # the behaviour that its rows show


@dataclass(frozen=True)
class Samples:
    """R observations of a mixture and the K frames that each of them serves, of one episode."""

    member: np.ndarray  # (R,) int64
    observed: np.ndarray  # (R,) int64, the frame whose pictures are encoded
    frames: np.ndarray  # (R, K) int64, the frames whose states and actions are trained on that encoding

    def at(self, rows: np.ndarray) -> "Samples":
        return Samples(self.member[rows], self.observed[rows], self.frames[rows])


class Loader:
    """Batches of a mixture for one rank. A row is a state and a chunk; K rows may share an observation.

    Args:
        members: the mixture; all processors ask for the same shapes.
        global_batch: rows of one optimiser step over all ranks and accumulation steps.
        accumulation: micro-batches of one step on each rank.
        rank, world_size: this process among those that train together.
        seed: decides order and noise.
        prefetch: steps prepared ahead by threads; 0 prepares each when it is asked for.
        threads: how many prepare; more than one helps when decoding is slower than the model.

    Raises:
        UsageError: the global batch cannot be divided evenly, or members do not fit one another.
        SpecMismatch: a data set's numbers do not mean what its processor takes them for.
    """

    def __init__(
        self,
        members: Sequence[Member],
        global_batch: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
        prefetch: int,
        threads: int = 1,
    ) -> None:
        _check_members(members)
        config = members[0].processor.config
        self._slow_view, self._fast_view = views(config)
        self._law = fast_slow = config.fast_slow
        self._shared = fast_slow.frames if fast_slow else 1  # K
        parts = accumulation * world_size * self._shared
        if min(accumulation, world_size, global_batch) < 1 or global_batch % parts:
            share = f", with {self._shared} rows to an observation (policy.fast_slow.frames)" if fast_slow else ""
            raise UsageError(
                f"A global batch of {global_batch} rows cannot be divided evenly into {accumulation} accumulation "
                f"steps on {world_size} processes{share}: it must be a multiple of {parts}."
            )
        if not 0 <= rank < world_size:
            raise UsageError(f"The rank must be 0..{world_size - 1}, got {rank}.")
        if prefetch < 0 or threads < 1:
            raise UsageError(f"prefetch must be 0 or more and threads 1 or more, got {prefetch} and {threads}.")
        self._members = tuple(members)
        self._global, self._accumulation = global_batch, accumulation
        self._rank, self._world = rank, world_size
        self._prefetch, self._threads = prefetch, threads
        lengths, weights = [len(m.source) for m in members], [m.weight for m in members]
        self._sampler = MixtureSampler(lengths, weights, seed)

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's `accumulation` micro-batches of optimiser step `step`, counted from 0."""
        samples = self._draw(step)
        entries = self._entries(samples)
        parts = self._accumulation * self._world
        places = np.arange(len(samples.member)).reshape(parts, -1)
        noise_seed = self._sampler.noise_seed(step)
        batches = []
        for i in range(self._accumulation):
            here = places[i * self._world + self._rank]
            scale = float(entries[here].sum() * parts / entries.sum())
            batches.append(self._assemble(samples.at(here), here, noise_seed, scale))
        return batches

    def stream(self, first_step: int) -> Generator[tuple[int, list[Batch]], None, None]:
        """(step, micro-batches) from `first_step` on, without end. Close it to stop its threads.

        An error while a step is prepared is raised when that step is asked for.
        """
        if not self._prefetch:
            for step in count(first_step):
                yield step, self.micro_batches(step)
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="loader")
        ahead: deque[Future[list[Batch]]] = deque()
        try:
            for step in count(first_step):
                while len(ahead) < self._prefetch:
                    ahead.append(pool.submit(self.micro_batches, step + len(ahead)))
                batches = ahead.popleft().result()
                ahead.append(pool.submit(self.micro_batches, step + 1 + len(ahead)))
                yield step, batches
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _draw(self, step: int) -> Samples:
        """What the global batch of `step` is made of."""
        count = self._global // self._shared
        member, frame = self._sampler.draw(step * count, count)
        if self._law is None:
            return Samples(member, frame, frame[:, None])
        ages = self._sampler.ages(step, count, self._law)
        samples = Samples(member, np.empty_like(frame), np.empty_like(ages))
        for chosen, here in self._shares(member):
            around = chosen.source.around(frame[here])
            samples.observed[here], samples.frames[here] = observe(
                frame[here], ages[here], around.start, around.first, around.last
            )
        return samples

    def _shares(self, member: np.ndarray) -> list[tuple[Member, np.ndarray]]:
        """The members that `member` (R,) names, each with its places there."""
        places = [np.flatnonzero(member == m) for m in range(len(self._members))]
        return [(m, here) for m, here in zip(self._members, places, strict=True) if len(here)]

    def _entries(self, samples: Samples) -> np.ndarray:
        """(R, K) numbers that count in each row's loss: valid steps times real action dimensions."""
        entries = np.empty_like(samples.frames)
        for chosen, here in self._shares(samples.member):
            dims = int(chosen.processor.codec.dim_mask().sum())
            frames = samples.frames[here]
            entries[here] = chosen.source.valid_steps(frames.ravel()).reshape(frames.shape) * dims
        return entries

    def _assemble(self, samples: Samples, places: np.ndarray, noise_seed: int, scale: float) -> Batch:
        """A micro-batch of the observations at `places` (R,) of the global batch."""
        observations, rows, numbers = [], [], np.arange(samples.frames.size).reshape(samples.frames.shape)
        for chosen, here in self._shares(samples.member):
            part = samples.at(here)
            observations.append((here, _observations(chosen, part, self._slow_view)))
            rows.append((numbers[here].ravel(), _answers(chosen, part.frames.ravel(), self._fast_view)))
        fields = _merge(len(places), observations) | _merge(samples.frames.size, rows)
        longest = int(fields["token_mask"].sum(axis=1).max())  # prompts are padded on the right
        fields |= {name: np.ascontiguousarray(fields[name][:, :longest]) for name in ("tokens", "token_mask")}
        age = samples.frames - samples.observed[:, None]
        return Batch(
            **{name: torch.from_numpy(values) for name, values in fields.items()},
            observation=torch.from_numpy(numbers.ravel() // self._shared),
            age=torch.from_numpy(age.ravel().astype(np.float32)),
            rows=torch.from_numpy((places[:, None] * self._shared + np.arange(self._shared)).ravel()),
            global_size=self._global,
            noise_seed=noise_seed,
            loss_scale=scale,
        )


def _check_members(members: Sequence[Member]) -> None:
    if not members:
        raise UsageError("Training needs at least one data set.")
    config = members[0].processor.config
    for member in members:
        source, codec = member.source, member.processor.codec
        if member.processor.config != config:
            raise UsageError("All data sets of a mixture must be prepared for the same policy configuration.")
        for name, got, due in (
            ("chunk", source.horizon, config.chunk),
            ("past", source.past, config.past),
            ("history", source.history, config.history),
        ):
            if got != due:
                raise UsageError(f"A source reads with a {name} of {got} steps, policy.{name} is {due}.")
        dataset_checks.cameras(source.recipe, config.cameras)
        between = f"recipe {source.recipe.name!r} and of the statistics that prepare its numbers"
        require_same(source.recipe.state.spec, codec.state_spec, f"state of {between}")
        require_same(source.recipe.action.spec, codec.action_spec, f"action of {between}")


def _observations(member: Member, samples: Samples, view: View) -> dict[str, np.ndarray]:
    """The fields of a `Batch` with one entry for each observation: pictures as they were, what is asked for now."""
    images, present = member.source.pictures(samples.observed, view)
    texts = member.source.instructions(samples.frames[:, 0])
    states = member.source.steps(samples.observed).state  # as old as the pictures
    tokens, token_mask = zip(*map(member.processor.text, texts, states), strict=True)
    return {
        "images": images,
        "image_mask": np.repeat(present[None], len(images), axis=0),
        "tokens": np.stack(tokens),
        "token_mask": np.stack(token_mask),
    }


def _answers(member: Member, frames: np.ndarray, view: View) -> dict[str, np.ndarray]:
    """The fields of a `Batch` with one entry for each row."""
    codec, raw = member.processor.codec, member.source.steps(frames)
    images, present = member.source.pictures(frames, view)
    return {
        "fast_images": images,
        "fast_image_mask": np.repeat(present[None], len(frames), axis=0),
        "state": codec.encode_state(raw.state),
        "history": codec.encode_state(raw.history),
        "actions": codec.encode_actions(raw.actions),
        "valid": raw.valid,
        "dim_mask": np.repeat(codec.dim_mask()[None], len(frames), axis=0),
        "mode": np.full(len(frames), member.mode, np.int64),
    }


def _merge(size: int, pieces: list[tuple[np.ndarray, dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Rows of several members in one array for each field."""
    if len(pieces) == 1:
        return pieces[0][1]
    merged = {name: np.empty((size, *values.shape[1:]), values.dtype) for name, values in pieces[0][1].items()}
    for rows, fields in pieces:
        for name, values in fields.items():
            merged[name][rows] = values
    return merged
