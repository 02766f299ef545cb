"""Look at a data set before training on it.

  vla-data inspect datasets/metaworld_four_tasks.yaml       tables, and one picture with histograms and frames
  vla-data check datasets/metaworld_four_tasks.yaml         a doctor: what is broken, what looks wrong, what to do
  vla-data stats datasets/metaworld_four_tasks.yaml         exact statistics of the training episodes, as JSON
  vla-data tokenizer fast datasets/metaworld_four_tasks.yaml --chunk 16
                                                            an action tokenizer, and what it loses
  vla-data switching datasets/metaworld_four_tasks.yaml --settings configs/switching_metaworld.yaml
                                                            rollbacks and advances for task switching

RECIPE.yaml says where the data set is and what its numbers mean; see datasets/. Values of it can be
replaced on the command line, such as root=/data/mine or split.exclude=[3,17].

Exit codes: 0 done (check: no error found), 1 failed (check: an error found), 2 wrong usage.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from train import compute_stats, doctor_data, findings, inspect_data, switching_cli, tokenizer_cli
from train.dataset import LeRobotSource
from train.raw_table import read_raw
from train.recipe import Recipe
from vla import cli, config, files

OUT = Path("outputs/data")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)

    def body() -> int:
        recipe = config.load(Recipe, args.recipe, args.overrides)
        return args.command(recipe, args)

    return cli.run(body)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="{inspect,check,stats,tokenizer,switching}")
    what = (
        ("inspect", _inspect, "print tables and draw a picture of a data set"),
        ("check", _check, "find what is broken or looks wrong"),
        ("stats", _stats, "compute mean, deviation, range and true quantiles over all training frames"),
    )
    for name, command, summary in what:
        p = commands.add_parser(name, help=summary, description=summary.capitalize() + ".", allow_abbrev=False)
        p.set_defaults(command=command)
        p.add_argument("recipe", metavar="RECIPE.yaml", help="a recipe, see datasets/")
        p.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. root=/data/mine")
        if name == "check":
            p.add_argument("--json", action="store_true", help="print the findings as JSON")
            p.add_argument(
                "--episodes", type=int, default=20, help="episodes whose pictures are looked at; 0: all (default: 20)"
            )
        else:
            p.add_argument(
                "--out", type=Path, metavar="FOLDER", help=f"where to write (default: {OUT}/<recipe's name>)"
            )
    tokenizer_cli.add_parser(commands)
    switching_cli.add_parser(commands)
    return parser


def _inspect(recipe: Recipe, args: argparse.Namespace) -> int:
    folder = args.out or OUT / recipe.name
    files.require_writable(folder)
    table, console = read_raw(recipe), Console()
    inspect_data.show(table, console)
    inspect_data.draw(table, folder / "inspect.png")
    console.print(f"picture: {folder / 'inspect.png'}")
    return 0


def _check(recipe: Recipe, args: argparse.Namespace) -> int:
    cli.require(args.episodes >= 0, f"--episodes must not be negative, got {args.episodes}.")
    found = doctor_data.examine(recipe, args.episodes)
    if args.json:
        print(json.dumps(findings.to_json(recipe.name, found), indent=2))
    else:
        findings.show(found, Console())
    return int(any(f.severity == "error" for f in found))


def _stats(recipe: Recipe, args: argparse.Namespace) -> int:
    path = (args.out or OUT / recipe.name) / "statistics.json"
    files.require_writable(path.parent)
    statistics = compute_stats.compute([LeRobotSource(recipe, 1, "train")])
    compute_stats.write(statistics, path)
    Console().print(f"{statistics.state.count:,} frames of {statistics.source}: {path}")
    return 0
