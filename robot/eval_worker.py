"""One evaluation process: makes its robot and its policy, then runs episodes and films them."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from robot import eval_pool, film, results, versions
from robot.clock import LockstepClock, MonotonicClock
from robot.eval_config import EvalConfig
from robot.policies import make_policy
from robot.registry import make_robot
from robot.robot import SimulatedRobot
from robot.runtime import Episode, connect, run_episode
from robot.switching import contact_of
from vla.errors import TandemError
from vla.switching_policy import SwitchingPolicy
from vla.types import Policy, Result

LINGER_S = 0.7  # how long a film shows its last frame


def work(pipe: Connection, config: EvalConfig, checkpoint: str) -> None:
    """Serve jobs until the pipe closes. `checkpoint` is the fingerprint that results are to carry.

    Every answer holds exactly one of `result`, `film`, `refused` (with the exit code: the evaluation cannot
    go on) and `failed` (this film only).
    """
    cv2.setNumThreads(1)
    worker = Worker(config, checkpoint)
    try:
        while job := eval_pool.receive(pipe):
            answer = worker.do(job)
            eval_pool.answer(pipe, answer)
            if answer.get("leaving"):
                break
    finally:
        worker.close()


class Worker:
    """Robot and policy are made when first needed: films need no policy."""

    def __init__(self, config: EvalConfig, checkpoint: str) -> None:
        self._config, self._checkpoint = config, checkpoint
        self._digest = config.digest()
        self._robot: SimulatedRobot | None = None
        self._policy: Policy | None = None
        self._versions: dict[str, str] = {}

    def do(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """`job` names what to `do` ("episode" or "film"), the task and the seed."""
        try:
            if job["do"] == "film":
                return self._film(job["task"], job["seed"])
            return self._episode(job["task"], job["seed"])
        except TandemError as error:
            return {"refused": str(error), "exit_code": error.exit_code, "leaving": True}

    def close(self) -> None:
        if self._robot is not None:
            self._robot.close()

    def _episode(self, task: str, seed: int) -> dict[str, Any]:
        config = self._config
        robot, policy = self._connected()
        clock = LockstepClock() if config.clock == "lockstep" else MonotonicClock()
        episode = run_episode(robot, policy, clock, task, seed, config.instructions.get(task))
        results.write_episode(config.output, task, seed, episode)
        if not self._versions:  # after the first picture, when somebody has drawn
            drawn_by = versions.gl_renderer()
            self._versions = (
                versions.collect()
                | ({"gl": drawn_by} if drawn_by else {})
                | ({"checkpoint": self._checkpoint} if self._checkpoint else {})
            )
        result = as_result(config, task, seed, episode, self._digest, self._versions)
        return {"result": result.to_json(), "leaving": episode.robot_failed}

    def _film(self, task: str, seed: int) -> dict[str, Any]:
        episode = results.read_episode(self._config.output, task, seed)
        if episode is None:
            return {"failed": "the episode's record is missing"}
        robot = self._robot = self._robot or make_robot(self._config.robot)
        outcome = "success" if episode["success"] else "failure"
        path = f"{results.VIDEOS}/{task}-{seed}-{outcome}.mp4"
        try:
            replay(robot, episode, self._config.output / path)
        except Exception as error:  # noqa: BLE001 (the edge: a film that fails costs nothing but the film)
            return {"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc(), "leaving": True}
        return {"film": path}

    def _connected(self) -> tuple[SimulatedRobot, Policy]:
        source = self._config.policy
        if self._robot is None:
            self._robot = make_robot(self._config.robot)
        if self._policy is None:
            policy = make_policy(source.path, source.device, source.settings, self._config.robot, self._robot)
            if (run := self._config.switching) is not None:
                policy = SwitchingPolicy(policy, run.rules, contact_of(run.contact, self._robot))
            connect(self._robot, policy)
            self._policy = policy
        return self._robot, self._policy


def as_result(
    config: EvalConfig, task: str, seed: int, episode: Episode, digest: str, with_versions: Mapping[str, str]
) -> Result:
    return Result(
        suite=config.robot.kind,
        task=task,
        instruction=episode.instruction,
        seed=seed,
        success=episode.success,
        steps=episode.steps,
        first_success_step=episode.first_success_step,
        chunks=len(episode.latency_ms),
        latency_ms=episode.latency_ms,
        wall_s=episode.wall_s,
        policy=config.policy.path,
        config_digest=digest,
        versions=dict(with_versions),
        video=None,
        error=episode.error,
    )


def replay(robot: SimulatedRobot, episode: Mapping[str, Any], path: Path) -> None:
    """Film an episode by sending its recorded commands again.

    A robot set up from the same seed repeats itself, so that this needs no policy and no guess, while the
    episode runs, at how it will end: only films that are wanted are rendered. It also shows a real-time
    episode as it was, which asking the policy again would not.
    """
    robot.reset(episode["task"], episode["seed"])

    def frames():
        yield robot.render()
        for command in episode["commands"]:
            if command is None:
                robot.hold()
            else:
                robot.command(np.asarray(command, np.float32))
            yield robot.render()

    rate_hz = robot.action_spec.rate_hz
    shown = film.captioned(
        frames(), episode["instruction"], episode["first_success_step"], linger=round(LINGER_S * rate_hz)
    )
    film.write(path, shown, rate_hz)
    if robot.success() != episode["success"]:
        path.unlink()
        raise TandemError(
            f"Repeating the commands of {episode['task']}, seed {episode['seed']}, ended otherwise than the episode: "
            "this simulator does not repeat itself."
        )
