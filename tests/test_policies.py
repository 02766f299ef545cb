import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robot.policies import Zeros, fingerprint, flatten, make_policy, resolve
from robot.registry import PointArmConfig, make_robot
from robot.sims.point_arm import ACTION_SPEC, STATE_SPEC, PointExpert
from vla.errors import CheckpointError, SpecMismatch, UsageError

CONFIG = PointArmConfig("point_arm", ("reach-red",), image_size=64, step_limit=40)


def policy(path: str, settings: dict[str, Any] | None = None) -> Any:
    return make_policy(path, "cpu", settings or {}, CONFIG, make_robot(CONFIG))


def test_names_lead_to_policies() -> None:
    assert isinstance(policy("expert"), PointExpert)
    assert isinstance(policy("zeros"), Zeros)


def test_a_function_of_ones_own_gets_robot_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_policies.py").write_text("def make(robot, settings):\n    return robot.tasks, settings\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert policy("mine_for_policies:make", {"head": {"steps": 3}}) == (("reach-red",), {"head.steps": 3})


@pytest.mark.parametrize("path", ["no_such_module:make", "robot.policies:no_such_name"])
def test_a_function_that_is_not_there(path: str) -> None:
    with pytest.raises(UsageError, match="Cannot find policy"):
        policy(path)


def test_a_missing_checkpoint_is_named() -> None:
    with pytest.raises(CheckpointError, match="No such policy: outputs/nowhere"):
        fingerprint("outputs/nowhere")


def test_a_configuration_with_settings_serves_the_expert_too() -> None:
    assert isinstance(policy("expert", {"execute": 4}), PointExpert)


def test_settings_are_flattened() -> None:
    assert flatten({"execute": 4, "head": {"steps": 5, "noise_scale": 0.0}}) == {
        "execute": 4,
        "head.steps": 5,
        "head.noise_scale": 0.0,
    }


def test_zeros_are_no_policy_for_absolute_actions() -> None:
    robot = make_robot(CONFIG)
    robot.reset("reach-red", 0)
    chunk = Zeros(ACTION_SPEC, STATE_SPEC).infer(robot.observe())
    assert not np.asarray(chunk.actions).any()
    absolute = dataclasses.replace(ACTION_SPEC, units=("m", "m"), reference=("delta", "absolute"))
    with pytest.raises(SpecMismatch, match=r"\['point.dy'\]"):
        Zeros(absolute, STATE_SPEC)


def checkpoint(folder: Path, weights: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.yaml").write_text("chunk: 8\n")
    return folder


def test_last_names_the_newest_checkpoint(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    folder = checkpoint(checkpoints / "00000400" / "policy", b"1")
    (checkpoints / "last").write_text("00000400\n")
    assert resolve(str(checkpoints / "last")) == str(folder)
    assert resolve(str(folder)) == str(folder)
    assert fingerprint(str(checkpoints / "last")) == fingerprint(str(folder))


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    one, same = checkpoint(tmp_path / "a", b"weights"), checkpoint(tmp_path / "b", b"weights")
    other = checkpoint(tmp_path / "c", b"weightz")
    assert fingerprint(str(one)) == fingerprint(str(same)) != fingerprint(str(other))
    assert fingerprint("expert") == fingerprint("robot.policies:Zeros") == ""
