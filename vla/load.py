"""The door to the policy for code that must import without torch, such as evaluation. No torch here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vla.errors import MissingDependency
from vla.types import Policy


def load_policy(path: Path | str, device: str = "cpu", settings: Mapping[str, Any] | None = None) -> Policy:
    """The policy of a checkpoint folder; see `vla.checkpoint.load`.

    Raises:
        MissingDependency: torch or transformers is not installed.
        CheckpointError: the folder is not a whole checkpoint.
    """
    try:
        from vla import checkpoint
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"Loading a policy needs {error.name!r}. Install it with: uv sync --extra policy, or run the policy in "
            "another process."
        ) from error
    return checkpoint.load(path, device, settings)
