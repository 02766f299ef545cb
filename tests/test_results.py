import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from robot import results
from robot.runtime import Episode
from robot.statistics import wilson
from vla.errors import TandemError
from vla.types import Result

BASE = Result(
    suite="point_arm",
    task="reach-red",
    instruction="go to the red square",
    seed=0,
    success=True,
    steps=9,
    first_success_step=9,
    chunks=3,
    latency_ms=(1.0, 2.0, 3.0),
    wall_s=0.5,
    policy="expert",
    config_digest="abc",
    versions={"numpy": "2"},
)
EPISODE = Episode(
    instruction="go",
    success=False,
    steps=3,
    first_success_step=None,
    commands=(np.array([0.1, -1], np.float32), None, np.array([1, 0], np.float32)),
    latency_ms=(1.0,),
    overruns=1,
    verdicts={"pass": 1, "clamp:limits": 1},
    wall_s=0.1,
)


def row(seed: int, success: bool, task: str = "reach-red", error: str | None = None) -> Result:  # noqa: FBT001
    return dataclasses.replace(BASE, seed=seed, success=success, task=task, error=error)


def test_rows_come_back_as_they_went(tmp_path: Path) -> None:
    rows = [BASE, row(1, success=False, error="policy: grün")]
    for result in rows:
        results.append(tmp_path, result)
    assert results.read(tmp_path) == rows
    results.rewrite(tmp_path, rows[::-1])
    assert results.read(tmp_path) == rows[::-1]


def test_the_last_line_of_an_episode_counts(tmp_path: Path) -> None:
    for result in (row(0, success=False, error="process: was killed"), row(1, success=True), row(0, success=True)):
        results.append(tmp_path, result)
    assert [(r.seed, r.success, r.error) for r in results.read(tmp_path)] == [(0, True, None), (1, True, None)]


def test_an_unfinished_line_is_ignored(tmp_path: Path) -> None:
    results.append(tmp_path, BASE)
    with (tmp_path / results.RESULTS).open("a") as f:
        f.write('{"version": 1, "suite"')
    assert results.read(tmp_path) == [BASE]


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TandemError, match="not the output folder"):
        results.read(tmp_path)
    path = tmp_path / results.RESULTS
    path.write_text(json.dumps(BASE.to_json() | {"version": 2}) + "\n")
    with pytest.raises(TandemError, match="version 2"):
        results.read(tmp_path)
    path.write_text(json.dumps(BASE.to_json() | {"mood": "good"}) + "\n")
    with pytest.raises(TandemError, match="mood"):
        results.read(tmp_path)
    path.write_text("{]\n")
    with pytest.raises(TandemError, match="line 1, is not JSON"):
        results.read(tmp_path)


def test_rates_leave_errors_out() -> None:
    rows = [row(i, success=i < 3) for i in range(5)] + [row(5, success=False, error="robot: broke")]
    expected = wilson(3, 5)
    assert results.rate(rows) == {
        "successes": 3,
        "episodes": 5,
        "rate": 0.6,
        "low": expected.low,
        "high": expected.high,
    }
    assert results.rate([]) == {"successes": 0, "episodes": 0, "rate": None, "low": 0.0, "high": 1.0}


def test_a_summary_counts_by_task_and_adds_up_control(tmp_path: Path) -> None:
    rows = [row(0, success=True), row(1, success=False), row(0, success=True, task="reach-blue")]
    results.write_episode(tmp_path, "reach-red", 0, EPISODE)
    results.write_episode(tmp_path, "reach-red", 1, EPISODE)
    summary = results.summarise(tmp_path, rows, "realtime", 12.0)
    assert {k: (v["successes"], v["episodes"]) for k, v in summary["tasks"].items()} == {
        "reach-red": (1, 2),
        "reach-blue": (1, 1),
    }
    assert (summary["overall"]["successes"], summary["overall"]["episodes"], summary["errors"]) == (2, 3, 0)
    assert summary["control"] == {"clock": "realtime", "steps": 27, "held": 2, "overruns": 2}
    assert summary["verdicts"] == {"clamp:limits": 2, "pass": 2}
    assert summary["latency_ms"] == {"p50": 2.0, "p95": pytest.approx(3.0), "max": 3.0}
    json.dumps(summary, allow_nan=False)


def test_an_episode_file_holds_exactly_what_was_sent(tmp_path: Path) -> None:
    results.write_episode(tmp_path, "reach-red", 7, EPISODE)
    data = results.read_episode(tmp_path, "reach-red", 7)
    assert data is not None
    first, held, last = data["commands"]
    assert held is None
    for read, sent in ((first, EPISODE.commands[0]), (last, EPISODE.commands[2])):
        assert sent is not None
        assert np.array_equal(np.array(read, np.float32), sent)
    assert results.read_episode(tmp_path, "reach-red", 8) is None


def test_pairs_are_matched_by_suite_task_and_seed() -> None:
    before = [row(0, success=True), row(1, success=False), row(2, success=True), row(3, success=True, error="x")]
    after = [
        row(3, success=True),
        row(1, success=True),
        row(0, success=False),
        row(2, success=True, task="reach-blue"),
        dataclasses.replace(row(2, success=True), suite="metaworld"),
    ]
    pairs = results.pair(before, after)
    assert [key[1:] for key in pairs.keys] == [("reach-red", 0), ("reach-red", 1)]
    assert pairs.before.tolist() == [True, False]
    assert pairs.after.tolist() == [False, True]
    assert pairs.unpaired == 4


def test_two_evaluations_do_not_share_a_folder(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from robot import results\nwith results.alone_in(Path({str(tmp_path)!r})): pass"
    with results.alone_in(tmp_path):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Another evaluation is writing" in done.stderr
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
