"""`vla-data tokenizer`: its arguments. Imports torch only when a tokenizer is fitted."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from train.recipe import Recipe
from vla.codec import Normalization

ABOUT = """Fit an action tokenizer: chunks of actions as short sequences of ids.

Chunks are those that training sees: one for each frame, in model units, the last action repeated beyond the
episode's end. Errors are measured on the held-out episodes if the recipe has any, else on the training ones.
The folder holds the tokenizer and report.json, what was measured; it appears when all is done.

  vla-data tokenizer fast RECIPE.yaml --chunk 16
  vla-data tokenizer residual_vq RECIPE.yaml --chunk 16 --levels 4 --codes 256
  vla-data tokenizer bins RECIPE.yaml --chunk 16 --edges quantile
"""


@dataclass(frozen=True)
class Setting:
    """An option of one kind of tokenizer."""

    name: str
    default: Any  # its type is the option's
    about: str
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Kind:
    about: str
    settings: tuple[Setting, ...]


KINDS = {
    "fast": Kind(
        "cosine transform, rounding and byte-pair encoding; files in the public FAST layout",
        (
            Setting("scale", 10.0, "coefficients are rounded to 1 / SCALE model units"),
            Setting("vocab-size", 1024, "ids: 256 bytes, and merges"),
        ),
    ),
    "residual_vq": Kind(
        "autoencoder with a residual quantiser: few tokens, coarse ones first",
        (
            Setting("levels", 4, "codebooks; a chunk has LEVELS * ceil(CHUNK / STRIDE) tokens"),
            Setting("codes", 256, "codes of each level"),
            Setting("stride", 4, "actions that share a latent"),
            Setting("latent", 32, "width of a latent"),
            Setting("width", 128, "width of encoder and decoder"),
            Setting("blocks", 2, "blocks of encoder and decoder"),
            Setting("steps", 2000, "training steps"),
            Setting("batch", 256, "chunks of a step"),
            Setting("lr", 2e-3, "learning rate at the start"),
        ),
    ),
    "bins": Kind(
        "a token for each number",
        (
            Setting("count", 256, "bins of each dimension"),
            Setting("edges", "uniform", "equal widths, or equal shares of the data", ("uniform", "quantile")),
        ),
    ),
}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tokenizer KIND RECIPE.yaml` to the subcommands of vla-data."""
    plain = argparse.RawDescriptionHelpFormatter
    summary = ABOUT.partition(":")[0].lower()
    p = commands.add_parser("tokenizer", help=summary, description=ABOUT, formatter_class=plain, allow_abbrev=False)
    kinds = p.add_subparsers(required=True, metavar="{" + ",".join(KINDS) + "}")
    for name, kind in KINDS.items():
        k = kinds.add_parser(name, help=kind.about, description=kind.about.capitalize() + ".", allow_abbrev=False)
        k.set_defaults(command=_fit, kind=name)
        k.add_argument("recipe", metavar="RECIPE.yaml", help="a recipe, see datasets/")
        k.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. root=/data/mine")
        k.add_argument("--chunk", type=int, required=True, help="actions of a chunk; that of the policy")
        for s in kind.settings:
            about = f"{s.about} (default: %(default)s)"
            k.add_argument(f"--{s.name}", type=type(s.default), default=s.default, choices=s.choices, help=about)
        if name == "bins":
            binary = "a dimension of two values, -1 and 1, as a gripper's command; may be repeated"
            k.add_argument("--binary", action="append", default=[], metavar="NAME", help=binary)
        k.add_argument(
            "--normalization",
            choices=get_args(Normalization),
            default="quantile",
            help="what makes model units; that of the policy (default: %(default)s)",
        )
        k.add_argument("--max-chunks", type=int, default=200_000, help="drawn from the data (default: %(default)s)")
        k.add_argument("--seed", type=int, default=0, help="of all random draws (default: %(default)s)")
        k.add_argument("--out", type=Path, metavar="FOLDER", help="default: outputs/data/<recipe's name>/<kind>")


def _fit(recipe: Recipe, args: argparse.Namespace) -> int:
    from train import fit_tokenizer

    fit_tokenizer.command(recipe, args, args.out or Path("outputs/data") / recipe.name / args.kind)
    return 0
