"""The training loop: exact, stoppable, and clear about what went wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from train.loop import seed_step
from vla.cli import Interrupted
from vla.errors import TandemError

ROOT = Path(__file__).parents[1]
Train = Callable[..., Any]


@pytest.fixture
def train(tiny_run: dict[str, Any]) -> Train:
    """train(output, steps, **options) -> the learner at the end."""

    def run(output: Path, steps: int, **options: Any) -> Any:
        return tiny_run["train_tiny"](output, steps, tiny_run["Options"](**options))

    return run


def weights(learner: Any) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in learner.module.state_dict().items()}


def assert_bitwise(a: Any, b: Any) -> None:
    for name, value in weights(a).items():
        assert torch.equal(value, weights(b)[name]), name
    for name, value in a.ema.shadow.items():
        assert torch.equal(value, b.ema.shadow[name]), name


def assert_close(a: Any, b: Any) -> None:
    for name, value in weights(a).items():
        torch.testing.assert_close(value, weights(b)[name], atol=1e-6, rtol=0)


def lines(output: Path, event: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [e for e in found if e["event"] == event]


def test_it_learns(train: Train, tmp_path: Path) -> None:
    train(tmp_path, 60, checkpoint_every=100, lr=0.05, log_every=10)
    losses = [e["loss"] for e in lines(tmp_path, "step")]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("signal_at", [0, 1, 2])
def test_interrupted_and_resumed_is_uninterrupted(train: Train, tmp_path: Path, signal_at: int) -> None:
    """With dropout: the random draws of a step do not depend on the steps before it."""
    whole = train(tmp_path / "whole", 4, dropout=0.5)
    with pytest.raises(Interrupted, match="SIGTERM"):
        train(tmp_path / "parts", 4, dropout=0.5, signal_at=signal_at, checkpoint_every=100)
    assert (tmp_path / "parts/checkpoints/last").read_text().strip() == f"{signal_at + 1:08d}"
    resumed = train(tmp_path / "parts", 4, dropout=0.5)
    assert_bitwise(whole, resumed)
    same = ("step", "loss", "terms", "lr", "grad_norm")
    logged = [[{k: e[k] for k in same} for e in lines(tmp_path / name, "step")] for name in ("whole", "parts")]
    assert logged[0] == logged[1]
    assert lines(tmp_path / "parts", "start")[1]["resumed_from"] == signal_at + 1


@pytest.mark.parametrize("accumulation", [2, 3, 12])
def test_accumulation_equals_the_big_batch(train: Train, tmp_path: Path, accumulation: int) -> None:
    """Micro-batches hold different numbers of supervised entries: equal weights would give something else."""
    whole = train(tmp_path / "whole", 5)
    parts = train(tmp_path / "parts", 5, accumulation=accumulation)
    assert_close(whole, parts)
    for a, b in zip(lines(tmp_path / "whole", "step"), lines(tmp_path / "parts", "step"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        assert a["terms"] == pytest.approx(b["terms"], abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-6)


def test_one_step_by_hand(train: Train, tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """The gradient of the whole batch, clipped, put through AdamW at the first learning rate."""
    from train.distributed import Cluster
    from train.train_config import ComputeConfig

    options = tiny_run["Options"]()
    learner, _ = tiny_run["new_learner"](options, Cluster(ComputeConfig("cpu", "fp32", "ddp")))
    module = learner.module
    batch = tiny_run["global_batch"](0, options)
    hidden = module.trunk(torch.cat((batch["state"], module.text(batch["tokens"]).mean(dim=1)), dim=1))
    error = (module.head(hidden).view(12, 4, 3) - batch["actions"]) ** 2
    loss = error[batch["valid"]].mean()
    loss.backward()
    norm = torch.sqrt(sum(((p.grad**2).sum() for p in module.parameters()), torch.zeros(())))
    expected = {}
    for name, p in module.named_parameters():
        lr = options.lr / 2 * (0.5 if name.startswith("text") else 1.0)  # first of two warm-up steps
        decay = 0.1 if p.ndim == 2 and not name.startswith("text") else 0.0
        gradient = p.grad * min(1.0, 1.0 / float(norm))
        expected[name] = (p * (1 - lr * decay) - lr * gradient / (gradient.abs() + 1e-8)).detach()

    trained = train(tmp_path, 1)
    for name, value in trained.module.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], atol=2e-6, rtol=0, msg=name)
    (step,) = lines(tmp_path, "step")
    assert step["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert step["grad_norm"] == pytest.approx(norm.item(), abs=1e-6)


def test_steps_against_a_plain_loop(train: Train, tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """With gradients that are clipped hard: their size relative to one another decides Adam's second step."""
    from train.distributed import Cluster
    from train.optim import learning_rate, set_learning_rate
    from train.train_config import ComputeConfig, ScheduleConfig

    options = tiny_run["Options"](clip=0.05)
    learner, optim = tiny_run["new_learner"](options, Cluster(ComputeConfig("cpu", "fp32", "ddp")))
    parameters = [p for group in learner.optimizer.param_groups for p in group["params"]]
    for step in range(4):
        set_learning_rate(learner.optimizer, learning_rate(step, optim.lr, ScheduleConfig(2, 0.1), 4))
        learner.module(tiny_run["whole_batch"](step, options)).total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.05)
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        learner.ema.update(learner.module, step)
    assert_bitwise(learner, train(tmp_path, 4, clip=0.05))


def test_broken_numbers_stop_the_run_and_leave_the_last_checkpoint(train: Train, tmp_path: Path) -> None:
    with pytest.raises(TandemError, match=r"in step 4, .*error nan.*last complete checkpoint is .*00000002"):
        train(tmp_path, 10, nan_at=3, log_every=5)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00000002", "last"]
    assert not lines(tmp_path, "end")
    healed, whole = train(tmp_path, 10), train(tmp_path.with_name("whole"), 10)
    assert_bitwise(healed, whole)


def test_an_update_that_overflows_is_found_before_it_is_saved(train: Train, tmp_path: Path) -> None:
    with pytest.raises(TandemError, match="weights after step 1 are not finite"):
        train(tmp_path, 10, lr=1e38, checkpoint_every=1)
    assert not (tmp_path / "checkpoints").exists()


def test_out_of_memory_is_one_sentence(train: Train, tmp_path: Path) -> None:
    with pytest.raises(TandemError, match=r"Out of memory on cpu in step 4, with 6 rows.*accumulation above 2"):
        train(tmp_path, 10, huge_at=3, accumulation=2)
    assert (tmp_path / "checkpoints/last").read_text().strip() == "00000002"


def test_validation_is_with_averaged_weights(train: Train, tiny_run: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    train(tmp_path, 4, validate_every=4)
    options = tiny_run["Options"]()
    module = tiny_run["Tiny"](0.0)
    module.load_state_dict(load_file(tmp_path / "checkpoints/00000004/policy/model.safetensors"))
    batch = tiny_run["whole_batch"](10_000, options)
    (line,) = lines(tmp_path, "validation")
    assert line["loss"] == pytest.approx(module(batch).total.item(), abs=1e-6)


def test_validation_changes_nothing(train: Train, tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", 6)
    validated = train(tmp_path / "validated", 6, validate_every=1)
    assert_bitwise(plain, validated)
    losses = [e["loss"] for e in lines(tmp_path / "validated", "validation")]
    assert [e["step"] for e in lines(tmp_path / "validated", "validation")] == [1, 2, 3, 4, 5, 6]
    assert len(set(losses)) == 6


def test_the_log_averages_over_its_window(train: Train, tmp_path: Path) -> None:
    train(tmp_path / "each", 6, log_every=1)
    train(tmp_path / "window", 6, log_every=4)
    each = [e["loss"] for e in lines(tmp_path / "each", "step")]
    window = lines(tmp_path / "window", "step")
    assert [e["step"] for e in window] == [4, 6]
    assert window[0]["loss"] == pytest.approx(sum(each[:4]) / 4)
    assert window[1]["loss"] == pytest.approx(sum(each[4:]) / 2)


def test_waiting_for_data_is_measured(train: Train, tmp_path: Path) -> None:
    train(tmp_path, 5, pause_s=0.1, log_every=5, checkpoint_every=100)
    (line,) = lines(tmp_path, "step")
    assert line["data_wait_share"] > 0.5
    assert line["samples_per_s"] < 12 * 5 / 0.5


def test_bf16_trains_in_float32_weights(tmp_path: Path) -> None:
    """In a process of its own: accelerate keeps one precision a process."""
    program = [sys.executable, str(ROOT / "tests/programs/tiny_run.py")]
    done = subprocess.run([*program, str(tmp_path), "3", "precision=bf16"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from safetensors.torch import load_file

    state = load_file(tmp_path / "checkpoints/00000003/training/state.safetensors")
    assert {v.dtype for v in state.values()} == {torch.float32}
    weight = state["raw.head.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())


def test_seeds_differ_by_run_step_and_rank() -> None:
    draws = set()
    for seed in (0, 1):
        for step in (0, 1):
            for rank in (0, 1):
                seed_step(seed, step, rank)
                draws.add(torch.rand(()).item())
    assert len(draws) == 8


def test_terminated_run_exits_with_130(tmp_path: Path) -> None:
    program = [sys.executable, str(ROOT / "tests/programs/tiny_run.py")]
    done = subprocess.run([*program, str(tmp_path), "5", "signal_at=2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130
    assert "interrupted by SIGTERM; run the same command again to resume." in done.stderr
    assert (tmp_path / "checkpoints/last").read_text().strip() == "00000003"
