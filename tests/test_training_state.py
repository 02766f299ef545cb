"""Checkpoints: whole or not at all, complete, and refused where they do not belong."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from train import training_state
from train.training_state import differences
from vla.errors import CheckpointError, DataError, UsageError

ROOT = Path(__file__).parents[1]
PROGRAM = [sys.executable, str(ROOT / "tests/programs/tiny_run.py")]


@pytest.fixture
def train(tiny_run: dict[str, Any]) -> Callable[..., Any]:
    def run(output: Path, steps: int, **options: Any) -> Any:
        return tiny_run["train_tiny"](output, steps, tiny_run["Options"](**options))

    return run


def test_a_checkpoint_is_complete(train: Callable[..., Any], tmp_path: Path) -> None:
    learner = train(tmp_path, 4)
    folder = training_state.last(tmp_path / "checkpoints")
    assert folder is not None
    assert folder.name == "00000004"
    policy, state = load_file(folder / "policy/model.safetensors"), load_file(folder / "training/state.safetensors")
    for name, parameter in learner.module.named_parameters():
        assert torch.equal(policy[name], learner.ema.shadow[name])
        assert torch.equal(state[f"raw.{name}"], parameter.detach())
        assert torch.equal(state[f"optim.exp_avg.{name}"], learner.optimizer.state[parameter]["exp_avg"])
        assert torch.equal(state[f"optim.exp_avg_sq.{name}"], learner.optimizer.state[parameter]["exp_avg_sq"])
    manifest = training_state.read_manifest(folder)
    assert manifest.step == 4
    assert set(manifest.optimizer_steps.values()) == {4}
    assert (policy["head.weight"] != state["raw.head.weight"]).any()


def test_the_newest_are_kept(train: Callable[..., Any], tmp_path: Path) -> None:
    train(tmp_path, 7, checkpoint_every=2, keep=3)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["00000004", "00000006", "00000007", "last"]


def test_no_pickle_in_a_checkpoint(train: Callable[..., Any], tmp_path: Path) -> None:
    train(tmp_path, 2)
    files = [p.name for p in tmp_path.rglob("*") if p.is_file() and p.name != "last"]
    assert {Path(name).suffix for name in files} == {".safetensors", ".json", ".jsonl"}


def test_frozen_parts_have_no_optimiser_state_and_resume(train: Callable[..., Any], tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 4, expert_scale=0.0)
    train(tmp_path / "parts", 4, expert_scale=0.0, keep=9)
    (tmp_path / "parts/checkpoints/last").write_text("00000002\n")
    resumed = train(tmp_path / "parts", 4, expert_scale=0.0)
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name])
    assert set(training_state.optimizer_steps(resumed)) == {"text.weight"}


def test_going_back_to_an_older_checkpoint(train: Callable[..., Any], tmp_path: Path) -> None:
    whole = train(tmp_path, 6, keep=9, dropout=0.3)
    (tmp_path / "checkpoints/last").write_text("00000002\n")
    again = train(tmp_path, 6, keep=9, dropout=0.3)
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[name])


def test_other_configuration_is_refused_by_name(train: Callable[..., Any], tmp_path: Path) -> None:
    train(tmp_path, 2)
    with pytest.raises(UsageError, match=r"optim\.lr: 0\.01 there, 0\.02 now") as caught:
        train(tmp_path, 2, lr=0.02)
    assert "steps" not in str(caught.value).splitlines()[1]


def test_other_data_are_refused(train: Callable[..., Any], tmp_path: Path) -> None:
    train(tmp_path, 2)
    with pytest.raises(DataError, match=r"tiny: revision 'r1' there, 'r2' now"):
        train(tmp_path, 2, revision="r2")


def test_what_may_change() -> None:
    manifest = training_state.Manifest(
        step=1,
        config={"output": "a", "batch": {"accumulation": 1, "global_batch": 8}},
        data=[],
        optimizer_steps={},
        layout="whole",
    )
    same = {"output": "b", "batch": {"accumulation": 4, "global_batch": 8}}
    training_state.require_same_run(manifest, same, [], Path("x"))
    with pytest.raises(UsageError, match=r"batch\.global_batch: 8 there, 9 now"):
        training_state.require_same_run(manifest, {"output": "b", "batch": {"global_batch": 9}}, [], Path("x"))


def test_differences() -> None:
    a = {"x": 1, "y": {"z": [1, 2], "w": None}, "gone": 0}
    b = {"x": 1, "y": {"z": [1, 3], "w": {"v": 1}}, "new": 5}
    assert differences(a, b) == [
        ("y.z", [1, 2], [1, 3]),
        ("y.w", None, {"v": 1}),
        ("gone", 0, None),
        ("new", None, 5),
    ]


@pytest.mark.parametrize("damage", ["truncate", "remove", "foreign", "manifest", "pointer"])
def test_damage_is_one_sentence(train: Callable[..., Any], tmp_path: Path, damage: str) -> None:
    train(tmp_path, 4)
    (tmp_path / "checkpoints/last").write_text("00000002\n")
    training = tmp_path / "checkpoints/00000002/training"
    state = training / "state.safetensors"
    if damage == "truncate":
        state.write_bytes(state.read_bytes()[:-100])
    elif damage == "remove":
        state.unlink()
    elif damage == "foreign":
        save_file({k: v for k, v in load_file(state).items() if "head" not in k}, state)
    elif damage == "manifest":
        (training / "state.json").write_text("{")
    else:
        (tmp_path / "checkpoints/last").write_text("00000003\n")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        train(tmp_path, 4)


def limited(output: Path, steps: int, *options: str) -> subprocess.CompletedProcess[str]:
    """A run that may write files of at most 5 kB: a real error of the operating system in the middle of a write."""
    shell = 'ulimit -f 5; trap "" XFSZ; exec "$@"'
    command = ["bash", "-c", shell, "bash", *PROGRAM, str(output), str(steps), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_write_that_fails_leaves_the_last_checkpoint(train: Callable[..., Any], tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "full", 4, keep=9)
    (tmp_path / "full/checkpoints/last").write_text("00000002\n")
    before = {p: p.read_bytes() for p in tmp_path.glob("full/checkpoints/*/*/*")}
    done = limited(tmp_path / "full", 4)
    assert done.returncode == 1
    assert [line.startswith("error: ") for line in done.stderr.splitlines()].count(True) == 1
    assert "Traceback" not in done.stderr
    assert "Cannot write the checkpoint" in done.stderr
    assert "File too large" in done.stderr
    assert "last complete checkpoint is" in done.stderr
    assert {p: p.read_bytes() for p in tmp_path.glob("full/checkpoints/*/*/*")} == before
    assert not list(tmp_path.glob("full/checkpoints/.*"))
    resumed = train(tmp_path / "full", 4)
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name])


def test_a_log_that_cannot_grow_is_one_sentence(train: Callable[..., Any], tmp_path: Path) -> None:
    train(tmp_path, 4)
    (tmp_path / "checkpoints/last").write_text("00000002\n")
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"event": "start", "note": "x" * 4500}) + "\n")
    done = limited(tmp_path, 4, "checkpoint_every=50")
    assert done.returncode == 1
    assert "error: Cannot write the log" in done.stderr
    assert "00000002" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_first_checkpoint_that_fails_leaves_nothing(tmp_path: Path) -> None:
    done = limited(tmp_path, 4)
    assert done.returncode == 1
    assert "There is no checkpoint yet" in done.stderr
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and "checkpoints" in p.parts]
