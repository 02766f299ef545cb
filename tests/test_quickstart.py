"""The quickstart's presets and plan; and, marked slow, the smoke preset for real."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from robot.eval_config import EvalConfig
from robot.record import RecordConfig
from train import quickstart
from train.quickstart_plan import DEFAULT, EVAL, PRESETS, SMOKE, TRAIN, changes, find_configs, plan, scaled
from train.stages import Stage
from train.train_config import TrainConfig
from vla import config
from vla.errors import UsageError

ROOT = Path(__file__).parents[1]
NAMES = ["record", "check", "inspect", "train", "eval", "swap", "realtime", "report"]


@pytest.fixture
def make_plan(tmp_path: Path) -> Callable[..., dict[str, Stage]]:
    def make(preset: str = "default") -> dict[str, Stage]:
        return {s.name: s for s in plan(PRESETS[preset], ROOT / "configs", tmp_path / "out", seed=3)}

    return make


def loaded(stage: Stage, cls: type) -> object:
    path, *overrides = stage.command[4:]
    return config.load(cls, path, overrides)


@pytest.mark.parametrize("preset", ["default", "smoke"])
def test_every_stage_has_a_valid_command(make_plan: Callable[..., dict[str, Stage]], preset: str) -> None:
    stages = make_plan(preset)
    assert list(stages) == NAMES
    loaded(stages["record"], RecordConfig)
    loaded(stages["train"], TrainConfig)
    for name in ("eval", "swap", "realtime"):
        loaded(stages[name], EvalConfig)
    assert not any(stage.done() for name, stage in stages.items() if name != "check")


def test_default_sizes_are_the_promised_ones(make_plan: Callable[..., dict[str, Stage]]) -> None:
    stages = make_plan()
    record, train = loaded(stages["record"], RecordConfig), loaded(stages["train"], TrainConfig)
    evaluation, swap = loaded(stages["eval"], EvalConfig), loaded(stages["swap"], EvalConfig)
    realtime = loaded(stages["realtime"], EvalConfig)
    assert isinstance(record, RecordConfig)
    assert isinstance(train, TrainConfig)
    assert isinstance(evaluation, EvalConfig)
    assert isinstance(swap, EvalConfig)
    assert isinstance(realtime, EvalConfig)
    assert (len(record.robot.tasks), record.episodes_per_task) == (4, 40)
    assert (train.steps, train.seed) == (1600, 3)
    assert len(evaluation.robot.tasks) * evaluation.episodes == 80
    assert len(swap.robot.tasks) * swap.episodes == 40
    assert set(swap.instructions) == {"faucet-open-v3", "faucet-close-v3"}
    assert realtime.clock == "realtime"


def test_stages_hand_on_what_they_made(make_plan: Callable[..., dict[str, Stage]], tmp_path: Path) -> None:
    stages = make_plan("smoke")
    record, train = loaded(stages["record"], RecordConfig), loaded(stages["train"], TrainConfig)
    evaluation = loaded(stages["eval"], EvalConfig)
    assert isinstance(record, RecordConfig)
    assert isinstance(train, TrainConfig)
    assert isinstance(evaluation, EvalConfig)
    assert (train.steps, record.episodes_per_task, evaluation.episodes) == (6, 2, 1)
    assert train.data.mixture[0].recipe == record.output / "recipe.yaml"
    assert Path(evaluation.policy.path) == train.output / "checkpoints" / "last"
    seeds = range(record.first_seed, record.first_seed + 10 * record.episodes_per_task)
    assert evaluation.first_seed not in seeds  # unseen starts
    outside = [p for s in stages.values() for p in s.outputs if tmp_path / "out" not in p.parents]
    assert not outside


def test_shown_command_is_what_runs(make_plan: Callable[..., dict[str, Stage]]) -> None:
    for name, stage in make_plan().items():
        script, *arguments = shlex.split(stage.shown)
        assert script.startswith("vla-")
        if name in ("record", "train", "eval", "swap", "realtime"):
            given = [Path(a).resolve() if "=" not in a else a for a in arguments]
            run = [Path(a).resolve() if "=" not in a else a for a in stage.command[4:]]
            assert [str(a).replace(f"{Path.cwd()}/", "") for a in given] == [
                str(a).replace(f"{Path.cwd()}/", "") for a in run
            ]


def test_training_is_done_only_when_its_log_ends(make_plan: Callable[..., dict[str, Stage]], tmp_path: Path) -> None:
    done = make_plan()["train"].done
    metrics, last = tmp_path / "out/train/metrics.jsonl", tmp_path / "out/train/checkpoints/last"
    last.parent.mkdir(parents=True)
    metrics.write_text('{"event": "start"}\n{"event": "end", "step": 9}\n')
    assert not done()
    last.write_text("00000009")
    assert done()
    metrics.write_text('{"event": "end", "step": 9}\n{"event": "start"}\n')
    assert not done()


def test_minutes_scale_everything_within_bounds() -> None:
    half = scaled(DEFAULT, DEFAULT.minutes / 2)
    assert (half.demonstrations, half.steps, half.episodes, half.swap_episodes) == (20, 800, 10, 10)
    assert half.expected is None
    assert "800 training steps in place of 1600" in changes(half, DEFAULT)
    double = scaled(DEFAULT, DEFAULT.minutes * 2)
    assert (double.demonstrations, double.steps, double.episodes) == (40, 3200, 40)
    assert double.expected == DEFAULT.expected
    assert "demonstrations" not in changes(double, DEFAULT)
    tiny = scaled(DEFAULT, 0.01)
    assert (tiny.demonstrations, tiny.steps, tiny.episodes) == (10, 100, 5)
    assert scaled(DEFAULT, None) == DEFAULT
    for preset, minutes, text in ((SMOKE, 3.0, "fixed size"), (DEFAULT, 0.0, "positive"), (DEFAULT, -1.0, "positive")):
        with pytest.raises(UsageError, match=text):
            scaled(preset, minutes)


def test_configs_are_found_or_their_absence_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_configs(None) == ROOT / "configs"
    with pytest.raises(UsageError, match="run this in a clone, or name the folder with --configs"):
        find_configs(tmp_path)
    mine = tmp_path / "configs"
    mine.mkdir()
    for file in (ROOT / "configs").glob("*.yaml"):
        (mine / file.name).write_text(file.read_text())
    assert find_configs(None) == Path("configs")
    (mine / TRAIN).unlink()
    assert find_configs(None) == ROOT / "configs"  # an unrelated folder of that name does no harm


def test_next_commands_exist(tmp_path: Path) -> None:
    scripts = (ROOT / "pyproject.toml").read_text()
    commands = quickstart.next_commands(ROOT / "configs", tmp_path)
    assert len(commands) == 3
    for command in commands.values():
        script, path, *overrides = shlex.split(command)
        assert f"\n{script} = " in scripts
        config.load(TrainConfig if script == "vla-train" else EvalConfig, path, overrides)
    assert any(EVAL in command for command in commands.values())


def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quickstart.main(["--preset", "smoke", "--minutes", "3", "--out", str(tmp_path / "a")]) == 2
    assert quickstart.main(["--redo", "trian", "--out", str(tmp_path / "b")]) == 2
    assert "Did you mean 'train'" in capsys.readouterr().err
    locked = tmp_path / "file"
    locked.write_text("x")
    assert quickstart.main(["--out", str(locked / "below")]) == 1
    assert "Cannot write" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.sim
@pytest.mark.timeout(600)
def test_smoke_preset_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert quickstart.main(["--preset", "smoke", "--out", "run"]) == 0
    said = capsys.readouterr().out
    assert "The policy solved" in said
    assert said.count("    vla-") == 3
    state = json.loads((tmp_path / "run/state.json").read_text())
    assert [s["status"] for s in state["stages"].values()] == ["done"] * len(NAMES)
    assert max(s["peak_mb"] for s in state["stages"].values()) < 6000
    html = (tmp_path / "run/report.html").read_text()
    assert "data:video/mp4;base64," in html
    assert all(f'id="{key}"' in html for key in ("headline", "swap", "realtime", "films", "training", "data"))
    assert quickstart.main(["--preset", "smoke", "--out", "run"]) == 0  # nothing left to do
    assert capsys.readouterr().err.count("done before") == len(NAMES)
