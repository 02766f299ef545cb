"""Several processes give what one gives: two CPU processes that talk by gloo."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.distributed import Cluster
from train.recipe import Recipe
from train.train_config import ComputeConfig
from vla import checkpoint, config
from vla.errors import UsageError

ROOT = Path(__file__).parents[1]
TINY = [str(ROOT / "tests/programs/tiny_run.py")]


def launch(processes: int, *program: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--nproc-per-node={processes}", f"--master-port={port}"]
    command = [sys.executable, "-m", "torch.distributed.run", *flags, *program]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def processes(output: Path) -> list[int]:
    """Of how many processes the run was, at each start."""
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [e["processes"] for e in events if e["event"] == "start"]


def policy(output: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output / f"checkpoints/{step:08d}/policy/model.safetensors")


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def losses(output: Path) -> list[float]:
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [e["loss"] for e in events if e["event"] in ("step", "validation")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that the others are compared with."""
    output = tmp_path_factory.mktemp("alone")
    done = launch(1, *TINY, str(output), "6", "validate_every=3")
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_two_processes_equal_one(alone: Path, tmp_path: Path, parallel: str, accumulation: int) -> None:
    settings = [f"parallel={parallel}", f"accumulation={accumulation}", "validate_every=3"]
    done = launch(2, *TINY, str(tmp_path), "6", *settings)
    assert done.returncode == 0, done.stderr
    assert_close(policy(alone, 6), policy(tmp_path, 6))
    assert losses(tmp_path) == pytest.approx(losses(alone), abs=1e-6)
    assert done.stderr.count("step 6/6") == 1, "only the main process reports"
    assert processes(tmp_path) == [2]


@pytest.mark.slow
@pytest.mark.parametrize(("begin", "end"), [("fsdp2", "fsdp2"), ("fsdp2", "ddp"), ("ddp", "fsdp2")])
def test_resume_sharded_and_whole(alone: Path, tmp_path: Path, begin: str, end: str) -> None:
    """Stopped by a signal to one process; continued by as many or by one, sharded or not."""
    stopped = launch(2, *TINY, str(tmp_path), "6", f"parallel={begin}", "signal_at=2", "validate_every=3")
    assert stopped.returncode != 0
    assert (tmp_path / "checkpoints/last").read_text().strip() == "00000003"
    files = {p.name for p in (tmp_path / "checkpoints/00000003/training").iterdir()}
    assert len(files) == (3 if begin == "fsdp2" else 2), files
    count = 1 if begin != end and end == "ddp" else 2
    done = launch(count, *TINY, str(tmp_path), "6", f"parallel={end}", "validate_every=3")
    assert done.returncode == 0, done.stderr
    assert_close(policy(alone, 6), policy(tmp_path, 6))
    assert losses(tmp_path) == pytest.approx(losses(alone), abs=1e-6)


@pytest.mark.slow
def test_one_process_that_breaks_ends_all(tmp_path: Path) -> None:
    """Row 6 of 12 is broken: only the second process sees it."""
    done = launch(2, *TINY, str(tmp_path), "6", "nan_at=3")
    assert done.returncode != 0
    assert "in step 4, which is not finite" in done.stderr
    assert (tmp_path / "checkpoints/last").read_text().strip() == "00000002"


@pytest.mark.slow
def test_the_policy_sharded_equals_the_policy_whole(tmp_path: Path, image_recipe: Recipe) -> None:
    """vla-train itself: blocks of the real backbone and expert sharded, consolidated into one file that loads."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.dump(image_recipe))
    tiny = "{width: 16, vision_layers: 1, text_layers: 2, heads: 2, mlp: 16, patch: 8, pixel_shuffle: 2}"
    settings = [
        str(ROOT / "configs/sft_metaworld_flow.yaml"),
        f"data.mixture.0.recipe={recipe}",
        "data.cache=null",
        "validation=null",
        "compute.device=cpu",
        "steps=3",
        "optim.eps=1e-2",  # else Adam makes whole steps of gradients that are mere rounding
        "policy.cameras=[top]",
        "policy.chunk=4",
        "policy.image_size=32",
        f"policy.backbone.tiny={tiny}",
        "policy.expert.width=16",
        "policy.expert.layers=2",
        "policy.expert.mlp=16",
        "policy.expert.attention=[joint, cross]",
        "batch.global_batch=4",
        "schedule.warmup=1",
        "checkpoint.every=2",
    ]
    for name, count, parallel in (("whole", 1, "ddp"), ("ddp", 2, "ddp"), ("sharded", 2, "fsdp2")):
        done = launch(count, "-m", "train.sft", *settings, f"output={tmp_path / name}", f"compute.parallel={parallel}")
        assert done.returncode == 0, done.stderr
        assert processes(tmp_path / name) == [count]
    assert_close(policy(tmp_path / "whole", 3), policy(tmp_path / "ddp", 3))
    assert_close(policy(tmp_path / "whole", 3), policy(tmp_path / "sharded", 3))
    loaded = checkpoint.load(tmp_path / "sharded/checkpoints/00000003/policy")
    assert_close(policy(tmp_path / "whole", 3), dict(loaded.state_dict()))


def test_a_gpu_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UsageError, match=r"compute\.device is 'cuda'"):
        Cluster(ComputeConfig("cuda", "fp32", "ddp"))


def test_one_process_needs_no_other() -> None:
    cluster = Cluster(ComputeConfig("cpu", "fp32", "fsdp2"))
    assert cluster.is_main
    assert not cluster.sharded
    assert cluster.shared_text("a/b") == "a/b"
    assert cluster.any(["stop"])
    assert not cluster.any([])
    assert torch.equal(cluster.total(torch.ones(2)), torch.ones(2))
