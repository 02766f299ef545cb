"""The folder of an evaluation: written as episodes end, read by reports and comparisons.

    config.yaml      the complete configuration
    results.jsonl    one `vla.types.Result` a line, appended as episodes end
    episodes/        <task>-<seed>.json: what was sent to the robot at each step, verdicts, overruns
    videos/          films
    summary.json     counts, intervals, latency, versions

An episode with an error has no verdict: it is in no rate, and it is tried again when the same
command is run again, after which its last line counts.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from robot.runtime import Episode
from robot.statistics import wilson
from vla import files
from vla.errors import TandemError
from vla.types import Result

VERSION = 1
RESULTS, SUMMARY, CONFIG, EPISODES, VIDEOS = "results.jsonl", "summary.json", "config.yaml", "episodes", "videos"
Key = tuple[str, str, int]  # suite, task, seed: what makes two episodes a pair


def key(result: Result) -> Key:
    return result.suite, result.task, result.seed


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other evaluations out of `folder` until the block ends, or this process does.

    Raises:
        TandemError: another process is in there.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TandemError(
                f"Another evaluation is writing to {folder}. Wait for it, or choose another output folder."
            ) from error
        yield
    finally:
        os.close(handle)


def append(folder: Path, result: Result) -> None:
    files.append_json_line(folder / RESULTS, result.to_json())


def read(folder: Path) -> list[Result]:
    """The episodes of an evaluation, the last line of each (suite, task, seed), in the order of the file.

    Raises:
        TandemError: no results there, or written by another version.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise TandemError(f"{folder} holds no {RESULTS}: it is not the output folder of an evaluation.")
    rows = [from_json(data, path) for data in files.read_json_lines(path)]
    return list({key(row): row for row in rows}.values())


def from_json(data: Mapping[str, Any], where: Path | str) -> Result:
    """One line of `results.jsonl`; `where` is named in errors."""
    if data.get("version") != VERSION:
        raise TandemError(f"{where} has results of version {data.get('version')!r}; this release reads {VERSION}.")
    known = {f.name for f in fields(Result)}
    values = {k: v for k, v in data.items() if k != "version"}
    if values.keys() != known:
        raise TandemError(
            f"{where}: a result has unknown keys {sorted(values.keys() - known)} and lacks "
            f"{sorted(known - values.keys())}. It was written by another release, or edited."
        )
    return Result(**{**values, "latency_ms": tuple(values["latency_ms"])})


def rewrite(folder: Path, rows: Sequence[Result]) -> None:
    """Replace `results.jsonl` by `rows`, whole or not at all."""
    files.write_text(folder / RESULTS, "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows))


def episode_path(folder: Path, task: str, seed: int) -> Path:
    return folder / EPISODES / f"{task}-{seed}.json"


def write_episode(folder: Path, task: str, seed: int, episode: Episode) -> None:
    """Everything needed to repeat the episode without its policy, and how safety and time judged it."""
    sent = [None if command is None else command.tolist() for command in episode.commands]
    files.write_json(
        episode_path(folder, task, seed),
        {
            "version": VERSION,
            "task": task,
            "seed": seed,
            "instruction": episode.instruction,
            "success": episode.success,
            "first_success_step": episode.first_success_step,
            "overruns": episode.overruns,
            "verdicts": dict(episode.verdicts),
            "error": episode.error,
            "traceback": episode.traceback,
            "commands": sent,  # one entry a control step; null: the arm held
        },
    )


def read_episode(folder: Path, task: str, seed: int) -> dict[str, Any] | None:
    """What `write_episode` wrote, or None: a process that died wrote none."""
    path = episode_path(folder, task, seed)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def rate(rows: Sequence[Result]) -> dict[str, Any]:
    """Counts, success rate and its 95 % Wilson interval, over the episodes without an error."""
    judged = [row for row in rows if row.error is None]
    successes = sum(row.success for row in judged)
    interval = wilson(successes, len(judged))
    return {
        "successes": successes,
        "episodes": len(judged),
        "rate": successes / len(judged) if judged else None,
        "low": interval.low,
        "high": interval.high,
    }


def latency(rows: Sequence[Result]) -> dict[str, float | None]:
    """Percentiles of the wall time of policy calls, ms. The first call of each episode is in it."""
    values = np.array([ms for row in rows for ms in row.latency_ms])
    if not len(values):
        return {"p50": None, "p95": None, "max": None}
    p50, p95 = np.percentile(values, [50, 95])
    return {"p50": float(p50), "p95": float(p95), "max": float(values.max())}


def summarise(folder: Path, rows: Sequence[Result], clock: str, wall_s: float) -> dict[str, Any]:
    """What `summary.json` holds; `rows` in the order in which their tasks shall appear."""
    control = {"clock": clock, "steps": sum(row.steps for row in rows), "held": 0, "overruns": 0}
    verdicts: Counter[str] = Counter()
    for row in rows:
        episode = read_episode(folder, row.task, row.seed)
        if episode:
            control["held"] += sum(command is None for command in episode["commands"])
            control["overruns"] += episode["overruns"]
            verdicts.update(episode["verdicts"])
    moments = dict.fromkeys(when for row in rows if (when := row.task.rpartition("@")[2]) != row.task)
    switches = {when: rate([r for r in rows if r.task.endswith(f"@{when}")]) for when in moments}
    return {
        "version": VERSION,
        "suite": rows[0].suite,
        "policy": rows[0].policy,
        "config_digest": rows[0].config_digest,
        "interval": "Wilson 95 %",
        "overall": rate(rows),
        "tasks": {task: rate([r for r in rows if r.task == task]) for task in dict.fromkeys(r.task for r in rows)},
        "latency_ms": latency(rows),
        "errors": sum(row.error is not None for row in rows),
        "control": control,  # steps and ticks of all episodes
        "verdicts": dict(sorted(verdicts.items())),  # "pass" or "<decision>:<rule>" -> how often
        "wall_s": wall_s,  # of the run that finished it
        "episodes_wall_s": sum(row.wall_s for row in rows),
        "versions": dict(rows[0].versions),
    } | ({"switches": switches} if switches else {})  # when a robot was told another task: over all pairs of tasks


@dataclass(frozen=True)
class Pairs:
    """Two policies on the same episodes."""

    keys: tuple[Key, ...]  # (N,)
    before: np.ndarray  # (N,) bool, success
    after: np.ndarray  # (N,) bool, success
    unpaired: int  # episodes of either side that have no partner, or whose pair has an error


def pair(before: Sequence[Result], after: Sequence[Result]) -> Pairs:
    """Match episodes by (suite, task, seed); a pair with an error on either side is left out."""
    first = {key(row): row for row in before}
    second = {key(row): row for row in after}
    keys = tuple(k for k in first if k in second and first[k].error is None and second[k].error is None)
    return Pairs(
        keys=keys,
        before=np.array([first[k].success for k in keys], bool),
        after=np.array([second[k].success for k in keys], bool),
        unpaired=len(first.keys() | second.keys()) - len(keys),
    )
