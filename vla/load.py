"""The door to the policy for code that must import without torch, such as evaluation. No torch here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vla.errors import MissingDependency
from vla.lerobot_config import is_lerobot
from vla.types import Policy


def load_policy(path: Path | str, device: str = "cpu", settings: Mapping[str, Any] | None = None) -> Policy:
    """The policy of a checkpoint folder, ours (`vla.checkpoint.load`) or LeRobot's (`vla.lerobot_policy.load`).

    Raises:
        MissingDependency: torch or transformers is not installed.
        CheckpointError: the folder is not a whole checkpoint.
    """
    try:
        if is_lerobot(Path(path)):
            from vla import lerobot_policy

            return lerobot_policy.load(Path(path), device, settings or {})
        from vla import checkpoint
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"Loading a policy needs {error.name!r}. Install it with: uv sync --extra policy (for LeRobot's policies: "
            "--extra train), or run the policy in another process."
        ) from error
    return checkpoint.load(path, device, settings)
