"""Recipes: what a data set is and what its numbers mean. One YAML each in `datasets/`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vla import config
from vla.errors import UsageError
from vla.types import ActionSpec


@dataclass(frozen=True)
class Vector:
    """A vector column of the data set and its meaning."""

    key: str  # column, e.g. "observation.state"
    spec: ActionSpec


@dataclass(frozen=True)
class Language:
    """Where a frame's instruction comes from."""

    source: Literal["task", "constant"]  # the data set's task string, or `text` for every frame
    text: str | None


@dataclass(frozen=True)
class Split:
    """Episodes held out for validation, chosen by episode, never by frame."""

    validation_fraction: float  # 0 keeps none out
    seed: int
    exclude: tuple[int, ...]  # episodes never used

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise UsageError(f"split.validation_fraction must be in [0, 1), got {self.validation_fraction}.")


@dataclass(frozen=True)
class Recipe:
    name: str
    repo_id: str | None  # Hugging Face data set; resolved only because it is written here
    root: Path | None  # local LeRobot v3 folder; wins over `repo_id`
    revision: str | None
    licence: str
    cameras: dict[str, str]  # the policy's camera name -> the data set's key
    state: Vector
    action: Vector
    language: Language
    split: Split

    def __post_init__(self) -> None:
        if self.repo_id is None and self.root is None:
            raise UsageError(f"Recipe {self.name!r} needs a 'root' (local folder) or a 'repo_id' (hub).")
        if self.language.source == "constant" and not self.language.text:
            raise UsageError(f"Recipe {self.name!r}: language.source 'constant' needs a language.text.")
        if not self.cameras:
            raise UsageError(f"Recipe {self.name!r} names no camera.")


def load(path: Path | str) -> Recipe:
    """Read a recipe. Raises `UsageError` as `vla.config.load` does."""
    return config.load(Recipe, path)
