"""The chain of stages with small real processes: order, resume, failure, interruption, measurements."""

import json
import os
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest

from train.stage_display import Lines, Panel, describe
from train.stage_process import Process, Usage, group_memory_mb, tail
from train.stages import Chain, Stage, StageFailed, only_one
from vla.errors import UsageError

WRITE = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('x'); print('made', sys.argv[1])"


def make_stage(folder: Path, name: str, code: str = WRITE) -> Stage:
    output = folder / f"{name}.out"
    command = (sys.executable, "-c", code, str(output))
    return Stage(name, f"it makes {name}", command, f"make {name}", (output,), output.is_file, 1.0)


class Recorder:
    """A display that remembers."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, str]] = []

    def begin(self, stage: Stage, number: int, log: Path) -> None: ...

    def tick(self, elapsed_s: float) -> None: ...

    def end(self, stage: Stage, outcome: str, usage: Usage | None) -> None:
        self.ended.append((stage.name, outcome))


def run(folder: Path, *stages: Stage, redo: str | None = None) -> list[tuple[str, str]]:
    display = Recorder()
    Chain(stages, folder, {"title": "t"}, display).run(redo)
    return display.ended


def state(folder: Path) -> dict:
    return json.loads((folder / "state.json").read_text())


def test_runs_in_order_and_skips_what_is_done(tmp_path: Path) -> None:
    stages = [make_stage(tmp_path, name) for name in ("one", "two", "three")]
    assert run(tmp_path, *stages) == [("one", "done"), ("two", "done"), ("three", "done")]
    assert run(tmp_path, *stages) == [("one", "skipped"), ("two", "skipped"), ("three", "skipped")]
    assert state(tmp_path)["title"] == "t"
    assert "made" in (tmp_path / "logs" / "one.log").read_text()


def test_lost_output_redoes_its_stage_and_all_that_came_from_it(tmp_path: Path) -> None:
    stages = [make_stage(tmp_path, name) for name in ("one", "two", "three")]
    run(tmp_path, *stages)
    (tmp_path / "two.out").unlink()
    (tmp_path / "three.out").write_text("made from the old two")
    assert run(tmp_path, *stages) == [("one", "skipped"), ("two", "done"), ("three", "done")]
    assert (tmp_path / "three.out").read_text() == "x"


def test_redo_removes_outputs_from_there_on(tmp_path: Path) -> None:
    stages = [make_stage(tmp_path, name) for name in ("one", "two")]
    run(tmp_path, *stages)
    (tmp_path / "one.out").write_text("mine")
    (tmp_path / "two.out").write_text("old")
    assert run(tmp_path, *stages, redo="two") == [("one", "skipped"), ("two", "done")]
    assert (tmp_path / "one.out").read_text() == "mine"
    assert (tmp_path / "two.out").read_text() == "x"
    with pytest.raises(UsageError, match="Did you mean 'two'"):
        run(tmp_path, *stages, redo="tow")


def test_redo_never_removes_what_lies_outside(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("x")
    one = make_stage(tmp_path / "run", "one")
    stage = Stage(one.name, one.why, one.command, one.shown, (precious,), one.done, 1.0)
    with pytest.raises(ValueError, match="outside"):
        run(tmp_path / "run", stage, redo="one")
    assert precious.exists()


def test_failure_shows_last_lines_and_stops(tmp_path: Path) -> None:
    bad = make_stage(tmp_path, "bad", "print('before'); raise SystemExit('it broke because of X')")
    with pytest.raises(StageFailed, match="it broke because of X") as caught:
        run(tmp_path, bad, make_stage(tmp_path, "after"))
    assert str(tmp_path / "logs" / "bad.log") in str(caught.value)
    assert "exit code 1" in str(caught.value)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "after.out").exists()
    assert state(tmp_path)["stages"]["bad"]["status"] == "failed"
    mended = Stage(bad.name, bad.why, (bad.command[0], *bad.command[1:]), bad.shown, bad.outputs, lambda: True, 1.0)
    with pytest.raises(StageFailed):  # a failed stage is not taken for done, whatever lies there
        run(tmp_path, mended)


def test_exit_code_zero_without_a_result_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="without its result"):
        run(tmp_path, make_stage(tmp_path, "idle", "pass"))


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    run(tmp_path, make_stage(tmp_path, "one"))
    other = make_stage(tmp_path, "one", WRITE + " ")
    with pytest.raises(UsageError, match="--redo one"):
        run(tmp_path, other)
    assert run(tmp_path, other, redo="one") == [("one", "done")]


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(UsageError, match="at work"), only_one(tmp_path):
        pass


DRIVER = """
import sys
from pathlib import Path
from vla import cli
from train.stages import Chain, Stage
from train.stage_display import make_display
folder, code = Path(sys.argv[1]), sys.argv[2]
def stage(name, code):
    output = folder / (name + ".out")
    return Stage(name, "why", (sys.executable, "-c", code, str(output)), name, (output,), output.is_file, 1.0)
stages = [stage("quick", sys.argv[3]), stage("slow", code)]
sys.exit(cli.run(lambda: Chain(stages, folder, {}, make_display(stages, sys.stderr)).run() and None))
"""
# Sleeps in the first attempt (its pids in a file), with a child process of its own; finishes at once in the second.
SLOW = """
import os, sys, subprocess, time, pathlib
out = pathlib.Path(sys.argv[1]); begun = out.with_suffix('.pids')
if begun.exists(): out.write_text('resumed'); sys.exit()
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
begun.with_suffix('.tmp').write_text(f'{os.getpid()} {child.pid}'); begun.with_suffix('.tmp').rename(begun)
time.sleep(60)
"""


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_stopped_at_any_moment_it_continues(tmp_path: Path, sign: signal.Signals, code: int) -> None:
    command = [sys.executable, "-c", DRIVER, str(tmp_path), SLOW, WRITE]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    pids = wait_for(tmp_path / "slow.pids").split()
    first.send_signal(sign)
    errors = first.communicate(timeout=30)[1]
    assert first.returncode == code, errors
    wait_gone(int(pids[0]))
    if sign != signal.SIGKILL:  # then nobody is left to look after the stage's own children
        wait_gone(int(pids[1]))
        assert "run the same command again" in errors
        assert state(tmp_path)["stages"]["slow"]["status"] == "interrupted"
    else:
        os.kill(int(pids[1]), signal.SIGKILL)  # it holds the folder's lock
        wait_gone(int(pids[1]))
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 0, again.stderr
    assert "quick: done before" in again.stderr
    assert (tmp_path / "slow.out").read_text() == "resumed"


def wait_for(path: Path) -> str:
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.05)
    return path.read_text()


def wait_gone(pid: int) -> None:
    until = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]:
        assert time.monotonic() < until, f"process {pid} still runs"
        time.sleep(0.05)


def test_time_and_memory_are_of_the_stage(tmp_path: Path) -> None:
    code = "import time; x = bytearray(300 << 20); x[::4096] = b'x' * len(x[::4096])\nfor _ in range(20_000_000): pass"
    process = Process((sys.executable, "-c", code), tmp_path / "log")
    assert process.wait(lambda _: None) == 0
    usage = process.stop()
    assert 300 < usage.peak_mb < 420
    assert 0.05 < usage.cpu_s <= usage.wall_s * 2
    light = Process((sys.executable, "-c", "pass"), tmp_path / "log")
    light.wait(lambda _: None)
    assert light.stop().peak_mb < 250  # not the peak of an earlier child


def test_memory_adds_up_over_processes(tmp_path: Path) -> None:
    """Two processes of 150 MB at one moment are 300 MB: getrusage alone knows only the larger one."""
    hold = "x = bytearray(150 << 20); x[::4096] = b'x' * len(x[::4096]); import time; time.sleep(2)"
    code = f"import subprocess, sys\nps = [subprocess.Popen([sys.executable, '-c', {hold!r}]) for _ in '12']\n"
    process = Process((sys.executable, "-c", code + "[p.wait() for p in ps]"), tmp_path / "log")
    process.wait(lambda _: None)
    assert 300 < process.stop().peak_mb < 420


def test_group_memory_of_nobody_is_zero() -> None:
    assert group_memory_mb(2**22 + 1) == 0


def test_tail_shows_the_newest_of_a_progress_bar(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"$ the command\n" + b"x" * 20000 + b"\none\n10%\r20%\r30%\n\n\xff\n")
    assert tail(log, 2) == "30%\n\N{REPLACEMENT CHARACTER}"
    assert tail(tmp_path / "absent", 2) == ""
    log.write_text("$ the command\n")
    assert tail(log, 2) == ""


def test_plain_lines_say_what_and_why(tmp_path: Path) -> None:
    stages = [make_stage(tmp_path, "one"), make_stage(tmp_path, "two")]
    stream = StringIO()
    Chain(stages, tmp_path, {}, Lines(stages, stream)).run()
    assert "[1/2] one: it makes one\n      $ make one\n" in stream.getvalue()
    assert "two done in 0:0" in stream.getvalue()


def test_panel_shows_every_stage_and_the_newest_line(tmp_path: Path) -> None:
    stages = [make_stage(tmp_path, "one"), make_stage(tmp_path, "two", WRITE + "; import time; time.sleep(0.6)")]
    stream = StringIO()
    Chain(stages, tmp_path, {}, Panel(stages, stream)).run()
    text = stream.getvalue()
    assert "✓ one" in text
    assert "✓ two" in text
    log = tmp_path / "log"
    log.write_text("newest line\n")
    panel = Panel(stages, stream)
    panel.begin(stages[0], 1, log)
    panel.tick(75.0)
    panel.end(stages[0], "failed", Usage(75.0, 98.0, 2048.0))
    assert "✗ one" in stream.getvalue()


def test_describe() -> None:
    assert describe("done", Usage(75.2, 98.4, 1228.8)) == "done in 1:15 (CPU 98 s, peak 1.2 GB)"
    assert describe("interrupted", Usage(3.0, 1.0, 90.0)) == "interrupted after 0:03 (CPU 1 s, peak 90 MB)"
