"""What a LeRobot policy folder does not say of itself, in a file `tandem.yaml` beside its weights. No torch.

A LeRobot checkpoint knows shapes and normalisation, but not what its numbers mean: units, limits, rate. The
file holds the blocks `cameras`, `state` and `action` of the recipe that the policy was trained with.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla import config
from vla.errors import CheckpointError, TandemError
from vla.types import ActionSpec

FILE, WEIGHTS = "tandem.yaml", "model.safetensors"
STATE_KEY, ACTION_KEY, EMPTY_CAMERA = "observation.state", "action", "observation.images.empty_camera"


@dataclass(frozen=True)
class VectorMeaning:
    """As a recipe's `state` and `action`."""

    key: str  # LeRobot's name of the vector
    spec: ActionSpec


@dataclass(frozen=True)
class Meaning:
    """What the policy's inputs and outputs are."""

    cameras: dict[str, str]  # the robot's camera -> the policy's key, e.g. "observation.images.top"
    state: VectorMeaning
    action: VectorMeaning
    absent: tuple[str, ...] = ()  # image keys that the robot has no camera for; the policy must be able to do without


def is_lerobot(folder: Path) -> bool:
    """Whether `folder` is a LeRobot policy and nothing of ours."""
    return not (folder / "config.yaml").exists() and "type" in _declared(folder)


def load_meaning(folder: Path) -> Meaning:
    """Read `tandem.yaml` and hold it against the policy's own config.json.

    Raises:
        CheckpointError: the file is missing (the message says what to write), does not fit, or there are no weights.
    """
    declared = _declared(folder)
    if not (folder / WEIGHTS).is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = " It holds a PEFT adapter alone: merge it into its base first." if adapter else ""
        raise CheckpointError(f"{folder} is a LeRobot policy without {WEIGHTS}.{hint}")
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is a LeRobot policy of type {declared['type']!r}, whose files do not say what its numbers mean. "
            f"Write {path} with the blocks 'cameras', 'state' and 'action' of its recipe (see docs/lerobot.md), "
            f"that is with your own names, units, limits and rate in:\n{template(declared)}"
        )
    try:
        meaning = config.load(Meaning, path)
    except TandemError as error:
        raise CheckpointError(str(error)) from error
    _require_fit(meaning, declared, path)
    return meaning


def template(declared: dict[str, Any]) -> str:
    """A `tandem.yaml` of the right sizes for a config.json, with placeholders for what it cannot know."""
    images = [key for key in _images(declared) if not key.startswith(EMPTY_CAMERA)]
    state, action = (_dim(declared[side], key) or 1 for side, key in (_INPUT, _OUTPUT))

    def vector(key: str, dim: int) -> dict[str, Any]:
        names = [f"joint{i}.pos" for i in range(dim)]
        low, high = [-3.14] * dim, [3.14] * dim
        spec = {"names": names, "units": ["rad"] * dim, "reference": ["absolute"] * dim, "low": low, "high": high}
        return {"key": key, "spec": {**spec, "rate_hz": 30.0, "rotation": "none", "gripper": "none"}}

    cameras = {key.rpartition(".")[2]: key for key in images}
    return config.dump({"cameras": cameras, "state": vector(STATE_KEY, state), "action": vector(ACTION_KEY, action)})


_INPUT, _OUTPUT = ("input_features", STATE_KEY), ("output_features", ACTION_KEY)


def _declared(folder: Path) -> dict[str, Any]:
    """config.json, with its features as mappings; {} if there is none that can be read."""
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(data, dict):
        return {}
    return data | {side: data.get(side) or {} for side in ("input_features", "output_features")}


def _images(declared: dict[str, Any]) -> list[str]:
    return [key for key, feature in declared["input_features"].items() if feature["type"] == "VISUAL"]


def _dim(features: dict[str, Any], key: str) -> int | None:
    return features[key]["shape"][0] if key in features else None


def _require_fit(meaning: Meaning, declared: dict[str, Any], path: Path) -> None:
    problems = []
    for vector, (side, expected) in ((meaning.state, _INPUT), (meaning.action, _OUTPUT)):
        dim = _dim(declared[side], expected)
        if vector.key != expected:
            problems.append(f"{expected!r} is the only key this vector can have, got {vector.key!r}")
        elif dim != vector.spec.dim:
            problems.append(f"{expected!r} has {vector.spec.dim} names, the policy has {dim} dimensions")
    images = _images(declared)
    given = [*meaning.cameras.values(), *meaning.absent]
    problems += [f"the policy has no image {key!r}" for key in given if key not in images]
    problems += [f"{key!r} is given twice" for key in sorted(set(given)) if given.count(key) > 1]
    problems += [
        f"no camera for {key!r} (list it under 'absent' if the policy can do without)"
        for key in images
        if key not in given and not key.startswith(EMPTY_CAMERA)
    ]
    others = [k for k, f in declared["input_features"].items() if f["type"] != "VISUAL" and k != STATE_KEY]
    problems += [f"the policy wants {key!r}, which no robot here provides" for key in others]
    if problems:
        raise CheckpointError(f"{path} does not fit config.json: {'; '.join(problems)}. Images: {images}.")
