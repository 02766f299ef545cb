"""The weights of somebody else's checkpoint: names and shapes at once, tensors one after another."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vla.errors import CheckpointError


class Weights:
    """The safetensors files of a folder. Nothing is held but names, shapes and types.

    LeRobot writes `model.` before every name; it is left out here.
    """

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{folder} has no model.safetensors. Give the folder that holds the weights and config.json"
                f"{_hint(folder)}."
            )
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        for path in files:
            for name, shape, dtype in _header(path):
                short = name.removeprefix("model.")
                if short in self.shapes:
                    raise CheckpointError(f"{path} holds {name!r}, once more: leave one checkpoint there.")
                self.shapes[short], self._places[short] = shape, (path, name)
                self._dtypes[short] = dtype

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of each, in the files' order; a tensor is let go before the next is read."""
        wanted = set(names)
        for path in sorted({self._places[name][0] for name in wanted}):
            with _opened(path) as file:
                for short in sorted(n for n in wanted if self._places[n][0] == path):
                    yield short, file.get_tensor(self._places[short][1])

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises `CheckpointError` if there is no such weight."""
        if name not in self.shapes:
            raise CheckpointError(f"{self.folder} holds no weight {name!r}: the checkpoint is incomplete or renamed.")
        return self.shapes[name]

    def are_bf16(self, before: str) -> bool:
        """Whether all weights whose names begin so are bfloat16."""
        return all(dtype == "BF16" for name, dtype in self._dtypes.items() if name.startswith(before))

    def layers(self, before: str) -> int:
        """How many numbers follow `before` (as in "text_model.layers.") in the names."""
        numbers = {name[len(before) :].partition(".")[0] for name in self.shapes if name.startswith(before)}
        return len(numbers)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All of a small file."""
    with _opened(path) as file:
        return {name: file.get_tensor(name).to(torch.float64) for name in file.keys()}  # noqa: SIM118


def read_config(folder: Path) -> dict[str, Any]:
    """config.json; {} if there is none.

    Raises:
        CheckpointError: it is not JSON.
    """
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no mapping.")
    return data


def _header(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return [(name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. It is truncated or not a safetensors file: get it again."
        ) from error


def _hint(folder: Path) -> str:
    below = sorted(p.parent.relative_to(folder) for p in folder.glob("**/model.safetensors"))
    return f", for example {folder / below[-1]}" if below else ""
