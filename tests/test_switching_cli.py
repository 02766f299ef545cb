"""`vla-data switching` says what a data set gives, and what is wrong with it."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from train.data_cli import main
from train.recipe import Recipe, Vector
from train.switching_cli import unreleased
from train.switching_data import SwitchingConfig
from train.switching_moves import CommandMove, LinearMove
from vla import config
from vla.files import write_text
from vla.switching import GripperContact
from vla.types import ActionSpec

SPEC = ActionSpec(("a0", "a1"), ("1",) * 2, ("delta", "absolute"), (-1.0,) * 2, (1.0,) * 2, 10.0, gripper="close_high")
SETTINGS = SwitchingConfig(
    contact=GripperContact("gripper", "action", "a1", 0.0),
    enter=1,
    leave=1,
    margin=1,
    approach=4,
    advance_from=("pre", "post"),
    seed=0,
    moves=(LinearMove("linear", ("a0",), ("s0",), 0.5), CommandMove("command", ("a1",))),
)
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(video_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command on a small data set whose second action is noise that is in contact half of the time."""

    def call(settings: SwitchingConfig = SETTINGS, *arguments: str) -> tuple[int, str]:
        recipe = replace(video_recipe, action=Vector("action", SPEC))
        for name, content in (("recipe", recipe), ("settings", settings)):
            write_text(tmp_path / f"{name}.yaml", config.dump(content))
        code = main(
            ["switching", str(tmp_path / "recipe.yaml"), "--settings", str(tmp_path / "settings.yaml"), *arguments]
        )
        said = capsys.readouterr()
        return code, " ".join((said.out + said.err).split())

    return call


def test_counts_of_rows_are_shown(run: Run) -> None:
    code, said = run()
    assert code == 0
    assert "rollback" in said
    assert "advance" in said
    assert "of 4" in said
    assert "frames:" in said


def test_rollbacks_that_do_not_let_go_are_noted() -> None:
    """The hand closes with frame 3, and is felt at frame 5: going back to frame 4 it would stay closed."""
    actions = np.zeros((8, 2), np.float32)
    actions[:, 1] = np.where(np.arange(8) < 3, -1.0, 1.0)

    def note(goal: int, commands: np.ndarray = actions) -> list[str]:
        frame = np.array([5, 6, 7])
        rows: Any = SimpleNamespace(
            recipe=SimpleNamespace(action=SimpleNamespace(spec=SPEC)),
            recorded=(None, commands),
            moves=SETTINGS.moves,
            plan=SimpleNamespace(frame=frame, goal=np.full(3, goal)),
            labels=SimpleNamespace(begin=np.zeros(8, np.int64)),
        )
        return unreleased(rows)

    assert not note(goal=3)
    (said,) = note(goal=4)
    assert said.startswith("100% of the rollback rows")
    assert "raise 'margin'" in said
    assert not note(4, np.ones((8, 2))), "a command that never changes has nothing to let go of"


def test_limits_that_cut_a_way_off_are_counted(run: Run) -> None:
    shares = []
    for unit in (1e-3, 100.0):
        linear = LinearMove("linear", ("a0",), ("s0",), unit)
        said = run(replace(SETTINGS, moves=(linear, SETTINGS.moves[1])))[1]
        shares.append(float(re.findall(r"rollback .*? ([0-9.]+)%", said)[0]))
    assert shares[0] > 10
    assert shares[1] == 0


def test_nothing_at_all_is_a_failure_that_says_why(run: Run) -> None:
    never = replace(SETTINGS, contact=GripperContact("gripper", "action", "a1", 99.0), advance_from=("post",))
    code, said = run(never)
    assert code == 1
    assert "no frame is in contact" in said
    assert "of which there are 0" in said


def test_settings_that_do_not_fit_are_a_usage_error(run: Run) -> None:
    code, said = run(replace(SETTINGS, moves=SETTINGS.moves[:1]))
    assert code == 2
    assert "each action dimension once" in said
