"""One token for each number: a bin of the number's dimension, step by step (RT-1, OpenVLA). H * A tokens.

uniform: K equal bins between -1 and 1, which are the data's 1 % and 99 % quantiles under that normalisation;
    what lies outside goes to the outermost bin.
quantile: K bins that hold equal shares of the data, so that they are narrow where actions are frequent; each
    stands for the mean of its data.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vla.action_tokens.base import ActionTokenizer, ChunkShape, Manifest
from vla.bins import Bins
from vla.config import build
from vla.errors import CheckpointError, UsageError
from vla.files import write_json

TABLE = "bins.json"


@dataclass(frozen=True)
class BinsConfig:
    """Settings of a tokenizer of bins."""

    count: int  # K, bins for each dimension
    edges: Literal["uniform", "quantile"]
    binary: tuple[int, ...]  # dimensions of two values, -1 and 1; with uniform edges only


@dataclass(frozen=True)
class Table:
    """Bins of unequal width; ids grow with the value."""

    inner: np.ndarray  # (A, K-1) float64, model units: the lowest value of bins 1..K-1, not decreasing
    values: np.ndarray  # (A, K) float64, model units: what each bin decodes to


class BinsTokenizer(ActionTokenizer):
    """Bins, flattened step-major.

    Args:
        table: of `quantile` edges; None with uniform ones.
    """

    KIND = "bins"

    def __init__(self, chunk: ChunkShape, config: BinsConfig, table: Table | None) -> None:
        super().__init__(chunk)
        _require_sensible(config, chunk)
        self.config, self.table = config, table
        self._bins = Bins(config.count, chunk.dim, config.binary)

    @property
    def vocab_size(self) -> int:
        return self.config.count

    @property
    def tokens(self) -> int:
        return self.chunk.length * self.chunk.dim

    def _encode(self, actions: np.ndarray) -> list[np.ndarray]:
        if self.table is None:
            ids = self._bins.encode(torch.from_numpy(np.ascontiguousarray(actions))).numpy()
        else:
            columns = [np.searchsorted(e, actions[..., d], side="right") for d, e in enumerate(self.table.inner)]
            ids = np.stack(columns, axis=-1)
        return list(ids.reshape(len(actions), -1).astype(np.int64))

    def _decode(self, ids: list[np.ndarray]) -> np.ndarray:
        numbers = self._of_equal_length(ids).reshape(-1, self.chunk.length, self.chunk.dim)
        if self.table is None:
            return self._bins.decode(torch.from_numpy(numbers)).numpy().astype(np.float32)
        return np.stack([v[numbers[..., d]] for d, v in enumerate(self.table.values)], axis=-1).astype(np.float32)

    def _settings(self) -> dict[str, Any]:
        return asdict(self.config)

    def _write(self, folder: Path) -> None:
        if self.table is not None:
            write_json(folder / TABLE, {"inner": self.table.inner.tolist(), "values": self.table.values.tolist()})


def fit(chunks: np.ndarray, chunk: ChunkShape, config: BinsConfig) -> BinsTokenizer:
    """Bins for data like `chunks` (N, H, A) float32, model units. Raises `UsageError` for settings without meaning."""
    if config.edges == "uniform":
        return BinsTokenizer(chunk, config, None)
    _require_sensible(config, chunk)
    columns = chunks.reshape(-1, chunk.dim).T.astype(np.float64)
    inner = np.quantile(columns, np.arange(1, config.count) / config.count, axis=1).T  # (A, K-1)
    return BinsTokenizer(chunk, config, Table(inner, np.stack(list(map(_means, columns, inner)))))


def _means(column: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """(K,) mean of each bin's data; a bin without data stands for the edge it begins at."""
    ids = np.searchsorted(inner, column, side="right")
    count = np.bincount(ids, minlength=len(inner) + 1)
    begin = np.concatenate([[column.min()], inner])
    return np.where(count > 0, np.bincount(ids, column, len(inner) + 1) / np.maximum(count, 1), begin)


def read(folder: Path, manifest: Manifest) -> BinsTokenizer:
    """The tokenizer that `save` wrote. Raises `CheckpointError`."""
    try:
        config = build(BinsConfig, manifest.settings, "settings")
        table = None
        if config.edges == "quantile":
            data = json.loads((folder / TABLE).read_text(encoding="utf-8"))
            table = Table(np.array(data["inner"], np.float64), np.array(data["values"], np.float64))
            shapes = ((manifest.chunk.dim, config.count - 1), (manifest.chunk.dim, config.count))
            if (table.inner.shape, table.values.shape) != shapes:
                raise ValueError(f"{table.inner.shape} edges and {table.values.shape} values instead of {shapes}")
        return BinsTokenizer(manifest.chunk, config, table)
    except (OSError, ValueError, KeyError, TypeError, UsageError) as error:
        raise CheckpointError(f"The tokenizer of bins in {folder} is damaged: {error!r}. Fit it anew.") from error


def _require_sensible(config: BinsConfig, chunk: ChunkShape) -> None:
    if config.count < 2:
        raise UsageError(f"A tokenizer of bins needs at least 2 bins, got {config.count}.")
    if config.binary and config.edges != "uniform":
        raise UsageError("Binary dimensions go with uniform edges: quantile edges find the two values by themselves.")
    wrong = [d for d in config.binary if not 0 <= d < chunk.dim]
    if wrong:
        raise UsageError(f"Binary dimensions {wrong} do not exist: actions have dimensions 0..{chunk.dim - 1}.")
