"""metrics.jsonl, dashboards, what a person sees."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from train.metrics import Log, Pace
from train.train_config import Backend, LogConfig
from vla.errors import MissingDependency

STEP: dict[str, Any] = {
    "step": 2,
    "loss": 0.5,
    "terms": {"flow": 0.5},
    "lr": 1e-3,
    "grad_norm": 0.7,
    "samples_per_s": 100.0,
    "data_wait_share": 0.02,
    "wall_s": 1.0,
    "memory_mb": 300.0,
}


def new_log(output: Path, *backends: Backend) -> Log:
    return Log(output, LogConfig(every=1, backends=backends, project="tandem"), steps=10, run_config={"seed": 0})


def events(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_lines_and_what_a_person_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = new_log(tmp_path)
    data = [{"recipe": "small", "revision": "r", "episodes": 3, "frames": 30}]
    log.event("start", data=data, resumed_from=None, parameters={"total": 2_000_000, "trainable": 1_500_000})
    log.step(STEP)
    log.event("validation", step=2, loss=0.25)
    log.event("end", step=10, wall_s=3.0)
    log.close()
    assert [e["event"] for e in events(tmp_path)] == ["start", "step", "validation", "end"]
    assert events(tmp_path)[1] == {"event": "step"} | STEP
    seen = capsys.readouterr().err
    assert "1.50 M trainable parameters; small: 3 episodes, 30 frames" in seen
    assert "step 2/10  loss 0.5000  lr 1.0e-03  100 samples/s  data wait 2 %  ETA ?" in seen
    assert "validation at step 2: loss 0.2500" in seen
    assert "done: 10 steps in 3 s" in seen


def test_rewind_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    log = new_log(tmp_path)
    log.event("start", data=[], resumed_from=None, parameters={"total": 1, "trainable": 1})
    for step in (2, 4, 6):
        log.step(STEP | {"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"event": "step", "st')  # killed while writing
    log.rewind(4)
    log.step(STEP | {"step": 5})
    assert [e.get("step") for e in events(tmp_path)] == [None, 2, 4, 5]


def test_tensorboard(tmp_path: Path) -> None:
    log = new_log(tmp_path, "tensorboard")
    log.step(STEP)
    log.event("validation", step=2, loss=0.25)
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Scalars("train/loss")[0].value == 0.5
    assert board.Scalars("train/loss")[0].step == 2
    assert board.Scalars("train/terms/flow")[0].value == 0.5
    assert board.Scalars("validation/loss")[0].value == 0.25


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_dashboard_that_is_not_installed(tmp_path: Path, name: Backend) -> None:
    if name in sys.modules or any((Path(p) / name).is_dir() for p in sys.path):
        pytest.skip(f"{name} is installed here")
    with pytest.raises(MissingDependency, match=rf"uv sync --extra {name}"):
        new_log(tmp_path, name)


def test_progress_bar_on_a_terminal(tmp_path: Path) -> None:
    """A real pseudo-terminal: the bar shows the numbers, and events stay above it."""
    import os
    import pty
    import subprocess

    program = (
        "import pathlib, sys; from train.metrics import Log; from train.train_config import LogConfig\n"
        f"log = Log(pathlib.Path({str(tmp_path)!r}), LogConfig(1, (), 'x'), 10, {{}})\n"
        f"log.step({STEP!r}); log.event('end', step=10, wall_s=3.0); log.close()"
    )
    main, side = pty.openpty()
    os.set_blocking(main, False)
    environment = os.environ | {"COLUMNS": "160", "TERM": "xterm"}
    command = [sys.executable, "-c", program]
    process = subprocess.run(command, cwd=Path(__file__).parents[1], stderr=side, env=environment)
    seen = os.read(main, 1 << 20).decode()
    assert process.returncode == 0
    assert "loss 0.5000" in seen
    assert "2/10" in seen
    assert "done: 10 steps in 3 s" in seen


def test_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 110.0, 150.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    pace = Pace()
    assert pace.eta(5, 500) == "?"
    assert pace.eta(10, 500) == "16:20"
    assert pace.eta(10, 5000) == "13:51:40"
