"""What all of LeRobot's policy folders have in common: config.json, and statistics beside the weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deploy.convert_plan import Given
from deploy.convert_source import read_tensors
from vla.backbone_config import Part
from vla.codec import Normalization
from vla.errors import CheckpointError
from vla.lerobot_config import ACTION_KEY, EMPTY_CAMERA, STATE_KEY

NORMALIZATIONS: dict[str, Normalization] = {"MEAN_STD": "mean_std", "QUANTILES": "quantile", "IDENTITY": "identity"}


def require(declared: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    """Raise `CheckpointError` unless this setting is one that the policy here has."""
    if declared[key] not in allowed:
        raise CheckpointError(
            f"config.json: {key} is {declared[key]!r}, and only {' or '.join(map(repr, allowed))} can be converted."
        )


def square(size: Any, key: str) -> int:
    """The side of a square (height, width)."""
    if not isinstance(size, list | tuple) or len(size) != 2 or size[0] != size[1]:
        raise CheckpointError(f"config.json: {key} is {size!r}, and only squares can be converted.")
    return int(size[0])


def freeze_of(declared: Mapping[str, Any], given: Given) -> tuple[Part, ...]:
    if given.freeze is not None:
        return given.freeze
    if declared["train_expert_only"]:
        return ("vision", "connector", "text")
    return ("vision",) if declared["freeze_vision_encoder"] else ()


def normalization_of(declared: Mapping[str, Any]) -> Normalization:
    mapping = declared["normalization_mapping"]
    modes = {mapping.get("STATE"), mapping.get("ACTION")}
    mode = modes.pop()
    if modes or mode not in NORMALIZATIONS:
        raise CheckpointError(
            f"config.json: normalization_mapping is {mapping}. State and action need the same one of "
            f"{', '.join(NORMALIZATIONS)}."
        )
    return NORMALIZATIONS[mode]


def image_keys(declared: Mapping[str, Any]) -> list[str]:
    """The policy's pictures in its order, without the places that LeRobot leaves empty."""
    features = declared.get("input_features") or {}
    keys = [key for key, feature in features.items() if feature["type"] == "VISUAL"]
    return [key for key in keys if not key.startswith(EMPTY_CAMERA)]


def moments(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """ "state" and "action" -> the statistics that the folder keeps of them, by name; {} if it keeps none.

    Raises:
        CheckpointError: their file cannot be read.
    """
    files = [folder / name for name in _state_files(folder)]
    found: dict[str, dict[str, np.ndarray]] = {}
    for path in files:
        for name, tensor in read_tensors(path).items():
            key, _, kind = name.rpartition(".")
            side = {STATE_KEY: "state", ACTION_KEY: "action"}.get(key)
            if side is not None:
                found.setdefault(side, {})[kind] = tensor.numpy().reshape(-1)
    return found


def _state_files(folder: Path) -> list[str]:
    path = folder / "policy_preprocessor.json"
    if not path.is_file():
        return []
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))["steps"]
        return [
            s["state_file"] for s in steps if s.get("registry_name") == "normalizer_processor" and "state_file" in s
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no description of a processor: {error!r}.") from error
