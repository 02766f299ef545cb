"""vla-train from the command line: a run, its resumption, its doors."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from train import sft
from train.recipe import Recipe
from train.train_config import TrainConfig
from vla import checkpoint, config
from vla.types import Observation

ROOT = Path(__file__).parents[1]
DEFAULT = ROOT / "configs/sft_metaworld_flow.yaml"
Command = Callable[..., int]


@pytest.fixture
def recipe_file(tmp_path: Path, image_recipe: Recipe) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(config.dump(image_recipe))
    return path


@pytest.fixture
def settings(tmp_path: Path, recipe_file: Path) -> list[str]:
    """Overrides that shrink the default run to a few steps on the small data set."""
    tiny = "{width: 16, vision_layers: 1, text_layers: 2, heads: 2, mlp: 16, patch: 8, pixel_shuffle: 2}"
    return [
        f"output={tmp_path / 'run'}",
        f"data.mixture.0.recipe={recipe_file}",
        "data.cache=null",
        "steps=4",
        "policy.cameras=[top]",
        "policy.chunk=4",
        "policy.execute=2",
        "policy.image_size=32",
        f"policy.backbone.tiny={tiny}",
        "policy.expert.width=16",
        "policy.expert.layers=2",
        "policy.expert.mlp=16",
        "batch.global_batch=4",
        "schedule.warmup=1",
        "checkpoint.every=2",
        "validation=null",
        "log.every=1",
        "compute.device=cpu",
    ]


def vla_train(overrides: list[str]) -> int:
    return sft.main([str(DEFAULT), *overrides])


def tensors(run: Path, step: int) -> dict[str, np.ndarray]:
    return load_file(run / f"checkpoints/{step:08d}/training/state.safetensors")


def assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)


def test_a_run_leaves_a_policy_that_answers(settings: list[str], tmp_path: Path, image_recipe: Recipe) -> None:
    assert vla_train(settings) == 0
    run = tmp_path / "run"
    assert (run / "checkpoints/last").read_text().strip() == "00000004"
    assert config.load(TrainConfig, run / "config.yaml").steps == 4
    policy = checkpoint.load(run / "checkpoints/00000004/policy")
    assert policy.action_spec == image_recipe.action.spec
    picture = np.zeros((40, 40, 3), np.uint8)
    chunk = policy.infer(Observation(0.0, {"top": picture}, np.zeros(3, np.float32), "task 1"))
    assert chunk.actions.shape == (4, 2)
    assert np.isfinite(chunk.actions).all()
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events if e["event"] != "step"] == ["start", "checkpoint", "checkpoint", "end"]
    assert events[0]["data"][0]["frames"] == 46
    assert events[0]["parameters"]["trainable"] <= events[0]["parameters"]["total"]


def test_two_and_two_steps_are_four(settings: list[str], tmp_path: Path) -> None:
    """Killed after the first checkpoint, as by the out-of-memory killer; then the same command again."""
    assert vla_train(settings) == 0
    other = [*settings, f"output={tmp_path / 'killed'}"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "train.sft", str(DEFAULT), *other], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    pointer, deadline = tmp_path / "killed/checkpoints/last", time.monotonic() + 120
    while not pointer.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    killed.kill()
    killed.wait()
    assert vla_train(other) == 0
    assert_equal(tensors(tmp_path / "run", 4), tensors(tmp_path / "killed", 4))


@pytest.mark.slow
def test_sigkill_at_random_moments(settings: list[str], tmp_path: Path) -> None:
    settings = [*settings, "steps=30", "checkpoint.every=3"]
    assert vla_train(settings) == 0
    other = [*settings, f"output={tmp_path / 'killed'}"]
    chance, kills, metrics = random.Random(os.getpid()), 0, tmp_path / "killed/metrics.jsonl"
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-m", "train.sft", str(DEFAULT), *other], cwd=ROOT, stderr=subprocess.DEVNULL
        )
        start = time.monotonic()
        begun = metrics.stat().st_mtime_ns if metrics.exists() else 0
        while process.poll() is None and time.monotonic() - start < 120:
            if metrics.exists() and metrics.stat().st_mtime_ns != begun:
                break
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.5))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert vla_train(other) == 0
    assert kills, "the run was always faster than the kill"
    assert_equal(tensors(tmp_path / "run", 30), tensors(tmp_path / "killed", 30))
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"event": "step"' in line]
    assert steps == list(range(1, 31))


def test_accumulation_gives_the_same_policy(settings: list[str], tmp_path: Path) -> None:
    settings = [*settings, "optim.eps=1e-2"]  # else Adam makes whole steps of gradients that are mere rounding
    assert vla_train(settings) == 0
    assert vla_train([*settings, f"output={tmp_path / 'parts'}", "batch.accumulation=4"]) == 0
    whole, parts = tensors(tmp_path / "run", 4), tensors(tmp_path / "parts", 4)
    for name, value in whole.items():
        if name.startswith("raw."):
            np.testing.assert_allclose(parts[name], value, atol=1e-6, err_msg=name)


def test_chunks_longer_than_most_episodes_are_said(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert vla_train([*settings, "steps=1", "policy.chunk=14"]) == 0
    assert "note: 3 of 4 episodes of recipe 'small' are shorter than the 14 steps" in capsys.readouterr().err


def test_a_finished_run_is_left_alone(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vla_train(settings) == 0
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert vla_train(settings) == 0
    assert "is complete" in capsys.readouterr().err
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("optim.lr=2e-3", r"optim.lr: 0.001 there, 0.002 now"),
        ("steps=5", r"steps: 4 there, 5 now"),
        ("policy.head.draws=3", r"policy.head.draws: 4 there, 3 now"),
        ("ema=null", r"ema"),
    ],
)
def test_resume_refuses_another_configuration(
    settings: list[str], capsys: pytest.CaptureFixture[str], change: str, says: str
) -> None:
    assert vla_train(settings) == 0
    assert vla_train([*settings, change]) == 2
    assert says in capsys.readouterr().err


def test_resume_refuses_other_data(settings: list[str], recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vla_train(settings) == 0
    changed = yaml.safe_load(recipe_file.read_text())
    changed["split"]["exclude"] = [0]
    recipe_file.write_text(yaml.safe_dump(changed))
    assert vla_train(settings) == 1
    assert "frames 46 there, 33 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ("optim.lrr=1", 2, "Did you mean 'lr'"),
        ("optim.lr=fast", 2, "optim"),
        ("policy.action_dim=1", 2, "policy.action_dim is 1, but recipe 'small' has 2"),
        ("policy.state_dim=2", 2, "policy.state_dim is 2, but recipe 'small' has 3"),
        ("policy.chunk=17", 2, "longest episode of 'small' has 16"),
        ("policy.cameras=[tip]", 1, "Did you mean 'top'"),
        ("optim.lr_scale={txt: 0}", 2, "Did you mean 'text'"),
        ("optim.lr_scale={text: 0, vision: 0, connector: 0, expert: 0}", 2, "nothing to train"),
        ("validation={every: 1, batches: 1}", 2, "holds no episode out"),
        ("data.mixture.0.recipe=nowhere.yaml", 2, "nowhere.yaml"),
        ("batch.accumulation=3", 2, "cannot be divided evenly"),
        ("init={checkpoint: nowhere, statistics: data}", 1, "nowhere"),
    ],
)
def test_doors(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, code: int, says: str
) -> None:
    assert vla_train([*settings, change]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert not (tmp_path / "run/checkpoints").exists()


def test_output_that_cannot_be_written(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert vla_train([*settings, "output=/proc/nowhere"]) == 1
    assert "Cannot write to /proc/nowhere" in capsys.readouterr().err


def test_validation_and_freezing(settings: list[str], recipe_file: Path, tmp_path: Path) -> None:
    changed = yaml.safe_load(recipe_file.read_text())
    changed["split"]["validation_fraction"] = 0.25
    recipe_file.write_text(yaml.safe_dump(changed))
    frozen = "optim.lr_scale={vision: 0, text: 0}"
    assert vla_train([*settings, "validation={every: 2, batches: 2}", frozen, "ema=null"]) == 0
    events = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [e["loss"] for e in events if e["event"] == "validation"]
    assert len(losses) == 2
    assert len(set(losses)) == 2
    two, four = tensors(tmp_path / "run", 2), tensors(tmp_path / "run", 4)
    moved = [name for name in two if name.startswith("raw.") and (two[name] != four[name]).any()]
    changed_parts = {name.split(".")[3] if "backbone" in name else "expert" for name in moved}
    assert changed_parts == {"connector", "expert"}
    assert not [name for name in two if name.startswith("optim.") and ("vision" in name or "text_model" in name)]


def test_start_from_a_checkpoint(
    settings: list[str], tmp_path: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vla_train(settings) == 0
    saved = tmp_path / "run/checkpoints/00000004/policy"
    start = [*settings, "optim.lr=1e-9", f"output={tmp_path / 'next'}"]
    assert vla_train([*start, f"init={{checkpoint: {saved}, statistics: checkpoint}}"]) == 0
    before, after = load_file(saved / "model.safetensors"), tensors(tmp_path / "next", 4)
    for name, value in before.items():
        np.testing.assert_allclose(after[f"raw.{name}"], value, atol=1e-6, err_msg=name)

    wider = ["policy.expert.width=32", f"output={tmp_path / 'wider'}"]
    assert vla_train([*start, *wider, f"init={{checkpoint: {saved}, statistics: checkpoint}}"]) == 2
    assert "policy.expert.width: 16 there, 32 here" in capsys.readouterr().err

    changed = yaml.safe_load(recipe_file.read_text())
    changed["action"]["spec"]["units"] = ["rad", "rad"]
    recipe_file.write_text(yaml.safe_dump(changed))
    foreign = [*start, f"output={tmp_path / 'foreign'}"]
    assert vla_train([*foreign, f"init={{checkpoint: {saved}, statistics: checkpoint}}"]) == 1
    assert "units" in capsys.readouterr().err
    assert vla_train([*foreign, f"init={{checkpoint: {saved}, statistics: data}}"]) == 0
