"""vla-record: what it writes, and that no interruption can break it."""

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from robot.record import RECORD, RecordConfig, main
from robot.registry import make_robot
from train import recipe
from vla import config as configs
from vla.types import require_same

ROOT = Path(__file__).parents[1]
POINT: dict[str, Any] = {
    "robot": {"kind": "point_arm", "tasks": ["reach-red", "reach-blue"], "image_size": 32, "step_limit": 40},
    "episodes_per_task": 3,
    "first_seed": 100,
    "noise": 0.25,
    "steps_after_success": 1,
    "failures": "leave_out",
    "mode": "image",
    "workers": 1,
}
METAWORLD: dict[str, Any] = POINT | {
    "robot": {
        "kind": "metaworld",
        "tasks": ["faucet-open-v3"],
        "image_size": 64,
        "film_size": 64,
        "step_limit": 60,
    },
    "episodes_per_task": 2,
}

Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs the command in this process; keys of the configuration as keyword arguments."""

    def run(base: dict[str, Any] = POINT, **changes: Any) -> int:
        return main([str(save(tmp_path, base, **changes))])

    return run


def save(folder: Path, base: dict[str, Any], **changes: Any) -> Path:
    path = folder / "record.yaml"
    path.write_text(configs.dump({"output": str(folder / "data")} | base | changes), encoding="utf-8")
    return path


def account(root: Path) -> dict[str, Any]:
    return json.loads((root / RECORD).read_text(encoding="utf-8"))


def contents(root: Path) -> dict[str, Any]:
    """Tables as their rows, every other file as its bytes; the recipe not at all, it names the folder.

    A Parquet file's bytes differ each time: Hugging Face notes a random fingerprint in it.
    """
    files = [p for p in root.rglob("*") if p.is_file() and p.name != "recipe.yaml"]
    return {
        str(p.relative_to(root)): pq.read_table(p).to_pylist() if p.suffix == ".parquet" else p.read_bytes()
        for p in files
    }


@pytest.mark.sim
@pytest.mark.parametrize("mode", ["video", "image"])
def test_recorded_episodes_are_what_happened(mode: str, tmp_path: Path, run: Run) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    assert run(METAWORLD, mode=mode) == 0
    root = tmp_path / "data"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "record.yaml"], "nothing else is left behind"
    data = LeRobotDataset("local/data", root=root, video_backend="pyav")
    noted = account(root)
    assert [(e["seed"], e["success"], e["noise"]) for e in noted["episodes"]] == [(100, True, 0.0), (101, True, 0.25)]
    assert data.num_episodes == 2
    assert data.num_frames == sum(e["frames"] for e in noted["episodes"])
    assert data.fps == 40

    written = recipe.load(root / "recipe.yaml")
    config = configs.load(RecordConfig, tmp_path / "record.yaml")
    robot = make_robot(config.robot)
    try:
        require_same(written.state.spec, robot.state_spec, "state of recipe and robot")
        require_same(written.action.spec, robot.action_spec, "action of recipe and robot")
        assert written.root == root
        assert tuple(written.cameras) == robot.cameras
        # The clean episode once more, with the labels as commands.
        first: Any = data[0]
        assert robot.reset("faucet-open-v3", 100) == first["task"]
        for i in range(noted["episodes"][0]["frames"]):
            item: Any = data[i]
            seen = robot.observe()
            assert item[written.state.key].numpy().tolist() == seen.state.tolist()
            picture = item[written.cameras["front"]].numpy().transpose(1, 2, 0) * 255
            assert np.abs(picture - seen.images["front"]).mean() < (6 if mode == "video" else 0.01)
            robot.command(item[written.action.key].numpy())
        assert robot.success()
    finally:
        robot.close()


def test_a_complete_recording_is_left_alone(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    before = contents(tmp_path / "data")
    assert run(workers=2) == 0
    assert "complete already" in capsys.readouterr().out
    assert contents(tmp_path / "data") == before
    assert run(noise=0.1) == 1
    assert "noise (0.25 then, 0.1 now)" in capsys.readouterr().err
    assert contents(tmp_path / "data") == before


def test_the_number_of_processes_changes_nothing(tmp_path: Path, run: Run) -> None:
    assert run(output=str(tmp_path / "one")) == 0
    assert run(output=str(tmp_path / "two"), workers=2) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def start(config: Path) -> subprocess.Popen[str]:
    code = "import sys; from robot.record import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen([sys.executable, "-c", code, str(config)], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def stop_when(process: subprocess.Popen[str], ready: Callable[[], bool], how: signal.Signals) -> int:
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(how)
    assert process.stderr is not None
    process.stderr.read()
    process.stderr.close()
    return process.wait(30)


MANY = POINT | {"episodes_per_task": 25, "mode": "video"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `MANY` gives when nothing disturbs it."""
    folder = tmp_path_factory.mktemp("whole")
    assert main([str(save(folder, MANY))]) == 0
    return contents(folder / "data")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_stopped_recording_goes_on(
    how: signal.Signals, workers: int, tmp_path: Path, run: Run, whole: dict[str, Any]
) -> None:
    journal = tmp_path / ".data.recording"
    at = int(np.random.default_rng().integers(1, 30))

    def ready() -> bool:
        return len(list(journal.rglob("*.npz"))) >= at

    code = stop_when(start(save(tmp_path, MANY, workers=workers)), ready, how)
    assert code == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert not (tmp_path / "data").exists(), "there is no data set until it is whole"
    made = {p: p.stat().st_mtime_ns for p in journal.rglob("*.npz")}
    assert at <= len(made) <= 50, at
    time.sleep(0.2)
    assert {p: p.stat().st_mtime_ns for p in journal.rglob("*.npz")} == made, "no process lives on"
    assert run(MANY, workers=workers) == 0
    assert contents(tmp_path / "data") == whole


@pytest.mark.slow
def test_a_recording_killed_while_writing_goes_on(tmp_path: Path, run: Run, whole: dict[str, Any]) -> None:
    def writing() -> bool:
        return any(tmp_path.glob(".data.partial-*/meta/info.json"))

    assert stop_when(start(save(tmp_path, MANY)), writing, signal.SIGKILL) == -signal.SIGKILL
    assert not (tmp_path / "data").exists()
    assert run(MANY) == 0
    assert contents(tmp_path / "data") == whole
    assert not list(tmp_path.glob(".*")), "remains of the killed run are gone"


def test_failed_episodes_are_counted_and_left_out(tmp_path: Path, run: Run) -> None:
    short = POINT["robot"] | {"step_limit": 12}
    assert run(robot=short, episodes_per_task=6) == 0
    noted = account(tmp_path / "data")
    assert len(noted["episodes"]) == 12
    assert all(e["success"] for e in noted["episodes"])
    assert noted["left_out"], "this limit is too short for some seeds"
    assert not any(e["success"] for e in noted["left_out"])
    assert sum(t["failed"] for t in noted["tasks"].values()) == len(noted["left_out"])
    assert sum(t["attempts"] for t in noted["tasks"].values()) == 12 + len(noted["left_out"])
    for task in ("reach-red", "reach-blue"):
        seeds = sorted(e["seed"] for e in noted["episodes"] + noted["left_out"] if e["task"] == task)
        assert seeds == list(range(100, 100 + len(seeds))), "seeds are used in order, none twice"


def test_failed_episodes_can_be_kept(tmp_path: Path, run: Run) -> None:
    short = POINT["robot"] | {"step_limit": 12}
    assert run(robot=short, episodes_per_task=6, failures="keep") == 0
    noted = account(tmp_path / "data")
    assert len(noted["episodes"]) == 12
    assert not noted["left_out"]
    failed = [e for e in noted["episodes"] if not e["success"]]
    assert failed
    assert all(e["frames"] == 12 for e in failed)


def test_an_expert_that_always_fails_ends_it(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(robot=POINT["robot"] | {"step_limit": 1}) == 1
    message = capsys.readouterr().err
    assert "failed in 12 of 12 attempts" in message
    assert "step_limit" in message
    assert not (tmp_path / "data").exists()


def test_a_foreign_folder_is_never_replaced(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("precious", encoding="utf-8")
    assert run() == 1
    assert "is not a recording" in capsys.readouterr().err
    assert (tmp_path / "data" / "thesis.txt").read_text(encoding="utf-8") == "precious"


def test_an_output_that_cannot_be_written_is_refused_first(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert run(output="/proc/tandem/data", episodes_per_task=10_000) == 1
    assert time.monotonic() - began < 5
    assert "Cannot write to /proc/tandem/.data.recording" in capsys.readouterr().err


def test_a_full_disk_ends_in_one_message(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, before[1]))  # an episode does not fit into one file
    try:
        assert run() == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = capsys.readouterr().err
    assert "File too large" in message
    assert "run the same command again" in message
    assert not (tmp_path / "data").exists()
    assert run() == 0
    assert len(account(tmp_path / "data")["episodes"]) == 6


def test_an_unfinished_recording_is_not_mixed_with_another(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(robot=POINT["robot"] | {"step_limit": 1}) == 1  # leaves its attempts
    assert run(first_seed=7) == 1
    message = capsys.readouterr().err
    assert "first_seed (100 then, 7 now)" in message
    assert "remove it" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes_per_task": 0}, "at least 1"),
        ({"noise": 7.0}, "0..1"),
        ({"failures": "hide"}, "leave_out"),
        ({"episodes": 3}, "episodes_per_task"),
        ({"robot": POINT["robot"] | {"kind": "point"}}, "point_arm"),
        ({"robot": POINT["robot"] | {"tasks": ["reach-green"]}}, "reach-red"),
        ({"robot": POINT["robot"] | {"tasks": ["reach-red", "reach-red"]}}, "repeats"),
    ],
)
def test_a_wrong_configuration_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(**changes) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_the_shipped_configuration_is_complete() -> None:
    config = configs.load(RecordConfig, ROOT / "configs" / "record_metaworld.yaml")
    assert len(config.robot.tasks) == 4
    assert config.episodes_per_task == 40
