"""Attempts of a demonstrator at a task, in this process or in several."""

import ctypes
import functools
import os
import signal
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np

from robot.journal import Episode, Journal
from robot.registry import Demonstrator, SceneConfig, make_demonstrator, make_robot
from robot.robot import FeelingRobot, SimulatedRobot
from vla.errors import TandemError

PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Attempt:
    task: str
    seed: int  # of the scene and of the pushes: an attempt depends on nothing else

    @property
    def name(self) -> str:
        return f"{self.task}/{self.seed:08d}"

    @property
    def noisy(self) -> bool:
        """Every second one is: clean episodes show the path, noisy ones the way back to it."""
        return self.seed % 2 == 1


@dataclass(frozen=True)
class Settings:
    """What every attempt of a recording shares."""

    robot: SceneConfig
    noise: float
    steps_after_success: int
    failures: Literal["leave_out", "keep"]
    journal: Path


def demonstrate(
    robot: SimulatedRobot, demonstrator: Demonstrator, attempt: Attempt, steps_after_success: int
) -> tuple[Episode, bool, list[tuple[int, int]] | None]:
    """One episode, whether it solved the task, and its spans of contact if the robot feels any.

    It goes on for a few steps after success. A span is its first and its last frame in contact.
    """
    instruction = robot.reset(attempt.task, attempt.seed)
    demonstrator.reset()
    rng = np.random.default_rng([attempt.seed, zlib.crc32(attempt.task.encode())])
    observations, labels, touched = [], [], []
    left = steps_after_success
    for _ in range(robot.step_limit):
        observations.append(robot.observe())
        touched.append(isinstance(robot, FeelingRobot) and robot.contact())
        executed, label = demonstrator.action(rng)
        labels.append(label)
        robot.command(executed)
        if robot.success():
            if left == 0:
                break
            left -= 1
    episode = Episode(
        images={name: np.stack([o.images[name] for o in observations]) for name in robot.cameras},
        state=np.stack([o.state for o in observations]),
        action=np.stack(labels),
        instruction=instruction,
    )
    return episode, robot.success(), spans(touched) if isinstance(robot, FeelingRobot) else None


def spans(touched: Sequence[bool]) -> list[tuple[int, int]]:
    """(T,) -> first and last place of each run of True."""
    edges = np.flatnonzero(np.diff(np.pad(np.asarray(touched, np.int8), 1)))
    return [(int(first), int(after) - 1) for first, after in zip(edges[::2], edges[1::2], strict=True)]


class Recorder:
    """One robot with its demonstrators, writing to the journal."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._journal = settings, Journal(settings.journal)
        self._robot = make_robot(settings.robot)
        self._clean, self._pushed = (
            make_demonstrator(settings.robot, self._robot, noise) for noise in (0.0, settings.noise)
        )

    def attempt(self, attempt: Attempt) -> dict[str, Any]:
        """Make one attempt and note it; returns its facts."""
        demonstrator = self._pushed if attempt.noisy else self._clean
        steps = self._settings.steps_after_success
        episode, success, contacts = demonstrate(self._robot, demonstrator, attempt, steps)
        noise = self._settings.noise if attempt.noisy else 0.0
        facts = {
            "task": attempt.task,
            "instruction": episode.instruction,
            "seed": attempt.seed,
            "success": success,
            "noise": noise,
            "frames": len(episode.state),
        } | ({} if contacts is None else {"contacts": contacts})
        wanted = success or self._settings.failures == "keep"
        self._journal.add(attempt.name, facts, episode if wanted else None)
        return facts

    def close(self) -> None:
        self._robot.close()


class Crew:
    """`workers` processes, each with a recorder; with one, this process does the work."""

    def __init__(self, settings: Settings, workers: int) -> None:
        self._settings = settings
        self._recorder = Recorder(settings)  # also shows at once what is wrong with the robot
        self._pool = None
        if workers > 1:
            self._pool = ProcessPoolExecutor(
                workers, mp_context=get_context("spawn"), initializer=_die_with, initargs=(os.getpid(),)
            )

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        self._recorder.close()
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def attempt(self, attempts: Sequence[Attempt]) -> Iterator[dict[str, Any]]:
        """Make all of them; yields the facts of each as it ends, in any order."""
        if self._pool is None:
            yield from map(self._recorder.attempt, attempts)
            return
        try:
            for future in as_completed([self._pool.submit(_attempt, self._settings, a) for a in attempts]):
                yield future.result()
        except BrokenProcessPool as error:
            raise TandemError(
                "A recording process was killed, probably for want of memory. What is recorded is kept: "
                "run the same command with fewer workers to continue."
            ) from error


def _die_with(parent: int) -> None:
    """A worker never outlives a killed parent, and leaves Ctrl-C to it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above: no signal will come
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@functools.cache
def _recorder(settings: Settings) -> Recorder:
    return Recorder(settings)


def _attempt(settings: Settings, attempt: Attempt) -> dict[str, Any]:
    return _recorder(settings).attempt(attempt)
