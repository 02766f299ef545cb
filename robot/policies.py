"""From a configuration's `policy` to something that answers observations. No torch here.

expert            the robot's scripted expert, where it has one
zeros             no displacement at all: the baseline that must score about zero
module:function   your own: called with the robot and the settings, returns a `vla.types.Policy`
anything else     a checkpoint folder, a folder with a composition.yaml, or `.../checkpoints/last` of a training run
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from robot.registry import RobotConfig, make_expert
from robot.robot import SimulatedRobot
from vla.errors import CheckpointError, SpecMismatch, UsageError
from vla.load import composition_of, load_policy
from vla.types import ActionChunk, ActionSpec, Observation, Policy


class Zeros:
    """Answers zeros. Only for displacements: for an absolute interface zeros are a place to go to.

    Absolute dimensions without a unit (a gripper's effort) may stand among the displacements.
    """

    CHUNK = 8

    def __init__(self, action_spec: ActionSpec, state_spec: ActionSpec) -> None:
        rows = zip(action_spec.names, action_spec.reference, action_spec.units, strict=True)
        places = [name for name, reference, unit in rows if reference == "absolute" and unit != "1"]
        if places:
            raise SpecMismatch(
                f"Policy 'zeros' is for robots that take displacements. This one takes {places} as absolute "
                "values, where zeros would be a place to move to. Use another baseline."
            )
        self.action_spec, self.state_spec = action_spec, state_spec
        self.cameras: tuple[str, ...] = ()

    def reset(self, seed: int) -> None:
        """Nothing is drawn."""

    def infer(self, observation: Observation) -> ActionChunk:
        actions = np.zeros((self.CHUNK, self.action_spec.dim), np.float32)
        return ActionChunk(observation.stamp_s, 1 / self.action_spec.rate_hz, actions, execute=self.CHUNK)


def resolve(path: str) -> str:
    """`path` itself, or the policy folder that a training run's `checkpoints/last` names now."""
    last = Path(path)
    if last.name != "last" or not last.is_file():
        return path
    return str(last.parent / last.read_text(encoding="utf-8").strip() / "policy")


def make_policy(
    path: str, device: str, settings: Mapping[str, Any], config: RobotConfig, robot: SimulatedRobot
) -> Policy:
    """The policy that `path` names, for `robot`, which was made from `config`.

    Args:
        settings: what replaces a checkpoint's own decode settings, nested or dotted; handed to a function, and
            without meaning for 'expert' and 'zeros', which have none.

    Raises:
        UsageError: no such policy.
        CheckpointError, MissingDependency: as `vla.load.load_policy`.
    """
    flat = flatten(settings)
    if path in ("expert", "zeros"):
        if path == "zeros":
            return Zeros(robot.action_spec, robot.state_spec)
        return make_expert(config, robot)
    if _is_function(path):
        return _import(path)(robot, flat)
    return load_policy(resolve(path), device, flat)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"head": {"steps": 5}} -> {"head.steps": 5}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def fingerprint(path: str) -> str:
    """12 hexadecimal digits of a checkpoint's content, "" for a policy without a folder.

    Raises:
        CheckpointError: a path that names nothing.
    """
    if path in ("expert", "zeros") or _is_function(path):
        return ""
    folder = Path(resolve(path))
    if not folder.is_dir():
        raise CheckpointError(
            f"No such policy: {path}. Give a checkpoint folder, a training run's checkpoints/last, 'expert', "
            "'zeros', or module:function."
        )
    digest = hashlib.sha256()
    composition = composition_of(folder)
    for parent in composition.policies if composition else ():
        digest.update(fingerprint(str(folder / parent)).encode())
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(file.relative_to(folder).as_posix().encode())
        with file.open("rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:12]


def _is_function(path: str) -> bool:
    module, colon, name = path.partition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _import(path: str) -> Callable[..., Policy]:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UsageError(f"Cannot find policy {path!r}: {error}. It must be importable from here.") from error
