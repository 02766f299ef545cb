"""What numbers mean and how they are normalised: from the source as far as it goes, the rest from what is given."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from vla import config
from vla.errors import CheckpointError, UsageError
from vla.lerobot_config import FILE, Meaning
from vla.stats import Moments, Statistics
from vla.types import ActionSpec

KINDS = tuple(f.name for f in fields(Moments))
Found = Mapping[str, Mapping[str, np.ndarray]]


def meaning(source: Path, recipe: Path | None) -> Meaning | None:
    """The blocks `cameras`, `state` and `action` of a recipe, or of the source's tandem.yaml; None if there is neither.

    Raises:
        UsageError: the file lacks one of them, or says something else there.
    """
    path = recipe or (source / FILE if (source / FILE).is_file() else None)
    if path is None:
        return None
    data = config.read(path)
    blocks = {key: data[key] for key in ("cameras", "state", "action") if key in data}
    return config.build(Meaning, blocks, str(path))


def cameras(meant: Meaning | None, keys: list[str]) -> tuple[str, ...]:
    """Names of the policy's cameras in the order of its pictures `keys`.

    Raises:
        UsageError: the recipe has a camera that the policy does not.
    """
    if meant is None:
        return tuple(key.rpartition(".")[2] for key in keys)
    names = {key: name for name, key in meant.cameras.items()}
    foreign = [key for key in names if key not in keys]
    if foreign:
        raise UsageError(
            f"The recipe's cameras name {foreign}, and the policy has {keys}. Give --recipe a copy whose 'cameras' "
            "say which of these each of yours is; the order is the policy's."
        )
    return tuple(names[key] for key in keys if key in names)


def openpi_moments(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """As `convert_lerobot.moments`, of openpi's `assets/.../norm_stats.json`."""
    paths = sorted(folder.glob("assets/**/norm_stats.json"))
    if not paths:
        return {}
    if len(paths) > 1:
        raise CheckpointError(f"{folder} has several norm_stats.json: {[str(p) for p in paths]}. Leave the right one.")
    try:
        data = json.loads(paths[0].read_text(encoding="utf-8"))["norm_stats"]
        sides = {"state": data["state"], "action": data["actions"]}
        return {
            side: {k: np.asarray(v, np.float64) for k, v in kinds.items() if k in KINDS and v is not None}
            for side, kinds in sides.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{paths[0]} holds no statistics of openpi: {error!r}.") from error


def statistics(source: Path, found: Found, meant: Meaning | None, given: Path | None) -> Statistics:
    """The source's own statistics, what they lack filled up from the given file.

    Raises:
        UsageError: something is missing that an option could bring.
        CheckpointError: what is there does not fit.
    """
    base = None if given is None else _read(given)
    if base is not None and meant is not None:
        base.require_for(meant.state.spec, meant.action.spec, "the recipe")
    if base is None and meant is None:
        raise UsageError(
            f"{source} does not say what its numbers mean. Give --recipe (a recipe with 'cameras', 'state' and "
            "'action') or --statistics (made by `vla-data stats`)."
        )
    specs: dict[str, ActionSpec] = {}
    if meant is not None:
        specs = {"state": meant.state.spec, "action": meant.action.spec}
    elif base is not None:
        specs = {"state": base.state_spec, "action": base.action_spec}
    sides = {
        side: _moments(side, spec, found.get(side, {}), None if base is None else getattr(base, side))
        for side, spec in specs.items()
    }
    names = [str(source)] * bool(found) + ([] if base is None else [base.source])
    return Statistics(specs["state"], specs["action"], sides["state"], sides["action"], " and ".join(names))


def _moments(side: str, spec: ActionSpec, found: Mapping[str, np.ndarray], base: Moments | None) -> Moments:
    values: dict[str, Any] = {}
    for kind in KINDS:
        if kind in found:
            values[kind] = int(found[kind][0]) if kind == "count" else _unpadded(found[kind], spec.dim)
        elif base is not None:
            values[kind] = getattr(base, kind)
    missing = [kind for kind in KINDS if kind not in values]
    if missing:
        raise UsageError(
            f"The source's statistics of the {side} lack {missing}. Give a complete file for the same data: "
            "--statistics FILE, made by `vla-data stats`; what the source has itself is kept."
        )
    short = [kind for kind, v in values.items() if kind != "count" and len(v) != spec.dim]
    if short:
        raise CheckpointError(
            f"The source's {side} has {len(values[short[0]])} dimensions, the recipe's {spec.dim}: {spec.names}."
        )
    return Moments(**values)


def _unpadded(values: np.ndarray, dim: int) -> np.ndarray:
    """Without the zeros that openpi may put behind the real dimensions."""
    return values if values[dim:].any() else values[:dim]


def _read(path: Path) -> Statistics:
    try:
        return Statistics.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"Cannot read statistics from {path}: {error!r}. Make them with `vla-data stats`."
        ) from error
