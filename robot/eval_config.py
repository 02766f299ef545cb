"""What an evaluation is asked to do. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from robot.registry import RobotConfig
from robot.switching import SwitchingRun
from vla import config as configs
from vla.errors import UsageError, choose_from

Clock = Literal["lockstep", "realtime"]
WITHOUT_EFFECT = ("output", "workers", "films", "timeout_s", "episodes")  # on the outcome of any one episode


@dataclass(frozen=True)
class PolicySource:
    path: str  # checkpoint folder, a training run's checkpoints/last, 'expert', 'zeros' or module:function
    device: str  # "cpu", "cuda", "cuda:1"
    settings: dict[str, Any]  # decode settings that replace a checkpoint's own, e.g. execute, head.noise_scale


@dataclass(frozen=True)
class Films:
    """How many of the first failures and successes, in the order of seeds, are filmed."""

    failures: int
    successes: int


@dataclass(frozen=True)
class EvalConfig:
    policy: PolicySource
    robot: RobotConfig
    episodes: int  # per task
    first_seed: int  # seeds first_seed .. first_seed + episodes - 1, the same for every task and policy
    instructions: dict[str, str]  # task -> what the policy is told instead of the task's own instruction
    clock: Clock  # lockstep: thinking costs no time; realtime: deadlines at the robot's rate
    workers: int  # processes; the results are the same for any number
    threads: int  # compute threads of each process; another number may change the last bits of a policy's sums
    timeout_s: float  # an episode that takes longer is ended and counted as an error
    films: Films
    output: Path
    switching: SwitchingRun | None = None  # how a policy with behaviour modes leaves a task; null: it does not

    def __post_init__(self) -> None:
        for name in ("episodes", "workers", "threads"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.first_seed < 0:
            raise UsageError(f"first_seed must not be negative, got {self.first_seed}.")
        if not self.timeout_s > 0:
            raise UsageError(f"timeout_s must be positive, got {self.timeout_s}.")
        if min(self.films.failures, self.films.successes) < 0:
            raise UsageError(f"films are counts, got {self.films}.")
        if self.clock == "realtime" and self.workers > 1:
            raise UsageError(
                f"clock 'realtime' measures latency, and {self.workers} workers would disturb one another. "
                "Set workers=1, or clock=lockstep."
            )
        for task in self.instructions:
            if task not in self.robot.tasks:
                raise UsageError(
                    f"instructions are given for {task!r}, which is not evaluated.{choose_from(task, self.robot.tasks)}"
                )

    def deciding(self) -> dict[str, Any]:
        """What may change the outcome of an episode: results are continued, and compared, by its digest."""
        data = configs.to_data(self)
        without = WITHOUT_EFFECT if self.switching else (*WITHOUT_EFFECT, "switching")  # older digests stay valid
        return {k: v for k, v in data.items() if k not in without}

    def digest(self) -> str:
        return configs.digest(self.deciding())


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """One line for each dotted key whose value differs."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        one, other = before.get(name), after.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            lines += differences(one, other, f"{prefix}{name}.")
        elif one != other:
            lines.append(f"  {prefix}{name}: {one!r} there, {other!r} here")
    return lines
