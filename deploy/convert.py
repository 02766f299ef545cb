"""Make a policy folder of ours from somebody else's checkpoint.

Reads LeRobot's smolvla, pi0 and pi05 folders, openpi's PyTorch export, and a mixture of horizons trained in it.
Every weight is renamed, folded or dropped by a rule, and the table says which; one that no rule knows is an error.
What the source does not carry is asked for:

  vla-convert smolvla_base outputs/smolvla --vlm SmolVLM2-500M --recipe datasets/so101_pickplace.yaml
  vla-convert pi05_libero outputs/pi05 --tokenizer paligemma --recipe datasets/libero.yaml

The output is whole: it loads with no network (docs/checkpoints.md).
"""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from deploy import convert_lerobot, convert_numbers, convert_pi, convert_smolvla
from deploy.convert_plan import Given, Plan, Row, fill, moves
from deploy.convert_source import Weights, read_config
from vla import checkpoint, cli, tokenizer
from vla.backbone_config import Part
from vla.backbones.build import saved_backbone
from vla.errors import CheckpointError, UsageError
from vla.policy import VLAPolicy


@dataclass(frozen=True)
class Options:
    """What the source may not carry."""

    tokenizer: Path | None = None  # folder with tokenizer.json
    vlm: Path | None = None  # folder with config.json, and tokenizer.json, of the VLM
    recipe: Path | None = None  # YAML with the blocks cameras, state and action
    statistics: Path | None = None  # as `vla-data stats` writes them
    given: Given = field(default_factory=Given)


def convert(source: Path, output: Path, options: Options) -> list[Row]:
    """Write the policy in `source` to `output`, whole or not at all; returns what was changed.

    Raises:
        UsageError: something has to be given that the source does not carry.
        CheckpointError: the source is damaged, incomplete or of no known kind.
    """
    if not source.is_dir():
        raise CheckpointError(f"No such folder: {source}.")
    declared = read_config(source)
    weights = Weights(source)
    meant = convert_numbers.meaning(source, options.recipe)
    lerobot = "type" in declared
    if lerobot:
        plan = _lerobot(declared, weights, meant, options)
        found = convert_lerobot.moments(source)
    else:
        _require_openpi(source, weights)
        names = convert_pi.OPENPI_CAMERAS if meant is None else tuple(meant.cameras)
        plan = convert_pi.openpi_plan(declared, weights, names, options.given)
        found = convert_numbers.openpi_moments(source)
    statistics = convert_numbers.statistics(source, found, meant, options.statistics)
    places, rows = moves(plan.rules, sorted(weights.shapes), str(source))
    words = _tokenizer(source, options)
    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng(devices=[]):
        (Path(scratch) / "config.json").write_text(json.dumps(plan.backbone))
        backbone = saved_backbone(Path(scratch), plan.policy.backbone)
        policy = VLAPolicy.compose(plan.policy, statistics, backbone, words, None)
    _require_words(words, plan)
    fill(policy, weights, places)
    checkpoint.save(policy, output)
    return rows + [Row("set", what, 1, why) for what, why in plan.settings]


def _lerobot(declared: dict[str, Any], weights: Weights, meant: Any, options: Options) -> Plan:
    kind = declared["type"]
    names = convert_numbers.cameras(meant, convert_lerobot.image_keys(declared))
    plans: Mapping[str, Callable[[], Plan]] = {
        "smolvla": lambda: convert_smolvla.plan(declared, weights, names, options.vlm, options.given),
        "pi0": lambda: convert_pi.lerobot_plan(declared, weights, names, options.given),
        "pi05": lambda: convert_pi.lerobot_plan(declared, weights, names, options.given),
    }
    if kind not in plans:
        raise CheckpointError(
            f"{weights.folder} is a LeRobot policy of type {kind!r}; {', '.join(plans)} can be converted. Others run "
            "as they are: docs/lerobot.md."
        )
    try:
        return plans[kind]()
    except KeyError as error:
        raise CheckpointError(f"{weights.folder / 'config.json'} has no {error}: it is of another release.") from error


def _require_openpi(source: Path, weights: Weights) -> None:
    if not any(name.startswith("paligemma_with_expert.") for name in weights.shapes):
        first = ", ".join(sorted(weights.shapes)[:3])
        raise CheckpointError(
            f"{source} is no checkpoint that is known here. A LeRobot folder has a 'type' in its config.json; openpi's "
            f"weights begin with 'paligemma_with_expert.'. These begin: {first}."
        )


def _tokenizer(source: Path, options: Options) -> tokenizer.Tokenizer:
    for folder in (options.tokenizer, options.vlm):
        if folder is not None:
            return tokenizer.load(folder)
    for folder in (source / "tokenizer", source):
        if (folder / tokenizer.FILE).is_file():
            return tokenizer.load(folder)
    raise UsageError(
        f"{source} does not carry its tokenizer. Get {tokenizer.FILE} of the model that it was made from and give its "
        "folder: --tokenizer DIR."
    )


def _require_words(words: tokenizer.Tokenizer, plan: Plan) -> None:
    size = plan.backbone["text_config"]["vocab_size"]
    if words.vocab_size > size:
        raise CheckpointError(
            f"The tokenizer has {words.vocab_size} tokens, the weights embed {size}: it is that of another model."
        )


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table("change", "weights", "what", "why", title="what was changed")
    for row in rows:
        table.add_row(row.change, str(row.count), row.what, row.why)
    console.print(table)


def horizons(text: str) -> tuple[int, ...]:
    """ "3,6,9" -> (3, 6, 9)."""
    return tuple(int(part) for part in text.split(","))


def main(argv: Sequence[str] | None = None) -> int:
    p = cli.parser(__doc__)
    p.add_argument("source", type=Path, help="folder with model.safetensors and, if it has one, config.json")
    p.add_argument("output", type=Path, help="the policy folder to write")
    p.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder with the tokenizer.json of the VLM")
    p.add_argument("--vlm", type=Path, metavar="DIR", help="smolvla: folder with config.json and tokenizer.json")
    p.add_argument("--recipe", type=Path, metavar="YAML", help="what state and action mean, and which camera is which")
    p.add_argument("--statistics", type=Path, metavar="JSON", help="statistics for what the source's own lack")
    p.add_argument("--execute", type=int, metavar="N", help="steps executed before planning anew")
    p.add_argument("--chunk", type=int, metavar="N", help="openpi without config.json: steps of a chunk")
    p.add_argument("--state", choices=("prompt", "none"), help="pi05 of openpi: whether the prompt tells the state")
    p.add_argument("--horizons", type=horizons, default=(), metavar="N,N", help="of a mixture of horizons")
    p.add_argument("--freeze", nargs="*", choices=get_args(Part), help="parts of the backbone that stay as they are")
    args = p.parse_args(argv)
    freeze = None if args.freeze is None else tuple(args.freeze)
    given = Given(args.execute, args.chunk, args.state, args.horizons, freeze)
    options = Options(args.tokenizer, args.vlm, args.recipe, args.statistics, given)

    def body() -> None:
        show(convert(args.source, args.output, options), Console())
        print(f"wrote {args.output}")

    return cli.run(body)


if __name__ == "__main__":
    sys.exit(main())
