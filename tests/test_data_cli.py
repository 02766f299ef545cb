"""The command on small data sets, in this process: what it prints, writes and returns."""

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from train import compute_stats, inspect_data
from train.data_cli import main
from train.dataset import LeRobotSource
from train.raw_table import read_raw
from train.recipe import Recipe
from vla import config


@pytest.fixture
def recipe_file(video_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe's path; relative output folders end in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(config.dump(video_recipe))
    return "small.yaml"


def break_action(root: Path, copy: Path) -> Path:
    shutil.copytree(root, copy)
    (path,) = (copy / "data").glob("*/*.parquet")
    table = pq.read_table(path)
    actions = np.array(table.column("action").to_pylist())
    actions[20] = np.nan
    place = table.column_names.index("action")
    pq.write_table(
        table.set_column(place, table.field(place), pa.array(actions.tolist(), table.field(place).type)), path
    )
    return copy


def test_inspect_prints_what_is_there_and_draws_it(recipe_file: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", recipe_file]) == 0
    shown = capsys.readouterr().out
    for text in ("episodes        4", "46", "10 frames/s", "7 to 16 frames", "task 0", "observation.images.wrist"):
        assert text in shown
    assert "64 x 48" in shown  # width x height
    picture = Path("outputs/data/small/inspect.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    assert width > 1000
    assert height > 600
    assert os.listdir("outputs/data/small") == ["inspect.png"]


def test_the_tables_numbers_are_the_data_sets(video_recipe: Recipe, capsys: pytest.CaptureFixture) -> None:
    inspect_data.show(read_raw(video_recipe), Console(width=120))
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    states, actions = LeRobotSource(video_recipe, 1, "train").statistics_arrays()
    for name, column in [(f"s{i}", states[:, i]) for i in range(3)] + [(f"a{i}", actions[:, i]) for i in range(2)]:
        expected = [column.min(), column.mean(), column.max(), column.std()]
        np.testing.assert_allclose([float(x) for x in lines[name][-4:]], expected, rtol=6e-3, atol=1e-3)
    assert lines["task"][:2] == ["task", "2"]


def test_inspect_shows_what_training_would_refuse(recipe_file: str, video_root: Path, tmp_path: Path) -> None:
    root = break_action(video_root, tmp_path / "copy")
    shutil.rmtree(root / "videos" / "observation.images.top")
    assert main(["inspect", recipe_file, f"root={root}", "--out", "seen"]) == 0
    assert Path("seen/inspect.png").stat().st_size > 10_000


def test_check_is_0_without_and_1_with_an_error(
    recipe_file: str, video_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["check", recipe_file]) == 0
    assert "0 errors" in capsys.readouterr().out
    root = break_action(video_root, tmp_path / "copy")
    assert main(["check", recipe_file, f"root={root}"]) == 1
    assert "not finite: action, episode 2, frame 0" in capsys.readouterr().out
    assert main(["check", recipe_file, f"root={root}", "split.exclude=[2]"]) == 0


def test_check_as_json(recipe_file: str, video_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = break_action(video_root, tmp_path / "copy")
    assert main(["check", recipe_file, f"root={root}", "--json", "--episodes", "1"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["recipe"] == "small"
    assert data["findings"][0]["check"] == "not finite"
    assert data["findings"][0]["episodes"] == [2]


def test_stats_are_those_of_the_training_episodes(recipe_file: str, video_recipe: Recipe) -> None:
    assert main(["stats", recipe_file, "split.validation_fraction=0.25", "--out", "s"]) == 0
    found = compute_stats.read(Path("s/statistics.json"))
    assert found.action.count < 46
    assert main(["stats", recipe_file]) == 0
    found = compute_stats.read(Path("outputs/data/small/statistics.json"))
    states, _ = LeRobotSource(video_recipe, 1, "train").statistics_arrays()
    np.testing.assert_allclose(found.state.q99, np.quantile(states.astype(np.float64), 0.99, axis=0))


@pytest.mark.parametrize("command", ["inspect", "check", "stats"])
def test_wrong_usage_is_2(recipe_file: str, command: str, capsys: pytest.CaptureFixture) -> None:
    assert main([command, "smal.yaml"]) == 2
    assert "Did you mean 'small.yaml'?" in capsys.readouterr().err
    assert main([command, recipe_file, "rot=/x"]) == 2
    assert "Did you mean 'root'?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main([command])
    assert caught.value.code == 2


def test_more_wrong_usage_is_2(recipe_file: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["check", recipe_file, "--episodes", "-1"]) == 2
    assert "--episodes must not be negative" in capsys.readouterr().err
    for argv in ([], ["chekc", recipe_file]):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 2


@pytest.mark.parametrize("command", ["inspect", "stats"])
def test_a_data_set_that_is_not_there_is_1(recipe_file: str, command: str, capsys: pytest.CaptureFixture) -> None:
    assert main([command, recipe_file, "root=/nowhere", "--out", "out"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: Recipe 'small' expects")
    assert message.count("\n") == 1
    assert os.listdir("out") == []


@pytest.mark.parametrize("command", ["inspect", "stats"])
def test_an_output_folder_that_cannot_be_written_is_1(
    recipe_file: str, command: str, capsys: pytest.CaptureFixture
) -> None:
    assert main([command, recipe_file, "--out", "/proc/self/out"]) == 1
    assert "another output folder" in capsys.readouterr().err


def test_stats_of_a_broken_data_set_leave_no_file(recipe_file: str, video_root: Path, tmp_path: Path) -> None:
    assert main(["stats", recipe_file, f"root={break_action(video_root, tmp_path / 'copy')}", "--out", "out"]) == 1
    assert os.listdir("out") == []


@pytest.mark.parametrize("command", ["", "inspect", "check", "stats", "tokenizer", "tokenizer fast", "tokenizer bins"])
def test_help(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert "RECIPE.yaml" in capsys.readouterr().out
