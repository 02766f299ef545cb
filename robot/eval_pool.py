"""Worker processes that each do one job at a time, and may die of it.

A job and its answer are JSON. Workers are spawned, so that each has its own GL context and nothing of
the parent's state; a worker that dies or takes too long costs the job it had, and a new one is made.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from vla.errors import TandemError

PATIENCE = 5  # workers that may die in a row before the pool gives up
GRACE_S = 5.0  # for a worker to leave by itself
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")

Job = Mapping[str, Any]


@dataclass(frozen=True)
class Done:
    """A job with its answer, or with the reason why there is none."""

    job: Job
    answer: Mapping[str, Any] | None
    died: str  # "" if there is an answer


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    pipe: Connection


@dataclass(frozen=True)
class _Task:
    worker: _Worker
    job: Job
    deadline_s: float


class Pool:
    """Use as a context manager; leaving it by an exception ends the workers at once.

    Args:
        target: `target(pipe, *args)`, runs in the worker until `receive(pipe)` answers None.
        args: picklable.
        workers: how many processes at most.
        threads: compute threads per worker. It is fixed, because sums in another order have other last bits.
        timeout_s: how long one job may take.
    """

    def __init__(
        self, target: Callable[..., None], args: tuple[Any, ...], *, workers: int, threads: int, timeout_s: float
    ) -> None:
        self._target, self._args = target, args
        self._size, self._threads, self._timeout_s = workers, threads, timeout_s
        self._idle: list[_Worker] = []
        self._busy: list[_Task] = []
        self._deaths = 0  # in a row

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        workers = self._idle + [task.worker for task in self._busy]
        for worker in workers:
            worker.pipe.close()  # an idle worker reads the end of its pipe and leaves
            if kind is not None:
                worker.process.terminate()
        until = time.monotonic() + GRACE_S
        for worker in workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def run(self, jobs: Iterable[Job]) -> Iterator[Done]:
        """Do `jobs` in this order as workers get free; yield them as they end.

        Raises:
            TandemError: `PATIENCE` workers died one after the other.
        """
        waiting = deque(jobs)
        while waiting or self._busy:
            while waiting and (self._idle or len(self._busy) < self._size):
                worker = self._idle.pop() if self._idle else self._start()
                self._give(worker, waiting.popleft())
            for done in self._collect():
                self._deaths = self._deaths + 1 if done.died else 0
                yield done
                if self._deaths >= PATIENCE:
                    raise TandemError(
                        f"{PATIENCE} evaluation processes failed one after the other; the last one {done.died}. "
                        "This is no accident of a single episode: mend the cause and run the same command again."
                    )

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        resource_tracker.ensure_running()  # it unblocks SIGINT when it starts, so it must not start below
        ours, theirs = context.Pipe()
        process = context.Process(target=self._target, args=(theirs, *self._args), daemon=True)
        with _environment(dict.fromkeys(THREAD_VARIABLES, str(self._threads))), _interrupts_blocked():
            process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        return _Worker(process, ours)

    def _give(self, worker: _Worker, job: Job) -> None:
        with suppress(OSError):  # of one that is dead; collecting reads the end of its pipe and says so
            worker.pipe.send_bytes(json.dumps(job).encode())
        self._busy.append(_Task(worker, job, time.monotonic() + self._timeout_s))

    def _collect(self) -> list[Done]:
        """Wait until something happens to at least one job."""
        patience_s = max(0.0, min(task.deadline_s for task in self._busy) - time.monotonic())
        ready = wait([task.worker.pipe for task in self._busy], patience_s)
        finished = []
        for task in list(self._busy):
            late = time.monotonic() >= task.deadline_s
            if task.worker.pipe not in ready and not late:
                continue
            self._busy.remove(task)
            finished.append(self._read(task) if task.worker.pipe in ready else self._end(task))
        return finished

    def _read(self, task: _Task) -> Done:
        try:
            answer = json.loads(task.worker.pipe.recv_bytes())
        except (EOFError, OSError):
            task.worker.process.join(GRACE_S)
            return Done(task.job, None, _cause(task.worker.process.exitcode))
        if answer.get("leaving"):
            task.worker.process.join(GRACE_S)
        else:
            self._idle.append(task.worker)
        return Done(task.job, answer, "")

    def _end(self, task: _Task) -> Done:
        task.worker.process.kill()
        task.worker.process.join()
        return Done(task.job, None, f"took longer than {self._timeout_s:g} s and was ended")


def receive(pipe: Connection) -> Job | None:
    """In a worker: the next job, or None when it is time to leave."""
    try:
        return json.loads(pipe.recv_bytes())
    except (EOFError, OSError):
        return None


def answer(pipe: Connection, data: Mapping[str, Any]) -> None:
    """In a worker: the answer to the job received last. `leaving: True` says that the worker ends itself."""
    pipe.send_bytes(json.dumps(data).encode())


def _cause(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process started in here inherits the blocked SIGINT: Ctrl-C is the parent's business alone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
