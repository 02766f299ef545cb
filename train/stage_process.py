"""One command as a process of its own: its output in a log, its time and memory measured, its end certain."""

import ctypes
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.1
SAMPLE_S = 0.2  # between two looks at memory
PROMPT = "$ "  # before the command, in the first line of its log
GRACE_S = 20.0  # to end by itself when it is interrupted
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Usage:
    """What one process and its descendants took."""

    wall_s: float
    cpu_s: float
    peak_mb: float  # resident memory, all processes of the stage at one moment


class Process:
    """A command in a process group of its own; its output goes to `log`."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._begun_s = time.monotonic()
        self._own_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._peak_mb = 0.0
        self._usage: Usage | None = None
        self._code = 0
        with log.open("ab") as output:
            output.write(f"{PROMPT}{shlex.join(command)}\n".encode())
            output.flush()
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone; we tell it
                close_fds=False,  # it holds the folder's lock for as long as it lives
                preexec_fn=_die_with_parent,
            )

    def wait(self, tick: Callable[[float], None]) -> int:
        """Exit code, negative for a signal."""
        sampled_s = float("-inf")
        while not self._reap(os.WNOHANG):
            now = time.monotonic()
            if now - sampled_s >= SAMPLE_S:
                sampled_s = now
                self._peak_mb = max(self._peak_mb, group_memory_mb(self._process.pid))
            tick(now - self._begun_s)
            time.sleep(POLL_S)
        return self._code

    def stop(self) -> Usage:
        """End it and its descendants if they still run, kindly first."""
        if self._usage is None:
            with _gone_is_fine():
                os.kill(self._process.pid, signal.SIGTERM)  # it tells its own workers
            until = time.monotonic() + GRACE_S
            while not self._reap(os.WNOHANG) and time.monotonic() < until:
                time.sleep(POLL_S)
        with _gone_is_fine():
            os.killpg(self._process.pid, signal.SIGKILL)
        if self._usage is None:
            self._reap(0)
        assert self._usage is not None
        return self._usage

    def _reap(self, options: int) -> bool:
        if self._usage is not None:
            return True
        try:
            pid, status, used = os.wait4(self._process.pid, options)
        except ChildProcessError:  # we were interrupted right after it was reaped
            self._usage = Usage(time.monotonic() - self._begun_s, 0.0, self._peak_mb)
            return True
        if not pid:
            return False
        self._code = self._process.returncode = os.waitstatus_to_exitcode(status)
        # Kilobytes of the largest single process, which catches peaks between two looks. A child begins as a copy
        # of us, and the kernel counts that too: only what is more than our own memory is surely its own.
        single_mb = used.ru_maxrss / 1024 if used.ru_maxrss > self._own_kb else 0.0
        largest = max(self._peak_mb, single_mb)
        self._usage = Usage(time.monotonic() - self._begun_s, used.ru_utime + used.ru_stime, largest)
        return True


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except (ProcessLookupError, PermissionError):  # the latter: macOS, for a group of zombies
        return


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    """Runs in the child: a stage must not go on when we are killed, or two would write to one folder."""
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def group_memory_mb(group: int) -> float:
    """Resident memory of all processes of a process group; 0 where /proc does not tell.

    Pages that processes share are counted in each of them: it is an upper bound.
    """
    page_mb = os.sysconf("SC_PAGE_SIZE") / 2**20
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it ended while we looked
            continue
        if int(fields[2]) == group:  # proc(5): state, ppid, pgrp, ...; rss is 22 fields after state
            total += int(fields[21]) * page_mb
    return total


def tail(log: Path, lines: int, indent: str = "") -> str:
    """The last lines of a log file that may still grow; only its last 16 kB are read."""
    if not log.is_file():
        return ""
    with log.open("rb") as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - 16384))
        text = f.read().decode(errors="replace")
    parts = [line.rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return "\n".join(indent + line for line in [p for p in parts if p and not p.startswith(PROMPT)][-lines:])
