"""Micro-batches for the loss: mixtures, ranks and accumulation, prepared ahead by threads.

What a step gets is a pure function of (seed, step, rank), so training resumes exactly where it stopped
and a global batch is the same however it is divided.
"""

import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import numpy as np
import torch

from train.dataset import RawBatch
from train.recipe import Recipe
from train.sampler import MixtureSampler
from vla.batch import Batch
from vla.errors import UsageError
from vla.processor import Processor
from vla.types import require_same


class Source(Protocol):
    """What a member reads from; `train.dataset.LeRobotSource` is one."""

    horizon: int
    recipe: Recipe

    def __len__(self) -> int: ...

    def valid_steps(self, indices: np.ndarray) -> np.ndarray: ...

    def read(self, indices: np.ndarray, cameras: Sequence[str], size: int) -> RawBatch: ...


@dataclass(frozen=True)
class Member:
    """One data set of a mixture."""

    source: Source
    processor: Processor  # brings this data set's numbers into the model's units
    weight: float  # relative share of the samples


class Loader:
    """Batches of a mixture for one rank.

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
        parts = accumulation * world_size
        if min(accumulation, world_size, global_batch) < 1 or global_batch % parts:
            raise UsageError(
                f"A global batch of {global_batch} rows cannot be divided evenly into {accumulation} accumulation "
                f"steps on {world_size} processes: it must be a multiple of {parts}."
            )
        if not 0 <= rank < world_size:
            raise UsageError(f"The rank must be 0..{world_size - 1}, got {rank}.")
        if prefetch < 0 or threads < 1:
            raise UsageError(f"prefetch must be 0 or more and threads 1 or more, got {prefetch} and {threads}.")
        _check_members(members)
        self._members = tuple(members)
        self._global, self._accumulation = global_batch, accumulation
        self._rank, self._world = rank, world_size
        self._prefetch, self._threads = prefetch, threads
        lengths, weights = [len(m.source) for m in members], [m.weight for m in members]
        self._sampler = MixtureSampler(lengths, weights, seed)
        self.waited_s = 0.0  # time `stream` kept its consumer waiting for data, in total

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's `accumulation` micro-batches of optimiser step `step`, counted from 0."""
        member, frame = self._sampler.draw(step * self._global, self._global)
        entries = self._entries(member, frame)
        parts = self._accumulation * self._world
        rows = np.arange(self._global).reshape(parts, -1)
        noise_seed = self._sampler.noise_seed(step)
        batches = []
        for i in range(self._accumulation):
            here = rows[i * self._world + self._rank]
            scale = float(entries[here].sum() * parts / entries.sum())
            batches.append(self._assemble(member[here], frame[here], here, noise_seed, scale))
        return batches

    def stream(self, first_step: int) -> Generator[tuple[int, list[Batch]], None, None]:
        """(step, micro-batches) from `first_step` on, without end. Close it to stop its threads.

        An error while a step is prepared is raised when that step is asked for.
        """
        if not self._prefetch:
            for step in count(first_step):
                began = time.monotonic()
                batches = self.micro_batches(step)
                self.waited_s += time.monotonic() - began
                yield step, batches
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="loader")
        ahead: deque[Future[list[Batch]]] = deque()
        try:
            for step in count(first_step):
                while len(ahead) < self._prefetch:
                    ahead.append(pool.submit(self.micro_batches, step + len(ahead)))
                began = time.monotonic()
                batches = ahead.popleft().result()
                self.waited_s += time.monotonic() - began
                ahead.append(pool.submit(self.micro_batches, step + 1 + len(ahead)))
                yield step, batches
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _entries(self, member: np.ndarray, frame: np.ndarray) -> np.ndarray:
        """(global_batch,) numbers that count in each row's loss: valid steps times real action dimensions."""
        entries = np.empty(len(member), np.int64)
        for m in np.unique(member).tolist():
            chosen, here = self._members[m], member == m
            dims = int(chosen.processor.codec.dim_mask().sum())
            entries[here] = chosen.source.valid_steps(frame[here]) * dims
        return entries

    def _assemble(
        self, member: np.ndarray, frame: np.ndarray, rows: np.ndarray, noise_seed: int, scale: float
    ) -> Batch:
        ids = np.unique(member).tolist()
        pieces = [(np.flatnonzero(member == m), _fields(self._members[m], frame[member == m])) for m in ids]
        fields = pieces[0][1] if len(pieces) == 1 else _merge(len(member), pieces)
        longest = int(fields["token_mask"].sum(axis=1).max())  # prompts are padded on the right
        fields |= {name: np.ascontiguousarray(fields[name][:, :longest]) for name in ("tokens", "token_mask")}
        return Batch(
            **{name: torch.from_numpy(values) for name, values in fields.items()},
            rows=torch.from_numpy(rows),
            global_size=self._global,
            noise_seed=noise_seed,
            loss_scale=scale,
        )


def _check_members(members: Sequence[Member]) -> None:
    if not members:
        raise UsageError("Training needs at least one data set.")
    first = members[0].processor
    for member in members:
        if member.processor.config != first.config:
            raise UsageError("All data sets of a mixture must be prepared for the same policy configuration.")
        if member.source.horizon != first.config.chunk:
            raise UsageError(
                f"A source reads chunks of {member.source.horizon} actions, the policy's chunk is {first.config.chunk}."
            )
        recipe, codec = member.source.recipe, member.processor.codec
        between = f"recipe {recipe.name!r} and of the statistics that prepare its numbers"
        require_same(recipe.state.spec, codec.state_spec, f"state of {between}")
        require_same(recipe.action.spec, codec.action_spec, f"action of {between}")


def _fields(member: Member, indices: np.ndarray) -> dict[str, np.ndarray]:
    """The array fields of a `Batch`, made from one member's frames."""
    processor = member.processor
    raw = member.source.read(indices, processor.config.cameras, processor.config.image_size)
    tokens, token_mask = zip(*(processor.text(text) for text in raw.instructions), strict=True)
    dim_mask = processor.codec.dim_mask()
    return {
        "images": raw.images,
        "image_mask": np.repeat(raw.image_mask[None], len(indices), axis=0),
        "tokens": np.stack(tokens),
        "token_mask": np.stack(token_mask),
        "state": processor.codec.encode_state(raw.state),
        "actions": processor.codec.encode_actions(raw.actions),
        "valid": raw.valid,
        "dim_mask": np.repeat(dim_mask[None], len(indices), axis=0),
    }


def _merge(size: int, pieces: list[tuple[np.ndarray, dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Rows of several members in one array for each field."""
    merged = {name: np.empty((size, *values.shape[1:]), values.dtype) for name, values in pieces[0][1].items()}
    for rows, fields in pieces:
        for name, values in fields.items():
            merged[name][rows] = values
    return merged
