"""Evaluation processes that are killed and interrupted, and the pool by itself."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from robot import results
from robot.eval_pool import Pool
from vla.errors import TandemError

ROOT = Path(__file__).parents[1]
CONFIG = {
    "policy": {"path": "hostile_policies:slow", "device": "cpu", "settings": {}},
    "robot": {"kind": "point_arm", "tasks": ["reach-red", "reach-blue"], "image_size": 64, "step_limit": 30},
    "episodes": 4,
    "first_seed": 50,
    "instructions": {},
    "clock": "lockstep",
    "workers": 1,
    "threads": 1,
    "timeout_s": 60,
    "films": {"failures": 0, "successes": 0},
}


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pool]:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "programs"))  # spawned workers inherit it
    obey = importlib.import_module("pool_worker").obey

    def make(workers: int = 2, timeout_s: float = 60.0) -> Pool:
        return Pool(obey, ("hello",), workers=workers, threads=3, timeout_s=timeout_s)

    return make


def test_every_job_is_answered_once_by_a_worker_with_its_threads(pool: Callable[..., Pool]) -> None:
    before = os.environ.get("OMP_NUM_THREADS")
    with pool() as p:
        done = list(p.run([{"do": "work", "n": n} for n in range(9)]))
    assert sorted(d.answer["n"] for d in done if d.answer) == list(range(9))
    assert {(d.answer["greeting"], d.answer["threads"]) for d in done if d.answer} == {("hello", "3")}
    assert len({d.answer["pid"] for d in done if d.answer}) <= 2
    assert os.environ.get("OMP_NUM_THREADS") == before


def test_death_lateness_and_leaving_cost_one_job_each(pool: Callable[..., Pool]) -> None:
    jobs = ["work", "die", "work", "sleep", "leave", "work"]
    with pool(workers=1, timeout_s=5.0) as p:
        done = list(p.run([{"do": what, "n": n} for n, what in enumerate(jobs)]))
    assert [d.died for d in done] == ["", "ended with exit code 3", "", "took longer than 5 s and was ended", "", ""]
    pids = [d.answer["pid"] for d in done if d.answer]
    assert len(set(pids)) == 4, "a new worker after each of the three that went"


def test_it_gives_up_when_nobody_survives(pool: Callable[..., Pool]) -> None:
    with pytest.raises(TandemError, match="5 evaluation processes failed one after the other"), pool(workers=1) as p:
        list(p.run([{"do": "die"}] * 9))


def test_leaving_by_an_error_ends_busy_workers_at_once(pool: Callable[..., Pool]) -> None:
    def stop_at_the_first_answer() -> None:
        with pool(workers=2) as p:
            next(p.run([{"do": "work"}, {"do": "sleep"}]))
            raise RuntimeError("stop")

    began = time.monotonic()
    with pytest.raises(RuntimeError, match="stop"):
        stop_at_the_first_answer()
    assert time.monotonic() - began < 30


def lines(folder: Path) -> list[dict[str, Any]]:
    """The rows of `results.jsonl` without what time decides."""
    rows = [json.loads(line) for line in (folder / results.RESULTS).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("latency_ms", "wall_s")} for row in rows]


def start(out: Path, *overrides: str) -> subprocess.Popen[str]:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(CONFIG | {"output": str(out)}))
    command = [sys.executable, "-m", "robot.evaluate", str(path), *overrides]
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'tests' / 'programs'}:{ROOT}"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def wait_for_lines(path: Path, count: int) -> None:
    until = time.monotonic() + 90
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < until, "no results were written"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    """No longer running; a zombie that nobody has waited for counts as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until_gone(pids: list[int]) -> None:
    until = time.monotonic() + 20
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < until, "an evaluation that ended leaves no processes"
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_and_run_again_it_ends_as_if_never_killed(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole")
    _, errors = whole.communicate(timeout=120)
    assert whole.returncode == 0, errors

    out = tmp_path / "out"
    killed = start(out)
    wait_for_lines(out / results.RESULTS, 2)
    workers = children(killed.pid)
    assert workers
    killed.kill()
    killed.communicate()
    finished = results.read(out)
    assert 2 <= len(finished) < 8
    with (out / results.RESULTS).open("a") as f:  # a write that the kill cut short
        f.write('{"version": 1, "suite": "poi')
    wait_until_gone(workers)

    again = start(out)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert f"{len(finished)} of 8 episodes are finished already" in errors
    assert lines(out) == lines(tmp_path / "whole")
    kept = {results.key(row): row.wall_s for row in results.read(out)}
    assert all(kept[results.key(row)] == row.wall_s for row in finished), "finished ones are not run again"


@pytest.mark.slow
def test_ctrl_c_ends_it_resumably_without_noise(tmp_path: Path) -> None:
    process = start(tmp_path / "out", "workers=2")
    wait_for_lines(tmp_path / "out" / results.RESULTS, 1)
    workers = children(process.pid)
    for pid in workers:  # a terminal interrupts the whole group; the parent decides what that means
        os.kill(pid, signal.SIGINT)
    time.sleep(0.3)  # one that did not block it would now be writing its traceback
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "run the same command again to resume" in errors
    assert "Traceback" not in errors
    wait_until_gone(workers)
    assert len(results.read(tmp_path / "out")) < 8
