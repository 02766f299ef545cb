"""Record demonstrations of a simulated robot's scripted experts as a LeRobot v3 data set.

    vla-record configs/record_metaworld.yaml
    vla-record configs/record_metaworld.yaml episodes_per_task=5 output=data/try

The output folder appears when it is complete: the data set, `recipe.yaml` that describes it for
training, and `tandem_record.json` with seeds and outcomes. Until then episodes are kept in
`.NAME.recording` beside it; interrupted at any moment, the same command continues.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from robot import versions
from robot.dataset_writer import ACTION_KEY, STATE_KEY, EpisodeWriter, Layout, Mode, camera_key, require_lerobot
from robot.demonstrate import Attempt, Crew, Settings
from robot.journal import Journal, differences
from robot.progress import Counter
from robot.registry import ROBOTS, SceneConfig, make_robot
from vla import config as configs
from vla.cli import config_main, require
from vla.errors import TandemError
from vla.files import whole_folder, write_json, write_text

RECORD = "tandem_record.json"
MOST_TRIES = 4  # attempts per episode wanted; an expert that fails more often is not one


@dataclass(frozen=True)
class RecordConfig:
    robot: SceneConfig
    episodes_per_task: int
    first_seed: int  # seeds count up from here; every second attempt is noisy
    noise: float  # standard deviation of the pushes, in units of the action
    steps_after_success: int  # control steps an episode goes on after the task is solved
    failures: Literal["leave_out", "keep"]  # kept ones count as episodes
    mode: Mode
    output: Path  # becomes the data set's folder
    workers: int  # processes

    def __post_init__(self) -> None:
        require(self.episodes_per_task > 0, f"episodes_per_task must be at least 1, got {self.episodes_per_task}.")
        require(self.first_seed >= 0, f"first_seed must not be negative, got {self.first_seed}.")
        require(
            self.steps_after_success >= 0, f"steps_after_success must be 0 or more, got {self.steps_after_success}."
        )
        require(self.workers > 0, f"workers must be at least 1, got {self.workers}.")
        require(len(set(self.robot.tasks)) == len(self.robot.tasks), f"robot.tasks repeats itself: {self.robot.tasks}.")

    def content(self) -> dict[str, Any]:
        """What decides about the recorded numbers: neither where they go nor how many processes help."""
        data = configs.to_data(self)
        return {k: v for k, v in data.items() if k not in ("output", "workers")}


def record(config: RecordConfig) -> None:
    """Record all episodes and write the data set, or continue where an earlier run was stopped.

    Raises:
        TandemError: the output cannot be written, or holds something else.
    """
    journal = Journal(config.output.with_name(f".{config.output.name}.recording"))
    if _complete(config):
        journal.remove()
        print(f"{config.output} is complete already; remove it to record it anew.")
        return
    require_lerobot()
    try:
        with journal.recording(config.content()):
            facts = _collect(config, journal)
            _write(config, journal, facts)
    except OSError as error:
        raise TandemError(
            f"Recording into {config.output} failed: {error}. What is recorded is kept in {journal.folder}: "
            "make room or mend the cause, and run the same command again."
        ) from error
    journal.remove()
    kept = [f for f in facts if _kept(config, f)]
    failed = sum(not f["success"] for f in facts)
    fate = "kept" if config.failures == "keep" else "left out"
    frames = sum(f["frames"] for f in kept)
    print(f"{len(kept)} episodes, {frames} frames in {config.output}; {failed} failed, {fate}.")
    print(f"To look at it: vla-data inspect {config.output / 'recipe.yaml'}")


def _complete(config: RecordConfig) -> bool:
    """Whether the output is this recording already; raises if it is anything else."""
    root = config.output
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if not (root / RECORD).is_file():
        raise TandemError(f"{root} exists and is not a recording. Choose another output folder, or remove it.")
    begun = json.loads((root / RECORD).read_text(encoding="utf-8"))["config"]
    if different := differences(begun, config.content()):
        raise TandemError(
            f"{root} was recorded with another configuration: {different}. Choose another output folder, or remove it."
        )
    return True


def _kept(config: RecordConfig, facts: dict[str, Any]) -> bool:
    return facts["success"] or config.failures == "keep"


def _collect(config: RecordConfig, journal: Journal) -> list[dict[str, Any]]:
    """Make attempts until every task has its episodes; returns the facts of all, by task and seed.

    Goes in rounds: each makes as many attempts as episodes are missing, with the next seeds. What is
    attempted therefore depends neither on the number of processes nor on interruptions.
    """
    facts: dict[str, list[dict[str, Any]]] = {task: [] for task in config.robot.tasks}
    settings = Settings(config.robot, config.noise, config.steps_after_success, config.failures, journal.folder)
    with Crew(settings, config.workers) as crew, Counter("recording", len(facts) * config.episodes_per_task) as counter:
        while planned := _next_round(config, facts):
            known = {a: journal.facts(a.name) for a in planned}
            done = [f for f in known.values() if f is not None]
            before = [f for made in facts.values() for f in made]
            for fresh in crew.attempt([a for a, f in known.items() if f is None]):
                done.append(fresh)
                counter.to(*_count(config, before + done))
            for made in sorted(done, key=lambda f: f["seed"]):
                facts[made["task"]].append(made)
        everything = [f for made in facts.values() for f in made]
        counter.to(*_count(config, everything))
    return everything


def _next_round(config: RecordConfig, facts: dict[str, list[dict[str, Any]]]) -> list[Attempt]:
    planned = []
    for task, made in facts.items():
        missing = config.episodes_per_task - sum(_kept(config, f) for f in made)
        if missing and len(made) >= MOST_TRIES * config.episodes_per_task:
            raise TandemError(
                f"The expert of {task} failed in {sum(not f['success'] for f in made)} of {len(made)} attempts. "
                "Give it more time (robot.step_limit) or less noise (noise), or record its failures (failures=keep)."
            )
        first = config.first_seed + len(made)
        planned += [Attempt(task, seed) for seed in range(first, first + missing)]
    return planned


def _count(config: RecordConfig, facts: list[dict[str, Any]]) -> tuple[int, str]:
    failed = sum(not f["success"] for f in facts)
    return sum(_kept(config, f) for f in facts), f"{failed} failed" if failed else ""


def _write(config: RecordConfig, journal: Journal, facts: list[dict[str, Any]]) -> None:
    kept = [f for f in facts if _kept(config, f)]
    robot = make_robot(config.robot)
    size = (config.robot.image_size, config.robot.image_size)
    layout = Layout(
        robot_type=config.robot.kind,
        cameras=dict.fromkeys(robot.cameras, size),
        state=robot.state_spec,
        action=robot.action_spec,
        mode=config.mode,
    )
    robot.close()
    with whole_folder(config.output) as folder, Counter("writing", len(kept)) as counter:
        folder.rmdir()  # LeRobot insists on making it
        writer = EpisodeWriter(folder, layout)
        for done, f in enumerate(kept, start=1):
            writer.add(journal.episode(Attempt(f["task"], f["seed"]).name))
            counter.to(done)
        writer.close()
        write_json(folder / RECORD, _account(config, facts))
        write_text(folder / "recipe.yaml", configs.dump(_recipe(config, layout, len(kept))))


def _account(config: RecordConfig, facts: list[dict[str, Any]]) -> dict[str, Any]:
    kept = [f for f in facts if _kept(config, f)]
    return {
        "version": 1,
        "config": config.content(),
        "config_digest": configs.digest(config.content()),
        "episodes": [{"episode_index": i} | f for i, f in enumerate(kept)],
        "left_out": [f for f in facts if not _kept(config, f)],
        "tasks": {
            task: {
                "attempts": sum(f["task"] == task for f in facts),
                "failed": sum(f["task"] == task and not f["success"] for f in facts),
            }
            for task in config.robot.tasks
        },
        "versions": versions.collect(),
    }


def _recipe(config: RecordConfig, layout: Layout, episodes: int) -> dict[str, Any]:
    """A recipe as `vla-data` and `vla-train` read it. Its schema belongs to training, a test compares."""
    return {
        "name": config.output.name,
        "repo_id": None,
        "root": str(config.output.resolve()),
        "revision": None,
        "licence": ROBOTS[config.robot.kind].licence,
        "cameras": {name: camera_key(name) for name in layout.cameras},
        "state": {"key": STATE_KEY, "spec": layout.state.to_json()},
        "action": {"key": ACTION_KEY, "spec": layout.action.to_json()},
        "language": {"source": "task", "text": None},
        "split": {"validation_fraction": 0.05 if episodes >= 40 else 0.0, "seed": 0, "exclude": []},
    }


def main(argv: Sequence[str] | None = None) -> int:
    return config_main(RecordConfig, record, __doc__, argv)
