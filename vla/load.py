"""The door to the policy for code that must import without torch, such as evaluation. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla import config
from vla.errors import MissingDependency
from vla.lerobot_config import is_lerobot
from vla.types import Policy

COMPOSITION = "composition.yaml"


@dataclass(frozen=True)
class Composition:
    """The file `composition.yaml`: policies that are run as one."""

    policies: tuple[str, ...]  # checkpoint folders of ours, relative to the file's own
    weights: tuple[float, ...]  # one for each, 0 to 1, summing to 1


def composition_of(folder: Path) -> Composition | None:
    """What a folder says of a composition; None where it is something else.

    Raises:
        UsageError: the file is not as it should be.
    """
    file = folder / COMPOSITION
    return config.load(Composition, file) if file.is_file() else None


def load_policy(path: Path | str, device: str = "cpu", settings: Mapping[str, Any] | None = None) -> Policy:
    """The policy of a folder: a checkpoint of ours or of LeRobot's, or a composition.

    Raises:
        MissingDependency: torch or transformers is not installed.
        CheckpointError: the folder is not a whole checkpoint.
        UsageError: settings or composition are not as they should be.
    """
    composition = composition_of(Path(path))
    try:
        if is_lerobot(Path(path)):
            from vla import lerobot_policy

            return lerobot_policy.load(Path(path), device, settings or {})
        if composition is not None:
            from vla.composition import load

            return load(Path(path), composition, device, settings)
        from vla import checkpoint
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"Loading a policy needs {error.name!r}. Install it with: uv sync --extra policy (for LeRobot's policies: "
            "--extra train), or run the policy in another process."
        ) from error
    return checkpoint.load(path, device, settings)
