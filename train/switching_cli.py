"""`vla-data switching`: what rollbacks and advances a data set gives, before training on them."""

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from train.dataset import LeRobotSource
from train.recipe import Recipe
from train.switching_data import MODE, DerivedSource, SwitchingRows, derive
from train.switching_moves import CommandMove
from vla.errors import DataError
from vla.switching import PHASES

ABOUT = """Show what rollback and advance rows for task switching a data set gives.

  vla-data switching RECIPE.yaml --settings configs/switching_metaworld.yaml

Rows are made while training reads them; nothing is written. See docs/switching.md.
"""
AT_LIMIT = 1e-6  # share of a dimension's range


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    p = commands.add_parser(
        "switching",
        help="show what rollbacks and advances a data set gives for task switching",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.set_defaults(command=_show)
    p.add_argument("recipe", metavar="RECIPE.yaml", help="a recipe, see datasets/")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. root=/data/mine")
    p.add_argument("--settings", type=Path, required=True, metavar="FILE.yaml", help="see configs/switching_*.yaml")
    p.add_argument("--chunk", type=int, default=8, help="steps of a chunk, as policy.chunk (default: 8)")


def _show(recipe: Recipe, args: argparse.Namespace) -> int:
    source, console = LeRobotSource(recipe, args.chunk, "train"), Console()
    table = Table("rows", "count", "of episodes", "numbers at a limit", title=f"task switching: {recipe.name}")
    notes: list[str] = []
    for behaviour in MODE:
        try:
            rows = derive(source, SwitchingRows(behaviour, args.settings))
        except DataError as error:
            notes.append(f"no {behaviour} rows: {error}")
            continue
        episodes = len(np.unique(rows.labels.begin[rows.plan.frame]))
        table.add_row(behaviour, str(len(rows)), f"{episodes} of {len(source.episodes)}", f"{at_limit(rows):.1%}")
        if behaviour == "rollback":
            counts = np.bincount(rows.labels.phase, minlength=len(PHASES))
            notes.append("frames: " + ", ".join(f"{n} {phase}" for phase, n in zip(PHASES, counts, strict=True)))
            notes += unreleased(rows)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)
    return int(not table.row_count)


def at_limit(rows: DerivedSource) -> float:
    """Share of the numbers that move something and stand at a limit of the action: too many, and the way is cut off."""
    spec = rows.recipe.action.spec
    commands = {name for move in rows.moves if isinstance(move, CommandMove) for name in move.action}
    moving = [i for i, name in enumerate(spec.names) if name not in commands]
    actions = rows.steps(np.arange(len(rows))).actions[..., moving]
    low, high = np.asarray(spec.low)[moving], np.asarray(spec.high)[moving]
    near = AT_LIMIT * (high - low)
    return float(((actions <= low + near) | (actions >= high - near)).mean())


def unreleased(rows: DerivedSource) -> list[str]:
    """A warning where the hand is as closed when a rollback has ended as it was in contact."""
    spec, (_, actions) = rows.recipe.action.spec, rows.recorded
    at = [spec.names.index(name) for move in rows.moves if isinstance(move, CommandMove) for name in move.action]
    last = np.maximum(rows.plan.goal - 1, rows.labels.begin[rows.plan.frame])
    held, released = actions[rows.plan.frame][:, at], actions[last][:, at]
    spread = np.ptp(actions[:, at], axis=0)
    if not (spread > 0).any():
        return []  # a command that never changes has nothing to release
    same = (np.abs(held - released) <= 0.1 * spread).all(axis=1)
    if not same.any():
        return []
    return [
        f"{same.mean():.0%} of the rollback rows end with the command that held in contact: if the gripper closes "
        "before contact is felt, raise 'margin' until these rollbacks let go."
    ]
