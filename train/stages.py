"""A chain of commands that can be stopped anywhere and continued: what `vla-quickstart` runs on.

    Stage      what to run, why, and how to tell that it is done
    Ledger     state.json: what ran, with which command, for how long, with how much memory
    Chain      runs the stages that are not done, in order, one process each

A stage's own command continues what it finds, so that an interrupted stage is simply run again.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from train.report_data import read_json
from train.stage_process import Process, Usage, tail
from vla.errors import TandemError, UsageError, choose_from
from vla.files import require_writable, write_json

LAST_LINES = 15


@dataclass(frozen=True)
class Stage:
    name: str
    why: str  # one sentence
    command: tuple[str, ...]  # argument vector of the process
    shown: str  # the same as a person types it
    outputs: tuple[Path, ...]  # what it makes; removed when the stage is to be redone
    done: Callable[[], bool]  # whether the outputs are complete
    expected_s: float  # on two idle cores


class Display(Protocol):
    """Where progress is shown."""

    def begin(self, stage: Stage, number: int, log: Path) -> None: ...

    def tick(self, elapsed_s: float) -> None:
        """Called several times a second while the stage runs."""
        ...

    def end(self, stage: Stage, outcome: str, usage: Usage | None) -> None:
        """`outcome`: "done", "skipped", "failed", "interrupted"."""
        ...


class StageFailed(TandemError):
    pass


class Ledger:
    """`state.json`, written whole after every change.

    Args:
        facts: what else the file says of the run (title, machine, expectation).
    """

    def __init__(self, path: Path, plan: Sequence[Stage], facts: Mapping[str, Any]) -> None:
        before = read_json(path).get("stages", {}) if path.is_file() else {}
        self._path = path
        self._data = {"version": 1, **facts, "stages": {s.name: before.get(s.name, {}) for s in plan}}

    def is_done(self, stage: Stage) -> bool:
        return self._data["stages"][stage.name].get("status") == "done" and stage.done()

    def has_begun(self, stage: Stage) -> bool:
        return bool(self._data["stages"][stage.name])

    def other_command(self, stage: Stage) -> bool:
        """Whether this stage was begun with another command, so that its outputs are of something else."""
        begun = self._data["stages"][stage.name].get("command")
        return begun is not None and begun[1:] != list(stage.command[1:])  # the interpreter may have moved

    def forget(self, stage: Stage) -> None:
        self._data["stages"][stage.name] = {}
        self.write()

    def begin(self, stage: Stage, log: Path) -> None:
        entry = self._data["stages"][stage.name]
        entry |= {"status": "running", "command": list(stage.command), "shown": stage.shown, "log": str(log)}
        self.write()

    def end(self, stage: Stage, status: str, usage: Usage) -> None:
        """Times add up over the attempts of an interrupted stage; memory is the largest."""
        entry = self._data["stages"][stage.name]
        entry["status"] = status
        entry["wall_s"] = round(entry.get("wall_s", 0.0) + usage.wall_s, 2)
        entry["cpu_s"] = round(entry.get("cpu_s", 0.0) + usage.cpu_s, 2)
        entry["peak_mb"] = round(max(entry.get("peak_mb", 0.0), usage.peak_mb), 1)
        self.write()

    def entry(self, stage: Stage) -> dict[str, Any]:
        return dict(self._data["stages"][stage.name])

    def write(self) -> None:
        write_json(self._path, self._data)


class Chain:
    """Stages in `folder`, each run as a process of its own with its output in `folder/logs`."""

    def __init__(self, stages: Sequence[Stage], folder: Path, facts: Mapping[str, Any], display: Display) -> None:
        self._stages, self._folder, self._display = tuple(stages), folder, display
        self._facts = facts

    def run(self, redo: str | None = None) -> Ledger:
        """Run what is not done; with `redo`, forget that stage and those after it first.

        Raises:
            UsageError: no such stage, the folder belongs to another plan, or another process works in it.
            StageFailed: a stage ended with an error; its last lines are in the message.
        """
        names = [stage.name for stage in self._stages]
        if redo is not None and redo not in names:
            raise UsageError(f"--redo {redo!r}: no such stage.{choose_from(redo, names)}")
        require_writable(self._folder)
        with only_one(self._folder):
            ledger = Ledger(self._folder / "state.json", self._stages, self._facts)
            if redo is not None:
                for stage in self._stages[names.index(redo) :]:
                    self._forget(stage, ledger)
            self._refuse_other_plan(ledger)
            ledger.write()
            for number, stage in enumerate(self._stages, start=1):
                if ledger.is_done(stage):
                    self._display.end(stage, "skipped", None)
                    continue
                for later in self._stages[number:]:  # made from what is now made anew
                    if ledger.has_begun(later):
                        self._forget(later, ledger)
                self._run(stage, number, ledger)
            return ledger

    def _refuse_other_plan(self, ledger: Ledger) -> None:
        for stage in self._stages:
            if ledger.other_command(stage):
                raise UsageError(
                    f"{self._folder} was begun with other settings: its stage {stage.name!r} ran\n"
                    f"  {ledger.entry(stage).get('shown')}\nand now it would be\n  {stage.shown}\n"
                    f"Choose another --out, or repeat from there: --redo {stage.name}"
                )

    def _forget(self, stage: Stage, ledger: Ledger) -> None:
        for path in stage.outputs:
            if self._folder.resolve() not in path.resolve().parents:
                raise ValueError(f"{path} of stage {stage.name} lies outside {self._folder}; it is not removed.")
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self._log(stage).unlink(missing_ok=True)
        ledger.forget(stage)

    def _log(self, stage: Stage) -> Path:
        return self._folder / "logs" / f"{stage.name}.log"

    def _run(self, stage: Stage, number: int, ledger: Ledger) -> None:
        log = self._log(stage)
        log.parent.mkdir(exist_ok=True)
        ledger.begin(stage, log)
        self._display.begin(stage, number, log)
        status, usage = "interrupted", Usage(0.0, 0.0, 0.0)
        process = Process(stage.command, log)
        try:
            code = process.wait(self._display.tick)
            status = "done" if code == 0 and stage.done() else "failed"
        finally:
            usage = process.stop()
            ledger.end(stage, status, usage)
            self._display.end(stage, status, usage)
        if status == "failed":
            what = f"ended with exit code {code}" if code else "ended without its result"
            raise StageFailed(
                f"Stage {stage.name!r} {what}. Its last lines:\n{tail(log, LAST_LINES, indent='  ')}\n"
                f"All of it: {log}\nThe stage's command: {stage.shown}\n"
                "Mend the cause and run the same command again: it continues with this stage."
            )


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; processes started meanwhile hold it with us until they end."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"Another vla-quickstart is at work in {folder}, or a stage of an earlier one has not ended yet. "
                "Wait for it, or choose another --out."
            ) from error
        os.set_inheritable(lock.fileno(), True)
        yield
