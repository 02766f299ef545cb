"""Progress of a chain of stages: a live panel on a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from train.stage_process import Usage, tail
from train.stages import Display, Stage

PLAIN_EVERY_S = 10.0
PANEL_LINES = 4
MARKS = {"waiting": "·", "running": "▸", "done": "✓", "skipped": "✓", "failed": "✗", "interrupted": "■"}
COLOURS = {"running": "bold cyan", "done": "green", "skipped": "green", "failed": "bold red", "interrupted": "yellow"}


def make_display(stages: Sequence[Stage], stream: TextIO) -> Display:
    return Panel(stages, stream) if stream.isatty() else Lines(stages, stream)


class Lines:
    """For logs and pipes: a line at the start and the end of each stage, and its newest line now and then."""

    def __init__(self, stages: Sequence[Stage], stream: TextIO) -> None:
        self._count, self._stream = len(stages), stream
        self._log, self._name, self._said_s, self._last = Path(), "", 0.0, ""

    def begin(self, stage: Stage, number: int, log: Path) -> None:
        self._log, self._name, self._said_s, self._last = log, stage.name, 0.0, ""
        self._say(f"[{number}/{self._count}] {stage.name}: {stage.why}")
        self._say(f"      $ {stage.shown}")
        self._say(f"      expected: about {clock(stage.expected_s)} on two idle cores")

    def tick(self, elapsed_s: float) -> None:
        if elapsed_s - self._said_s < PLAIN_EVERY_S:
            return
        self._said_s = elapsed_s
        line = tail(self._log, 1)
        if line != self._last:
            self._last = line
            self._say(f"      {clock(elapsed_s)}  {line}")

    def end(self, stage: Stage, outcome: str, usage: Usage | None) -> None:
        self._say(f"      {stage.name} {describe(outcome, usage)}" if usage else f"      {stage.name}: done before")

    def _say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class Panel:
    """For a terminal: all stages, the running one with its reason, its time and its newest lines.

    No thread: it is drawn anew when `tick` is called.
    """

    def __init__(self, stages: Sequence[Stage], stream: TextIO) -> None:
        self._stages = {stage.name: stage for stage in stages}
        self._outcomes = dict.fromkeys(self._stages, "waiting")
        self._usages: dict[str, Usage | None] = dict.fromkeys(self._stages)
        self._console = Console(file=stream)
        self._live: Live | None = None
        self._log, self._elapsed_s, self._drawn_s = Path(), 0.0, 0.0

    def begin(self, stage: Stage, number: int, log: Path) -> None:
        self._outcomes[stage.name], self._log, self._elapsed_s = "running", log, 0.0
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._live.start()
        self._draw()

    def tick(self, elapsed_s: float) -> None:
        self._elapsed_s = elapsed_s
        if time.monotonic() - self._drawn_s >= 0.25:
            self._draw()

    def end(self, stage: Stage, outcome: str, usage: Usage | None) -> None:
        self._outcomes[stage.name], self._usages[stage.name] = outcome, usage
        if self._live:
            self._live.stop()
            self._live = None
        colour = COLOURS.get(outcome, "")
        self._console.print(Text(f"{MARKS[outcome]} {stage.name:<10} {describe(outcome, usage)}", colour))

    def _draw(self) -> None:
        self._drawn_s = time.monotonic()
        if self._live:
            self._live.update(self._picture(), refresh=True)

    def _picture(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for name, outcome in self._outcomes.items():
            if outcome not in ("waiting", "running"):
                continue  # printed above when it ended
            expected = self._stages[name].expected_s
            running = f"{clock(self._elapsed_s)} of about " if outcome == "running" else ""
            colour = COLOURS.get(outcome, "dim")
            why = self._stages[name].why
            table.add_row(
                Text(f"{MARKS[outcome]} {name}", colour), Text(running + clock(expected), colour), Text(why, colour)
            )
        lines = Text(tail(self._log, PANEL_LINES) or "starting", "dim", overflow="ellipsis", no_wrap=True)
        return Group(table, Padding(lines, (1, 0, 0, 2)))


def describe(outcome: str, usage: Usage | None) -> str:
    """e.g. "done in 1:15 (CPU 98 s, peak 1.2 GB)"."""
    if usage is None:
        return "done before"
    memory = f"{usage.peak_mb / 1024:.1f} GB" if usage.peak_mb >= 1000 else f"{usage.peak_mb:.0f} MB"
    after = "in" if outcome == "done" else "after"
    return f"{outcome} {after} {clock(usage.wall_s)} (CPU {usage.cpu_s:.0f} s, peak {memory})"


def clock(seconds: float) -> str:
    """75.2 -> "1:15"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
