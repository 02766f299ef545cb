"""vla-eval as its users run it, with good policies, broken ones and wrong input."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from robot import evaluate as evaluation
from robot import results
from vla import config as configs
from vla.types import Result

CONFIGS = Path(__file__).parents[1] / "configs"
POINT = {
    "policy": {"path": "expert", "device": "cpu", "settings": {}},
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
PROGRAMS = Path(__file__).parent / "programs"


@pytest.fixture
def point(tmp_path: Path) -> Path:
    path = tmp_path / "point.yaml"
    path.write_text(yaml.safe_dump(POINT | {"output": str(tmp_path / "out")}))
    return path


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PROGRAMS))


def lines(folder: Path) -> list[dict[str, Any]]:
    """The rows of `results.jsonl` without what time decides."""
    rows = [json.loads(line) for line in (folder / results.RESULTS).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("latency_ms", "wall_s")} for row in rows]


def by_seed(folder: Path) -> dict[tuple[str, int], Result]:
    return {(row.task, row.seed): row for row in results.read(folder)}


def test_two_processes_give_what_one_gives(point: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swap = "instructions={reach-red: go to the blue square}"
    films = "films={failures: 1, successes: 2}"
    for workers in (1, 2):
        out = tmp_path / f"workers{workers}"
        assert evaluation.main([str(point), f"workers={workers}", f"output={out}", swap, films]) == 0
    one, two = tmp_path / "workers1", tmp_path / "workers2"
    assert lines(one) == lines(two)
    assert len(lines(one)) == 8
    for name in sorted(p.name for p in (one / "episodes").iterdir()):
        assert (one / "episodes" / name).read_bytes() == (two / "episodes" / name).read_bytes()

    summary = json.loads((one / "summary.json").read_text())
    assert summary["tasks"]["reach-red"]["successes"] == 0, "the other's instruction must fail"
    assert summary["tasks"]["reach-blue"]["successes"] == 4
    assert {"python", "numpy", "tandem-vla"} <= summary["versions"].keys()
    videos = {row["video"] for row in lines(one)} - {None}
    assert videos == {
        "videos/reach-red-50-failure.mp4",
        "videos/reach-blue-50-success.mp4",
        "videos/reach-blue-51-success.mp4",
    }
    assert all((one / video).stat().st_size > 1000 for video in videos)
    printed = capsys.readouterr().out
    assert "reach-blue  4/4 = 100 % [51, 100]" in printed


def test_zeros_solve_nothing(point: Path, tmp_path: Path) -> None:
    assert evaluation.main([str(point), "policy.path=zeros", "episodes=2"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["overall"]["successes"], summary["overall"]["episodes"]) == (0, 4)


@pytest.mark.usefixtures("hostile")
@pytest.mark.parametrize(
    ("policy", "error"),
    [
        ("nan", "policy: chunk refused by safety rule 'not_finite'"),
        ("die", "process: was killed by SIGKILL"),
        ("breaks_its_robot", "robot: OSError: bus error"),
        ("hang", "process: took longer than 3 s and was ended"),
    ],
)
def test_a_failure_costs_its_episode_only(point: Path, tmp_path: Path, policy: str, error: str) -> None:
    name = f"policy.path=hostile_policies:{policy}"
    limit = "timeout_s=3" if policy == "hang" else "timeout_s=60"
    films = "films={failures: 1, successes: 1}"
    assert evaluation.main([str(point), name, limit, films, "episodes=3", "robot.tasks=[reach-red]"]) == 0
    rows = by_seed(tmp_path / "out")
    assert (rows["reach-red", 51].error or "").startswith(error)
    assert [(rows["reach-red", s].success, rows["reach-red", s].error) for s in (50, 52)] == [(True, None)] * 2
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["overall"]["successes"], summary["overall"]["episodes"], summary["errors"]) == (2, 2, 1)


@pytest.mark.usefixtures("hostile")
def test_errors_are_tried_again_and_more_episodes_can_follow(
    point: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One name for a policy that is mended between two runs.
    module = tmp_path / "mending.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    for state, episodes in (("nan", 2), ("mended", 3)):
        module.write_text(f"from hostile_policies import {state} as make\n")
        name = "policy.path=mending:make"
        assert evaluation.main([str(point), name, f"episodes={episodes}", "robot.tasks=[reach-red]"]) == 0
        errors = {seed: row.error is not None for (_, seed), row in by_seed(tmp_path / "out").items()}
        assert errors == ({50: False, 51: True} if state == "nan" else {50: False, 51: False, 52: False})


@pytest.mark.usefixtures("hostile")
def test_if_every_episode_fails_the_command_fails(point: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluation.main([str(point), "policy.path=hostile_policies:broken", "episodes=1"]) == 1
    assert "All 2 episodes ended in an error, the first with: policy: RuntimeError: no weights" in (
        capsys.readouterr().err
    )


@pytest.mark.usefixtures("hostile")
def test_a_foreign_action_spec_is_refused_with_both_sides(
    point: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluation.main([str(point), "policy.path=hostile_policies:other_units"]) == 1
    message = capsys.readouterr().err
    assert "action of the policy and of the robot differ" in message
    assert "units: ('m', 'm') and ('10 cm', '10 cm')" in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists(), "nothing is left of an evaluation that cannot begin"


def test_a_folder_of_another_evaluation_is_refused(point: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluation.main([str(point), "episodes=1"]) == 0
    capsys.readouterr()
    assert evaluation.main([str(point), "episodes=1", "first_seed=7", "robot.step_limit=20"]) == 2
    message = capsys.readouterr().err
    assert "  first_seed: 50 there, 7 here" in message
    assert "  robot.step_limit: 30 there, 20 here" in message
    assert "workers" not in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("robot.tasks=[reach-rad]", "Did you mean 'reach-red'"),
        ("instructions={reach-green: go}", "instructions are given for 'reach-green'"),
        ("clock=realtim", "Did you mean 'realtime'"),
        ("episodes=0", "episodes must be at least 1"),
        ("policy.path=outputs/nowhere", "No such policy: outputs/nowhere"),
        ("robot.kind=metaword", "Did you mean 'metaworld'"),
        ("output=/proc/nowhere", "Cannot write to /proc/nowhere"),
    ],
)
def test_wrong_input_is_one_clear_message(
    point: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert evaluation.main([str(point), override]) in (1, 2)
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_real_time_allows_one_worker_only(point: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluation.main([str(point), "clock=realtime", "workers=2"]) == 2
    assert "workers=1" in capsys.readouterr().err


def test_real_time_measures_and_reports(point: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ["clock=realtime", "episodes=1", "robot.tasks=[reach-red]", "films={failures: 0, successes: 1}"]
    assert evaluation.main([str(point), *one]) == 0
    assert "control ticks missed" in capsys.readouterr().out
    (row,) = results.read(tmp_path / "out")
    assert row.wall_s > 0.1 * (row.steps - 2)
    assert row.video == "videos/reach-red-50-success.mp4"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("eval_*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_load(path: Path) -> None:
    config = configs.load(evaluation.EvalConfig, path)
    assert config.first_seed >= 20_000, "recordings use seeds from 10 000"
    assert configs.build(evaluation.EvalConfig, configs.to_data(config)) == config


def test_help_explains_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for word in ("vla-eval configs/eval_metaworld.yaml", "first_seed", "failures", "instructions"):
        assert word in text


@pytest.mark.sim
@pytest.mark.slow
def test_the_shipped_configuration_runs_on_its_simulator(tmp_path: Path) -> None:
    shipped = ["policy.path=expert", "episodes=1", "robot.tasks=[faucet-open-v3]", "films={failures: 0, successes: 1}"]
    assert evaluation.main([str(CONFIGS / "eval_metaworld.yaml"), *shipped, f"output={tmp_path}"]) == 0
    (row,) = results.read(tmp_path)
    assert row.success
    assert row.versions["gl"]
    assert (tmp_path / (row.video or "")).stat().st_size > 10_000
