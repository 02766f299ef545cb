"""How far long work has come: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Counter:
    """Counts to `total`. A context manager, so that the terminal is whole again afterwards."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done, self._note = what, total, 0, ""
        self._said_s = time.monotonic()
        console = Console(stderr=True)
        self._bar = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=console)
            self._task = self._bar.add_task(what, total=total, note="")

    def __enter__(self) -> "Counter":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            self._say()

    def to(self, done: int, note: str = "") -> None:
        """`done` of `total` are done; `note` says what else there is to know."""
        self._done, self._note = done, note
        if self._bar:
            self._bar.update(self._task, completed=done, note=note)
        elif time.monotonic() - self._said_s > SECONDS_BETWEEN_LINES:
            self._say()

    def _say(self) -> None:
        self._said_s = time.monotonic()
        tail = f", {self._note}" if self._note else ""
        print(f"{self._what}: {self._done} of {self._total}{tail}", file=sys.stderr, flush=True)
